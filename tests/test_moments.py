"""Channel moments: mean and variance of each channel against the formula, on each implementation."""

import behaviour
import oracles
import pytest
import torch
from behaviour import FLOATS, HALVES, MAP_LAYOUTS
from conftest import assert_close

import kdfast
from kdfast import ops
from kdfast.ops.layout import flat

raw = torch.ops.kdfast

FORMATS = (torch.contiguous_format, torch.channels_last)
every_format = pytest.mark.parametrize("memory_format", FORMATS, ids=str)
CASES = [  # B, C, H, W
    (1, 1, 1, 1),
    (2, 3, 1, 1),  # no positions: the channels are neighbours in every layout
    (3, 5, 7, 9),  # rows that end within a step of 8
    (2, 33, 4, 3),  # one channel more than a warp has lanes
    (1, 33, 33, 35),  # a channel longer than a chunk of 1024; more positions than a block takes, on either machine
    (3, 1, 105, 105),  # more steps of a channel than a GPU block takes
]
SMALL = (3, 5, 6, 5)


def make(implementation, shape, dtype=torch.float64, memory_format=torch.contiguous_format):
    """Each channel with a mean and a spread of its own."""
    channels = torch.arange(shape[1], dtype=torch.float64).view(1, -1, *[1] * (len(shape) - 2))
    x = torch.randn(shape, dtype=torch.float64) * (1 + channels % 3) + channels % 5 - 2
    x = x.to(implementation.device, dtype)
    return x.contiguous(memory_format=memory_format) if x.dim() == 4 else x


def check(x, upstream=None, want=None):
    """Moments and gradient of `x` against the oracle's, which may get the same numbers as another tensor `want`."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    moments = ops.channel_moments(x)
    exact = (x if want is None else want).detach().double().requires_grad_()
    expected = oracles.channel_moments(exact)
    upstream = torch.randn_like(expected) if upstream is None else upstream
    (got,) = torch.autograd.grad(moments, x, upstream.to(moments.dtype))
    (grad,) = torch.autograd.grad(expected, exact, upstream)
    values, entries = oracles.sizes_moments(exact, upstream)
    cols = x.numel() // max(x.shape[1], 1)
    assert_close(moments, expected, values, cols, moments.dtype)
    assert got.dtype == x.dtype and got.shape == x.shape
    assert_close(got, grad, entries, 1, moments.dtype, "gradient")


# ---- value and gradient ----------------------------------------------------------------------------------------------
@every_format
@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matches_oracle(implementation, shape, dtype, memory_format):
    check(make(implementation, shape, dtype, memory_format))


@every_format
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_low_precision(implementation, dtype, memory_format):
    """float32 accumulation and result, the gradient in the input's dtype; exact in the rounded input."""
    x = make(implementation, SMALL, dtype, memory_format)
    assert ops.channel_moments(x).dtype == torch.float32
    check(x)


