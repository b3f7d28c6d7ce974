"""Several networks at once: mixtures of their logits, and several teachers of one student."""

import math

import oracles
import torch

import kdfast
from kdfast import ops
from registry import FAR, Group, Inputs, Op, Program, program_of

# An exponential below the smallest normal number may be 0, before a log-ratio of 1e4 multiplies it: see test_fuzz.py.
UNDERFLOW = 1e-26


def make(shape):
    """Logits of N networks [B, C], weights of their mixtures [B, N, N], labels, a ramp-up that is a tensor."""
    count, rows, classes = shape
    return {
        "networks": [3 * torch.randn(rows, classes, dtype=torch.float64) for _ in range(count)],
        "mix": torch.randn(rows, count, count, dtype=torch.float64).softmax(2),
        "labels": torch.randint(classes, (rows,)),
        "ramp": torch.tensor(0.25 + torch.rand(()).item(), dtype=torch.float32),
    }


def taught(x):
    """The first network as a student, the others as its teachers (of one alone: itself, turned over)."""
    student, *teachers = x["networks"]
    teachers = teachers or [student.flip(1)]
    weight = torch.linspace(1, 2, len(teachers), dtype=x["mix"].dtype, device=student.device) / 2
    return Inputs(student=student, teachers=teachers, weight=weight, labels=x["labels"])


# ---- ops -------------------------------------------------------------------------------------------------------------
def mixed_logits_kl(
    name, targets=None, learners=None, labels=True, temperature=3.0, ramped=False, gradcheck=False, **options
):
    """With the first `targets` rows of the weights; None: all of them, 0: no weights, the least logits."""

    def arguments(networks, mix, given, factor):
        mix = None if targets == 0 else mix[:, :targets]
        count = learners and min(learners, len(networks))
        named = {"learners": count, **options}
        return (networks, mix, given if labels else None, temperature), named | ({"ramp": factor} if ramped else {})

    def call(o, networks, mix, labels, ramp):
        positional, named = arguments(networks, mix, labels, ramp)
        return o.mixed_logits_kl(*positional, **named)

    flows = options.get("target_ce") or options.get("through_targets")

    def sizes(g, networks, mix, labels, ramp):
        positional, named = arguments(networks, mix, labels, ramp)
        value, entries, of_mix = oracles.sizes_mixed_logits_kl(*positional, **named)
        learns = len(networks) if flows else named["learners"] or len(networks)
        of_networks = [g * (e + UNDERFLOW) if i < learns else None for i, e in enumerate(entries)]
        if not flows:
            return value, *of_networks, *([] if targets == 0 else [None])
        wide = torch.zeros_like(mix)
        wide[:, : of_mix.shape[1]] = of_mix
        return value, *of_networks, g * wide

    def cols(x):
        count, classes = len(x["networks"]), x["networks"][0].shape[1]
        return [classes + 4 * count] * (1 + count) + [classes + 5 * count] * (targets != 0)

    smooth = (lambda value: value) if gradcheck else None
    unread = ["mix"] * (targets == 0) + ["labels"] * (not labels) + ["ramp"] * (not ramped)
    return Op(name, call, sizes, unread=tuple(unread), cols=cols, gradcheck=smooth)


def teachers_kl(name, kind="kl", labels=True, weighted=False, temperature=4.0, kl_weight=0.7):
    def call(o, student, teachers, weight, labels_given):
        if kind == "reverse_kl":
            teachers = [x.detach() for x in teachers] if isinstance(teachers, list) else teachers.detach()
        return o.teachers_kl(
            student,
            teachers,
            labels_given if labels else None,
            temperature,
            kind=kind,
            weight=weight if weighted else None,
            kl_weight=kl_weight,
        )

    def sizes(g, student, teachers, weight, labels_given):
        value, own, each = oracles.sizes_teachers_kl(
            student,
            teachers,
            labels_given if labels else None,
            temperature,
            kind=kind,
            weight=weight if weighted else None,
            kl_weight=kl_weight,
        )
        of_teachers = [None if kind == "reverse_kl" else g * (e + UNDERFLOW) for e in each]
        return value, g * (own + UNDERFLOW), *of_teachers

    return Op(
        name,
        lambda o, student, teachers, weight, labels: call(o, student, teachers, weight, labels),
        lambda g, student, teachers, weight, labels: sizes(g, student, teachers, weight, labels),
        unread=("weight",) * (not weighted) + ("labels",) * (not labels),
    )


