"""Rows of logits: softmax-KL and its relatives."""

import math

import oracles
import torch
from torch.nn import functional as F

import kdfast
from kdfast import ops
from registry import FAR, Group, Inputs, Op, program_of


# ---- inputs: logits, labels one of each kind, weights with a zero among them -----------------------------------------
def make(shape):
    rows, cols = shape
    student, teacher = (3 * torch.randn(shape, dtype=torch.float64) for _ in range(2))
    probabilities = torch.rand(shape, dtype=torch.float64) ** 4
    weight = torch.rand(rows, dtype=torch.float64)
    weight[1:2] = 0
    return {
        "student": student,
        "teacher": teacher,
        "probabilities": probabilities / probabilities.sum(1, keepdim=True),
        "weight": weight,
        "labels": torch.randint(cols, (rows,)),
    }


def top_k_of(x):
    """A teacher's seven largest logits in place of all."""
    teacher = x["teacher"]
    values, indices, rest, *_ = ops.TopK.of(teacher.double(), min(7, teacher.shape[1]), 4.0)
    kept = {"values": values.to(teacher.dtype), "rest": rest.float(), "indices": indices}
    return Inputs(student=x["student"], weight=x["weight"], **kept)


# ---- ops, of which tests and fuzz draw the settings ------------------------------------------------------------------
def _pair_sizes(log_p, log_q):
    p, q = log_p.exp(), log_q.exp()
    a, b = (torch.where(x.isinf(), 0.0, x.abs()) for x in (log_p, log_q))
    rows = 1 + (p * (a + b) + q * (a + b)).sum(-1)
    # exp(x) has |x| as many rounding errors as x.
    # A gradient is a probability times the difference of a log-ratio, up to a + b, and the row's value.
    return rows, (rows[:, None] + a + b) * (p * (1 + a) + q * (1 + b))


def sizes_kl(student, teacher, temperature=1.0):
    """Of temperature^2 times a divergence, each row counted with the factor 1."""
    rows, entries = _pair_sizes(oracles._log_softmax(student, temperature), oracles._log_softmax(teacher, temperature))
    return temperature**2 * rows, temperature * entries


def sizes_topk(student, teacher, temperature=1.0):
    log_q, log_p, among_others = oracles._outcomes(student, teacher, temperature)
    rows, outcomes = _pair_sizes(log_p, log_q)
    # What the others get as one is shared out: exp(x) has |x| as many rounding errors as x.
    share = torch.where(among_others == -math.inf, 0.0, among_others.exp() * (1 + among_others.abs()))
    entries = (outcomes[:, -1:] * share).scatter(1, teacher[1].long(), outcomes[:, :-1])
    return temperature**2 * rows, temperature * entries


def sizes_ce(student, labels, ignore_index=-100):
    target, kept = oracles._targets(labels, student.shape, ignore_index)
    log_q = oracles._log_softmax(student)
    size = torch.where(log_q.isinf(), 0.0, log_q.abs())
    # Smoothing adds the mean over the classes.
    rows = 1 + (target * size).sum(1) + size.mean(1)
    entries = log_q.exp() * (1 + size) * (1 + target.sum(1, keepdim=True)) + target + 1 / student.shape[1]
    return kept * rows, kept[:, None] * entries


def sizes_dkd(student, teacher, labels, temperature=4.0):
    target_s, rest_s = oracles._split(student, labels, temperature)
    target_t, rest_t = oracles._split(teacher, labels, temperature)
    rows_1, _ = _pair_sizes(target_t, target_s)
    rows_2, entries_2 = _pair_sizes(rest_t, rest_s)
    is_target = F.one_hot(labels.long(), student.shape[1]).bool()
    entries = torch.empty(student.shape, dtype=torch.float64, device=student.device)
    entries[~is_target] = (rows_1[:, None] * entries_2).flatten()
    entries[is_target] = rows_1
    return temperature**2 * (rows_1 + rows_2), temperature * entries


def of_rows(g, sizes, factor, sides=1):
    """Sizes of an op that counts each row `factor` times, and sums up the rows unless g has one number for each."""
    rows, entries = sizes
    factor = torch.as_tensor(factor, dtype=torch.float64, device=rows.device).expand_as(rows)
    value = factor * rows
    return value if g.dim() else value.sum(), *[(factor * g)[:, None] * entries] * sides


def share(reduction, student):
    return 1 / max(len(student), 1) if reduction in ("batchmean", "mean") else 1.0


def added(first, second):
    return tuple(a + b for a, b in zip(first, second, strict=True))


def equal(student):
    return student


