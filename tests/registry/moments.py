"""Mean and variance of each channel, and maps standardised by them."""

import oracles
import torch

from kdfast import ops
from kdfast.ops.layout import flat
from registry import FAR, SQUARED_ROUNDING, Bench, Group, Op, program_of, scaled


def make_map(shape):
    """Each channel with a mean and a spread of its own."""
    channels = torch.arange(shape[1], dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    return torch.randn(shape, dtype=torch.float64) * (1 + channels % 3) + channels % 5 - 2


def make(shape):
    return {"x": make_map(shape)}


def make_pair(shape):
    return {"student": make_map(shape), "teacher": make_map(shape).roll(1, 1)}


CASES = [  # B, C, H, W
    (1, 1, 1, 1),
    (2, 3, 1, 1),  # no positions: the channels are neighbours in every layout
    (3, 5, 7, 9),  # rows that end within a step of 8
    (2, 33, 4, 3),  # one channel more than a warp has lanes
    (
        1,
        33,
        33,
        35,
    ),  # a channel longer than a chunk of 1024; more positions than a block takes, on either machine
    (3, 1, 105, 105),  # more steps of a channel than a GPU block takes
]


def sizes_moments(x, upstream):
    """-> values [2, C], entries of the gradient. x - mean is off by what the mean is, a sum of many terms; a variance
    has only the square of that.
    """
    channels = x.transpose(0, 1).flatten(1)
    count = max(channels.shape[1], 1)
    mean = channels.abs().sum(1) / count
    variance = oracles.channel_moments(x)[1] + SQUARED_ROUNDING * mean.square()
    distance = x.abs() + (count**0.5 * mean).view(-1, *[1] * (x.dim() - 2))
    of_mean, of_variance = upstream.view(2, -1, *[1] * (x.dim() - 2))
    return torch.stack([mean, variance]), (of_mean + 2 * of_variance * distance) / count


def sizes_standardized(student, teacher):
    """-> value, entries of both gradients: a standardised value is off by a rounding of itself and of the mean."""
    maps = [oracles.standardized_map(x) for x in (student, teacher)]
    means = [oracles.per_channel(x, lambda rows: rows.abs().mean(1) / (rows.std(1) + 1e-6)) for x in (student, teacher)]
    both, gap = maps[0].abs() + maps[1].abs() + sum(means), (maps[0] - maps[1]).abs()
    value = (2 * gap * both + both.square() * SQUARED_ROUNDING).mean() / 2
    entries = []
    for x, own in zip((student, teacher), maps, strict=True):
        std = oracles.per_channel(x, lambda rows: rows.std(1))
        entries.append((both + 2 * own.abs()) / (std + 1e-6) / x.numel())
    return value, *entries


SHAPES = dict(  # of both groups
    small=(3, 5, 6, 5),
    tiny=(2, 3, 5, 2),
    laid_out=((2, 4, 6, 5),),
    other_dims=((3, 5), (70, 40), (3, 5, 12), (3, 5, 2, 3, 2)),
    largest=lambda name, t: t.clamp(-1, 1) * 6e4,
    far=(((3, 4, 5, 4), (FAR, 20, 4, 1)), ((3, 4, 5, 4), (FAR, 1, 16, 4))),
    deterministic=((5, 3, 9, 7), (2, 40, 60, 50), (70, 130, 2, 2)),
    deterministic_simt=((5, 3, 9, 7),),
    memory=(4, 16, 64, 64),
    workload=(
        (2, 3, 1, 5),  # less than the elements that a thread reads at once
        (3, 33, 5, 7),  # one channel more than a warp has lanes
        (5, 2, 17, 19),  # more positions than a block takes
        (3, 1, 105, 105),  # more elements of a channel than a block takes
    ),
)
GROUPS = [
    Group(
        "moments",
        make,
        [
            Op(
                "moments",
                lambda o, x: o.channel_moments(x),
                lambda g, x: sizes_moments(x, g),
                memory=lambda x, kernel: x["x"].nbytes + 4096 if kernel else None,
            )
        ],
        cases=CASES,
        channels_last=CASES,
        leaves=("x",),
        cols=lambda x: [x["x"].numel() // max(x["x"].shape[1], 1), 1],
        layouts={"x": "maps"},
        largest_upstream=1e-3,
        **SHAPES,
    ),
    Group(
        "moments",
        make_pair,
        [
            Op(
                "standardized",
                lambda o, student, teacher: o.standardized_error(student, teacher),
                lambda g, student, teacher: scaled(g, sizes_standardized(student, teacher)),
                equal=lambda student: student,
                memory=lambda x, kernel: x["student"].nbytes + x["teacher"].nbytes + 8192 if kernel else None,
                bench=Bench(((8, 19, 128, 128), (64, 256, 56, 56))),
            )
        ],
        cases=[(2, 3, 1, 1), *CASES[2:]],
        channels_last=CASES[2:],
        leaves=("student", "teacher"),
        cols=lambda x: x["student"].numel() // x["student"].shape[1],
        layouts={"student": "maps", "teacher": "maps"},
        equal_shapes=((3, 5, 6, 5), (2, 3, 33, 35)),
        elementwise=True,
        largest_upstream=1.0,
        **SHAPES,
    ),
]


# ---- raw ops, programs -----------------------------------------------------------------------------------------------
def raw_calls(device):
    calls = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = GROUPS[0].inputs(device, GROUPS[0].small, torch.float32)["x"].contiguous(memory_format=memory_format)
        moments = torch.ops.kdfast.channel_moments(flat(x))
        backward = (torch.randn_like(moments), flat(x), moments)
        calls += [("channel_moments", (flat(x),)), ("channel_moments_backward", backward)]
        pair = [flat(t) for t in GROUPS[1].in_format(make_inputs(device), memory_format).values()]
        loss, statistics = torch.ops.kdfast.standardized_error(*pair, 1e-6)
        calls += [
            ("standardized_error", (*pair, 1e-6)),
            ("standardized_error_backward", (loss, *pair, statistics, True, True)),
            ("standardized_error_backward", (loss, *pair, statistics, False, True)),
        ]
    return calls


def make_inputs(device):
    return GROUPS[1].inputs(device, GROUPS[1].small, torch.float32)


PROGRAMS = [program_of(group, memory_format) for group in GROUPS for memory_format in group.memory_formats]


# ---- errors ----------------------------------------------------------------------------------------------------------
def bad_inputs():
    return (torch.randn(GROUPS[0].small),)


ERRORS = [
    (lambda x: ops.channel_moments(x[0, 0, 0]), ValueError, r"x must be \(batch, features\) or \(batch, ...\)"),
    (lambda x: ops.channel_moments(x.long()), TypeError, "x must be float32, float64, float16 or bfloat16"),
    (lambda x: ops.channel_moments([x]), TypeError, "x must be a torch.Tensor, got list"),
    (
        lambda x: ops.standardized_error(x, x[:2]),
        ValueError,
        r"teacher must have the student's shape \(3, 5, 6, 5\), got \(2, 5, 6, 5\)",
    ),
    (
        lambda x: ops.standardized_error(x[:1, :, :1, :1], x[:1, :, :1, :1]),
        ValueError,
        r"student must have more than one value a channel, got \(1, 5, 1, 1\)",
    ),
    (lambda x: ops.standardized_error(x, x, 0), ValueError, "epsilon must be"),
]
