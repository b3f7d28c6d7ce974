"""Channel moments: what the contract of every op (test_ops_*.py) does not say."""

import oracles
import pytest
import registry
import torch
from behaviour import FLOATS, check_oracle

from kdfast import ops

GROUP = registry.family("moments").GROUPS[0]
MOMENTS = GROUP["moments"]
every_format = pytest.mark.parametrize("memory_format", GROUP.memory_formats, ids=str)


def make(implementation, shape, dtype=torch.float64, memory_format=torch.contiguous_format):
    return GROUP.in_format(GROUP.inputs(implementation, shape, dtype), memory_format)["x"]


def test_one_moment_alone(implementation):
    """The gradient of a mean, of a variance, and of both."""
    x = GROUP.inputs(implementation, GROUP.small, torch.float32)
    for mean, variance in ((1.0, 0.0), (0.0, 1.0), (-0.25, 3.0), (1e-30, -1e-30)):
        check_oracle(MOMENTS, x, torch.tensor([[mean], [variance]], device=x["x"].device).expand(2, 5))


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
    x = {"x": x.contiguous(memory_format=memory_format)}
    check_oracle(MOMENTS, x, MOMENTS.upstream(x))


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