def softmax_kl(name, temperature=1.0, beta=0.0, weighted=False, reduction="batchmean"):
    options = {"beta": beta, "reduction": reduction}
    if weighted:
        return Op(
            name,
            lambda o, student, teacher, weight: o.softmax_kl(student, teacher, temperature, weight=weight, **options),
            lambda g, student, teacher, weight: of_rows(
                g, sizes_kl(student, teacher, temperature), share(reduction, student) * weight, 2
            ),
            equal=equal,
        )
    return Op(
        name,
        lambda o, student, teacher: o.softmax_kl(student, teacher, temperature, **options),
        lambda g, student, teacher: of_rows(g, sizes_kl(student, teacher, temperature), share(reduction, student), 2),
        equal=equal,
    )


def top_k(name, temperature, has_rest=True, weighted=False, reduction="batchmean"):
    def teacher(values, indices, rest):
        return (values, indices, rest, temperature) if has_rest else (values, indices)

    def sizes(g, student, values, indices, rest, weight):
        kl = sizes_topk(student, teacher(values, indices, rest), temperature)
        return of_rows(g, kl, share(reduction, student) * (weight if weighted else 1))

    return Op(
        name,
        lambda o, student, values, indices, rest, weight: o.softmax_kl(
            student,
            teacher(values, indices, rest),
            temperature,
            weight=weight if weighted else None,
            reduction=reduction,
        ),
        sizes,
        unread=("weight",) * (not weighted) + ("rest",) * (not has_rest),
    )


def cross_entropy(name, labels="labels", label_smoothing=0.0, reduction="batchmean"):
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    if labels == "labels":
        return Op(
            name,
            lambda o, student, labels: o.cross_entropy(student, labels, **options),
            lambda g, student, labels: sizes_of_labels(g, student, labels, reduction),
        )
    return Op(
        name,
        lambda o, student, probabilities: o.cross_entropy(student, probabilities, **options),
        lambda g, student, probabilities: sizes_of_labels(g, student, probabilities, reduction),
    )


def sizes_of_labels(g, student, labels, reduction, sides=1):
    kept = len(student) if labels.is_floating_point() else int((labels >= 0).sum())
    factor = 1 / max(kept, 1) if reduction in ("batchmean", "mean") else 1.0
    return of_rows(g, sizes_ce(student, labels), factor, sides)


def cross_entropy_kl(
    name,
    labels="labels",
    temperature=1.0,
    kl_weight=1.0,
    ce_weight=1.0,
    label_smoothing=0.0,
    reduction="batchmean",
):
    options = {"kl_weight": kl_weight, "ce_weight": ce_weight}
    options |= {"label_smoothing": label_smoothing, "reduction": reduction}

    def sizes(g, student, teacher, targets):
        kl = of_rows(g, sizes_kl(student, teacher, temperature), kl_weight * share(reduction, student), 2)
        ce = [ce_weight * x for x in sizes_of_labels(g, student, targets, reduction, 2)]
        return added(kl, ce)

    if labels == "labels":
        return Op(
            name,
            lambda o, student, teacher, labels: o.cross_entropy_kl(student, teacher, labels, temperature, **options),
            lambda g, student, teacher, labels: sizes(g, student, teacher, labels),
        )
    return Op(
        name,
        lambda o, student, teacher, probabilities: o.cross_entropy_kl(
            student, teacher, probabilities, temperature, **options
        ),
        lambda g, student, teacher, probabilities: sizes(g, student, teacher, probabilities),
    )


def dkd(name, temperature=4.0, alpha=1.0, beta=2.0):
    return Op(
        name,
        lambda o, student, teacher, labels: o.dkd(student, teacher, labels, temperature, alpha=alpha, beta=beta),
        lambda g, student, teacher, labels: of_rows(
            g, sizes_dkd(student, teacher, labels, temperature), max(alpha, beta) / max(len(student), 1), 2
        ),
        equal=equal,
    )


def largest(name, t):
    t = t.sign() * 6e4
    t[:, 0] = 6e4
    return t


