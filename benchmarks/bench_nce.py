"""CRD's step against memory banks, compared with its official code's, eager and through torch.compile.

A call is the loss of both directions, its gradient, and the update of both banks. `kdfast bench` runs this file and
makes tables of it; `pytest benchmarks/bench_nce.py` shows the raw figures. A `--shape` is BATCHxNEGATIVES.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F

import kdfast

from . import harness
from .harness import Case

FAMILY = "nce"
DIM, TEMPERATURE, MOMENTUM, CLASSES = 128, 0.07, 0.5, 100
CIFAR, IMAGENET = 50_000, 1_281_167  # rows of a bank
SHAPES = [(64, 4096, CIFAR), (64, 16384, CIFAR), (256, 16384, IMAGENET)]
SAMPLED = (64, 4096, CIFAR)  # with the negatives' choice in the step
HOST_SHAPE = (2, 3, 10)
Z = 3e4  # of a bank of CIFAR's size; its value costs nothing
LARGEST_FALLBACK = 2**21  # scores; beyond, plain PyTorch on a CPU takes seconds a call


# ---- the baseline ----------------------------------------------------------------------------------------------------
def contrast_loss(scores, negatives, rows):
    noise = negatives / rows
    positive, others = scores[:, 0], scores[:, 1:]
    log_d1 = torch.div(positive, positive + (noise + 1e-7)).log()
    log_d0 = torch.div(torch.full_like(others, noise), others + (noise + 1e-7)).log()
    return -(log_d1.sum() + log_d0.sum()) / len(scores)


def eager_nce(student, teacher, bank_student, bank_teacher, contrast_index):
    """Both banks' rows gathered, [B, K + 1, D], and kept for the backward."""
    batch, columns = contrast_index.shape
    flat, loss = contrast_index.view(-1), 0.0
    for anchors, bank in ((teacher, bank_student), (student, bank_teacher)):
        rows = torch.index_select(bank, 0, flat).view(batch, columns, -1).to(anchors.dtype)
        scores = torch.exp(torch.div(torch.bmm(rows, anchors.unsqueeze(2)).squeeze(2), TEMPERATURE))
        loss = loss + contrast_loss(torch.div(scores, Z), columns - 1, len(bank))
    return loss


def eager_update(bank, rows, index):
    with torch.no_grad():
        moved = torch.index_select(bank, 0, index).mul_(MOMENTUM).add_(torch.mul(rows, 1 - MOMENTUM))
        bank.index_copy_(0, index, moved.div(moved.pow(2).sum(1, keepdim=True).pow(0.5)).to(bank.dtype))


def eager_crd(student, teacher, bank_student, bank_teacher, contrast_index):
    loss = eager_nce(student, teacher, bank_student, bank_teacher, contrast_index)
    for bank, rows in ((bank_student, student), (bank_teacher, teacher)):
        eager_update(bank, rows, contrast_index[:, 0])
    return loss


@functools.lru_cache(maxsize=1)
def members_of_other_classes(rows):
    """For each class the rows of all others, as the official data set lists them once."""
    labels = np.arange(rows) % CLASSES
    return [np.flatnonzero(labels != label) for label in range(CLASSES)]


def loader_sampling(index, negatives, rows):
    """A loader's work: for each sample NumPy chooses negatives of other classes, without replacement where it can."""
    others = members_of_other_classes(rows)
    drawn = []
    for row in index.tolist():
        candidates = others[row % CLASSES]
        drawn.append(np.hstack([[row], np.random.choice(candidates, negatives, replace=negatives > len(candidates))]))
    return torch.from_numpy(np.stack(drawn)).to(index.device)


# ---- kdfast ----------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=1)
def constants(device):
    return [torch.tensor(Z, dtype=torch.float64, device=device) for _ in range(2)]


def kdfast_crd(student, teacher, bank_student, bank_teacher, contrast_index):
    z = constants(student.device)
    loss = kdfast.ops.nce(student, teacher, bank_student, bank_teacher, contrast_index, *z, TEMPERATURE)
    index = contrast_index[:, 0].contiguous()
    for bank, rows in ((bank_student, student), (bank_teacher, teacher)):
        kdfast.ops.update_bank(bank, rows, index, MOMENTUM)
    return loss


