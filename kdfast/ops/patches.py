"""KL of similarities within an image: each position's softmax over all positions, image by image.

The forward, which has an image's similarities some rows at a time, gives the gradients, too: nothing of the size of the
maps is kept but these.
"""

import torch
from torch import Tensor

from kdfast._kernels import op
from kdfast.ops import shapes
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.differentiable import gradient_formed
from kdfast.ops.layout import gradient_memory
from kdfast.ops.linear import linear_kl, recorded


def unit(x: Tensor) -> Tensor:
    """Vectors of the last dimension divided by their lengths, in the accumulation type; a zero vector stays zero."""
    x = x.to(accumulator(x))
    squares = fixed_sum(x * x)[..., None]
    return x / torch.where(squares > 0, squares, 1.0).sqrt()


def _loss_and_slopes(student, teacher, *, need_student, need_teacher, **_):
    sides = ((student, need_student), (teacher, need_teacher))
    slopes = (gradient_memory(x, x) if need else x.new_empty(0) for x, need in sides)
    return shapes.sums((), student, teacher), *slopes


@op("linear", _loss_and_slopes, has_kernels=False)
def _patch_kl(
    student: Tensor, teacher: Tensor, temperature: float, need_student: bool, need_teacher: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss of maps (B, C, N) and (B, C', N), its gradients in both."""
    values = student.new_zeros(len(student), dtype=accumulator(student, teacher))
    needs = need_student, need_teacher
    grads = [
        gradient_memory(x, x) if need else x.new_empty(0) for x, need in zip((student, teacher), needs, strict=True)
    ]
    count = max(len(student) * student.shape[2], 1)
    for image in range(len(student)):
        leaves = [x[image].detach().requires_grad_(need) for x, need in zip((student, teacher), needs, strict=True)]
        with torch.set_grad_enabled(any(needs)), recorded():
            s, t = (unit(x.t()) for x in leaves)
            value = linear_kl(s, s, t, t, temperature=temperature, reduction="sum", chunk=256) / count
            wanted = [x for x, need in zip(leaves, needs, strict=True) if need]
            found = iter(torch.autograd.grad(value, wanted) if wanted else ())
        values[image] = value.detach()
        for grad, need in zip(grads, needs, strict=True):
            if need:
                grad[image] = next(found)
    return fixed_sum(values), grads[0], grads[1]


_function = gradient_formed(_patch_kl, lambda grad, slope, x, *_: (grad * slope.to(grad.dtype)).to(x.dtype), "patch_kl")


def patch_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``1 / (B N) sum KL(p || q)``, rows of p and q the softmaxes of cosines / temperature among an image's positions.

    Maps (B, C, N) and (B, C', N), which are checked before.
    """
    return _function((float(temperature),), student, teacher)