SHARED = {
    "small": (5, 9),
    "tiny": (3, 5),
    "half": (3, 1025),
    "laid_out": ((3, 35),),
    "cols": lambda x: x["student"].shape[1],
    "equal_shapes": ((3, 1), (3, 9), (3, 1025), (3, 2049)),
    "largest": largest,
    "far": (((3, 40), (FAR, 1)), ((5, 3), (1, FAR))),
    "deterministic": (
        (64, 100),  # several rows for each thread
        (2, 16385),  # a row that several blocks differentiate
        (1, 100_000),  # one row: nothing to split by rows
        (8193, 3),  # one row more than one block adds up
    ),
    "deterministic_simt": ((64, 100), (2, 16385)),
    "workload": (
        (3, 7),  # less than the eight elements that a thread reads at once
        (9, 33),  # one class more than a warp has lanes, one row more than a block has warps
        (2, 2049),  # the first row that a whole block reads
        (1, 16385),  # two blocks share the row's gradient
    ),
}
GROUPS = [
    Group(
        "softmax_kl",
        make,
        [
            softmax_kl("kl", 4.0),
            softmax_kl("kl_weighted", 0.5, weighted=True, reduction="sum"),
            softmax_kl("reverse", beta=1.0),
            softmax_kl("jsd", 2.0, beta=0.3, weighted=True, reduction="none"),
            cross_entropy("ce"),
            cross_entropy_kl("ce_kl", temperature=4.0, kl_weight=0.9, ce_weight=0.1),
            cross_entropy_kl("ce_kl_smooth", label_smoothing=0.1, reduction="none"),
            cross_entropy_kl("ce_kl_soft", "probabilities", 2.0, label_smoothing=0.2),
            dkd("dkd"),
            Op(
                "ce_kl_weighted",
                lambda o, student, teacher, labels, weight: o.cross_entropy_kl(
                    student, teacher, labels, 2.0, weight=weight, reduction="sum"
                ),
                lambda g, student, teacher, labels, weight: added(
                    of_rows(g, sizes_kl(student, teacher, 2.0), weight, 2),
                    of_rows(g, sizes_ce(student, labels), weight, 2),
                ),
            ),
            Op(
                "dkd_weighted",
                lambda o, student, teacher, labels, weight: o.dkd(
                    student, teacher, labels, 2.0, beta=2.0, weight=weight, reduction="none"
                ),
                lambda g, student, teacher, labels, weight: of_rows(
                    g, sizes_dkd(student, teacher, labels, 2.0), 2 * weight, 2
                ),
                equal=equal,
            ),
        ],
        cases=[
            (1, 1),  # one sample, one class: every divergence is 0, and DKD has no other class
            (2, 2),  # DKD's rest is a single class
            (4, 7),  # less than the eight elements that a CUDA thread reads at once
            (5, 9),  # one more
            (9, 33),  # one class more than a warp has lanes, one row more than a block has warps
            (2, 1025),  # one more than the 1024 elements that the CPU reads at a time
            (2, 2049),  # the first row that CUDA gives to a whole block
            (1, 16385),  # one element more than a block differentiates: two blocks share the row's gradient
        ],
        leaves=("student", "teacher"),
        layouts={"student": "rows", "teacher": "rows", "probabilities": "rows", "weight": "column", "labels": "column"},
        **SHARED,
    ),
    Group(
        "softmax_kl",
        lambda shape: dict(top_k_of(make(shape))),
        [
            top_k("topk", 4.0),
            top_k("topk_no_rest", 0.5, has_rest=False, weighted=True, reduction="none"),
        ],
        cases=[(1, 1), (2, 2), (4, 7), (5, 9), (9, 33), (2, 1025), (2, 2049), (1, 16385)],
        leaves=("student",),
        typed=("student", "values"),
        layouts={"student": "rows", "values": "rows", "rest": "column", "weight": "column"},
        **SHARED,
    ),
]


# ---- raw ops, programs -----------------------------------------------------------------------------------------------
def raw_calls(device):
    """-> (name, arguments) that need no gradient."""
    raw, group = torch.ops.kdfast, GROUPS[0]
    x = group.inputs(device, group.small, torch.float32)
    student, teacher, soft, weight, labels = x.values()
    of_tensor, kl, t = (torch.full((), 4.0, device=student.device), 1.0), (0.3, 8), (None, 4.0)
    grad, needs = torch.ones((), device=student.device), (True, True)
    smooth = (student, teacher, labels, weight, *t, 1.0, 8, 1.0, 8, 0.1, -100, True, True)
    dkd = (student, teacher, labels, None, *of_tensor, 1.0, 2.0, 8, True)
    calls = [
        ("softmax_kl", (student, teacher, weight, *t, *kl, True)),
        ("softmax_kl", (student, teacher, None, *of_tensor, *kl, False)),
        ("cross_entropy_kl", smooth),
        ("cross_entropy_kl", (student, None, soft, None, *of_tensor, 0.0, 1, 1.0, 8, 0.1, -100, False, False)),
        ("dkd", dkd),
        ("dkd", (student, teacher, labels, weight, *of_tensor, 1.0, 2.0, 8, False)),
    ]
    top = ops.TopK.of(teacher.double(), 3, 4.0)
    for rest, of_rows, reduce in ((top.rest.float(), weight, False), (None, None, True)):
        kept = (student, top.values.float(), top.indices, rest, of_rows, *of_tensor)
        calls.append(("softmax_kl_topk", (*kept, 1.0, 8, reduce)))
    _, stats = raw.softmax_kl(student, teacher, weight, *t, *kl, True)
    calls.append(("softmax_kl_backward", (grad, student, teacher, weight, None, stats, 4.0, *kl, *needs)))
    _, stats = raw.softmax_kl_topk(*calls[-2][1])
    calls.append(("softmax_kl_topk_backward", (grad, *kept[:6], stats, 1.0, 1.0, 8)))
    _, stats = raw.cross_entropy_kl(*smooth)
    backward = (grad, student, teacher, labels, weight, None, stats, 4.0, 1.0, 8, 0.1, True, False)
    calls.append(("cross_entropy_kl_backward", backward))
    _, stats = raw.dkd(*dkd)
    backward = (grad, student, teacher, labels, None, of_tensor[0], stats, 1.0, 1.0, 2.0, 8, False, True)
    return [*calls, ("dkd_backward", backward)]


