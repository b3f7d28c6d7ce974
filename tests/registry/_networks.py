"""Several networks: what the tests of mixed_logits and of teachers have in common."""

import math

import torch

from registry import FAR

# An exponential below the smallest normal number may be 0, before a log-ratio of 1e4 multiplies it: see test_fuzz.py.
UNDERFLOW = 1e-26


def make(shape):
    """Logits of N networks [B, C], weights of their mixtures [B, N, N], labels, a ramp-up that is a tensor."""
    count, rows, classes = shape
    return {
        "networks": [3 * torch.randn(rows, classes, dtype=torch.float64) for _ in range(count)],
        "mix": torch.randn(rows, count, count, dtype=torch.float64).softmax(2),
        "labels": torch.randint(classes, (rows,)),
        "ramp": torch.tensor(0.25 + torch.rand(()).item(), dtype=torch.float32),
    }


SHARED = {
    "cases": [  # networks, rows, classes
        (1, 1, 1),  # one of each
        (2, 2, 2),
        (3, 5, 7),  # less than the eight elements that a CUDA thread reads at once
        (5, 9, 33),  # one class more than a warp has lanes, one row more than a block has warps
        (3, 2, 1025),  # one more than the 1024 elements that the CPU reads at a time
        (2, 2, 2049),  # the first row that CUDA gives to a whole block
        (17, 2, 20),  # more networks than anything is unrolled for
    ],
    "small": (3, 5, 9),
    "tiny": (3, 3, 4),
    "half": (3, 2, 45),
    "laid_out": ((3, 3, 35),),
    "batch": 1,
    # Under SIMT a thread is a fiber: what another case covers as well is left to the other implementations.
    "simt": lambda shape, dtype: dtype == torch.float32 or math.prod(shape) < 200,
    "far": (((2, 3, 40), (FAR, 1)), ((2, 5, 3), (1, FAR))),
    "deterministic": ((4, 64, 100), (3, 2, 5000), (2, 1, 30_000), (2, 4099, 3)),
    "deterministic_simt": ((3, 10, 40), (2, 1, 2100)),
    "workload": (
        (3, 3, 7),  # less than the eight elements that a thread reads at once
        (5, 9, 33),  # one class more than a warp has lanes, one row more than a block has warps
        (2, 2, 2049),  # the first row that a whole block reads
    ),
}


def make_logits(device, rows, dtype):
    """Three networks and labels, one after another."""
    x = make((3, rows, 9))
    return [*(t.to(device, dtype) for t in x["networks"]), x["labels"].to(device)]
