"""Attention maps: where in a feature map the channels are active, normalised and compared.

    m_n = sum_c x_cn^p,    q = m / max(|m|_2, 1e-12 C),    loss = 1 / (B N) sum_bn (q_bn - q'_bn)^2

with x [C, N] one sample of the student, q' the teacher's. The forward keeps the slopes dL/dm [B, N] only; a gradient is
slope_n p x_cn^(p-1), one more read of x. The maps are compared as they are: 1 - cos would lose all digits of a small
difference. A map that is 0 has q = 0.
"""

import torch
from torch import Tensor

from kdfast._kernels import op
from kdfast.ops import check, shapes
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.differentiable import gradient_formed
from kdfast.ops.elementwise import power as power_of

__all__ = ["attention_transfer"]

EPS = 1e-12  # the smallest norm of the mean over channels, as in torch.nn.functional.normalize


# ---- plain PyTorch: the readable definition --------------------------------------------------------------------------
def map_slope(own: Tensor, other: Tensor, norm: Tensor, factor: float, floored: Tensor) -> Tensor:
    """dL/dm [B, N] of one side; own and other are q and q', factor is p 2 / (B N)."""
    grad = factor * (own - other)
    along = torch.where(floored, 0.0, fixed_sum(own * grad))
    return (grad - own * along[:, None]) / norm[:, None]


def _loss_and_slopes(student, teacher, need_student, need_teacher, **_):
    shape = (student.shape[0], student.shape[2])
    slopes = [shapes.sums(shape if need else 0, student, teacher) for need in (need_student, need_teacher)]
    return shapes.sums((), student, teacher), *slopes


@op("attention", _loss_and_slopes)
def _attention_transfer(
    student: Tensor, teacher: Tensor, power: int, need_student: bool, need_teacher: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss; slopes [B, N], p dL/dm, of the sides that need them."""
    dtype = accumulator(student, teacher)
    sides = []
    for x in (student, teacher):
        # Channels are added in blocks, which keeps the temporary x^p small beside x.
        m = sum(power_of(part.to(dtype), power).sum(1) for part in x.split(64, 1))
        norm, floor = fixed_sum(m.double().square()).sqrt().to(dtype), EPS * x.shape[1]
        sides.append((m / norm.clamp(min=floor)[:, None], norm.clamp(min=floor), norm <= floor))
    (q_s, *rest_s), (q_t, *rest_t) = sides
    entries = max(q_s.numel(), 1)
    loss = fixed_sum(fixed_sum((q_s - q_t).square())) / entries
    slope_s = map_slope(q_s, q_t, rest_s[0], 2 * power / entries, rest_s[1]) if need_student else q_s.new_empty(0)
    slope_t = map_slope(q_t, q_s, rest_t[0], 2 * power / entries, rest_t[1]) if need_teacher else q_t.new_empty(0)
    return loss, slope_s, slope_t


def _gradient_like(x):
    """An uninitialised gradient [B, C, N] that lies in memory as x does: channels last where its channels are next."""
    batch, channels, positions = x.shape
    if channels_last(x):
        return x.new_empty(batch, positions, channels).transpose(1, 2)
    return x.new_empty(batch, channels, positions)


def channels_last(x: Tensor) -> bool:
    """Whether the channels of x [B, C, N] are neighbours in memory and the positions are not."""
    return x.stride(1) == 1 and x.stride(2) != 1


@op("attention", lambda x, **_: _gradient_like(x))
def _attention_transfer_backward(grad: Tensor, slope: Tensor, x: Tensor, power: int) -> Tensor:
    """grad slope_bn x_bcn^(p-1) in x's dtype."""
    out = (grad * slope)[:, None] * power_of(x.to(slope.dtype), power - 1)
    return _gradient_like(x).copy_(out)


# ---- public functions ------------------------------------------------------------------------------------------------
def _transfer(student, teacher, *settings):
    return _attention_transfer(student.flatten(2), teacher.flatten(2), *settings)


def _gradient(grad, slope, x, power):
    return _attention_transfer_backward(grad, slope, x.flatten(2), power).unflatten(2, x.shape[2:])


_attention_transfer_function = gradient_formed(_transfer, _gradient, "attention_transfer")


def attention_transfer(student: Tensor, teacher: Tensor, power: int = 2) -> Tensor:
    """``1 / (B N) sum_bn (q_bn - q'_bn)^2``: q is the map ``sum_c x_c^power`` of a sample, divided by its norm.

    Args:
        student, teacher: maps (B, C, H, W) and (B, C', H, W), float32, float64, float16 or bfloat16; dtypes may differ.
            Contiguous and channels_last maps are read as they lie; others are copied.
        power: an int of at least 1; an odd power keeps the sign of x.

    Returns: 0-d in the accumulation type: float64 if an input is float64, else float32. Exactly 0 for equal maps.

    Gradients flow to both, in their memory format; there is no second derivative (RuntimeError).

    Raises: TypeError, ValueError naming the argument.
    """
    check.two_maps(student, teacher)
    check.count("power", power)
    return _attention_transfer_function((power,), student, teacher)
