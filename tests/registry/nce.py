"""Anchors against memory banks: noise-contrastive estimation, and what CRD's step needs beside."""

import math

import oracles
import torch
from torch.nn import functional as F

import kdfast
from kdfast import ops
from registry import Group, Op, program_of, scaled


def make(shape):
    """Anchors [B, D], banks [N, D], contrast_index [B, K + 1], and both constants."""
    batch, negatives, dim, rows = shape

    def unit(n):
        return torch.nn.functional.normalize(torch.randn(n, dim, dtype=torch.float64), dim=1)

    return {
        "student": unit(batch),
        "teacher": unit(batch),
        "bank_student": unit(rows),
        "bank_teacher": unit(rows),
        "contrast_index": torch.randint(rows, (batch, negatives + 1)),
        "z_student": torch.tensor(1.5 * rows, dtype=torch.float64),
        "z_teacher": torch.tensor(4.0 * rows, dtype=torch.float64),
    }


def sizes_nce(student, teacher, bank_student, bank_teacher, contrast_index, z_student, z_teacher, temperature=0.07):
    """-> value, entries of the gradients in student and teacher. A logit v is off by the rounding of its products."""
    value, entries = 0.0, []
    log_c = math.log((contrast_index.shape[1] - 1) / len(bank_student) + 1e-7)
    for anchors, bank, z in ((student, bank_teacher, z_student), (teacher, bank_student, z_teacher)):
        rows = bank[contrast_index]
        shift = z.log() + log_c
        off = 1 + (anchors[:, None] * rows).abs().sum(2) / temperature + shift.abs()
        v = oracles._nce_scores(anchors, bank, contrast_index, temperature) - shift
        v[:, 0] *= -1
        slopes = v.sigmoid()
        value = value + (F.softplus(v) + slopes * off).sum() / max(1, len(anchors))
        entries.append(((slopes * off)[..., None] * rows.abs()).sum(1) / temperature / max(1, len(anchors)))
    return value, *entries


def nce(temperature=0.07):
    def sizes(g, student, teacher, bank_student, bank_teacher, contrast_index, z_student, z_teacher):
        banks = bank_student, bank_teacher, contrast_index, z_student, z_teacher
        return scaled(g, sizes_nce(student, teacher, *banks, temperature))

    def memory(x, kernel):
        """Nothing of size B x K x D: within 2 % of the two tensors that the official code gathers."""
        gathered = 2 * 4 * x["contrast_index"].numel() * x["student"].shape[1]
        return (0.02 if kernel else 0.2) * gathered

    return Op(
        "nce",
        lambda o, student, teacher, bank_student, bank_teacher, contrast_index, z_student, z_teacher: o.nce(
            student, teacher, bank_student, bank_teacher, contrast_index, z_student, z_teacher, temperature
        ),
        sizes,
        memory=memory,
    )


GROUPS = [
    Group(
        "nce",
        make,
        [nce()],
        cases=[  # anchors, negatives, features, rows of the banks
            (1, 1, 1, 2),
            (3, 5, 9, 7),  # rows shorter than a vector of 16, and more draws than rows
            (5, 16, 64, 33),  # one row more than a tile of 16
            (2, 300, 20, 50),  # more rows than a warp's 256 for one anchor
            (3, 6, 260, 9),  # one step more than a warp reads at once
            (2, 5, 1030, 6),  # more features than a warp keeps in registers
            (2, 2100, 8, 40),  # more rows than one task of the CPU's 2048
            (4, 0, 16, 5),  # no negatives
        ],
        small=(3, 5, 9, 7),
        half=(3, 20, 40, 11),
        laid_out=((4, 6, 35, 9),),
        leaves=("student", "teacher"),
        typed=("student", "teacher", "bank_student", "bank_teacher"),
        fixed=("z_student", "z_teacher"),
        cols=lambda x: max(x["contrast_index"].shape[1], x["student"].shape[1]),
        layouts={
            **dict.fromkeys(("student", "teacher", "bank_student", "bank_teacher"), "rows"),
            "contrast_index": lambda t: t.t().contiguous().t(),
        },
        contiguous=False,
        largest=lambda name, t: torch.nn.functional.normalize(t.sign(), dim=1),
        deterministic=(
            (64, 100, 30, 90),  # several anchors for each thread
            (2, 5000, 70, 90),  # several tasks for each anchor
            (9, 40, 1100, 50),
        ),
        deterministic_simt=((64, 100, 30, 90), (2, 600, 70, 90), (9, 40, 1100, 50)),
        memory=(32, 2048, 128, 500),
        memory_dtypes=((torch.float32,), (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16)),
    )
]


