"""Channels as distributions: what the contract of every op (test_ops_*.py) does not say."""

import math

import oracles
import pytest
import registry
import torch
from behaviour import FLOATS, check_oracle

from kdfast import ops

GROUP = registry.family("channel_kl").GROUPS[0]
OP = GROUP["channel_kl_4"]


def make(implementation, shape, dtype=torch.float32):
    return GROUP.in_format(GROUP.inputs(implementation, shape, dtype), torch.channels_last)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_same_as_contiguous(implementation, dtype):
    """channels_last maps, and pairs of which one is, against the rows of softmax_kl."""
    x = make(implementation, (2, 19, 20, 17), dtype)
    for one in ((), ("student",), ("teacher",)):
        mixed = {name: t.contiguous() if name in one else t for name, t in x.items()}
        check_oracle(OP, registry.Inputs(mixed), OP.upstream(x))


@pytest.mark.parametrize("gap", [1e-2, 1e-4])
def test_near_channels_keep_their_digits(implementation, gap):
    """Some channels near, with an offset between the networks, others not; every row of the loss counts."""
    shape = (3, 21, 20, 18)
    student = make(implementation, shape)["student"]
    teacher = student + gap * torch.randn_like(student)
    teacher[:, 1] += 100
    teacher[1] = torch.randn_like(teacher[1])
    for pair in ((student, teacher), (student[:1], teacher[:1])):
        value, want = ops.channel_kl(*pair), oracles.channel_kl(*pair)
        torch.testing.assert_close(value.double(), want, rtol=5e-5 if gap > 1e-3 else 2e-2, atol=0)
    value = ops.channel_kl(student[:, 2:], teacher[:, 2:])
    torch.testing.assert_close(value.double(), oracles.channel_kl(student[:, 2:], teacher[:, 2:]), rtol=1e-5, atol=0)


def test_edges_infinite_positions(implementation):
    """-inf in both is no position; in the student alone an infinite loss; everywhere in the teacher nothing."""
    x = make(implementation, (2, 19, 20, 17))
    for t in x.values():
        t[:, :, :3] = -math.inf  # whole groups of positions
        t[0, 5, 7, 3:9] = -math.inf
    x["teacher"][1, 2, 4:] = -math.inf
    check_oracle(OP, x, OP.upstream(x))
    x["teacher"][1, 3] = -math.inf
    value = OP(ops, x)
    assert value.isfinite()
    x["student"][0, 5, 10, 10] = -math.inf
    leaves = OP.collecting(x)
    value = OP(ops, leaves)
    value.backward()
    assert value == math.inf
    assert leaves["student"].grad[1].isfinite().all()


def test_edges_not_finite_is_seen(implementation):
    """In the loss, and in the gradient of its channel alone."""
    for name in ("student", "teacher"):
        x = make(implementation, (2, 5, 33, 35))
        x[name][1, 2, 3, 4] = math.nan
        leaves = OP.collecting(x)
        value = OP(ops, leaves)
        value.backward()
        bad = leaves["student"].grad.isnan().flatten(2).any(2)
        assert value.isnan() and bad.nonzero().tolist() == [[1, 2]]


def test_edges_large_logits(implementation):
    """Logits of 1e4 and temperatures from 0.05 to 20."""
    x = make(implementation, (2, 19, 9, 7))
    for scale in (1e4, 1.0):
        for temperature in (0.05, 20.0):
            y = registry.mapped(x, lambda name, t, scale=scale: t * scale)
            op = GROUP.bound(registry.family("channel_kl").channel_kl("other", temperature))
            check_oracle(op, y, op.upstream(y))


def test_empty(implementation):
    for shape in ((0, 5, 6, 5), (2, 0, 3, 3)):
        x = torch.zeros(shape, device=implementation.device).contiguous(memory_format=torch.channels_last)
        assert shape[1] == 0 or ops.channel_kl(x, x) == 0
