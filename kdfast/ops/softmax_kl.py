"""Rows of logits compared as distributions: softmax-KL and its relatives.

With p = softmax(teacher / T) and q = softmax(student / T) of one row:

    softmax_kl        T^2 D_beta(p, q), D_0 = KL(p || q), D_1 = KL(q || p), between them beta-Jensen-Shannon
    softmax_kl_topk   T^2 KL(p || q) of k classes and of the others as one, from k of the teacher's logits
    cross_entropy_kl  kl_weight T^2 KL(p || q) + ce_weight CE(student, labels), one read of the student
    dkd               T^2 [alpha KL of (target, rest) + beta KL among the non-target classes]

Each op gives the reduced loss and per-row statistics [stats, rows] in the accumulation type (float64 if an input is
float64, else float32); the backward reads the logits once more and needs nothing else of size rows x classes.
A row's softmax is kept as its maximum and sum = sum_j exp((z_j - max) / T), so large offsets cost no digits.
A row that is -inf everywhere is an empty distribution, sum = 0: all its probabilities are 0.
"""

import math
from typing import TypeAlias

import torch
from torch import Tensor

from kdfast._kernels import op
from kdfast.ops import check, shapes
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.blocks import by_block
from kdfast.ops.differentiable import statistics_kept
from kdfast.ops.divergence import divergence, kl_kind
from kdfast.ops.elementwise import sigmoid
from kdfast.ops.reduction import Reduction, rows_of
from kdfast.ops.rows import (
    INF,
    Rows,
    kl_grad_p,
    kl_grad_q,
    kl_rows,
    kl_sum,
    kl_term,
    label_column,
    log_ratio_of,
    log_softmax,
    maxima,
    near_of,
    row_stats,
    scale_rows,
    softmax,
    sums,
)
from kdfast.ops.temperature import temperature_argument, temperature_of
from kdfast.ops.top_k import TAILS, TopK, of_outcomes, topk_overlap, truncated

__all__ = ["TopK", "cross_entropy", "cross_entropy_kl", "dkd", "softmax_kl", "topk_overlap"]

LEAST_MASS = -1e-3  # of a row of target probabilities: below, they are something else


Teacher: TypeAlias = Tensor | TopK | tuple[Tensor, ...]  # logits (..., C), or the largest of them


