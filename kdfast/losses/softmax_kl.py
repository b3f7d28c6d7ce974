"""Losses on logits that run on the softmax-KL kernels."""

import math
from typing import Any

import torch
from torch import Tensor

from kdfast.losses.base import (
    AT_LEAST_0,
    REDUCTION,
    SHARE,
    TEMPERATURE,
    Loss,
    RowLoss,
    made_of_settings,
    or_none,
    setting,
)
from kdfast.ops import check
from kdfast.ops.rows import batch_size
from kdfast.ops.softmax_kl import Teacher, cross_entropy, cross_entropy_kl, cross_entropy_loss, dkd, softmax_kl


@made_of_settings
class KD(Loss):
    """KD - Distilling the Knowledge in a Neural Network (Hinton, Vinyals and Dean, NIPS workshop 2014).

    ``T^2 KL(p || q)`` with p = softmax(teacher / T), q = softmax(student / T), summed over classes, averaged over the
    rows. With `alpha`: ``alpha T^2 KL + (1 - alpha) CE(student, labels)`` from one read of the student's logits.

    Shapes: student, teacher (..., C) logits, every leading index a row; labels (...) integers or (..., C) probabilities
    (mixup). Loss in nats, 0-d (``reduction="none"``: one value a row, (...)).

    Args:
        temperature: a number, a 0-d tensor, or a tensor of one for each row; one that requires a gradient gets it.
        alpha: weight of the KL, from 0 to 1; None: no cross-entropy, and labels are ignored.
        label_smoothing, ignore_index: of the cross-entropy, which is divided by the rows that are not ignored (torch's
            own is NaN when there is none); the KL takes them all.
        reduction: as in :func:`kdfast.ops.softmax_kl`.
        teacher_temperature: None: the student's, whose square stays the factor in any case.
        standardize: both sides become (z - mean) / (1e-7 + std) of their row, see :class:`LSKD`.

    `mask`, `weight`, `divisor` of forward: as in :func:`kdfast.ops.softmax_kl`; masked rows may hold NaN.
    Gradients flow to the teacher too. It may be a :class:`kdfast.TopK`, k logits of a row and the rest as one, or k
    log-probabilities; it gets no gradient then.
    Differs from ``nn.KLDivLoss()``, whose default divides by B * C. Op: :func:`kdfast.ops.softmax_kl`,
    :func:`kdfast.ops.cross_entropy_kl`.
    """

    temperature: float | Tensor = setting(4.0, TEMPERATURE)
    alpha: float | None = setting(None, or_none(SHARE))
    label_smoothing: float = setting(0.0, SHARE)
    ignore_index: int = setting(-100)
    reduction: str = setting("batchmean", REDUCTION)
    teacher_temperature: float | Tensor | None = setting(None, or_none(TEMPERATURE))
    standardize: bool = setting(False)

    def forward(
        self,
        student: Tensor,
        teacher: Teacher,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        divisor: float | Tensor | None = None,
    ) -> Tensor:
        if self.alpha is None:
            if labels is not None:
                check.tensor("labels", labels)
            return softmax_kl(
                student,
                teacher,
                self.temperature,
                teacher_temperature=self.teacher_temperature,
                standardize=self.standardize,
                mask=mask,
                weight=weight,
                divisor=divisor,
                reduction=self.reduction,
            )
        if labels is None:
            raise ValueError(f"labels are required because alpha={self.alpha} weighs a cross-entropy, got None")
        return cross_entropy_kl(
            student,
            teacher,
            labels,
            self.temperature,
            kl_weight=self.alpha,
            ce_weight=1 - self.alpha,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            teacher_temperature=self.teacher_temperature,
            standardize=self.standardize,
            mask=mask,
            weight=weight,
            divisor=divisor,
            reduction=self.reduction,
        )


@made_of_settings
class ReverseKD(RowLoss):
    """Reverse KD - the mode-seeking direction, as in codistillation (Anil et al., ICLR 2018) and later language models.

    ``T^2 KL(q || p)`` with q = softmax(student / T), p = softmax(teacher / T), averaged over the rows that count.
    Shapes: student, teacher (..., C) logits; 0-d loss in nats. Gradients flow to both. `mask`, `weight`, `divisor`: as
    in :class:`KD`. Op: ``softmax_kl(beta=1)``.

    Args:
        temperature: T, as in :class:`KD`.
    """

    temperature: float | Tensor = setting(1.0, TEMPERATURE)

    def compute(self, student: Tensor, teacher: Teacher, **of_rows: Any) -> Tensor:
        return softmax_kl(student, teacher, self.temperature, beta=1.0, **of_rows)


@made_of_settings
class JSD(RowLoss):
    """JSD - generalised Jensen-Shannon divergence, as in on-policy distillation (Agarwal et al., ICLR 2024).

    ``T^2 [beta KL(p || m) + (1 - beta) KL(q || m)]``, ``m = beta p + (1 - beta) q``, p the teacher's softmax and q the
    student's, averaged over the rows that count. By definition beta=0 is ``T^2 KL(p || q)`` and beta=1 is
    ``T^2 KL(q || p)``. Shapes: student, teacher (..., C) logits; 0-d loss in nats. Gradients flow to both. `mask`,
    `weight`, `divisor`: as in :class:`KD`.
    The mixture is formed from log-probabilities, so that nothing is NaN where both underflow. Op: ``softmax_kl``.

    Args:
        beta: the teacher's share in the mixture, from 0 to 1.
        temperature: T, as in :class:`KD`.
    """

    beta: float = setting(0.5, SHARE)
    temperature: float | Tensor = setting(1.0, TEMPERATURE)

    def compute(self, student: Tensor, teacher: Teacher, **of_rows: Any) -> Tensor:
        return softmax_kl(student, teacher, self.temperature, beta=self.beta, **of_rows)


