"""TRL's divergence of on-policy distillation under its own name, with the original's arguments and numbers."""

import math

import torch
from torch import Tensor

from kdfast.ops import softmax_kl

__all__ = ["generalized_jsd_loss"]


def _entries(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The terms of each class, which may be negative, from log-probabilities."""
    p, q = teacher.exp(), student.exp()
    if beta == 0:
        return torch.where(p == 0, 0.0, p * (teacher - student))
    if beta == 1:
        return torch.where(q == 0, 0.0, q * (student - teacher))
    log_m = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    return beta * p * (teacher - log_m) + (1 - beta) * q * (student - log_m)


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    """``GKDTrainer.generalized_jsd_loss``: D_beta at a temperature, without its square.

    Args:
        student_logits, teacher_logits: (B, T, V). labels: (B, T), -100 for rows that do not count.
        reduction: "batchmean" divides by the rows that count, and without labels by B alone; "mean" by entries, rows
            times V; "sum"; "none": the entries (kept, V), or (B, T, V) without labels. `num_items_in_batch`, where it
            is given, is what the sum is divided by whatever `reduction` says.

    The original reads rows that do not count; here they may hold NaN. Both sides get a gradient.
    """
    mask = None if labels is None else labels != -100
    if reduction == "none" and num_items_in_batch is None:
        student, teacher = (
            ((z if mask is None else z[mask]) / temperature).log_softmax(-1) for z in (student_logits, teacher_logits)
        )
        return _entries(student, teacher, beta)
    total = softmax_kl(student_logits, teacher_logits, temperature, beta=beta, mask=mask, reduction="sum")
    total = total / temperature**2
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    if reduction == "sum":
        return total
    rows = student_logits[..., 0].numel() if mask is None else mask.sum()
    if reduction == "mean":
        return total / (rows * student_logits.shape[-1])
    if reduction != "batchmean":
        raise ValueError(f"reduction must be one of batchmean, mean, sum, none, got {reduction!r}")
    return total / (len(student_logits) if mask is None else rows.clamp(min=1))
