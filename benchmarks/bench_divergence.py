"""Losses on logits since 2022: kdfast against the formulas of their authors, eager and through torch.compile.

`kdfast bench` runs this file and makes tables of it; `pytest benchmarks/bench_divergence.py` shows the raw figures.
"""

import torch
import torch.nn.functional as F

import kdfast

from . import harness
from .harness import Case

FAMILY = "divergence"
SHAPES = [(256, 1000), (64, 151936)]
HOST_SHAPE = (2, 8)


# ---- the baselines ---------------------------------------------------------------------------------------------------
def standardized(logits):
    return (logits - logits.mean(-1, keepdim=True)) / (1e-7 + logits.std(-1, keepdim=True))


def eager_lskd(student, teacher, labels, temperature=2.0):
    log_p_student = F.log_softmax(standardized(student) / temperature, dim=1)
    p_teacher = F.softmax(standardized(teacher) / temperature, dim=1)
    return F.kl_div(log_p_student, p_teacher, reduction="none").sum(1).mean() * temperature**2


def eager_nkd(student, teacher, labels, temperature=1.0, gamma=1.5):
    rows, index = len(student), labels[:, None]
    log_student, p_teacher = F.log_softmax(student, dim=1), F.softmax(teacher, dim=1)
    target = -(p_teacher.gather(1, index).detach() * log_student.gather(1, index)).mean()
    other = torch.ones_like(student).scatter_(1, index, 0).bool()
    student, teacher = student[other].reshape(rows, -1), teacher[other].reshape(rows, -1)
    log_other = F.log_softmax(student / temperature, dim=1)
    others = (F.softmax(teacher / temperature, dim=1) * log_other).sum(1).mean()
    return target - gamma * temperature**2 * others


def of_rows(products, *masked):
    """The sum of each row, without the classes where a logit is infinite."""
    infinite = torch.stack([logits.isinf() for logits in masked]).any(0)
    return products.masked_fill(infinite, 0).sum(-1).mean()


def eager_skew(student, teacher, labels, skew=0.1):
    p_teacher = F.softmax(teacher, dim=-1, dtype=torch.float32)
    p_student = F.softmax(student, dim=-1, dtype=torch.float32)
    return -of_rows(p_teacher * torch.log(skew * p_teacher + (1 - skew) * p_student), student, teacher)


def eager_variation(student, teacher, labels):
    p_teacher = F.softmax(teacher, dim=-1, dtype=torch.float32)
    p_student = F.softmax(student, dim=-1, dtype=torch.float32)
    return 0.5 * of_rows((p_teacher - p_student).abs(), student, teacher)


def eager_alpha_beta(student, teacher, labels, alpha=0.2, beta=0.7):
    p, q = (F.softmax(logits, dim=-1, dtype=torch.float32) for logits in (teacher, student))
    both = alpha + beta
    terms = p**alpha * q**beta - alpha / both * p**both - beta / both * q**both
    return -of_rows(terms, student, teacher) / (alpha * beta)


# ---- the cases -------------------------------------------------------------------------------------------------------
def without_labels(loss):
    return lambda student, teacher, labels: loss(student, teacher)


LOSSES = {  # name -> eager, kdfast
    "LSKD": (eager_lskd, without_labels(kdfast.LSKD())),
    "NKD": (eager_nkd, kdfast.NKD()),
    "SkewKL": (eager_skew, without_labels(kdfast.SkewKL())),
    "TVD": (eager_variation, without_labels(kdfast.TVD())),
    "AlphaBeta": (eager_alpha_beta, without_labels(kdfast.AlphaBeta())),
}


def case(name, rows, cols):
    eager, ours = LOSSES[name]

    def inputs(device):
        student, teacher = (torch.randn(rows, cols, device=device) for _ in range(2))
        return student.requires_grad_(), teacher, torch.randint(cols, (rows,), device=device)

    matrix = rows * cols * 4
    floor = {"forward": 2 * matrix, "backward": 3 * matrix, "both": 5 * matrix}
    return Case(name, f"{rows} x {cols}", inputs, eager, ours, floor)


cases, host_cases = harness.of_shapes(case, LOSSES, SHAPES, HOST_SHAPE)

# ---- the measurements ------------------------------------------------------------------------------------------------
test_ceiling, test_loss, test_host = harness.measure_ceiling, harness.measure_loss, harness.measure_host
