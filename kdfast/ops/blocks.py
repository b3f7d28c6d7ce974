"""Plain PyTorch on a CPU: a few rows at a time, which a cache holds, and masks only where they are needed.

An operation on memory beyond the caches costs several times one within, and a mask (torch.where) several times an
addition. Each row has the bits that it has alone, so neither the blocks nor the threads show in a result.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdfast._types import Index

ELEMENTS = 2**16  # of a block, for each thread: some five tensors of that size are 1.3 MiB in float32


def by_block(
    function: Callable[..., tuple[Tensor, ...]],
    *tensors: Tensor | None,
    into: Sequence[Tensor] = (),
    elements: int | None = None,
) -> tuple[Tensor, ...]:
    """``function(*tensors)``, of tensors and with results that have one entry for each row; None is passed on.

    A result without elements stays one: what the function need not compute. The first results go to the memory `into`.
    elements: of a block, where sums over its rows must not depend on the threads, or where it takes many operations.
    """
    first, whole = tensors[0], list(into)
    elements = elements or ELEMENTS * torch.get_num_threads()
    rows = max(1, elements // max(1, math.prod(first.shape[1:])))
    if first.device.type != "cpu" or len(first) <= 2 * rows:
        rows = max(1, len(first))
        if not into and first.device.type != "cpu":
            return function(*tensors)
    for begin in range(0, max(1, len(first)), rows):
        end = begin + rows
        # The order of torch's sums depends on strides, and of strided rows on how many there are.
        results = function(*[x if x is None else x[begin:end].contiguous() for x in tensors])
        if not whole and rows >= len(first):
            return tuple(results)
        whole += [x.new_empty((len(first), *x.shape[1:])) if x.numel() else x for x in results[len(whole) :]]
        for out, x in zip(whole, results, strict=True):
            if x.numel():
                out[begin:end] = x
    return tuple(whole)


def anywhere(mask: Tensor) -> bool:
    """Whether a mask has to be applied: always, but on a CPU, where a look is free, only if it holds anywhere."""
    return not _can_look(mask) or bool(mask.any())


def places(mask: Tensor) -> Index | None:
    """The rows at which a mask [rows] holds, as an index, or None without any; all rows where a look would wait."""
    if not _can_look(mask):
        return slice(None)
    rows = mask.nonzero()[:, 0]
    return rows if len(rows) else None


def _can_look(mask):
    return mask.device.type == "cpu" and not torch.compiler.is_compiling()
