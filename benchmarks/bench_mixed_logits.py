"""Mixtures of logits: kdfast against the formulas as their authors write them, eager and compiled.

`kdfast bench` runs this file and makes tables of it; `pytest benchmarks/bench_mixed_logits.py` shows the raw figures.
"""

import torch
import torch.nn.functional as F

import kdfast

from . import harness
from .harness import Case

FAMILY = "mixed_logits"
SHAPES = [(4, 256, 1000), (4, 1024, 1000), (8, 256, 1000), (4, 64, 21841)]
HOST_SHAPE = (4, 2, 8)


# ---- the baselines ---------------------------------------------------------------------------------------------------
def kl_loss(logits, target, temperature=3.0):
    """KLLoss of ONE and OKDDip: 1e-7 is added to the targets, which are not normalised again."""
    log_q, p = F.log_softmax(logits / temperature, dim=1), F.softmax(target / temperature, dim=1) + 1e-7
    return temperature**2 * (p * (p.log() - log_q)).sum(1).mean()


def eager_one(*args):
    *logits, gate, labels = args
    mixed = sum(gate[:, k : k + 1] * z for k, z in enumerate(logits))
    loss = F.cross_entropy(mixed, labels) + sum(F.cross_entropy(z, labels) for z in logits)
    return loss + sum(kl_loss(z, mixed.detach()) for z in logits)


def eager_okddip(*args):
    *logits, leader, attention, labels = args
    z = torch.stack(logits, 1)
    targets = torch.bmm(attention, z)
    loss = F.cross_entropy(leader, labels) + sum(F.cross_entropy(x, labels) for x in logits)
    return loss + sum(kl_loss(x, targets[:, i]) for i, x in enumerate(logits)) + kl_loss(leader, z.mean(1))


# ---- the cases -------------------------------------------------------------------------------------------------------
one, okddip = kdfast.ONE(), kdfast.OKDDip()


def kdfast_one(*args):
    *logits, gate, labels = args
    return one(logits, gate, labels, 80)


def kdfast_okddip(*args):
    *logits, leader, attention, labels = args
    return okddip(logits, leader, attention, labels, 80)


LOSSES = {  # name -> eager, kdfast, logit matrices beside `count`
    "ONE": (eager_one, kdfast_one, 0),
    "OKDDip": (eager_okddip, kdfast_okddip, 1),
}


def case(name, count, rows, cols):
    """`name` of LOSSES with `count` networks on [rows, cols] logits, all of which learn."""
    eager, ours, more = LOSSES[name]

    def inputs(device):
        networks = [torch.randn(rows, cols, device=device).requires_grad_() for _ in range(count + more)]
        weights = torch.randn((rows, count) if name == "ONE" else (rows, count, count), device=device)
        labels = torch.randint(cols, (rows,), device=device)
        return *networks, weights.softmax(-1).requires_grad_(), labels

    # Forward reads every network; backward reads them again and writes the gradient of each.
    read = 4 * rows * cols * (count + more)
    floor = {"forward": read, "backward": 2 * read, "both": 3 * read}
    return Case(name, f"{count} x {rows} x {cols}", inputs, eager, ours, floor)


cases, host_cases = harness.of_shapes(case, LOSSES, SHAPES, HOST_SHAPE)


# ---- the measurements ------------------------------------------------------------------------------------------------
test_ceiling, test_loss, test_host = harness.measure_ceiling, harness.measure_loss, harness.measure_host
