"""Distillation in wide networks: what a soft label asks for, and how much data it takes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdfast.ops import check
from kdfast.ops.accumulate import accumulator
from kdfast.ops.differentiable import gradient_formed

__all__ = ["data_inefficiency", "effective_logit"]

_HALVINGS = 80  # of a bracket, until no float64 lies in it


def _log_sigmoid_slope(x):
    """log of sigmoid'(x) = sigmoid(x) sigmoid(-x)."""
    return F.logsigmoid(x) + F.logsigmoid(-x)


def _root(teacher, positive, rho, temperature):
    """The root, in float64. For label 0 everything is mirrored: z(t, 0) = -z(-t, 1)."""
    t = torch.where(positive, teacher, -teacher)
    if rho == 1:
        return torch.where(positive, t, -t)
    if rho == 0:
        return torch.where(positive, math.inf, -math.inf).to(t.dtype)
    # Of rho / T (sigma(z / T) - sigma(t / T)) = (1 - rho) sigma(-z) the logarithms are compared, left minus right: it
    # rises with z, from -inf at z = t. sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - e^(b - a)).
    constant = math.log(rho / temperature) - math.log1p(-rho) + F.logsigmoid(-t / temperature)

    def excess(z):
        return (
            constant + F.logsigmoid(z / temperature) + torch.log(-torch.expm1((t - z) / temperature)) - F.logsigmoid(-z)
        )

    low = t
    high = torch.maximum(t + temperature * math.log(2), math.log(4) - constant).clamp(min=0)
    for _ in range(_HALVINGS):
        middle = low + (high - low) / 2
        below = excess(middle) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(positive, high, -high)


def _logit_and_slope(teacher, label, rho, temperature, need_teacher):
    t = teacher.double()
    root = _root(t, label > 0, rho, temperature)
    # Implicit function: rho / T^2 (sigma'(z / T) dz - sigma'(t / T) dt) + (1 - rho) sigma'(z) dz = 0.
    if rho in (0, 1):
        slope = torch.full_like(t, rho)
    else:
        share = math.log(rho) - 2 * math.log(temperature)
        own = torch.logaddexp(
            share + _log_sigmoid_slope(root / temperature), math.log1p(-rho) + _log_sigmoid_slope(root)
        )
        slope = torch.exp(share + _log_sigmoid_slope(t / temperature) - own)
    return root.to(accumulator(teacher)), slope


_effective_logit_function = gradient_formed(
    _logit_and_slope, lambda grad, slope, x, *_: (grad * slope).to(x.dtype), "effective_logit", sides=1
)


def effective_logit(
    teacher_logit: Tensor | float, label: Tensor | int, soft_ratio: float, temperature: float
) -> Tensor:
    """The logit that a student reaches if it can fit anything: Knowledge Distillation in Wide Neural Networks: Risk
    Bound, Data Efficiency and Imperfect Teacher (Ji and Zhu, NeurIPS 2020).

    The root z of ``rho / T (sigma(z / T) - sigma(t / T)) + (1 - rho) (sigma(z) - label)``, where the derivative of the
    binary loss with the share rho = soft_ratio of soft labels is 0: t at rho = 1, infinite at rho = 0. The paper's
    student learns nothing from a teacher but this number. Shapes: teacher_logit any, label of the same shape, 0 or 1;
    the result has the teacher's shape, in float64 for float64, else in float32, and is computed in float64. The
    gradient in teacher_logit is that of the implicit function.

    Raises: TypeError, ValueError naming the argument.
    """
    check.floating("teacher_logit", teacher_logit)
    check.tensor("label", label)
    check.number("soft_ratio", soft_ratio, 0, 1)
    check.positive("temperature", temperature)
    if label.shape != teacher_logit.shape:
        raise ValueError(
            f"label must have teacher_logit's shape {tuple(teacher_logit.shape)}, got {tuple(label.shape)}"
        )
    check.same_device("label", label, teacher_logit, of="teacher_logit")
    if label.device.type == "cpu" and not torch.compiler.is_compiling() and not ((label == 0) | (label == 1)).all():
        raise ValueError(f"label must be 0 or 1, got {label[(label != 0) & (label != 1)][0].item()}")
    return _effective_logit_function((soft_ratio, temperature), teacher_logit, label)


def data_inefficiency(sizes: Sequence[int], weight_changes: Tensor | Sequence[Any]) -> Tensor:
    """How the student's weights still move as the training set grows (Ji and Zhu, NeurIPS 2020).

    ``d ln E|dw_n| / d ln n`` between neighbouring sizes n, with dw_n the change of the student's weights by training on
    n samples and E the mean over the runs: 0 where more data change nothing, larger where learning is less efficient.

    Args:
        sizes: (k,) rising numbers of samples.
        weight_changes: (runs, k) or (k,) lengths |dw_n|, above 0.

    Returns: (k - 1,) in float64, of each step from one size to the next.
    """
    sizes = torch.as_tensor(sizes, dtype=torch.float64)
    changes = torch.as_tensor(weight_changes, dtype=torch.float64)
    if sizes.dim() != 1 or len(sizes) < 2 or not (sizes > 0).all() or not (sizes.diff() > 0).all():
        raise ValueError(f"sizes must be at least two rising numbers above 0, got {sizes.tolist()}")
    changes = torch.atleast_2d(changes)
    finite = changes.numel() and ((changes > 0) & changes.isfinite()).all()
    if changes.dim() != 2 or changes.shape[1] != len(sizes) or not finite:
        raise ValueError(
            f"weight_changes must be (runs, {len(sizes)}) numbers above 0, got shape {tuple(changes.shape)}"
        )
    return changes.mean(0).log().diff() / sizes.log().diff()
