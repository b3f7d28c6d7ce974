"""Feature maps compared element by element: hints, activation boundaries, factors, pooled differences.

With s and t one element of the student's and the teacher's map, and m the margin of its channel:

    squared_error          mean of (s - t)^2
    channel_squared_error  the same, summed for each channel
    activation_boundary    sum of max(0, m - s)^2 where t > 0, of max(0, s + m)^2 elsewhere; one m for all
    partial_squared_error  sum of (s - u)^2, u = max(t, m), but for s <= u <= 0
    normalized_error       mean of |s / |s| - t / |t||^p, |s| being the norm of the whole sample
    pyramid_error          mean squared errors of the maps, and of their averages over 4 x 4, 2 x 2 and 1 x 1 windows

Raw ops take maps (B, C, N) of any strides, all positions in the last dimension; pyramid_error (B, C, H, W). Gradients
lie in memory as the student's map does: position after position where the channels of a position are neighbours
(channels_last), else channel after channel. Sums are of the accumulation type: float64 if an input is float64, else
float32.
"""

import torch
from torch import Tensor

from kdfast._kernels import op
from kdfast.ops import check, shapes
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.differentiable import statistics_kept
from kdfast.ops.layout import flat, gradient_memory

__all__ = ["activation_boundary", "channel_squared_error", "normalized_error"]
__all__ += ["partial_squared_error", "pyramid_error", "squared_error"]

SQUARE, BOUNDARY, PARTIAL = range(3)  # the terms of feature_error
TOTAL, SAMPLE, CHANNEL = range(3)  # what it sums over: everything, or what one sample or one channel has
SMALLEST = 1e-12  # norms are clamped from below
LEVELS = (4, 2, 1)  # windows of the pyramid in each direction; level k of those used weighs 1 / 2^k


# ---- plain PyTorch: the readable definition --------------------------------------------------------------------------
def _gradients(student_grad, student, teacher_grad, teacher, need_student, need_teacher):
    """Both gradients in the types of their maps; an empty tensor for one that is not needed."""
    return tuple(
        gradient_memory(x, student).copy_(grad) if need else x.new_empty(0)
        for grad, x, need in ((student_grad, student, need_student), (teacher_grad, teacher, need_teacher))
    )


def _sample_sum(x):
    """Sum [B] over all but the first dimension, in a fixed order."""
    return fixed_sum(x.flatten(1))


def _terms(student, teacher, margin, kind, boundary):
    """-> each element's value, its derivatives in student and teacher."""
    dtype = accumulator(student, teacher)
    s, t = student.to(dtype), teacher.to(dtype)
    if kind == SQUARE:
        gap = s - t
        return gap * gap, 2 * gap, -2 * gap
    if kind == BOUNDARY:
        active = t > 0
        gap = torch.where(t.isnan(), t, torch.where(active, boundary - s, s + boundary).clamp(min=0))
        return gap * gap, torch.where(active, -2 * gap, 2 * gap), torch.zeros_like(s)
    m = margin.to(dtype)[:, None]
    u = torch.maximum(t, m)
    gap = torch.where((s <= u) & (u <= 0), 0.0, s - u)
    # Where teacher and margin are equal, each is half of the maximum.
    return gap * gap, 2 * gap, gap * torch.where(t == m, -1.0, torch.where(t < m, 0.0, -2.0))


def _error_shape(student, teacher, over, **_):
    shape = {TOTAL: (), SAMPLE: student.shape[:1], CHANNEL: student.shape[1:2]}[over]
    return shapes.sums(shape, student, teacher)


def _gradient_shapes(student, teacher, need_student, need_teacher, **_):
    sides = ((student, need_student), (teacher, need_teacher))
    return tuple(gradient_memory(x, student) if need else x.new_empty(0) for x, need in sides)


@op("feature", _error_shape)
def _feature_error(
    student: Tensor, teacher: Tensor, margin: Tensor | None, kind: int, boundary: float, over: int, divisor: int
) -> Tensor:
    """-> the terms of maps (B, C, N) over `divisor`, summed over everything (0-d), a sample (B,) or a channel (C,)."""
    values = _terms(student, teacher, margin, kind, boundary)[0]
    if over == CHANNEL:
        return _sample_sum(values.transpose(0, 1)) / divisor
    samples = _sample_sum(values)
    return (samples if over == SAMPLE else fixed_sum(samples)) / divisor