# ---- the cases -------------------------------------------------------------------------------------------------------
def eager_bytes(batch, negatives, itemsize):
    """What the eager formula needs at its peak: both gathered tensors, also widened if the banks are narrow; scores."""
    return 2 * batch * (negatives + 1) * (DIM * (4 + (itemsize if itemsize < 4 else 0)) + 8 * 4)


def inputs_of(batch, negatives, rows, dtype):
    def inputs(device):
        anchors = [F.normalize(torch.randn(batch, DIM, device=device)).requires_grad_() for _ in range(2)]
        bound = 1 / (DIM / 3) ** 0.5
        banks = [torch.empty(rows, DIM, dtype=dtype, device=device).uniform_(-bound, bound) for _ in range(2)]
        return *anchors, *banks, torch.randint(rows, (batch, negatives + 1), device=device)

    return inputs


def name_of(rows):
    return f"{rows / 1e6:.2f}M rows" if rows >= 10**6 else f"{rows} rows"


def case(batch, negatives, rows=CIFAR, dtype=torch.float32, device="cpu"):
    """CRD with `negatives` for each of `batch` anchors, on banks of `rows`. Both banks' rows have to be read once."""
    floor = 2 * batch * (negatives + 1) * DIM * dtype.itemsize
    left_out = {}
    if (needed := eager_bytes(batch, negatives, dtype.itemsize)) > harness.memory_limit(device):
        left_out = {"eager": f"out of memory: {needed / 1e9:.0f} GB", "compile": "out of memory"}
    if device == "cpu" and batch * negatives > LARGEST_FALLBACK:
        left_out["fallback"] = "-"
    return Case(
        "CRD" if dtype == torch.float32 else "CRD, bfloat16 banks",
        f"{batch} x {negatives}, {name_of(rows)}",
        inputs_of(batch, negatives, rows, dtype),
        eager_crd,
        kdfast_crd,
        floor={phase: 0 if phase == "backward" else floor for phase in harness.PHASES},
        ceiling="gather",
        phases=harness.PHASES[:1],  # the gradient belongs to the forward, so that only the sum compares
        left_out=left_out,
    )


def sampled_case(batch, negatives, rows):
    """The same with the choice of the negatives: by a loader, or on the device."""

    def eager(student, teacher, bank_student, bank_teacher, contrast_index):
        drawn = loader_sampling(contrast_index[:, 0], negatives, rows)
        return eager_crd(student, teacher, bank_student, bank_teacher, drawn)

    labels = functools.lru_cache(lambda device: torch.arange(rows, device=device) % CLASSES)

    def ours(student, teacher, bank_student, bank_teacher, contrast_index):
        index = contrast_index[:, 0].contiguous()
        drawn = kdfast.ops.draw_negatives(index, negatives, rows, 0, labels(index.device))
        return kdfast_crd(student, teacher, bank_student, bank_teacher, drawn)

    plain = case(batch, negatives, rows)
    options = {"ceiling": plain.ceiling, "phases": plain.phases, "left_out": {"compile": "-", "fallback": "-"}}
    return Case("CRD + sampling", plain.shape, plain.inputs, eager, ours, plain.floor, **options)


def cases(settings, shapes):
    """CRD at all shapes, with narrow banks at the largest, and with sampling; `shapes`, if any, replaces them."""
    if shapes:
        return [case(*shape, device=settings.device) for shape in shapes]
    if settings.quick:
        return [case(*SHAPES[0], device=settings.device)]
    every = [case(*shape, device=settings.device) for shape in SHAPES]
    return [*every, case(*SHAPES[-1], torch.bfloat16, settings.device), sampled_case(*SAMPLED)]


def host_cases():
    """CRD on so few rows that only the host's overhead is left."""
    return [case(*HOST_SHAPE)]


# ---- the measurements ------------------------------------------------------------------------------------------------
test_ceiling, test_loss, test_host = harness.measure_ceiling, harness.measure_loss, harness.measure_host
