"""Channels of maps compared as distributions over their positions: rows of softmax_kl that may lie with gaps.

A channels_last map has its channels side by side, so the row of a channel is strided. Kernels of its own read such maps
as they lie, position after position; those of other maps are softmax_kl's, whose rows are the channels.
"""

import torch
from torch import Tensor

from kdfast._kernels import op
from kdfast.ops import check, shapes
from kdfast.ops.attention import channels_last
from kdfast.ops.differentiable import statistics_kept
from kdfast.ops.layout import flat
from kdfast.ops.softmax_kl import softmax_kl

__all__ = ["channel_kl"]


# ---- plain PyTorch: the readable definition --------------------------------------------------------------------------
def _rows(x):
    return x.reshape(-1, x.shape[2])


def _shape(student, teacher, **_):
    return shapes.sums((), student, teacher), shapes.sums((6, student.shape[0] * student.shape[1]), student, teacher)


@op("channel_kl", _shape)
def _channel_kl(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """-> loss; statistics [6, B C], those of softmax_kl."""
    s, t = _rows(student), _rows(teacher)
    return torch.ops.kdfast.softmax_kl(s, t, None, None, temperature, 0.0, max(len(s), 1), True)


def _gradient_memory(x):
    """Position after position."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)


def _gradient_shapes(grad, student, teacher, *, need_student, need_teacher, **_):
    sides = ((student, need_student), (teacher, need_teacher))
    return tuple(_gradient_memory(x) if need else x.new_empty(0) for x, need in sides)


@op("channel_kl", _gradient_shapes)
def _channel_kl_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    temperature: float,
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor]:
    """-> gradients of student and teacher, position after position; an empty tensor for one that is not needed."""
    s, t = _rows(student), _rows(teacher)
    settings = (temperature, 0.0, max(len(s), 1), need_student, need_teacher)
    grads = torch.ops.kdfast.softmax_kl_backward(grad, s, t, None, None, statistics, *settings)
    of_s, of_t = (
        _gradient_memory(x).copy_(g.view(x.shape)) if need else x.new_empty(0)
        for x, g, need in zip((student, teacher), grads, (need_student, need_teacher), strict=True)
    )
    return of_s, of_t


# ---- public functions ------------------------------------------------------------------------------------------------
_channel_kl_function = statistics_kept(_channel_kl, _channel_kl_backward)


def channel_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 / (B C) sum KL(softmax(t / T) || softmax(s / T))``, the softmax of a channel over its positions: 0-d.

    Args:
        student, teacher: of one shape, (B, C, ...) or (B, C), float32, float64, float16 or bfloat16, any strides;
            contiguous and channels_last maps are read as they lie. A position with -inf in the teacher adds nothing,
            one with -inf in the student alone makes the loss infinite.
        temperature: T, above 0.

    Gradients flow to both; there is no second derivative (RuntimeError).

    Raises: TypeError, ValueError naming the argument.
    """
    check.two_embeddings(student, teacher, check.same_shape)
    check.positive("temperature", temperature)
    s, t = flat(student), flat(teacher)
    if channels_last(s):
        return _channel_kl_function((float(temperature),), s, t)
    return softmax_kl(s, t, temperature)