@op("feature", _gradient_shapes)
def _feature_error_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    margin: Tensor | None,
    kind: int,
    boundary: float,
    over: int,
    divisor: int,
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor]:
    """-> gradients of student and teacher; an empty tensor for one that is not needed."""
    _, student_grad, teacher_grad = _terms(student, teacher, margin, kind, boundary)
    factor = grad.to(student_grad.dtype) / divisor
    factor = factor.view({TOTAL: (1, 1, 1), SAMPLE: (-1, 1, 1), CHANNEL: (1, -1, 1)}[over])
    return _gradients(factor * student_grad, student, factor * teacher_grad, teacher, need_student, need_teacher)


def _normalized(student, teacher, norm_student, norm_teacher):
    """-> s / |s|, t / |t| and their difference, which is exactly 0 between equal samples."""
    dtype = accumulator(student, teacher)
    norm_student, norm_teacher = (x.clamp(min=SMALLEST)[:, None, None] for x in (norm_student, norm_teacher))
    s, t = student.to(dtype) / norm_student, teacher.to(dtype) / norm_teacher
    return s, t, s - t


def _power(gap, power):
    """-> |gap|^power, and its derivative."""
    return (gap.abs(), gap.sign()) if power == 1 else (gap * gap, 2 * gap)


@op(
    "feature",
    lambda student, teacher, **_: (
        shapes.sums((), student, teacher),
        shapes.sums((4, student.shape[0]), student, teacher),
    ),
)
def _normalized_error(student: Tensor, teacher: Tensor, power: int) -> tuple[Tensor, Tensor]:
    """-> loss, stats [4, B]: norms of the samples, and products of the slopes with the unit samples, of both sides."""
    dtype = accumulator(student, teacher)
    norms = [_sample_sum(x.to(dtype).square()).sqrt() for x in (student, teacher)]
    s, t, gap = _normalized(student, teacher, *norms)
    values, slopes = _power(gap, power)
    loss = fixed_sum(_sample_sum(values)) / max(student.numel(), 1)
    return loss, torch.stack([*norms, _sample_sum(slopes * s), _sample_sum(slopes * t)])


@op("feature", _gradient_shapes)
def _normalized_error_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, power: int, need_student: bool, need_teacher: bool
) -> tuple[Tensor, Tensor]:
    """-> gradients of student and teacher; an empty tensor for one that is not needed."""
    s, t, gap = _normalized(student, teacher, *stats[:2])
    slopes = _power(gap, power)[1]
    grads = []
    for unit, norm, dot, sign in ((s, stats[0], stats[2], 1), (t, stats[1], stats[3], -1)):
        # A clamped norm is a constant. A zero sample has no direction to turn to.
        dot = torch.where(norm > SMALLEST, dot, 0.0)[:, None, None]
        scale = torch.where(norm > 0, sign / norm.clamp(min=SMALLEST), 0.0)[:, None, None]
        grads.append(grad * (scale / max(student.numel(), 1)) * (slopes - unit * dot))
    return _gradients(grads[0], student, grads[1], teacher, need_student, need_teacher)