# ---- plain PyTorch: the readable definition --------------------------------------------------------------------------
def mixture_ratios(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(p / m), log(q / m) with m = beta p + (1 - beta) q: exactly 0 where p = q, finite where p or q underflows."""
    return ratios_to_mixture(log_p - log_q, beta)


def ratios_to_mixture(d: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The same from d = log p - log q."""
    share = 1 - beta if beta == 0.5 else 0.5 + (0.5 - beta) * d.sign()  # of the smaller one
    log_mix = (share * torch.expm1(-d.abs())).log1p_()
    # No less than the share of the larger one, which rounding may have made 0.
    log_mix = log_mix.clamp(min=math.log(min(beta, 1 - beta)))
    return d.clamp(max=0) - log_mix, (-d).clamp(max=0) - log_mix


def _gradients(row, *sides):
    """row * gradient of each (gradient, logits), in the dtype of the logits; an empty tensor for None."""
    return tuple(row.new_empty(0) if g is None else scale_rows(row, g).to(x.dtype).contiguous() for g, x in sides)


def _reduced_and_stats(stats, reduce, *inputs):
    rows = inputs[0].shape[:1]
    return shapes.sums(() if reduce else rows, *inputs), shapes.sums((stats, *rows), *inputs)


def _gradient_shapes(grad, student, teacher, need_student, need_teacher, **_):
    return shapes.gradients(grad, (student, need_student), (teacher, need_teacher))


@op("softmax_kl", lambda student, teacher, reduce, **_: _reduced_and_stats(6, reduce, student, teacher))
def _softmax_kl(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    beta: float,
    divisor: int,
    reduce: bool,
) -> tuple[Tensor, Tensor]:
    """-> loss, stats: max, sum, KL of the student's side; the same of the teacher's."""
    dtype = accumulator(student, teacher)
    t = temperature_of(temperatures, temperature, dtype)

    def block(student, teacher, weight):
        q, p = Rows.of(student, t, dtype), Rows.of(teacher, t, dtype)
        kl_p = kl_q = torch.zeros_like(q.top)
        if beta == 0:
            kl_p = rows = kl_rows(p.log_p.exp(), p.log_p - q.log_p, near_of(p, q, t))
        elif beta == 1:
            kl_q = rows = kl_rows(q.log_p.exp(), q.log_p - p.log_p, near_of(q, p, t))
        else:
            kl_p, kl_q = _mixture_kl(p, q, beta, t)
            rows = beta * kl_p + (1 - beta) * kl_q
        if weight is not None:
            rows = torch.where(weight == 0, 0.0, weight.to(dtype) * rows)
        return (t * t) / divisor * rows, torch.stack([*q.side, kl_q, *p.side, kl_p], 1)

    return _reduced(*by_block(block, student, teacher, weight), reduce)


def _mixture_kl(p, q, beta, temperature):
    """-> KL(p || m), KL(q || m) of each row."""
    (p_ratio, q_ratio), both = mixture_ratios(p.log_p, q.log_p, beta), (p.total > 0) & (q.total > 0)

    def near(rows, side):
        here, there = p.at(rows), q.at(rows)
        ratios = ratios_to_mixture(log_ratio_of(here, there, temperature), beta)
        return beta * here.log_p.exp() + (1 - beta) * there.log_p.exp(), ratios[side]

    return (
        kl_rows(p.log_p.exp(), p_ratio, lambda rows: near(rows, 0), both),
        kl_rows(q.log_p.exp(), q_ratio, lambda rows: near(rows, 1), both),
    )


def _reduced(rows, stats, reduce=True):
    """-> what an op gives of the losses [rows] and the statistics [rows, stats]."""
    return fixed_sum(rows) if reduce else rows, stats.t().contiguous()


@op("softmax_kl", _gradient_shapes)
def _softmax_kl_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    temperatures: Tensor | None,
    stats: Tensor,
    temperature: float,
    beta: float,
    divisor: int,
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor]:
    """-> gradients of student and teacher; an empty tensor for one that is not needed."""
    t = temperature_of(temperatures, temperature, stats.dtype)
    row = (grad.to(stats.dtype) * (t / divisor)).expand(student.shape[0])
    if weight is not None:
        row = row * weight.to(stats.dtype)

    def block(student, teacher, row, stats):
        top_s, sum_s, kl_q, top_t, sum_t, kl_p = stats.unbind(1)
        log_q, log_p = log_softmax(student, top_s, sum_s, t), log_softmax(teacher, top_t, sum_t, t)
        student_grad = teacher_grad = None
        if 0 < beta < 1:
            p_ratio, q_ratio = mixture_ratios(log_p, log_q, beta)
            if need_student:
                student_grad = kl_grad_p(log_q.exp_(), q_ratio, kl_q).mul_(1 - beta)
            if need_teacher:
                teacher_grad = kl_grad_p(log_p.exp_(), p_ratio, kl_p).mul_(beta)
        elif beta == 0:
            p = log_p.exp()
            if need_teacher:
                teacher_grad = kl_grad_p(p, log_p - log_q, kl_p)
            if need_student:
                student_grad = kl_grad_q(p, log_q.exp_(), sum_t)
        else:
            q = log_q.exp()
            if need_student:
                student_grad = kl_grad_p(q, log_q - log_p, kl_q)
            if need_teacher:
                teacher_grad = kl_grad_q(q, log_p.exp_(), sum_s)
        return _gradients(row, (student_grad, student), (teacher_grad, teacher))

    return by_block(block, student, teacher, row, stats.t())


def _kept_classes(indices, classes):
    """-> classes clamped into range, rows where one is no class or comes twice (an error on CPU, NaN elsewhere)."""
    wrong = check.unusable_rows(indices, classes)
    if indices.device.type == "cpu" and wrong.any():
        check.distinct_classes(indices, classes)
    return indices.clamp(0, classes - 1), wrong


def _outcomes(student, values, column, rest, top, top_r, sum_r, temperature):
    """The kept classes and the others as one more: logits [rows, k + 1], the student's less its maximum.

    top, and top_r and sum_r of the classes that are not kept: the student's.
    """
    other = (top_r - top) + temperature * sum_r.log()
    rest = torch.full_like(top, -INF) if rest is None else rest.to(top.dtype)
    of_student = torch.cat([student.gather(1, column).to(top.dtype) - top[:, None], other[:, None]], 1)
    return of_student, torch.cat([values.to(top.dtype), rest[:, None]], 1)


