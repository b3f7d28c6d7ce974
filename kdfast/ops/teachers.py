"""One student and many teachers: one read of all logits per direction, and no softmax of them kept.

With p_m = softmax(teacher_m / T) and q = softmax(student / T) of a batch of B rows:

    teachers_kl      kl             T^2 sum_m a_m KL(p_m || q)
                     cross_entropy  -T^2 sum_c r log q,  r = mean_m p_m
                     reverse_kl     T^2 KL(q || r)
    aekd             kl with the weights a that make the mean gradient of the student's logits shortest:
                     min a' G a,  sum a = 1,  0 <= a <= slack,  G_mn = v_m . v_n,  v_m = mean_b (q - p_m)

A teacher of weight 0 adds nothing, whatever its logits are.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast._kernels import op
from kdfast._types import Networks
from kdfast.ops import check, shapes
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.blocks import anywhere, by_block
from kdfast.ops.networks import class_labels, matrices, network_count, network_list, regroup
from kdfast.ops.rows import (
    INF,
    Rows,
    batch_size,
    cross_entropy_grad,
    cross_entropy_stats,
    kl_grad_p,
    kl_grad_q,
    kl_rows,
    kl_sum,
    label_column,
    log_softmax,
    near_of,
    scale_rows,
)
from kdfast.ops.saved import save, saved
from kdfast.ops.simplex import simplex_minimum
from kdfast.ops.temperature import temperature_argument, temperature_of

__all__ = ["aekd", "teachers_kl"]

FIXED_BLOCK = 2**17  # elements of a block, over whose rows AE-KD sums
KINDS = ("kl", "cross_entropy", "reverse_kl")


# ---- plain PyTorch: the readable definition --------------------------------------------------------------------------
def divergence(p: Rows, q: Rows, kind: str, temperature: float | Tensor) -> Tensor:
    """sum_c p (log p - log q) of each row, or of -log q alone."""
    ratio, probability = log_ratio(p.log_p, q.log_p, kind), p.log_p.exp()
    return (
        kl_sum(probability, ratio)
        if kind == "cross_entropy"
        else kl_rows(probability, ratio, near_of(p, q, temperature))
    )


def log_ratio(log_p: Tensor, log_q: Tensor, kind: str) -> Tensor:
    """What p weighs in `divergence`: log p - log q, or -log q alone; [rows, cols]."""
    return -log_q if kind == "cross_entropy" else log_p - log_q


def mean_log(logs: Sequence[Tensor]) -> Tensor:
    """log mean_m p_m [rows, cols], finite where every p_m underflows."""
    top = functools.reduce(torch.maximum, logs)
    nothing = top == -INF
    safe = torch.where(nothing, 0.0, top) if anywhere(nothing) else top
    total = sum((log_p - safe).exp_() for log_p in logs)
    count = torch.full((), len(logs), dtype=top.dtype, device=top.device)
    log_r = total.log_().sub_(count.log()).add_(safe)
    return torch.where(nothing, -INF, log_r) if safe is not top else log_r


def teacher_weights(
    weight: Tensor | None, teachers: Sequence[Tensor], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """One weight per teacher [M]; 1 each without any."""
    return torch.ones(len(teachers), dtype=dtype, device=device) if weight is None else weight.to(dtype)


def _loss_and_stats(student, teachers, **_):
    stats = 3 + 3 * len(teachers)
    return shapes.sums((), student, *teachers), shapes.sums((stats, student.shape[0]), student, *teachers)


def _gradient_shapes(grad, student, teachers, need_student, need_teachers, **_):
    student_grad = shapes.gradient(student) if need_student else grad.new_empty(0)
    teacher_grads = teachers[0].new_empty((len(teachers), *student.shape)) if need_teachers else grad.new_empty(0)
    return student_grad, teacher_grads


@op("teachers", _loss_and_stats)
def _teachers_kl(
    student: Tensor,
    teachers: list[Tensor],
    labels: Tensor | None,
    weight: Tensor | None,
    temperatures: Tensor | None,
    kind: str,
    temperature: float,
    scale: float,
    divisor: int,
    ce_scale: float,
    ce_divisor: int,
) -> tuple[Tensor, Tensor]:
    """-> loss, stats: max, sum at T, sum at 1 of the student; maxima, sums, divergences of the teachers.

    Of the reverse kind the first divergence is that of the row, the others are 0.
    """
    dtype = accumulator(student, *teachers)
    t = temperature_of(temperatures, temperature, dtype)
    ce, stats = _statistics(student, teachers, labels, kind, t, dtype)
    values = stats[3 + 2 * len(teachers) :]
    weights = teacher_weights(weight, teachers, dtype, student.device).unbind(0)
    rows = values[0] if kind == "reverse_kl" else sum(map(scale_rows, weights, values))
    return fixed_sum(scale_rows(scale / divisor * (t * t), rows) + scale_rows(ce_scale / ce_divisor, ce)), stats


def _statistics(student, teachers, labels, kind, temperature, dtype, visit=None):
    """-> cross-entropy of each row, stats of teachers_kl; `visit` sees the rows of the student and of the teachers."""
    column, _, wrong = [None] * 3 if labels is None else label_column(labels, student.shape[1])

    def block(student, column, wrong, *teachers):
        q, *networks = (Rows.of(x, temperature, dtype) for x in (student, *teachers))
        zero = torch.zeros_like(q.top)
        if visit is not None:
            visit(q, networks)
        if kind == "reverse_kl":
            log_r = mean_log([p.log_p for p in networks])
            rows = kl_rows(q.log_p.exp(), q.log_p - log_r, lambda x: (log_r[x].exp(), q.log_p[x] - log_r[x]))
            values = [rows, *[zero] * (len(teachers) - 1)]
        else:
            values = [divergence(p, q, kind, temperature) for p in networks]
        sum_1, ce = (zero, zero) if column is None else cross_entropy_stats(student, column, wrong, dtype)
        sides = [*(p.top for p in networks), *(p.total for p in networks)]
        return ce, torch.stack([*q.side, sum_1, *sides, *values], 1)

    ce, stats = by_block(block, student, column, wrong, *teachers, elements=None if visit is None else FIXED_BLOCK)
    return ce, stats.t().contiguous()


@op("teachers", _gradient_shapes)
def _teachers_kl_backward(
    grad: Tensor,
    student: Tensor,
    teachers: list[Tensor],
    labels: Tensor | None,
    weight: Tensor | None,
    temperatures: Tensor | None,
    stats: Tensor,
    kind: str,
    temperature: float,
    scale: float,
    divisor: int,
    ce_scale: float,
    ce_divisor: int,
    need_student: bool,
    need_teachers: bool,
) -> tuple[Tensor, Tensor]:
    """-> gradients of the student and, [teachers, rows, cols], of the teachers; empty where not needed."""
    dtype, count = stats.dtype, len(teachers)
    t = temperature_of(temperatures, temperature, dtype)
    grad = grad.to(dtype)
    row, ce_row = grad * (scale / divisor * t), grad * (ce_scale / ce_divisor)
    weights = teacher_weights(weight, teachers, dtype, grad.device).unbind(0)
    column = None if labels is None else labels.clamp(0, student.shape[1] - 1)[:, None]

    def block(student, column, stats, *teachers):
        (top, total, sum_1), *others = stats.t().split([3, count, count, count])
        log_q = log_softmax(student, top, total, t)
        student_grad, teacher_grads = grad.new_empty(0), []
        if kind == "reverse_kl":
            if need_student:
                log_r = mean_log([log_softmax(x, *side, t) for x, *side in zip(teachers, *others[:2], strict=True)])
                student_grad = scale_rows(row, kl_grad_p(log_q.exp(), log_q - log_r, others[2][0]))
        else:
            q = log_q.exp()
            for x, a, top_t, sum_t, value in zip(teachers, weights, *others, strict=True):
                p = log_softmax(x, top_t, sum_t, t)
                if need_teachers:
                    ratio, p = log_ratio(p, log_q, kind), p.exp_()
                    teacher_grads.append(scale_rows(row * a, kl_grad_p(p, ratio, value)))
                else:
                    p = p.exp_()
                if need_student:
                    part = scale_rows(row * a, kl_grad_q(p, q, sum_t))
                    student_grad = student_grad.add_(part) if student_grad.numel() else part
        if need_student and labels is not None:
            student_grad += scale_rows(ce_row, cross_entropy_grad(student, top, sum_1, column))
        return *teacher_grads, student_grad.to(student.dtype)

    out = teachers[0].new_empty((count, *student.shape)) if need_teachers else grad.new_empty(0)
    student_grad = by_block(block, student, column, stats.t(), *teachers, into=out.unbind(0))[-1]
    return student_grad.contiguous(), out


def aekd_weights(gram: Tensor, slack: float, normalize: bool) -> Tensor:
    """AE-KD's weights (M,) from G (M, M) of any magnitude, in float64."""
    gram = gram.double()
    largest = gram.diagonal().amax()
    scaled = torch.where(largest > 0, gram / largest, 0.0)
    if not normalize:
        return simplex_minimum(scaled, torch.zeros_like(gram[0]), slack)
    norm = scaled.diagonal().sqrt().clamp(min=1e-12)  # of a teacher whose mean gradient is 0: all weight is its
    a = simplex_minimum(scaled / norm[:, None] / norm, torch.zeros_like(norm), slack) / norm
    return a / a.sum()


