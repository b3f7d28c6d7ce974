"""Divergences of a classifier's logits that never exist as a whole: hidden states times weights, some rows at a time.

    z = softcap tanh(scale (h W^T + b) / softcap)
    loss = kl_weight D_beta(softmax(z_t / T_t), softmax(z_s / T)) + ce_weight CE(z_s, labels)

of the rows that count. A chunk of rows has its logits, in float32 whatever the inputs are, their loss and its gradient;
then follow the products with the hidden states and the weights. The gradient of a weight adds up in float32. So the
forward leaves gradients and no logits, and the backward scales them. For one value a row (reduction "none") the
upstream gradient has to be known, and the backward forms the chunks again.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdfast._kernels import op
from kdfast.ops import check, shapes
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.differentiable import function_of
from kdfast.ops.saved import save, saved
from kdfast.ops.softmax_kl import cross_entropy, softmax_kl
from kdfast.ops.temperature import temperature_argument
from kdfast.ops.top_k import TopK

__all__ = ["linear_cross_entropy", "linear_kl"]

BYTES = 2**26  # of the logits of a chunk and their gradients
ROWS = 16  # chunks are multiples of it: products of few rows are other kernels, with other roundings
TILE = 2**22  # entries of a weight that are widened at a time
VOCABULARIES = ("strict", "pad", "common")


# ---- one classifier --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Head:
    """Hidden states [rows, H], weight [V, H], bias [V] or None, and what becomes of their product."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float  # 0: none
    classes: int  # of the logits, which end with -inf where the weight has fewer rows

    def logits(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Of some rows, in the accumulation type."""
        z = _product(self.hidden[index], self.weight, dtype)
        if self.bias is not None:
            z += self.bias.to(dtype)
        if self.scale != 1:
            z *= self.scale
        if self.softcap:
            z = z.div_(self.softcap).tanh_().mul_(self.softcap)
        missing = self.classes - z.shape[1]
        return torch.nn.functional.pad(z, (0, missing), value=-math.inf) if missing else z

    def through(self, grad: Tensor, z: Tensor) -> Tensor:
        """The gradient of h W^T + b from that of the logits z, in its memory."""
        count = len(self.weight)
        grad, z = grad[:, :count], z[:, :count]
        if self.softcap:
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


# ---- the op ----------------------------------------------------------------------------------------------------------
def kept_rows(keep: Tensor) -> Tensor:
    """The rows that count first. On a CPU no others; elsewhere all of them follow, as a look would wait."""
    if keep.device.type == "cpu":
        return keep.nonzero()[:, 0]
    return torch.argsort(~keep, stable=True)


def chunk_rows(chunk: int, classes: int, heads: int, dtype: torch.dtype) -> int:
    """Rows at a time: as many as were asked for, or as have BYTES of logits and gradients."""
    if chunk:
        return chunk
    row = classes * (torch.finfo(dtype).bits // 8) * 2 * heads
    return max(ROWS, BYTES // max(row, 1) // ROWS * ROWS)


def _of_rows(temperature, number, at, need):
    """The temperature of a chunk: a number, or a tensor that collects a gradient."""
    if temperature is None:
        return number or None
    return (temperature[at] if temperature.dim() else temperature).detach().requires_grad_(need)


@contextlib.contextmanager
def recorded():
    """Inside, autograd sees operations also where the op runs below it, as in a compiled graph.

    What it saves stays: a checkpoint around the op would run the whole forward again to have it back.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in AUTOGRAD:
        excluded = excluded.remove(key)
    keys = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
    with keys, torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        yield


AUTOGRAD = [key for name, key in torch._C.DispatchKey.__members__.items() if name.startswith("Autograd")]


def add_gradients(head: Head, grad: Tensor, at: Tensor, grads: Sequence[Tensor | None]) -> None:
    """Of hidden states, weight and bias, from that of a chunk's products."""
    hidden, weight, bias = grads
    if hidden is not None:
        hidden[at] = _times_weight(grad, head.weight).to(hidden.dtype)
    if weight is not None:
        weight.addmm_(grad.t(), head.hidden[at].to(grad.dtype))
    if bias is not None:
        bias += grad.sum(0)


def _shapes(needs, **arguments):
    leaves = [arguments[name] for name in LEAVES]
    hidden, weight, _, teacher, teacher_weight, *_ = leaves
    values = shapes.sums(hidden.shape[:1], hidden, weight, teacher, teacher_weight)
    pairs = [(x, need) for x, need in zip(leaves, needs, strict=True) if x is not None]
    return values, [shapes.gradient(x) if need else x.new_empty(0) for x, need in pairs]


# What may get a gradient, in the order of the op's results, of which those that are not given are left out.
LEAVES = (
    *("student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias"),
    *("temperatures", "teacher_temperatures"),
)


@op("linear", _shapes, has_kernels=False)
def _linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    temperatures: Tensor | None,
    teacher_temperatures: Tensor | None,
    top_values: Tensor | None,
    top_indices: Tensor | None,
    top_rest: Tensor | None,
    labels: Tensor | None,
    weight: Tensor | None,
    keep: Tensor,
    upstream: Tensor | None,
    temperature: float,
    teacher_temperature: float,
    beta: float,
    kl_weight: float,
    ce_weight: float,
    smoothing: float,
    scale_by_t2: bool,
    ignore_index: int,
    student_scale: float,
    teacher_scale: float,
    student_softcap: float,
    teacher_softcap: float,
    top_temperature: float,
    tail: str,
    chunk: int,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    """-> values of the rows [rows], 0 where they do not count; gradients of their sum in the LEAVES that are given.

    keep: the rows that count. upstream: [rows], in place of 1. teacher_temperature: 0 for the student's. softcaps,
    chunk: 0 for none.
    """
    classes = max(len(student_weight), 0 if teacher_weight is None else len(teacher_weight))
    heads = [Head(student_hidden, student_weight, student_bias, student_scale, student_softcap, classes)]
    if teacher_hidden is not None:
        heads.append(Head(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap, classes))
    tensors = (student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    given_t = temperatures, teacher_temperatures
    dtype = accumulator(student_hidden, student_weight, teacher_hidden, teacher_weight)
    factors = keep.to(dtype) if weight is None else torch.where(keep, weight.to(dtype), 0.0)
    values = factors.new_zeros(len(student_hidden))
    # Hidden states in their type, as each row is written once; all else, which adds up, in `dtype`.
    grads = [
        torch.zeros_like(x, dtype=x.dtype if i in (0, 3) else dtype) if need else None
        for i, (x, need) in enumerate(zip((*tensors, *given_t), needs, strict=True))
    ]

    def of_rows(z_s, z_t, at, t_s, t_t):
        value = 0.0
        if kl_weight:
            top = (top_values, top_indices, top_rest)
            teacher = (
                z_t if top_values is None else TopK(*[None if x is None else x[at] for x in top], top_temperature, tail)
            )
            value = kl_weight * softmax_kl(z_s, teacher, t_s, beta=beta, teacher_temperature=t_t, reduction="none")
            squared = t_s.to(value.dtype) ** 2 if isinstance(t_s, Tensor) else t_s**2
            value = value if scale_by_t2 else value / squared
        if ce_weight:
            of_ce = {"ce_weight": ce_weight, "label_smoothing": smoothing, "ignore_index": ignore_index}
            value = value + cross_entropy(z_s, labels[at], reduction="none", **of_ce)
        return value if kl_weight or ce_weight else 0.0 * z_s.sum(1)

    index, step = kept_rows(keep), chunk_rows(chunk, classes, len(heads), dtype)
    for begin in range(0, len(index), step):
        at = index[begin : begin + step]
        z = [head.logits(at, dtype).requires_grad_(any(needs[3 * i : 3 * i + 3])) for i, head in enumerate(heads)]
        numbers = temperature, teacher_temperature
        of_t = [_of_rows(t, n, at, need) for t, n, need in zip(given_t, numbers, needs[6:], strict=True)]
        wanted = [x for x in (*z, *of_t) if isinstance(x, Tensor) and x.requires_grad]
        with torch.set_grad_enabled(bool(wanted)), recorded():
            rows = of_rows(*z, *[None] * (2 - len(z)), at, *of_t)
            rows = torch.where(factors[at] == 0, 0.0, rows * factors[at])
            ones = torch.ones_like(rows) if upstream is None else upstream[at].to(rows.dtype)
            found = torch.autograd.grad(rows, wanted, ones) if wanted else ()
        values[at] = rows.detach()
        found = dict(zip(map(id, wanted), found, strict=True))
        for i, (head, x) in enumerate(zip(heads, z, strict=True)):
            if id(x) in found:
                add_gradients(head, head.through(found[id(x)], x.detach()), at, grads[3 * i : 3 * i + 3])
        for i, t in enumerate(of_t):
            if id(t) in found and t.dim():
                grads[6 + i][at] = found[id(t)].to(dtype)
            elif id(t) in found:
                grads[6 + i] += found[id(t)]
    results = [
        x.new_empty(0) if g is None else g.to(x.dtype)
        for g, x in zip(grads, (*tensors, *given_t), strict=True)
        if x is not None
    ]
    return values, results


def _gradients(results, tensors, needs):
    """The op's results as one for each of the LEAVES: None where none is needed."""
    results = iter(results)
    found = [None if x is None else next(results) for x in tensors]
    return [x if need else None for x, need in zip(found, needs, strict=True)]


def _run(*args):
    """settings: those of the op before `needs`, whether the rows add up, and what their sum is divided by."""
    ctx, (settings, reduce, divisor), *tensors = args
    leaves, others, count = tensors[: len(LEAVES)], tensors[len(LEAVES) : -1], tensors[-1]
    needs = [bool(x) for x in ctx.needs_input_grad[1 : 1 + len(LEAVES)]]
    with torch.autocast(leaves[0].device.type, enabled=False):
        values, results = _linear_kl(*leaves, *others, None, *settings, needs if reduce else [False] * len(needs))
    ctx.settings, ctx.reduce, ctx.divisor, ctx.used = settings, reduce, divisor, False
    if not reduce:
        save(ctx, *leaves, *others)
        return values
    ctx.grads = _gradients(results, leaves, needs)
    save(ctx, count)
    return fixed_sum(values) / (divisor if count is None else count.to(values.dtype))


def _differentiate(ctx, grad):
    check.first_derivative_only("linear_kl")
    others = [None] * 7  # that have no gradient: the top-k teacher, labels, weight, keep, count
    if not ctx.reduce:
        tensors = saved(ctx)
        leaves, needs = tensors[: len(LEAVES)], [bool(x) for x in ctx.needs_input_grad[1 : 1 + len(LEAVES)]]
        with torch.autocast(grad.device.type, enabled=False):
            _, results = _linear_kl(*tensors, grad, *ctx.settings, needs)
        return None, *_gradients(results, leaves, needs), *others
    if ctx.used:
        raise RuntimeError(
            "kdfast.linear_kl keeps gradients, not logits, and a first backward used them: call it again, "
            "or take reduction='none'"
        )
    ctx.used = True
    (count,) = saved(ctx)
    factor = grad / (ctx.divisor if count is None else count.to(grad.dtype))
    grads, ctx.grads = ctx.grads, None
    return None, *[g if g is None else g.mul_(factor) for g in grads], *others


_function = function_of("linear_kl", _run, _differentiate)


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


def _labels(labels, hidden, weight, ignore_index):
    """Integer labels (...), as int64."""
    logits = hidden[..., :1].expand(*hidden.shape[:-1], len(weight))
    return check.class_indices(labels, logits, ignore_index)


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
    """-> what a sum is divided by, in a tensor, or as a number."""
    check.reduction(reduction)
    if divisor is not None:
        check.divisor(divisor)
        if reduction == "none":
            raise ValueError('divisor divides a sum: with reduction="none" there is none')
        return (divisor.reshape(()), 1.0) if isinstance(divisor, Tensor) else (None, float(divisor))
    return (keep.sum().clamp(min=1), 1.0) if reduction in ("mean", "batchmean") else (None, 1.0)


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
    group: Any = None,
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
        group: a torch.distributed group over which both weights (and biases) are split along V, in parts that may be
            unequal; all else is the same in each process, with labels and top-k indices of the whole vocabulary.
            Two small exchanges a chunk; the gradient of hidden states is summed over the group in the backward.
            Temperatures are numbers then.
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
    count, number = _divided(reduction, keep, divisor)
    if group is not None:
        if isinstance(temperature, Tensor) or isinstance(teacher_temperature, Tensor):
            raise ValueError("temperatures must be numbers with a group of processes, got a tensor")
        return _of_group(
            group,
            (_flat(student_hidden), student_weight, student_bias, _flat(teacher_hidden), teacher_weight, teacher_bias),
            (top, labels, weight, keep, count),
            (temperature, teacher_temperature or temperature, beta),
            (kl_weight * (temperature**2 if scale_by_t2 else 1.0), ce_weight, ignore_index),
            ((student_scale, teacher_scale), (student_softcap or 0.0, teacher_softcap or 0.0)),
            (chunk or 0, reduction != "none", number),
        ).reshape(() if reduction != "none" else leading)
    t_s, number_s = _temperature(temperature, student_hidden)
    t_t, number_t = (None, 0.0) if teacher_temperature is None else _temperature(teacher_temperature, student_hidden)
    stored, tail = (1.0, "rest") if top is None else (float(top.temperature), top.tail)
    settings = (
        *(number_s, number_t, float(beta), float(kl_weight), float(ce_weight), 0.0, bool(scale_by_t2), ignore_index),
        *(float(student_scale), float(teacher_scale), float(student_softcap or 0), float(teacher_softcap or 0)),
        *(stored, tail, chunk or 0),
    )
    tensors = _flat(student_hidden), student_weight, student_bias, _flat(teacher_hidden), teacher_weight, teacher_bias
    if torch.compiler.is_compiling():  # dynamo takes no tensor twice, as a weight of both or a hidden state as weight
        tensors = [None if x is None else x.view_as(x) for x in tensors]
    loss = _function(
        (settings, reduction != "none", number),
        *tensors,
        *(t_s, t_t, *((None,) * 3 if top is None else top[:3])),
        *(None if labels is None else labels.reshape(-1), None if weight is None else weight.reshape(-1), keep, count),
    )
    return loss if reduction != "none" else loss.reshape(leading)


def _of_group(group, tensors, others, temperatures, weights, forms, rest):
    from kdfast.ops.linear_group import Settings, group_linear  # which imports this file

    top, labels, weight, keep, count = others
    tail, stored = ("rest", 1.0) if top is None else (top.tail, float(top.temperature))
    settings = Settings(group, *temperatures, *weights, *forms, tail, stored, *rest)
    flat = (None if x is None else x.reshape(-1) for x in (labels, weight))
    return group_linear(settings, tensors, top, *flat, keep, count)


def _temperature(value, like):
    """-> the op's tensor and number."""
    if not isinstance(value, Tensor):
        return temperature_argument(value, like)
    return (value.reshape(-1) if value.dim() else value), 1.0


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
    labels = _labels(labels, hidden, weight, ignore_index)
    if row_weight is not None:
        check.row_weight(row_weight, hidden)
    keep = _counted(leading, hidden, mask, labels, ignore_index)
    count, number = _divided(reduction, keep, divisor)
    settings = (1.0, 0.0, 0.0, 0.0, 1.0, float(label_smoothing), False, ignore_index, float(scale), 1.0)
    loss = _function(
        ((*settings, float(softcap or 0), 0.0, 1.0, "rest", chunk or 0), reduction != "none", number),
        *(_flat(hidden), weight, bias, *[None] * 8, labels.reshape(-1)),
        *(None if row_weight is None else row_weight.reshape(-1), keep, count),
    )
    return loss if reduction != "none" else loss.reshape(leading)
