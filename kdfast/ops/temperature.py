"""The temperature of an op: a number, or a tensor that only the kernel reads.

A compiled graph is made for one value of a number, and anew for the next. A tensor is an input like the logits: one
graph serves every temperature, and the host does not wait for its value.
"""

import torch
from torch import Tensor

_is_compiling = torch.compiler.is_compiling


def temperature_argument(temperature: float, like: Tensor) -> tuple[Tensor | None, float]:
    """-> the op's arguments `temperatures` and `temperature`, of a number that was checked."""
    if not _is_compiling():
        return None, float(temperature)
    # A product, for that is what torch.compile takes a changing number into.
    return torch.ones((), dtype=torch.float64, device=like.device) * temperature, 1.0


def temperature_of(temperatures: Tensor | None, temperature: float, dtype: torch.dtype) -> float | Tensor:
    """T as an op's plain-PyTorch form takes it."""
    return temperature if temperatures is None else temperatures.to(dtype)