@op("softmax_kl", lambda student, values, reduce, **_: _reduced_and_stats(8, reduce, student, values))
def _softmax_kl_topk(
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    rest: Tensor | None,
    weight: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    scale: float,
    divisor: int,
    reduce: bool,
) -> tuple[Tensor, Tensor]:
    """-> loss, stats: those of softmax_kl, and max, sum of the student's other classes."""
    dtype = accumulator(student, values)
    t = temperature_of(temperatures, temperature, dtype)
    column, wrong = _kept_classes(indices, student.shape[1])

    def block(student, values, column, wrong, rest, weight):
        top_s, others = maxima(student, dtype), student.to(dtype).scatter(1, column, -INF)
        top_r, sum_r = row_stats(others, t, dtype)
        of_student, of_teacher = _outcomes(student, values, column, rest, top_s, top_r, sum_r, t)
        sum_s = fixed_sum((of_student / t).exp())
        q = Rows(of_student, zero := torch.zeros_like(top_s), sum_s, log_softmax(of_student, zero, sum_s, t))
        p = Rows.of(of_teacher, t, dtype)
        kl = kl_rows(p.log_p.exp(), p.log_p - q.log_p, near_of(p, q, t))
        kl = torch.where(wrong, float("nan"), kl)
        rows = kl if weight is None else torch.where(weight == 0, 0.0, weight.to(dtype) * kl)
        return scale / divisor * (t * t) * rows, torch.stack([top_s, sum_s, zero, *p.side, kl, top_r, sum_r], 1)

    return _reduced(*by_block(block, student, values, column, wrong, rest, weight), reduce)


@op("softmax_kl", lambda student, **_: shapes.gradient(student))
def _softmax_kl_topk_backward(
    grad: Tensor,
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    rest: Tensor | None,
    weight: Tensor | None,
    temperatures: Tensor | None,
    stats: Tensor,
    temperature: float,
    scale: float,
    divisor: int,
) -> Tensor:
    """-> gradient of the student."""
    t = temperature_of(temperatures, temperature, stats.dtype)
    column = indices.clamp(0, student.shape[1] - 1)
    row = (grad.to(stats.dtype) * (scale / divisor * t)).expand(student.shape[0])
    if weight is not None:
        row = row * weight.to(stats.dtype)
    kl = stats[5]
    row = torch.where(kl.isnan() & (row != 0), kl, row)

    def block(student, values, column, rest, row, stats):
        top_s, sum_s, _, top_t, sum_t, _, top_r, sum_r = stats.unbind(1)
        of_student, of_teacher = _outcomes(student, values, column, rest, top_s, top_r, sum_r, t)
        q = softmax(of_student, torch.zeros_like(top_s), sum_s, t)
        of_outcomes = kl_grad_q(softmax(of_teacher, top_t, sum_t, t), q, sum_t)
        # What the other classes get together is shared as the student shares them.
        others = softmax(student, top_r, sum_r, t).mul_(of_outcomes[:, -1:])
        out = others.scatter_(1, column, of_outcomes[:, :-1])
        return _gradients(row, (out, student))

    return by_block(block, student, values, column, rest, row, stats.t())[0]


def _target_rows(student, labels, smoothing, ignore_index, dtype):
    """-> targets before smoothing, classes [rows, 1] or probabilities; their mass; rows kept; rows of no target."""
    if not labels.is_floating_point():
        column, kept, wrong = label_column(labels, student.shape[1], ignore_index)
        return column, torch.ones_like(kept, dtype=dtype), kept, wrong
    mass = fixed_sum(labels.to(dtype))
    wrong = mass < LEAST_MASS
    if labels.device.type == "cpu" and wrong.any():
        check.refuse_mass_below_0(mass)
    return labels, (1 - smoothing) * mass + smoothing, torch.ones_like(wrong), wrong


def _smoothed(labels, smoothing, dtype):
    """Probabilities (1 - smoothing) labels + smoothing / C."""
    target = labels.to(dtype)
    return target if smoothing == 0 else (1 - smoothing) * target + smoothing / labels.shape[1]


def _cross_entropy_rows(student, top, labels, smoothing):
    """-> sum at temperature 1, cross-entropy of each row."""
    dense = labels.is_floating_point()
    if not dense and smoothing == 0:
        sum_1 = sums(student, top, 1.0)
        return sum_1, -log_softmax(student.gather(1, labels), top, sum_1, 1.0)[:, 0]
    q = Rows.of(student, 1.0, top.dtype, top)
    if dense:
        return q.total, -kl_sum(_smoothed(labels, smoothing, top.dtype), q.log_p)
    ce = -smoothing / student.shape[1] * fixed_sum(q.log_p)
    return q.total, ce if smoothing == 1 else ce - (1 - smoothing) * q.log_p.gather(1, labels)[:, 0]


def _cross_entropy_slope(q, labels, mass, smoothing):
    """mass q - target [rows, cols], in the memory of q."""
    if labels.is_floating_point():
        return q.mul_(mass[:, None]).sub_(_smoothed(labels, smoothing, q.dtype))
    if smoothing:
        q -= smoothing / q.shape[1]
    return q.scatter_add_(1, labels, q.new_full((), smoothing - 1).expand_as(labels))


def _two_weights(weight):
    return (weight, weight) if weight is None or weight.dim() == 1 else (weight[:, 0], weight[:, 1])


