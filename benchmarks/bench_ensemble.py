"""Losses of several networks: kdfast against the formulas as their authors write them, eager and compiled.

`kdfast bench` runs this file and makes tables of it; `pytest benchmarks/bench_ensemble.py` shows the raw figures.
"""

import torch
import torch.nn.functional as F

import kdfast

from . import harness
from .harness import Case

FAMILY = "ensemble"
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


def eager_dml(*args):
    student, *peers, labels = args
    log_q = F.log_softmax(student, dim=1)
    loss = sum(F.kl_div(log_q, F.softmax(x, dim=1), reduction="batchmean") for x in peers)
    return F.cross_entropy(student, labels) + loss


def eager_aekd(*args):
    """The official weights, by scikit-learn's one-class SVM on the mean gradients of the student's logits."""
    from sklearn.svm import OneClassSVM

    student, *teachers, _ = args
    count, slack, temperature = len(teachers), 0.6, 4.0
    log_q = F.log_softmax(student / temperature, dim=1)
    terms = [
        temperature**2 * F.kl_div(log_q, F.softmax(x / temperature, dim=1), reduction="batchmean") for x in teachers
    ]
    grads = torch.stack([torch.autograd.grad(x, student, retain_graph=True)[0].mean(0) for x in terms])
    gram = (grads @ grads.T).cpu().numpy()
    nu = max(1 / count, min(1.0, 1 / (slack * count)))
    svm = OneClassSVM(kernel="precomputed", nu=nu, tol=1e-6).fit(gram)
    weights = torch.zeros(count)
    weights[svm.support_] = torch.from_numpy(svm.dual_coef_[0] / (count * nu)).float()
    return sum(a * x for a, x in zip(weights.to(student.device), terms, strict=True))


def eager_end(*args):
    student, *teachers, _ = args
    target = torch.stack([F.softmax(x, dim=1) for x in teachers]).mean(0)
    return -(target * F.log_softmax(student, dim=1)).mean()


# ---- the cases -------------------------------------------------------------------------------------------------------
one, okddip, dml, aekd, end = kdfast.ONE(), kdfast.OKDDip(), kdfast.DML(), kdfast.AEKD(), kdfast.EnD()


def kdfast_one(*args):
    *logits, gate, labels = args
    return one(logits, gate, labels, 80)


def kdfast_okddip(*args):
    *logits, leader, attention, labels = args
    return okddip(logits, leader, attention, labels, 80)


def kdfast_dml(*args):
    student, *peers, labels = args
    return dml(student, peers, labels)


def kdfast_aekd(*args):
    student, *teachers, _ = args
    return aekd(student, teachers)


def kdfast_end(*args):
    student, *teachers, _ = args
    return end(student, teachers)


LOSSES = {  # name -> eager, kdfast, logit matrices beside `count`, whether all of them learn
    "ONE": (eager_one, kdfast_one, 0, True),
    "OKDDip": (eager_okddip, kdfast_okddip, 1, True),
    "DML": (eager_dml, kdfast_dml, 0, False),
    "AEKD": (eager_aekd, kdfast_aekd, 1, False),
    "EnD": (eager_end, kdfast_end, 1, False),
}


def case(name, count, rows, cols):
    """`name` of LOSSES with `count` networks (DML: itself among them) or teachers on [rows, cols] logits."""
    eager, ours, more, all_learn = LOSSES[name]

    def inputs(device):
        networks = [torch.randn(rows, cols, device=device) for _ in range(count + more)]
        for x in networks if all_learn else networks[:1]:
            x.requires_grad_()
        weights = {"ONE": (rows, count), "OKDDip": (rows, count, count)}.get(name)
        if weights:
            networks.append(torch.randn(weights, device=device).softmax(-1).requires_grad_())
        return *networks, torch.randint(cols, (rows,), device=device)

    # Forward reads every network; backward reads them again and writes a gradient for each that learns.
    matrix, read = 4 * rows * cols, count + more
    written = read if all_learn else 1
    floor = {"forward": read * matrix, "backward": (read + written) * matrix, "both": (2 * read + written) * matrix}
    left_out = {}
    if name == "AEKD":
        left_out["compile"] = "scikit-learn"
        if not harness.importable("sklearn"):
            left_out["eager"] = "no scikit-learn"
    return Case(name, f"{count} x {rows} x {cols}", inputs, eager, ours, floor, left_out=left_out)


cases, host_cases = harness.of_shapes(case, LOSSES, SHAPES, HOST_SHAPE)


# ---- the measurements ------------------------------------------------------------------------------------------------
test_ceiling, test_loss, test_host = harness.measure_ceiling, harness.measure_loss, harness.measure_host
