"""Losses on hidden states: the classifier inside."""

from typing import Any

from torch import Tensor

from kdfast.losses.base import REDUCTION, SHARE, TEMPERATURE, Loss, made_of_settings, or_none, setting
from kdfast.ops.linear import linear_kl
from kdfast.ops.softmax_kl import TopK


@made_of_settings
class LinearKD(Loss):
    """LinearKD - Distilling the Knowledge in a Neural Network, from hidden states (Hinton, Vinyals and Dean, 2014).

    ``D_beta`` of :class:`JSD` (KD for beta=0), or with `alpha` ``alpha D_beta + (1 - alpha) CE(student, labels)``, of
    the rows that count, with the classifier inside: neither side's logits exist as a whole.
    Shapes: student_hidden (..., Hs), student_weight (V, Hs), teacher_hidden (..., Ht) or a :class:`kdfast.TopK`,
    teacher_weight (V, Ht) or None; labels (...) integers, mask (...) bool, weight (...), divisor a number or 0-d,
    biases (V,). 0-d float32, in nats. No T^2 unless `scale_by_t2`.

    Args:
        temperature, teacher_temperature: as in :class:`KD`.
        beta: the teacher's share in the mixture, from 0 to 1.
        alpha: weight of the divergence, from 0 to 1; None: no cross-entropy.
        ignore_index: rows with this label count in neither term.
        scale_by_t2: whether the divergence is multiplied by T^2.
        student_softcap, teacher_softcap, student_scale, teacher_scale: of the logits, see :func:`kdfast.ops.linear_kl`.
        reduction: "mean" over the rows that count, "sum" or "none".
        chunk, group, vocabulary: rows at a time, processes with parts of the weights, and weights that differ in
            height, see :func:`kdfast.ops.linear_kl`.

    Op: ``linear_kl``.
    """

    temperature: float | Tensor = setting(1.0, TEMPERATURE)
    beta: float = setting(0.0, SHARE)
    alpha: float | None = setting(None, or_none(SHARE))
    teacher_temperature: float | Tensor | None = setting(None, or_none(TEMPERATURE))
    ignore_index: int = setting(-100)
    scale_by_t2: bool = setting(False)
    student_softcap: float | None = setting(None)
    teacher_softcap: float | None = setting(None)
    student_scale: float = setting(1.0)
    teacher_scale: float = setting(1.0)
    reduction: str = setting("mean", REDUCTION)
    chunk: int | None = setting(None)
    group: Any = setting(None)
    vocabulary: str = setting("strict")

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | TopK,
        teacher_weight: Tensor | None = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        divisor: float | Tensor | None = None,
    ) -> Tensor:
        alpha = self.alpha
        return linear_kl(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            beta=self.beta,
            mask=mask,
            weight=weight,
            labels=labels,
            ignore_index=self.ignore_index,
            kl_weight=1.0 if alpha is None else alpha,
            ce_weight=0.0 if alpha is None else 1 - alpha,
            scale_by_t2=self.scale_by_t2,
            student_softcap=self.student_softcap,
            teacher_softcap=self.teacher_softcap,
            student_scale=self.student_scale,
            teacher_scale=self.teacher_scale,
            reduction=self.reduction,
            divisor=divisor,
            chunk=self.chunk,
            group=self.group,
            vocabulary=self.vocabulary,
        )
