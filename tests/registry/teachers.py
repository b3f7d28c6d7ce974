"""Several teachers of one student."""

import torch

import kdfast
from kdfast import ops
from registry import Group, Inputs, Op, Program, program_of
from registry._networks import SHARED, UNDERFLOW, make, make_logits
from registry.softmax_kl import sizes_ce, sizes_kl


def taught(x):
    """The first network as a student, the others as its teachers (of one alone: itself, turned over)."""
    student, *teachers = x["networks"]
    teachers = teachers or [student.flip(1)]
    weight = torch.linspace(1, 2, len(teachers), dtype=x["mix"].dtype, device=student.device) / 2
    return Inputs(student=student, teachers=teachers, weight=weight, labels=x["labels"])


# ---- ops -------------------------------------------------------------------------------------------------------------
def sizes_teachers_kl(
    student, teachers, labels=None, temperature=1.0, *, kind="kl", weight=None, kl_weight=1.0, ce_weight=1.0
):
    """-> value; entries of the gradients in the student and, [M, rows, cols], in the teachers."""
    count, share = len(teachers), 1 / max(1, len(student))
    factors = [1.0 if kind == "kl" else 1 / count] * count if weight is None else weight.double().abs()
    parts = [sizes_kl(student, x, temperature) for x in teachers]
    value = share * abs(kl_weight) * sum(a * rows.sum() for a, (rows, _) in zip(factors, parts, strict=True))
    each = [share * abs(kl_weight) * a * entries for a, (_, entries) in zip(factors, parts, strict=True)]
    entries = sum(each)
    if labels is not None:
        rows, of_labels = sizes_ce(student, labels)
        value, entries = value + share * ce_weight * rows.sum(), entries + share * ce_weight * of_labels
    return value, entries, torch.stack(each)


def teachers_kl(name, kind="kl", labels=True, weighted=False, temperature=4.0, kl_weight=0.7):
    constant, has_labels = kind == "reverse_kl", labels

    def arguments(student, teachers, weight, labels):
        given = (student, teachers, labels if has_labels else None, temperature)
        return given, {"kind": kind, "weight": weight if weighted else None, "kl_weight": kl_weight}

    def call(o, student, teachers, weight, labels):
        if constant:
            teachers = [x.detach() for x in teachers] if isinstance(teachers, list) else teachers.detach()
        given, options = arguments(student, teachers, weight, labels)
        return o.teachers_kl(*given, **options)

    def sizes(g, student, teachers, weight, labels):
        given, options = arguments(student, teachers, weight, labels)
        value, own, each = sizes_teachers_kl(*given, **options)
        return value, g * (own + UNDERFLOW), *(None if constant else g * (e + UNDERFLOW) for e in each)

    return Op(name, call, sizes, unread=("weight",) * (not weighted) + ("labels",) * (not labels))


GROUPS = [
    Group(
        "teachers",
        lambda shape: dict(taught(make(shape))),
        [
            teachers_kl("kl", weighted=True),
            teachers_kl("kl_sum", labels=False, temperature=1.0),
            teachers_kl("cross_entropy", "cross_entropy", labels=False, temperature=2.0),
            teachers_kl("reverse_kl", "reverse_kl", temperature=1.0),
        ],
        leaves=("student", "teachers"),
        cols=lambda x: x["student"].shape[1] + 4 * (1 + len(x["teachers"])),
        layouts={"student": "rows", "teachers": "rows", "labels": "column"},
        contiguous=False,
        **SHARED,
    ),
]


# ---- raw ops, programs -----------------------------------------------------------------------------------------------
def raw_calls(device):
    raw = torch.ops.kdfast
    student, teachers, weight, y = GROUPS[0].inputs(device, GROUPS[0].small, torch.float32).values()
    grad, of_tensor = (torch.full((), x, device=student.device) for x in (1.0, 2.0))
    calls = []
    for kind, labels, weighted, needs in (
        ("kl", y, weight, (True, True)),
        ("cross_entropy", None, None, (False, True)),
        ("reverse_kl", y, None, (True, False)),
    ):
        arguments = (student, teachers, labels, weighted, of_tensor if labels is None else None)
        constants = (kind, 2.0, 1.0, 8, 0.5, 8)
        _, stats = raw.teachers_kl(*arguments, *constants)
        backward = (grad, *arguments, stats, *constants, *needs)
        calls += [("teachers_kl", (*arguments, *constants)), ("teachers_kl_backward", backward)]
    gram = torch.eye(3, dtype=torch.float64, device=student.device)
    calls.append(("aekd", (student, teachers, None, 4.0, 1.0, 8, 0.6, False)))
    return [*calls, ("simplex_minimum", (gram, gram[0], 0.6))]


def aekd(student, *others):
    return ops.aekd(student, list(others[:-1]))[0]


PROGRAMS = [program_of(GROUPS[0]), Program("teachers, AE-KD", aekd, make_logits)]


# ---- errors ----------------------------------------------------------------------------------------------------------
def bad_inputs():
    return [torch.randn(5, 9) for _ in range(3)], torch.rand(5, 3, 3), torch.zeros(5, dtype=torch.long)


ERRORS = [
    (lambda z, m, y: ops.teachers_kl(z, z), TypeError, "student must be a torch.Tensor, got list"),
    (
        lambda z, m, y: ops.teachers_kl(z[0], [z[1][:4]]),
        ValueError,
        r"teachers\[0\] must have the student's batch and classes \(5, 9\), got shape \(4, 9\)",
    ),
    (lambda z, m, y: ops.teachers_kl(z[0], z, kind="js"), ValueError, "kind must be one of kl, cross_entropy, rev"),
    (lambda z, m, y: ops.teachers_kl(z[0], z, weight=m[0, 0, :2]), ValueError, r"weight must have shape \(3,\)"),
    (
        lambda z, m, y: ops.teachers_kl(z[0], z, kind="cross_entropy", weight=m[0, 0]),
        ValueError,
        "weight belongs to kind 'kl'",
    ),
    (
        lambda z, m, y: ops.teachers_kl(z[0], z, weight=m[0, 0].clone().requires_grad_()),
        ValueError,
        "weight must not require a gradient",
    ),
    (
        lambda z, m, y: ops.teachers_kl(z[0], [z[1].clone().requires_grad_()], kind="reverse_kl"),
        ValueError,
        "teachers must not require a gradient with kind 'reverse_kl'",
    ),
    (lambda z, m, y: ops.aekd(z[0], z[1:], slack=1.5), ValueError, "slack must be from 0 to 1, got 1.5"),
    (lambda z, m, y: ops.aekd(z[0], []), ValueError, "teachers must have from 1 to 128 networks, got 0"),
    (lambda z, m, y: kdfast.Codistillation("kl"), ValueError, "mode must be one of cross_entropy, reverse_kl"),
]
