"""What losses under the originals' names share: attributes and methods, lists of unequal length, formulas, draws."""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kdfast
from kdfast import ops
from kdfast.ops import check, elementwise
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.pool import to_smaller_square


# ---- attributes and methods ------------------------------------------------------------------------------------------
def alias(name: str) -> Any:
    """An attribute that is the attribute `name` of its module."""
    return property(lambda self: getattr(self, name), lambda self, value: setattr(self, name, value))


def replaced(module: Any, cls, *names: Any) -> bool:
    """Whether a subclass of `cls`, or the instance, has other methods of these names, which then have to act."""
    return any(name in vars(module) or getattr(type(module), name) is not getattr(cls, name) for name in names)


# ---- lists -----------------------------------------------------------------------------------------------------------
def shortened(student: Sequence[Any], teacher: Sequence[Any]) -> tuple[Any, ...]:
    """Two lists of layers, of which the longer loses its last ones, as zip leaves them out; with a warning, once."""
    if not all(isinstance(x, (list, tuple)) for x in (student, teacher)) or len(student) == len(teacher):
        return student, teacher
    if not torch.compiler.is_compiling():
        _warn(len(student), len(teacher))
    both = min(len(student), len(teacher))
    return student[:both], teacher[:both]


@functools.cache
def _warn(student, teacher):
    warnings.warn(
        f"lists of {student} and {teacher} layers: the last of the longer one are left out, as in the original",
        stacklevel=2,
    )


def layers(g_s: Sequence[Any], g_t: Sequence[Any], each: Callable[..., Any]) -> list[tuple[Tensor, Tensor]]:
    """`check.layers` of lists that are shortened first."""
    return check.layers(*shortened(g_s, g_t), each)


def of_each(loss: Callable[..., Any], g_s: Sequence[Any], g_t: Sequence[Any]) -> list[Tensor]:
    """[loss(s, t) for each layer]."""
    return [loss(s, t) for s, t in layers(g_s, g_t, check.embeddings)]


# ---- formulas --------------------------------------------------------------------------------------------------------
def mean(x: Tensor) -> Tensor:
    """Of all entries, (B, ...)."""
    return fixed_sum(fixed_sum(x.flatten(1))) / max(x.numel(), 1)


def power(name: str, p: float | str) -> float:
    """A number above 0, which is an int where it is whole."""
    check.positive(name, p)
    return int(p) if p == int(p) else p


def attention_map(x: Tensor, p: float) -> Tensor:
    """``m / |m|`` [B, N] of maps (B, C, H, W) with ``m = mean_c x_c^p``; for a p that is not whole, of x >= 0."""
    check.maps("f", x)
    return F.normalize(elementwise.power(x.to(accumulator(x)), power("p", p)).mean(1).flatten(1))


def attention_error(f_s: Tensor, f_t: Tensor, p: float) -> Tensor:
    """:class:`kdfast.AT` of two maps, for any p above 0."""
    s, t = maps_of_one_size(f_s, f_t)
    p = power("p", p)
    if isinstance(p, int):
        return ops.attention_transfer(s, t, p)
    return mean((attention_map(s, p) - attention_map(t, p)).square())


def maps_of_one_size(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps (B, C, H, W), of which the larger is pooled as RepDistiller does it."""
    ((s, t),) = check.layers([f_s], [f_t], check.maps)
    return to_smaller_square(s, t)


def wide(*tensors: Any) -> list[Tensor]:
    """The tensors in the accumulation type."""
    return [x.to(accumulator(*tensors)) for x in tensors]


def pdist(e: Tensor, squared: bool = False, eps: float = 1e-12) -> Tensor:
    """Distances among the rows of e [B, B], whose squares are at least `eps`, and 0 on the diagonal."""
    check.positive("eps", eps)
    d = ops.pairwise_distance(e, squared=True).clamp(min=eps)
    return (d if squared else d.sqrt()) * (1 - torch.eye(len(e), device=d.device, dtype=d.dtype))


def distance_error(d_s: Tensor, d_t: Tensor) -> Tensor:
    """``mean h(D / mean D - D' / mean D')`` of two matrices of distances, h the Huber function, D' a constant."""
    return mean(F.smooth_l1_loss(over_mean(d_s), over_mean(d_t.detach()), reduction="none"))


def over_mean(d: Tensor) -> Tensor:
    """Distances over the mean of those above 0."""
    above = d > 0
    average = fixed_sum(fixed_sum(torch.where(above, d, 0.0))) / above.sum().clamp(min=1)
    return d / torch.where(average > 0, average, 1.0)


def poly_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Squared products of channels (B, C, N) and (B, C', N): [B, C', C]."""
    return (b @ a.mT).square()


# ---- CRD -------------------------------------------------------------------------------------------------------------
def make_crd(module: Any, *arguments: Any, embeddings: bool, bank_dtype: str | torch.dtype | None) -> None:
    """`kdfast.CRD.__init__` whose draws, made on the CPU, are the originals': embeddings, if any, then both banks.

    The seed of kdfast's own negatives is a draw more, after which the generator goes on as after the original's.
    """
    dtype = torch.get_default_dtype()
    state = torch.get_rng_state()
    kdfast.CRD.__init__(module, *arguments, bank_dtype=dtype if bank_dtype is None else bank_dtype)
    if module.bank_student.device.type != "cpu":
        return
    torch.set_rng_state(state)
    if embeddings:
        module.embed_student.reset_parameters()
        module.embed_teacher.reset_parameters()
    bound = 1 / math.sqrt(module.feature_dim / 3)
    for bank in (module.bank_student, module.bank_teacher):
        for rows in bank.split(65536):
            rows.copy_(torch.rand(rows.shape, dtype=dtype).mul_(2 * bound).add_(-bound))
