"""linear_kl with the vocabulary over a group of processes, each of which has a part of both classifiers' classes.

For a chunk of rows each process has its part of the logits. Two exchanges follow, of a few numbers a row: maxima and
sums of the exponentials, which make the log-sum-exp of whole rows; and the sums of the parts' terms. Gradients of the
logits, weights and biases are local then; those of the hidden states are partial sums, which the backward adds up.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from kdfast.ops import check
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.linear import Head, add_gradients, chunk_rows, kept_rows, recorded
from kdfast.ops.rows import INF, kl_grad_p, near_term
from kdfast.ops.softmax_kl import mixture_ratios, softmax_kl
from kdfast.ops.top_k import TopK, of_slots, truncated


class Settings(NamedTuple):
    """What is the same in every process."""

    group: Any
    temperature: float
    teacher_temperature: float
    beta: float
    kl_weight: float
    ce_weight: float
    ignore_index: int
    scales: tuple[float, float]
    softcaps: tuple[float, float]
    tail: str
    top_temperature: float
    chunk: int
    reduce: bool
    divisor: float


# ---- exchanges -------------------------------------------------------------------------------------------------------
def _gathered(x, group):
    """[processes, *x.shape], in the order of the ranks."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


def _added(x, group):
    """The sum over the processes, in the order of the ranks: the same bits in each of them."""
    return _gathered(x, group).sum(0)


def _log_sums(parts, group):
    """The log-sum-exp [rows, n] of whole rows, from n matrices [rows, classes] of this process."""
    tops = torch.stack([x.amax(1) if x.shape[1] else x.new_full((len(x),), -INF) for x in parts], 1)
    finite = torch.where(tops == -INF, 0.0, tops)
    sums = torch.stack([fixed_sum((x - finite[:, i : i + 1]).exp()) for i, x in enumerate(parts)], 1)
    tops, sums = _gathered(torch.stack([finite, sums]), group).unbind(1)
    top = torch.where(sums > 0, tops, -INF).amax(0)
    top = torch.where(top == -INF, 0.0, top)
    return top + (sums * torch.where(sums > 0, tops - top, -INF).exp()).sum(0).log()


# ---- one chunk: values of the rows, gradients of this process's logits -----------------------------------------------
def _dense(z_s, z_t, settings, sums, needs):
    """Partial sums [rows, n], and a function of their totals -> KL of the rows, gradients of z_s and z_t."""
    beta, t_s, t_t = settings.beta, settings.temperature, settings.teacher_temperature
    log_q, log_p = z_s / t_s - sums[:, :1], z_t / t_t - sums[:, 1:2]
    p, q = log_p.exp(), log_q.exp()
    nowhere = (log_p == -INF) & (log_q == -INF)
    d = torch.where(nowhere, 0.0, log_p - log_q)
    if 0 < beta < 1:
        p_ratio, q_ratio = (torch.where(nowhere, 0.0, x) for x in mixture_ratios(log_p, log_q, beta))
        m = beta * p + (1 - beta) * q
        parts = torch.stack([fixed_sum(near_term(p, m, p_ratio)), fixed_sum(near_term(q, m, q_ratio))], 1)
    elif beta == 0:
        parts = fixed_sum(near_term(p, q, d))[:, None]
    else:
        parts = fixed_sum(near_term(q, p, -d))[:, None]

    def finish(totals):
        if 0 < beta < 1:
            value = beta * totals[:, 0] + (1 - beta) * totals[:, 1]
            to_s = (1 - beta) * kl_grad_p(q, q_ratio, totals[:, 1]) if needs[0] else None
            to_t = beta * kl_grad_p(p, p_ratio, totals[:, 0]) if needs[1] else None
        elif beta == 0:
            value, to_s = totals[:, 0], q - p
            to_t = kl_grad_p(p, d, value) if needs[1] else None
        else:
            value, to_t = totals[:, 0], p - q
            to_s = kl_grad_p(q, -d, value) if needs[0] else None
        return value, to_s / t_s if needs[0] else None, to_t / t_t if needs[1] else None

    return parts, finish


