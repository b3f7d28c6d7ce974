"""Divergences of two softmaxes beyond KL: skewed mixtures, total variation, alpha-beta, cross-entropy.

With p = softmax(teacher / T_p) and q = softmax(student / T_q) of one row, and d = log(p / q):

    skewed         a KL(p || m) + b KL(q || m), m = skew p + (1 - skew) q: KL for a skew of 0 or 1, Jensen-Shannon for
                   a = skew and b = 1 - skew, the skewed KLs for a or b alone
    variation      1/2 sum |p - q|
    alpha_beta     -1/(a b) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)], the limit where a, b or a + b is 0
    cross_entropy  -sum p log q

Each is a sum over classes of a term F(log p, log q). With g_q = dF / d log q, and G_q its sum over the classes,

    dL/dz_q = (g_q - q G_q) / T_q,    dL/dT_q = -H_q / T_q^2,    H_q = sum_c (g_q - q G_q) z_q,

and the same for p. A multiple of q in g_q adds nothing; the g below are those that do not cancel where p is near q.
`standardize` takes (z - mean) / (1e-7 + std) of each row, with the std of C - 1. The mean does not change a softmax:
that is a temperature T (1e-7 + std) of the row, through which the gradient flows on.
The op keeps maximum, sum, G, H, mean and std of each side and row; the backward reads the logits once more.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast._kernels import op
from kdfast.ops import check, shapes
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.blocks import anywhere, by_block
from kdfast.ops.differentiable import function_of
from kdfast.ops.reduction import Reduction, rows_of
from kdfast.ops.rows import INF, Rows, kl_rows, label_column, log_ratio_of, log_softmax, scale_rows
from kdfast.ops.saved import save, saved
from kdfast.ops.temperature import temperature_argument

__all__ = ["alpha_beta", "non_target_cross_entropy", "skew_kl", "total_variation_distance"]

SKEWED, VARIATION, ALPHA_BETA, CROSS_ENTROPY = range(4)
EPS = 1e-7  # of a standardised row, beside its std
SIDE = 6  # statistics: max, sum, G, H, mean, std


# ---- plain PyTorch: the sum of F [rows], g_p and g_q [rows, cols] -------------------------------------------
def _times(p, x):
    """p x, where 0 x = 0 whatever x is."""
    return torch.where(p == 0, 0.0, p * x)


def _excess(x):
    """e^-x - 1 + x, which is never negative."""
    return (torch.expm1(-x) + x).clamp(min=0)


def _ratios_to_mixture(d, skew):
    """log(p / m), log(q / m)."""
    if not isinstance(skew, Tensor) and skew in (0, 1):
        zero = d.new_zeros(()).expand(d.shape)
        return (d, zero) if skew == 0 else (zero, -d)
    smaller_p = (d <= 0).to(d.dtype)
    share = 1 - skew + (2 * skew - 1) * smaller_p  # of the smaller one
    log_mix = torch.expm1(-d.abs()).mul_(share).log1p_()  # m over the larger one
    # No less than the share of the larger one, which rounding may have made 0.
    if not isinstance(skew, Tensor):
        log_mix.clamp_(min=math.log(min(skew, 1 - skew)))
        return d.clamp(max=0) - log_mix, (-d).clamp(max=0) - log_mix
    log_mix = torch.maximum(log_mix, (1 - share).log())
    p_ratio = torch.where(skew == 0, d, torch.where(skew == 1, 0.0, d.clamp(max=0) - log_mix))
    q_ratio = torch.where(skew == 1, -d, torch.where(skew == 0, 0.0, (-d).clamp(max=0) - log_mix))
    return p_ratio, q_ratio


def _kl_to_mixture(own, other, own_ratio, other_ratio, share, both):
    """F [rows], g_own, g_other of KL(own || m), m = share own + (1 - share) other."""
    if isinstance(share, Tensor) or share:
        m = share * own + (1 - share) * other
        slope = _times(own, own_ratio - _times(torch.as_tensor(share, dtype=own.dtype), torch.expm1(own_ratio)))
        to_other = _times(torch.as_tensor((1 - share) ** 2, dtype=own.dtype), (other - own) * other_ratio.exp())
    else:
        m, slope, to_other = other, _times(own, own_ratio), other - own
    value = kl_rows(own, own_ratio.clone(), lambda rows: (m[rows], own_ratio[rows]), both)
    return value, slope, to_other


def _skewed(p, q, d, log_p, log_q, a, b, skew, both):
    p_ratio, q_ratio = _ratios_to_mixture(d, skew)
    of_p = _kl_to_mixture(p, q, p_ratio, q_ratio, skew, both) if a else None
    of_q = _kl_to_mixture(q, p, q_ratio, p_ratio, 1 - skew, both) if b else None
    if of_q is None:
        return of_p if a == 1 else tuple(a * x for x in of_p)
    value, to_q, to_p = of_q if b == 1 else (b * x for x in of_q)
    return (value, to_p, to_q) if of_p is None else (value + a * of_p[0], to_p + a * of_p[1], to_q + a * of_p[2])


def _variation(p, q, d, log_p, log_q, a, b, skew, both):
    side = d.sign().div_(2)
    return fixed_sum(torch.maximum(p, q).mul_(torch.expm1(-d.abs()))) / -2, p * side, -q * side


def _alpha_beta(p, q, d, log_p, log_q, a, b, skew, both):
    value, to_p, to_q = _alpha_beta_terms(p, q, d, log_p, log_q, a, b)
    nowhere = (log_p == -INF) & (log_q == -INF)  # where d says nothing
    if anywhere(nowhere):
        value, to_p, to_q = (torch.where(nowhere, 0.0, x) for x in (value, to_p, to_q))
    return fixed_sum(value), to_p, to_q


def _alpha_beta_terms(p, q, d, log_p, log_q, a, b):
    """a <= 0 or b <= 0 by the same formulas, but for the limits."""
    if a == 0 and b == 0:
        return d * d / 2, d, -d
    if a == 0:  # the roles exchanged
        value, to_q, to_p = _alpha_beta_terms(q, p, -d, log_q, log_p, b, a)
        return value, to_p, to_q
    if a + b == 0:
        slope = torch.expm1(a * d) / a
        return _excess(-a * d) / a**2, slope, -slope
    larger_p, e = d > 0, d.abs()
    power = ((a + b) * torch.where(larger_p, log_p, log_q)).exp()  # of the larger one
    less_a = torch.expm1(-a * e)
    small = e * max(abs(a), abs(b), abs(a + b)) <= 0.25
    if b == 0:
        value = torch.where(small, _excess(-a * e), torch.expm1(a * e) - a * e) * (-a * e).exp()
        value = torch.where(
            larger_p, _excess(a * e), torch.where(small, value, -less_a - _times((-a * e).exp(), a * e))
        )
        side = torch.where(larger_p, 1.0, -1.0)
        return power * value / a**2, _times((a * log_p).exp(), d), power * side * less_a / a
    less_b, c = torch.expm1(-b * e), torch.where(larger_p, d.new_tensor(b), d.new_tensor(a))
    far = torch.expm1(-c * e) - c / (a + b) * torch.expm1(-(a + b) * e)
    value = torch.where(small, _excess(c * e) - c / (a + b) * _excess((a + b) * e), far)
    to_p = less_b / b * torch.where(larger_p, -1.0, (-a * e).exp())
    to_q = less_a / a * torch.where(larger_p, (-b * e).exp(), -1.0)
    return power * value / -(a * b), power * to_p, power * to_q


def _cross_entropy(p, q, d, log_p, log_q, a, b, skew, both):
    slope = -_times(p, log_q)
    return fixed_sum(slope), slope, q - p


_TERMS = (_skewed, _variation, _alpha_beta, _cross_entropy)


class _Sides(NamedTuple):
    """Teacher and student, their log-ratio d [rows, cols], and their statistics [rows], mean and std."""

    p: Rows
    q: Rows
    d: Tensor
    moments: tuple[Tensor, ...]

    def terms(self, kind, a, b, skew):
        p, q = self.p, self.q
        both = (p.total > 0) & (q.total > 0)
        return _TERMS[kind](p.log_p.exp(), q.log_p.exp(), self.d, p.log_p, q.log_p, a, b, skew, both)


def _moments(z, standardize):
    """-> mean, std [rows]: 0 and 1 of rows that are taken as they are."""
    if not standardize:
        return torch.zeros_like(z[:, 0]), torch.ones_like(z[:, 0])
    count, first = z.shape[1], z[:, :1]
    shifted = z - first  # a constant row has no std at all
    mean = fixed_sum(shifted) / count
    square = fixed_sum((shifted - mean[:, None]).square_())
    return mean + first[:, 0], (square / max(count - 1, 1)).sqrt()


def _temperature(temperatures, number, rows, dtype):
    """[rows, 1] of a tensor, or the number."""
    return number if temperatures is None else temperatures.to(dtype).expand(rows)[:, None]


def _of_rows(t, std, standardize):
    return t * (EPS + std[:, None]) if standardize else t


def _sides(student, teacher, column, t_q, t_p, standardize, known=None):
    """known: maxima, sums, mean and std of the student, and of the teacher, of a backward."""
    dtype = accumulator(student, teacher)
    sides, taus, moments = [], [], []
    for logits, t, side in ((teacher, t_p, 1), (student, t_q, 0)):
        z = logits.to(dtype)
        mean, std = _moments(z, standardize) if known is None else known[side][2:]
        tau = _of_rows(t, std, standardize)
        z = z if column is None else z.scatter(1, column, -INF)
        if known is None:
            rows = Rows.of(z, tau, dtype)
        else:
            top, total = known[side][:2]
            rows = Rows(z, top, total, log_softmax(z, top, total, tau))
        sides, taus, moments = [*sides, rows], [*taus, tau], [mean, std, *moments]
    (p, q), (tau_p, tau_q) = sides, taus
    d = p.log_p - q.log_p
    if not isinstance(tau_p, Tensor) and not isinstance(tau_q, Tensor):
        d = log_ratio_of(p, q, tau_p) if tau_p == tau_q else d
    else:
        same = torch.as_tensor(tau_p == tau_q, device=d.device).expand(d.shape)
        d = torch.where(same, log_ratio_of(p, q, tau_q), d) if anywhere(same) else d
    nowhere = (p.log_p == -INF) & (q.log_p == -INF)
    return _Sides(p, q, torch.where(nowhere, 0.0, d) if anywhere(nowhere) else d, tuple(moments))


def _side_sums(slopes, rows, moments):
    """-> G, H of a side [rows]; G of an infinite row whose slopes are infinite is inf: it has none."""
    total = fixed_sum(slopes)
    if not moments:
        return total, torch.zeros_like(total)
    centred = rows.logits.to(slopes.dtype) - rows.top[:, None]
    slopes = slopes - rows.log_p.exp() * total[:, None]
    return total, fixed_sum(_times(slopes, centred))


def _column(labels, classes):
    if labels is None:
        return None, None
    column, _, wrong = label_column(labels, classes)
    return column, wrong


def _shapes(student, teacher, reduce, **_):
    rows = student.shape[:1]
    return shapes.sums(() if reduce else rows, student, teacher), shapes.sums((2 * SIDE, *rows), student, teacher)


@op("divergence", _shapes)
def _divergence(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    labels: Tensor | None,
    skews: Tensor | None,
    temperatures: Tensor | None,
    teacher_temperatures: Tensor | None,
    temperature: float,
    teacher_temperature: float,
    kind: int,
    a: float,
    b: float,
    skew: float,
    standardize: bool,
    moments: bool,
    scale: float,
    divisor: int,
    reduce: bool,
) -> tuple[Tensor, Tensor]:
    """-> loss, stats: max, sum, G, H, mean, std of the student; the same of the teacher.

    labels: classes that rows leave out, on both sides. skews: [rows], in place of `skew`. teacher_temperature: 0 for
    the student's. moments: whether H is needed.
    """
    dtype, rows = accumulator(student, teacher), len(student)
    t_q = _temperature(temperatures, temperature, rows, dtype)
    t_p = _temperature(teacher_temperatures, teacher_temperature, rows, dtype) if teacher_temperature else t_q
    numbers = (t_q, t_p)  # where they are no tensors
    column, wrong = _column(labels, student.shape[1])

    def block(student, teacher, weight, column, wrong, skews, t_q, t_p):
        t_q, t_p = (n if t is None else t for t, n in ((t_q, numbers[0]), (t_p, numbers[1])))
        sides = _sides(student, teacher, column, t_q, t_p, standardize)
        value, to_p, to_q = sides.terms(kind, a, b, skew if skews is None else skews.to(dtype)[:, None])
        unknown = (sides.p.total + sides.q.total).isnan()  # also of a side that the form does not read
        value = torch.where(unknown if wrong is None else unknown | wrong, float("nan"), value)
        stats = []
        for slopes, of_side, mean, std in ((to_q, sides.q, *sides.moments[:2]), (to_p, sides.p, *sides.moments[2:])):
            total, moment = _side_sums(slopes, of_side, moments)
            flat = (value == INF) & ~total.isfinite()
            total = torch.where(value.isnan(), value, total)  # and so are all slopes
            stats += [*of_side.side, torch.where(flat, INF, total), torch.where(flat, 0.0, moment), mean, std]
        value = scale / divisor * value
        return value if weight is None else scale_rows(weight.to(dtype), value), torch.stack(stats, 1)

    tensors = (t if isinstance(t, Tensor) else None for t in (t_q, t_p))
    values, stats = by_block(block, student, teacher, weight, column, wrong, skews, *tensors)
    return fixed_sum(values) if reduce else values, stats.t().contiguous()


@op(
    "divergence",
    lambda grad, student, teacher, need_student, need_teacher, **_: shapes.gradients(
        grad, (student, need_student), (teacher, need_teacher)
    ),
)
def _divergence_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    labels: Tensor | None,
    skews: Tensor | None,
    temperatures: Tensor | None,
    teacher_temperatures: Tensor | None,
    stats: Tensor,
    temperature: float,
    teacher_temperature: float,
    kind: int,
    a: float,
    b: float,
    skew: float,
    standardize: bool,
    scale: float,
    divisor: int,
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor]:
    """-> gradients of student and teacher; an empty tensor for one that is not needed."""
    dtype, (rows, classes) = stats.dtype, student.shape
    t_q = _temperature(temperatures, temperature, rows, dtype)
    t_p = _temperature(teacher_temperatures, teacher_temperature, rows, dtype) if teacher_temperature else t_q
    numbers = (t_q, t_p)  # where they are no tensors
    column, _ = _column(labels, classes)
    row = (grad.to(dtype) * (scale / divisor)).expand(rows)
    row = row if weight is None else row * weight.to(dtype)

    def block(student, teacher, row, stats, column, skews, t_q, t_p):
        t_q, t_p = (n if t is None else t for t, n in ((t_q, numbers[0]), (t_p, numbers[1])))
        known = [[*of_side[:2], *of_side[4:]] for of_side in (stats.t()[:SIDE], stats.t()[SIDE:])]
        sides = _sides(student, teacher, column, t_q, t_p, standardize, known)
        _, to_p, to_q = sides.terms(kind, a, b, skew if skews is None else skews.to(dtype)[:, None])
        grads = []
        for need, x, of_side, slopes, t, first in (
            (need_student, student, sides.q, to_q, t_q, 0),
            (need_teacher, teacher, sides.p, to_p, t_p, SIDE),
        ):
            if not need:
                grads.append(row.new_empty(0))
                continue
            total, moment, mean, std = stats.t()[first + 2 : first + SIDE]
            tau = _of_rows(t, std, standardize)
            slope = (slopes - of_side.log_p.exp() * total[:, None]) / tau
            slope = torch.where((total == INF)[:, None], 0.0, slope)
            if standardize:
                through_std = -moment[:, None] * t / (tau * tau * max(classes - 1, 1) * std[:, None])
                slope = slope + torch.where(std[:, None] == 0, 0.0, through_std * (x.to(dtype) - mean[:, None]))
            grads.append(scale_rows(row, slope).to(x.dtype).contiguous())
        return tuple(grads)

    tensors = (t if isinstance(t, Tensor) else None for t in (t_q, t_p))
    return by_block(block, student, teacher, row, stats.t(), column, skews, *tensors)


@op("divergence", lambda student, teacher, **_: shapes.sums(student.shape[:1], student, teacher), has_kernels=False)
def head_share(student: Tensor, teacher: Tensor, head: float) -> Tensor:
    """The share of the teacher's largest classes, up to the mass `head`, in sum_c |p_c - q_c| of each row."""
    dtype = accumulator(student, teacher)

    def block(student, teacher):
        p, order = teacher.softmax(1, dtype).sort(dim=1, descending=True, stable=True)
        gap = (p - student.softmax(1, dtype).gather(1, order)).abs_()
        tail = p.cumsum(1) > head
        tail[:, 0] = False
        total = fixed_sum(gap)
        return (torch.where(total == 0, 0.0, fixed_sum(gap.masked_fill_(tail, 0.0)) / total),)

    return by_block(block, student, teacher)[0]


