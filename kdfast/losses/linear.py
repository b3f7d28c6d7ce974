"""Losses on hidden states: the classifier inside."""

from typing import Any, ClassVar

from torch import Tensor

from kdfast.losses.base import REDUCTION, SHARE, TEMPERATURE, Loss, Settings, or_none
from kdfast.ops.linear import linear_kl
from kdfast.ops.softmax_kl import TopK


class LinearKD(Loss):
    """LinearKD - Distilling the Knowledge in a Neural Network, from hidden states (Hinton, Vinyals and Dean, 2014).

    ``D_beta`` of :class:`JSD` (KD for beta=0), or with `alpha` ``alpha D_beta + (1 - alpha) CE(student, labels)``, of
    the rows that count, with the classifier inside: neither side's logits exist as a whole.
    Shapes: student_hidden (..., Hs), student_weight (V, Hs), teacher_hidden (..., Ht) or a :class:`kdfast.TopK`,
    teacher_weight (V, Ht) or None; labels (...) integers, mask (...) bool, weight (...), divisor a number or 0-d,
    biases (V,). 0-d float32, in nats. No T^2 unless `scale_by_t2`.

    Args: those of :func:`kdfast.ops.linear_kl`, which says what they do. alpha: None, or from 0 to 1.

    Op: ``linear_kl``.
    """

    settings: ClassVar[Settings] = {
        "temperature": TEMPERATURE,
        "beta": SHARE,
        "alpha": or_none(SHARE),
        "teacher_temperature": or_none(TEMPERATURE),
        "reduction": REDUCTION,
    }

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        beta: float = 0.0,
        alpha: float | None = None,
        teacher_temperature: float | Tensor | None = None,
        ignore_index: int = -100,
        scale_by_t2: bool = False,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        student_scale: float = 1.0,
        teacher_scale: float = 1.0,
        reduction: str = "mean",
        chunk: int | None = None,
        group: Any = None,
        vocabulary: str = "strict",
    ) -> None:
        super().__init__()
        self.temperature: float | Tensor = temperature
        self.beta: float = beta
        self.alpha: float | None = alpha
        self.teacher_temperature: float | Tensor | None = teacher_temperature
        self.ignore_index: int = ignore_index
        self.scale_by_t2: bool = scale_by_t2
        self.student_softcap: float | None = student_softcap
        self.teacher_softcap: float | None = teacher_softcap
        self.student_scale: float = student_scale
        self.teacher_scale: float = teacher_scale
        self.reduction: str = reduction
        self.chunk: int | None = chunk
        self.group: Any = group
        self.vocabulary: str = vocabulary

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
