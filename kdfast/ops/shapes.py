"""What ops return before they have run: memory of the right shape, dtype and order."""

from kdfast.ops.accumulate import accumulator


def sums(shape, *inputs):
    """Sums of `inputs`, in their accumulation type."""
    return inputs[0].new_empty(shape, dtype=accumulator(*inputs))


def gradient(x):
    """The gradient of x, contiguous."""
    return x.new_empty(x.shape)


def gradients(grad, *sides):
    """The gradients of (x, whether it is needed); in place of one that is not, an empty tensor."""
    return tuple(gradient(x) if need else grad.new_empty(0) for x, need in sides)
