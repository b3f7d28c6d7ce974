"""Losses on logits since 2022: standardised rows, two temperatures, skewed, adaptive and interpolated divergences."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdfast.losses.base import AT_LEAST_0, SHARE, Loss, RowLoss, Settings, made_of_settings, setting
from kdfast.ops import check
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.divergence import alpha_beta, head_share, non_target_cross_entropy, skew_kl, total_variation_distance
from kdfast.ops.elementwise import sigmoid
from kdfast.ops.reduction import Reduction, rows_of
from kdfast.ops.softmax_kl import cross_entropy, softmax_kl


@made_of_settings
class LSKD(RowLoss):
    """LSKD - Logit Standardization in Knowledge Distillation (Sun et al., CVPR 2024).

    ``T^2 KL(p || q)`` of rows standardised on both sides, z' = (z - mean) / (1e-7 + std), averaged over the rows that
    count: ``KD(standardize=True)``. Shapes: student, teacher (..., C) logits; mask (...) bool, weight (...), divisor as
    in :class:`KD`; 0-d, in nats. Gradients flow to both, through mean and std.
    The std divides by C - 1 as the official code's does; the paper's divides by C. A constant row becomes zeros.
    Op: ``softmax_kl(standardize=True)``.

    Args:
        temperature: T, above 0.
    """

    temperature: float = setting(2.0, check.positive)

    def compute(self, student: Tensor, teacher: Tensor, **of_rows: Any) -> Tensor:
        return softmax_kl(student, teacher, self.temperature, standardize=True, **of_rows)


@made_of_settings
class NKD(Loss):
    """NKD - From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach (Yang et al., ICCV 2023).

    ``-p_y log q_y - gamma T^2 sum_{c != y} P_c log Q_c`` averaged over the rows that count: p and q at temperature 1,
    p_y without gradient, P and Q the softmaxes at T of the classes that are not the label y. Shapes: student, teacher
    (..., C) logits; labels (...) integers, or (..., C), of which the argmax counts; 0-d, in nats. `mask`, `weight`,
    `divisor`: as in :class:`KD`. The student gets its gradient from both terms, the teacher from the second.
    Both terms are cross-entropies: equal logits do not give 0. The official code adds the task's cross-entropy outside.
    Op: ``cross_entropy``, ``non_target_cross_entropy``.

    Args:
        temperature: T of the classes that are not the label.
        gamma: weight of the second term.
    """

    temperature: float = setting(1.0, check.positive)
    gamma: float = setting(1.5, check.number)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        divisor: float | Tensor | None = None,
    ) -> Tensor:
        check.pair(student, teacher, check.rows_of_logits)
        check.tensor("labels", labels)
        if labels.shape == student.shape:
            labels = labels.argmax(-1)
        of_rows = {"mask": mask, "divisor": divisor}
        target = cross_entropy(teacher.detach(), labels, mask=mask, reduction="none").neg().exp()
        if weight is not None:  # a row of weight 0 may hold NaN
            check.row_weight(weight, student)
            target = torch.where(weight == 0, 0.0, target * weight)
        first = cross_entropy(student, labels, weight=target, **of_rows)
        if not self.gamma:
            return first
        how = {"temperature": self.temperature, "weight": weight, **of_rows}
        return first + self.gamma * non_target_cross_entropy(student, teacher, labels, **how)


@made_of_settings
class TTM(RowLoss):
    """TTM - Knowledge Distillation Based on Transformed Teacher Matching (Zheng and Yang, ICLR 2024).

    ``KL(p || q)``, p = softmax(teacher / T) and q = softmax(student): no temperature on the student, and no T^2;
    averaged over the rows that count. Shapes: student, teacher (..., C) logits; 0-d, in nats. `mask`, `weight`,
    `divisor`: as in :class:`KD`. Gradients flow to both. The official code raises softmax(teacher) to the power 1 / T,
    which underflows; its options have l = 1 / T. Op: ``softmax_kl(teacher_temperature=T)``.

    Args:
        temperature: T of the teacher, above 0.
    """

    temperature: float = setting(4.0, check.positive)

    def compute(self, student: Tensor, teacher: Tensor, **of_rows: Any) -> Tensor:
        return softmax_kl(student, teacher, 1.0, teacher_temperature=self.temperature, **of_rows)


@made_of_settings
class WTTM(RowLoss):
    """WTTM - the weighted form of the same paper (Zheng and Yang, ICLR 2024).

    ``w KL(p || q)`` of :class:`TTM` with w = sum_c softmax(teacher)_c^(1/T) of each row: 1 for a certain teacher, up to
    C^(1 - 1/T). Shapes: student, teacher (..., C) logits, `mask`, `weight`, `divisor` as in :class:`KD`; 0-d, in nats.
    Gradients flow to both, the teacher's through w, too. Op: ``softmax_kl``.

    Args:
        temperature: T of the teacher, above 0.
    """

    temperature: float = setting(4.0, check.positive)

    def compute(self, student: Tensor, teacher: Tensor, **of_rows: Any) -> Tensor:
        check.pair(student, teacher, check.rows_of_logits)
        how = Reduction.of(student, "mean", **of_rows)
        of_both = {"teacher_temperature": self.temperature, "mask": of_rows["mask"], "weight": of_rows["weight"]}
        rows = softmax_kl(student, teacher, 1.0, reduction="none", **of_both)
        counted = None if how.weight is None else (how.weight != 0).view(rows.shape)
        z = (teacher if counted is None else torch.where(counted[..., None], teacher, 0.0)).to(rows.dtype)
        own = ((z / self.temperature).logsumexp(-1) - z.logsumexp(-1) / self.temperature).exp()
        return how.finish(fixed_sum((own * rows).reshape(-1)) / how.divisor)


class CTKD(Loss):
    """CTKD - Curriculum Temperature for Knowledge Distillation (Li et al., AAAI 2023), its global temperature.

    ``T^2 KL(p || q)`` at T = minimum + (maximum - minimum) sigmoid(raw), averaged over rows. The parameter `raw`, one
    number, learns to make the loss larger: its gradient is multiplied by -(1 - cos(pi min(epoch, ramp) / ramp)) / 2, 0
    at epoch 0 and -1 from `ramp_epochs` on. Shapes: student, teacher (..., C) logits; epoch an int or a 0-d tensor;
    0-d, in nats. The logits' gradients are those of KD. Give `raw` to the student's optimizer.

    Args:
        minimum, maximum: of T; the official `t_end` is the difference, 20.
        ramp_epochs: at least 1.

    Op: ``softmax_kl``, with the temperature in a tensor.
    """

    settings: ClassVar[Settings] = {"minimum": check.positive, "maximum": check.positive, "ramp_epochs": check.count}

    def __init__(self, minimum: float = 1.0, maximum: float = 21.0, ramp_epochs: int = 10) -> None:
        super().__init__()
        self.minimum: float = minimum
        self.maximum: float = maximum
        self.ramp_epochs: int = ramp_epochs
        self.raw: nn.Parameter = nn.Parameter(torch.ones(()))

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        epoch: int | Tensor,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        divisor: float | Tensor | None = None,
    ) -> Tensor:
        if isinstance(epoch, Tensor):
            check.tensor("epoch", epoch)
            done = (epoch.to(self.raw.device, torch.float64) / self.ramp_epochs).clamp(max=1)
            strength = (-(1 - torch.cos(math.pi * done)) / 2).to(self.raw.dtype)
        else:
            check.number("epoch", epoch, 0)
            strength = -(1 - math.cos(math.pi * min(epoch / self.ramp_epochs, 1))) / 2
        fixed = self.raw.detach()
        reversed_raw = fixed + strength * (self.raw - fixed)  # its value is that of raw
        temperature = self.minimum + (self.maximum - self.minimum) * sigmoid(reversed_raw)
        return softmax_kl(student, teacher, temperature, mask=mask, weight=weight, divisor=divisor)


@made_of_settings
class SkewKL(RowLoss):
    """Skewed KL - DistiLLM: Towards Streamlined Distillation for Large Language Models (Ko et al., ICML 2024).

    ``KL(p || skew p + (1 - skew) q)``, or with `reverse` ``KL(q || skew q + (1 - skew) p)``, averaged over the rows
    that count; at most log(1 / skew). Shapes: student, teacher (..., C) logits, `mask`, `weight`, `divisor` as in
    :class:`KD`; 0-d, in nats. Gradients flow to both, through the mixture too.
    The official forward form lacks the teacher's entropy (a constant), and is NaN where both sides underflow.
    Op: ``skew_kl``.

    Args:
        skew: share of the first distribution in the mixture, from 0 to 1.
        reverse: the second form.
    """

    skew: float = setting(0.1, SHARE)
    reverse: bool = setting(False)

    def compute(self, student: Tensor, teacher: Tensor, **of_rows: Any) -> Tensor:
        return skew_kl(student, teacher, self.skew, reverse=self.reverse, **of_rows)


class TVD(RowLoss):
    """TVD - f-Divergence Minimization for Sequence-Level Knowledge Distillation (Wen et al., ACL 2023).

    The total variation distance ``1/2 sum_c |p_c - q_c|``, averaged over the rows that count. Shapes: student, teacher
    (..., C) logits, `mask`, `weight`, `divisor` as in :class:`KD`; 0-d. Gradients flow to both, 0 where p = q.
    Op: ``total_variation_distance``.
    """

    def compute(self, student: Tensor, teacher: Tensor, **of_rows: Any) -> Tensor:
        return total_variation_distance(student, teacher, **of_rows)


@made_of_settings
class AKL(RowLoss):
    """AKL - Rethinking Kullback-Leibler Divergence in Knowledge Distillation for LLMs (Wu et al., COLING 2025).

    ``w KL(p || q) + (1 - w) KL(q || p)`` averaged over the rows that count, w = the share of the head in the sum of
    |p_c - q_c|, a constant for both sides. The head: the teacher's largest classes (of equal ones the lower index)
    while their sum is at most `head`, and one in any case. Shapes: student, teacher (..., C) logits, `mask`, `weight`,
    `divisor` as in :class:`KD`; 0-d, in nats. Gradients flow to both. The official code is 0/0 where p = q, which is 0
    here, and replaces infinite logits by 0 in w. Op: ``softmax_kl``, once in each direction.

    Args:
        head: the teacher's probability that the head holds, from 0 to 1.
    """

    head: float = setting(0.5, SHARE)

    def compute(self, student: Tensor, teacher: Tensor, **of_rows: Any) -> Tensor:
        check.pair(student, teacher, check.rows_of_logits)
        share = head_share(rows_of(student.detach()), rows_of(teacher.detach()), self.head)
        share = share.reshape(student.shape[:-1])
        mask, weight = of_rows["mask"], of_rows["weight"]
        if mask is not None:
            check.row_mask(mask, student)
            share = torch.where(mask, share, 0.0)
        rest = 1 - share
        if weight is not None:  # a row of weight 0 may hold NaN
            check.row_weight(weight, student)
            share, rest = (torch.where(weight == 0, 0.0, weight.to(x.dtype) * x) for x in (share, rest))
        how = {"mask": mask, "divisor": of_rows["divisor"]}
        return softmax_kl(student, teacher, weight=share, **how) + softmax_kl(
            student, teacher, beta=1.0, weight=rest, **how
        )


class TAID(RowLoss):
    """TAID - Temporally Adaptive Interpolated Distillation (Shing et al., ICLR 2025).

    ``KL(P || q)`` averaged over the rows that count, P = softmax((1 - t) stop(student) + t teacher), with t from
    `start` to `end` as training goes on: :meth:`update` after each step. Shapes: student, teacher (..., C) logits,
    `mask`, `weight`, `divisor` as in :class:`KD`; 0-d, in nats. The student gets its gradient through q, the teacher
    through P.

    Args:
        start, end: of t, from 0 to 1.
        alpha: how far t moves at once. beta: momentum of the relative change of the loss.

    The official code has the cross-entropy, whose student gradient is the same; as `update` takes relative changes, its
    trajectory of t is that of ``loss + entropy(P)``. Op: ``softmax_kl``.
    """

    settings: ClassVar[Settings] = {"start": SHARE, "end": SHARE, "alpha": AT_LEAST_0, "beta": SHARE}
    t: Tensor
    previous: Tensor
    momentum: Tensor

    def __init__(self, start: float = 0.4, end: float = 1.0, alpha: float = 5e-4, beta: float = 0.99) -> None:
        super().__init__()
        self.start: float = start
        self.end: float = end
        self.alpha: float = alpha
        self.beta: float = beta
        self.register_buffer("t", torch.tensor(float(start)))
        self.register_buffer("previous", torch.tensor(math.inf))
        self.register_buffer("momentum", torch.tensor(0.0))

    def compute(self, student: Tensor, teacher: Tensor, **of_rows: Any) -> Tensor:
        check.pair(student, teacher, check.rows_of_logits)
        dtype = accumulator(student, teacher)
        t = self.t.to(dtype)
        # A factor of 0 leaves out what may be -inf.
        mine = torch.where(t == 1, 0.0, (1 - t) * student.detach().to(dtype))
        return softmax_kl(student, mine + torch.where(t == 0, 0.0, t * teacher.to(dtype)), **of_rows)

    @torch.no_grad()
    def update(self, loss: float | Tensor, step: int, total_steps: int) -> None:
        """After a forward: moves t by the loss, which the first call only keeps. Does not wait for a device."""
        check.count("step", step, 0)
        check.count("total_steps", total_steps)
        loss = torch.as_tensor(loss, dtype=self.t.dtype, device=self.t.device).reshape(())
        first = self.previous.isinf()
        change = (self.previous - loss) / (self.previous + 1e-15)
        momentum = self.beta * self.momentum + (1 - self.beta) * change
        planned = self.start + (self.end - self.start) * step / total_steps
        moved = self.t + self.alpha * sigmoid(momentum) * (1 - self.t)
        moved = moved.clamp(min=planned).clamp(max=self.end)
        self.t.copy_(torch.where(first, self.t, moved))
        self.momentum.copy_(torch.where(first, self.momentum, momentum))
        self.previous.copy_(loss)


@made_of_settings
class AlphaBeta(RowLoss):
    """ABKD - Pursuing a Proper Allocation of the Probability Mass via alpha-beta-Divergence (Wang et al., ICML 2025).

    ``-1/(ab) sum_c [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]``, averaged over the rows that count; (1, 0) is
    KL(p || q), (0, 1) KL(q || p), and where a, b or a + b is 0 it is the limit. Shapes: student, teacher (..., C)
    logits, `mask`, `weight`, `divisor` as in :class:`KD`; 0-d. Gradients flow to both.
    The official branches for those limits lack a factor 1/a or 1/b: they agree at 1 only. Op: ``alpha_beta``.

    Args:
        alpha, beta: the powers a and b.
    """

    alpha: float = setting(0.2, check.number)
    beta: float = setting(0.7, check.number)

    def compute(self, student: Tensor, teacher: Tensor, **of_rows: Any) -> Tensor:
        return alpha_beta(student, teacher, self.alpha, self.beta, **of_rows)
