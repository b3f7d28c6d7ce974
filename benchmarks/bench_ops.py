"""Ops of tests/registry/ against their formulas in plain PyTorch, eager and through torch.compile.

An op is measured at the shapes of its `bench` there; its value is summed up on either side.
`kdfast bench` runs this file and makes tables of it; `pytest benchmarks/bench_ops.py` shows the raw figures.
"""

import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kdfast import ops

from . import harness
from .harness import Case

FAMILY = "ops"
TESTS = Path(__file__).resolve().parent.parent / "tests"
MEASURED = []  # stays empty where kdfast is installed, without its tests
if (TESTS / "registry").is_dir():
    sys.path.append(str(TESTS))
    import oracles
    import registry

    MEASURED = [op for op in registry.every_op() if op.bench]


# ---- the cases -------------------------------------------------------------------------------------------------------
def case(op, *shape):
    """An op of the registry at a shape of its group."""
    if len(shape) != len(op.group.small):
        raise ValueError(f"{op} takes {len(op.group.small)} sizes, got {shape}")
    with FakeTensorMode():
        like = op.group.inputs("cpu", shape, torch.float32)
    form = registry.mapped(like, lambda name, t: None)

    def inputs(device):
        x = op.group.inputs(device, shape, torch.float32)
        for t in registry.tensors(x, op.leaves):
            t.requires_grad_()
        return registry.tensors(x, op.read)

    def of(module):
        return lambda *given: op(module, registry.replaced(form, op.read, given)).sum()

    read, written = (sum(t.nbytes for t in registry.tensors(like, names)) for names in (op.read, op.leaves))
    forward, backward = op.bench.work(like) if op.bench.work else (read, read + written)
    floor = {"forward": forward, "backward": backward, "both": forward + backward}
    name = " x ".join(map(str, shape))
    return Case(str(op), name, inputs, of(oracles), of(ops), floor, ceiling=op.bench.ceiling)


def cases(settings, shapes):
    """Every op at its shapes; `shapes`, if any, replaces them all."""
    return [
        case(op, *shape)
        for op in MEASURED
        for shape in shapes or (op.bench.shapes[:1] if settings.quick else op.bench.shapes)
    ]


def host_cases():
    """Every op at the small shape of its group."""
    return [case(op, *op.group.small) for op in MEASURED]


# ---- the measurements ------------------------------------------------------------------------------------------------
test_ceiling, test_loss, test_host = harness.measure_ceiling, harness.measure_loss, harness.measure_host
