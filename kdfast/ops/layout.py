"""How a family of maps has them: as (B, C, N), and gradients in the memory order of a network's map."""

import math


def flat(x):
    """(B, C) or (B, C, ...) as (B, C, N); of channels_last memory, too, without a copy."""
    return x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)


def gradient_memory(x, student):
    """Uninitialised memory for the gradient of a map (B, C, ...), which lies as the student's map does."""
    batch, channels, *positions = x.shape
    if channels > 1 and math.prod(positions) > 1 and student.stride(1) == 1:
        return x.new_empty((batch, *positions, channels)).movedim(-1, 1)
    return x.new_empty(x.shape)
