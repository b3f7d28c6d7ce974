"""Statistics of a batch norm's input against the published hook, eager and through torch.compile.

`kdfast bench` runs this file and makes tables of it; `pytest benchmarks/bench_moments.py` shows the raw figures.
"""

import torch

import kdfast

from . import harness
from .harness import Case

FAMILY = "moments"
SHAPES = [(64, 256, 14, 14), (64, 256, 56, 56)]
HOST_SHAPE = (2, 4, 2, 2)
LOSSES = {"BN statistics": torch.contiguous_format, "BN statistics, channels_last": torch.channels_last}


# ---- the baseline ----------------------------------------------------------------------------------------------------
def eager(x, running_mean, running_var):
    """DeepInversion's hook: a mean, a copy with the channels first, a variance."""
    mean = x.mean([0, 2, 3])
    variance = x.permute(1, 0, 2, 3).contiguous().view([x.shape[1], -1]).var(1, unbiased=False)
    return torch.norm(running_var - variance, 2) + torch.norm(running_mean - mean, 2)


# ---- the cases -------------------------------------------------------------------------------------------------------
def case(name, *shape):
    """The loss on a map of `shape`; fewer dimensions are (batch, channels)."""
    shape = (*shape, 1, 1)[:4]

    def inputs(device):
        x = torch.randn(shape, device=device).contiguous(memory_format=LOSSES[name])
        return x.requires_grad_(), torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)

    # Each direction reads the map; backward writes its gradient.
    map_ = 4 * torch.Size(shape).numel()
    floor = {"forward": map_, "backward": 2 * map_, "both": 3 * map_}
    return Case(name, " x ".join(map(str, shape)), inputs, eager, kdfast.bn_statistics_loss, floor)


cases, host_cases = harness.of_shapes(case, LOSSES, SHAPES, HOST_SHAPE)


# ---- the measurements ------------------------------------------------------------------------------------------------
test_ceiling, test_loss, test_host = harness.measure_ceiling, harness.measure_loss, harness.measure_host
