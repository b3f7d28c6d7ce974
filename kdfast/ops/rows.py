"""Rows of logits in plain PyTorch: softmax, divergences with their gradients, labels."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast._types import Index, Side
from kdfast.ops import check
from kdfast.ops.accumulate import fixed_sum
from kdfast.ops.blocks import anywhere, places

INF = float("inf")
NEAR = 1 / 256  # divergences below, in nats, are summed up in terms that do not cancel


def batch_size(x: Tensor) -> int:
    """Rows of `x`, at least 1."""
    return x.shape[0] or 1


def _centred(logits, top, temperature):
    z = logits.to(top.dtype) - top[:, None]
    return z if isinstance(temperature, float) and temperature == 1 else z.div_(temperature)


def _log_sum(total):
    return total.log().masked_fill_(total == 0, INF)[:, None]


def row_stats(logits: Tensor, temperature: float | Tensor, dtype: torch.dtype) -> Side:
    """-> max, sum [rows], sum = sum_j exp((z_j - max) / T); 0 for an empty row."""
    top = maxima(logits, dtype)
    return top, sums(logits, top, temperature)


def sums(logits: Tensor, top: Tensor, temperature: float | Tensor) -> Tensor:
    """sum_j exp((z_j - top) / T) of each row."""
    return fixed_sum(_centred(logits, top, temperature).exp_())


def maxima(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The maximum of each row; 0 of an empty row."""
    top = logits.amax(1).to(dtype)
    return top.masked_fill(top == -INF, 0.0)


def log_softmax(logits: Tensor, top: Tensor, total: Tensor, temperature: float | Tensor) -> Tensor:
    """Log-probabilities [rows, cols] from a row's max and sum; -inf everywhere in an empty row."""
    return _centred(logits, top, temperature).sub_(_log_sum(total))


def softmax(logits: Tensor, top: Tensor, total: Tensor, temperature: float | Tensor) -> Tensor:
    """Probabilities [rows, cols] from a row's max and sum; 0 everywhere in an empty row."""
    return log_softmax(logits, top, total, temperature).exp_()


def kl_term(p: Tensor, log_ratio: Tensor) -> Tensor:
    """p log(p / q), where 0 log(0 / q) = 0 for every q."""
    return torch.where(p == 0, 0.0, p * log_ratio)


def kl_sum(p: Tensor, log_ratio: Tensor) -> Tensor:
    """The sum of `kl_term` over each row; `log_ratio` is overwritten."""
    terms = log_ratio.mul_(p)
    kl = fixed_sum(terms)
    return fixed_sum(torch.where(p == 0, 0.0, terms)) if anywhere(kl.isnan()) else kl


def near_term(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """p (e^-d - 1 + d), d = log(p / q): never negative; as p and q sum to 1, their sum over a row is the KL."""
    near = p * (torch.expm1(-log_ratio) + log_ratio).clamp(min=0)
    far = (q - p) + p * log_ratio
    return torch.where(p == 0, q, torch.where(log_ratio.abs() <= 0.25, near, far))


class Rows(NamedTuple):
    """Rows of logits with their softmax: maximum and sum of each row, log-probabilities [rows, cols]."""

    logits: Tensor
    top: Tensor
    total: Tensor
    log_p: Tensor

    @classmethod
    def of(cls, logits: Tensor, temperature: float | Tensor, dtype: torch.dtype, top: Tensor | None = None) -> "Rows":
        top = maxima(logits, dtype) if top is None else top
        z = _centred(logits, top, temperature)
        total = fixed_sum(z.exp())
        return cls(logits, top, total, z.sub_(_log_sum(total)))

    @property
    def side(self) -> Side:
        return self.top, self.total

    def at(self, rows: Index) -> "Rows":
        return Rows(*(x[rows] for x in self))


def log_ratio_of(p: Rows, q: Rows, temperature: float | Tensor, same_logits: bool = True) -> Tensor:
    """log(p / q) as it counts between near rows.

    The difference of near logits is exact; beside an offset between the networks, or if one side is centred already
    (`same_logits` False), it would lose the digits that centred logits keep.
    """
    dtype, gap = p.top.dtype, (p.top - q.top)[:, None]
    z_p, z_q = p.logits.to(dtype), q.logits.to(dtype)
    gaps = (z_p - p.top[:, None]) - (z_q - q.top[:, None])
    if same_logits:
        gaps = torch.where(gap.abs() <= 1, (z_p - z_q) - gap, gaps)
    return gaps / temperature - (p.total.log() - q.total.log())[:, None]


def near_of(
    p: Rows, q: Rows, temperature: float | Tensor, same_logits: bool = True
) -> Callable[[Index], tuple[Tensor, Tensor]]:
    """`near` of `kl_rows` for KL(p || q)."""

    def near(rows):
        here, there = p.at(rows), q.at(rows)
        return there.log_p.exp(), log_ratio_of(here, there, temperature, same_logits)

    return near


def kl_rows(
    p: Tensor,
    log_ratio: Tensor,
    near: Callable[[Index], tuple[Tensor, Tensor]],
    equal_mass: Tensor | bool = True,
) -> Tensor:
    """sum_j p_j log_ratio_j of each row, or between near rows the KL in terms that do not cancel.

    log_ratio: is overwritten.
    near: of some rows, q and log(p / q) as `near_term` takes them, which needs rows p and q of the same mass.
    equal_mass: where they have it, if one of them is not empty.
    """
    kl = kl_sum(p, log_ratio)
    rows = places((kl < NEAR) & equal_mass)
    if rows is None:
        return kl
    q, near_ratio = near(rows)
    p, far = p[rows], kl[rows]
    is_near = (far < NEAR) & (equal_mass if equal_mass is True else equal_mass[rows]) & (p > 0).any(1)
    kl[rows] = torch.where(is_near, fixed_sum(near_term(p, q, near_ratio)), far)
    return kl


def scale_rows(weight: float | Tensor, x: Tensor) -> Tensor:
    """weight * x, and 0 of weight 0, whatever x is; `weight` is a number, or has an entry for each row of x."""
    weight = torch.as_tensor(weight, dtype=x.dtype, device=x.device)
    weight = weight[:, None] if weight.dim() == 1 and x.dim() == 2 else weight
    none = weight == 0
    return torch.where(none, 0.0, weight * x) if anywhere(none) else weight * x


def kl_grad_p(p: Tensor, log_ratio: Tensor, kl: Tensor) -> Tensor:
    """T d KL(p || q) / d (logits of p): zero where the row's KL is infinite and has no slope."""
    slope = (log_ratio - kl[:, None]).mul_(p)
    if anywhere(~fixed_sum(slope).isfinite()):  # of infinities, or of NaN
        return torch.where((p == 0) | (kl == INF)[:, None], 0.0, slope)
    return slope


def kl_grad_q(p: Tensor, q: Tensor, sum_p: Tensor) -> Tensor:
    """T d KL(p || q) / d (logits of q): q - p, or 0 where p is empty; in the memory of p."""
    empty, slope = sum_p == 0, torch.sub(q, p, out=p)
    return torch.where(empty[:, None], 0.0, slope) if anywhere(empty) else slope


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
    return sum_1, -log_softmax(z.gather(1, column), top, sum_1, 1.0)[:, 0]


def cross_entropy_grad(z: Tensor, top: Tensor, sum_1: Tensor, column: Tensor) -> Tensor:
    """d CE / dz [rows, cols]."""
    q = softmax(z, top, sum_1, 1.0)
    return q.scatter_add_(1, column, q.new_full((), -1.0).expand_as(column))