# ---- functions -------------------------------------------------------------------------------------------------------
def _run(*args):
    ctx, settings, *tensors = args
    ctx.settings = settings
    loss, stats = torch.ops.kdfast.divergence(*tensors, *settings)
    save(ctx, *tensors, stats)
    return loss


def _differentiate(ctx, grad):
    check.first_derivative_only("divergence")
    *tensors, stats = saved(ctx)
    t_q, t_p, kind, a, b, skew, standardize, _, scale, divisor, _ = ctx.settings
    needs = ctx.needs_input_grad[1:]
    constants = (t_q, t_p, kind, a, b, skew, standardize, scale, divisor, *needs[:2])
    grads = torch.ops.kdfast.divergence_backward(grad, *tensors, stats, *constants)
    weight, given = tensors[2], tensors[5:7]
    row = (grad.to(stats.dtype) * (scale / divisor)).expand(stats.shape[1])
    row = row if weight is None else row * weight.to(stats.dtype)
    sides = ((stats[:SIDE], stats[SIDE:]), ()) if t_p == 0 else ((stats[:SIDE],), (stats[SIDE:],))
    of_temperatures = [
        sum(_temperature_gradient(row, t, side, standardize) for side in of_t) if need else None
        for t, need, of_t in zip(given, needs[5:7], sides, strict=True)
    ]
    return (
        None,
        *[x if need else None for x, need in zip(grads, needs, strict=False)],
        None,
        None,
        None,
        *of_temperatures,
    )


