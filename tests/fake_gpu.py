"""A pytest plugin (`-p fake_gpu`) under which "cuda" is the CPU, so that the benchmarks' CUDA path runs without a GPU.

Between two CUDA events TICK seconds pass, whatever lies between them.
"""

from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

from kdfast import _kernels

TICK = 0.0025


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Event:
    def __init__(self, enable_timing=False):
        assert enable_timing
        self.recorded = self.awaited = False

    def record(self):
        self.recorded = True

    def synchronize(self):
        self.awaited = self.recorded

    def elapsed_time(self, end):
        assert self.recorded and end.awaited
        return 1e3 * TICK


def pytest_configure(config):
    memory = iter(range(1000, 10**9, 1000))
    replaced = {
        "Event": Event,
        "is_available": lambda: True,
        "get_device_name": lambda: "Fake GPU",
        "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=2000),
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: next(memory),
        "max_memory_allocated": lambda: next(memory),
    }
    for name, value in replaced.items():
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, value)
    paths = _kernels.paths
    _kernels.paths = lambda: {name: {"cpu": on["cpu"], "cuda": on["cpu"]} for name, on in paths().items()}
    OnCpu().__enter__()