def _windows(size, bins):
    """Adaptive average pooling, `size` positions to `bins`, as lists of [begin, end)."""
    return [(i * size // bins, ((i + 1) * size + bins - 1) // bins) for i in range(bins)]


def _pyramid(shape):
    """-> weight of the squared differences, and for each window (rows, columns, its size, weight of its average)."""
    batch, channels, height, width = shape
    levels = [level for level in LEVELS if level < height]
    maps = max(batch * channels, 1)
    total = maps * (2 - 0.5 ** len(levels))
    windows = [
        (slice(*rows), slice(*columns), (rows[1] - rows[0]) * (columns[1] - columns[0]), 0.5**k / (total * bins * bins))
        for k, bins in enumerate(levels, 1)
        for rows in _windows(height, bins)
        for columns in _windows(width, bins)
    ]
    return 1 / (total * height * width), windows


def _window_average(gap, rows, columns, size):
    return fixed_sum(gap[:, :, rows, columns].flatten(2)) / size


@op("feature", lambda student, teacher: shapes.sums((), student, teacher))
def _pyramid_error(student: Tensor, teacher: Tensor) -> Tensor:
    """-> the weighted mean squared error of maps (B, C, H, W) and of their averages, 0-d."""
    dtype = accumulator(student, teacher)
    gap = student.to(dtype) - teacher.to(dtype)
    own, windows = _pyramid(gap.shape)
    loss = own * fixed_sum(_sample_sum(gap * gap))
    for *window, weight in windows:
        average = _window_average(gap, *window)
        loss = loss + weight * fixed_sum((average * average).flatten())
    return loss


@op("feature", _gradient_shapes)
def _pyramid_error_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, need_student: bool, need_teacher: bool
) -> tuple[Tensor, Tensor]:
    """-> gradients of student and teacher; an empty tensor for one that is not needed."""
    gap = student.to(grad.dtype) - teacher.to(grad.dtype)
    own, windows = _pyramid(gap.shape)
    slopes = 2 * own * gap
    for *window, weight in windows:
        rows, columns, size = window
        slopes[:, :, rows, columns] += (2 * weight / size * _window_average(gap, *window))[:, :, None, None]
    slopes *= grad
    return _gradients(slopes, student, -slopes, teacher, need_student, need_teacher)


# ---- public functions ------------------------------------------------------------------------------------------------
_feature_error_function = statistics_kept(_feature_error, _feature_error_backward)
_normalized_error_function = statistics_kept(_normalized_error, _normalized_error_backward)
_pyramid_error_function = statistics_kept(_pyramid_error, _pyramid_error_backward)


def _pair(student, teacher):
    check.two_embeddings(student, teacher, check.same_shape)
    return flat(student), flat(teacher)


def _reduced(student, teacher, margin, kind, boundary, reduction):
    check.reduction(reduction)
    divisor = max(student.shape[0], 1) if reduction in ("mean", "batchmean") else 1
    over = SAMPLE if reduction == "none" else TOTAL
    return _feature_error_function((kind, boundary, over, divisor), student, teacher, margin)


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean (s - t)^2`` over all elements.

    Args:
        student, teacher: maps of one shape (B, C, ...) or (B, C), float32, float64, float16 or bfloat16, any strides;
            dtypes may differ. Maps that share their memory format (NCHW or channels_last) are read fastest.

    Returns: 0-d in the accumulation type: float64 if an input is float64, else float32.

    Gradients flow to both; there is no second derivative (RuntimeError).

    Raises: TypeError, ValueError naming the argument.
    """
    student, teacher = _pair(student, teacher)
    return _feature_error_function((SQUARE, 0.0, TOTAL, max(student.numel(), 1)), student, teacher, None)


def channel_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """``sum (s - t)^2`` over all samples and positions, (C,).

    Shapes, gradients and errors are those of :func:`squared_error`.
    """
    student, teacher = _pair(student, teacher)
    return _feature_error_function((SQUARE, 0.0, CHANNEL, 1), student, teacher, None)


def activation_boundary(student: Tensor, teacher: Tensor, margin: float = 1.0, *, reduction: str = "sum") -> Tensor:
    """``max(0, margin - s)^2`` where t > 0, ``max(0, s + margin)^2`` elsewhere, summed over a sample's elements.

    Args:
        student, teacher: pre-activations, as in :func:`squared_error`; there is no gradient to the teacher.
        margin: a number.
        reduction: "sum", "none" (one value per sample, (B,)), "mean" or "batchmean" (the sum over B).

    Returns, errors: as in :func:`squared_error`.
    """
    check.number("margin", margin)
    student, teacher = _pair(student, teacher)
    return _reduced(student, teacher.detach(), None, BOUNDARY, float(margin), reduction)


def partial_squared_error(student: Tensor, teacher: Tensor, margin: Tensor, *, reduction: str = "sum") -> Tensor:
    """``(s - u)^2`` with ``u = max(t, margin)``, but 0 where ``s <= u <= 0``, summed over a sample's elements.

    Args:
        student, teacher: pre-activations, as in :func:`squared_error`; gradients flow to both.
        margin: one number per channel, (C,) or (1, C, 1, 1); no gradient.
        reduction: "sum", "none" (one value per sample, (B,)), "mean" or "batchmean" (the sum over B).

    Returns, errors: as in :func:`squared_error`.
    """
    student, teacher = _pair(student, teacher)
    check.channel_values("margin", margin, student)
    return _reduced(student, teacher, margin.detach().flatten(), PARTIAL, 0.0, reduction)


def normalized_error(student: Tensor, teacher: Tensor, power: int = 1) -> Tensor:
    """``mean |s / max(|s|, 1e-12) - t / max(|t|, 1e-12)|^power`` over all elements; |s| is the norm of a sample.

    `power` is 1 or 2. Gradients flow to both maps, none to a sample that is all zeros. Shapes, gradients and errors are
    those of :func:`squared_error`.
    """
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power!r}")
    return _normalized_error_function((power,), *_pair(student, teacher))


def pyramid_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two maps and of their averages over 4 x 4, 2 x 2 and 1 x 1 windows, with weights.

    The weights are 1, 1/2, 1/4 and 1/8, divided by their sum. A level of as many windows as the map has rows, or more,
    is left out. Windows are those of adaptive average pooling.

    Args:
        student, teacher: maps (B, C, H, W), as in :func:`squared_error`.

    Returns, gradients, errors: as in :func:`squared_error`.
    """
    for name, x in (("student", student), ("teacher", teacher)):
        check.maps(name, x)
    check.same_shape("teacher", teacher, student)
    return _pyramid_error_function((), student, teacher)
