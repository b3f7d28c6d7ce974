"""Losses on inner products, against their official code's maths, eager and through torch.compile.

`kdfast bench` runs this file and makes tables of it; `pytest benchmarks/bench_gram.py` shows the raw figures.
"""

import math

import torch
import torch.nn.functional as F

import kdfast

from . import harness
from .harness import Case

FAMILY = "gram"


# ---- the baselines ---------------------------------------------------------------------------------------------------
def eager_sp(student, teacher):
    def similarities(x):
        x = x.view(x.shape[0], -1)
        return F.normalize(torch.mm(x, x.t()))

    gap = similarities(teacher) - similarities(student)
    return (gap * gap).view(-1, 1).sum(0).squeeze() / student.shape[0] ** 2


def eager_pkt(student, teacher, eps=1e-7):
    def probabilities(x):
        x = x / (torch.sqrt(torch.sum(x**2, dim=1, keepdim=True)) + eps)
        x = (torch.mm(x, x.t()) + 1) / 2
        return x / x.sum(dim=1, keepdim=True)

    p, t = probabilities(student), probabilities(teacher)
    return torch.mean(t * torch.log((t + eps) / (p + eps)))


def eager_cckd(student, teacher, gamma=0.4, order=2):
    def correlations(x):
        x = F.normalize(x, p=2, dim=-1)
        similarity, out = torch.matmul(x, x.t()), torch.zeros(len(x), len(x), device=x.device)
        for p in range(order + 1):
            out = out + math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * torch.pow(similarity, p)
        return out

    return F.mse_loss(correlations(student), correlations(teacher))


def eager_fakd(student, teacher):
    def affinities(x):
        x = x.view(x.size(0), x.size(1), -1)
        x = x / (torch.sqrt(torch.sum(torch.pow(x, 2), 1, keepdim=True)) + 1e-8)
        return x.transpose(1, 2).bmm(x)

    return F.l1_loss(affinities(student), affinities(teacher))


def eager_nst(student, teacher):
    """By broadcasting, three tensors of B x C x C' x N."""

    def kernel(a, b):
        return (a.unsqueeze(2) * b.unsqueeze(1)).sum(-1).pow(2)

    s, t = (F.normalize(x.view(x.shape[0], x.shape[1], -1), dim=2) for x in (student, teacher))
    return kernel(t, t).mean().detach() + kernel(s, s).mean() - 2 * kernel(s, t).mean()


def eager_fsp(bottom_s, top_s, bottom_t, top_t):
    """By broadcasting, a tensor of B x C x C' x N for each network."""

    def flow(bottom, top):
        bottom, top = bottom.unsqueeze(1), top.unsqueeze(2)
        return (bottom.flatten(3) * top.flatten(3)).mean(-1)

    return (flow(bottom_s, top_s) - flow(bottom_t, top_t)).pow(2).mean()


def ours_fsp(bottom_s, top_s, bottom_t, top_t):
    return kdfast.FSP()([bottom_s, top_s], [bottom_t, top_t])


# ---- the cases -------------------------------------------------------------------------------------------------------
LOSSES = {  # name -> eager, kdfast, shapes of student and teacher
    "SP": (eager_sp, kdfast.SP(), [(256, 2048), (256, 25088), (1024, 2048), (2048, 2048)]),
    "PKT": (eager_pkt, kdfast.PKT(), [(1024, 512)]),
    "CCKD": (eager_cckd, kdfast.CCKD(), [(1024, 512)]),
    "FAKD": (eager_fakd, kdfast.FAKD(), [(4, 64, 48, 48), (16, 64, 96, 96)]),
    "NST": (eager_nst, kdfast.NST(), [(8, 64, 16, 16), (32, 256, 14, 14)]),
    "FSP": (eager_fsp, ours_fsp, [(32, 64, 28, 28)]),  # the next layer has twice as many channels
}
ROWS = ("SP", "PKT", "CCKD")  # on embeddings, the others on maps


def eager_bytes(name, shape):
    """What the eager formula needs at its peak, forward + backward in float32, where it is more than a few inputs."""
    if name in ROWS:
        return 0
    batch, channels, positions = shape[0], shape[1], shape[2] * shape[3]
    if name == "FAKD":
        return 4 * 5 * batch * positions**2
    return 4 * 3 * batch * channels * channels * positions * (2 if name == "FSP" else 1)


def operations(name, shape):
    """Additions and multiplications of the matrix products that the work takes at least, by phase.

    A network's product with itself is symmetric: half of it suffices. FAKD forms the gradient in the forward sweep.
    """
    batch, width = shape[0], math.prod(shape[1:])
    if name in ROWS:
        forward, backward = 2 * batch**2 * width, 2 * batch**2 * width
    else:
        channels, positions = shape[1], shape[2] * shape[3]
        if name == "FSP":
            product = 2 * batch * channels * 2 * channels * positions
            forward, backward = 2 * product, 2 * product
        else:
            # NST takes products of positions or of channels, whichever are fewer.
            small = positions if name == "FAKD" or positions <= channels else channels
            forward = backward = 2 * batch * small * channels * positions
    return {"forward": forward, "backward": backward, "both": forward + backward}


def case(name, *shape, device="cpu"):
    """`name` of LOSSES on embeddings or maps of `shape`; a map of fewer dimensions is (batch, channels)."""
    eager, ours, _ = LOSSES[name]
    shape = (shape[0], math.prod(shape[1:])) if name in ROWS else (*shape, 1, 1)[:4]

    def inputs(device):
        if name == "FSP":
            shapes = [shape, (shape[0], 2 * shape[1], *shape[2:])] * 2
        else:
            shapes = [shape] * 2
        tensors = [torch.randn(s, device=device) for s in shapes]
        return tuple(x.requires_grad_(i < len(tensors) // 2) for i, x in enumerate(tensors))

    left_out = {}
    if (needed := eager_bytes(name, shape)) > harness.memory_limit(device):
        left_out = {"eager": f"out of memory: {needed / 1e9:.0f} GB", "compile": "out of memory", "fallback": "-"}
    return Case(
        name,
        " x ".join(map(str, shape)),
        inputs,
        eager,
        ours,
        floor=operations(name, shape),
        ceiling="matmul",
        phases=harness.PHASES[:1],
        left_out=left_out,
    )


def cases(settings, shapes):
    """Every loss at its shapes; `shapes`, if any, replaces them all."""
    return [
        case(name, *shape, device=settings.device)
        for name, (_, _, own) in LOSSES.items()
        for shape in shapes or (own[:1] if settings.quick else own)
    ]


def host_cases():
    """Every loss on tensors so small that only the host's overhead is left."""
    return [case(name, 4, 4, 2, 2) for name in LOSSES]


# ---- the measurements ------------------------------------------------------------------------------------------------
test_ceiling, test_loss, test_host = harness.measure_ceiling, harness.measure_loss, harness.measure_host
