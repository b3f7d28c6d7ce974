"""Attention transfer against its official code's maths, eager and through torch.compile.

`kdfast bench` runs this file and makes tables of it; `pytest benchmarks/bench_attention.py` shows the raw figures.
"""

import torch
import torch.nn.functional as F

import kdfast

from . import harness
from .harness import Case

FAMILY = "attention"
SHAPES = [(64, 256, 14, 14), (64, 256, 56, 56)]
HOST_SHAPE = (2, 4, 2, 2)


# ---- the baseline ----------------------------------------------------------------------------------------------------
def eager_at(student, teacher):
    def attention(maps):
        return F.normalize(maps.pow(2).mean(1).view(maps.size(0), -1))

    return (attention(student) - attention(teacher)).pow(2).mean()


# ---- the cases -------------------------------------------------------------------------------------------------------
def case(*shape):
    """AT on maps of `shape`; fewer dimensions are (batch, channels)."""
    shape = (*shape, 1, 1)[:4]

    def inputs(device):
        student, teacher = (torch.randn(shape, device=device) for _ in range(2))
        return student.requires_grad_(), teacher

    # Forward reads both maps; backward reads the student's and writes its gradient.
    maps = 4 * torch.Size(shape).numel()
    floor = {"forward": 2 * maps, "backward": 2 * maps, "both": 4 * maps}
    return Case("AT", " x ".join(map(str, shape)), inputs, eager_at, kdfast.AT(), floor)


cases, host_cases = harness.of_shapes(lambda name, *shape: case(*shape), ("AT",), SHAPES, HOST_SHAPE)


# ---- the measurements ------------------------------------------------------------------------------------------------
test_ceiling, test_loss, test_host = harness.measure_ceiling, harness.measure_loss, harness.measure_host
