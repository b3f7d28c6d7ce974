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
from kdfast.ops.blocks import by_block
from kdfast.ops.differentiable import statistics_kept
from kdfast.ops.layout import flat, gradient_memory

__all__ = ["activation_boundary", "channel_squared_error", "normalized_error"]
__all__ += ["partial_squared_error", "pyramid_error", "squared_error"]

SQUARE, BOUNDARY, PARTIAL = range(3)  # the terms of feature_error
TOTAL, SAMPLE, CHANNEL = range(3)  # what it sums over: everything, or what one sample or one channel has
SMALLEST = 1e-12  # norms are clamped from below
PYRAMID_BLOCK = 2**21  # elements of a block, which takes a hundred operations
LEVELS = (4, 2, 1)  # windows of the pyramid in each direction; level k of those used weighs 1 / 2^k


# ---- plain PyTorch: the readable definition --------------------------------------------------------------------------
def _sample_sum(x):
    """Sum [B] over all but the first dimension, in a fixed order."""
    return fixed_sum(x.flatten(1))


def _gap(s, t, margin, kind, boundary):
    """-> what is squared, for each element. By signs and limits: on a CPU they take a tenth of a mask's time."""
    if kind == SQUARE:
        return s - t
    if kind == BOUNDARY:
        gap = (boundary - _side(t).mul_(s)).clamp_(min=0)
        return gap.add_(t.clamp(0, 0))  # NaN where the teacher is
    u = torch.maximum(t, margin)
    least = u.sign().clamp_(min=0).mul_(-torch.finfo(s.dtype).max)  # 0 where u <= 0, else none
    return torch.maximum(s - u, least)


def _side(t):
    """1 where t > 0, -1 elsewhere."""
    return t.sign().sub_(0.5).sign_()


def _slope(gap, t, margin, kind, of_teacher):
    """Half the derivative of gap^2 in the student or in the teacher, in the memory of gap."""
    if kind == BOUNDARY:
        return gap.mul_(_side(t).neg_())
    if not of_teacher:
        return gap
    # Where teacher and margin are equal, each is half of the maximum.
    return gap.neg_() if kind == SQUARE else gap.mul_((t - margin).sign_().add_(1).mul_(-0.5))


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
    dtype = accumulator(student, teacher)
    margin = None if margin is None else margin.to(dtype)[:, None]

    def block(student, teacher):
        gap = _gap(student.to(dtype), teacher.to(dtype), margin, kind, boundary)
        gap *= gap
        return (fixed_sum(gap) if over == CHANNEL else _sample_sum(gap),)

    (sums,) = by_block(block, student, teacher)
    if over == CHANNEL:
        return fixed_sum(sums.t()) / divisor
    return (sums if over == SAMPLE else fixed_sum(sums)) / divisor


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
    dtype = accumulator(student, teacher)
    margin = None if margin is None else margin.to(dtype)[:, None]
    factor = (2 * grad.to(dtype) / divisor).view({TOTAL: (1, 1, 1), SAMPLE: (-1, 1, 1), CHANNEL: (1, -1, 1)}[over])
    factor = factor.expand(len(student), -1, -1)

    def block(student, teacher, factor):
        s, t = student.to(dtype), teacher.to(dtype)
        return tuple(
            _slope(_gap(s, t, margin, kind, boundary), t, margin, kind, of_teacher).mul_(factor)
            for of_teacher, need in enumerate((need_student, need_teacher))
            if need
        )

    return _in_memory(block, (student, need_student), (teacher, need_teacher), factor)


def _in_memory(block, student, teacher, *others, elements=None):
    """Gradients of (map, needed) by blocks, in the memory order of the student's map; empty where not needed."""
    grads = [gradient_memory(x, student[0]) if need else x.new_empty(0) for x, need in (student, teacher)]
    by_block(block, student[0], teacher[0], *others, into=[x for x in grads if x.numel()], elements=elements)
    return tuple(grads)


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

    def block(student, teacher):
        norms = [_sample_sum(x.to(dtype).square()).sqrt() for x in (student, teacher)]
        s, t, gap = _normalized(student, teacher, *norms)
        values, slopes = _power(gap, power)
        dots = _sample_sum(slopes * s), _sample_sum(slopes.mul_(t))
        return _sample_sum(values), torch.stack([*norms, *dots], 1)

    values, stats = by_block(block, student, teacher)
    return fixed_sum(values) / max(student.numel(), 1), stats.t().contiguous()


