"""Losses on rows of logits: kdfast against the formulas as people write them, eager and through torch.compile.

`kdfast bench` runs this file and makes tables of it; `pytest benchmarks/bench_softmax_kl.py` shows the raw figures.
"""

import torch
import torch.nn.functional as F

import kdfast

from . import harness
from .harness import Case

FAMILY = "softmax_kl"
SHAPES = [(256, 1000), (1024, 1000), (4096, 1000), (256, 21841), (64, 151936)]
OTHER_SHAPES = [(256, 1000), (4096, 1000)]  # of every loss but KD: small enough to sit in a cache, and not
HOST_SHAPE = (2, 8)
KEPT = 50  # classes of the top-k teacher


# ---- the baselines ---------------------------------------------------------------------------------------------------
def eager_kd(student, teacher, labels, temperature=4.0):
    p_teacher = F.softmax(teacher / temperature, dim=1)
    log_p_student = F.log_softmax(student / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_student, p_teacher, reduction="batchmean")


def eager_kd_ce(student, teacher, labels, alpha=0.9):
    return alpha * eager_kd(student, teacher, labels) + (1 - alpha) * F.cross_entropy(student, labels)


def eager_dkd(student, teacher, labels, temperature=4.0, alpha=1.0, beta=8.0):
    """As its authors compute it: masks over the classes, and -1000 added to take the label out of a softmax."""
    index = labels.unsqueeze(1)
    is_label = torch.zeros_like(student).scatter_(1, index, 1).bool()
    is_other = torch.ones_like(student).scatter_(1, index, 0).bool()

    def label_or_other(logits):
        p = F.softmax(logits / temperature, dim=1)
        return torch.cat([(p * is_label).sum(1, keepdim=True), (p * is_other).sum(1, keepdim=True)], dim=1)

    target = F.kl_div(label_or_other(student).log(), label_or_other(teacher), reduction="batchmean")
    p_teacher = F.softmax(teacher / temperature - 1000.0 * is_label, dim=1)
    log_p_student = F.log_softmax(student / temperature - 1000.0 * is_label, dim=1)
    others = F.kl_div(log_p_student, p_teacher, reduction="batchmean")
    return temperature**2 * (alpha * target + beta * others)


def eager_jsd(student, teacher, labels):
    p_student, p_teacher = F.softmax(student, dim=1), F.softmax(teacher, dim=1)
    log_mixture = (0.5 * (p_student + p_teacher)).log()
    to_teacher = F.kl_div(log_mixture, p_teacher, reduction="batchmean")
    return 0.5 * (to_teacher + F.kl_div(log_mixture, p_student, reduction="batchmean"))


def eager_reverse_kd(student, teacher, labels):
    return F.kl_div(F.log_softmax(teacher, dim=1), F.softmax(student, dim=1), reduction="batchmean")


def eager_tf_reg(student, teacher, labels, temperature=20.0, alpha=0.1, multiplier=50.0):
    """The virtual teacher of Tf-KD: 0.99 for the label, the rest shared, softmaxed again."""
    classes = student.shape[1]
    virtual = torch.full_like(student, 0.01 / (classes - 1)).scatter_(1, labels.unsqueeze(1), 0.99)
    p_teacher = F.softmax(virtual / temperature, dim=1)
    divergence = F.kl_div(F.log_softmax(student, dim=1), p_teacher, reduction="batchmean") / classes
    return alpha * multiplier * divergence + (1 - alpha) * F.cross_entropy(student, labels)


def eager_label_refinery(student, probabilities, labels):
    return -(probabilities * F.log_softmax(student, dim=1)).sum(1).mean()


def eager_top_k(student, values, indices, rest, labels, temperature=4.0):
    """The other classes as one more outcome: what the student's kept classes leave of 1."""
    log_p_kept = F.log_softmax(student / temperature, dim=1).gather(1, indices)
    log_p_rest = (1 - log_p_kept.exp().sum(1, keepdim=True)).clamp(min=1e-8).log()
    log_p_student = torch.cat([log_p_kept, log_p_rest], dim=1)
    p_teacher = F.softmax(torch.cat([values, rest.unsqueeze(1)], dim=1) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_p_student, p_teacher, reduction="batchmean")


