"""Language models from hidden states: linear_kl against the formula with whole logits, half of the rows masked.

`kdfast bench` runs this file and makes tables of it; `pytest benchmarks/bench_linear.py` shows the raw figures.
"""

import torch
import torch.nn.functional as F

from kdfast import ops

from . import harness
from .harness import Case

FAMILY = "linear"
SHAPES = [(512, 1024, 32000), (256, 2048, 151936)]
HOST_SHAPE = (2, 8, 16)
BETA = 0.5


# ---- the baselines: all rows go through the products, as peers have it -----------------------------------------------
def eager_jsd(student, student_weight, teacher, teacher_weight, labels):
    log_q = F.log_softmax((student @ student_weight.t()).float(), dim=-1)
    log_p = F.log_softmax((teacher @ teacher_weight.t()).float(), dim=-1)
    log_m = torch.logsumexp(torch.stack([log_q, log_p]) + torch.log(torch.tensor(0.5, device=log_q.device)), dim=0)
    kl = BETA * F.kl_div(log_m, log_p, reduction="none", log_target=True)
    kl = kl + (1 - BETA) * F.kl_div(log_m, log_q, reduction="none", log_target=True)
    mask = labels != -100
    return kl.sum(-1)[mask].sum() / mask.sum()


def eager_kl(student, student_weight, teacher, teacher_weight, labels):
    log_q = F.log_softmax((student @ student_weight.t()).float(), dim=-1)
    log_p = F.log_softmax((teacher @ teacher_weight.t()).float(), dim=-1)
    mask = labels != -100
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)[mask].sum() / mask.sum()


LOSSES = {  # name -> eager, kdfast
    "KL": (eager_kl, lambda *x: ops.linear_kl(*x[:4], labels=x[4])),
    "JSD": (eager_jsd, lambda *x: ops.linear_kl(*x[:4], labels=x[4], beta=BETA)),
}


# ---- the cases -------------------------------------------------------------------------------------------------------
def case(name, rows, features, classes, dtype="float32"):
    eager, ours = LOSSES[name]

    def inputs(device):
        options = {"device": device, "dtype": getattr(torch, dtype)}
        student, teacher = (torch.randn(rows, features, **options) for _ in range(2))
        weights = [torch.randn(classes, features, **options) / features**0.5 for _ in range(2)]
        labels = torch.randint(classes, (rows,), device=device)
        labels[1::2] = -100
        return student.requires_grad_(), weights[0].requires_grad_(), teacher, weights[1], labels

    # Two products for the logits and two for the gradients, of the rows that count.
    product = 2 * (rows // 2) * features * classes
    floor = {"forward": 2 * product, "backward": 2 * product, "both": 4 * product}
    return Case(name, f"{rows} x {features} x {classes}", inputs, eager, ours, floor, "matmul", dtype)


def cases(settings, shapes):
    """In both dtypes. `shapes`, if any, replaces them all."""
    shapes = shapes or (SHAPES[:1] if settings.quick else SHAPES)
    return [case(name, *shape, dtype) for dtype in ("float32", "bfloat16") for shape in shapes for name in LOSSES]


def host_cases():
    return [case(name, *HOST_SHAPE) for name in LOSSES]


# ---- the measurements ------------------------------------------------------------------------------------------------
test_ceiling, test_loss, test_host = harness.measure_ceiling, harness.measure_loss, harness.measure_host
