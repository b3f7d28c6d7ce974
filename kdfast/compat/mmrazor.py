"""mmrazor's losses under their own names, with the originals' arguments and numbers: maps and logits of detectors.

A loss is float32 where the original returns float16 or bfloat16, and finite where its sum is.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import kdfast
from kdfast._types import Tensors
from kdfast.ops import check, softmax_kl, squared_error

__all__ = ["ChannelWiseDivergence", "DISTLoss", "DKDLoss", "KLDivergence", "MGDLoss", "PKDLoss"]


class ChannelWiseDivergence(nn.Module):
    """:class:`kdfast.CWD` times `loss_weight`, of maps (N, C, H, W); the teacher has a gradient, too."""

    def __init__(self, tau: float = 1.0, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.tau, self.loss_weight = tau, loss_weight

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        return self.loss_weight * kdfast.CWD(self.tau)(preds_S, preds_T)


class PKDLoss(nn.Module):
    """:class:`kdfast.PKD` times `loss_weight`, of maps or tuples of maps.

    Where the heights differ, the student's map is resized, or the teacher's without `resize_stu`.
    """

    def __init__(self, loss_weight: float = 1.0, resize_stu: bool = True) -> None:
        super().__init__()
        self.loss_weight, self.resize_stu = loss_weight, resize_stu

    def forward(self, preds_S: Tensors, preds_T: Tensors) -> Tensor:
        pair = (preds_S, preds_T) if self.resize_stu else (preds_T, preds_S)  # the first is resized
        return self.loss_weight * kdfast.PKD()(*pair)


class MGDLoss(nn.Module):
    """``alpha_mgd sum (s - t)^2 / N`` of maps (N, C, H, W): :class:`kdfast.MGD` without its layers."""

    def __init__(self, alpha_mgd: float = 0.00002) -> None:
        super().__init__()
        self.alpha_mgd = alpha_mgd

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        return self.alpha_mgd * preds_T[:1].numel() * squared_error(preds_S, preds_T)


class KLDivergence(nn.Module):
    """``tau^2 KL(p || q)`` times `loss_weight`, of softmaxes over dimension 1 of logits (N, C) or maps (N, C, H, W).

    `reduction`: "batchmean" divides by N, of maps too, "mean" by all entries, "sum". Not "none", which gives an entry
    for each class. Of maps this is no :class:`kdfast.CWD`, whose softmaxes are over the positions.
    """

    def __init__(
        self, tau: float = 1.0, reduction: str = "batchmean", loss_weight: float = 1.0, teacher_detach: bool = True
    ) -> None:
        super().__init__()
        check.one_of("reduction", reduction, ("batchmean", "mean", "sum"))
        self.tau, self.reduction, self.loss_weight, self.teacher_detach = tau, reduction, loss_weight, teacher_detach

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        if self.teacher_detach:
            preds_T = preds_T.detach()
        loss = softmax_kl(preds_S.movedim(1, -1), preds_T.movedim(1, -1), self.tau, reduction="sum")
        return self.loss_weight * loss / {"batchmean": len(preds_S), "mean": preds_S.numel(), "sum": 1}[self.reduction]


class DKDLoss(nn.Module):
    """:class:`kdfast.DKD` times `loss_weight`, of logits (N, C).

    `reduction`: "batchmean" is the mean over the N rows. "sum", "mean" and "none" all sum, as in the original, where an
    old argument of torch's kl_div goes before them. data_samples: objects with ``gt_label.label`` (one-hot
    ``gt_label.score`` counts by its argmax, which the original cannot do), or the labels (N,).
    """

    def __init__(
        self,
        tau: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        reduction: str = "batchmean",
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check.one_of("reduction", reduction, ("none", "batchmean", "mean", "sum"))
        self.tau, self.alpha, self.beta, self.reduction, self.loss_weight = tau, alpha, beta, reduction, loss_weight

    def forward(self, preds_S: Tensor, preds_T: Tensor, data_samples: Tensor | Sequence[Any]) -> Tensor:
        loss = kdfast.DKD(self.tau, self.alpha, self.beta)(preds_S, preds_T, _labels(data_samples))
        return self.loss_weight * loss * (1 if self.reduction == "batchmean" else len(preds_S))


def _labels(samples):
    if isinstance(samples, Tensor):
        return samples
    if "score" in samples[0].gt_label:
        return torch.stack([x.gt_label.score for x in samples]).argmax(1)
    return torch.hstack([x.gt_label.label for x in samples])


class DISTLoss(nn.Module):
    """:class:`kdfast.DIST` times `loss_weight`, of logits (N, C)."""

    def __init__(
        self,
        inter_loss_weight: float = 1.0,
        intra_loss_weight: float = 1.0,
        tau: float = 1.0,
        loss_weight: float = 1.0,
        teacher_detach: bool = True,
    ) -> None:
        super().__init__()
        self.inter_loss_weight, self.intra_loss_weight = inter_loss_weight, intra_loss_weight
        self.tau, self.loss_weight, self.teacher_detach = tau, loss_weight, teacher_detach

    def forward(self, logits_S: Tensor, logits_T: Tensor) -> Tensor:
        if self.teacher_detach:
            logits_T = logits_T.detach()
        dist = kdfast.DIST(self.inter_loss_weight, self.intra_loss_weight, self.tau)
        return self.loss_weight * dist(logits_S, logits_T)
