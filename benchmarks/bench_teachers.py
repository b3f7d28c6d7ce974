"""Several teachers: kdfast against the formulas as their authors write them, eager and compiled.

`kdfast bench` runs this file and makes tables of it; `pytest benchmarks/bench_teachers.py` shows the raw figures.
"""

import torch
import torch.nn.functional as F

import kdfast

from . import harness
from .harness import Case

FAMILY = "teachers"
SHAPES = [(4, 256, 1000), (4, 1024, 1000), (8, 256, 1000), (4, 64, 21841)]
HOST_SHAPE = (4, 2, 8)


# ---- the baselines ---------------------------------------------------------------------------------------------------
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
dml, aekd, end = kdfast.DML(), kdfast.AEKD(), kdfast.EnD()


def kdfast_dml(*args):
    student, *peers, labels = args
    return dml(student, peers, labels)


def kdfast_aekd(*args):
    student, *teachers, _ = args
    return aekd(student, teachers)


def kdfast_end(*args):
    student, *teachers, _ = args
    return end(student, teachers)


LOSSES = {  # name -> eager, kdfast, whether the student is one of the `count` networks
    "DML": (eager_dml, kdfast_dml, True),
    "AEKD": (eager_aekd, kdfast_aekd, False),
    "EnD": (eager_end, kdfast_end, False),
}


def case(name, count, rows, cols):
    """`name` of LOSSES with `count` teachers (DML: networks) on [rows, cols] logits."""
    eager, ours, among = LOSSES[name]
    networks = count + (not among)

    def inputs(device):
        student, *teachers = (torch.randn(rows, cols, device=device) for _ in range(networks))
        return student.requires_grad_(), *teachers, torch.randint(cols, (rows,), device=device)

    # Forward reads every network; backward reads them again and writes the student's gradient.
    matrix = 4 * rows * cols
    floor = {"forward": networks * matrix, "backward": (networks + 1) * matrix, "both": (2 * networks + 1) * matrix}
    left_out = {}
    if name == "AEKD":
        left_out["compile"] = "scikit-learn"
        if not harness.importable("sklearn"):
            left_out["eager"] = "no scikit-learn"
    return Case(name, f"{count} x {rows} x {cols}", inputs, eager, ours, floor, left_out=left_out)


cases, host_cases = harness.of_shapes(case, LOSSES, SHAPES, HOST_SHAPE)


# ---- the measurements ------------------------------------------------------------------------------------------------
test_ceiling, test_loss, test_host = harness.measure_ceiling, harness.measure_loss, harness.measure_host