@op("feature", _gradient_shapes)
def _normalized_error_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, stats: Tensor, power: int, need_student: bool, need_teacher: bool
) -> tuple[Tensor, Tensor]:
    """-> gradients of student and teacher; an empty tensor for one that is not needed."""

    def block(student, teacher, stats):
        s, t, gap = _normalized(student, teacher, *stats[:, :2].unbind(1))
        slopes = _power(gap, power)[1]
        sides = ((need_student, s, 0, 1), (need_teacher, t, 1, -1))
        return tuple(of_side(slopes, unit, stats, which, sign) for need, unit, which, sign in sides if need)

    def of_side(slopes, unit, stats, which, sign):
        # A clamped norm is a constant. A zero sample has no direction to turn to.
        norm = stats[:, which]
        dot = torch.where(norm > SMALLEST, stats[:, 2 + which], 0.0)[:, None, None]
        scale = torch.where(norm > 0, sign / norm.clamp(min=SMALLEST), 0.0)[:, None, None]
        return (slopes - unit.mul_(dot)).mul_(grad * (scale / divisor))

    divisor = max(student.numel(), 1)
    return _in_memory(block, (student, need_student), (teacher, need_teacher), stats.t())


def _windows(size, bins):
    """Adaptive average pooling, `size` positions to `bins`, as lists of [begin, end)."""
    return [(i * size // bins, ((i + 1) * size + bins - 1) // bins) for i in range(bins)]


def _pyramid(shape):
    """-> weight of the squared differences; for each level its windows in a direction, and the weight of a window."""
    batch, channels, height, width = shape
    levels = [level for level in LEVELS if level < height]
    maps = max(batch * channels, 1)
    total = maps * (2 - 0.5 ** len(levels))
    return 1 / (total * height * width), [(n, 0.5**k / (total * n * n)) for k, n in enumerate(levels, 1)]


def _window_averages(gap, bins):
    """[B, C, bins, bins] of [B, C, H, W]: first over the rows of the windows, then over their columns."""
    rows = torch.stack([gap[:, :, i:j].mean(2) for i, j in _windows(gap.shape[2], bins)], 2)
    return torch.stack([rows[..., i:j].mean(3) for i, j in _windows(gap.shape[3], bins)], 3)


def _add_to_windows(slopes, averages):
    """The same backwards: what each average has is shared among its window's positions."""
    bins = averages.shape[2]
    rows = slopes.new_zeros((*averages.shape[:3], slopes.shape[3]))
    for k, (i, j) in enumerate(_windows(slopes.shape[3], bins)):
        rows[..., i:j] += averages[..., k, None] / (j - i)
    for k, (i, j) in enumerate(_windows(slopes.shape[2], bins)):
        slopes[:, :, i:j] += rows[:, :, k, None] / (j - i)


@op("feature", lambda student, teacher: shapes.sums((), student, teacher))
def _pyramid_error(student: Tensor, teacher: Tensor) -> Tensor:
    """-> the weighted mean squared error of maps (B, C, H, W) and of their averages, 0-d."""
    dtype = accumulator(student, teacher)
    own, levels = _pyramid(student.shape)

    def block(student, teacher):
        gap = student.to(dtype) - teacher.to(dtype)
        averages = [(weight, _window_averages(gap, bins)) for bins, weight in levels]
        values = own * _sample_sum(gap.mul_(gap))
        return (values + sum(weight * _sample_sum(x * x) for weight, x in averages),)

    return fixed_sum(by_block(block, student, teacher, elements=PYRAMID_BLOCK)[0])


@op("feature", _gradient_shapes)
def _pyramid_error_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, need_student: bool, need_teacher: bool
) -> tuple[Tensor, Tensor]:
    """-> gradients of student and teacher; an empty tensor for one that is not needed."""
    own, levels = _pyramid(student.shape)

    def block(student, teacher):
        gap = student.to(grad.dtype) - teacher.to(grad.dtype)
        slopes = 2 * own * gap
        for bins, weight in levels:
            _add_to_windows(slopes, 2 * weight * _window_averages(gap, bins))
        slopes *= grad
        return tuple(
            x for x, need in ((slopes, need_student), (-slopes if need_teacher else None, need_teacher)) if need
        )

    return _in_memory(block, (student, need_student), (teacher, need_teacher), elements=PYRAMID_BLOCK)


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