@made_of_settings
class DKD(Loss):
    """DKD - Decoupled Knowledge Distillation (Zhao et al., CVPR 2022).

    ``T^2 [alpha TCKD + beta NCKD]`` averaged over the rows that count: TCKD is the KL of (p_y, 1 - p_y), NCKD the KL of
    the softmax among the non-target classes. Shapes: student, teacher (..., C) logits, labels (...) integers; 0-d, in
    nats. Gradients flow to both. `mask`, `weight`, `divisor`: as in :class:`KD`. The official code takes logarithms of
    probabilities and masks with -1000: NaN at T=1 for confident logits, and always NaN in the teacher's gradient; this
    closed form has neither. Op: ``dkd``.

    Args:
        temperature: T, above 0.
        alpha: weight of the target's part.
        beta: weight of the other classes' part.
    """

    temperature: float = setting(4.0, check.positive)
    alpha: float = setting(1.0, check.number)
    beta: float = setting(8.0, check.number)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        divisor: float | Tensor | None = None,
    ) -> Tensor:
        of_rows = {"mask": mask, "weight": weight, "divisor": divisor}
        return dkd(student, teacher, labels, self.temperature, alpha=self.alpha, beta=self.beta, **of_rows)


@made_of_settings
class TfKDSelf(Loss):
    """Tf-KD_self - Revisiting Knowledge Distillation via Label Smoothing Regularization (Yuan et al., CVPR 2020).

    ``(1 - alpha) CE + alpha multiplier T^2 KL(p || q) / C``: a network taught by an earlier copy of itself. The
    official ``nn.KLDivLoss()`` averages over B * C, and so does this. Shapes: student, teacher (B, C) logits, labels
    (B,) integers; 0-d. Gradients flow to both. Op: ``cross_entropy_kl``.

    Args:
        temperature: T, above 0.
        alpha: weight of the KL, from 0 to 1.
        multiplier: factor of the KL.
    """

    temperature: float = setting(20.0, check.positive)
    alpha: float = setting(0.9, SHARE)
    multiplier: float = setting(1.0, check.number)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        check.pair(student, teacher)
        check.positive("temperature", self.temperature)
        weights = self.alpha * self.multiplier, batch_size(student) * student.shape[1], 1 - self.alpha
        return cross_entropy_loss(student, teacher, labels, self.temperature, *weights, 0.0, -100, "batchmean")


@made_of_settings
class TfKDReg(Loss):
    """Tf-KD_reg - the virtual teacher of the same paper (Yuan et al., CVPR 2020).

    ``(1 - alpha) CE + alpha multiplier KL(r || q) / C`` with q = softmax(student), not divided by T, and
    r = softmax(u / T), u = 0.99 at the label and 0.01 / (C - 1) elsewhere: the official code takes the softmax of those
    probabilities. r has two values, so the loss is one label-smoothed cross-entropy plus a constant, and no (B, C)
    target exists. Shapes: student (B, C) logits, labels (B,) integers; 0-d. Op: ``cross_entropy``.

    Args:
        temperature: T of the virtual teacher.
        alpha: weight of the KL, from 0 to 1.
        multiplier: factor of the KL.
    """

    temperature: float = setting(20.0, check.positive)
    alpha: float = setting(0.1, SHARE)
    multiplier: float = setting(50.0, AT_LEAST_0)

    def forward(self, student: Tensor, labels: Tensor) -> Tensor:
        check.logits("student", student)
        check.positive("temperature", self.temperature)
        (rows, classes), compiling = student.shape, torch.compiler.is_compiling()
        kl_weight, ce_weight = self.alpha * self.multiplier, 1 - self.alpha
        if classes == 1 or not kl_weight or not rows:
            return cross_entropy(student, labels, ce_weight=ce_weight + kl_weight / classes)
        one, exp, log = 1.0, math.exp, math.log
        if compiling:  # the graph computes the weights, and so serves every temperature and number of classes
            one, exp, log = student.new_ones((), dtype=torch.float64), torch.exp, torch.log
        others = classes - 1
        # r is `low` at each other class and 1 - others * low at the label.
        low = 1 / (exp((0.99 - 0.01 / (one * others)) / (one * self.temperature)) + others)
        at_label = 1 - others * low
        kl_weight = one * kl_weight / classes
        entropy = -(others * low * log(low) + at_label * log(at_label))
        total = kl_weight + ce_weight
        smoothing = kl_weight * classes * low / total
        if not compiling:
            return cross_entropy(student, labels, ce_weight=total, label_smoothing=smoothing) - kl_weight * entropy
        hard, uniform = cross_entropy(student, labels), cross_entropy(student, labels, label_smoothing=1.0)
        return (total * ((1 - smoothing) * hard + smoothing * uniform) - kl_weight * entropy).to(hard.dtype)


@made_of_settings
class LabelRefinery(Loss):
    """Label Refinery - Improving ImageNet Classification through Label Progression (Bagherinezhad et al., 2018).

    ``-sum_c P_c log softmax(student)_c``, the cross-entropy with a previous network's probabilities P at temperature 1.
    Shapes: student (B, C) logits, teacher_probabilities (B, C); "mean" divides the sum by B; "none" gives (B,).
    No gradient to the probabilities (the official code refuses them if they require one). Op: ``cross_entropy``.

    Args:
        reduction: "mean", "sum" or "none".
    """

    reduction: str = setting("mean", REDUCTION)

    def forward(self, student: Tensor, teacher_probabilities: Tensor) -> Tensor:
        check.logits("student", student)
        check.class_probabilities("teacher_probabilities", teacher_probabilities, student)
        return cross_entropy(student, teacher_probabilities, reduction=self.reduction)
