"""Distillation in wide networks: the logit that a student reaches, and how much data it takes."""

import math

import behaviour
import pytest
import torch

import kdfast

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def slope(z, teacher, label, rho, temperature):
    """The derivative of the binary loss, which is 0 at the root."""
    soft = torch.sigmoid(z / temperature) - torch.sigmoid(teacher / temperature)
    return rho / temperature * soft + (1 - rho) * (torch.sigmoid(z) - label)


def teachers(dtype=torch.float64):
    """Logits, each with both labels."""
    teacher = torch.tensor([-30.0, -8.0, -1.5, -1e-3, 0.0, 0.3, 2.0, 5.0, 25.0], dtype=dtype)
    label = torch.tensor([0, 1]).repeat_interleave(len(teacher))
    return teacher.repeat(2), label


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0, 20.0])
@pytest.mark.parametrize("rho", [1e-6, 0.1, 0.5, 0.9, 1 - 1e-6])
def test_root(rho, temperature):
    """The loss has its minimum there: its slope is below 0 just before, above 0 just after."""
    teacher, label = teachers()
    z = kdfast.effective_logit(teacher, label, rho, temperature)
    assert z.dtype == torch.float64 and z.shape == teacher.shape
    moderate = teacher.abs() <= 8 * min(temperature, 1)  # beyond, the slope is smaller than its rounding
    before, after = (slope(z + d, teacher, label, rho, temperature)[moderate] for d in (-1e-5, 1e-5))
    assert (before < 0).all() and (after > 0).all()
    # Between the teacher and the label's side.
    assert torch.where(label == 1, z >= teacher, z <= teacher).all()


def test_ends_of_the_soft_ratio():
    """Only soft labels: the teacher itself. Only hard ones: as far as it goes."""
    teacher, label = teachers()
    assert torch.equal(kdfast.effective_logit(teacher, label, 1.0, 4.0), teacher)
    assert torch.equal(kdfast.effective_logit(teacher, label, 0.0, 4.0), torch.where(label == 1, math.inf, -math.inf))


def test_monotone():
    """In the teacher's logit, and towards the label as the soft ratio falls."""
    teacher = torch.linspace(-40, 40, 400, dtype=torch.float64)
    ratios = [1.0, 0.9, 0.5, 0.1, 0.01, 0.0]
    for label in (0, 1):
        roots = torch.stack(
            [kdfast.effective_logit(teacher, torch.full_like(teacher, label), rho, 2.0) for rho in ratios]
        )
        assert (roots[:-1].diff(dim=1) >= 0).all()
        towards = roots[1:] >= roots[:-1] if label else roots[1:] <= roots[:-1]
        assert towards.all()


def test_mirror():
    """Label 0 with -t is label 1 with t, mirrored, to the last bit."""
    teacher, _ = teachers()
    one = kdfast.effective_logit(teacher, torch.ones_like(teacher), 0.3, 4.0)
    zero = kdfast.effective_logit(-teacher, torch.zeros_like(teacher), 0.3, 4.0)
    assert torch.equal(one, -zero)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_extreme_logits(dtype, temperature):
    """As large as the type has them: finite where the teacher is, and so is the gradient."""
    largest = min(torch.finfo(dtype).max, 1e30)
    teacher = torch.tensor([-largest, -1e4, -500.0, 500.0, 1e4, largest], dtype=dtype).requires_grad_()
    for label in (0, 1):
        for rho in (0.01, 0.5, 0.99):
            z = kdfast.effective_logit(teacher, torch.full(teacher.shape, label), rho, temperature)
            assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and z.isfinite().all()
            (grad,) = torch.autograd.grad(z.sum(), teacher)
            assert grad.dtype == dtype and grad.isfinite().all() and (grad >= 0).all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("rho", [0.1, 0.5, 0.9])
def test_gradient(rho, temperature):
    """Of the implicit function."""
    teacher, label = teachers()
    moderate = teacher.abs() <= 8
    teacher, label = teacher[moderate].requires_grad_(), label[moderate]
    call = lambda t: kdfast.effective_logit(t, label, rho, temperature)  # noqa: E731
    assert torch.autograd.gradcheck(call, teacher)
    behaviour.check_refuses_second_derivative(call(teacher).sum(), teacher)


