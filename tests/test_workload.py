"""The workload that compute-sanitizer watches covers every op, and its results are the same bits however they come."""

import pytest
import torch
import workload
from conftest import require_cuda_kernels
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast import _kernels

RUNS = 100


class Record(TorchDispatchMode):
    """Notes the names of kdfast's ops that run, in backward passes too."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kdfast":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("implementation", ["fallback", "cpu"], indirect=True)
def test_every_op_runs(implementation):
    with Record() as record:
        for call in workload.calls("cpu"):
            loss, *gradients = call.run()
            assert all(x.isfinite().all() for x in [loss, *gradients]), call.name
    assert record.names == set(_kernels.paths()), "an op without a call in workload.py"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_equal_bits_in_every_run(device):
    """On a GPU in 100 runs, whatever its schedule."""
    if device == "cuda":
        require_cuda_kernels()
    for call in workload.calls(device):
        first = call.run()
        for _ in range(RUNS - 1 if device == "cuda" else 1):
            assert all(map(torch.equal, first, call.run())), call.name


def test_cuda_graph_replays_equal_bits():
    """Each call captured once and replayed, its outputs spoilt before."""
    require_cuda_kernels()
    for call in workload.calls("cuda"):
        expected = call.run()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call.run()
        for _ in range(2):
            for output in outputs:
                output.fill_(float("nan"))
            graph.replay()
            assert all(map(torch.equal, expected, outputs)), call.name
