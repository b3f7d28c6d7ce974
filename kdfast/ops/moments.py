"""Mean and variance of each channel of a map: what a batch norm sees of its input."""

import torch
from torch import Tensor

from kdfast._kernels import op
from kdfast.ops import check, shapes
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.differentiable import statistics_kept
from kdfast.ops.layout import flat, gradient_memory

__all__ = ["channel_moments"]


# ---- plain PyTorch: the readable definition --------------------------------------------------------------------------
def _per_channel(values):
    """(C,) as (C, 1, 1), beside maps that are (B, C, N) with the first two dimensions swapped."""
    return values[:, None, None]


@op("moments", lambda x: shapes.sums((2, x.shape[1]), x))
def _channel_moments(x: Tensor) -> Tensor:
    """-> mean, biased variance [2, C], the variance from centred values: a large mean costs no digits."""
    channels = x.transpose(0, 1).to(accumulator(x))
    count = max(x.shape[0] * x.shape[2], 1)
    mean = fixed_sum(fixed_sum(channels)) / count
    gaps = channels - _per_channel(mean)
    rest = fixed_sum(fixed_sum(gaps)) / count  # what rounding left out of the mean
    variance = (fixed_sum(fixed_sum(gaps.square())) / count - rest.square()).clamp(min=0)
    return torch.stack([torch.where(mean.isinf(), mean, mean + rest), variance])


@op("moments", lambda x, **_: gradient_memory(x, x))
def _channel_moments_backward(grad: Tensor, x: Tensor, moments: Tensor) -> Tensor:
    """-> the gradient of x from that of mean and variance [2, C], in the memory order of x."""
    channels = x.transpose(0, 1).to(moments.dtype)
    mean, of_mean, of_variance = (_per_channel(values) for values in (moments[0], *grad))
    slopes = (of_mean + 2 * of_variance * (channels - mean)) / max(x.shape[0] * x.shape[2], 1)
    return gradient_memory(x, x).copy_(slopes.transpose(0, 1))


# ---- public functions ------------------------------------------------------------------------------------------------
_channel_moments_function = statistics_kept(_channel_moments, _channel_moments_backward)


def channel_moments(x: Tensor) -> Tensor:
    """Mean and biased variance of each channel over samples and positions, (2, C).

    Args:
        x: (B, C, ...) or (B, C), float32, float64, float16 or bfloat16, any strides.

    Returns: (2, C) in the accumulation type: float64 for float64, else float32. Of no samples both are 0.

    Gradients flow to x; there is no second derivative (RuntimeError).

    Raises: TypeError, ValueError naming the argument.
    """
    check.embeddings("x", x)
    return _channel_moments_function((), flat(x))
