"""Channels of maps as distributions over their positions."""

import torch

from kdfast import ops
from kdfast.ops.layout import flat
from registry import FAR, Group, Op, program_of, scaled
from registry.softmax_kl import sizes_kl


def make(shape):
    """Images are channels_last: others are softmax_kl's."""
    maps = {name: 3 * torch.randn(shape, dtype=torch.float64) for name in ("student", "teacher")}
    image = len(shape) == 4
    return {name: x.contiguous(memory_format=torch.channels_last) if image else x for name, x in maps.items()}


def sizes(student, teacher, temperature):
    """-> value, entries of both gradients."""
    rows = [x.flatten(2).flatten(0, 1) for x in (student.unsqueeze(-1), teacher.unsqueeze(-1))]
    values, entries = sizes_kl(*rows, temperature)
    entries = entries.view(student.shape) / max(len(values), 1)
    return values.sum() / max(len(values), 1), entries, entries


def channel_kl(name, temperature):
    return Op(
        name,
        lambda o, student, teacher: o.channel_kl(student, teacher, temperature),
        lambda g, student, teacher: scaled(g, sizes(student, teacher, temperature)),
        equal=lambda student: student,
        memory=lambda x, kernel: x["student"].nbytes + x["teacher"].nbytes + 2**14 if kernel else None,
    )


CASES = [  # B, C, H, W
    (1, 1, 1, 1),
    (2, 3, 1, 1),  # no positions
    (3, 5, 7, 9),  # fewer positions than lie side by side in a loop
    (2, 33, 4, 3),  # one channel more than a warp has lanes
    (2, 19, 20, 17),  # positions that do not fill the last group; more than a GPU block takes
    (1, 2, 105, 105),
    (2, 515, 11, 13),  # a position is longer than a loop; more than a piece
    (1, 19, 70, 71),  # several pieces
]
GROUPS = [
    Group(
        "channel_kl",
        make,
        [
            channel_kl("channel_kl", 1.0),
            channel_kl("channel_kl_4", 4.0),
        ],
        cases=CASES,
        leaves=("student", "teacher"),
        cols=lambda x: x["student"][0, 0].numel(),
        layouts={"student": "maps", "teacher": "maps"},
        equal_shapes=((3, 5, 6, 5), (2, 3, 33, 35)),
        small=(3, 5, 6, 5),
        tiny=(2, 3, 5, 2),
        laid_out=((2, 4, 6, 5),),
        other_dims=((3, 5), (70, 40), (3, 5, 12), (3, 5, 2, 3, 2)),
        far=(((3, 4, 5, 4), (FAR, 1, 16, 4)),),
        deterministic=((5, 3, 9, 7), (2, 40, 60, 50), (70, 130, 2, 2)),
        deterministic_simt=((5, 3, 9, 7),),
        memory=(4, 16, 64, 64),
        simt=lambda shape, dtype: shape[1] < 500 or dtype == torch.float32,
        workload=((2, 3, 1, 5), (3, 33, 5, 7), (5, 2, 17, 19), (1, 3, 105, 105)),
    ),
]


# ---- raw ops, programs -----------------------------------------------------------------------------------------------
def raw_calls(device):
    calls = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = GROUPS[0].in_format(GROUPS[0].inputs(device, GROUPS[0].small, torch.float32), memory_format)
        pair = [flat(t) for t in x.values()]
        loss, statistics = torch.ops.kdfast.channel_kl(*pair, 4.0)
        calls.append(("channel_kl", (*pair, 4.0)))
        for needs in ((True, True), (True, False), (False, True)):
            calls.append(("channel_kl_backward", (loss, *pair, statistics, 4.0, *needs)))
    return calls


PROGRAMS = [program_of(group, memory_format) for group in GROUPS for memory_format in group.memory_formats]


# ---- errors ----------------------------------------------------------------------------------------------------------
def bad_inputs():
    return (torch.randn(GROUPS[0].small),)


ERRORS = [
    (lambda x: ops.channel_kl(x[0, 0, 0], x), ValueError, r"student must be \(batch, features\) or \(batch, ...\)"),
    (lambda x: ops.channel_kl(x, x.long()), TypeError, "teacher must be float32, float64, float16 or bfloat16"),
    (
        lambda x: ops.channel_kl(x, x[:2]),
        ValueError,
        r"teacher must have the student's shape \(3, 5, 6, 5\), got \(2, 5, 6, 5\)",
    ),
    (lambda x: ops.channel_kl(x, x, 0), ValueError, "temperature must be"),
]
