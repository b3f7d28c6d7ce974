"""What many arguments may be."""

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

Tensors: TypeAlias = Tensor | Sequence[Tensor]  # one layer, or a list with one tensor for each layer
Networks: TypeAlias = Tensor | Sequence[Tensor]  # logits (M, B, C), or a list of (B, C) and (M, B, C)
Side: TypeAlias = tuple[Tensor, Tensor]  # maximum and sum of each row of logits
Index: TypeAlias = Tensor | slice  # some of the rows
