"""What a backward needs of its forward, also where that is an inference tensor, which autograd does not save."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_is_compiling = torch.compiler.is_compiling


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """``ctx.save_for_backward``; inference tensors, which nothing can change in place unseen, are kept as they are.

    A compiled graph saves its inputs itself: there they remain torch's to refuse.
    """
    ctx.inference = None
    if not _is_compiling():
        for x in tensors:
            if x is not None and x.is_inference():
                ctx.inference = {i: x for i, x in enumerate(tensors) if x is not None and x.is_inference()}
                tensors = [None if i in ctx.inference else x for i, x in enumerate(tensors)]
                break
    ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> Sequence[Any]:
    """What `save` was given."""
    if ctx.inference is None:
        return ctx.saved_tensors
    return [ctx.inference.get(i, x) for i, x in enumerate(ctx.saved_tensors)]