def _temperature_gradient(row, temperatures, stats, standardize):
    """Of the temperature of one side: -H / tau^2 d tau / dT."""
    moment, std = stats[3], stats[5]
    inner = EPS + std if standardize else 1.0
    t = temperatures.to(stats.dtype)
    rows = scale_rows(row, -moment / (t * t * inner))
    return (rows if temperatures.dim() else fixed_sum(rows)).to(temperatures.dtype)


_function = function_of("divergence", _run, _differentiate)


def _argument(name, value, student):
    """-> the op's tensor and number of a temperature that was checked."""
    if not isinstance(value, Tensor):
        return temperature_argument(value, student)
    valid = value > 0
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and not valid.all():
        raise ValueError(f"{name} must be above 0, got {value[~valid].flatten()[0]:g} in a tensor")
    return torch.where(valid, value, float("nan")).reshape(value.shape.numel() if value.dim() else ()), 1.0


def divergence(
    student: Tensor,
    teacher: Tensor,
    kind: tuple[int, float, float, float],
    how: Reduction,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    *,
    labels: Tensor | None = None,
    skews: Tensor | None = None,
    standardize: bool = False,
    scale: float = 1.0,
    squared: bool = True,
) -> Tensor:
    """``scale T^2`` times a divergence, of arguments that were checked; T is the student's, and not `squared`: 1."""
    rows_t = temperature.reshape(-1) if isinstance(temperature, Tensor) and temperature.dim() else None
    t_q, number_q = _argument("temperature", temperature, student)
    t_p, number_p = None, 0.0  # the student's
    if teacher_temperature is not None:
        t_p, number_p = _argument("teacher_temperature", teacher_temperature, student)
    if squared and t_q is None:
        scale *= number_q**2
    moments = standardize or any(t is not None and t.requires_grad for t in (t_q, t_p))
    reduce = how.reduce and rows_t is None
    settings = (number_q, number_p, *kind, standardize, moments, scale, how.divisor, reduce)
    value = _function(settings, rows_of(student), rows_of(teacher), how.weight, labels, skews, t_q, t_p)
    if squared and t_q is not None:
        t = t_q.to(value.dtype)
        value = value * (t * t)
        value = fixed_sum(value) if how.reduce and rows_t is not None else value
    return how.finish(value)


