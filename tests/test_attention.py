"""Attention maps: what the contract of every op (test_ops_*.py) does not say."""

import behaviour
import oracles
import pytest
import registry
import torch
import torch.nn.functional as F
from behaviour import check_oracle

from kdfast import ops
from kdfast.ops.pool import average_pool

GROUP = registry.family("attention").GROUPS[0]


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_edges_zero_maps(implementation, side):
    """A sample without any activation has q = 0, and gets no gradient: finite, as the official code."""
    x = GROUP.inputs(implementation, GROUP.small, torch.float32)
    for name in x:
        if side in (name, "both"):
            x[name][1] = 0
    check_oracle(GROUP["power2"], x)


@pytest.mark.parametrize("gap", [1e-2, 1e-4])
def test_edges_close_networks(implementation, gap):
    """The loss of networks that nearly agree keeps its digits: 1 - cos would lose all of them at 1e-4."""
    student = GROUP.inputs(implementation, (3, 40, 6, 5), torch.float32)["student"]
    teacher = student * (1 + gap * torch.rand_like(student))
    loss, want = ops.attention_transfer(student, teacher), oracles.attention_transfer(student, teacher)
    assert abs(loss.item() - want.item()) <= 1e-6 / gap * want.item()
    check_oracle(GROUP["power2"], {"student": student, "teacher": teacher})


def test_pool(implementation):
    """torch's adaptive average pooling, also where windows overlap or positions repeat."""
    for size, bins in (((6, 8), (3, 4)), ((7, 5), (3, 3)), ((7, 5), (4, 5)), ((3, 4), (6, 7)), ((5, 5), (1, 2))):
        ours, theirs = behaviour.leaves_of([torch.randn(2, 3, *size, dtype=torch.float64)] * 2)
        got, want = average_pool(ours, *bins), F.adaptive_avg_pool2d(theirs, bins)
        torch.testing.assert_close(got, want)
        upstream = torch.randn_like(want)
        grads = (torch.autograd.grad(x, y, upstream)[0] for x, y in ((got, ours), (want, theirs)))
        torch.testing.assert_close(*grads)
