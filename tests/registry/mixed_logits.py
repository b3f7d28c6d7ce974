"""Mixtures of several networks' logits as targets."""

import math

import oracles
import torch

import kdfast
from kdfast import ops
from registry import Group, Op, Program, program_of
from registry._networks import SHARED, UNDERFLOW, make, make_logits
from registry.softmax_kl import sizes_ce


# ---- ops -------------------------------------------------------------------------------------------------------------
def sizes_mixed_logits_kl(
    networks,
    mix,
    labels=None,
    temperature=1.0,
    *,
    eps=0.0,
    kl_weight=1.0,
    ce_weight=1.0,
    ramp=1.0,
    learners=None,
    target_ce=False,
    through_targets=False,
):
    """-> value; entries of the gradients [N, rows, cols]; of mix [rows, targets, N]."""
    z = torch.stack(list(networks))
    targets = oracles._mixtures(z, mix, labels)
    # A mixed logit is off by the roundings of what it adds up, and so is each of its exponentials.
    offsets = (z - z.amax(2, keepdim=True)).abs().masked_fill(z == -math.inf, 0)
    spread = offsets.amax(0)[None] if mix is None else torch.einsum("brm,mbc->rbc", mix.abs(), offsets)
    value, entries, target_entries = 0.0, torch.zeros_like(z), torch.zeros_like(targets)
    kl_weight, share = abs(kl_weight * ramp), 1 / max(1, z.shape[1])
    for i, x in enumerate(z[:learners]):
        which = i % len(targets)
        log_p, log_q = oracles._log_softmax(targets[which], temperature), oracles._log_softmax(x, temperature)
        a, b = (torch.where(y.isinf(), 0.0, y.abs()) for y in (log_p, log_q))
        p, q = log_p.exp(), log_q.exp()
        off = 1 + (spread[which] + (p * spread[which]).sum(1, keepdim=True)) / temperature
        log_eps = abs(math.log(eps)) if eps else 0.0
        rows = 1 + (p * (a + b + off) + q * (a + b) + eps * (log_eps + b)).sum(1)
        value = value + kl_weight * temperature**2 * rows.sum()
        entries[i] += kl_weight * temperature * (q * (1 + b) + p * (1 + a) * off + eps)
        if through_targets:
            target_entries[which] += kl_weight * temperature * p * (1 + a + off) * (rows[:, None] + a + b)
    if labels is not None:
        cross = [(x, entries[i], torch.ones_like(x)) for i, x in enumerate(z[:learners])]
        if target_ce:
            each = [spread[i] + (x.softmax(1) * spread[i]).sum(1, keepdim=True) for i, x in enumerate(targets)]
            cross += [(x, target_entries[i], 1 + each[i]) for i, x in enumerate(targets)]
        for x, into, off in cross:
            rows, each = sizes_ce(x, labels)
            value = value + ce_weight * (rows * off.amax(1)).sum()
            into += ce_weight * each * off
    if mix is None:
        return share * value, share * entries, None
    entries += torch.einsum("brm,rbc->mbc", mix.abs(), target_entries)
    return share * value, share * entries, share * torch.einsum("rbc,mbc->brm", target_entries, offsets)


def mixed_logits_kl(
    name, targets=None, learners=None, labels=True, temperature=3.0, ramped=False, gradcheck=False, **options
):
    """With the first `targets` rows of the weights; None: all of them, 0: no weights, the least logits."""

    def arguments(networks, mix, given, factor):
        mix = None if targets == 0 else mix[:, :targets]
        count = learners and min(learners, len(networks))
        named = {"learners": count, **options}
        return (networks, mix, given if labels else None, temperature), named | ({"ramp": factor} if ramped else {})

    def call(o, networks, mix, labels, ramp):
        positional, named = arguments(networks, mix, labels, ramp)
        return o.mixed_logits_kl(*positional, **named)

    flows = options.get("target_ce") or options.get("through_targets")

    def sizes(g, networks, mix, labels, ramp):
        positional, named = arguments(networks, mix, labels, ramp)
        value, entries, of_mix = sizes_mixed_logits_kl(*positional, **named)
        learns = len(networks) if flows else named["learners"] or len(networks)
        of_networks = [g * (e + UNDERFLOW) if i < learns else None for i, e in enumerate(entries)]
        if not flows:
            return value, *of_networks, *([] if targets == 0 else [None])
        wide = torch.zeros_like(mix)
        wide[:, : of_mix.shape[1]] = of_mix
        return value, *of_networks, g * wide

    def cols(x):
        count, classes = len(x["networks"]), x["networks"][0].shape[1]
        return [classes + 4 * count] * (1 + count) + [classes + 5 * count] * (targets != 0)

    smooth = (lambda value: value) if gradcheck else None
    unread = ["mix"] * (targets == 0) + ["labels"] * (not labels) + ["ramp"] * (not ramped)
    return Op(name, call, sizes, unread=tuple(unread), cols=cols, gradcheck=smooth)