@op("softmax_kl", lambda student, teacher, reduce, **_: _reduced_and_stats(8, reduce, student, teacher))
def _cross_entropy_kl(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    weight: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    kl_scale: float,
    kl_divisor: int,
    ce_scale: float,
    ce_divisor: int,
    smoothing: float,
    ignore_index: int,
    ce_mean: bool,
    reduce: bool,
) -> tuple[Tensor, Tensor]:
    """-> loss, stats: student max, sum at T, sum at 1, weight of the row's CE, target mass; teacher max, sum; KL.

    weight: [rows] of both terms, or [rows, 2] of the KL and the cross-entropy.
    """
    weight, weight_ce = _two_weights(weight)
    dtype = accumulator(student, teacher)
    t = temperature_of(temperatures, temperature, dtype)
    labels, mass, kept, wrong = _target_rows(student, labels, smoothing, ignore_index, dtype)
    kept = kept if weight is None else kept & (weight != 0)
    ce_weight = ce_scale * kept.to(dtype) / (kept.sum().clamp(min=1) if ce_mean else ce_divisor)
    ce_weight = torch.where(wrong, float("nan"), ce_weight)
    if weight is not None:
        ce_weight = scale_rows(weight_ce.to(dtype), ce_weight)

    def block(student, labels, mass, ce_weight, teacher, weight):
        top = maxima(student, dtype)
        sum_1, ce = _cross_entropy_rows(student, top, labels, smoothing)
        rows = scale_rows(ce_weight, ce)
        sum_s = top_t = sum_t = kl = torch.zeros_like(top)
        if teacher is not None:
            q, p = Rows.of(student, t, dtype, top), Rows.of(teacher, t, dtype)
            kl = kl_rows(p.log_p.exp(), p.log_p - q.log_p, near_of(p, q, t))
            kl_value = kl_scale / kl_divisor * (t * t) * kl if kl_scale else torch.zeros_like(kl)
            rows = rows + (kl_value if weight is None else scale_rows(weight.to(dtype), kl_value))
            sum_s, (top_t, sum_t) = q.total, p.side
        return rows, torch.stack([top, sum_s, sum_1, ce_weight, mass, top_t, sum_t, kl], 1)

    return _reduced(*by_block(block, student, labels, mass, ce_weight, teacher, weight), reduce)


@op("softmax_kl", _gradient_shapes)
def _cross_entropy_kl_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    weight: Tensor | None,
    temperatures: Tensor | None,
    stats: Tensor,
    temperature: float,
    kl_scale: float,
    kl_divisor: int,
    smoothing: float,
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor]:
    """-> gradients of student and teacher; an empty tensor for one that is not needed."""
    t, (weight, _) = temperature_of(temperatures, temperature, stats.dtype), _two_weights(weight)
    row = grad.to(stats.dtype).expand(student.shape[0])
    labels = labels if labels.is_floating_point() else labels.clamp(0, student.shape[1] - 1)[:, None]
    kl_row = row * (kl_scale / kl_divisor * t)
    kl_row = kl_row if weight is None else kl_row * weight.to(stats.dtype)

    def block(student, labels, row, kl_row, stats, teacher):
        top_s, sum_s, sum_1, ce_weight, mass, top_t, sum_t, kl = stats.unbind(1)
        student_grad = teacher_grad = row.new_empty(0)
        if need_student:
            slope = _cross_entropy_slope(softmax(student, top_s, sum_1, 1.0), labels, mass, smoothing)
            student_grad = scale_rows(row * ce_weight, slope)
        if teacher is not None:
            log_q, log_p = log_softmax(student, top_s, sum_s, t), log_softmax(teacher, top_t, sum_t, t)
            p = log_p.exp()
            if need_teacher:
                teacher_grad = scale_rows(kl_row, kl_grad_p(p, log_p - log_q, kl))
            if need_student:
                student_grad += scale_rows(kl_row, kl_grad_q(p, log_q.exp_(), sum_t))
        of_teacher = teacher_grad if teacher is None else teacher_grad.to(teacher.dtype).contiguous()
        return student_grad.to(student.dtype).contiguous(), of_teacher

    return by_block(block, student, labels, row, kl_row, stats.t(), teacher)


def _split_target(logits, column, temperature, dtype):
    """-> the non-target classes as rows, -inf at the target; the log-odds of the target against them."""
    z = logits.to(dtype)
    rest = Rows.of(z.scatter(1, column, -INF), temperature, dtype)
    odds = (z.gather(1, column)[:, 0] - rest.top) / temperature - rest.total.log()
    return rest._replace(logits=logits), torch.where(rest.total == 0, INF, odds)


def _non_target_ratio(log_p, log_q, column):
    """log p - log q, 0 at the target."""
    return (log_p - log_q).scatter_(1, column, 0.0)


