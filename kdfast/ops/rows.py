"""Rows of logits in plain PyTorch: softmax, divergences with their gradients, labels."""

import torch
from torch import Tensor

from kdfast._types import Side
from kdfast.ops import check
from kdfast.ops.accumulate import fixed_sum

INF = float("inf")
NEAR = 1 / 256  # divergences below, in nats, are summed up in terms that do not cancel


def batch_size(x: Tensor) -> int:
    """Rows of `x`, at least 1."""
    return x.shape[0] or 1


def row_stats(logits: Tensor, temperature: float | Tensor, dtype: torch.dtype) -> Side:
    """-> max, sum [rows], sum = sum_j exp((z_j - max) / T); 0 for an empty row."""
    top = logits.amax(1).to(dtype)
    top = torch.where(top == -INF, 0.0, top)
    return top, fixed_sum(((logits.to(dtype) - top[:, None]) / temperature).exp())


def log_softmax(logits: Tensor, top: Tensor, total: Tensor, temperature: float | Tensor) -> Tensor:
    """Log-probabilities [rows, cols] from a row's max and sum; -inf everywhere in an empty row."""
    log_sum = torch.where(total == 0, INF, total.log())
    return (logits.to(top.dtype) - top[:, None]) / temperature - log_sum[:, None]


def kl_term(p: Tensor, log_ratio: Tensor) -> Tensor:
    """p log(p / q), where 0 log(0 / q) = 0 for every q."""
    return torch.where(p == 0, 0.0, p * log_ratio)


def near_term(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """p (e^-d - 1 + d), d = log(p / q): never negative; as p and q sum to 1, their sum over a row is the KL."""
    near = p * (torch.expm1(-log_ratio) + log_ratio).clamp(min=0)
    far = (q - p) + p * log_ratio
    return torch.where(p == 0, q, torch.where(log_ratio.abs() <= 0.25, near, far))


def log_ratio_of(
    z_p: Tensor, z_q: Tensor, side_p: Side, side_q: Side, temperature: float | Tensor, same_logits: bool = True
) -> Tensor:
    """log(p / q) from logits and (max, sum) of both rows, for near rows.

    The difference of near logits is exact; beside an offset between the networks, or if one side is centred already
    (`same_logits` False), it would lose the digits that centred logits keep.
    """
    ((top_p, sum_p), (top_q, sum_q)), dtype = (side_p, side_q), side_p[0].dtype
    z_p, z_q, gap = z_p.to(dtype), z_q.to(dtype), (top_p - top_q)[:, None]
    gaps = (z_p - top_p[:, None]) - (z_q - top_q[:, None])
    if same_logits:
        gaps = torch.where(gap.abs() <= 1, (z_p - z_q) - gap, gaps)
    return gaps / temperature - (sum_p.log() - sum_q.log())[:, None]


def kl_rows(p: Tensor, q: Tensor, log_ratio: Tensor, near_ratio: Tensor, equal_mass: Tensor | bool = True) -> Tensor:
    """sum_j p_j log_ratio_j of each row, or between near rows the KL in terms of `near_ratio`, which do not cancel.

    These need rows p and q of the same mass: `equal_mass` says where they have it, if one of them is not empty.
    """
    kl = fixed_sum(kl_term(p, log_ratio))
    near = (kl < NEAR) & (p > 0).any(1) & equal_mass
    return torch.where(near, fixed_sum(near_term(p, q, near_ratio)), kl)


def scale_rows(weight: float | Tensor, x: Tensor) -> Tensor:
    """weight * x, and 0 of weight 0, whatever x is; `weight` is a number, or has an entry for each row of x."""
    weight = torch.as_tensor(weight, dtype=x.dtype, device=x.device)
    weight = weight[:, None] if weight.dim() == 1 and x.dim() == 2 else weight
    return torch.where(weight == 0, 0.0, weight * x)


def kl_grad_p(p: Tensor, log_ratio: Tensor, kl: Tensor) -> Tensor:
    """T d KL(p || q) / d (logits of p): zero where the row's KL is infinite and has no slope."""
    return torch.where((p == 0) | (kl == INF)[:, None], 0.0, p * (log_ratio - kl[:, None]))


def kl_grad_q(p: Tensor, q: Tensor, sum_p: Tensor) -> Tensor:
    """T d KL(p || q) / d (logits of q): q - p, or 0 where p is empty."""
    return torch.where(sum_p[:, None] == 0, 0.0, q - p)


# ---- labels ----------------------------------------------------------------------------------------------------------
def label_column(labels: Tensor, classes: int, ignore_index: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """-> labels clamped into range [rows, 1], rows kept, rows with a label that is no class.

    Such a label is an error on CPU, and makes the row NaN elsewhere.
    """
    kept = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    wrong = kept & ((labels < 0) | (labels >= classes))
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and wrong.any():
        check.label_range(labels, classes, ignore_index)
    return labels.clamp(0, classes - 1)[:, None], kept, wrong


def cross_entropy_stats(z: Tensor, column: Tensor, wrong: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """-> sum_1 = sum_c exp(z_c - max), NaN where the label is no class; the row's cross-entropy."""
    top, sum_1 = row_stats(z, 1.0, dtype)
    sum_1 = torch.where(wrong, float("nan"), sum_1)
    return sum_1, -log_softmax(z, top, sum_1, 1.0).gather(1, column)[:, 0]


def cross_entropy_grad(z: Tensor, top: Tensor, sum_1: Tensor, column: Tensor) -> Tensor:
    """d CE / dz [rows, cols]."""
    q = log_softmax(z, top, sum_1, 1.0).exp()
    return q - torch.zeros_like(q).scatter(1, column, 1.0)
