"""Epochs as losses take them, and ramps over them."""

import math

import torch
from torch import Tensor

from kdfast.ops import check


def epoch_of(epoch: float | Tensor, device: torch.device) -> float | Tensor:
    """An epoch as a number, or where it is a tensor or a compiled graph's symbol as a float64 tensor on `device`."""
    if isinstance(epoch, torch.Tensor):
        check.tensor("epoch", epoch)
        if epoch.dim() != 0:
            raise ValueError(f"epoch must be an int or a 0-d tensor, got shape {tuple(epoch.shape)}")
        return epoch.to(device, torch.float64, non_blocking=True)
    if not isinstance(epoch, (int, float)) or isinstance(epoch, bool):
        raise TypeError(f"epoch must be an int or a 0-d tensor, got {type(epoch).__name__}")
    if torch.compiler.is_compiling():
        return torch.full((), epoch, dtype=torch.float64, device=device)
    if math.isnan(epoch):
        raise ValueError("epoch must be a number, got nan")
    return epoch


def ramp_up(epoch: float | Tensor, length: float, device: torch.device) -> float | Tensor:
    """exp(-5 (1 - min(epoch / length, 1))^2), 1 of length 0: a number, or a tensor where `epoch_of` gives one."""
    epoch = epoch_of(epoch, device)
    if not length:
        return 1.0
    if isinstance(epoch, torch.Tensor):
        return torch.exp(-5 * (1 - epoch.clamp(0, length) / length) ** 2)
    return math.exp(-5 * (1 - min(max(epoch, 0), length) / length) ** 2)
