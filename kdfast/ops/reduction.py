"""Which rows of logits count, and what their sum is divided by: mask, weight, divisor and reduction of every loss."""

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.ops import check
from kdfast.ops.accumulate import accumulator
from kdfast.ops.rows import batch_size


def rows_of(x: Tensor) -> Tensor:
    """Logits (..., C) as rows [rows, C]."""
    return x if x.dim() == 2 else x.flatten(0, -2)


class Reduction(NamedTuple):
    """How the values of rows become a loss.

    Attributes:
        weight: [rows] factors, 0 for rows that are masked: kernels do not read them. None: all are 1.
        divisor: of the op's sum, an int.
        reduce: whether the op adds up its rows.
        count: what the sum is divided by after that, or None.
        shape: of the values of rows; None: [rows].
    """

    weight: Tensor | None
    divisor: int
    reduce: bool
    count: Tensor | float | None
    shape: torch.Size | None

    @classmethod
    def of(
        cls,
        student: Tensor,
        reduction: str,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        divisor: float | Tensor | None = None,
    ) -> "Reduction":
        """Of arguments that are checked here, for student logits (..., C)."""
        check.reduction(reduction)
        reduce, mean = reduction != "none", reduction in ("mean", "batchmean")
        if mask is None and weight is None and divisor is None:
            rows = student.shape[0] if student.dim() == 2 else student.shape[:-1].numel()
            return cls(
                None, (rows or 1) if mean else 1, reduce, None, None if student.dim() == 2 else student.shape[:-1]
            )
        shape = student.shape[:-1]
        if weight is not None:
            check.row_weight(weight, student)
        if divisor is not None:
            check.divisor(divisor)
            if not reduce:
                raise ValueError('divisor divides a sum: with reduction="none" there is none')
        if mask is None:
            rows = None if weight is None else weight.reshape(-1)
            if divisor is None:
                return cls(rows, batch_size(rows_of(student)) if mean else 1, reduce, None, shape)
            return cls(rows, 1, True, divisor, shape)
        check.row_mask(mask, student)
        dtype = accumulator(student, weight)
        rows = mask.to(dtype) if weight is None else torch.where(mask, weight.to(dtype), 0.0)
        if divisor is None and mean:
            divisor = mask.sum().clamp(min=1)
        return cls(rows.reshape(-1), 1, reduce, divisor, shape)

    def finish(self, value: Tensor) -> Tensor:
        """The loss, of what the op gives."""
        if self.shape is None:
            return value
        if self.count is not None:
            count = self.count
            return value / (count.to(value) if isinstance(count, Tensor) else count)
        return value if self.reduce or len(self.shape) == 1 else value.unflatten(0, self.shape)