def test_gradient_at_the_ends():
    teacher, label = teachers()
    teacher.requires_grad_()
    for rho in (0.0, 1.0):
        z = kdfast.effective_logit(teacher, label, rho, 4.0)
        assert (torch.autograd.grad(z, teacher, torch.ones_like(z))[0] == rho).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_shapes_and_types(dtype):
    """Any shape, none and empty too; labels of any type; the same numbers entry by entry."""
    teacher, label = teachers(torch.float32)
    z = kdfast.effective_logit(teacher, label, 0.5, 4.0)
    square = kdfast.effective_logit(teacher.view(2, 9), label.view(2, 9).to(dtype), 0.5, 4.0)
    assert square.dtype == torch.float32 and torch.equal(square.flatten(), z)
    assert torch.equal(kdfast.effective_logit(teacher[3], label[3].to(dtype), 0.5, 4.0), z[3])
    assert kdfast.effective_logit(teacher[:0], label[:0], 0.5, 4.0).shape == (0,)


def test_compile():
    teacher, label = teachers(torch.float32)
    behaviour.check_compiled(
        lambda t: kdfast.effective_logit(t, label, 0.3, 4.0).sum(), [teacher.clamp(-8, 8)], backend="aot_eager"
    )


def test_no_host_sync(cuda):
    teacher, label = (x.cuda() for x in teachers(torch.float32))
    behaviour.check_no_host_sync(lambda t: kdfast.effective_logit(t, label, 0.3, 4.0).sum(), [teacher.clamp(-8, 8)])


# ---- data inefficiency -----------------------------------------------------------------------------------------------
def test_data_inefficiency():
    """The exponent where weights move as a power of the number of samples; of the mean over the runs."""
    sizes = [10, 20, 40, 100]
    power = [3 * n**0.37 for n in sizes]
    for changes in (power, torch.tensor(power), [power, power]):
        got = kdfast.data_inefficiency(sizes, changes)
        assert got.dtype == torch.float64 and got.shape == (3,)
        torch.testing.assert_close(got, torch.full((3,), 0.37, dtype=torch.float64), rtol=1e-6, atol=0)
    assert not kdfast.data_inefficiency(sizes, [2.0] * 4).any()
    mean = kdfast.data_inefficiency([1, 2], [[1.0, 1.0], [1.0, 3.0]])
    torch.testing.assert_close(mean.item(), 1.0)


ERRORS = [
    (lambda t, y: kdfast.effective_logit(1.0, y, 0.5, 1.0), TypeError, "teacher_logit must be a torch.Tensor"),
    (lambda t, y: kdfast.effective_logit(t.long(), y, 0.5, 1.0), TypeError, "teacher_logit must be float32"),
    (lambda t, y: kdfast.effective_logit(t, 1, 0.5, 1.0), TypeError, "label must be a torch.Tensor, got int"),
    (
        lambda t, y: kdfast.effective_logit(t, y[:3], 0.5, 1.0),
        ValueError,
        r"label must have teacher_logit's shape \(18,\), got \(3,\)",
    ),
    (lambda t, y: kdfast.effective_logit(t, y - 1, 0.5, 1.0), ValueError, "label must be 0 or 1, got -1"),
    (lambda t, y: kdfast.effective_logit(t, y / 2, 0.5, 1.0), ValueError, "label must be 0 or 1, got 0.5"),
    (lambda t, y: kdfast.effective_logit(t, y.to("meta"), 0.5, 1.0), ValueError, "label must be on teacher_logit's"),
    (lambda t, y: kdfast.effective_logit(t, y, 1.5, 1.0), ValueError, "soft_ratio must be from 0 to 1, got 1.5"),
    (lambda t, y: kdfast.effective_logit(t, y, 0.5, 0), ValueError, "temperature must be finite and above 0, got 0"),
    (lambda t, y: kdfast.data_inefficiency([1], [1]), ValueError, "sizes must be at least two rising numbers above 0"),
    (lambda t, y: kdfast.data_inefficiency([2, 1], [1, 1]), ValueError, r"sizes must be .*got \[2.0, 1.0\]"),
    (lambda t, y: kdfast.data_inefficiency([0, 1], [1, 1]), ValueError, "sizes must be"),
    (
        lambda t, y: kdfast.data_inefficiency([1, 2], [1, 1, 1]),
        ValueError,
        r"weight_changes must be \(runs, 2\) numbers above 0, got shape \(1, 3\)",
    ),
    (lambda t, y: kdfast.data_inefficiency([1, 2], [1, 0]), ValueError, "weight_changes must be"),
    (lambda t, y: kdfast.data_inefficiency([1, 2], [1, math.inf]), ValueError, "weight_changes must be"),
    (lambda t, y: kdfast.data_inefficiency([1, 2], torch.zeros(0, 2)), ValueError, "weight_changes must be"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(*teachers())
