"""Losses on the relations of a batch, against their official code's maths, eager and through torch.compile.

`kdfast bench` runs this file and makes tables of it; `pytest benchmarks/bench_pairwise.py` shows the raw figures.
"""

import torch
import torch.nn.functional as F

import kdfast

from . import harness
from .harness import Case

FAMILY = "pairwise"
SHAPES = [(rows, 512) for rows in (64, 128, 256, 512, 1024, 2048, 4096)]
HOST_SHAPE = (4, 8)
LARGEST_FALLBACK = 256  # rows; beyond, plain PyTorch on a CPU takes seconds a call
LARGEST_BOTH_TERMS = 1024  # rows; beyond, RKD costs what its angles do
LARGEST_PHASES = 128  # rows; beyond, the backward is too small a part of a call to be timed by itself


# ---- the baselines ---------------------------------------------------------------------------------------------------
def eager_distances(rows):
    squares = rows.pow(2).sum(dim=1)
    distances = (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * rows @ rows.t()).clamp(min=1e-12).sqrt()
    return distances.masked_fill(torch.eye(len(rows), dtype=torch.bool, device=rows.device), 0)


def eager_rkd_distance(student, teacher):
    def over_mean(rows):
        distances = eager_distances(rows)
        return distances / distances[distances > 0].mean()

    with torch.no_grad():
        wanted = over_mean(teacher)
    return F.smooth_l1_loss(over_mean(student), wanted)


def eager_rkd_angle(student, teacher):
    """All B^2 unit vectors, and the product of those of each vertex with each other."""

    def cosines(rows):
        unit = F.normalize(rows.unsqueeze(0) - rows.unsqueeze(1), p=2, dim=2)
        return torch.bmm(unit, unit.transpose(1, 2)).view(-1)

    with torch.no_grad():
        wanted = cosines(teacher)
    return F.smooth_l1_loss(cosines(student), wanted)


def eager_rkd(student, teacher):
    return 25 * eager_rkd_distance(student, teacher) + 50 * eager_rkd_angle(student, teacher)


# ---- the cases -------------------------------------------------------------------------------------------------------
LOSSES = {  # name -> eager, kdfast, whether it has a distance term, an angle term
    "RKD angle": (eager_rkd_angle, kdfast.RKDAngle(), False, True),
    "RKD distance": (eager_rkd_distance, kdfast.RKDDistance(), True, False),
    "RKD": (eager_rkd, kdfast.RKD(), True, True),
}


def eager_bytes(name, rows, cols):
    """What the eager formula needs at its peak, forward + backward in float32, beside its inputs."""
    _, _, distance, angle = LOSSES[name]
    embeddings, pairs, triples = 4 * rows * cols, 4 * rows**2, 4 * rows**3
    return 2 * embeddings + distance * 10 * pairs + angle * (5 * pairs * cols + 3 * triples)


def operations(name, rows, cols):
    """Additions and multiplications that the work takes at least, by phase; a comparison or root counts as one.

    Distances: difference, square and sum, of each pair and feature, of two networks. An angle: 8 for each network's
    cosine, 6 for the Huber function, and with a gradient 11 more, for each vertex and each pair of other rows. The
    gradient: difference, product and sum, of each pair (twice: it moves both rows) and feature.
    """
    _, _, _, angle = LOSSES[name]
    pairs = rows * (rows - 1) // 2
    distances, triples, gradient = 2 * 3 * pairs * cols, angle * pairs * rows, 2 * 3 * pairs * cols
    forward = distances + 22 * triples
    backward = gradient + 11 * triples
    return {"forward": forward, "backward": backward, "both": forward + backward}


def case(name, rows, cols, device="cpu"):
    """`name` of LOSSES on [rows, cols] embeddings of both networks."""
    eager, ours, _, _ = LOSSES[name]

    def inputs(device):
        student, teacher = (torch.randn(rows, cols, device=device) for _ in range(2))
        return student.requires_grad_(), teacher

    left_out = {}
    if (needed := eager_bytes(name, rows, cols)) > harness.memory_limit(device):
        left_out = {"eager": f"out of memory: {needed / 1e9:.0f} GB", "compile": "out of memory"}
    if device == "cpu" and rows > LARGEST_FALLBACK:
        left_out["fallback"] = "-"
    return Case(
        name,
        f"{rows} x {cols}",
        inputs,
        eager,
        ours,
        floor=operations(name, rows, cols),
        ceiling="matmul",
        phases=harness.PHASES if rows <= LARGEST_PHASES else harness.PHASES[:1],
        size=rows,
        left_out=left_out,
    )


def cases(settings, shapes):
    """Every loss at all shapes; `shapes`, if any, replaces them."""
    shapes = shapes or (SHAPES[:1] if settings.quick else SHAPES)
    return [
        case(name, *shape, settings.device)
        for name in LOSSES
        for shape in shapes
        if name != "RKD" or shape[0] <= LARGEST_BOTH_TERMS
    ]


def host_cases():
    """Every loss on a batch so small that only the host's overhead is left."""
    return [case(name, *HOST_SHAPE) for name in LOSSES]


# ---- the measurements ------------------------------------------------------------------------------------------------
test_ceiling, test_loss, test_host = harness.measure_ceiling, harness.measure_loss, harness.measure_host
