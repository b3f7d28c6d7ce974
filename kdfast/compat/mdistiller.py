"""mdistiller's loss functions: ``from kdfast.compat.mdistiller import kd_loss`` in place of mdistiller.distillers.KD.

Student first, arguments in the original's order; 0-d, but for sp_loss, which is of shape (1,) as there.
"""

import torch
from torch.nn import functional as F

import kdfast
from kdfast import ops
from kdfast.compat._kdsvd import kdsvd
from kdfast.losses.feature import gaussian_error, variance_of
from kdfast.ops import check
from kdfast.ops.accumulate import accumulator, fixed_sum, total
from kdfast.ops.pool import to_smaller_square

__all__ = [
    "at_loss",
    "dkd_loss",
    "feat_loss",
    "hcl_loss",
    "kd_loss",
    "kdsvd_loss",
    "nst_loss",
    "pkt_loss",
    "rkd_loss",
    "sp_loss",
    "vid_loss",
]


def kd_loss(logits_student, logits_teacher, temperature):
    """:func:`kdfast.ops.softmax_kl` of logits (B, C)."""
    return ops.softmax_kl(logits_student, logits_teacher, temperature)


def dkd_loss(logits_student, logits_teacher, target, alpha, beta, temperature):
    """:func:`kdfast.ops.dkd` of logits (B, C) and labels.

    Finite where the original is not: at T = 1 for logits of standard deviation 50, for a target 1000 above the rest,
    and in every gradient to the teacher.
    """
    return ops.dkd(logits_student, logits_teacher, target.reshape(-1), temperature, alpha=alpha, beta=beta)


def at_loss(g_s, g_t, p):
    """:class:`kdfast.AT` of lists of maps."""
    return kdfast.AT(p)(g_s, g_t)


def nst_loss(g_s, g_t):
    """:class:`kdfast.NST` of lists of maps."""
    return kdfast.NST()(g_s, g_t)


def pkt_loss(f_s, f_t, eps=1e-7):
    """:class:`kdfast.PKT` of embeddings (B, D)."""
    return kdfast.PKT(eps)(f_s, f_t)


def sp_loss(g_s, g_t):
    """:class:`kdfast.SP` of lists of maps, of shape (1,)."""
    return kdfast.SP()(g_s, g_t).view(1)


def rkd_loss(f_s, f_t, squared=False, eps=1e-12, distance_weight=25, angle_weight=50):
    """:class:`kdfast.RKD` of embeddings (B, ...); with `squared` the distance term compares squared distances.

    `eps` is the least squared distance of two samples. One sample gives 0, not NaN.
    """
    if not squared and eps == 1e-12:
        return ops.rkd(f_s, f_t, distance_weight, angle_weight)
    check.positive("eps", eps)
    distance = F.smooth_l1_loss(*(_over_mean(x, squared, eps) for x in (f_s, f_t.detach())), reduction="none")
    distance = fixed_sum(fixed_sum(distance)) / max(distance.numel(), 1)
    return distance_weight * distance + ops.rkd(f_s, f_t, 0.0, angle_weight)


def _over_mean(x, squared, eps):
    """Distances [B, B] among the rows of x over their mean off the diagonal, where none is below `eps` squared."""
    distances = ops.pairwise_distance(x, squared=True).clamp(min=eps)
    distances = (distances if squared else distances.sqrt()) * (1 - torch.eye(len(x), device=x.device))
    pairs = max(len(x) * (len(x) - 1), 1)
    mean = fixed_sum(fixed_sum(distances)) / pairs
    return distances / mean if len(x) > 1 else distances


def vid_loss(regressor, log_scale, f_s, f_t, eps=1e-5):
    """The formula of :class:`kdfast.VID`, of maps (B, C, H, W), with the caller's regressor and variances (C',).

    mdistiller never trains log_scale, which no optimizer sees there; :class:`kdfast.VID` does.
    """
    ((f_s, f_t),) = check.layers([f_s], [f_t], check.maps)
    f_s, f_t = to_smaller_square(f_s, f_t)
    mean = regressor(f_s)
    return gaussian_error(mean, f_t, variance_of(log_scale.to(mean.device, accumulator(mean, f_t)), eps))


def kdsvd_loss(g_s, g_t, k):
    """:class:`kdfast.compat.repdistiller.KDSVD` of other matrices: (C H, W) of each map, as the original has them.

    That was the layout of a code for maps (H, W, C): the vectors here have an entry for each column of a map, so both
    networks' maps are equally wide. The original rounds float64 to float32. Lists of maps to a 0-d loss.
    """
    pairs = check.layers(g_s, g_t, check.maps)
    if len(pairs) < 2:
        raise ValueError(f"g_s and g_t must have at least two layers, got {len(pairs)}")
    return total(kdsvd(*([x.flatten(1, 2) for x in maps] for maps in zip(*pairs, strict=True)), k))


def hcl_loss(fstudent, fteacher):
    """:class:`kdfast.HCL` of lists of maps."""
    return kdfast.HCL()(fstudent, fteacher)


def feat_loss(source, target, margin):
    """:class:`kdfast.OFD` over the batch size: pre-activations (B, C, H, W), margin (1, C, 1, 1), at most 0."""
    margin = margin.to(source)
    if target.requires_grad:  # where it equals the margin OFD gives it half of the gradient, the original none
        target = torch.where(target > margin, target, target.detach())
    return kdfast.OFD(reduction="mean")(source, target, margin)
