"""Sums: in which type, and in which order."""

import functools
import operator
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def accumulator(*tensors: Tensor | None) -> torch.dtype:
    """The type of sums: float64 if an input is float64, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def total(losses: Iterable[Tensor]) -> Tensor:
    """The sum of one loss per layer, without the extra ``0 +`` kernel of Python's sum."""
    return functools.reduce(operator.add, losses)


def weighted(weight: float, x: Tensor) -> Tensor:
    """weight * x; of weight 0 exactly 0 with an upstream gradient of 0, whatever x is."""
    return weight * x if weight else torch.where(torch.zeros_like(x, dtype=torch.bool), x, 0.0)


def weighted_sum(like: Tensor, *terms: tuple[float, Callable[[], Tensor]]) -> Tensor:
    """The sum of ``weight * term()`` over (weight, term) pairs; a term of weight 0 is not computed, whatever it reads.

    If all weigh 0: 0 with a graph to `like`, whose gradient is 0.
    """
    terms = [weight * term() for weight, term in terms if weight != 0]
    return total(terms) if terms else weighted(0, like).sum()


def fixed_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension in fixed blocks: the same bits for any number of threads."""
    head = x.shape[-1] // 1024 * 1024
    if not head:
        return x.sum(-1)
    return x[..., :head].unflatten(-1, (head // 1024, 1024)).sum(-1).sum(-1) + x[..., head:].sum(-1)