def _target_kl(odds_p, odds_q, gap):
    """KL of (target, rest) from log-odds; `gap`, of the same meaning as their difference, counts where it is small."""
    log_sigmoid = torch.nn.functional.logsigmoid
    p, rest = sigmoid(odds_p), sigmoid(-odds_p)
    far = kl_term(p, log_sigmoid(odds_p) - log_sigmoid(odds_q))
    far = far + kl_term(rest, log_sigmoid(-odds_p) - log_sigmoid(-odds_q))
    ratios = torch.log1p(rest * torch.expm1(gap)), torch.log1p(p * torch.expm1(-gap))
    terms = [x * (torch.expm1(-d) + d).clamp(min=0) for x, d in zip((p, rest), ratios, strict=True)]
    return torch.where(gap.abs() <= 0.25, sum(terms), far)


@op("softmax_kl", lambda student, teacher, reduce, **_: _reduced_and_stats(8, reduce, student, teacher))
def _dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    alpha: float,
    beta: float,
    divisor: int,
    reduce: bool,
) -> tuple[Tensor, Tensor]:
    """-> loss, stats: max, sum of the non-target classes, log-odds of the target, for both sides; KL of the rest, KL of

    the target against the rest.
    """
    dtype = accumulator(student, teacher)
    t = temperature_of(temperatures, temperature, dtype)
    column, _, wrong = label_column(labels, student.shape[1])

    def block(student, teacher, column, wrong, weight):
        q, odds_s = _split_target(student, column, t, dtype)
        p, odds_t = _split_target(teacher, column, t, dtype)
        targets = (x._replace(logits=x.logits.gather(1, column)) for x in (p, q))
        target_kl = _target_kl(odds_t, odds_s, log_ratio_of(*targets, t)[:, 0])
        rest_kl = kl_rows(p.log_p.exp(), _non_target_ratio(p.log_p, q.log_p, column), near_of(p, q, t))
        rows = (alpha * target_kl if alpha else 0.0) + (beta * rest_kl if beta else torch.zeros_like(rest_kl))
        odds_s, rows = (torch.where(wrong, float("nan"), x) for x in (odds_s, rows * (t * t) / divisor))
        rows = rows if weight is None else scale_rows(weight.to(dtype), rows)
        return rows, torch.stack([*q.side, odds_s, *p.side, odds_t, rest_kl, target_kl], 1)

    return _reduced(*by_block(block, student, teacher, column, wrong, weight), reduce)


@op("softmax_kl", _gradient_shapes)
def _dkd_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    temperatures: Tensor | None,
    stats: Tensor,
    temperature: float,
    alpha: float,
    beta: float,
    divisor: int,
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor]:
    """-> gradients of student and teacher; an empty tensor for one that is not needed."""
    t = temperature_of(temperatures, temperature, stats.dtype)
    column = labels.clamp(0, student.shape[1] - 1)[:, None]
    row = (grad.to(stats.dtype) * t / divisor).expand(student.shape[0])
    row = row if weight is None else row * weight.to(stats.dtype)

    def block(student, teacher, column, row, stats):
        top_s, sum_s, odds_s, top_t, sum_t, odds_t, rest_kl, _ = stats.unbind(1)
        log_q = log_softmax(student, top_s, sum_s, t).scatter_(1, column, -INF)
        log_p = log_softmax(teacher, top_t, sum_t, t).scatter_(1, column, -INF)
        p, q, student_grad, teacher_grad = log_p.exp(), log_q.exp(), None, None
        if need_teacher:
            spread = sigmoid(odds_t) * sigmoid(-odds_t)
            slope = torch.where((spread != 0) & ~odds_s.isinf(), alpha * spread * (odds_t - odds_s), 0.0)
            slope = slope if alpha else torch.zeros_like(slope)
            teacher_grad = -slope[:, None] * p if alpha else torch.zeros_like(p)
            if beta:
                teacher_grad += kl_grad_p(p, _non_target_ratio(log_p, log_q, column), rest_kl).mul_(beta)
            teacher_grad = teacher_grad.scatter_(1, column, slope[:, None])
        if need_student:
            slope = alpha * (sigmoid(odds_s) - sigmoid(odds_t)) if alpha else torch.zeros_like(odds_s)
            student_grad = -slope[:, None] * q if alpha else torch.zeros_like(q)
            if beta:
                student_grad += kl_grad_q(p, q, sum_t).mul_(beta)
            student_grad = student_grad.scatter_(1, column, slope[:, None])
        return _gradients(row, (student_grad, student), (teacher_grad, teacher))

    return by_block(block, student, teacher, column, row, stats.t())


