"""Attention maps of a student and a teacher."""

import oracles
import torch

import kdfast
from kdfast import ops
from registry import FAR, SQUARED_ROUNDING, Group, Op, Program, program_of, scaled


def make(shape):
    """Maps, the teacher's with other channels."""
    shapes = {"student": shape, "teacher": (shape[0], shape[1] // 2 + 1, *shape[2:])}
    return {name: torch.randn(*s, dtype=torch.float64) for name, s in shapes.items()}


def sizes_attention(student, teacher, power=2):
    """A map is off by a rounding of the sum of |x|^p, the terms of which cancel where p is odd."""
    norms, terms, units = [], [], []
    for x in (student, teacher):
        norms.append(x.pow(power).sum(1).flatten(1).norm(dim=1, keepdim=True).clamp(min=1e-12 * x.shape[1]))
        terms.append(x.abs().pow(power).sum(1).flatten(1) / norms[-1])
        units.append(oracles._unit_map(x, power))
    gap, size = (units[0] - units[1]).abs(), terms[0] + terms[1]
    value = (2 * gap * size).mean() + SQUARED_ROUNDING * size.pow(2).mean()
    gradients = []
    for x, q, t, norm in zip((student, teacher), units, terms, norms, strict=True):
        along = (q.abs() * size).sum(1, keepdim=True) + (t * gap).sum(1, keepdim=True)
        slope = 2 * power / max(gap.numel(), 1) * (size + t * along) / norm
        gradients.append(slope.view(len(x), 1, *x.shape[2:]) * x.abs().pow(power - 1))
    return value, *gradients


def attention_transfer(power):
    return Op(
        f"power{power}",
        lambda o, student, teacher: o.attention_transfer(student, teacher, power),
        lambda g, student, teacher: scaled(g, sizes_attention(student, teacher, power)),
        equal=lambda student: student,
        memory=lambda x, kernel: x["student"].nbytes * (1 + 4 / 64) + x["teacher"].nbytes if kernel else None,
    )


GROUPS = [
    Group(
        "attention",
        make,
        [attention_transfer(power) for power in (1, 2, 3, 4)],
        cases=[  # batch, channels, height, width
            (1, 1, 1, 1),
            (3, 4, 1, 5),
            (2, 3, 5, 4),
            (2, 33, 2, 3),  # more channels than a warp has lanes
            (2, 5, 17, 16),  # positions for more than one of a block's pieces of 256
            (2, 1100, 1, 3),  # channels in more than one chunk
        ],
        small=(3, 6, 4, 5),
        tiny=(2, 2, 1, 3),
        laid_out=((3, 6, 4, 5), (2, 40, 3, 7)),
        leaves=("student", "teacher"),
        cols=lambda x: max(max(t.shape[1], t[0, 0].numel()) for t in x.values()),
        layouts={"student": "maps", "teacher": "maps"},
        equal_shapes=((3, 6, 4, 5), (2, 40, 7, 9)),
        largest=lambda name, t: t.sign() * 6e4 * torch.rand_like(t),
        far=(((3, 4, 5, 4), (FAR, 20, 4, 1)), ((3, 4, 5, 4), (FAR, 1, 16, 4))),
        deterministic=((3, 70, 17, 16), (3, 9, 48, 50)),
        deterministic_simt=((3, 70, 17, 16),),  # CUDA has no pieces of 2048 positions
        memory=(4, 64, 20, 20),
        workload=(
            (2, 3, 1, 5),  # fewer positions and channels than a vector
            (3, 33, 5, 7),  # one channel more than a tile
            (2, 20, 6, 11),  # positions of three tiles
        ),
    )
]


# ---- raw ops, programs -----------------------------------------------------------------------------------------------
def raw_calls(device):
    student, teacher = (x.flatten(2) for x in GROUPS[0].inputs(device, GROUPS[0].small, torch.float32).values())
    grad, slope = torch.tensor(2.0, device=student.device), torch.randn(3, 20, device=student.device)
    return [
        ("attention_transfer", (student, teacher, 2, True, True)),
        ("attention_transfer", (student, teacher.half(), 3, False, False)),
        ("attention_transfer_backward", (grad, slope, student, 2)),
        ("attention_transfer_backward", (grad, slope, student.transpose(1, 2).contiguous().transpose(1, 2), 3)),
    ]


def losses(student, teacher):
    """With pooling."""
    return kdfast.AT(3)([student[:, :, :3, :3], teacher], [teacher, student])


def make_square(device, rows, dtype):
    return list(GROUPS[0].inputs(device, (rows, 4, 5, 5), dtype).values())


PROGRAMS = [
    *(program_of(GROUPS[0], memory_format) for memory_format in GROUPS[0].memory_formats),
    Program("attention, losses", losses, make_square),
]


# ---- errors ----------------------------------------------------------------------------------------------------------
def bad_inputs():
    return torch.randn(GROUPS[0].small), torch.randn(3, 2, 4, 5)


ERRORS = [
    (lambda s, t: ops.attention_transfer(s[0], t), ValueError, r"student must be \(batch, channels, height, width\)"),
    (lambda s, t: ops.attention_transfer(s, t[:2]), ValueError, "teacher must have the student's batch size 3"),
    (lambda s, t: ops.attention_transfer(s, t[..., :2]), ValueError, r"height and width \(4, 5\), got \(4, 2\)"),
    (lambda s, t: ops.attention_transfer(s.long(), t), TypeError, "student must be float32"),
    (lambda s, t: ops.attention_transfer(s, t, 0), ValueError, "power must be at least 1, got 0"),
    (lambda s, t: ops.attention_transfer(s, t.to("meta")), ValueError, "teacher must be on the student's device cpu"),
    (lambda s, t: kdfast.AT(2.0), TypeError, "p must be an int, got float"),
    (lambda s, t: kdfast.AT()([s, s], [t]), ValueError, "as many layers, and at least one, got 2 and 1"),
    (lambda s, t: kdfast.AT()([], []), ValueError, "as many layers, and at least one, got 0 and 0"),
    (lambda s, t: kdfast.AT()([s], t), TypeError, "all be tensors, or all lists .*, got list and Tensor"),
    (lambda s, t: kdfast.AT()([s, s], [t, t[0]]), ValueError, r"teacher\[1\] must be \(batch, channels"),
    (lambda s, t: kdfast.AT()([s, s], [t, t[:2]]), ValueError, r"teacher\[1\] must have student\[1\]'s batch size 3"),
    (lambda s, t: kdfast.AT()(s, t[..., :3]), ValueError, r"one width.*got \(4, 5\) and \(4, 3\)"),
    (lambda s, t: kdfast.AT()(s[:, :, :2], t), ValueError, r"must be square: got \(2, 5\) and \(2, 2\)"),
]