PROGRAMS = [program_of(group) for group in GROUPS]


# ---- errors ----------------------------------------------------------------------------------------------------------
def bad_inputs():
    return torch.randn(5, 9), torch.randn(5, 9), torch.zeros(5, dtype=torch.long)


ERRORS = [
    (
        lambda s, t, y: ops.softmax_kl(s[0], t[0]),
        ValueError,
        r"student must be .*\(\.\.\., classes\), got shape \(9,\)",
    ),
    (
        lambda s, t, y: ops.softmax_kl(s, t[:, :8]),
        ValueError,
        r"teacher must have the student's shape \(5, 9\), got \(5, 8\)",
    ),
    (lambda s, t, y: ops.softmax_kl(s, y), ValueError, r"teacher must be \(batch, classes\) or"),
    (lambda s, t, y: ops.softmax_kl(s.long(), t), TypeError, "student must be float32, float64, float16 or bfloat16"),
    (lambda s, t, y: ops.softmax_kl(s, t.tolist()), TypeError, "teacher must be a torch.Tensor, got list"),
    (lambda s, t, y: ops.softmax_kl(s[:, :0], t[:, :0]), ValueError, "student must have at least one class"),
    (lambda s, t, y: ops.softmax_kl(s, t.to("meta")), ValueError, "teacher must be on the student's device"),
    (lambda s, t, y: ops.softmax_kl(s, t, 0.0), ValueError, "temperature must be finite and above 0, got 0.0"),
    (lambda s, t, y: ops.softmax_kl(s, t, float("nan")), ValueError, "temperature must be finite and above 0"),
    (lambda s, t, y: ops.softmax_kl(s, t, "4"), TypeError, "temperature must be a number, got str"),
    (lambda s, t, y: ops.softmax_kl(s, t, beta=1.5), ValueError, "beta must be from 0 to 1, got 1.5"),
    (lambda s, t, y: ops.softmax_kl(s, t, reduction="average"), ValueError, "reduction must be one of none, sum, mean"),
    (lambda s, t, y: ops.softmax_kl(s, t, weight=s[:4, 0]), ValueError, r"weight must have shape \(5,\), got \(4,\)"),
    (lambda s, t, y: ops.softmax_kl(s, t, weight=y), TypeError, "weight must be float32, float64, float16 or bfloat16"),
    (lambda s, t, y: ops.cross_entropy_kl(s, t, y[:4]), ValueError, r"labels must have shape \(5,\), got \(4,\)"),
    (lambda s, t, y: ops.cross_entropy_kl(s, t, y > 2), TypeError, "labels must be integers"),
    (lambda s, t, y: ops.cross_entropy_kl(s, t, None), TypeError, "labels must be a torch.Tensor, got NoneType"),
    (lambda s, t, y: ops.cross_entropy_kl(s, t, y.double()), TypeError, "labels must be integers of shape"),
    (
        lambda s, t, y: ops.cross_entropy_kl(s, t, y, label_smoothing=2),
        ValueError,
        "label_smoothing must be from 0 to 1",
    ),
    (lambda s, t, y: ops.cross_entropy_kl(s, t, y, kl_weight=float("inf")), ValueError, "kl_weight must be finite"),
    (lambda s, t, y: ops.cross_entropy(s, y, ce_weight=None), TypeError, "ce_weight must be a number, got NoneType"),
    (lambda s, t, y: ops.dkd(s, t, y.to("meta")), ValueError, "labels must be on the student's device"),
    (lambda s, t, y: ops.dkd(s, t, y, alpha="1"), TypeError, "alpha must be a number"),
    (lambda s, t, y: kdfast.KD(alpha=0.5)(s, t), ValueError, "labels are required"),
    (lambda s, t, y: kdfast.KD(alpha=2.0), ValueError, "alpha must be from 0 to 1"),
    (lambda s, t, y: kdfast.KD(temperature=-1), ValueError, "temperature must be finite and above 0, got -1"),
    (lambda s, t, y: kdfast.LabelRefinery()(s, y), TypeError, "teacher_probabilities must be float32"),
]
