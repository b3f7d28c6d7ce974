"""Mean and variance of each channel."""

import oracles
import torch

from kdfast import ops
from kdfast.ops.layout import flat
from registry import FAR, SQUARED_ROUNDING, Group, Op, program_of


def make(shape):
    """Each channel with a mean and a spread of its own."""
    channels = torch.arange(shape[1], dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    return {"x": torch.randn(shape, dtype=torch.float64) * (1 + channels % 3) + channels % 5 - 2}


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
        small=(3, 5, 6, 5),
        tiny=(2, 3, 5, 2),
        laid_out=((2, 4, 6, 5),),
        other_dims=((3, 5), (70, 40), (3, 5, 12), (3, 5, 2, 3, 2)),
        leaves=("x",),
        cols=lambda x: [x["x"].numel() // max(x["x"].shape[1], 1), 1],
        layouts={"x": "maps"},
        largest=lambda name, t: t.clamp(-1, 1) * 6e4,
        largest_upstream=1e-3,
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
]


# ---- raw ops, programs -----------------------------------------------------------------------------------------------
def raw_calls(device):
    calls = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = GROUPS[0].inputs(device, GROUPS[0].small, torch.float32)["x"].contiguous(memory_format=memory_format)
        moments = torch.ops.kdfast.channel_moments(flat(x))
        backward = (torch.randn_like(moments), flat(x), moments)
        calls += [("channel_moments", (flat(x),)), ("channel_moments_backward", backward)]
    return calls


PROGRAMS = [program_of(GROUPS[0], memory_format) for memory_format in GROUPS[0].memory_formats]


# ---- errors ----------------------------------------------------------------------------------------------------------
def bad_inputs():
    return (torch.randn(GROUPS[0].small),)


ERRORS = [
    (lambda x: ops.channel_moments(x[0, 0, 0]), ValueError, r"x must be \(batch, features\) or \(batch, ...\)"),
    (lambda x: ops.channel_moments(x.long()), TypeError, "x must be float32, float64, float16 or bfloat16"),
    (lambda x: ops.channel_moments([x]), TypeError, "x must be a torch.Tensor, got list"),
]