@every_format
def test_gradcheck(implementation, memory_format):
    x = make(implementation, (2, 3, 5, 2), memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(ops.channel_moments, x)


def test_opcheck(implementation):
    """Schemas, shape functions and dynamic shapes of the raw ops, on inputs that need no gradient."""
    for memory_format in FORMATS:
        x = flat(make(implementation, SMALL, torch.float32, memory_format))
        moments = raw.channel_moments(x)
        torch.library.opcheck(raw.channel_moments.default, (x,))
        torch.library.opcheck(raw.channel_moments_backward.default, (torch.randn_like(moments), x, moments))


# ---- arguments -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", MAP_LAYOUTS)
def test_layouts(implementation, layout):
    for dtype in (torch.float32, torch.bfloat16):
        x = MAP_LAYOUTS[layout](make(implementation, (2, 4, 6, 5), dtype))
        check(x.detach().requires_grad_(), want=x.clone(memory_format=torch.contiguous_format))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_memory_format_is_kept(implementation, dtype):
    """A gradient is where the optimiser of a channels_last network wants it, and no map is copied."""
    for memory_format in FORMATS:
        x = make(implementation, SMALL, dtype, memory_format).requires_grad_()
        assert flat(x).data_ptr() == x.data_ptr()
        (grad,) = torch.autograd.grad(ops.channel_moments(x).sum(), x)
        assert grad.is_contiguous(memory_format=memory_format)


def test_other_dimensions(implementation):
    """(B, C), (B, C, L) and (B, C, D, H, W) are maps without positions, or with more of them."""
    for shape in ((3, 5), (70, 40), (3, 5, 12), (3, 5, 2, 3, 2)):
        check(make(implementation, shape, torch.float32))


def test_upstream_gradients(implementation):
    """Of one moment alone; scaled, negative, and one number for all entries with stride 0."""
    x = make(implementation, SMALL, torch.float32)
    for mean, variance in ((1.0, 0.0), (0.0, 1.0), (-0.25, 3.0), (1e-30, -1e-30), (0.0, 0.0)):
        upstream = torch.tensor([[mean], [variance]], dtype=torch.float64, device=x.device).expand(2, 5)
        check(x, upstream)


# ---- edges -----------------------------------------------------------------------------------------------------------
@every_format
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_edges_large_mean(implementation, dtype, memory_format):
    """A mean that is a million times the spread: the variance of float32 values keeps all of float32's digits. In
    float64, means of parts that are merged are off by 1e-10 themselves.
    """
    x = (make(implementation, (4, 3, 17, 19)) + 1e6).to(dtype).contiguous(memory_format=memory_format)
    moments, want = ops.channel_moments(x), oracles.channel_moments(x)
    torch.testing.assert_close(moments.double(), want, rtol=1e-6 if dtype == torch.float32 else 1e-10, atol=0)


@every_format
def test_edges_outlier_first(implementation, memory_format):
    """The first value of a channel, and of every part of it, is no better a guess of the mean than another."""
    x = make(implementation, (2, 3, 40, 30), torch.float32)
    x[0, :, 0, 0] = 1e6
    check(x.contiguous(memory_format=memory_format))


@every_format
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_edges_constant(implementation, dtype, memory_format):
    """Exactly that constant, and exactly no variance."""
    x = torch.full((3, 2, 33, 35), 0.1, dtype=torch.float64) * torch.tensor([1.0, 1e4])[:, None, None]
    x = x.to(implementation.device, dtype).contiguous(memory_format=memory_format)
    mean, variance = ops.channel_moments(x)
    if implementation.kernel:
        assert torch.equal(mean.to(dtype), x[0, :, 0, 0]) and not variance.any()
    else:
        torch.testing.assert_close(mean.to(dtype), x[0, :, 0, 0])
        assert (variance <= (torch.finfo(mean.dtype).eps * mean).square()).all()


def test_edges_no_samples(implementation):
    """0 with a graph: no rank of a distributed run is left without a backward."""
    for memory_format in FORMATS:
        x = make(implementation, (0, 4, 6, 5), torch.float32, memory_format).requires_grad_()
        moments = ops.channel_moments(x)
        assert moments.requires_grad and moments.shape == (2, 4) and not moments.any()
        (grad,) = torch.autograd.grad(moments.sum(), x)
        assert grad.shape == (0, 4, 6, 5)


@every_format
def test_edges_not_finite_is_seen(implementation, memory_format):
    """In its own channel; a mean with an infinite value is infinite."""
    for value in (float("nan"), float("inf")):
        x = make(implementation, (3, 5, 33, 35), torch.float32, memory_format)
        x[1, 2, 3, 4] = x[0, 4, 0, 0] = value
        mean, variance = ops.channel_moments(x)
        assert mean.isfinite().tolist() == variance.isfinite().tolist() == [True, True, False, True, False]
        assert variance[2].isnan() and variance[4].isnan()
        assert (mean[[2, 4]].isinf() if value == float("inf") else mean[[2, 4]].isnan()).all()


def test_edges_largest_half(implementation):
    """float16 values up to 6e4, whose squares no float16 holds."""
    x = make(implementation, SMALL, torch.float16).clamp(-1, 1) * 6e4
    check(x, torch.full((2, 5), 1e-3, dtype=torch.float64, device=x.device))


@pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
def test_large_index(implementation):
    """Elements beyond 2^31 of a tensor."""
    far = 2**30 + 8
    x = make(implementation, (3, 4, 5, 4), torch.bfloat16)
    with behaviour.sparse_memory(3 * far + 80, implementation.device) as memory:
        for strides in ((far, 20, 4, 1), (far, 1, 16, 4)):
            y = memory.as_strided(x.shape, strides).copy_(x)
            torch.testing.assert_close(ops.channel_moments(y), ops.channel_moments(x))
            y.zero_()


# ---- behaviour in PyTorch --------------------------------------------------------------------------------------------
def total(x):
    """One number of both moments."""
    return ops.channel_moments(x).square().sum()


def test_double_backward_raises(implementation):
    x = make(implementation, SMALL).requires_grad_()
    behaviour.check_refuses_second_derivative(total(x), x)


def test_inplace_change_raises(implementation):
    behaviour.check_refuses_changed_input(total, [make(implementation, SMALL)], 0)


ERRORS = [
    (lambda x: ops.channel_moments(x[0, 0, 0]), ValueError, r"x must be \(batch, features\) or \(batch, ...\)"),
    (lambda x: ops.channel_moments(x.long()), TypeError, "x must be float32, float64, float16 or bfloat16"),
    (lambda x: ops.channel_moments([x]), TypeError, "x must be a torch.Tensor, got list"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(call, error, message):
    with kdfast.fallback(), pytest.raises(error, match=message):
        call(torch.randn(SMALL))


@every_format
def test_compile(implementation, memory_format):
    x = make(implementation, SMALL, torch.float32, memory_format)
    behaviour.check_compiled(total, [x], backend="aot_eager")


def test_compile_inductor(implementation):
    if implementation.name in ("simt", "fallback"):
        pytest.skip("test_compile is enough")
    behaviour.check_compiled(total, [make(implementation, SMALL, torch.float32)])


def test_compile_dynamic(implementation):
    """Another batch size needs no graph break; sizes may be symbols."""
    torch.compiler.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 4, 5):
        x = make(implementation, (rows, 4, 6, 5), torch.float32)
        torch.testing.assert_close(compiled(x), total(x))


def test_autocast(implementation):
    for dtype in (torch.float32, torch.bfloat16):
        behaviour.check_autocast(total, [make(implementation, SMALL, dtype)])


@every_format
@pytest.mark.parametrize("shape", [(5, 3, 9, 7), (2, 40, 60, 50), (70, 130, 2, 2)], ids=str)
def test_deterministic(implementation, shape, memory_format, same_bits):
    """Equal bits from run to run, for any number of threads, and in any order of CUDA's threads."""
    if implementation.name == "simt" and shape[0] != 5:
        pytest.skip("a fiber per thread: a minute")
    x = make(implementation, shape, torch.float32, memory_format).requires_grad_()

    def run():
        moments = ops.channel_moments(x)
        return [moments.detach(), *torch.autograd.grad(moments.square().sum(), x)]

    same_bits(run)


@pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
def test_deterministic_algorithms_are_enough(implementation, deterministic_algorithms):
    x = make(implementation, SMALL).requires_grad_()
    assert torch.autograd.grad(total(x), x)[0].isfinite().all()


def test_transforms_refused(implementation):
    behaviour.check_refuses_transforms(total, make(implementation, SMALL))


def test_dtensor_refused(dtensor):
    with pytest.raises(TypeError, match=r"x is a DTensor.*x.to_local\(\)"):
        ops.channel_moments(dtensor(torch.randn(2, 3, 4, 4)))


@pytest.mark.parametrize("implementation", ["cpu"], indirect=True)
@every_format
def test_memory(implementation, memory_format):
    """Nothing of the size of a map but the gradient."""
    harness = pytest.importorskip("kdfast.bench").load("harness")
    x = make(implementation, (4, 16, 64, 64), torch.float32, memory_format).requires_grad_()
    assert harness.peak_cpu(lambda: total(x).backward()) <= x.nbytes + 4096


# ---- CUDA only -------------------------------------------------------------------------------------------------------
def test_no_host_sync(cuda):
    behaviour.check_no_host_sync(total, [make(cuda, (16, *SMALL[1:]), torch.bfloat16)])


def test_cuda_graph(cuda):
    behaviour.check_cuda_graph(total, *([make(cuda, (16, *SMALL[1:]), torch.float32)] for _ in range(2)))