def _top_k(z_s, top, settings, sums, first, needs):
    """The same of a top-k teacher: sums has the log-sum-exp of the student, and that of the classes it leaves out."""
    t_s, count = settings.temperature, z_s.shape[1]
    here = (top.indices >= first) & (top.indices < first + count)
    column = torch.where(here, top.indices - first, 0)
    log_q = z_s / t_s - sums[:, :1]
    parts = torch.where(here, log_q.gather(1, column), 0.0)

    def finish(totals):
        real = top.indices >= 0
        kept = torch.where(real, totals, -INF)
        of_q = torch.cat([kept, sums[:, 1:] - sums[:, :1]], 1).detach().requires_grad_(needs[0])
        with torch.set_grad_enabled(needs[0]), recorded():
            log_outcomes, log_p = of_slots(of_q, top, t_s)
            if top.tail == "drop":
                value = truncated(log_outcomes, log_p, settings.beta)
            else:
                value = softmax_kl(log_outcomes, log_p, beta=settings.beta, reduction="none")
        if not needs[0]:
            return value, None, None
        (slope,) = torch.autograd.grad(value, of_q, torch.ones_like(value))
        slope = torch.where(slope.isnan() & ~real_or_rest(real), 0.0, slope)
        total = fixed_sum(slope)[:, None]
        others = (z_s / t_s - sums[:, 1:]).exp() * slope[:, -1:] - log_q.exp() * total
        own = torch.where(here, slope[:, :-1] - log_q.gather(1, column).exp() * total, 0.0)
        kept_here = torch.zeros_like(z_s, dtype=torch.bool).scatter_(1, column, False)
        kept_here = kept_here.long().scatter_add_(1, column, here.long()) > 0
        grad = torch.where(kept_here, 0.0, others).scatter_add_(1, column, own)
        return value.detach(), grad / t_s, None

    return parts, finish


def real_or_rest(real: Tensor) -> Tensor:
    """Slots that are no padding, and the rest."""
    return torch.cat([real, torch.ones_like(real[:, :1])], 1)


def _others(z, top, first):
    """Logits of this process with -inf at the kept classes."""
    here = (top.indices >= first) & (top.indices < first + z.shape[1])
    column = torch.where(here, top.indices - first, 0)
    kept = torch.zeros_like(z, dtype=torch.long).scatter_add_(1, column, here.long()) > 0
    return z.masked_fill(kept, -INF)


