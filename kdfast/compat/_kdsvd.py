"""Self-supervised knowledge distillation with singular vectors (Lee, Kim and Song, ECCV 2018), for those who have it.

It is no loss of kdfast's own: what it compares depends on the signs of singular vectors, which nothing determines.
The rule here: of each of the teacher's vectors the entry of largest magnitude is positive, of equal ones the first.
The student's vectors take the sign that fits the teacher's, so the loss is the same on every device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.ops import check
from kdfast.ops.accumulate import accumulator, fixed_sum

SPARE = 3  # of the student's vectors, beyond the teacher's, among which the matching ones are looked for


class _RightSingularVectors(torch.autograd.Function):
    """The first `count` right singular vectors V [B, D, count] of x [B, N, D].

    dV_i = sum_j V_j (V_j' d(x'x) V_i) / (s_i^2 - s_j^2) over all j that differ from i in s^2: between vectors of equal
    singular values nothing is determined, and no gradient flows (torch's own is NaN there).
    """

    @staticmethod
    def forward(ctx, x, count):
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        ctx.save_for_backward(u, s, vh)
        return vh[:, :count].mT.contiguous()

    @staticmethod
    def backward(ctx, grad):
        check.first_derivative_only("compat.KDSVD")
        u, s, vh = ctx.saved_tensors
        count = grad.shape[2]
        noise = s[:, :1].square() * torch.finfo(s.dtype).eps  # what squares of equal singular values may differ by
        squares = s.square()
        gaps = squares[:, None, :count] - squares[:, :, None]  # [B, all, count]
        inverse = torch.where(gaps.abs() > noise[:, None], 1 / gaps, 0.0)
        inside = vh @ grad  # what grad has along each vector
        outside = (grad - vh.mT @ inside) * torch.where(squares > noise, 1 / squares, 0.0)[:, None, :count]
        inside = inside * inverse
        first_u, first_s = u[:, :, :count], s[:, None, :count]
        x_grad = (u * s[:, None]) @ inside @ vh[:, :count] + (first_u * first_s) @ (vh.mT @ inside + outside).mT
        return x_grad, None


def _vectors(x, count):
    """-> the first `count` right singular vectors of x [B, N, D], and their singular values in shares of length 1."""
    _, s, vh = torch.linalg.svd(x, full_matrices=False)
    v = vh[:, :count].mT
    largest = v.gather(1, v.abs().argmax(1, keepdim=True))
    return torch.where(largest < 0, -v, v), torch.nn.functional.normalize(s[:, :count])


def aligned(student: Tensor, teacher: Tensor) -> Tensor:
    """For each of the teacher's vectors the student's that is nearest to it or to its opposite, turned towards it."""
    cosines = student.detach().mT @ teacher
    nearest = cosines.abs() == cosines.abs().amax(1, keepdim=True)
    return student @ torch.where(nearest, cosines.sign(), 0.0)


def _relations(late, early):
    """exp(-(late_im - early_jm)^2 / 8) [B, i, j, m]."""
    return torch.exp((late[:, :, None] - early[:, None]).square() / -8)


def kdsvd(student: Sequence[Tensor], teacher: Sequence[Tensor], count: int) -> list[Tensor]:
    """One loss for each two consecutive layers, of matrices [B, N, D] of which rows are samples of D features.

    The sum of the squared differences between both networks' relations among the entries of two layers' vectors, over
    B. D is the same in both networks, N may differ. The gradient goes to the student and stops at the teacher.
    """
    check.count("k", count)
    sides = []
    for layer, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if s.shape[2] != t.shape[2]:
            raise ValueError(
                f"teacher[{layer}] must have singular vectors of the student's {s.shape[2]} entries, got {t.shape[2]}"
            )
        dtype = accumulator(s, t)
        with torch.autocast(s.device.type, enabled=False):
            vectors, shares = _vectors(t.detach().to(dtype), count)
            own = _RightSingularVectors.apply(s.to(dtype), count + SPARE)
            sides.append((aligned(own, vectors) * shares[:, None], vectors * shares[:, None]))
    return relation_errors(sides)


def relation_errors(sides: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The loss of each two consecutive layers, whose vectors (student's, teacher's) [B, D, count] are `sides`."""
    losses = []
    for early, late in zip(sides, sides[1:], strict=False):
        gap = torch.sub(*(_relations(*layers) for layers in zip(late, early, strict=True)))
        losses.append(fixed_sum(fixed_sum(gap.square().flatten(1))) / max(gap.shape[0], 1))
    return losses
