"""Rows of logits: divergences beyond KL, two temperatures, standardised rows."""

import oracles
import torch

from kdfast import ops
from registry import Group, Op, program_of
from registry.softmax_kl import SHARED, _pair_sizes, equal, make, of_rows, share


def make_with_skews(shape):
    x = make(shape)
    x["skew"] = torch.linspace(0, 1, shape[0], dtype=torch.float64)
    return x


# ---- sizes of terms --------------------------------------------------------------------------------------------------
def sizes_of(student, teacher, temperature=1.0, teacher_temperature=None, standardize=False):
    """Of temperature^2 times a sum of probabilities times log-ratios, each row counted with the factor 1."""
    log_q, log_p = oracles._two(student, teacher, temperature, teacher_temperature, standardize)
    rows, entries = _pair_sizes(log_p, log_q)
    entries = temperature**2 * entries / min(temperature, teacher_temperature or temperature)
    if standardize:  # through the standardised logits, and through their std
        z = [oracles.standardized(x.double()).abs() for x in (student, teacher)]
        through = sum(x * (entries * x).sum(1, keepdim=True) for x in z) / max(student.shape[1] - 1, 1)
        least = torch.minimum(*(x.double().std(1, correction=student.shape[1] > 1) for x in (student, teacher)))
        entries = (entries + through) / (1e-7 + least[:, None])
    return temperature**2 * rows, entries


def sizes_alpha_beta(student, teacher, alpha, beta):
    logs = [torch.where(x.isinf(), 0.0, x) for x in oracles._two(student, teacher)]
    scale = 1 / min(abs(x) for x in (alpha, beta, 1) if x)
    # A limit has a term p^a log(p / q).
    widest = 1 + (0 if alpha and beta else (logs[0] - logs[1]).abs())
    powers = scale**2 * widest * sum(((alpha + beta) * x).exp() * (1 + x.abs()) for x in logs)
    rows = powers.sum(1)
    return rows, powers + sum(x.exp() for x in logs) * rows[:, None]


# ---- ops -------------------------------------------------------------------------------------------------------------


def of_options(name, call, options, weighted=False, reduction="batchmean", **at):
    """An op whose terms have the sizes of a KL; at: where these are."""
    if weighted:
        return Op(
            name,
            lambda o, student, teacher, weight: call(o)(
                student, teacher, weight=weight, reduction=reduction, **options
            ),
            lambda g, student, teacher, weight: of_rows(
                g, sizes_of(student, teacher, **at), share(reduction, student) * weight, 2
            ),
            equal=equal,
        )
    return Op(
        name,
        lambda o, student, teacher: call(o)(student, teacher, reduction=reduction, **options),
        lambda g, student, teacher: of_rows(g, sizes_of(student, teacher, **at), share(reduction, student), 2),
        equal=equal,
    )


def kl(name, temperature, beta=0.0, teacher_temperature=None, standardize=False, **more):
    options = {"temperature": temperature, "beta": beta}
    at = {"temperature": temperature, "teacher_temperature": teacher_temperature, "standardize": standardize}
    options |= at

    def call(o):
        return o.divergence_kl if o is oracles else o.softmax_kl

    op = of_options(name, call, options, **more, **at)
    if teacher_temperature is not None:
        op.equal = None
    return op


def alpha_beta(name, alpha, beta):
    return Op(
        name,
        lambda o, student, teacher: o.alpha_beta(student, teacher, alpha, beta),
        lambda g, student, teacher: of_rows(
            g, sizes_alpha_beta(student, teacher, alpha, beta), share("mean", student), 2
        ),
        equal=equal,
    )


GROUPS = [
    Group(
        "divergence",
        make_with_skews,
        [
            of_options("skew", lambda o: o.skew_kl, {"skew": 0.1}),
            of_options(
                "skew_reverse",
                lambda o: o.skew_kl,
                {"skew": 0.3, "reverse": True, "temperature": 2.0},
                temperature=2.0,
                weighted=True,
                reduction="none",
            ),
            Op(
                "skew_of_rows",
                lambda o, student, teacher, skew: o.skew_kl(student, teacher, skew),
                lambda g, student, teacher, skew: of_rows(g, sizes_of(student, teacher), share("mean", student), 2),
                equal=equal,
            ),
            of_options("variation", lambda o: o.total_variation_distance, {}),
            alpha_beta("alpha_beta", 0.2, 0.7),
            alpha_beta("alpha", 0.5, 0.0),
            Op(
                "non_target",
                lambda o, student, teacher, labels: o.non_target_cross_entropy(
                    student, teacher, labels, temperature=2.0
                ),
                lambda g, student, teacher, labels: of_rows(
                    g, sizes_of(student, teacher, 2.0), share("mean", student), 2
                ),
            ),
            kl("two_temperatures", 2.0, teacher_temperature=3.0),
            kl("two_temperatures_jsd", 1.0, beta=0.3, teacher_temperature=4.0, weighted=True),
            kl("standardized", 2.0, standardize=True),
            kl("standardized_reverse", 1.0, beta=1.0, standardize=True, weighted=True, reduction="sum"),
        ],
        cases=[
            (1, 1),  # one sample, one class
            (2, 2),  # one class beside the label
            (4, 7),  # less than the eight elements that a CUDA thread reads at once
            (9, 33),  # one class more than a warp has lanes, one row more than a block has warps
            (2, 1025),  # one more than the 1024 elements that the CPU reads at a time
            (2, 2049),  # the first row that CUDA gives to a whole block
            (1, 16385),  # one element more than a block differentiates: two blocks share the row's gradient
        ],
        leaves=("student", "teacher"),
        layouts={
            "student": "rows",
            "teacher": "rows",
            "weight": "column",
            "labels": "column",
            "skew": "column",
        },
        **SHARED,
    )
]


