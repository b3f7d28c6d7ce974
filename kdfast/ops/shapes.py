"""What ops return before they have run: memory of the right shape, dtype and order."""

from collections.abc import Sequence

from torch import Tensor

from kdfast.ops.accumulate import accumulator


def sums(shape: int | Sequence[int], *inputs: Tensor | None) -> Tensor:
    """Sums of `inputs`, in their accumulation type."""
    return inputs[0].new_empty(shape, dtype=accumulator(*inputs))


def gradient(x: Tensor) -> Tensor:
    """The gradient of x, contiguous."""
    return x.new_empty(x.shape)


def gradients(grad: Tensor, *sides: tuple[Tensor, bool]) -> tuple[Tensor, ...]:
    """The gradients of (x, whether it is needed); in place of one that is not, an empty tensor."""
    return tuple(gradient(x) if need else grad.new_empty(0) for x, need in sides)
