"""Mean and variance of each channel of a map, what a batch norm sees of its input; maps standardised by them."""

import torch
from torch import Tensor

from kdfast._kernels import op
from kdfast.ops import check, shapes
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.differentiable import statistics_kept
from kdfast.ops.layout import flat, gradient_memory

__all__ = ["channel_moments", "standardized_error"]


# ---- plain PyTorch: the readable definition --------------------------------------------------------------------------
def _per_channel(values):
    """(C,) as (C, 1, 1), beside maps that are (B, C, N) with the first two dimensions swapped."""
    return values[:, None, None]


def _channel_sums(values):
    return fixed_sum(fixed_sum(values))


def _mean_and_variance(channels):
    """-> mean, what rounding left out of it, biased variance, each (C,), of (C, B, N)."""
    count = max(channels.shape[1] * channels.shape[2], 1)
    mean = _channel_sums(channels) / count
    gaps = channels - _per_channel(mean)
    rest = _channel_sums(gaps) / count
    return mean, rest, (_channel_sums(gaps.square()) / count - rest.square()).clamp(min=0)


@op("moments", lambda x: shapes.sums((2, x.shape[1]), x))
def _channel_moments(x: Tensor) -> Tensor:
    """-> mean, biased variance [2, C], the variance from centred values: a large mean costs no digits."""
    mean, rest, variance = _mean_and_variance(x.transpose(0, 1).to(accumulator(x)))
    return torch.stack([torch.where(mean.isinf(), mean, mean + rest), variance])


@op("moments", lambda x, **_: gradient_memory(x, x))
def _channel_moments_backward(grad: Tensor, x: Tensor, moments: Tensor) -> Tensor:
    """-> the gradient of x from that of mean and variance [2, C], in the memory order of x."""
    channels = x.transpose(0, 1).to(moments.dtype)
    mean, of_mean, of_variance = (_per_channel(values) for values in (moments[0], *grad))
    slopes = (of_mean + 2 * of_variance * (channels - mean)) / max(x.shape[0] * x.shape[2], 1)
    return gradient_memory(x, x).copy_(slopes.transpose(0, 1))


def _standardized(x, statistics):
    mean, rest, scale = (_per_channel(values) for values in statistics[:3])
    return (x.transpose(0, 1).to(statistics.dtype) - mean - rest) * scale


def _shape_of_error(student, teacher, **_):
    return shapes.sums((), student, teacher), shapes.sums((2, 5, student.shape[1]), student, teacher)


@op("moments", _shape_of_error)
def _standardized_error(student: Tensor, teacher: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """-> loss, and for each side mean, its rest, 1 / (std + epsilon), how much larger the other's is, k of the
    gradient below: [2, 5, C].
    """
    dtype, count = accumulator(student, teacher), student.shape[0] * student.shape[2]
    sides, shares = [], []
    for x in (student, teacher):
        mean, rest, variance = _mean_and_variance(x.transpose(0, 1).to(dtype))
        std = (variance * (count / (count - 1))).sqrt()
        sides.append([mean, rest, 1 / (std + epsilon)])
        shares.append((std / (std + epsilon)).square())
    gaps = _standardized(student, torch.stack(sides[0])) - _standardized(teacher, torch.stack(sides[1]))
    sums = _channel_sums(gaps.square())
    ratio = sides[1][2] / sides[0][2]
    for side, own, other, larger in zip(sides, shares, reversed(shares), (ratio, 1 / ratio), strict=True):
        k = (own - other + sums / (count - 1)) / (2 * own.sqrt())
        side += [larger, torch.where(own == 0, own, k)]
    loss = sums.sum() / (2 * max(count * len(sums), 1))
    return loss, torch.stack([torch.stack(side) for side in sides])


def _shape_of_error_gradients(grad, student, teacher, *, need_student, need_teacher, **_):
    sides = ((student, need_student), (teacher, need_teacher))
    return tuple(gradient_memory(x, student) if need else grad.new_empty(0, dtype=x.dtype) for x, need in sides)


@op("moments", _shape_of_error_gradients)
def _standardized_error_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, need_student: bool, need_teacher: bool
) -> tuple[Tensor, Tensor]:
    """-> with x' and y' standardised, grad / (std + epsilon) (x' - y' - k x') / elements, for either side as x."""
    both = [_standardized(x, of) for x, of in zip((student, teacher), statistics, strict=True)]
    grads = []
    for x, own, other, of, need in zip(
        (student, teacher), both, reversed(both), statistics, (need_student, need_teacher), strict=True
    ):
        if not need:
            grads.append(grad.new_empty(0, dtype=x.dtype))
            continue
        slopes = (own - other - _per_channel(of[4]) * own) * _per_channel(grad / max(x.numel(), 1) * of[2])
        grads.append(gradient_memory(x, student).copy_(slopes.transpose(0, 1)))
    return grads[0], grads[1]


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


_standardized_error_function = statistics_kept(_standardized_error, _standardized_error_backward)


def standardized_error(student: Tensor, teacher: Tensor, epsilon: float = 1e-6) -> Tensor:
    """``mean (s' - t')^2 / 2``, of maps whose channels are standardised over samples and positions: 0-d.

    x' = (x - mean) / (std + epsilon), std with n - 1. It is (1 - r) (n - 1) / n, r the correlation of student and
    teacher in a channel, averaged over channels, but for epsilon. A constant channel becomes zeros.

    Args:
        student, teacher: of one shape, (B, C, ...) or (B, C), float32, float64, float16 or bfloat16, any strides, with
            more than one value a channel, or none: then the loss is 0.
        epsilon: above 0.

    Gradients flow to both, through mean and std; there is no second derivative (RuntimeError).

    Raises: TypeError, ValueError naming the argument.
    """
    check.two_embeddings(student, teacher, check.same_shape)
    check.positive("epsilon", epsilon)
    if student.numel() and student.numel() == student.shape[1]:
        raise ValueError(f"student must have more than one value a channel, got {tuple(student.shape)}")
    return _standardized_error_function((float(epsilon),), flat(student), flat(teacher))
