"""Feature maps compared element by element."""

import oracles
import torch

import kdfast
from kdfast import ops
from kdfast.ops.layout import flat
from registry import FAR, SQUARED_ROUNDING, Bench, Group, Op, Program, program_of, scaled


def make(shape):
    """Student, teacher, margins below zero that have few digits."""
    student, teacher = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    margin = -(torch.arange(1, shape[1] + 1, dtype=torch.float32) % 7) / 4 - 0.25
    return {"student": student, "teacher": teacher, "margin": margin}


# ---- ops -------------------------------------------------------------------------------------------------------------
def sizes_normalized(student, teacher, power=1):
    """-> value, entries of both gradients; a unit vector's entry is off by a rounding of itself."""
    s, t = oracles._units(student, teacher)
    both, elements = s.abs() + t.abs(), s.numel()
    if power == 1:
        value, slope = both.mean(), torch.ones_like(s)
    else:
        value, slope = (2 * (s - t).abs() * both + both.square() * SQUARED_ROUNDING).mean(), 2 * both
    entries = [
        (slope + unit.abs() * (slope * unit.abs()).sum(1, keepdim=True))
        / (x.flatten(1).norm(dim=1, keepdim=True) * elements)
        for unit, x in ((s, student), (t, teacher))
    ]
    return value, *(e.view(x.shape) for e, x in zip(entries, (student, teacher), strict=True))


def sizes_pyramid(student, teacher):
    """Averages of differences without sign, as the value and its gradient take them."""
    leaf = (student - teacher).abs().requires_grad_()
    value = oracles.pyramid_error(leaf, torch.zeros_like(leaf))
    (entries,) = torch.autograd.grad(value, leaf)
    return value.detach(), entries, entries


def gradients_only(x, kernel):
    """Nothing of the size of a map but the gradients."""
    return sum(t.nbytes for t in (x["student"], x["teacher"])) + 4096 if kernel else None


def equal(student):
    return student


def of_pair(name, call):
    return Op(name, call, equal=equal, memory=gradients_only)


def boundary(name, margin, reduction="sum"):
    """No gradient to the teacher; equal networks are at distance 0 from the margin on."""
    return Op(
        name,
        lambda o, student, teacher: o.activation_boundary(student, teacher, margin, reduction=reduction),
        equal=lambda student: 2 * student.sign(),
        memory=lambda x, kernel: x["student"].nbytes + 4096 if kernel else None,
    )


def partial(name, reduction="sum", margin_shape=(-1,)):
    return of_pair(
        name,
        lambda o, student, teacher, margin: o.partial_squared_error(
            student, teacher, margin.view(margin_shape), reduction=reduction
        ),
    )


def normalized(name, power):
    return Op(
        name,
        lambda o, student, teacher: o.normalized_error(student, teacher, power),
        lambda g, student, teacher: scaled(g, sizes_normalized(student, teacher, power)),
        equal=equal,
        memory=gradients_only,
    )


def pyramid():
    return Op(
        "pyramid",
        lambda o, student, teacher: o.pyramid_error(student, teacher),
        lambda g, student, teacher: scaled(g, sizes_pyramid(student, teacher)),
        images=True,
        equal=equal,
        memory=gradients_only,
    )


