"""Logits of many networks, mixed to targets: one read of N logit matrices per direction, and no softmax of them kept.

With q_i = softmax(z_i / T) of a batch of B rows, and CE_i the cross-entropy of network i with the labels:

    sum_i [KL_eps(t_i || z_i) + CE_i], where t_i = sum_m mix_im z_m mixes logits:
    KL_eps(t || z) = T^2 sum_c p' (log p' - log q),  p' = softmax(t / T) + eps, not normalised again

Logits are centred network by network: a shift of a row changes no softmax, and large offsets cost no digits. A network
of weight 0 adds nothing, also where it is -inf. A class that is -inf in both the network and its target is no class and
gets no eps. An empty target (-inf everywhere) teaches nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast._kernels import op
from kdfast._types import Networks
from kdfast.ops import check, shapes
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.blocks import anywhere, by_block
from kdfast.ops.networks import class_labels, matrices, network_count, network_list, regroup
from kdfast.ops.rows import (
    INF,
    Rows,
    batch_size,
    cross_entropy_grad,
    cross_entropy_stats,
    kl_grad_p,
    kl_rows,
    kl_sum,
    label_column,
    log_softmax,
    maxima,
    near_of,
    scale_rows,
)
from kdfast.ops.saved import save, saved
from kdfast.ops.temperature import temperature_argument, temperature_of

__all__ = ["mixed_logits_kl"]

LEAST_EPS = 1e-30  # above 0: a normal number in float32


# ---- plain PyTorch: the readable definition --------------------------------------------------------------------------
def mixed(centred: Sequence[Tensor], weights: Tensor) -> Tensor:
    """sum_m weights_m centred_m [rows, cols]; weights [rows, networks]."""
    target = torch.zeros_like(centred[0])
    masked = anywhere(weights == 0)
    for z, weight in zip(centred, weights.to(target.dtype).unbind(1), strict=True):
        target += scale_rows(weight, z) if masked else weight[:, None] * z
    return target


def least(networks: Sequence[Tensor], tops: Sequence[Tensor], column: Tensor, dtype: torch.dtype) -> Tensor:
    """min_m (z_m - z_m at the label) [rows, cols]; a network without the label's class is measured from its maximum."""
    target = None
    for x, top in zip(networks, tops, strict=True):
        at_label = x.gather(1, column)[:, 0].to(dtype)
        z = x.to(dtype) - torch.where(at_label == -INF, top, at_label)[:, None]
        target = z if target is None else torch.minimum(target, z)
    return target


def leads(mix: Tensor | None, networks: Sequence[Tensor]) -> bool:
    """Whether the last network leads, for which `mix` has neither a target nor a weight."""
    return mix is not None and mix.shape[2] < len(networks)


def completed(mix: Tensor | None, networks: Sequence[Tensor]) -> Tensor | None:
    """Weights (B, R, N) of all targets and networks: of a leader's target 1 / (N - 1), of the leader 0."""
    if not leads(mix, networks):
        return mix
    rows, targets, count = mix.shape
    weights = mix.new_zeros(rows, targets + 1, count + 1)
    weights[:, :targets, :count] = mix
    weights[:, targets, :count] = 1 / count
    return weights


