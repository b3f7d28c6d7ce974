"""Divergences of a classifier's logits that never exist as a whole: hidden states times weights, some rows at a time.

    z = softcap tanh(scale (h W^T + b) / softcap)
    loss = kl_weight D_beta(softmax(z_t / T_t), softmax(z_s / T)) + ce_weight CE(z_s, labels)

of the rows that count. A chunk of rows has its logits, in float32 whatever the inputs are, their loss and its gradient;
then follow the products with the hidden states and the weights. The gradient of a weight adds up in float32. So the
forward leaves gradients and no logits, and the backward scales them. For one value a row (reduction "none") the
upstream gradient has to be known, and the backward forms the chunks again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import check
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.softmax_kl import cross_entropy, softmax_kl
from kdfast.ops.top_k import TopK

__all__ = ["linear_cross_entropy", "linear_kl"]

BYTES = 2**26  # of the logits of a chunk and their gradients
ROWS = 16  # chunks are multiples of it: products of few rows are other kernels, with other roundings
TILE = 2**22  # entries of a weight that are widened at a time
VOCABULARIES = ("strict", "pad", "common")


# ---- one classifier --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Head:
    """Hidden states [rows, H], weight [V, H], bias [V] or None, and what becomes of their product."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    classes: int  # of the logits, which end with -inf where the weight has fewer rows

    def logits(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Of some rows, in the accumulation type."""
        z = _product(self.hidden[index], self.weight, dtype)
        if self.bias is not None:
            z += self.bias.to(dtype)
        if self.scale != 1:
            z *= self.scale
        if self.softcap is not None:
            z = z.div_(self.softcap).tanh_().mul_(self.softcap)
        missing = self.classes - z.shape[1]
        return torch.nn.functional.pad(z, (0, missing), value=-math.inf) if missing else z

    def through(self, grad: Tensor, z: Tensor) -> Tensor:
        """The gradient of h W^T + b from that of the logits z, in its memory."""
        count = len(self.weight)
        grad, z = grad[:, :count], z[:, :count]
        if self.softcap is not None:
            grad = grad.mul_(1 - (z / self.softcap).square_())
        return grad.mul_(self.scale) if self.scale != 1 else grad


def _tiles(weight):
    """Slices of the weight's rows that are widened one by one."""
    step = max(1, TILE // max(1, weight.shape[1]))
    return [slice(i, i + step) for i in range(0, len(weight), step)]


def _product(hidden, weight, dtype):
    """hidden weight^T [rows, V] in `dtype`, of factors that are not rounded."""
    if hidden.dtype == weight.dtype == dtype:
        return hidden @ weight.t()
    if hidden.is_cuda and hidden.dtype == weight.dtype and dtype == torch.float32:
        return torch.mm(hidden, weight.t(), out_dtype=dtype)
    wide, out = hidden.to(dtype), hidden.new_empty((len(hidden), len(weight)), dtype=dtype)
    for tile in _tiles(weight):
        torch.mm(wide, weight[tile].to(dtype).t(), out=out[:, tile])
    return out


def _times_weight(grad, weight):
    """grad weight [rows, H], in the type of `grad`."""
    if weight.dtype == grad.dtype:
        return grad @ weight
    out = grad.new_zeros((len(grad), weight.shape[1]))
    for tile in _tiles(weight):
        out.addmm_(grad[:, tile], weight[tile].to(grad.dtype))
    return out


# ---- chunks ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Work:
    """What a loss is made of besides the tensors that have gradients."""

    rows: Callable[..., Tensor]  # (student logits, teacher logits, index, temperature, teacher's) -> loss of rows
    keep: Tensor  # [rows] bool
    weight: Tensor | None  # [rows]
    count: Tensor | float  # what the sum is divided by
    reduce: bool
    chunk: int | None
    scales: tuple[float, float]
    softcaps: tuple[float | None, float | None]
    classes: int


def _kept(keep):
    """The rows that count first. On a CPU no others; elsewhere all of them follow, as a look would wait."""
    if keep.device.type == "cpu":
        return keep.nonzero()[:, 0]
    return torch.argsort(~keep, stable=True)


def _chunk_rows(chunk, classes, heads, dtype):
    if chunk is not None:
        return chunk
    row = classes * (torch.finfo(dtype).bits // 8) * 2 * heads
    return max(ROWS, BYTES // max(row, 1) // ROWS * ROWS)


def _compute(work, tensors, upstream, needs):
    """-> values of the rows [rows], gradients of the tensors, None where none is needed.

    upstream: factors of the rows [rows], or None for 1.
    """
    hs, ws, bs, ht, wt, bt, *temperatures = tensors
    heads = [_Head(hs, ws, bs, work.scales[0], work.softcaps[0], work.classes)]
    if ht is not None:
        heads.append(_Head(ht, wt, bt, work.scales[1], work.softcaps[1], work.classes))
    dtype = accumulator(hs, ws, ht, wt)
    factors = work.keep.to(dtype) if work.weight is None else torch.where(work.keep, work.weight.to(dtype), 0.0)
    values = factors.new_zeros(len(hs))
    grads = [
        _gradient_memory(x, i, dtype) if need else None for i, (x, need) in enumerate(zip(tensors, needs, strict=True))
    ]
    index, step = _kept(work.keep), _chunk_rows(work.chunk, work.classes, len(heads), dtype)
    for begin in range(0, len(index), step):
        at = index[begin : begin + step]
        z = [head.logits(at, dtype) for head in heads]
        leaves = [x.requires_grad_(any(needs[3 * i : 3 * i + 3])) for i, x in enumerate(z)]
        of_t = [_of_rows(t, at, need) for t, need in zip(temperatures, needs[6:], strict=True)]
        wanted = [x for x in (*leaves, *of_t) if isinstance(x, Tensor) and x.requires_grad]
        with torch.set_grad_enabled(bool(wanted)):
            rows = work.rows(*leaves, *[None] * (2 - len(leaves)), at, *of_t)
            rows = torch.where(factors[at] == 0, 0.0, rows * factors[at])
        values[at] = rows.detach()
        if not wanted:
            continue
        found = torch.autograd.grad(rows, wanted, torch.ones_like(rows) if upstream is None else upstream[at])
        found = dict(zip(map(id, wanted), found, strict=True))
        for i, (head, x) in enumerate(zip(heads, leaves, strict=True)):
            if id(x) in found:
                _add_gradients(head, head.through(found[id(x)], x.detach()), at, grads[3 * i : 3 * i + 3])
        for i, t in enumerate(of_t):
            if id(t) in found:
                _add_temperature(grads[6 + i], found[id(t)], at)
    return values, [g if g is None else g.to(x.dtype) for g, x in zip(grads, tensors, strict=True)]


def _gradient_memory(x, i, dtype):
    """Of hidden states in their type, as each row is written once; of all else, which adds up, in `dtype`."""
    return torch.zeros_like(x) if i in (0, 3) else torch.zeros_like(x, dtype=dtype)


def _of_rows(temperature, at, need):
    if not isinstance(temperature, Tensor):
        return temperature
    return (temperature[at] if temperature.dim() else temperature).detach().requires_grad_(need)


def _add_temperature(total, grad, at):
    if total.dim():
        total[at] = grad.to(total.dtype)
    else:
        total += grad


def _add_gradients(head, grad, at, grads):
    hidden, weight, bias = grads
    if hidden is not None:
        hidden[at] = _times_weight(grad, head.weight).to(hidden.dtype)
    if weight is not None:
        weight.addmm_(grad.t(), head.hidden[at].to(grad.dtype))
    if bias is not None:
        bias += grad.sum(0)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, *tensors: Tensor | None) -> Tensor:
        needs = [*ctx.needs_input_grad[1:]]
        with torch.autocast(work.keep.device.type, enabled=False):
            values, grads = _compute(work, tensors, None, needs if work.reduce else [False] * len(needs))
        ctx.work, ctx.grads = work, grads
        if not work.reduce:
            ctx.numbers = [None if isinstance(x, Tensor) else x for x in tensors]
            ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in tensors])
        return fixed_sum(values) / work.count if work.reduce else values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        check.first_derivative_only("linear_kl")
        work = ctx.work
        if not work.reduce:
            pairs = zip(ctx.saved_tensors, ctx.numbers, strict=True)
            tensors = [number if x is None else x for x, number in pairs]
            with torch.autocast(work.keep.device.type, enabled=False):
                return None, *_compute(work, tensors, grad, [*ctx.needs_input_grad[1:]])[1]
        if ctx.grads is None:
            raise RuntimeError(
                "kdfast.linear_kl keeps gradients, not logits, and they were used by a first backward: "
                "call it again, or use reduction='none'"
            )
        grads, ctx.grads = ctx.grads, None
        factor = grad / work.count
        return None, *[g if g is None else g.mul_(factor) for g in grads]


# ---- functions -------------------------------------------------------------------------------------------------------
def _check_head(side, hidden, weight, bias, leading=None):
    names = [f"{side}_{name}" for name in ("hidden", "weight", "bias")] if side else ["hidden", "weight", "bias"]
    check.floating(names[0], hidden)
    if hidden.dim() < 2:
        raise ValueError(
            f"{names[0]} must be (..., features) with at least one leading dimension, got {tuple(hidden.shape)}"
        )
    if leading is not None and hidden.shape[:-1] != leading:
        raise ValueError(f"{names[0]} must have the leading shape {tuple(leading)}, got {tuple(hidden.shape)}")
    check.floating(names[1], weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or not len(weight):
        raise ValueError(
            f"{names[1]} must be (classes, {hidden.shape[-1]}), as that of nn.Linear, got shape {tuple(weight.shape)}"
        )
    check.same_device(names[1], weight, hidden, f"the {names[0]}")
    if bias is not None:
        check.shaped(names[2], bias, (len(weight),), hidden)


def _flat(x):
    return None if x is None else x.reshape(-1, x.shape[-1])


def _counted(shape, like, mask, labels, ignore_index):
    """Which rows count [rows]."""
    keep = torch.ones(shape, dtype=torch.bool, device=like.device)
    if mask is not None:
        check.row_mask(mask, like)
        keep = mask
    if labels is not None:
        keep = keep & (labels != ignore_index)
    return keep.reshape(-1)


def _divided(reduction, keep, divisor):
    check.reduction(reduction)
    if divisor is not None:
        check.divisor(divisor)
        if reduction == "none":
            raise ValueError('divisor divides a sum: with reduction="none" there is none')
        return divisor
    return keep.sum().clamp(min=1) if reduction in ("mean", "batchmean") else 1.0


def _settings(chunk, kl_weight, ce_weight, *positive):
    if chunk is not None:
        check.count("chunk", chunk)
    check.number("kl_weight", kl_weight)
    check.number("ce_weight", ce_weight)
    for name, value in positive:
        if value is not None:
            check.positive(name, value)


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | TopK,
    teacher_weight: Tensor | None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    beta: float = 0.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    scale_by_t2: bool = False,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    reduction: str = "mean",
    divisor: float | Tensor | None = None,
    chunk: int | None = None,
    vocabulary: str = "strict",
) -> Tensor:
    """``kl_weight D_beta + ce_weight CE`` of language models from hidden states, without their logits as a whole.

    Logits are ``softcap tanh(scale (h W^T + b) / softcap)``, formed a chunk of rows at a time, in float32 whatever the
    inputs are (float64 of float64); D_beta is that of :func:`softmax_kl`, the cross-entropy takes the student at
    temperature 1. Nothing of size rows x V exists; the gradient of a weight adds up in float32.

    Args:
        student_hidden, teacher_hidden: (..., H), each with an H of its own. student_weight, teacher_weight: (V, H), as
            of ``nn.Linear``. For a :class:`TopK` as the teacher the weight is None. student_bias, teacher_bias: (V,).
        temperature, teacher_temperature: as in :func:`softmax_kl`; a tensor that requires a gradient gets it.
        beta: from 0 to 1.
        mask, weight: (...) as in :func:`softmax_kl`. labels: (...) integer classes; a row of `ignore_index` leaves both
            terms, and one count serves both. Rows that do not count are packed away before any product (on a CPU), and
            may hold NaN.
        kl_weight, ce_weight: of the terms. scale_by_t2: times the square of the student's temperature.
        student_softcap, teacher_softcap: None for none. student_scale, teacher_scale: factors of h W^T + b.
        reduction: "mean" ("batchmean") divides by the rows that count, or by `divisor`; "sum"; "none" (...), whose
            backward forms the logits again.
        chunk: rows at a time; None: as many as have 64 MiB of logits and gradients.
        vocabulary: of weights that differ in height. "strict" refuses; "pad": the classes that a side lacks are -inf (a
            smaller student has an infinite forward KL); "common": cuts the larger side to the classes both have.

    Returns: 0-d, or (...), float32 (float64 if an input is float64). Gradients: hidden states, weights and biases of
    the student, and of the teacher where they require one. They are made in the forward, and a second backward through
    the same result is an error.

    Raises: TypeError, ValueError naming the argument; RuntimeError in a second backward.
    """
    _check_head("student", student_hidden, student_weight, student_bias)
    leading = student_hidden.shape[:-1]
    check.number("beta", beta, 0, 1)
    check.temperatures("temperature", temperature, student_hidden)
    if teacher_temperature is not None:
        check.temperatures("teacher_temperature", teacher_temperature, student_hidden)
    softcaps = ("student_softcap", student_softcap), ("teacher_softcap", teacher_softcap)
    scales = ("student_scale", student_scale), ("teacher_scale", teacher_scale)
    _settings(chunk, kl_weight, ce_weight, *softcaps, *scales)
    check.one_of("vocabulary", vocabulary, VOCABULARIES)
    if labels is not None:
        labels = check.class_indices(
            labels, student_hidden[..., :1].expand(*leading, len(student_weight)), ignore_index
        )
    elif ce_weight:
        raise ValueError(f"labels are required because ce_weight={ce_weight} weighs a cross-entropy, got None")
    if weight is not None:
        check.row_weight(weight, student_hidden)
    top = None
    if isinstance(teacher_hidden, tuple):
        if teacher_weight is not None or teacher_bias is not None:
            raise ValueError("teacher_weight and teacher_bias must be None with a top-k teacher")
        top, teacher_hidden = TopK(*teacher_hidden), None
        top = top._replace(
            **{
                name: x.reshape(-1, *x.shape[len(leading) :])
                for name, x in zip(top._fields[:3], top[:3], strict=True)
                if x is not None
            }
        )
    else:
        _check_head("teacher", teacher_hidden, teacher_weight, teacher_bias, leading)
        check.same_device("teacher_hidden", teacher_hidden, student_hidden)
        student_weight, student_bias, teacher_weight, teacher_bias = _fit(
            vocabulary, student_weight, student_bias, teacher_weight, teacher_bias
        )
    keep = _counted(leading, student_hidden, mask, labels, ignore_index)
    flat_labels = None if labels is None else labels.reshape(-1)

    def rows(z_s, z_t, at, t_s, t_t):
        values = 0.0
        if kl_weight:
            teacher = z_t if top is None else TopK(*[x if i > 2 or x is None else x[at] for i, x in enumerate(top)])
            of_kl = {"beta": beta, "reduction": "none"} | ({} if t_t is None else {"teacher_temperature": t_t})
            values = kl_weight * softmax_kl(z_s, teacher, t_s, **of_kl)
            values = (
                values if scale_by_t2 else values / (t_s.to(values.dtype) ** 2 if isinstance(t_s, Tensor) else t_s**2)
            )
        if ce_weight:
            of_ce = {"ce_weight": ce_weight, "ignore_index": ignore_index, "reduction": "none"}
            values = values + cross_entropy(z_s, flat_labels[at], **of_ce)
        return values if kl_weight or ce_weight else 0.0 * z_s.sum(1)

    classes = max(len(student_weight), 0 if teacher_weight is None else len(teacher_weight))
    work = _Work(
        rows,
        keep,
        None if weight is None else weight.reshape(-1),
        _divided(reduction, keep, divisor),
        reduction != "none",
        chunk,
        (student_scale, teacher_scale),
        (student_softcap, teacher_softcap),
        classes,
    )
    flat_t = [t.reshape(-1) if isinstance(t, Tensor) and t.dim() else t for t in (temperature, teacher_temperature)]
    tensors = _flat(student_hidden), student_weight, student_bias, _flat(teacher_hidden), teacher_weight, teacher_bias
    loss = _Linear.apply(work, *tensors, *flat_t)
    return loss if work.reduce else loss.reshape(leading)


def _fit(vocabulary, student_weight, student_bias, teacher_weight, teacher_bias):
    """Weights and biases of one height, or of two that are padded."""
    sizes = len(student_weight), len(teacher_weight)
    if sizes[0] == sizes[1]:
        return student_weight, student_bias, teacher_weight, teacher_bias
    if vocabulary == "strict":
        raise ValueError(
            f"teacher_weight must have the student's {sizes[0]} classes, got {sizes[1]}: vocabulary='pad' gives the "
            "classes that a side lacks the probability 0, 'common' leaves out those that not both have"
        )
    given = student_weight, student_bias, teacher_weight, teacher_bias
    if vocabulary == "pad":
        return given
    return tuple(None if x is None else x[: min(sizes)] for x in given)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    reduction: str = "mean",
    divisor: float | Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The cross-entropy of :func:`linear_kl` alone: of hidden states (..., H) with labels (...), without their logits.

    Args: as there, without a teacher; row_weight: its `weight`. label_smoothing: as in :func:`cross_entropy`.

    Raises: TypeError, ValueError naming the argument; RuntimeError in a second backward.
    """
    _check_head("", hidden, weight, bias)
    check.number("label_smoothing", label_smoothing, 0, 1)
    _settings(chunk, 0.0, 1.0, ("softcap", softcap), ("scale", scale))
    leading = hidden.shape[:-1]
    labels = check.class_indices(labels, hidden[..., :1].expand(*leading, len(weight)), ignore_index)
    if row_weight is not None:
        check.row_weight(row_weight, hidden)
    keep, flat_labels = _counted(leading, hidden, mask, labels, ignore_index), labels.reshape(-1)
    options = {"label_smoothing": label_smoothing, "ignore_index": ignore_index, "reduction": "none"}
    work = _Work(
        lambda z, _, at, *temperatures: cross_entropy(z, flat_labels[at], **options),
        keep,
        None if row_weight is None else row_weight.reshape(-1),
        _divided(reduction, keep, divisor),
        reduction != "none",
        chunk,
        (scale, 1.0),
        (softcap, None),
        len(weight),
    )
    loss = _Linear.apply(work, _flat(hidden), weight, bias, None, None, None, None, None)
    return loss if work.reduce else loss.reshape(leading)