GROUPS = [
    Group(
        "mixed_logits",
        make,
        [
            mixed_logits_kl("one", 1, eps=1e-7, ramp=0.7, target_ce=True),
            mixed_logits_kl("ramp", 1, eps=1e-7, ramped=True, through_targets=True, target_ce=True),
            mixed_logits_kl("attention", eps=1e-7, kl_weight=0.5, through_targets=True, gradcheck=True),
            mixed_logits_kl("no_labels", labels=False, temperature=2.0, through_targets=True, gradcheck=True),
            mixed_logits_kl("shared_target", 1, temperature=1.0, through_targets=True, target_ce=True, eps=1e-3),
            mixed_logits_kl("constant", 1, learners=2, temperature=0.5),
            mixed_logits_kl("least", 0, temperature=2.0, kl_weight=0.3),
        ],
        leaves=("networks", "mix"),
        fixed=("ramp",),
        cols=None,
        largest=lambda name, t: t if name == "mix" else t.sign() * 6e4,
        layouts={
            "networks": "rows",
            "mix": lambda t: torch.stack([t, t], 3)[..., 1].transpose(1, 2),
            "labels": "column",
        },
        **SHARED,
    ),
]


# ---- raw ops, programs -----------------------------------------------------------------------------------------------
def raw_calls(device):
    raw, group = torch.ops.kdfast, GROUPS[0]
    z, mix, y, ramp = group.inputs(device, group.small, torch.float32).values()
    grad = torch.ones((), device=mix.device)
    scales, of_tensor = (3.0, 1e-7, 1.0, 0.5, 8), torch.full((), 2.0, device=mix.device)
    calls = []
    for arguments, flows in (
        ((z, mix, y, ramp, None, 3, *scales, True), (True, True)),
        ((z, mix[:, :1], None, None, of_tensor, 2, *scales, False), (False, False)),
        ((z, None, y, None, None, 3, *scales, False), (False, False)),
        ((z, mix[:, :2, :2], y, None, of_tensor, 3, *scales, False), (True, True)),  # the third network leads
    ):
        _, stats = raw.mixed_logits_kl(*arguments)
        backward = (grad, *arguments[:5], stats, *arguments[5:], *flows)
        calls += [("mixed_logits_kl", arguments), ("mixed_logits_kl_backward", backward)]
    return calls


KDCL = [kdfast.KDCL(rule=rule) for rule in kdfast.KDCL.RULES]


def kdcl(*given):
    """By every rule."""
    networks, labels = list(given[:-1]), given[-1]
    return sum(loss(networks, labels) for loss in KDCL)


PROGRAMS = [program_of(GROUPS[0]), Program("mixed_logits, KDCL", kdcl, make_logits, graph=False)]


# ---- errors ----------------------------------------------------------------------------------------------------------
def bad_inputs():
    return [torch.randn(5, 9) for _ in range(3)], torch.rand(5, 3, 3), torch.zeros(5, dtype=torch.long)


