"""Lists of networks: each tensor is (B, C), or (M, B, C) and stands for M."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast._types import Networks
from kdfast.ops import check
from kdfast.ops.accumulate import accumulator

MOST = 128  # networks in one call: the kernels take their addresses by value


def matrices(tensors: Sequence[Tensor]) -> list[Tensor]:
    """All networks [(B, C), ...]."""
    return [z for x in tensors for z in (x.unbind(0) if x.dim() == 3 else (x,))]


def network_count(tensors: Sequence[Tensor]) -> int:
    """How many networks a list of (B, C) and (M, B, C) tensors has."""
    return sum(x.shape[0] if x.dim() == 3 else 1 for x in tensors)


def regroup(grads: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """The gradients [n, B, C] of `matrices(tensors)` in the form of `tensors`; None where not needed or beyond n."""
    out, begin = [], 0
    each = grads.unbind(0)
    for x, need in zip(tensors, needed, strict=True):
        count = x.shape[0] if x.dim() == 3 else 1
        if not need or begin + count > len(each):
            out.append(None)
        else:
            out.append(grads[begin : begin + count] if x.dim() == 3 else each[begin])
        begin += count
    return out


def network_list(name: str, x: Networks, like: Tensor | None = None, of: str = "the student") -> list[Tensor]:
    """A list of (B, C) tensors, or one (M, B, C) tensor, as a list of tensors, with `like`'s shape where given.

    The list may mix both forms; what has another dtype than the first is converted to the type of sums.
    """
    tensors = [x] if isinstance(x, torch.Tensor) else x
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{name} must be a list of (B, C) tensors or one (M, B, C) tensor, got {type(x).__name__}")
    if isinstance(x, torch.Tensor) and x.dim() == 2:
        raise ValueError(f"{name} must be a list of (B, C) tensors or one (M, B, C) tensor, got shape {tuple(x.shape)}")

    def named(i):
        return name if isinstance(x, torch.Tensor) else f"{name}[{i}]"

    if like is None:
        other = check.unlike_first(tensors) if tensors else []
    else:
        other = [i - 1 for i in check.unlike_first([like, *tensors])[1:]]
    for i in other:
        check.floating(named(i), tensors[i])
        if tensors[i].dim() not in (2, 3):
            raise ValueError(
                f"{named(i)} must be (B, C), or (M, B, C) for M of them, got shape {tuple(tensors[i].shape)}"
            )
    count = network_count(tensors)
    if not 1 <= count <= MOST:
        raise ValueError(f"{name} must have from 1 to {MOST} networks, got {count}")
    first, of = (tensors[0], named(0)) if like is None else (like, of)
    shape = first.shape[-2:]
    if shape[1] == 0:
        raise ValueError(f"{named(0)} must have at least one class, got shape {tuple(first.shape)}")
    for i in other:
        if tensors[i].shape[-2:] != shape:
            raise ValueError(
                f"{named(i)} must have {of}'s batch and classes {tuple(shape)}, got shape {tuple(tensors[i].shape)}"
            )
        check.same_device(named(i), tensors[i], first, of)
    if len(other) > (like is None) and len({x.dtype for x in tensors}) > 1:
        tensors = [x.to(accumulator(*tensors)) for x in tensors]
    return list(tensors)


def class_labels(labels: Tensor | None, like: Tensor) -> Tensor | None:
    """Labels for the kernels, or None."""
    return None if labels is None else check.class_indices(labels, like)