def _compute(settings, tensors, others, upstream, needs):
    """-> values of the rows [rows], gradients of the six tensors, None where none is needed."""
    hs, ws, bs, ht, wt, bt = tensors
    top, labels, weight, keep = others
    group, dtype = settings.group, accumulator(hs, ws, ht, wt)
    sizes = _gathered(torch.tensor([len(ws), 0 if wt is None else len(wt)], device=hs.device), group)
    if wt is not None and not torch.equal(sizes[:, 0], sizes[:, 1]):
        raise ValueError(f"teacher_weight must have the student's classes in each process, got {sizes.tolist()}")
    first, classes = int(sizes[: dist.get_rank(group), 0].sum()), int(sizes[:, 0].max())
    heads = [Head(hs, ws, bs, settings.scales[0], settings.softcaps[0], len(ws))]
    if ht is not None:
        heads.append(Head(ht, wt, bt, settings.scales[1], settings.softcaps[1], len(wt)))
    factors = keep.to(dtype) if weight is None else torch.where(keep, weight.to(dtype), 0.0)
    values = factors.new_zeros(len(hs))
    grads = [
        torch.zeros_like(x, dtype=x.dtype if i in (0, 3) else dtype) if need else None
        for i, (x, need) in enumerate(zip(tensors, needs, strict=True))
    ]
    index, step = kept_rows(keep), chunk_rows(settings.chunk, classes, len(heads), dtype)
    of_sides = any(needs[:3]), any(needs[3:])
    for begin in range(0, len(index), step):
        at = index[begin : begin + step]
        z = [head.logits(at, dtype) for head in heads]
        of_top = None if top is None else TopK(*[None if x is None else x[at] for x in top[:3]], *top[3:])
        to_sum = [z[0] / settings.temperature]
        if of_top is None:
            to_sum.append(z[1] / settings.teacher_temperature)
        else:
            to_sum.append(_others(z[0], of_top, first) / settings.temperature)
        sums = _log_sums([*to_sum, *[z[0]] * bool(settings.ce_weight)], group)
        if of_top is None:
            parts, finish = _dense(*z, settings, sums, of_sides)
        else:
            parts, finish = _top_k(z[0], of_top, settings, sums, first, of_sides)
        if settings.ce_weight:
            here = (labels[at] >= first) & (labels[at] < first + len(ws))
            column = torch.where(here, labels[at] - first, 0)[:, None]
            parts = torch.cat([parts, torch.where(here[:, None], z[0].gather(1, column), 0.0)], 1)
        totals = _added(parts, group)
        value, *slopes = finish(totals[:, :-1] if settings.ce_weight else totals)
        value, slopes = settings.kl_weight * value, [x if x is None else settings.kl_weight * x for x in slopes]
        if settings.ce_weight:
            value = value + settings.ce_weight * (sums[:, 2] - totals[:, -1])
            if of_sides[0]:
                q = (z[0] - sums[:, 2:]).exp_()
                q.scatter_add_(1, column, -here[:, None].to(q.dtype))
                slopes[0] = slopes[0] + settings.ce_weight * q
        factor = factors[at]
        values[at] = torch.where(factor == 0, 0.0, value * factor)
        factor = factor if upstream is None else factor * upstream[at].to(dtype)
        for i, (head, slope, x) in enumerate(zip(heads, slopes, z, strict=False)):
            if slope is not None:
                slope = torch.where(factor[:, None] == 0, 0.0, slope * factor[:, None])
                add_gradients(head, head.through(slope, x), at, grads[3 * i : 3 * i + 3])
    return values, [g if g is None else g.to(x.dtype) for g, x in zip(grads, tensors, strict=True)]


class _GroupLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: Settings, others: tuple[Any, ...], count: Tensor | None, *tensors: Tensor
    ) -> Tensor:
        needs = [bool(x) for x in ctx.needs_input_grad[3:]]
        with torch.autocast(tensors[0].device.type, enabled=False):
            values, grads = _compute(settings, tensors, others, None, needs if settings.reduce else [False] * 6)
        ctx.settings, ctx.others, ctx.count, ctx.grads = settings, others, count, grads
        if not settings.reduce:
            ctx.save_for_backward(*tensors)
            return values
        return fixed_sum(values) / (settings.divisor if count is None else count.to(values.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        check.first_derivative_only("linear_kl")
        settings, needs = ctx.settings, [bool(x) for x in ctx.needs_input_grad[3:]]
        if settings.reduce:
            if ctx.grads is None:
                raise RuntimeError(
                    "kdfast.linear_kl keeps gradients, not logits, and a first backward used them: call it again, "
                    "or take reduction='none'"
                )
            grads, ctx.grads = ctx.grads, None
            factor = grad / (settings.divisor if ctx.count is None else ctx.count.to(grad.dtype))
            grads = [g if g is None else g.mul_(factor) for g in grads]
        else:
            with torch.autocast(grad.device.type, enabled=False):
                _, grads = _compute(settings, ctx.saved_tensors, ctx.others, grad, needs)
        for i in (0, 3):  # of hidden states: each process has the sum over its classes
            if grads[i] is not None:
                dist.all_reduce(grads[i], group=settings.group)
        return None, None, None, *grads


def group_linear(
    settings: Settings,
    tensors: tuple[Tensor | None, ...],
    top: TopK | None,
    labels: Tensor | None,
    weight: Tensor | None,
    keep: Tensor,
    count: Tensor | None,
) -> Tensor:
    """:func:`kdfast.ops.linear_kl` of arguments that were checked, as rows; 0-d, or [rows]."""
    return _GroupLinear.apply(settings, (top, labels, weight, keep), count, *tensors)
