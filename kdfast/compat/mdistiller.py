"""mdistiller's loss functions: ``from kdfast.compat.mdistiller import kd_loss`` in place of mdistiller.distillers.KD.

Student first, arguments in the original's order; 0-d, but for sp_loss, which is of shape (1,) as there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import kdfast
from kdfast import ops
from kdfast.compat._kdsvd import kdsvd
from kdfast.compat._original import attention_error, distance_error, layers, of_each, pdist, poly_kernel, shortened
from kdfast.losses.feature import gaussian_error, variance_of
from kdfast.ops import check
from kdfast.ops.accumulate import accumulator, total
from kdfast.ops.pool import to_smaller_square

__all__ = ["at_loss", "dkd_loss", "feat_loss", "hcl_loss", "kd_loss"]
__all__ += ["kdsvd_loss", "nst_loss", "pkt_loss", "poly_kernel", "rkd_loss"]
__all__ += ["similarity_loss", "single_stage_at_loss", "single_stage_nst_loss", "sp_loss", "vid_loss"]


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """:func:`kdfast.ops.softmax_kl` of logits (B, C)."""
    return ops.softmax_kl(logits_student, logits_teacher, temperature)


def dkd_loss(
    logits_student: Tensor, logits_teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """:func:`kdfast.ops.dkd` of logits (B, C) and labels.

    Finite where the original is not: at T = 1 for logits of standard deviation 50, for a target 1000 above the rest,
    and in every gradient to the teacher.
    """
    return ops.dkd(logits_student, logits_teacher, target.reshape(-1), temperature, alpha=alpha, beta=beta)


def at_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], p: float) -> Tensor:
    """:class:`kdfast.AT` of lists of maps; p is any number above 0, as in RepDistiller's Attention."""
    return total(of_each(lambda s, t: attention_error(s, t, p), g_s, g_t))


def single_stage_at_loss(f_s: Tensor, f_t: Tensor, p: float) -> Tensor:
    """:func:`at_loss` of one layer."""
    return attention_error(f_s, f_t, p)


def nst_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """:class:`kdfast.NST` of lists of maps."""
    return kdfast.NST()(*shortened(g_s, g_t))


def single_stage_nst_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """:func:`nst_loss` of one layer."""
    return kdfast.NST()(f_s, f_t)


def pkt_loss(f_s: Tensor, f_t: Tensor, eps: float = 1e-7) -> Tensor:
    """:class:`kdfast.PKT` of embeddings (B, D)."""
    return kdfast.PKT(eps)(f_s, f_t)


def sp_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> Tensor:
    """:class:`kdfast.SP` of lists of maps, of shape (1,)."""
    return kdfast.SP()(*shortened(g_s, g_t)).view(1)


def similarity_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """:func:`sp_loss` of one layer."""
    return kdfast.SP()(f_s, f_t).view(1)


def rkd_loss(
    f_s: Tensor,
    f_t: Tensor,
    squared: bool = False,
    eps: float = 1e-12,
    distance_weight: float = 25,
    angle_weight: float = 50,
) -> Tensor:
    """:class:`kdfast.RKD` of embeddings (B, ...); with `squared` the distance term compares squared distances.

    `eps` is the least squared distance of two samples. One sample gives 0, not NaN.
    """
    if not squared and eps == 1e-12:
        return ops.rkd(f_s, f_t, distance_weight, angle_weight)
    distances = (pdist(x, squared, eps) for x in (f_s, f_t.detach()))
    return distance_weight * distance_error(*distances) + ops.rkd(f_s, f_t, 0.0, angle_weight)


def vid_loss(regressor: Callable[..., Any], log_scale: Tensor, f_s: Tensor, f_t: Tensor, eps: float = 1e-5) -> Tensor:
    """The formula of :class:`kdfast.VID`, of maps (B, C, H, W), with the caller's regressor and variances (C',).

    mdistiller never trains log_scale, which no optimizer sees there; :class:`kdfast.VID` does.
    """
    ((f_s, f_t),) = check.layers([f_s], [f_t], check.maps)
    f_s, f_t = to_smaller_square(f_s, f_t)
    mean = regressor(f_s)
    return gaussian_error(mean, f_t, variance_of(log_scale.to(mean.device, accumulator(mean, f_t)), eps))


def kdsvd_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], k: int) -> Tensor:
    """:class:`kdfast.compat.repdistiller.KDSVD` of other matrices: (C H, W) of each map, as the original has them.

    That was the layout of a code for maps (H, W, C): the vectors here have an entry for each column of a map, so both
    networks' maps are equally wide. The original rounds float64 to float32. Lists of maps to a 0-d loss.
    """
    pairs = layers(g_s, g_t, check.maps)
    if len(pairs) < 2:
        raise ValueError(f"g_s and g_t must have at least two layers, got {len(pairs)}")
    return total(kdsvd(*([x.flatten(1, 2) for x in maps] for maps in zip(*pairs, strict=True)), k))


def hcl_loss(fstudent: Sequence[Tensor], fteacher: Sequence[Tensor]) -> Tensor:
    """:class:`kdfast.HCL` of lists of maps."""
    return kdfast.HCL()(*shortened(fstudent, fteacher))


def feat_loss(source: Tensor, target: Tensor, margin: Tensor) -> Tensor:
    """:class:`kdfast.OFD` over the batch size: pre-activations (B, C, H, W), margin (1, C, 1, 1), at most 0."""
    margin = margin.to(source)
    if target.requires_grad:  # where it equals the margin OFD gives it half of the gradient, the original none
        target = torch.where(target > margin, target, target.detach())
    return kdfast.OFD(reduction="mean")(source, target, margin)