GROUPS = [
    Group(
        "feature",
        make,
        [
            of_pair("squared", lambda o, student, teacher: o.squared_error(student, teacher)),
            Op(
                "channels",
                lambda o, student, teacher: o.channel_squared_error(student, teacher),
                formula=lambda student, teacher: (student - teacher).square().transpose(0, 1).flatten(1).sum(1),
                equal=equal,
                memory=gradients_only,
                bench=Bench(((64, 256, 14, 14), (64, 256, 56, 56))),
            ),
            boundary("boundary", 0.5),
            boundary("boundary_none", 2.0, reduction="none"),
            partial("partial"),
            partial("partial_none", "none", (1, -1, 1, 1)),
            partial("partial_mean", "mean"),
            normalized("normalized", 1),
            normalized("normalized_2", 2),
            pyramid(),
        ],
        cases=[  # B, C, H, W
            (1, 1, 1, 1),
            (2, 3, 1, 1),  # no positions: the channels are neighbours in every layout
            (3, 5, 7, 9),  # windows of the pyramid that overlap
            (2, 3, 2, 5),  # fewer rows than the pyramid's windows; columns are not asked
            (2, 33, 4, 3),  # one channel more than a warp has lanes
            (1, 130, 8, 8),  # one block of 128 channels, and two more; 8320 elements are more than a GPU block takes
            (1, 2, 33, 35),  # a channel longer than a chunk of 1024
            (1, 12, 53, 52),  # one channel more than the CPU takes at once of maps as large as this
        ],
        channels_last=((2, 131, 5, 6),),  # more channels than the CPU or a block of the GPU takes at once
        small=(3, 5, 6, 5),
        tiny=(1, 2, 5, 1),
        laid_out=((2, 4, 6, 5),),
        other_dims=((3, 5), (3, 5, 12), (3, 5, 2, 3, 2)),
        leaves=("student", "teacher"),
        fixed=("margin",),
        cols=lambda x: x["student"][0].numel(),
        layouts={"student": "maps", "teacher": "maps"},
        equal_shapes=((3, 5, 6, 5), (2, 3, 33, 35)),
        elementwise=True,
        largest=lambda name, t: t.clamp(-1, 1) * 6e4,
        largest_upstream=1e-3,
        far=(((3, 4, 5, 4), (FAR, 20, 4, 1)), ((3, 4, 5, 4), (FAR, 1, 16, 4))),
        deterministic=(
            (5, 3, 9, 7),
            (2, 40, 60, 50),  # several pieces of a sample, and groups of samples
            (70, 130, 2, 2),  # more rows than a block adds up
        ),
        deterministic_simt=((5, 3, 9, 7),),
        memory=(4, 16, 64, 64),
        simt=lambda shape, dtype: shape != (1, 12, 53, 52),  # no boundary of the CUDA kernels
        workload=(
            (2, 3, 1, 5),  # less than the elements that a thread reads at once
            (3, 33, 5, 7),  # one channel more than a warp has lanes, windows that overlap
            (5, 130, 8, 8),  # more elements of a sample, and more positions, than a block takes
        ),
    )
]


# ---- raw ops, programs -----------------------------------------------------------------------------------------------
def raw_calls(device):
    student, teacher, margin = GROUPS[0].inputs(device, GROUPS[0].small, torch.float32).values()
    pair, grad = [flat(x) for x in (student, teacher)], student.new_tensor(2.0)
    maps_last = [x.contiguous(memory_format=torch.channels_last) for x in (student, teacher)]
    last = [flat(x) for x in maps_last]
    stats = torch.ops.kdfast.normalized_error(*pair, 1)[1]
    per_channel, per_sample = student.new_ones(5), student.new_ones(3)
    return [
        ("feature_error", (*pair, None, 0, 0.0, 0, 2)),
        ("feature_error", (*last, None, 0, 0.0, 2, 2)),
        ("feature_error", (*pair, None, 1, 1.5, 1, 2)),
        ("feature_error", (*pair, margin, 2, 0.0, 1, 2)),
        ("feature_error_backward", (grad, *last, None, 0, 0.0, 0, 2, True, True)),
        ("feature_error_backward", (per_channel, *pair, None, 0, 0.0, 2, 2, True, False)),
        ("feature_error_backward", (per_sample, *pair, margin, 2, 0.0, 1, 2, False, True)),
        ("normalized_error", (*pair, 1)),
        ("normalized_error_backward", (grad, *last, stats, 1, True, True)),
        ("pyramid_error", (student, teacher)),
        ("pyramid_error_backward", (grad, student, teacher, True, True)),
        ("pyramid_error_backward", (grad, *maps_last, True, False)),
    ]