# ---- raw ops, programs -----------------------------------------------------------------------------------------------
def raw_calls(device):
    x = GROUPS[0].inputs(device, GROUPS[0].small, torch.float32)
    student, teacher, bank_student, bank_teacher, contrast_index, z_student, z_teacher = given = tuple(x.values())
    index = contrast_index[:, 0].contiguous()
    labels, table = torch.arange(7, device=index.device) % 3, ops.alias_table(torch.rand(7, device=index.device))
    seed = torch.tensor(5, device=index.device)
    return [
        ("nce", (*given, 0.07, True, True)),
        ("nce", (*given, 0.07, False, False)),
        ("nce_log_sums", (*given[:5], -z_student, z_teacher, 0.07)),
        ("update_bank", (bank_student, student, index, 0.5)),
        ("draw_negatives", (index, 4, 7, seed, None, None)),
        ("draw_negatives", (index, 4, 7, seed, labels, table)),
    ]


PROGRAMS = [program_of(GROUPS[0])]


# ---- errors ----------------------------------------------------------------------------------------------------------
def bad_inputs():
    return ()


def crd(**options):
    return kdfast.CRD(6, 4, 10, feature_dim=8, negatives=3, **options)


S, T, INDEX = torch.randn(5, 6), torch.randn(5, 4), torch.arange(5)
A, BANK, PAIRS, Z = torch.randn(5, 8), torch.randn(10, 8), torch.zeros(5, 3, dtype=torch.int64), torch.tensor(2.0)
ERRORS = [
    (lambda: ops.nce(A[0], A, BANK, BANK, PAIRS, Z, Z), ValueError, r"student must be \(batch, features\)"),
    (
        lambda: ops.nce(A, A[:, :3], BANK, BANK, PAIRS, Z, Z),
        ValueError,
        r"teacher must have the student's shape \(5, 8\)",
    ),
    (lambda: ops.nce(A, A, BANK[:, :3], BANK, PAIRS, Z, Z), ValueError, r"bank_student must have shape \(rows, 8\)"),
    (
        lambda: ops.nce(A, A, BANK, BANK[:3], PAIRS, Z, Z),
        ValueError,
        "bank_teacher must have as many rows .* 10, got 3",
    ),
    (lambda: ops.nce(A, A, BANK.int(), BANK, PAIRS, Z, Z), TypeError, "bank_student must be float32"),
    (lambda: ops.nce(A, A, BANK, BANK, PAIRS.int(), Z, Z), TypeError, r"contrast_index must be int64 of shape \(5, K"),
    (lambda: ops.nce(A, A, BANK, BANK, PAIRS[:4], Z, Z), ValueError, r"contrast_index must have shape \(5, K \+ 1\)"),
    (lambda: ops.nce(A, A, BANK, BANK, PAIRS[:, :0], Z, Z), ValueError, r"contrast_index must have shape"),
    (lambda: ops.nce(A, A, BANK, BANK, PAIRS, 2.0, Z), TypeError, "z_student must be a torch.Tensor, got float"),
    (lambda: ops.nce(A, A, BANK, BANK, PAIRS, Z, Z[None]), ValueError, r"z_teacher must be 0-d, got shape \(1,\)"),
    (lambda: ops.nce(A, A, BANK, BANK, PAIRS, Z, Z, 0.0), ValueError, "temperature must be finite and above 0, got 0"),
    (lambda: ops.nce(A, A.to("meta"), BANK, BANK, PAIRS, Z, Z), ValueError, "teacher must be on the student's device"),
    (lambda: ops.update_bank(BANK.t(), A, INDEX), ValueError, "bank must be 2-D and contiguous"),
    (lambda: ops.update_bank(BANK, A[:, :3], INDEX), ValueError, r"rows must have shape \(B, 8\)"),
    (lambda: ops.update_bank(BANK, A, INDEX, 1.5), ValueError, "momentum must be from 0 to 1, got 1.5"),
    (lambda: ops.update_bank(BANK, A, INDEX[:3]), ValueError, r"index must have shape \(5,\), got \(3,\)"),
    (lambda: ops.draw_negatives(INDEX, 0, 10, 1), ValueError, "k must be at least 1, got 0"),
    (lambda: ops.draw_negatives(INDEX, 3, 2**31, 1), ValueError, "n_data must be at most 2147483647"),
    (lambda: ops.draw_negatives(INDEX, 3, 10, torch.zeros(2)), TypeError, "seed must be an int or a 0-d int64 tensor"),
    (lambda: ops.draw_negatives(INDEX, 3, 10, 1, INDEX), ValueError, r"labels must be integers of shape \(10,\)"),
    (
        lambda: ops.draw_negatives(INDEX, 3, 10, 1, table=PAIRS),
        ValueError,
        r"table must be alias_table's, int64 \(10, 2\)",
    ),
    (lambda: ops.alias_table(torch.zeros(3)), ValueError, "weights must be finite, at least 0, and with a positive"),
    (lambda: ops.alias_table(torch.tensor([1.0, -1.0])), ValueError, "weights must be finite"),
    (lambda: ops.alias_table(torch.ones(0)), ValueError, r"weights must be \(n,\) with n from 1"),
    (lambda: kdfast.CRD(6, 4, 0), ValueError, "n_data must be at least 1, got 0"),
    (lambda: kdfast.CRD(6, 4, 10, negatives=2.5), TypeError, "negatives must be an int, got float"),
    (lambda: crd(temperature=0), ValueError, "temperature must be finite and above 0"),
    (lambda: crd(momentum=-0.1), ValueError, "momentum must be from 0 to 1"),
    (lambda: crd(bank_dtype=torch.int8), TypeError, "bank_dtype must be float32, .* got torch.int8"),
    (lambda: crd(labels=INDEX), ValueError, r"labels must be integers of shape \(10,\)"),
    (
        lambda: kdfast.CRD(6, 4, 2**31 - 1, 2**20),
        MemoryError,
        "need 18014398501093376 bytes .*bank_dtype .*feature_dim",
    ),
    (lambda: crd()(T, T, INDEX), ValueError, r"student must have student_dim = 6 features, got shape \(5, 4\)"),
    (lambda: crd()(S, T[:4], INDEX), ValueError, "teacher must have the student's batch size 5"),
    (lambda: crd()(S, T, INDEX[:4]), ValueError, r"index must have shape \(5,\), got \(4,\)"),
    (lambda: crd()(S, T, INDEX.int()), TypeError, r"index must be int64 of shape \(5,\)"),
    (lambda: crd()(S, T, INDEX, INDEX), ValueError, r"contrast_index must have shape \(5, K \+ 1\), got \(5,\)"),
    (lambda: crd()(S, T, INDEX + 6), IndexError, r"index\[4\] is 10, expected a row from 0 to 9"),
    (lambda: crd()(S, T, INDEX, PAIRS - 1), IndexError, r"contrast_index\[0, 0\] is -1, expected a row from 0 to 9"),
]