# ---- public functions ------------------------------------------------------------------------------------------------
_softmax_kl_function = statistics_kept(_softmax_kl, _softmax_kl_backward)
_softmax_kl_topk_function = statistics_kept(_softmax_kl_topk, _softmax_kl_topk_backward, "softmax_kl")
_cross_entropy_kl_function = statistics_kept(_cross_entropy_kl, _cross_entropy_kl_backward)
_dkd_function = statistics_kept(_dkd, _dkd_backward)


def softmax_kl(
    student: Tensor,
    teacher: Teacher,
    temperature: float | Tensor = 1.0,
    *,
    beta: float = 0.0,
    teacher_temperature: float | Tensor | None = None,
    standardize: bool = False,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """``T^2 D_beta`` of teacher p = softmax(teacher / T) and student q = softmax(student / T), row by row.

    ``beta=0``: KL(p || q), Hinton's distillation. ``beta=1``: KL(q || p). Between: the beta-Jensen-Shannon divergence
    ``beta KL(p || m) + (1 - beta) KL(q || m)``, ``m = beta p + (1 - beta) q``. All in nats.

    A :class:`TopK` (or a tuple ``(values, indices[, rest[, temperature]])``) as the teacher, with k of the C classes
    in K: KL of k + 1 outcomes, the classes of K and all others as one,

        ``T^2 [sum_{i in K} p_i log(p_i / q_i) + p_r log(p_r / q_r)]``,
        p = softmax((values, rest) / T),  q_i = softmax(student / T)_i,  q_r = sum of q_j over j not in K.

    For k = C that is KL(p || q). For k < C it is at most the KL of the whole rows, by what the two networks differ
    *among* the other classes: those are pushed up or down together (``T (q_j - p_r q_j / q_r)``), the kept ones by
    ``T (q_i - p_i)``. Without `rest`, p_r = 0: as a teacher that is -inf at every other class. `rest` belongs to one
    temperature, and another is refused; without it every temperature is defined. No (B, C) teacher is formed. For
    softmaxes of the kept classes alone, on both sides: ``softmax_kl(student.gather(1, indices), values, T)``.

    Args:
        student, teacher: logits (..., C), float32, float64, float16 or bfloat16, any strides; dtypes may differ. Every
            leading index is a row.
        temperature: T > 0: a number, a 0-d tensor, or a tensor with one for each row. A tensor that requires a gradient
            gets it, through T^2 too. A number below 0 in it is an error on CPU, and a NaN row on CUDA.
        beta: from 0 to 1.
        teacher_temperature: another T for the teacher; T^2 stays the student's.
        standardize: both sides become (z - mean) / (1e-7 + std) of their row first, std with C - 1; the gradient flows
            through mean and std. A constant row becomes zeros.
        mask: (...) bool. A row where it is False adds nothing, gets a gradient of 0, is not read (it may hold NaN) and
            is not counted. If none is left, the loss is 0 with a graph.
        weight: (...) factors of the rows, without gradient; they do not change the count. A row of weight 0 counts as 0
            even where it is infinite.
        divisor: a number or a 0-d tensor in place of the count, for gradient accumulation; not with "none".
        reduction: "batchmean" and "mean" divide the sum by the rows that count (not by the weights, not by C); "sum";
            "none" (...).

    Returns: 0-d, or (...) for "none", in the accumulation type: float64 if student or teacher (its values) is float64,
    else float32.

    Gradients flow to student and teacher (to a top-k teacher none); there is no second derivative (RuntimeError). A
    class that is -inf in both, or where the weighting probability is 0, adds 0; elsewhere the row is +inf with a finite
    gradient.

    Raises: TypeError, ValueError naming the argument. An index that is no class, or comes twice in a row, is an error
    on CPU; on CUDA it makes the row NaN (KDFAST_CHECK=1 checks first).
    """
    if isinstance(teacher, tuple):
        if teacher_temperature is not None or standardize:
            raise ValueError("a top-k teacher takes neither teacher_temperature nor standardize")
        return _softmax_kl_topk_loss(student, teacher, temperature, beta, mask, weight, divisor, 1.0, reduction)
    check.pair(student, teacher, check.rows_of_logits)
    check.number("beta", beta, 0, 1)
    special = teacher_temperature is not None or standardize or isinstance(temperature, Tensor)
    if mask is weight is divisor is None and not special and student.dim() == 2:
        # What follows below, in a tenth less of the host's time.
        check.positive("temperature", temperature)
        check.reduction(reduction)
        rows = student.shape[0] or 1 if reduction in ("batchmean", "mean") else 1
        temperatures, temperature = temperature_argument(temperature, student)
        settings = (temperature, float(beta), rows, reduction != "none")
        return _softmax_kl_function(settings, student, teacher, None, temperatures)
    how = Reduction.of(student, reduction, mask, weight, divisor)
    if special:
        check.temperatures("temperature", temperature, student)
        if teacher_temperature is not None:
            check.temperatures("teacher_temperature", teacher_temperature, student)
        kind, standardize = kl_kind(float(beta)), bool(standardize)
        return divergence(student, teacher, kind, how, temperature, teacher_temperature, standardize=standardize)
    check.positive("temperature", temperature)
    student, teacher = rows_of(student), rows_of(teacher)
    temperatures, temperature = temperature_argument(temperature, student)
    settings = (temperature, float(beta), how.divisor, how.reduce)
    return how.finish(_softmax_kl_function(settings, student, teacher, how.weight, temperatures))


def _softmax_kl_topk_loss(student, teacher, temperature, beta, mask, weight, divisor, kl_weight, reduction):
    """kl_weight times the divergence of a top-k teacher."""
    check.rows_of_logits("student", student)
    check.positive("temperature", temperature)
    check.number("beta", beta, 0, 1)
    how = Reduction.of(student, reduction, mask, weight, divisor)
    if not 2 <= len(teacher) <= len(TopK._fields):
        raise ValueError(
            f"teacher must be logits (B, C) or (values, indices[, rest[, temperature]]), got a tuple of {len(teacher)}"
        )
    values, indices, rest, stored, tail = TopK(*teacher)
    tail = _one_tail(tail)
    indices = check.top_k(values, indices, rest, student, padded=tail != "rest")
    if isinstance(stored, torch.Tensor):  # as a data loader collates the samples' numbers
        stored = check.one_number("teacher.temperature", stored)
    check.positive("teacher.temperature", stored)
    if stored != temperature and (rest is not None or tail in ("bucket", "drop")):
        held = "rest is the log-sum of the other classes" if tail == "rest" else "values are log-probabilities"
        other = ", or pass rest=None to give those classes nothing" if tail == "rest" else ""
        raise ValueError(
            f"teacher.{held} at temperature {stored}, which does not tell that at temperature {temperature}: "
            f"store it at {temperature}{other}"
        )
    student = rows_of(student)
    teacher = TopK(rows_of(values), rows_of(indices), None if rest is None else rest.reshape(-1), stored, tail)
    if tail == "rest" and beta == 0:
        temperatures, temperature = temperature_argument(temperature, student)
        settings = (temperature, float(kl_weight), how.divisor, how.reduce)
        return how.finish(_softmax_kl_topk_function(settings, student, *teacher[:3], how.weight, temperatures))
    log_q, log_p = of_outcomes(student, teacher, temperature)
    if how.weight is not None:
        masked = (how.weight == 0)[:, None]
        log_q, log_p = torch.where(masked, 0.0, log_q), torch.where(masked, 0.0, log_p)
    if tail == "drop":
        rows = truncated(log_q, log_p, beta)
    else:  # the softmax of log-probabilities
        rows = _softmax_kl_function((1.0, float(beta), 1, False), log_q, log_p, None, None)
    rows = rows if how.weight is None else rows * how.weight
    scale = kl_weight * temperature**2 / how.divisor
    return how.finish(scale * (fixed_sum(rows) if how.reduce else rows))


def _one_tail(tail):
    """The tail of a teacher, also as a data loader collates those of the samples."""
    tails = set(tail) if isinstance(tail, (list, tuple)) else {tail}
    if len(tails) != 1:
        raise ValueError(f"teacher.tail must be the same in every row, got {sorted(map(str, tails))}")
    (tail,) = tails
    check.one_of("teacher.tail", tail, ("rest", *TAILS))
    return tail


def cross_entropy_kl(
    student: Tensor,
    teacher: Teacher,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    teacher_temperature: float | Tensor | None = None,
    standardize: bool = False,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """``kl_weight T^2 KL(p || q) + ce_weight CE(student, labels)``, reading the student's logits once.

    The KL is that of :func:`softmax_kl`; the cross-entropy takes the student at temperature 1, as it is.

    Args:
        student, teacher: logits (..., C). For a :class:`TopK`, and for anything that :func:`softmax_kl` takes beside
            one temperature, the two terms are two calls, which read the student twice.
        labels: (...) integer classes, or (..., C) probabilities (need not sum to 1; no gradient).
        label_smoothing: moves this share of the target to the uniform distribution.
        ignore_index: rows with this label leave the cross-entropy, not the KL.
        teacher_temperature, standardize: of the KL. mask, weight, divisor: of both terms, as in :func:`softmax_kl`.
        reduction: "batchmean" and "mean" divide the KL by the rows that count, and the cross-entropy by those of them
            that are not ignored (0 if there is none). "sum", "none".

    Raises: TypeError, ValueError naming the argument; a label that is neither a class nor `ignore_index`, or a row of
    probabilities whose sum is below 0 (they are logits or log-probabilities), is an error on CPU. On CUDA it makes the
    row (and a reduced loss) NaN, unless KDFAST_CHECK=1, which checks labels first.
    """
    check.number("kl_weight", kl_weight)
    of_ce = {"ce_weight": ce_weight, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
    of_rows = {"mask": mask, "weight": weight, "divisor": divisor, "reduction": reduction}
    special = teacher_temperature is not None or standardize or isinstance(temperature, Tensor)
    if not special and not isinstance(teacher, tuple):
        check.pair(student, teacher, check.rows_of_logits)
        check.positive("temperature", temperature)
        return cross_entropy_loss(student, teacher, labels, temperature, kl_weight, None, *of_ce.values(), **of_rows)
    ce = cross_entropy(student, labels, **of_ce, **of_rows)
    if isinstance(teacher, tuple):
        if special:
            raise ValueError("a top-k teacher takes one number as temperature, and no standardize")
        kl = _softmax_kl_topk_loss(student, teacher, temperature, 0.0, mask, weight, divisor, kl_weight, reduction)
    else:
        of_kl = {"teacher_temperature": teacher_temperature, "standardize": standardize}
        kl = kl_weight * softmax_kl(student, teacher, temperature, **of_kl, **of_rows)
    return kl + ce if kl_weight else ce


def cross_entropy(
    student: Tensor,
    labels: Tensor,
    *,
    ce_weight: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """``ce_weight CE(student, labels)``: :func:`cross_entropy_kl` without a teacher, with the same labels."""
    check.rows_of_logits("student", student)
    of_ce = (ce_weight, label_smoothing, ignore_index)
    return cross_entropy_loss(student, None, labels, 1.0, 0.0, 1, *of_ce, reduction, mask, weight, divisor)


def cross_entropy_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    temperature: float,
    kl_weight: float,
    kl_divisor: int | None,
    ce_weight: float,
    smoothing: float,
    ignore_index: int,
    reduction: str,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
) -> Tensor:
    """``kl_weight / kl_divisor T^2 KL + ce_weight CE`` of logits and a temperature that were checked.

    kl_divisor: None for that of the reduction.
    """
    check.number("ce_weight", ce_weight)
    check.number("label_smoothing", smoothing, 0, 1)
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    how = Reduction.of(student, reduction, mask, weight, divisor)
    ce_mean = False
    if isinstance(labels, torch.Tensor) and labels.is_floating_point():
        check.class_probabilities("labels", labels, student)
        labels = rows_of(labels.detach())
    else:
        labels = check.class_indices(labels, student, ignore_index)
        if mask is not None:
            labels = torch.where(mask, labels, ignore_index)
        labels = labels.reshape(-1)
        mean = divisor is None and reduction in ("mean", "batchmean")
        ce_mean = mean and how.weight is None
        if mean and not ce_mean:  # each term has its own count: the cross-entropy's weights are those of the KL's count
            of_ce = (labels != ignore_index).sum().clamp(min=1)
            of_kl = how.divisor if how.count is None else how.count
            how = how._replace(weight=torch.stack([how.weight, how.weight * of_kl / of_ce], 1))
    student, teacher = rows_of(student), None if teacher is None else rows_of(teacher)
    temperatures, temperature = (None, 1.0) if teacher is None else temperature_argument(temperature, student)
    kl, ce = (float(kl_weight), how.divisor if kl_divisor is None else kl_divisor), (float(ce_weight), how.divisor)
    settings = (temperature, *kl, *ce, float(smoothing), ignore_index, ce_mean, how.reduce)
    return how.finish(_cross_entropy_kl_function(settings, student, teacher, labels, how.weight, temperatures))


def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """``T^2 [alpha KL(b_t || b_s) + beta KL(r_t || r_s)]`` of each row: decoupled distillation in a stable closed form.

    b = (p_y, 1 - p_y) is the target class against the rest, r the softmax among the non-target classes, both at T.

    Args:
        student, teacher: logits (..., C). labels: (...) integer classes (range: see :func:`cross_entropy_kl`); those of
            masked rows may be any. mask, weight, divisor, reduction: as in :func:`softmax_kl`.

    Gradients flow to student and teacher. With one class the loss is 0.
    """
    check.pair(student, teacher, check.rows_of_logits)
    check.positive("temperature", temperature)
    check.number("alpha", alpha)
    check.number("beta", beta)
    how = Reduction.of(student, reduction, mask, weight, divisor)
    labels = check.class_indices(labels, student)
    labels = (labels if mask is None else torch.where(mask, labels, 0)).reshape(-1)
    student, teacher = rows_of(student), rows_of(teacher)
    temperatures, temperature = temperature_argument(temperature, student)
    settings = (temperature, float(alpha), float(beta), how.divisor, how.reduce)
    return how.finish(_dkd_function(settings, student, teacher, labels, how.weight, temperatures))