def losses(student, teacher, weight):
    layers = [student, student * 2], [teacher, teacher + 1]
    margin = kdfast.ofd_margin(weight, weight)
    return (
        kdfast.FitNets()(*layers)
        + kdfast.FT()(*layers)
        + kdfast.AB(reduction="mean")(*layers)
        + kdfast.OFD(reduction="mean")(*layers, [margin, margin])
        + kdfast.HCL()(*layers)
    )


def make_layers(device, rows, dtype):
    student, teacher, _ = GROUPS[0].inputs(device, (rows, 4, 6, 5), dtype).values()
    return [student, teacher, torch.rand(4, device=device)]


PROGRAMS = [
    *(program_of(GROUPS[0], memory_format) for memory_format in GROUPS[0].memory_formats),
    Program("feature, losses", losses, make_layers, 3),
]


# ---- errors ----------------------------------------------------------------------------------------------------------
def bad_inputs():
    return torch.randn(3, 5, 6, 5), torch.randn(3, 5, 6, 5)


ERRORS = [
    (lambda s, t: ops.squared_error(s[0, 0, 0], t), ValueError, r"student must be \(batch, features\)"),
    (
        lambda s, t: ops.squared_error(s, t[:2]),
        ValueError,
        r"teacher must have the student's shape \(3, 5, 6, 5\), got \(2, 5, 6, 5\)",
    ),
    (lambda s, t: ops.squared_error(s.long(), t), TypeError, "student must be float32, float64, float16 or bfloat16"),
    (lambda s, t: ops.channel_squared_error(s, [1.0]), TypeError, "teacher must be a torch.Tensor, got list"),
    (lambda s, t: ops.squared_error(s, t.to("meta")), ValueError, "teacher must be on the student's device cpu"),
    (lambda s, t: ops.activation_boundary(s, t, "1"), TypeError, "margin must be a number, got str"),
    (lambda s, t: ops.activation_boundary(s, t, reduction="max"), ValueError, "reduction must be one of none, sum"),
    (
        lambda s, t: ops.partial_squared_error(s, t, torch.zeros(6)),
        ValueError,
        r"margin must be \(5,\) or \(1, 5, 1, 1\), got shape \(6,\)",
    ),
    (lambda s, t: ops.partial_squared_error(s, t, -1.0), TypeError, "margin must be a torch.Tensor, got float"),
    (lambda s, t: ops.normalized_error(s, t, 3), ValueError, "power must be 1 or 2, got 3"),
    (lambda s, t: ops.pyramid_error(s[0], t[0]), ValueError, r"student must be \(batch, channels, height, width"),
    (
        lambda s, t: kdfast.FitNets()([s, s], [t]),
        ValueError,
        "student and teacher must have as many layers, and at least one, got 2 and 1",
    ),
    (lambda s, t: kdfast.FitNets()([], []), ValueError, "as many layers, and at least one, got 0 and 0"),
    (lambda s, t: kdfast.FitNets()(s, 1.0), TypeError, "teacher must be a torch.Tensor, got float"),
    (lambda s, t: kdfast.FitNets()(s, t[:2]), ValueError, r"teacher must have the student's shape \(3, 5, 6, 5\)"),
    (
        lambda s, t: kdfast.FT()(s[0, 0, 0], t),
        ValueError,
        r"student_factor must be \(batch, features\) or \(batch, ...\)",
    ),
    (
        lambda s, t: kdfast.HCL()([s, s], [t, t[:1]]),
        ValueError,
        r"teacher\[1\] must have student\[1\]'s shape \(3, 5, 6, 5\), got \(1, 5, 6, 5\)",
    ),
    (lambda s, t: kdfast.HCL()([s, s[0]], [t, t[0]]), ValueError, r"student\[1\] must be \(batch, channels, height"),
    (
        lambda s, t: kdfast.OFD()([s], [t], []),
        ValueError,
        "student, teacher and margin must have as many layers, and at least one, got 1, 1 and 0",
    ),
    (
        lambda s, t: kdfast.OFD()([s], [t], torch.zeros(5)),
        TypeError,
        "student, teacher and margin must all be tensors, or all lists with one per layer, got list, list and Tensor",
    ),
    (lambda s, t: kdfast.OFD()(s, t, None), TypeError, "margin must be a torch.Tensor, got NoneType"),
    (
        lambda s, t: kdfast.OFD()([s, s], [t, t], [torch.zeros(5), torch.zeros(4)]),
        ValueError,
        r"margin\[1\] must be \(5,\) or \(1, 5, 1, 1\), got shape \(4,\)",
    ),
    (lambda s, t: kdfast.AB(margin=None), TypeError, "margin must be a number, got NoneType"),
    (lambda s, t: kdfast.OFD(reduction="b"), ValueError, "reduction must be one of"),
    (lambda s, t: kdfast.VID(4, 5, 5)(s, t), ValueError, r"student must have student_channels=4 channels, got shape"),
    (lambda s, t: kdfast.VID(5, 5, 4)(s, t), ValueError, r"teacher must have teacher_channels=4 channels, got shape"),
    (lambda s, t: kdfast.VID(5, 5, 5)(s, t[:1]), ValueError, "teacher must have the student's batch size 3"),
    (
        lambda s, t: kdfast.VID(5, 5, 5)([s, s], [t, t[:, :4]]),
        ValueError,
        r"teacher\[1\] must have teacher_channels=5 channels, got shape \(3, 4, 6, 5\)",
    ),
    (lambda s, t: kdfast.VID(5, 5.0, 5), TypeError, "mid_channels must be an int"),
    (
        lambda s, t: kdfast.VID(5, 5, 5, init_variance=1e-6),
        ValueError,
        "init_variance must be above eps=1e-05, got 1e-06",
    ),
    (
        lambda s, t: kdfast.HintRegressor((1, 4, 5, 5), (1, 4, 7, 7)),
        ValueError,
        "student_shape must be as large as teacher_shape, or half or twice its size, got 5 x 5 for 7 x 7",
    ),
    (lambda s, t: kdfast.HintRegressor((4, 5, 5), t.shape), ValueError, r"student_shape must be \(batch, channels, "),
    (lambda s, t: kdfast.Paraphraser(4, 0), ValueError, "factors must be at least 1, got 0"),
    (lambda s, t: kdfast.ofd_margin(s, s), ValueError, r"weight must have \(channels,\), got shape \(3, 5, 6, 5\)"),
    (
        lambda s, t: kdfast.ofd_margin(torch.ones(3), torch.ones(4)),
        ValueError,
        r"bias must have weight's shape \(3,\), got shape \(4,\)",
    ),
    (
        lambda s, t: kdfast.JacobianMatching()(s[0, 0], t[0, 0], s[0], torch.zeros(6, dtype=torch.long)),
        ValueError,
        "images must have the student's batch size 6",
    ),
    (
        lambda s, t: kdfast.JacobianMatching()(s[0, 0], t[0, 0], s[0, 0], torch.zeros(6, dtype=torch.long)),
        ValueError,
        "images must require a gradient before both networks run",
    ),
    (
        lambda s, t: kdfast.JacobianMatching()(
            s[0, 0], t[0, 0], s[0, 0].clone().requires_grad_(), torch.zeros(6, dtype=torch.long)
        ),
        ValueError,
        "teacher must be logits with their graph from images",
    ),
    (
        lambda s, t: kdfast.JacobianMatching()(
            s[0, 0], t[0, 0], s[0, 0].clone().requires_grad_(), torch.full((6,), 5, dtype=torch.long)
        ),
        ValueError,
        r"labels\[0\] is 5, expected a class from 0 to 4",
    ),
]
