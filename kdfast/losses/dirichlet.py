"""Ensembles as distributions over distributions: plain PyTorch, with the gradient written out."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast._types import Networks
from kdfast.losses.base import AT_LEAST_0, SHARE, Loss, made_of_settings, one_of, setting
from kdfast.ops import check
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.networks import matrices, network_list
from kdfast.ops.rows import log_softmax, row_stats
from kdfast.ops.saved import save, saved

# The powers of T that multiply the student's logits, divide the teachers', and multiply the loss.
VARIANTS = {
    "dirichlet": (-1, 1, 2),
    "ensemble_temperature": (0, 1, 0),
    "dirichlet_temperature": (-1, 0, 2),
    "reverse": (1, 1, -2),
}
LARGEST, SMALLEST = torch.finfo(torch.float64).max, torch.finfo(torch.float64).tiny
FAR = 1e300  # in place of a logit that is +inf, so that differences are numbers


def _digamma_of_exp(u, smoothing):
    """digamma(exp(u) + smoothing), also where exp(u) overflows: log x there, to the last digit."""
    return torch.where(u > 50, u, torch.digamma(u.clamp(max=50).exp() + smoothing))


def _log_concentrations(logits, scale):
    return (logits.double() * scale).clamp(max=FAR)


def _teacher(logits, temperature, share, smoothing):
    """-> softmax p, and P + smoothing with P = (1 - share) p + share / C [B, C]."""
    z = logits.double().clamp(max=FAR)
    p = log_softmax(z, *row_stats(z, temperature, z.dtype), temperature).exp()
    return p, (1 - share) * p + (share / p.shape[1] + smoothing)


class _EnDD(torch.autograd.Function):
    # Everything is float64: at concentrations of e^10 the loss is a difference of numbers that agree in all digits of
    # float32, and beyond e^88 float32 has no concentrations. One teacher is looked at at a time.
    # forward takes *args: where nothing needs a gradient, dynamo tells from their number whether there is a ctx.
    @staticmethod
    def forward(ctx, *args):
        student, smoothing, share, student_scale, teacher_temperature, scale, *teachers = args
        log_mean = sum(_teacher(t, teacher_temperature, share, smoothing)[1].log() for t in teachers) / len(teachers)
        save(ctx, student, log_mean, *teachers)
        ctx.constants = (smoothing, share, student_scale, teacher_temperature, scale)
        u = _log_concentrations(student, student_scale)
        a = u.exp()
        rows = fixed_sum(torch.lgamma(a + smoothing) - (a - 1) * log_mean) - torch.lgamma(fixed_sum(a) + smoothing)
        # Where a term overflows, infinities of both signs may meet. NaN stays where an input is NaN.
        broken = ~rows.isfinite() & ~u.isnan().any(1) & ~log_mean.isnan().any(1)
        rows = torch.where(broken, math.inf, rows)
        return (scale / max(1, len(rows)) * fixed_sum(rows)).to(accumulator(student, *teachers))

    @staticmethod
    def backward(ctx, grad):
        check.first_derivative_only("EnDD")
        student, log_mean, *teachers = saved(ctx)
        smoothing, share, student_scale, teacher_temperature, scale = ctx.constants
        need_student, *need_teachers = ctx.needs_input_grad[:1] + ctx.needs_input_grad[6:]
        u = _log_concentrations(student, student_scale)
        a = u.exp().clamp(max=LARGEST)
        factor = grad.double() * (scale / max(1, len(u)))

        def limited(slope, x):
            """Finite in the dtype of `x`: an infinite loss has a gradient that is as large as can be."""
            largest = torch.finfo(x.dtype).max
            return (slope.clamp(-LARGEST, LARGEST) * factor).clamp(-largest, largest).to(x.dtype)

        grad_student, grad_teachers = None, []
        if need_student:
            top, total = row_stats(u, 1.0, u.dtype)
            log_total = (top + total.log())[:, None]
            inner = _digamma_of_exp(u, smoothing) - _digamma_of_exp(log_total, smoothing) - log_mean
            slope = torch.where(a < SMALLEST, 0.0, a * inner.clamp(-LARGEST, LARGEST))
            grad_student = limited(slope * student_scale, student)
        # d loss / d log(P + smoothing), in units of its largest entry: the sum over classes must not overflow.
        weight = (1 - a) / len(teachers)
        unit = weight.abs().amax(1, keepdim=True)
        weight = weight / torch.where(unit == 0, 1.0, unit)
        for teacher, need in zip(teachers, need_teachers, strict=True):
            if not need:
                grad_teachers.append(None)
                continue
            p, smoothed = _teacher(teacher, teacher_temperature, share, smoothing)
            g = weight * torch.where(smoothed == 0, 0.0, (1 - share) * p / smoothed)
            slope = (g - p * fixed_sum(g)[:, None]) * unit
            grad_teachers.append(limited(slope / teacher_temperature, teacher))
        return grad_student, None, None, None, None, None, *grad_teachers


@made_of_settings
class EnDD(Loss):
    """EnDD - Ensemble Distribution Distillation (Malinin, Mlodozeniec and Gales, ICLR 2020).

    The negative log-likelihood of the teachers' softmaxes under a Dirichlet distribution with the concentrations
    a = exp(student / T), a_0 their sum, averaged over the batch, times T^2:

    ``sum_c lgamma(a_c + e) - lgamma(a_0 + e) - sum_c (a_c - 1) mean_m log(P_mc + e)``,
    ``P = (1 - g) softmax(teacher / T) + g / C``, e = `smoothing`, g = `teacher_smoothing`.

    `variant` as in the official code: "dirichlet" is the above; "ensemble_temperature" has T for the teachers alone and
    no factor, "dirichlet_temperature" T for the student alone; "reverse" has a = exp(student T) and the factor 1 / T^2.
    Shapes: student (B, C) logits; teachers a list of M (B, C) or one (M, B, C) of logits; 0-d, in nats; it may be
    negative. Gradients flow to all. Computed in float64 for every input: finite wherever that is, else +inf, with a
    finite gradient; the official float32 code overflows at concentrations of e^88. Plain PyTorch.

    Args:
        temperature: T, above 0; :class:`TemperatureAnnealing` gives that of an epoch.
        smoothing: e, added in logarithms.
        teacher_smoothing: g, the share of the uniform distribution in each teacher.
        variant: as above.
    """

    temperature: float = setting(1.0, check.positive)
    smoothing: float = setting(1e-8, AT_LEAST_0)
    teacher_smoothing: float = setting(1e-3, SHARE)
    variant: str = setting("dirichlet", one_of(*VARIANTS))

    def forward(self, student: Tensor, teachers: Networks) -> Tensor:
        check.logits("student", student)
        teachers = matrices(network_list("teachers", teachers, student))
        student_scale, teacher_temperature, scale = (float(self.temperature) ** k for k in VARIANTS[self.variant])
        smoothing, share = float(self.smoothing), float(self.teacher_smoothing)
        return _EnDD.apply(student, smoothing, share, student_scale, teacher_temperature, scale, *teachers)


@dataclass(frozen=True)
class TemperatureAnnealing:
    """The temperature of an epoch, as EnDD is trained: `init`, from `decay_epoch` on linearly down to `minimum`.

    It reaches `minimum` `decay_length` epochs later and stays there::

        annealing = TemperatureAnnealing(10.0, decay_epoch=5, decay_length=10)
        loss.temperature = annealing(epoch)

    `epoch` is a number, or a 0-d tensor, which gives a 0-d tensor.
    """

    init: float
    decay_epoch: float
    decay_length: float
    minimum: float = 1.0

    def __post_init__(self) -> None:
        check.positive("init", self.init)
        check.number("decay_epoch", self.decay_epoch)
        check.positive("decay_length", self.decay_length)
        check.positive("minimum", self.minimum)

    def __call__(self, epoch: float | Tensor) -> float | Tensor:
        done = (epoch - self.decay_epoch) / self.decay_length
        done = done.clamp(0, 1) if isinstance(done, torch.Tensor) else min(max(done, 0.0), 1.0)
        return self.init + (self.minimum - self.init) * done


def ensemble_uncertainty(teachers: Networks) -> dict[str, Tensor]:
    """How sure an ensemble is of each sample, and why not: a dict of (B,) tensors, in nats.

    `teachers`: a list of M (B, C) logits or one (M, B, C). With p_m their softmaxes, P the mean of these and
    logarithms of p + 1e-10:

    - confidence: ``max_c P``
    - entropy_of_expected: ``-P . log P``, the total uncertainty
    - expected_entropy: ``mean_m -p_m . log p_m``, what the data leave open
    - mutual_information: the difference of the two, what the networks do not know
    - epkl: ``sum_ij KL(p_i || p_j)`` over all pairs; as in the official code not divided by their number

    Differentiable by autograd, though its use is measurement.
    """
    teachers = matrices(network_list("teachers", teachers))
    dtype = accumulator(*teachers)
    p = torch.stack([x.to(dtype) for x in teachers]).softmax(2)
    mean, log_p = p.mean(0), (p + 1e-10).log()
    log_mean = (mean + 1e-10).log()
    return {
        "confidence": mean.amax(1),
        "entropy_of_expected": -fixed_sum(mean * log_mean),
        "expected_entropy": -fixed_sum(p * log_p).mean(0),
        # Differences of each network from the mean: the two entropies agree in nearly all digits.
        "mutual_information": fixed_sum(p * (log_p - log_mean)).mean(0),
        "epkl": len(p) * fixed_sum((p - mean) * (log_p - log_p.mean(0))).sum(0),
    }
