"""Mixtures of logits: what the contract of every op (test_ops_*.py) and test_networks.py do not say."""

import math

import oracles
import pytest
import torch
from behaviour import check_oracle
from conftest import assert_close
from networks import MIXED, SMALL, for_simt, make
from torch.nn import functional as F

import kdfast
from kdfast import ops

INF = math.inf


# ---- arguments -------------------------------------------------------------------------------------------------------
def test_flat_mix(implementation):
    """Weights (B, N) are those of one target (B, 1, N)."""
    data = make(implementation, *SMALL, torch.float32)
    flat, full = (MIXED["one"].collecting(data) for _ in range(2))
    values = [
        ops.mixed_logits_kl(d.networks, mix, d.labels, eps=1e-7, target_ce=True)
        for d, mix in ((flat, flat.mix[:, 0]), (full, full.mix[:, :1]))
    ]
    assert torch.equal(*values)
    got, want = (torch.autograd.grad(v, [*d.networks, d.mix]) for v, d in zip(values, (flat, full), strict=True))
    assert all(map(torch.equal, got, want)) and got[-1][:, 0].any()
    constant = ops.mixed_logits_kl(flat.networks, flat.mix[:, 0].detach(), flat.labels, eps=1e-7, target_ce=True)
    assert all(map(torch.equal, torch.autograd.grad(constant, flat.networks), want[:-1]))


@pytest.mark.parametrize("classes", [9, 1100], ids="classes{}".format)
@pytest.mark.parametrize(
    ("peers_dtype", "dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.float64), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_okddip_is_a_mixture(implementation, peers_dtype, dtype, classes):
    """The leader's target is the mean of the peers, a list or stacked, of its dtype or not."""
    for_simt(implementation, classes == 9)
    d = MIXED["one"].collecting(make(implementation, 3, 4, classes, peers_dtype))
    *peers, leader = d.networks
    leader = leader.detach().to(dtype).requires_grad_()
    attention = d.mix[:, :2, :2]
    mean = torch.full_like(attention[:, :1], 0.5)
    mix = F.pad(torch.cat([attention, mean], 1), (0, 1))
    want = ops.mixed_logits_kl([*peers, leader], mix, d.labels, 3.0, eps=1e-7, through_targets=True)
    leaves = [*peers, leader, d.mix]
    grads = torch.autograd.grad(want, leaves)
    for heads in (peers, torch.stack(peers)):
        loss = kdfast.OKDDip()(heads, leader, attention, d.labels, 80)
        assert torch.equal(loss, want)
        assert all(map(torch.equal, torch.autograd.grad(loss, leaves), grads))
    constant = kdfast.OKDDip()(peers, leader, attention.detach(), d.labels, 80)
    assert all(map(torch.equal, torch.autograd.grad(constant, leaves[:-1]), grads[:-1]))


def test_ramp(implementation):
    """A number, or a 0-d tensor of any type; 0 leaves the cross-entropies, also where the divergences are infinite."""
    d = make(implementation, *SMALL)
    d.networks[0][:, 4] = -INF
    d.labels.fill_(2)
    for ramp in (torch.tensor(0.0), torch.tensor(0.0, dtype=torch.float64), 0.0):
        ramp = ramp.to(d.mix.device) if isinstance(ramp, torch.Tensor) else ramp
        leaves = MIXED["one"].collecting(d)
        loss = ops.mixed_logits_kl(leaves.networks, d.mix, d.labels, ramp=ramp, through_targets=True)
        want = oracles.mixed_logits_kl(d.networks, d.mix, d.labels, kl_weight=0.0, learners=3)
        ce = sum(F.cross_entropy(x, d.labels) for x in d.networks)
        torch.testing.assert_close(loss, ce)
        assert want.isnan() or torch.allclose(want, ce)
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, leaves.networks))
    d = make(implementation, *SMALL)
    a, b = (ops.mixed_logits_kl(d.networks, d.mix, ramp=x) for x in (0.25, torch.tensor(0.25, device=d.mix.device)))
    assert torch.equal(a, b)


# ---- edges -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 9])
@pytest.mark.parametrize("all_alike", [True, False], ids=["alike", "apart"])
def test_edges_targets_of_some_networks(implementation, count, all_alike):
    """Weights of 0 in all targets, or in some: what such a network holds does not matter there."""
    for_simt(implementation, count in (2, 6))
    data = make(implementation, count, 3, 21, torch.float32)
    zero = torch.rand(1, 1 if all_alike else count, count, generator=torch.Generator().manual_seed(count)) < 0.4
    data.mix *= ~zero.to(data.mix.device)
    data.mix[1] = 0.0  # a row without a mixture
    check_oracle(MIXED["attention"], data)
    z = data.networks[-1].clone()
    z[2, 5] = -INF  # where the last target alone has it
    data.mix[:, :, -1] = 0.0
    data.mix[2, -1] = 1.0
    got, want = (
        ops.mixed_logits_kl([*data.networks[:-1], x], data.mix, temperature=2.0, learners=count)
        for x in (z, z.clamp(min=-1e30))
    )
    assert_close(got, want.double(), want.double(), 21, torch.float32)


# ---- behaviour in PyTorch --------------------------------------------------------------------------------------------
def test_dtensor_as_the_epoch_refused(dtensor):
    z = torch.randn(2, 5, 9)
    with pytest.raises(TypeError, match="epoch is a DTensor"):
        kdfast.FFL()(z, z[0], torch.zeros(5, dtype=torch.long), dtensor(torch.tensor(3)))


# ---- the losses ------------------------------------------------------------------------------------------------------
def test_linear_rule_is_optimal(implementation):
    """The gap to any other point of the simplex, from the gradient: a bound on what is left to gain."""
    for_simt(implementation, False)
    for seed, scale, count, classes in (
        (0, 1.0, 2, 5),
        (1, 4.0, 4, 12),
        (2, 30.0, 3, 13),
        (3, 0.01, 5, 7),
        (4, 200.0, 3, 6),
    ):
        torch.manual_seed(seed)
        d = make(implementation, count, 33, classes)
        torch.manual_seed(seed)
        d.networks = [(scale * torch.randn(33, classes, dtype=torch.float64)).to(x) for x in d.networks]
        z, y = torch.stack(d.networks), d.labels
        target = kdfast.KDCL(rule="linear").target(d.networks, y)
        assert target.dtype == torch.float64 and not target.requires_grad
        flat = z.flatten(1).T
        a = torch.linalg.lstsq(flat.cpu(), target.flatten()[:, None].cpu()).solution[:, 0].to(z.device)
        torch.testing.assert_close(flat @ a, target.flatten())
        assert a.min() > -1e-9 and abs(a.sum() - 1) < 1e-9
        a = a.clone().requires_grad_()
        value = F.cross_entropy((a[:, None, None] * z).sum(0), y)
        (slope,) = torch.autograd.grad(value, a)
        assert slope @ a - slope.min() <= 1e-9 * (1 + value), (scale, value)


def test_fusion_module(implementation):
    """FFL learns through it: every parameter gets a gradient."""
    module = kdfast.FusionModule(4, 9, 3).to(implementation.device)
    maps = [torch.randn(5, 4, 3, 3, device=implementation.device) for _ in range(2)]
    z = [torch.randn(5, 9, device=implementation.device) for _ in range(2)]
    y = torch.arange(5, device=implementation.device)
    kdfast.FFL()(z, module(maps), y, 3).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