ERRORS = [
    (lambda z, m, y: ops.mixed_logits_kl(z[0], m), ValueError, r"networks must be a list .* got shape \(5, 9\)"),
    (lambda z, m, y: ops.mixed_logits_kl("z", m), TypeError, "networks must be a list .* got str"),
    (lambda z, m, y: ops.mixed_logits_kl([], m), ValueError, "networks must have from 1 to 128 networks, got 0"),
    (lambda z, m, y: ops.mixed_logits_kl(z * 43, m), ValueError, "from 1 to 128 networks, got 129"),
    (lambda z, m, y: ops.mixed_logits_kl([z[0], 3], m), TypeError, r"networks\[1\] must be a torch.Tensor, got int"),
    (lambda z, m, y: ops.mixed_logits_kl([z[0].long()], m), TypeError, r"networks\[0\] must be float32"),
    (lambda z, m, y: ops.mixed_logits_kl([z[0][0]], m), ValueError, r"networks\[0\] must be \(B, C\), or \(M, B, C\)"),
    (
        lambda z, m, y: ops.mixed_logits_kl([z[0], z[1][:, :8], z[2]], m),
        ValueError,
        r"networks\[1\] must have networks\[0\]'s batch and classes \(5, 9\), got shape \(5, 8\)",
    ),
    (lambda z, m, y: ops.mixed_logits_kl([z[0][:, :0]], m), ValueError, "must have at least one class"),
    (
        lambda z, m, y: ops.mixed_logits_kl([z[0], z[1].to("meta")], m),
        ValueError,
        r"networks\[1\] must be on networks\[0\]'s device cpu, got meta",
    ),
    (lambda z, m, y: ops.mixed_logits_kl(z, m[:, :2]), ValueError, r"shape \(5, 3\) or \(5, 1, 3\) or \(5, 3, 3\)"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m[:4]), ValueError, "mix must have the shape"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m.long()), TypeError, "mix must be float32"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m, learners=4), ValueError, "learners must be at most the 3 networks"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m, learners=0), ValueError, "learners must be at least 1"),
    (lambda z, m, y: ops.mixed_logits_kl(z, None), ValueError, "labels must be given without mix"),
    (lambda z, m, y: ops.mixed_logits_kl(z, None, y, target_ce=True), ValueError, "mix must be given with target_ce"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m, target_ce=True), ValueError, "labels must be given with target_ce"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m, y[:4]), ValueError, r"labels must have shape \(5,\), got \(4,\)"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m, y, 0.0), ValueError, "temperature must be finite and above 0"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m, eps=-1.0), ValueError, "eps must be from 0 to 1"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m, eps=1e-40), ValueError, "eps must be 0 or from 1e-30 to 1"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m, ramp=m[0, 0]), ValueError, "ramp must be a number or a 0-d tensor"),
    (lambda z, m, y: ops.mixed_logits_kl(z, m, ramp="1"), TypeError, "ramp must be a number, got str"),
    (lambda z, m, y: kdfast.ONE()(z, m[:, 0, :2], y, 0), ValueError, r"gate must have shape \(5, 3\), got \(5, 2\)"),
    (lambda z, m, y: kdfast.ONE()(z, m[:, 0], y, "0"), TypeError, "epoch must be an int or a 0-d tensor, got str"),
    (lambda z, m, y: kdfast.ONE()(z, m[:, 0], y, y), ValueError, "epoch must be an int or a 0-d tensor, got shape"),
    (lambda z, m, y: kdfast.ONE()(z, m[:, 0], None, 0), ValueError, "labels must be given with target_ce"),
    (lambda z, m, y: kdfast.ONE(rampup_epochs=-1), ValueError, "rampup_epochs must be from 0"),
    (
        lambda z, m, y: kdfast.OKDDip()(z[:2], z[2], m, y, 0),
        ValueError,
        r"attention must have shape \(5, 2, 2\), got \(5, 3, 3\)",
    ),
    (
        lambda z, m, y: kdfast.OKDDip()(z[:2], z[2][:, :8], m[:, :2, :2], y, 0),
        ValueError,
        r"leader must have the heads' shape \(5, 9\), got \(5, 8\)",
    ),
    (lambda z, m, y: kdfast.FFL()(z[:2], z[2][None], y, 0), ValueError, r"fused must be 2-D \(batch, classes\)"),
    (lambda z, m, y: kdfast.FFL()(z[:2], z[2].to("meta"), y, 0), ValueError, "on the first head's device cpu"),
    (lambda z, m, y: kdfast.OKDDipAttention(7), ValueError, "features must be at least 8"),
    (lambda z, m, y: kdfast.CollaborativeLearning()(z[:1], y), ValueError, "logits must have at least 2 heads, got 1"),
    (
        lambda z, m, y: kdfast.CollaborativeLearning(rampup_epochs=5)(z, y),
        ValueError,
        "epoch must be given with rampup_epochs=5",
    ),
    (lambda z, m, y: kdfast.KDCL(rule="best"), ValueError, "rule must be one of naive, linear, minlogit"),
    (lambda z, m, y: kdfast.FusionModule(4, 9, 3)([m[:, :, :, None]]), TypeError, "maps must be a list of two maps"),
    (
        lambda z, m, y: kdfast.FusionModule(4, 9, 3)([m[..., None]] * 2),
        ValueError,
        r"maps\[0\] must have shape \(B, 4, 3, 3\), got \(5, 3, 3, 1\)",
    ),
    (lambda z, m, y: kdfast.rescale_gradient(z[0], 0), ValueError, "heads must be at least 1"),
]
