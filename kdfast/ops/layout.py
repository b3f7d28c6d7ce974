"""Maps as (B, C, N) or as rows (B, D), and gradients in the memory order of a network's map."""

import math

from torch import Tensor


def flat(x: Tensor) -> Tensor:
    """(B, C) or (B, C, ...) as (B, C, N); of channels_last memory, too, without a copy."""
    return x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)


def flat_rows(x: Tensor, like: Tensor | None = None) -> Tensor:
    """`x` as (B, D), columns in the order in which `like` (or x) has them in memory: channels_last costs no copy."""
    like = x if like is None else like
    if x.dim() > 2 and like.stride(1) < like.stride(-1):
        x = x.movedim(1, -1)
    return x.flatten(1)


def gradient_memory(x: Tensor, student: Tensor) -> Tensor:
    """Uninitialised memory for the gradient of a map (B, C, ...), which lies as the student's map does."""
    batch, channels, *positions = x.shape
    if channels > 1 and math.prod(positions) > 1 and student.stride(1) == 1:
        return x.new_empty((batch, *positions, channels)).movedim(-1, 1)
    return x.new_empty(x.shape)