def kd_of_top_k(student, values, indices, rest, labels):
    return kdfast.KD()(student, kdfast.TopK(values, indices, rest, temperature=4.0))


def liger_kd(student, teacher, labels, temperature=4.0):
    from liger_kernel.transformers import LigerKLDIVLoss

    log_p_student, p_teacher = F.log_softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    return temperature**2 * LigerKLDIVLoss(reduction="batchmean")(log_p_student, p_teacher)


def liger_jsd(student, teacher, labels):
    from liger_kernel.transformers import LigerJSD

    return LigerJSD(beta=0.5)(F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1))


# ---- the cases -------------------------------------------------------------------------------------------------------
def without_labels(loss):
    return lambda student, teacher, labels: loss(student, teacher)


def without_teacher(loss):
    return lambda student, teacher, labels: loss(student, labels)


LOSSES = {  # name -> eager, kdfast, liger
    "KD": (eager_kd, without_labels(kdfast.KD()), liger_kd),
    "KD of top-50": (eager_top_k, kd_of_top_k, None),
    "KD + CE": (eager_kd_ce, kdfast.KD(alpha=0.9), None),
    "DKD": (eager_dkd, kdfast.DKD(), None),
    "JSD": (eager_jsd, without_labels(kdfast.JSD()), liger_jsd),
    "ReverseKD": (eager_reverse_kd, without_labels(kdfast.ReverseKD()), None),
    "TfKDReg": (eager_tf_reg, without_teacher(kdfast.TfKDReg()), None),
    "LabelRefinery": (eager_label_refinery, without_labels(kdfast.LabelRefinery()), None),
}


def case(name, rows, cols, dtype="float32"):
    """`name` of LOSSES on [rows, cols] logits."""
    eager, ours, liger = LOSSES[name]

    def inputs(device):
        options = {"device": device, "dtype": getattr(torch, dtype)}
        student, teacher = torch.randn(rows, cols, **options), torch.randn(rows, cols, **options)
        if name == "LabelRefinery":
            teacher = teacher.softmax(dim=1)
        teacher = [teacher]
        if name == "KD of top-50":
            teacher = kdfast.TopK.of(*teacher, min(KEPT, cols), temperature=4.0)[:3]
        return student.requires_grad_(), *teacher, torch.randint(cols, (rows,), device=device)

    # Forward reads its inputs; backward reads them again and writes the student's gradient. Labels are nothing beside,
    # nor is a top-k teacher.
    read = 1 if name in ("TfKDReg", "KD of top-50") else 2
    matrix = rows * cols * getattr(torch, dtype).itemsize
    floor = {"forward": read * matrix, "backward": (read + 1) * matrix, "both": (2 * read + 1) * matrix}
    return Case(name, f"{rows} x {cols}", inputs, eager, ours, floor, dtype=dtype, liger=liger)


def cases(settings, shapes):
    """KD at all shapes, on a GPU in bfloat16 too; the other losses at a few. `shapes`, if any, replaces them all."""
    kd, others = (shapes, shapes) if shapes else (SHAPES, OTHER_SHAPES)
    if settings.quick:
        kd, others = kd[:1], others[:1]
    dtypes = ["float32", "bfloat16"] if settings.device == "cuda" else ["float32"]
    chosen = [case("KD", *shape, dtype) for dtype in dtypes for shape in kd]
    return chosen + [case(name, *shape) for name in LOSSES if name != "KD" for shape in others]


def host_cases():
    """Every loss on logits so small that only the host's overhead is left."""
    return [case(name, *HOST_SHAPE) for name in LOSSES]


# ---- the measurements ------------------------------------------------------------------------------------------------
test_ceiling, test_loss, test_host = harness.measure_ceiling, harness.measure_loss, harness.measure_host