SHARED = {
    "cases": [  # networks, rows, classes
        (1, 1, 1),  # one of each
        (2, 2, 2),
        (3, 5, 7),  # less than the eight elements that a CUDA thread reads at once
        (5, 9, 33),  # one class more than a warp has lanes, one row more than a block has warps
        (3, 2, 1025),  # one more than the 1024 elements that the CPU reads at a time
        (2, 2, 2049),  # the first row that CUDA gives to a whole block
        (17, 2, 20),  # more networks than anything is unrolled for
    ],
    "small": (3, 5, 9),
    "tiny": (3, 3, 4),
    "half": (3, 2, 45),
    "laid_out": ((3, 3, 35),),
    "batch": 1,
    # Under SIMT a thread is a fiber: what another case covers as well is left to the other implementations.
    "simt": lambda shape, dtype: dtype == torch.float32 or math.prod(shape) < 200,
    "far": (((2, 3, 40), (FAR, 1)), ((2, 5, 3), (1, FAR))),
    "deterministic": ((4, 64, 100), (3, 2, 5000), (2, 1, 30_000), (2, 4099, 3)),
    "deterministic_simt": ((3, 10, 40), (2, 1, 2100)),
    "workload": (
        (3, 3, 7),  # less than the eight elements that a thread reads at once
        (5, 9, 33),  # one class more than a warp has lanes, one row more than a block has warps
        (2, 2, 2049),  # the first row that a whole block reads
    ),
}
GROUPS = [
    Group(
        "ensemble",
        make,
        [
            mixed_logits_kl("one", 1, eps=1e-7, ramp=0.7, target_ce=True),
            mixed_logits_kl("ramp", 1, eps=1e-7, ramped=True, through_targets=True, target_ce=True),
            mixed_logits_kl("attention", eps=1e-7, kl_weight=0.5, through_targets=True, gradcheck=True),
            mixed_logits_kl("no_labels", labels=False, temperature=2.0, through_targets=True, gradcheck=True),
            mixed_logits_kl("shared_target", 1, temperature=1.0, through_targets=True, target_ce=True, eps=1e-3),
            mixed_logits_kl("constant", 1, learners=2, temperature=0.5),
            mixed_logits_kl("least", 0, temperature=2.0, kl_weight=0.3),
        ],
        leaves=("networks", "mix"),
        fixed=("ramp",),
        cols=None,
        largest=lambda name, t: t if name == "mix" else t.sign() * 6e4,
        layouts={
            "networks": "rows",
            "mix": lambda t: torch.stack([t, t], 3)[..., 1].transpose(1, 2),
            "labels": "column",
        },
        **SHARED,
    ),
    Group(
        "ensemble",
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
    raw, group = torch.ops.kdfast, GROUPS[0]
    z, mix, y, ramp = group.inputs(device, group.small, torch.float32).values()
    grad = torch.ones((), device=mix.device)
    scales, of_tensor = (3.0, 1e-7, 1.0, 0.5, 8), torch.full((), 2.0, device=mix.device)
    calls = []
    for arguments, flows in (
        ((z, mix, y, ramp, None, 3, *scales, True), (True, True)),
        ((z, mix[:, :1], None, None, of_tensor, 2, *scales, False), (False, False)),
        ((z, None, y, None, None, 3, *scales, False), (False, False)),
        ((z, mix[:, :2, :2], y, None, of_tensor, 3, *scales, False), (True, True)),  # the third network leads
    ):
        _, stats = raw.mixed_logits_kl(*arguments)
        backward = (grad, *arguments[:5], stats, *arguments[5:], *flows)
        calls += [("mixed_logits_kl", arguments), ("mixed_logits_kl_backward", backward)]
    student, *teachers = z
    for kind, labels, weight, needs in (
        ("kl", y, mix[0, 0, :2], (True, True)),
        ("cross_entropy", None, None, (False, True)),
        ("reverse_kl", y, None, (True, False)),
    ):
        arguments = (student, teachers, labels, weight, of_tensor if labels is None else None)
        constants = (kind, 2.0, 1.0, 8, 0.5, 8)
        _, stats = raw.teachers_kl(*arguments, *constants)
        backward = (grad, *arguments, stats, *constants, *needs)
        calls += [("teachers_kl", (*arguments, *constants)), ("teachers_kl_backward", backward)]
    gram = torch.eye(3, dtype=torch.float64, device=mix.device)
    calls.append(("aekd", (student, teachers, None, 4.0, 1.0, 8, 0.6, False)))
    return [*calls, ("simplex_minimum", (gram, gram[0], 0.6))]


def make_logits(device, rows, dtype):
    x = GROUPS[0].inputs(device, GROUPS[0].rows(rows), dtype)
    return [*x["networks"], x["labels"]]


def aekd(student, *others):
    return ops.aekd(student, list(others[:-1]))[0]


KDCL = [kdfast.KDCL(rule=rule) for rule in kdfast.KDCL.RULES]


def kdcl(*given):
    """By every rule."""
    networks, labels = list(given[:-1]), given[-1]
    return sum(loss(networks, labels) for loss in KDCL)


PROGRAMS = [
    *map(program_of, GROUPS),
    Program("ensemble, AE-KD", aekd, make_logits),
    Program("ensemble, KDCL", kdcl, make_logits, graph=False),
]


# ---- errors ----------------------------------------------------------------------------------------------------------
def bad_inputs():
    return [torch.randn(5, 9) for _ in range(3)], torch.rand(5, 3, 3), torch.zeros(5, dtype=torch.long)


ERRORS = [
    (lambda z, m, y: ops.mixed_logits_kl(z[0], m), ValueError, r"networks must be a list .* got shape \(5, 9\)"),
    (lambda z, m, y: ops.mixed_logits_kl("z", m), TypeError, "networks must be a list .* got str"),
    (lambda z, m, y: ops.mixed_logits_kl([], m), ValueError, "networks must have from 1 to 128 networks, got 0"),
    (lambda z, m, y: ops.mixed_logits_kl(z * 43, m), ValueError, "from 1 to 128 networks, got 129"),
    (lambda z, m, y: ops.mixed_logits_kl([z[0], 3], m), TypeError, r"networks\[1\] must be a torch.Tensor, got int"),
    (lambda z, m, y: ops.mixed_logits_kl([z[0].long()], m), TypeError, r"networks\[0\] must be float32"),
    (lambda z, m, y: ops.mixed_logits_kl([z[0][0]], m), ValueError, r"networks\[0\] must be \(B, C\), or \(M, B, C\)"),
    (
        lambda z, m, y: ops.mixed_logits_kl([z[0], z[1][:, :8], z[2]], m),
        ValueError,
        r"networks\[1\] must have networks\[0\]'s batch and classes \(5, 9\), got shape \(5, 8\)",
    ),
    (lambda z, m, y: ops.mixed_logits_kl([z[0][:, :0]], m), ValueError, "must have at least one class"),
    (
        lambda z, m, y: ops.mixed_logits_kl([z[0], z[1].to("meta")], m),
        ValueError,
        r"networks\[1\] must be on networks\[0\]'s device cpu, got meta",
    ),
    (lambda z, m, y: ops.mixed_logits_kl(z, m[:, :2]), ValueError, r"shape \(5, 3\) or \(5, 1, 3\) or \(5, 3, 3\)"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m[:4]), ValueError, "mix must have the shape"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m.long()), TypeError, "mix must be float32"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m, learners=4), ValueError, "learners must be at most the 3 networks"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m, learners=0), ValueError, "learners must be at least 1"),
    (lambda z, m, y: ops.mixed_logits_kl(z, None), ValueError, "labels must be given without mix"),
    (lambda z, m, y: ops.mixed_logits_kl(z, None, y, target_ce=True), ValueError, "mix must be given with target_ce"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m, target_ce=True), ValueError, "labels must be given with target_ce"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m, y[:4]), ValueError, r"labels must have shape \(5,\), got \(4,\)"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m, y, 0.0), ValueError, "temperature must be finite and above 0"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m, eps=-1.0), ValueError, "eps must be from 0 to 1"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m, eps=1e-40), ValueError, "eps must be 0 or from 1e-30 to 1"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m, ramp=m[0, 0]), ValueError, "ramp must be a number or a 0-d tensor"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m, ramp="1"), TypeError, "ramp must be a number, got str"),
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
    (lambda z, m, y: kdfast.ONE()(z, m[:, 0, :2], y, 0), ValueError, r"gate must have shape \(5, 3\), got \(5, 2\)"),
    (lambda z, m, y: kdfast.ONE()(z, m[:, 0], y, "0"), TypeError, "epoch must be an int or a 0-d tensor, got str"),
    (lambda z, m, y: kdfast.ONE()(z, m[:, 0], y, y), ValueError, "epoch must be an int or a 0-d tensor, got shape"),
    (lambda z, m, y: kdfast.ONE()(z, m[:, 0], None, 0), ValueError, "labels must be given with target_ce"),
    (lambda z, m, y: kdfast.ONE(rampup_epochs=-1), ValueError, "rampup_epochs must be from 0"),
    (
        lambda z, m, y: kdfast.OKDDip()(z[:2], z[2], m, y, 0),
        ValueError,
        r"attention must have shape \(5, 2, 2\), got \(5, 3, 3\)",
    ),
    (
        lambda z, m, y: kdfast.OKDDip()(z[:2], z[2][:, :8], m[:, :2, :2], y, 0),
        ValueError,
        r"leader must have the heads' shape \(5, 9\), got \(5, 8\)",
    ),
    (lambda z, m, y: kdfast.FFL()(z[:2], z[2][None], y, 0), ValueError, r"fused must be 2-D \(batch, classes\)"),
    (lambda z, m, y: kdfast.FFL()(z[:2], z[2].to("meta"), y, 0), ValueError, "on the first head's device cpu"),
    (lambda z, m, y: kdfast.OKDDipAttention(7), ValueError, "features must be at least 8"),
    (lambda z, m, y: kdfast.CollaborativeLearning()(z[:1], y), ValueError, "logits must have at least 2 heads, got 1"),
    (
        lambda z, m, y: kdfast.CollaborativeLearning(rampup_epochs=5)(z, y),
        ValueError,
        "epoch must be given with rampup_epochs=5",
    ),
    (lambda z, m, y: kdfast.KDCL(rule="best"), ValueError, "rule must be one of naive, linear, minlogit"),
    (lambda z, m, y: kdfast.Codistillation("kl"), ValueError, "mode must be one of cross_entropy, reverse_kl"),
    (lambda z, m, y: kdfast.FusionModule(4, 9, 3)([m[:, :, :, None]]), TypeError, "maps must be a list of two maps"),
    (
        lambda z, m, y: kdfast.FusionModule(4, 9, 3)([m[..., None]] * 2),
        ValueError,
        r"maps\[0\] must have shape \(B, 4, 3, 3\), got \(5, 3, 3, 1\)",
    ),
    (lambda z, m, y: kdfast.rescale_gradient(z[0], 0), ValueError, "heads must be at least 1"),
]
