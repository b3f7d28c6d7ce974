"""Elementwise functions with the same bits for any number of threads.

torch computes the last elements of each thread's part with other instructions than the elements before, and of pow,
exp2, sigmoid, softplus and logaddexp these round differently.
"""

import torch
from torch import Tensor

BLOCK = 2**14  # elements that torch leaves to one thread


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x)."""
    return 1 / (1 + (-x).exp())


def power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent: products where the exponent is an int of at least 0, else in blocks."""
    if isinstance(exponent, int) and exponent >= 0:
        y = x if exponent else torch.ones_like(x)
        for _ in range(1, exponent):
            y = y * x
        return y
    if torch.compiler.is_compiling() or x.numel() <= BLOCK:
        return x**exponent
    return torch.cat([part**exponent for part in x.flatten().split(BLOCK)]).view(x.shape)
