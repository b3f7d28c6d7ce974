"""Terms of images made without data: their formulas, and their edges."""

import behaviour
import oracles
import pytest
import torch
from behaviour import FLOATS, HALVES

import kdfast


def make(device, shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def statistics(x):
    """What a batch norm of as many channels may have seen."""
    channels = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
    return channels / 4 - 0.5, 1 + channels / 3


# Each term as a function of one tensor that gives one number, for kdfast and for the oracles.
TERMS = {
    "statistics": lambda m, x: m.bn_statistics_loss(x, *statistics(x)),
    "statistics_1": lambda m, x: m.bn_statistics_loss(x, *statistics(x), p=1, alpha_mean=0.5, alpha_var=2.0),
    "variation_1": lambda m, x: m.total_variation(x)[0],
    "variation_2": lambda m, x: m.total_variation(x)[1],
    "similarity": lambda m, x: m.self_similarity(x, 0.0),
    "similarity_0.3": lambda m, x: m.self_similarity(x, 0.3),
    "adaptive": lambda m, x: m.adaptive_inversion(x.flatten(1)[:, :9] * 2, x.flatten(1)[:, 9:18]),
    "adaptive_1": lambda m, x: m.adaptive_inversion(x.flatten(1)[:, :9] * 3, x.flatten(1)[:, 9:18], temperature=1.0),
}
every_term = pytest.mark.parametrize("name", TERMS)


@every_term
@pytest.mark.parametrize("shape", [(5, 4, 6, 7), (3, 33, 4, 2), (2, 3, 33, 35)], ids=str)
def test_matches_oracle(implementation, name, shape):
    x = make(implementation.device, shape).requires_grad_()
    exact = x.detach().requires_grad_()
    loss, want = TERMS[name](kdfast, x), TERMS[name](oracles, exact)
    assert loss.shape == ()
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-14)
    grads = (torch.autograd.grad(value, leaf)[0] for value, leaf in ((loss, x), (want, exact)))
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-13)


@every_term
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_low_precision(implementation, name, dtype):
    """float32 sums and result of the numbers as they are rounded, the gradient in the input's dtype."""
    x = make(implementation.device, (5, 4, 6, 7), dtype).requires_grad_()
    loss = TERMS[name](kdfast, x)
    exact = x.detach().double().requires_grad_()
    # Of the adaptive term the test itself multiplies the input.
    want = TERMS[name](oracles, exact)
    close = dtype == torch.float32 or not name.startswith("adaptive")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=2e-5 if close else 1e-2, atol=1e-6)
    got, expected = (torch.autograd.grad(value, leaf)[0] for value, leaf in ((loss, x), (want, exact)))
    assert got.dtype == dtype
    scale = expected.abs().max().item()
    digits = 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps * (1 if close else 4)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=digits * scale)


@behaviour.every_compiled
@every_term
def test_compile(implementation, name):
    x = make(implementation.device, (4, 3, 3, 4), torch.float32)
    behaviour.check_compiled_for_all(implementation, lambda x: TERMS[name](kdfast, x), [x])


@every_term
def test_autocast(implementation, name):
    x = make(implementation.device, (4, 3, 3, 4), torch.float32)
    behaviour.check_autocast(lambda x: TERMS[name](kdfast, x), [x])


@every_term
def test_deterministic(implementation, name, same_bits):
    x = make(implementation.device, (6, 5, 17, 19), torch.float32).requires_grad_()

    def run():
        loss = TERMS[name](kdfast, x)
        return [loss.detach(), *torch.autograd.grad(loss, x)]

    assert same_bits(run)


@every_term
def test_no_samples(implementation, name):
    """Finite, with a graph."""
    x = make(implementation.device, (0, 4, 6, 7), torch.float32).requires_grad_()
    loss = TERMS[name](kdfast, x)
    assert loss.isfinite() and torch.autograd.grad(loss, x)[0].shape == x.shape


@every_term
def test_no_host_sync(cuda, name):
    behaviour.check_no_host_sync(lambda x: TERMS[name](kdfast, x), [make("cuda", (4, 3, 5, 6), torch.float32)])


