"""The distillation losses of Liger-Kernel under their own names, with the originals' arguments and numbers.

Where the originals are wrong, these are not: logits of hidden states are formed in float32 also of bfloat16 inputs, the
mixture comes from log-probabilities (theirs is NaN where both sides underflow), without a row that counts the loss is 0
with a graph, and classifiers of different vocabularies are refused (theirs appends logits of 0, which take mass).
"""

from typing import Any

import torch
from torch import Tensor, nn

from kdfast.ops import linear_kl, softmax_kl

__all__ = ["LigerFusedLinearJSD", "LigerFusedLinearJSDLoss", "LigerJSD", "LigerKLDIVLoss"]


class LigerKLDIVLoss(nn.KLDivLoss):
    """``nn.KLDivLoss`` of log-probabilities `y_pred` and targets `y_true`, whose logarithm is that of max(y_true, eps).

    Shapes: any, of both. The target gets no gradient. The default reduction "mean" divides by all entries.
    """

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps: float = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        y_true = y_true.detach()
        if not self.log_target:
            log_true = y_true.clamp(min=self.eps).log()
            terms = y_true * (log_true - y_pred)
        else:
            terms = y_true.exp() * (y_true - y_pred)
        if self.reduction == "none":
            return terms
        divisor = {"sum": 1, "mean": terms.numel(), "batchmean": len(terms)}[self.reduction]
        return terms.sum() / divisor


class LigerJSD(nn.Module):
    """The beta-Jensen-Shannon divergence of log-probabilities, averaged over the rows whose label is not ignored.

    Shapes: log_q of the student and log_p of the teacher (rows, V), shift_labels (rows,) integers or None. The teacher
    gets no gradient; the student's is that through its log_softmax.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.beta: float = beta
        self.ignore_index: int = ignore_index
        self.dtype: torch.dtype = dtype

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        mask = None if shift_labels is None else shift_labels != self.ignore_index
        return softmax_kl(log_q, log_p.detach(), beta=self.beta, mask=mask)


class LigerFusedLinearJSD(nn.Module):
    """The same divergence of the logits of hidden states, at a temperature and without its square.

    Shapes: inputs (rows, H), weights (V, H), shift_labels (rows,) or None. `accum_dtype` is taken and not needed: the
    gradient of a weight adds up in float32.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.jsd_beta: float = jsd_beta
        self.ignore_index: int = ignore_index
        self.temperature: float = temperature
        self.accum_dtype: torch.dtype | None = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        mask = None if shift_labels is None else shift_labels != self.ignore_index
        tensors = student_input, student_weight, teacher_input.detach(), teacher_weight.detach()
        return linear_kl(*tensors, beta=self.jsd_beta, temperature=self.temperature, mask=mask)


class LigerFusedLinearJSDLoss(nn.Module):
    """``weight_hard_loss CE + weight_soft_loss D_beta`` of hidden states: half of each by default.

    Shapes: as :class:`LigerFusedLinearJSD`, true_labels (rows,), biases (V,). With `return_soft_hard_loss`: the loss
    and its two parts without their weights. `compiled` is taken and not needed; `chunk_size`: rows at a time.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.weight_hard_loss: float = weight_hard_loss
        self.weight_soft_loss: float = weight_soft_loss
        self.beta: float = beta
        self.ignore_index: int = ignore_index
        self.temperature: float = temperature
        self.compiled: bool = compiled
        self.chunk_size: int = chunk_size
        self.return_soft_hard_loss: bool = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        def of_weights(soft, hard):
            return linear_kl(
                student_input,
                student_weight,
                teacher_input.detach(),
                teacher_weight.detach(),
                student_bias=student_bias,
                teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
                beta=self.beta,
                temperature=self.temperature,
                labels=true_labels,
                ignore_index=self.ignore_index,
                kl_weight=soft,
                ce_weight=hard,
                chunk=self.chunk_size,
            )

        loss = of_weights(self.weight_soft_loss, self.weight_hard_loss)
        if not self.return_soft_hard_loss:
            return loss
        with torch.no_grad():
            return loss, of_weights(1.0, 0.0), of_weights(0.0, 1.0)