def targets_of(
    networks: Sequence[Tensor], tops: Sequence[Tensor], mix: Tensor | None, column: Tensor | None, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """-> the mixed logits [rows, cols] of each target; what they mix: the networks less their maxima."""
    if mix is None:
        return [least(networks, tops, column, dtype)], []
    centred = [x.to(dtype) - top[:, None] for x, top in zip(networks, tops, strict=True)]
    return [mixed(centred, weights) for weights in mix.unbind(1)], centred


def with_eps(
    target: Tensor, log_p: Tensor, p: Tensor, empty: Tensor, z: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-> p' and log p' [rows, cols], 0 for what is no class; the mass sum_c p' [rows]."""
    mass = (~empty).to(p.dtype)
    excluded = anywhere(log_p.amin(1) == -INF)  # of a row, some class
    if eps == 0:
        return p, torch.where(log_p == -INF, 0.0, log_p) if excluded else log_p, mass
    p = p + eps
    log_p = p.log()
    if not excluded:
        return p, log_p, mass + eps * p.shape[1]
    active = ((target > -INF) | (z > -INF)) & ~empty[:, None]
    mass = mass + eps * active.sum(1, dtype=p.dtype)
    return torch.where(active, p, 0.0), torch.where(active, log_p, 0.0), mass


def _loss_and_stats(networks, mix, learners, **_):
    stats = len(networks) + 4 * learners + 3 * _targets(mix, networks)
    return shapes.sums((), *networks, mix), shapes.sums((stats, networks[0].shape[0]), *networks, mix)


def _gradient_shapes(grad, networks, mix, learners, target_ce, through_targets, need_mix, **_):
    count = len(networks) if target_ce or through_targets else learners
    mix_grad = shapes.gradient(mix) if need_mix else grad.new_empty(0)
    return networks[0].new_empty((count, *networks[0].shape)), mix_grad


@op("mixed_logits", _loss_and_stats)
def _mixed_logits_kl(
    networks: list[Tensor],
    mix: Tensor | None,
    labels: Tensor | None,
    ramp: Tensor | None,
    temperatures: Tensor | None,
    learners: int,
    temperature: float,
    eps: float,
    kl_scale: float,
    ce_scale: float,
    divisor: int,
    target_ce: bool,
) -> tuple[Tensor, Tensor]:
    """-> loss, stats: maxima of the networks; of the learners sums at T and at 1, masses of p', slopes

    sum_c p (log p' - log q); of the targets maxima, sums at T and at 1.
    """
    dtype, mix = accumulator(*networks, mix), completed(mix, networks)
    t = temperature_of(temperatures, temperature, dtype)
    column, _, wrong = [None] * 3 if labels is None else label_column(labels, networks[0].shape[1])

    def block(first, column, wrong, mix, *others):
        networks = (first, *others)
        tops = [maxima(x, dtype) for x in networks]
        kl = ce = zero = torch.zeros_like(tops[0])
        targets, target_stats = [], []
        for logits in targets_of(networks, tops, mix, column, dtype)[0]:
            target, sum_1 = Rows.of(logits, t, dtype), zero
            if target_ce:
                sum_1, term = cross_entropy_stats(logits, column, wrong, dtype)
                ce = ce + term
            targets.append(target)
            target_stats.append((*target.side, sum_1))

        learner_stats = []
        for index, z in enumerate(networks[:learners]):
            target = targets[index % len(targets)]
            p, q = target.log_p.exp(), Rows.of(z, t, dtype, tops[index])
            own = kl_rows(p, target.log_p - q.log_p, near_of(target, q, t, False))
            if eps:  # what it adds
                p_eps, log_p, mass = with_eps(target.logits, target.log_p, p, target.total == 0, z, eps)
                slope = own + kl_sum(p, log_p - target.log_p)
                own = slope + kl_sum(p_eps - p, log_p - q.log_p)
            else:
                mass, slope = (target.total != 0).to(dtype), own
            kl, sum_1 = kl + own, zero
            if labels is not None:
                sum_1, term = cross_entropy_stats(z, column, wrong, dtype)
                ce = ce + term
            learner_stats.append((q.total, sum_1, mass, slope))
        groups = [tops, *zip(*learner_stats, strict=True), *zip(*target_stats, strict=True)]
        return kl, ce, torch.stack([x for group in groups for x in group], 1)

    kl, ce, stats = by_block(block, networks[0], column, wrong, mix, *networks[1:])
    scale = kl_scale / divisor * (t * t) * (1.0 if ramp is None else ramp.to(dtype))
    return fixed_sum(scale_rows(scale, kl) + scale_rows(ce_scale / divisor, ce)), stats.t().contiguous()


@op("mixed_logits", _gradient_shapes)
def _mixed_logits_kl_backward(
    grad: Tensor,
    networks: list[Tensor],
    mix: Tensor | None,
    labels: Tensor | None,
    ramp: Tensor | None,
    temperatures: Tensor | None,
    stats: Tensor,
    learners: int,
    temperature: float,
    eps: float,
    kl_scale: float,
    ce_scale: float,
    divisor: int,
    target_ce: bool,
    through_targets: bool,
    need_mix: bool,
) -> tuple[Tensor, Tensor]:
    """-> gradients [n, rows, cols] of all networks, or of the learners if nothing reaches the targets; of mix."""
    dtype, count, given = stats.dtype, len(networks), mix
    mix = completed(mix, networks)
    grad, t = grad.to(dtype), temperature_of(temperatures, temperature, dtype)
    kl_grad = grad * (kl_scale / divisor * t * (1.0 if ramp is None else ramp.to(dtype)))
    ce_grad = grad * (ce_scale / divisor)
    column = None if labels is None else labels.clamp(0, networks[0].shape[1] - 1)[:, None]
    target_learns, target_count = through_targets or target_ce, _targets(mix, networks)

    def block(first, column, mix, stats, *others):
        networks = (first, *others)
        tops, sums, sums_1, masses, slopes, *targets = stats.t().split([count, *[learners] * 4, *[target_count] * 3])
        all_logits, centred = targets_of(networks, tops, mix, column, dtype)
        target_grads = [torch.zeros_like(x) for x in all_logits] if target_learns else []
        grads = []
        for index, z in enumerate(networks[:learners]):
            which = index % len(all_logits)
            logits, (top, total, _) = all_logits[which], (x[which] for x in targets)
            log_p = log_softmax(logits, top, total, t)
            log_q = log_softmax(z, tops[index], sums[index], t)
            p = log_p.exp()
            p_eps, log_p_eps, _ = with_eps(logits, log_p, p, total == 0, z, eps)
            if through_targets:
                target_grads[which] += scale_rows(kl_grad, kl_grad_p(p, log_p_eps - log_q, slopes[index]))
            grads.append(scale_rows(kl_grad, log_q.exp_().mul_(masses[index][:, None]).sub_(p_eps)))
            if labels is not None:
                grads[index] += scale_rows(ce_grad, cross_entropy_grad(z, tops[index], sums_1[index], column))
        if target_ce:
            for which, logits in enumerate(all_logits):
                of_ce = cross_entropy_grad(logits, targets[0][which], targets[2][which], column)
                target_grads[which] += scale_rows(ce_grad, of_ce)
        if target_learns:
            grads += [torch.zeros_like(grads[0]) for _ in networks[learners:]]

        mix_grad = torch.zeros(mix.shape, dtype=dtype, device=grad.device) if need_mix else grad.new_empty(0)
        for which, target_grad in enumerate(target_grads):
            for m in range(count):
                grads[m] += scale_rows(mix[:, which, m], target_grad)
                if need_mix:
                    mix_grad[:, which, m] = _slope_of_weight(target_grad, centred[m])
        return *grads, mix_grad

    out = networks[0].new_empty((count if target_learns else learners, *networks[0].shape))
    *_, mix_grad = by_block(block, networks[0], column, mix, stats.t(), *networks[1:], into=out.unbind(0))
    if need_mix:
        mix_grad = mix_grad[:, : given.shape[1], : given.shape[2]].to(mix.dtype).contiguous()
    return out, mix_grad


def _slope_of_weight(target_grad, centred):
    """The derivative of each row in the weight of a network; a class that this excludes counts nothing."""
    terms = target_grad * centred
    slope = fixed_sum(terms)
    if anywhere(~slope.isfinite()):
        return fixed_sum(torch.where((centred == -INF) | (target_grad == 0), 0.0, terms))
    return slope


def _targets(mix, networks):
    return 1 if mix is None else mix.shape[1] + (1 if leads(mix, networks) else 0)


# ---- public functions ------------------------------------------------------------------------------------------------
# Written out: its tensors come as a list, and through `differentiable.py` a small call would take 3 % longer.
# forward takes *args: without gradients, dynamo tells from the number of parameters whether there is a ctx.
class _MixedLogitsKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        mix, labels, ramp, temperatures, settings, through_targets, *tensors = args
        ctx.flat = mix is not None and mix.dim() == 2
        weights = mix[:, None] if ctx.flat else mix
        loss, stats = _mixed_logits_kl(matrices(tensors), weights, labels, ramp, temperatures, *settings)
        save(ctx, weights, labels, ramp, temperatures, stats, *tensors)
        ctx.constants = (settings, through_targets)
        return loss

    @staticmethod
    def backward(ctx, grad):
        check.first_derivative_only("mixed_logits_kl")
        mix, labels, ramp, temperatures, stats, *tensors = saved(ctx)
        settings, through_targets = ctx.constants
        need_mix = ctx.needs_input_grad[0] and (through_targets or settings[-1])
        networks = matrices(tensors)
        grads, mix_grad = _mixed_logits_kl_backward(
            grad, networks, mix, labels, ramp, temperatures, stats, *settings, through_targets, need_mix
        )
        if not need_mix:
            mix_grad = None
        elif ctx.flat:
            mix_grad = mix_grad[:, 0]
        return mix_grad, *(None,) * 5, *regroup(grads, tensors, ctx.needs_input_grad[6:])


def mixed_logits_kl(
    networks: Networks,
    mix: Tensor | None,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    *,
    eps: float = 0.0,
    kl_weight: float = 1.0,
    ce_weight: float = 1.0,
    ramp: float | Tensor = 1.0,
    learners: int | None = None,
    target_ce: bool = False,
    through_targets: bool = False,
) -> Tensor:
    """``1/B sum_b sum_i [kl_weight ramp KL_eps(t_i || z_i) + ce_weight CE(z_i, labels)]``, t_i mixed of all networks.

    KL_eps is in the module's docstring. One read of the networks for all targets, divergences and cross-entropies.

    Args:
        networks: N of them, a list of (B, C) logits, one (N, B, C), or a list of both. The first `learners` learn (all
            by default), the others are mixed only.
        mix: (B, R, N) weights of any floating type and strides, R = 1 target for all or one for each learner; (B, N)
            for one. None: the least logits, ``t = min_m (z_m - z_m[label])`` of each class.
        labels: (B,) integer classes for the cross-entropies (none without). A label that is no class is an error on
            CPU; on CUDA it makes the loss NaN, unless KDFAST_CHECK=1, which checks first.
        ramp: multiplies the divergences: a number, or a 0-d tensor, for which no graph is compiled anew.
        target_ce: adds ``ce_weight CE(t, labels)`` of every target, whose gradient reaches networks and mix.
        through_targets: the divergences' gradients reach networks and mix through the targets, too; else they stop.

    Returns: 0-d, in nats, with gradients to the networks and, as said, to mix. Raises TypeError, ValueError.
    """
    tensors, weights = network_list("networks", networks), (kl_weight, ce_weight, ramp)
    return mixed_loss(tensors, mix, labels, temperature, eps, *weights, learners, target_ce, through_targets)


def mixed_loss(
    tensors: Sequence[Tensor],
    mix: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    eps: float = 0.0,
    kl_weight: float = 1.0,
    ce_weight: float = 1.0,
    ramp: float | Tensor = 1.0,
    learners: int | None = None,
    target_ce: bool = False,
    through_targets: bool = False,
    *,
    leader: bool = False,
    mix_name: str = "mix",
) -> Tensor:
    """:func:`mixed_logits_kl` of networks that `network_list` has checked; messages call the weights `mix_name`.

    leader: the last network leads. No target has it, and its own is the mean of the others: `mix`, (B, N - 1, N - 1),
    has neither a row nor a column for it.
    """
    first = tensors[0][0].detach() if tensors[0].dim() == 3 else tensors[0]
    rows, count = first.shape[0], network_count(tensors)
    learners = count if learners is None else learners
    check.count("learners", learners)
    if learners > count:
        raise ValueError(f"learners must be at most the {count} networks, got {learners}")
    labels = class_labels(labels, first)
    if mix is None:
        if through_targets or target_ce:
            raise ValueError("mix must be given with target_ce or through_targets: the least logits are constants")
        if labels is None:
            raise ValueError("labels must be given without mix: the least logits are measured from the label's")
    else:
        check.floating(mix_name, mix)
        if leader:
            shapes = [(rows, learners - 1, count - 1)]
        else:
            shapes = [(rows, count), (rows, 1, count), (rows, learners, count)]
        if mix.shape not in shapes:
            raise ValueError(f"{mix_name} must have the shape {' or '.join(map(str, shapes))}, got {tuple(mix.shape)}")
        check.same_device(mix_name, mix, first, "the first network")
    if target_ce and labels is None:
        raise ValueError("labels must be given with target_ce")
    check.positive("temperature", temperature)
    check.number("eps", eps, 0, 1)
    if 0 < eps < LEAST_EPS:
        raise ValueError(f"eps must be 0 or from {LEAST_EPS} to 1, got {eps}")
    check.number("kl_weight", kl_weight)
    if isinstance(ramp, torch.Tensor):
        check.floating("ramp", ramp)
        if ramp.dim() != 0:
            raise ValueError(f"ramp must be a number or a 0-d tensor, got shape {tuple(ramp.shape)}")
        check.same_device("ramp", ramp, first, "the first network")
    else:
        check.number("ramp", ramp)
        kl_weight, ramp = kl_weight * ramp, None
    check.number("ce_weight", ce_weight)
    temperatures, temperature = temperature_argument(temperature, first)
    ce_scale = 0.0 if labels is None else float(ce_weight)
    settings = (learners, temperature, float(eps), float(kl_weight), ce_scale, batch_size(first), target_ce)
    return _MixedLogitsKL.apply(mix, labels, ramp, temperatures, settings, through_targets, *tensors)
