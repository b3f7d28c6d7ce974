"""DIST, which is plain PyTorch with a written gradient and has no kernel: as test_softmax_kl.py tests the ops."""

import behaviour
import oracles
import pytest
import torch
from conftest import assert_close

import kdfast

SHAPES = [
    (1, 1),  # every correlation is 0 / 1e-8
    (1, 9),  # one sample: the columns are constant
    (5, 2),  # rows of two classes correlate as +1 or -1
    (5, 9),
    (33, 1025),  # one class more than the 1024 that are summed at a time
    (1100, 7),  # and the same for the columns
]


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(request.param)


def make(device, *shape, dtype=torch.float64, scale=3.0):
    return ((torch.randn(shape, dtype=torch.float64) * scale).to(dtype).to(device) for _ in range(2))


def sizes(student, teacher, parameters):
    """A correlation of n numbers is a sum of terms up to 1; its slope in an entry x is at most 1 / |x - mean|."""
    beta, gamma, temperature = parameters
    if student.dim() == 4:
        return temperature**2 * (beta + gamma), None
    p = [torch.softmax(x.detach().double() / temperature, 1) for x in (student, teacher)]
    rows, cols = student.shape
    by_row = [1 / (x.norm(dim=1, keepdim=True) + 1e-8) for x in (y - y.mean(1, keepdim=True) for y in p)]
    by_col = [1 / (x.norm(dim=0) + 1e-8) for x in (y - y.mean(0) for y in p)]
    slopes = [beta / rows * r + gamma / cols * c for r, c in zip(by_row, by_col, strict=True)]
    return temperature**2 * (beta + gamma), [
        temperature * y * (s + (y * s).sum(1, keepdim=True)) for y, s in zip(p, slopes, strict=True)
    ]


def check(student, teacher, *parameters):
    student, teacher = (x.detach().requires_grad_() for x in (student, teacher))
    loss = kdfast.DIST(*parameters)(student, teacher)
    got = torch.autograd.grad(loss, (student, teacher))
    wide = [x.detach().double().requires_grad_() for x in (student, teacher)]
    want = oracles.DIST(*wide, *parameters)
    expected = torch.autograd.grad(want, wide)
    value, slopes = sizes(student, teacher, parameters)
    terms = max(student.shape)
    assert_close(loss, want, value, terms, loss.dtype)
    for x, a, b, slope in zip((student, teacher), got, expected, slopes, strict=True):
        assert a.dtype == x.dtype
        assert_close(a, b, slope, terms, loss.dtype, "gradient")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matches_oracle(device, shape, dtype):
    if min(shape) == 1:
        # Constant columns (rows): the sign of rounding errors over 1e-8 decides, so only the value is defined.
        student, teacher = make(device, *shape, dtype=dtype)
        loss = kdfast.DIST(2.0, 1.0)(student.requires_grad_(), teacher)
        torch.testing.assert_close(loss.double(), oracles.DIST(student, teacher, 2.0, 1.0), rtol=1e-5, atol=0)
        assert torch.autograd.grad(loss, student)[0].isfinite().all()
        return
    check(*make(device, *shape, dtype=dtype), 1.0, 1.0, 1.0)
    check(*make(device, *shape, dtype=dtype), 2.0, 0.5, 4.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(device, dtype):
    student, teacher = make(device, 5, 33, dtype=dtype)
    assert kdfast.DIST()(student, teacher).dtype == torch.float32
    check(student, teacher, 1.0, 1.0, 2.0)


def test_maps(device):
    """(B, C, H, W): every position is a sample."""
    student, teacher = (x.requires_grad_() for x in make(device, 2, 5, 4, 3))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        inputs = [x.detach().contiguous(memory_format=memory_format).requires_grad_() for x in (student, teacher)]
        loss, want = kdfast.DIST()(*inputs), oracles.DIST(student, teacher)
        torch.testing.assert_close(loss, want)
        for got, expected in zip(
            torch.autograd.grad(loss, inputs), torch.autograd.grad(want, (student, teacher)), strict=True
        ):
            torch.testing.assert_close(got, expected)


def test_layouts(device):
    student, teacher = make(device, 6, 9)
    want = kdfast.DIST()(student, teacher)
    for change in (lambda x: x.t().contiguous().t(), lambda x: torch.stack([x, x], -1)[..., 0]):
        torch.testing.assert_close(kdfast.DIST()(change(student), change(teacher)), want)
        check(change(student), change(teacher), 1.0, 1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_edges(device, dtype):
    """Equal networks leave what 1e-8 adds; constant, confident and huge logits: finite."""
    student, teacher = make(device, 6, 9, dtype=dtype)
    loss = kdfast.DIST()(student, student.clone())
    assert 0 <= loss.abs() < 1e-6
    extremes = {
        "constant": torch.zeros_like(student),
        "confident": torch.nn.functional.one_hot(torch.arange(6) % 9, 9).to(device) * 1000.0,
        "duplicate": student[:1].expand_as(student),
        "huge": student * 1e4,
        "masked": student.clone().index_fill_(1, torch.tensor([2, 5], device=device), -float("inf")),
    }
    for x in extremes.values():
        for a, b in ((x.to(dtype), teacher), (teacher, x.to(dtype)), (x.to(dtype), x.to(dtype))):
            a, b = (y.detach().clone().requires_grad_() for y in (a, b))
            loss = kdfast.DIST()(a, b)
            assert loss.isfinite()
            assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (a, b)))
    empty = student[:0].requires_grad_()
    loss = kdfast.DIST()(empty, teacher[:0])
    assert loss == 0 and torch.autograd.grad(loss, empty)[0].shape == (0, 9)


def test_errors(dtensor):
    x = torch.randn(4, 5)
    for arguments, message in (
        ((x[None], x[None]), "student must be 2-D"),
        ((x, x[:, :4]), "teacher must have the student's shape"),
        ((x[None, None], x), "student must be 2-D"),
    ):
        with pytest.raises(ValueError, match=message):
            kdfast.DIST()(*arguments)
    with pytest.raises(TypeError, match="student is a DTensor"):
        kdfast.DIST()(dtensor(x), x)
    with pytest.raises(RuntimeError, match="torch.func transform"):
        torch.vmap(kdfast.DIST())(x[None], x[None])
    with pytest.raises(ValueError, match="temperature must be finite and above 0"):
        kdfast.DIST(temperature=0)


@pytest.mark.parametrize("shape", [(64, 100), (1, 100_000), (20_000, 3)], ids=str)
def test_behaviour(device, shape, same_bits):
    behaviour.check_loss(kdfast.DIST(), list(make(device, *shape, dtype=torch.float32)), same_bits, changed=(0, 1))