def kl_kind(beta: float) -> tuple[int, float, float, float]:
    """D_beta of :func:`kdfast.ops.softmax_kl`."""
    return SKEWED, (beta if 0 < beta < 1 else 1 - beta), (1 - beta if 0 < beta < 1 else beta), beta


def _checked(student, teacher, temperature, mask, weight, divisor, reduction):
    check.pair(student, teacher, check.rows_of_logits)
    check.temperatures("temperature", temperature, student)
    return Reduction.of(student, reduction, mask, weight, divisor)


def skew_kl(
    student: Tensor,
    teacher: Tensor,
    skew: float | Tensor = 0.1,
    *,
    reverse: bool = False,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """``T^2 KL(p || skew p + (1 - skew) q)``, or with `reverse` ``T^2 KL(q || skew q + (1 - skew) p)``, row by row.

    p = softmax(teacher / T), q = softmax(student / T). At most T^2 log(1 / skew); a skew of 0 is the plain KL.

    Args:
        student, teacher: logits (..., C). skew: from 0 to 1, a number, or one for each row (no gradient).
        temperature, mask, weight, divisor, reduction: as in :func:`softmax_kl`.

    Gradients flow to student and teacher, through the mixture too. Raises: TypeError, ValueError naming the argument.
    """
    how, skews = _checked(student, teacher, temperature, mask, weight, divisor, reduction), None
    if isinstance(skew, Tensor):
        check.shaped("skew", skew, student.shape[:-1], student)
        skews = (1 - skew if reverse else skew).detach().reshape(-1)
        skew = 0.5
    else:
        check.number("skew", skew, 0, 1)
    kind = (SKEWED, 0.0, 1.0, float(1 - skew)) if reverse else (SKEWED, 1.0, 0.0, float(skew))
    return divergence(student, teacher, kind, how, temperature, skews=skews)


def total_variation_distance(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """``T^2 / 2 sum_c |p_c - q_c|`` of the softmaxes at T, row by row; its gradient is 0 where p = q.

    Arguments, gradients and errors: as in :func:`skew_kl`.
    """
    how = _checked(student, teacher, temperature, mask, weight, divisor, reduction)
    return divergence(student, teacher, (VARIATION, 0.0, 0.0, 0.0), how, temperature)


def alpha_beta(
    student: Tensor,
    teacher: Tensor,
    alpha: float,
    beta: float,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """T^2 times the alpha-beta divergence ``-1/(ab) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]``, row by row.

    The limit where a, b or a + b is 0: (1, 0) is KL(p || q), (0, 1) KL(q || p), (0, 0) half the squared log-ratios.
    Powers are taken in log space: the value is finite wherever the formula is. Other arguments, gradients and errors:
    as in :func:`skew_kl`.
    """
    check.number("alpha", alpha)
    check.number("beta", beta)
    how = _checked(student, teacher, temperature, mask, weight, divisor, reduction)
    return divergence(student, teacher, (ALPHA_BETA, float(alpha), float(beta), 0.0), how, temperature)


def non_target_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    divisor: float | Tensor | None = None,
    reduction: str = "batchmean",
) -> Tensor:
    """``-T^2 sum P_c log Q_c`` over the classes that are not the label: P and Q are softmaxes at T of those alone.

    Args:
        student, teacher: logits (..., C). labels: (...) integer classes; a label that is none is an error on CPU and a
        NaN row on CUDA. With two classes: 0. Others, gradients and errors: as in :func:`skew_kl`.
    """
    how = _checked(student, teacher, temperature, mask, weight, divisor, reduction)
    labels = check.class_indices(labels, student)
    labels = (labels if mask is None else torch.where(mask, labels, 0)).reshape(-1)
    return divergence(student, teacher, (CROSS_ENTROPY, 0.0, 0.0, 0.0), how, temperature, labels=labels)
