"""NVIDIA Model-Optimizer's loss on logits under its own name, with the original's arguments and numbers."""

from torch import Tensor, nn

from kdfast.ops import softmax_kl

__all__ = ["LogitsDistillationLoss"]


class LogitsDistillationLoss(nn.Module):
    """``T^2 KL(p || q)`` of logits (..., V), the teacher's without a gradient.

    `reduction`: "batchmean" divides by the first dimension, "mean" by all entries (rows times V), "sum"; "none": one
    value a row (...).
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "batchmean") -> None:
        super().__init__()
        self._temperature, self._reduction = temperature, reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        reduction = "none" if self._reduction == "none" else "sum"
        loss = softmax_kl(logits_s, logits_t.detach(), self._temperature, reduction=reduction)
        return loss / {"none": 1, "sum": 1, "batchmean": len(logits_s), "mean": logits_s.numel()}[self._reduction]