def _aekd_shapes(student, teachers, **_):
    return *_loss_and_stats(student, teachers), shapes.sums(len(teachers), student, *teachers)


@op("teachers", _aekd_shapes)
def _aekd(
    student: Tensor,
    teachers: list[Tensor],
    temperatures: Tensor | None,
    temperature: float,
    scale: float,
    divisor: int,
    slack: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss, stats as of teachers_kl, weights (M,)."""
    dtype = accumulator(student, *teachers)
    t = temperature_of(temperatures, temperature, dtype)
    gradients = torch.zeros(len(teachers), student.shape[1], dtype=torch.float64, device=student.device)

    def visit(q, networks):
        for gradient, p in zip(gradients, networks, strict=True):
            gradient += (q.log_p.exp() - p.log_p.exp()).double().sum(0)

    _, stats = _statistics(student, teachers, None, "kl", t, dtype, visit)
    gram = fixed_sum(gradients[:, None] * gradients)
    weights = aekd_weights(gram, slack, normalize).to(dtype)
    rows = sum(map(scale_rows, weights.unbind(0), stats[3 + 2 * len(teachers) :]))
    return fixed_sum(scale_rows(scale / divisor * (t * t), rows)), stats, weights


# ---- public functions ------------------------------------------------------------------------------------------------
# Written out: their tensors come as lists, and through `differentiable.py` a small call would take 4 % longer.
# forward takes *args: without gradients, dynamo tells from the number of parameters whether there is a ctx.
class _TeachersKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        student, labels, weight, temperatures, settings, *tensors = args
        loss, stats = _teachers_kl(student, matrices(tensors), labels, weight, temperatures, *settings)
        save(ctx, student, labels, weight, temperatures, stats, *tensors)
        ctx.settings = settings
        return loss

    @staticmethod
    def backward(ctx, grad):
        check.first_derivative_only("teachers_kl")
        student, labels, weight, temperatures, stats, *tensors = saved(ctx)
        need_student, needed = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        networks = matrices(tensors)
        student_grad, grads = _teachers_kl_backward(
            grad, student, networks, labels, weight, temperatures, stats, *ctx.settings, need_student, any(needed)
        )
        return student_grad if need_student else None, *(None,) * 4, *regroup(grads, tensors, needed)


class _AEKD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        student, temperatures, temperature, divisor, slack, normalize, *tensors = args
        loss, stats, weights = _aekd(
            student, matrices(tensors), temperatures, temperature, 1.0, divisor, slack, normalize
        )
        save(ctx, student, weights, temperatures, stats, *tensors)
        ctx.constants = ("kl", temperature, 1.0, divisor, 0.0, 1)
        ctx.mark_non_differentiable(weights)
        return loss, weights

    @staticmethod
    def backward(ctx, grad, _):
        check.first_derivative_only("aekd")
        student, weights, temperatures, stats, *tensors = saved(ctx)
        student_grad, _ = _teachers_kl_backward(
            grad, student, matrices(tensors), None, weights, temperatures, stats, *ctx.constants, True, False
        )
        return student_grad, *(None,) * 5, *(None for _ in tensors)


def teachers_kl(
    student: Tensor,
    teachers: Networks,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    *,
    kind: str = "kl",
    weight: Tensor | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 1.0,
    over_classes: bool = False,
) -> Tensor:
    """``1/B sum_b [kl_weight D + ce_weight CE(student, labels)]`` with D of the kinds in the module's docstring.

    Args:
        student: logits (B, C). teachers: a list of (B, C) logits, one (M, B, C), or a list of both.
        labels: (B,) integer classes for the cross-entropy (none without); see :func:`mixed_logits_kl`.
        kind: "kl", with `weight` a_m (M,) or the plain sum; "cross_entropy" and "reverse_kl" to the mean probability.
        over_classes: divide the divergence by the number of classes, too.

    Returns: 0-d, in nats. Gradients flow to student and teachers; not to weight, which must not ask for one, nor to
    the teachers of "reverse_kl", which must not either.
    """
    check.logits("student", student)
    tensors = network_list("teachers", teachers, student)
    return teachers_loss(student, tensors, labels, temperature, kind, weight, kl_weight, ce_weight, over_classes)


def teachers_loss(
    student: Tensor,
    tensors: Sequence[Tensor],
    labels: Tensor | None,
    temperature: float,
    kind: str = "kl",
    weight: Tensor | None = None,
    kl_weight: float = 1.0,
    ce_weight: float = 1.0,
    over_classes: bool = False,
) -> Tensor:
    """:func:`teachers_kl` of a student and teachers that were checked."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    count = network_count(tensors)
    if weight is not None:
        if kind != "kl":
            raise ValueError(f"weight belongs to kind 'kl', got one with kind {kind!r}")
        check.shaped("weight", weight, (count,), student, meaning=", one for each teacher")
        if weight.requires_grad:
            raise ValueError("weight must not require a gradient: detach it")
    if kind == "reverse_kl" and any(x.requires_grad for x in tensors):
        raise ValueError("teachers must not require a gradient with kind 'reverse_kl': detach them")
    labels = class_labels(labels, student)
    check.positive("temperature", temperature)
    check.number("kl_weight", kl_weight)
    check.number("ce_weight", ce_weight)
    rows = batch_size(student)
    divisor = rows * (count if kind == "cross_entropy" else 1) * (student.shape[1] if over_classes else 1)
    ce_scale = 0.0 if labels is None else float(ce_weight)
    temperatures, temperature = temperature_argument(temperature, student)
    settings = (kind, temperature, float(kl_weight), divisor, ce_scale, rows)
    return _TeachersKL.apply(student, labels, weight, temperatures, settings, *tensors)


def aekd(
    student: Tensor, teachers: Networks, temperature: float = 4.0, *, slack: float = 0.6, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """``T^2 / B sum_b sum_m a_m KL(p_m || q)`` with AE-KD's weights a, the exact optimum of the module's docstring.

    Args:
        student: logits (B, C). teachers: a list of (B, C) logits, one (M, B, C), or a list of both.
        slack: the most that a weight may be; up to 1 / M it leaves the plain average.
        normalize: solve with v_m of length 1, then divide by the lengths and make the sum 1 again.

    Returns: the loss, 0-d, with a gradient to the student alone, and the weights (M,). The host does not wait.
    """
    check.logits("student", student)
    tensors = network_list("teachers", teachers, student)
    check.positive("temperature", temperature)
    check.number("slack", slack, 0, 1)
    constants = (*temperature_argument(temperature, student), batch_size(student), float(slack), bool(normalize))
    return _AEKD.apply(student, *constants, *(x.detach() if x.requires_grad else x for x in tensors))