# ---- raw ops, programs -----------------------------------------------------------------------------------------------
def raw_calls(device):
    """-> (name, arguments) that need no gradient."""
    raw, group = torch.ops.kdfast, GROUPS[0]
    x = group.inputs(device, group.small, torch.float32)
    student, teacher, weight, labels, skews = (x[n] for n in ("student", "teacher", "weight", "labels", "skew"))
    grad = torch.ones((), device=student.device)
    t = torch.full((), 2.0, device=student.device)
    of_rows_t = torch.linspace(1, 2, len(student), device=student.device)
    tail = (True, 1.0, 5, True)  # moments, scale, divisor, reduce
    calls = []
    for tensors, numbers, form in (
        ((weight, None, skews, None, None), (1.0, 1.0), (0, 1.0, 0.0, 0.5, False)),
        ((None, None, None, t, None), (1.0, 2.0), (0, 0.3, 0.7, 0.3, True)),
        ((None, None, None, of_rows_t, of_rows_t), (1.0, 1.0), (1, 0.0, 0.0, 0.0, False)),
        ((None, labels, None, None, None), (2.0, 2.0), (3, 0.0, 0.0, 0.0, False)),
        ((None, None, None, None, None), (1.0, 1.0), (2, 0.2, 0.7, 0.0, False)),
        ((None, None, None, None, None), (1.0, 1.0), (2, 0.5, -0.5, 0.0, False)),
        ((None, None, None, None, None), (1.0, 1.0), (2, 0.0, 0.5, 0.0, False)),
        ((None, None, None, None, None), (1.0, 1.0), (2, 0.0, 0.0, 0.0, False)),
    ):
        calls.append(("divergence", (student, teacher, *tensors, *numbers, *form, *tail)))
        _, stats = raw.divergence(*calls[-1][1])
        backward = (grad, student, teacher, *tensors, stats, *numbers, *form, 1.0, 5, True, True)
        calls.append(("divergence_backward", backward))
    return calls


PROGRAMS = [program_of(group) for group in GROUPS]


# ---- errors ----------------------------------------------------------------------------------------------------------
def bad_inputs():
    return torch.randn(5, 9), torch.randn(5, 9), torch.zeros(5, dtype=torch.long)


ERRORS = [
    (lambda s, t, y: ops.skew_kl(s, t, 1.5), ValueError, "skew must be from 0 to 1, got 1.5"),
    (lambda s, t, y: ops.skew_kl(s, t, s[:3, 0]), ValueError, r"skew must have shape \(5,\), got \(3,\)"),
    (lambda s, t, y: ops.skew_kl(s, t[:, :8]), ValueError, r"teacher must have the student's shape \(5, 9\)"),
    (lambda s, t, y: ops.skew_kl(s, t, mask=y), TypeError, r"mask must be a bool tensor of shape \(5,\)"),
    (lambda s, t, y: ops.skew_kl(s, t, mask=y[:4] == 0), ValueError, r"mask must have shape \(5,\), got \(4,\)"),
    (lambda s, t, y: ops.skew_kl(s, t, divisor=0), ValueError, "divisor must be finite and above 0, got 0"),
    (lambda s, t, y: ops.skew_kl(s, t, divisor=s[0]), ValueError, r"divisor must be a number or a 0-d tensor"),
    (lambda s, t, y: ops.skew_kl(s, t, divisor=2, reduction="none"), ValueError, "divisor divides a sum"),
    (lambda s, t, y: ops.softmax_kl(s, t, s[:3, 0].abs()), ValueError, r"temperature must be a number, a 0-d tensor"),
    (lambda s, t, y: ops.softmax_kl(s, t, -s[0, 0].abs()), ValueError, "temperature must be above 0, got -"),
    (lambda s, t, y: ops.softmax_kl(s, t, teacher_temperature=0), ValueError, "teacher_temperature must be finite"),
    (lambda s, t, y: ops.total_variation_distance(s, t, temperature="1"), TypeError, "temperature must be a number"),
    (lambda s, t, y: ops.alpha_beta(s, t, float("nan"), 1), ValueError, "alpha must be finite, got nan"),
    (lambda s, t, y: ops.alpha_beta(s, t, 1, None), TypeError, "beta must be a number, got NoneType"),
    (lambda s, t, y: ops.non_target_cross_entropy(s, t, y + 9), ValueError, r"labels\[0\] is 9, expected a class"),
    (lambda s, t, y: ops.non_target_cross_entropy(s, t, s), TypeError, "labels must be integers"),
]
