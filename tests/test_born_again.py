"""CWTM and DKPP: what they add to the ops that they run on."""

import behaviour
import oracles
import pytest
import torch
from official import Official, every_file

import kdfast


def make(device, rows=6, cols=9, dtype=torch.float64):
    student, teacher = ((torch.randn(rows, cols, dtype=torch.float64) * 3).to(dtype).to(device) for _ in range(2))
    return student, teacher, torch.randint(cols, (rows,), device=device)


# ---- CWTM ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cwtm_low_precision(implementation, dtype):
    student, teacher, labels = make(implementation.device, 33, 200, dtype)
    student.requires_grad_()
    loss, want = kdfast.CWTM()(student, teacher, labels), oracles.CWTM(student, teacher, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    got, expected = (torch.autograd.grad(x, student)[0] for x in (loss, want))
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=1e-5 if dtype == torch.float32 else 1e-3, atol=1e-7)


def test_cwtm_edges(implementation):
    """A teacher's row that is empty has no weight, even where the student's row is infinite; none at all, no loss."""
    student, teacher, labels = make(implementation.device)
    student[0, labels[0]] = teacher[0] = -float("inf")
    student.requires_grad_()
    loss = kdfast.CWTM()(student, teacher.requires_grad_(), labels)
    want = kdfast.CWTM()(student[1:].detach(), teacher[1:], labels[1:])
    torch.testing.assert_close(loss, want)
    grad, teacher_grad = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
    assert teacher_grad is None and grad.isfinite().all() and not grad[0].any() and grad[1:].any()
    for rows in (teacher.detach().fill_(-float("inf")), teacher[:0]):
        assert kdfast.CWTM()(student[: len(rows)], rows, labels[: len(rows)]) == 0


# ---- DKPP ------------------------------------------------------------------------------------------------------------
@every_file("ban_dkpp_permute")
def test_permute_matches_public_code(path):
    x = Official(path)
    moved = kdfast.DKPP().permute(x("teacher"), x("labels"), x("permutation"))
    assert torch.equal(moved, x["out_permuted_teacher"])


@pytest.mark.parametrize("keep", ["label", "argmax"])
def test_permute_draws_a_permutation_per_row(keep):
    """The kept class stays, the others move, unlike from row to row and from call to call; seeds repeat."""
    _, teacher, labels = make("cpu", 40, 20)
    dkpp, kept = kdfast.DKPP(keep=keep), labels if keep == "label" else teacher.argmax(1)
    torch.manual_seed(3)
    first, second = (dkpp.permute(teacher, labels) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, dkpp.permute(teacher, labels)) and not torch.equal(first, second)
    assert torch.equal(first.sort(1).values, teacher.sort(1).values)
    order = torch.stack([(row[:, None] == old).int().argmax(1) for row, old in zip(first, teacher, strict=True)])
    assert torch.equal(order[torch.arange(40), kept], kept)
    assert len({tuple(row) for row in order.tolist()}) == 40
    moved = (order != torch.arange(20)).float().mean()
    assert 0.8 < moved < 0.95  # 18/20 if all are equally likely


def test_dkpp_edges(implementation):
    """One class, and the student that equals the permuted teacher: exactly 0."""
    student, teacher, labels = make(implementation.device)
    permutation = torch.rand(6, 9, device=implementation.device).argsort(1)
    dkpp = kdfast.DKPP(temperature=2.0)
    moved = dkpp.permute(teacher, labels, permutation)
    assert dkpp(moved, teacher, labels, permutation.int()) == 0
    assert dkpp(student[:, :1], teacher[:, :1], labels * 0) == 0
    assert dkpp.permute(teacher.half(), labels).dtype == torch.float16


def test_errors():
    student, teacher, labels = make("cpu")
    short, twice = torch.zeros(6, 8, dtype=torch.int64), torch.arange(9).repeat(6, 1)
    twice[4, 0] = 3
    for arguments, error, message in (
        ((student[:, :4], teacher, labels), ValueError, "teacher must have the student's shape"),
        ((student, teacher, labels + 9), ValueError, r"labels\[0\] is .*, expected a class from 0 to 8"),
        ((student, teacher, labels * 0 - 100), ValueError, r"labels\[0\] is -100, expected a class from 0 to 8"),
        ((student, teacher, labels.double()), TypeError, "labels must be integers"),
    ):
        for loss in (kdfast.CWTM(), kdfast.DKPP()):
            with pytest.raises(error, match=message):
                loss(*arguments)
    for permutation, error, message in (
        (short, ValueError, r"permutation must have the shape \(6, 9\), got \(6, 8\)"),
        (twice.double(), TypeError, "permutation must be integers"),
        (twice, ValueError, r"permutation\[4\] must have every class from 0 to 8 once"),
    ):
        with pytest.raises(error, match=message):
            kdfast.DKPP()(student, teacher, labels, permutation)
    with pytest.raises(ValueError, match="keep must be one of label, argmax, got 'top'"):
        kdfast.DKPP(keep="top")
    with pytest.raises(ValueError, match="temperature must be finite and above 0"):
        kdfast.DKPP(temperature=0.0)


@pytest.mark.parametrize("name", ["CWTM", "DKPP"])
def test_behaviour(implementation, name, same_bits):
    student, teacher, labels = make(implementation.device, dtype=torch.float32)
    permutation = torch.rand(6, 9, device=implementation.device).argsort(1)
    more = (permutation,) if name == "DKPP" else ()
    loss = getattr(kdfast, name)()

    def function(student, teacher):
        return loss(student, teacher, labels, *more)

    behaviour.check_loss(function, [student, teacher], same_bits)