# ---- statistics ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("p", [1, 2])
def test_statistics_exact_match(implementation, p):
    """0 without gradient where the batch is what the batch norm saw; a gap in one moment leaves the other alone."""
    x = torch.tensor([[-1.0, 1.0], [3.0, 5.0]], dtype=torch.float64, device=implementation.device)
    x = x.t().reshape(2, 2, 1, 1).contiguous().requires_grad_()
    mean, variance = (torch.tensor(values, device=x.device) for values in ([0.0, 4.0], [1.0, 1.0]))
    loss = kdfast.bn_statistics_loss(x, mean, variance, p=p)
    assert loss == 0 and not torch.autograd.grad(loss, x)[0].any()
    loss = kdfast.bn_statistics_loss(x, mean + 0.5, variance, p=p)
    assert torch.equal(*(kdfast.bn_statistics_loss(x, mean + 0.5, v, p=p, alpha_var=0.0) for v in (variance, 9 * mean)))
    (grad,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(grad, torch.full_like(x, -0.5 if p == 1 else -(0.5**1.5)))


def test_statistics_are_constants(implementation):
    """No gradient to a batch norm's buffers, of any dtype; its own input in channels_last memory, or (B, C)."""
    x = make(implementation.device, (4, 3, 5, 6), torch.bfloat16)
    mean, variance = (values.requires_grad_() for values in statistics(x))
    loss = kdfast.bn_statistics_loss(x, mean, variance)
    assert not loss.requires_grad and loss.dtype == torch.float32
    last = kdfast.bn_statistics_loss(x.contiguous(memory_format=torch.channels_last), mean, variance)
    torch.testing.assert_close(last, loss)
    rows = x.movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(kdfast.bn_statistics_loss(rows, mean, variance), loss)


def test_statistics_of_a_batch_norm(implementation):
    """What a batch norm computes of its input in training is at no distance of that input."""
    norm = torch.nn.BatchNorm2d(3, momentum=1.0).to(implementation.device, torch.float64)
    x = make(implementation.device, (6, 3, 5, 4))
    norm(x)
    count = x.numel() / 3
    loss = kdfast.bn_statistics_loss(x, norm.running_mean, norm.running_var * (count - 1) / count)  # without Bessel's
    assert loss < 1e-14


# ---- images ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 1, 6), (2, 3, 6, 1), (2, 3, 1, 1)], ids=str)
def test_variation_without_neighbours(implementation, shape, dtype):
    x = make(implementation.device, shape, dtype).requires_grad_()
    for got, want in zip(kdfast.total_variation(x), oracles.total_variation(x), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
        assert torch.autograd.grad(got, x, retain_graph=True)[0].isfinite().all()


def test_variation_of_equal_pixels(implementation):
    """0 without gradient, not NaN."""
    x = torch.full((2, 3, 4, 5), 0.7, device=implementation.device, requires_grad=True)
    for value in kdfast.total_variation(x):
        assert value == 0 and not torch.autograd.grad(value, x)[0].any()


def test_similarity_edges(implementation):
    """Nothing alike: exactly 0 without gradient (official: a rounding). All alike: sqrt(B (B - 1))."""
    apart = torch.eye(4, device=implementation.device, requires_grad=True)
    loss = kdfast.self_similarity(apart, 0.5)
    assert loss == 0 and not torch.autograd.grad(loss, apart)[0].any()
    alike = make(implementation.device, (1, 6)).expand(4, 6)
    torch.testing.assert_close(kdfast.self_similarity(alike, 0.5).item(), 12**0.5)
    assert kdfast.self_similarity(alike[:1], 0.5) == 0


def test_similarity_of_zero_features(implementation):
    """A sample of zeros resembles nothing, also with the threshold 0: finite, and the others as without it."""
    x = make(implementation.device, (4, 3, 2, 2))
    x[1] = 0
    x.requires_grad_()
    loss = kdfast.self_similarity(x, 0.0)
    torch.testing.assert_close(loss, kdfast.self_similarity(x[[0, 2, 3]], 0.0))
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.isfinite().all() and not grad[1].any()


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_similarity_of_extreme_features(implementation, factor):
    """The size of the features does not matter."""
    x = make(implementation.device, (4, 3, 2, 2))
    scaled = (x * factor).float().requires_grad_()
    loss = kdfast.self_similarity(scaled, 0.0)
    torch.testing.assert_close(loss.double(), kdfast.self_similarity(x, 0.0), rtol=1e-5, atol=0)


def test_adaptive_edges(implementation):
    """Networks that agree: 1 but for what the clamp adds. Networks that do not: as small as the clamp allows."""
    logits = make(implementation.device, (5, 7)).requires_grad_()
    torch.testing.assert_close(kdfast.adaptive_inversion(logits, logits.detach()).item(), 1.0)
    sure = 1e4 * torch.eye(7, device=logits.device, dtype=torch.float64)
    loss = kdfast.adaptive_inversion(sure.requires_grad_(), sure.detach().roll(1, 0))
    assert torch.autograd.grad(loss, sure)[0].isfinite().all()
    torch.testing.assert_close(loss, oracles.adaptive_inversion(sure, sure.roll(1, 0)))


ERRORS = [
    (lambda x, c: kdfast.bn_statistics_loss(x, c, c, p=3), ValueError, "p must be 1 or 2, got 3"),
    (
        lambda x, c: kdfast.bn_statistics_loss(x, c, c, alpha_mean="1"),
        TypeError,
        "alpha_mean must be a number, got str",
    ),
    (lambda x, c: kdfast.bn_statistics_loss(x, c, c, alpha_var=None), TypeError, "alpha_var must be a number"),
    (lambda x, c: kdfast.bn_statistics_loss([x], c, c), TypeError, "x must be a torch.Tensor, got list"),
    (
        lambda x, c: kdfast.bn_statistics_loss(x, c[:3], c),
        ValueError,
        r"running_mean must have shape \(4,\), one number per channel, got \(3,\)",
    ),
    (
        lambda x, c: kdfast.bn_statistics_loss(x, c, None),
        TypeError,
        "running_var must be a torch.Tensor, got NoneType",
    ),
    (lambda x, c: kdfast.bn_statistics_loss(x, c, c.long()), TypeError, "running_var must be float32"),
    (lambda x, c: kdfast.bn_statistics_loss(x, c, c.to("meta")), ValueError, "running_var must be on x's device cpu"),
    (lambda x, c: kdfast.total_variation(x[0]), ValueError, r"x must be \(batch, channels, height, width\)"),
    (lambda x, c: kdfast.self_similarity(c, 0.0), ValueError, r"x must be \(batch, features\)"),
    (lambda x, c: kdfast.self_similarity(x, c), TypeError, "threshold must be a number, got Tensor"),
    (lambda x, c: kdfast.adaptive_inversion(x, x), ValueError, "student must be"),
    (lambda x, c: kdfast.adaptive_inversion(x[0, 0], x[0, 0, :2]), ValueError, "teacher must have"),
    (lambda x, c: kdfast.adaptive_inversion(x[0, 0], x[0, 0], 0), ValueError, "temperature must be finite and above 0"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(call, error, message):
    with kdfast.fallback(), pytest.raises(error, match=message):
        call(torch.randn(3, 4, 6, 5), torch.rand(4))
