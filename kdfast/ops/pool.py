"""Adaptive pooling whose gradient has a fixed order (torch's own has none on a GPU)."""

import torch
from torch import Tensor

from kdfast.ops import check
from kdfast.ops.accumulate import accumulator


def _windows(size, bins, device):
    """Adaptive windows of `size` positions: first position and length for each of `bins`, and the greatest length."""
    bin_ = torch.arange(bins, device=device)
    first = bin_ * size // bins
    longest = size // bins if size % bins == 0 else -(-size // bins) + 1
    return first, -(-(bin_ + 1) * size // bins) - first, longest


def _window_sums(x, dim, bins):
    """Sums of `x` over the windows of `bins` along `dim`."""
    size = x.shape[dim]
    first, length, longest = _windows(size, bins, x.device)
    shape = [bins if d == dim else 1 for d in range(x.dim())]
    total = x.index_select(dim, first)
    for k in range(1, longest):
        more = x.index_select(dim, (first + k).clamp(max=size - 1))
        total = total + torch.where((k < length).view(shape), more, 0.0)
    return total


def _over_lengths(x, dim, size):
    """`x`, which has one entry for each window of `size` along `dim`, divided by the windows' lengths."""
    _, length, _ = _windows(size, x.shape[dim], x.device)
    return x / length.view([x.shape[dim] if d == dim else 1 for d in range(x.dim())])


class _AveragePool(torch.autograd.Function):
    """A position h lies in exactly those bins that are the window of h among them: backward is a window sum, too."""

    @staticmethod
    def forward(ctx, x, height, width):
        ctx.sizes, ctx.dtype = x.shape[2:], x.dtype
        for dim, bins in ((2, height), (3, width)):
            x = _over_lengths(_window_sums(x, dim, bins), dim, x.shape[dim])
        return x

    @staticmethod
    def backward(ctx, grad):
        check.first_derivative_only("average_pool")
        for dim, size in ((3, ctx.sizes[1]), (2, ctx.sizes[0])):
            grad = _window_sums(_over_lengths(grad, dim, size), dim, size)
        return grad.to(ctx.dtype), None, None


def average_pool(x: Tensor, height: int, width: int) -> Tensor:
    """Maps (B, C, H, W) averaged to (B, C, height, width) over torch's adaptive windows, in the accumulation type."""
    if tuple(x.shape[2:]) == (height, width):
        return x
    return _AveragePool.apply(x.to(accumulator(x)), height, width)


class _MaxPool(torch.autograd.Function):
    """Of two windows that are neighbours in a row or a column the last and the first position may be the same one.

    Of every second window none are, so backward writes the windows in four sets, each without a collision, and adds.
    """

    @staticmethod
    def forward(ctx, x, height, width):
        out, positions = torch.nn.functional.adaptive_max_pool2d(x, (height, width), return_indices=True)
        ctx.save_for_backward(positions)
        ctx.shape = x.shape
        return out

    @staticmethod
    def backward(ctx, grad):
        check.first_derivative_only("max_pool")
        (positions,) = ctx.saved_tensors
        x_grad = grad.new_zeros(ctx.shape).flatten(2)
        for rows in (0, 1):
            for columns in (0, 1):
                part = (..., slice(rows, None, 2), slice(columns, None, 2))
                once = torch.zeros_like(x_grad).scatter(2, positions[part].flatten(2), grad[part].flatten(2))
                x_grad = x_grad + once
        return x_grad.view(ctx.shape), None, None


def max_pool(x: Tensor, height: int, width: int) -> Tensor:
    """The largest entries (B, C, height, width) of maps (B, C, H, W), at most as many, in torch's adaptive windows.

    The gradient goes to one position of each window.
    """
    if tuple(x.shape[2:]) == (height, width):
        return x
    return _MaxPool.apply(x, height, width)


def to_smaller_square(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps at one size, as RepDistiller does it: that of unlike height is averaged to the smaller height, squared.

    Raises: ValueError where the maps still differ in size.
    """
    height = min(a.shape[2], b.shape[2])
    if a.shape[2] != b.shape[2]:
        a, b = (x if x.shape[2] == height else average_pool(x, height, height) for x in (a, b))
    if a.shape[2:] != b.shape[2:]:
        raise ValueError(
            f"maps of one height must have one width, and a map beside a higher one must be square: "
            f"got {tuple(a.shape[2:])} and {tuple(b.shape[2:])}"
        )
    return a, b
