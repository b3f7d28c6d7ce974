"""Losses of several networks or heads that learn from mixtures of their logits, and the layers that come with them.

Several networks are a list of (B, C) tensors or one (M, B, C) tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdfast._types import Networks
from kdfast.losses.base import AT_LEAST_0, SHARE, Loss, made_of_settings, one_of, or_none, setting
from kdfast.losses.epochs import ramp_up
from kdfast.ops import check
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.mixed_logits import least, mixed, mixed_loss
from kdfast.ops.networks import matrices, network_count, network_list
from kdfast.ops.rows import INF, label_column, log_softmax, row_stats
from kdfast.ops.simplex import RIDGE, best_mixture
from kdfast.ops.softmax_kl import cross_entropy


def _heads(logits, least=1):
    """-> the tensors, how many heads they are, the batch size; `least` heads are needed."""
    tensors = network_list("logits", logits)
    count = network_count(tensors)
    if count < least:
        raise ValueError(f"logits must have at least {least} heads, got {count}")
    return tensors, count, tensors[0].shape[-2]


def _with_heads(name, x, tensors):
    """The heads and one network more, the (B, C) logits `x`; all in one dtype."""
    first = tensors[0]
    if first.dim() == 2 and check.unlike_first([first, x]) == [0]:
        return [*tensors, x]
    check.logits(name, x)
    if x.shape != first.shape[-2:]:
        raise ValueError(f"{name} must have the heads' shape {tuple(first.shape[-2:])}, got {tuple(x.shape)}")
    check.same_device(name, x, first, "the first head")
    return network_list("logits", [*tensors, x])


def _zeros(like, *shape):
    return torch.zeros(shape, dtype=accumulator(like), device=like.device)


def _ramped(loss, tensors, mix, labels, epoch, **more):
    """:func:`mixed_logits_kl` with the temperature, the eps and the ramp of `loss` in this epoch."""
    ramp = 1.0 if loss.rampup_epochs is None else ramp_up(epoch, loss.rampup_epochs, tensors[0].device)
    return mixed_loss(tensors, mix, labels, loss.temperature, loss.eps, ramp=ramp, **more)


@made_of_settings
class _Scheduled(Loss):
    """A loss whose divergence ramps up."""

    temperature: float = setting(3.0, check.positive)
    rampup_epochs: int = setting(80, AT_LEAST_0)
    eps: float = setting(1e-7, SHARE)


class ONE(_Scheduled):
    """ONE - Knowledge Distillation by On-the-Fly Native Ensemble (Lan, Zhu and Gong, NeurIPS 2018).

    ``sum_k CE(z_k) + CE(z_e) + ramp sum_k KL_eps(z_e || z_k)``, z_e = sum_k gate_k z_k, averaged over the batch, with
    ``KL_eps = T^2 sum_c p' (log p' - log q)``, p' = softmax(z_e / T) + eps, which is not normalised again, and
    ``ramp = exp(-5 (1 - min(epoch / rampup_epochs, 1))^2)``, 1 for rampup_epochs=0.
    Shapes: logits a list of (B, C) or one (M, B, C), gate (B, M) as :class:`ONEGate` gives it, labels (B,) integers,
    epoch an int or a 0-d tensor; 0-d, in nats. Targets are constants: gate and branches learn from CE(z_e) through z_e,
    not from the divergence. The official code fixes T = 3. Op: ``mixed_logits_kl``.

    Args:
        temperature: T, above 0.
        rampup_epochs: until the ramp is 1; 0: at once.
        eps: added to the targets.
    """

    def forward(self, logits: Networks, gate: Tensor, labels: Tensor, epoch: float | Tensor) -> Tensor:
        tensors, count, rows = _heads(logits)
        check.tensor("gate", gate)
        if gate.shape != (rows, count):
            raise ValueError(f"gate must have shape ({rows}, {count}), got {tuple(gate.shape)}")
        return _ramped(self, tensors, gate, labels, epoch, target_ce=True, mix_name="gate")


class ONEGate(nn.Module):
    """Gate of ONE - Knowledge Distillation by On-the-Fly Native Ensemble (Lan, Zhu and Gong, NeurIPS 2018).

    ``softmax(relu(norm(linear(x))))`` over the branches: the weight of each branch for each sample.
    Shapes: x (B, features), pooled features of the shared layers -> (B, branches). The ReLU before the softmax, as in
    the official code, keeps every weight above exp(-largest).
    """

    def __init__(self, features: int, branches: int) -> None:
        super().__init__()
        check.count("features", features)
        check.count("branches", branches)
        self.linear: nn.Linear = nn.Linear(features, branches)
        self.norm: nn.BatchNorm1d = nn.BatchNorm1d(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(torch.relu(self.norm(self.linear(x))), dim=1)


@made_of_settings
class OKDDip(Loss):
    """OKDDip - Online Knowledge Distillation with Diverse Peers (Chen et al., AAAI 2020).

    ``sum_i CE(z_i) + CE(leader) + alpha ramp [sum_i KL_eps(t_i || z_i) + KL_eps(mean_i z_i || leader)]`` averaged over
    the batch, t_i = sum_j attention_ij z_j, itself included; KL_eps and ramp as in :class:`ONE`.
    Shapes: logits of the peers a list of (B, C) or one (M, B, C), leader (B, C), attention (B, M, M) as
    :class:`OKDDipAttention` gives it, labels (B,) integers, epoch an int or a 0-d tensor; 0-d, in nats.
    Nothing is detached: peers and attention learn through the targets, too. The paper averages predictions, the
    official code logits, and so does this. Op: ``mixed_logits_kl``.

    Args:
        temperature: T, above 0.
        alpha: weight of the divergences.
        rampup_epochs: until the ramp is 1; 0: at once.
        eps: added to the targets.
    """

    temperature: float = setting(3.0, check.positive)
    alpha: float = setting(1.0, check.number)
    rampup_epochs: int = setting(80, AT_LEAST_0)
    eps: float = setting(1e-7, SHARE)

    def forward(
        self, logits: Networks, leader: Tensor, attention: Tensor, labels: Tensor, epoch: float | Tensor
    ) -> Tensor:
        tensors, count, rows = _heads(logits)
        check.tensor("attention", attention)
        if attention.shape != (rows, count, count):
            raise ValueError(f"attention must have shape ({rows}, {count}, {count}), got {tuple(attention.shape)}")
        given = (_with_heads("leader", leader, tensors), attention, labels, epoch)
        return _ramped(self, *given, kl_weight=self.alpha, through_targets=True, leader=True, mix_name="attention")


class OKDDipAttention(nn.Module):
    """Attention of OKDDip - Online Knowledge Distillation with Diverse Peers (Chen et al., AAAI 2020).

    ``softmax_j(query(x_i) . key(x_j))``, not divided by a root: how much peer i takes from peer j.
    Shapes: x (B, M, features), the peers' pooled features -> (B, M, M). query and key are linear maps to features // 8
    without bias.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        check.count("features", features)
        if features < 8:
            raise ValueError(f"features must be at least 8, of which query and key take an eighth, got {features}")
        self.query: nn.Linear = nn.Linear(features, features // 8, bias=False)
        self.key: nn.Linear = nn.Linear(features, features // 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), dim=2)


class FFL(_Scheduled):
    """FFL - Feature Fusion for Online Mutual Knowledge Distillation (Kim et al., ICPR 2020).

    ``sum_i CE(z_i) + CE(fused) + ramp [sum_i KL_eps(fused || z_i) + KL_eps(mean_i z_i || fused)]`` averaged over the
    batch; KL_eps and ramp as in :class:`ONE`.
    Shapes: logits of the branches a list of (B, C) or one (M, B, C), fused (B, C) as :class:`FusionModule` gives it,
    labels (B,) integers, epoch an int or a 0-d tensor; 0-d, in nats. All targets are constants. The official code has
    two branches and T = 3. Op: ``mixed_logits_kl``.

    Args:
        temperature: T of both divergences.
        rampup_epochs: until the ramp is 1; 0: at once.
        eps: added to the targets.
    """

    def forward(self, logits: Networks, fused: Tensor, labels: Tensor, epoch: float | Tensor) -> Tensor:
        tensors, count, rows = _heads(logits)
        mix = _zeros(tensors[0], count + 1, count + 1)
        mix[:count, count] = 1.0
        mix[count, :count] = 1 / count
        return _ramped(self, _with_heads("fused", fused, tensors), mix.expand(rows, -1, -1), labels, epoch)


class FusionModule(nn.Module):
    """Fusion of FFL - Feature Fusion for Online Mutual Knowledge Distillation (Kim et al., ICPR 2020).

    The branches' last maps side by side, a depthwise 3x3 and a 1x1 convolution, each with norm and ReLU, average
    pooling over `pool` x `pool` positions and a linear classifier.
    Shapes: a list of two maps (B, channels, pool, pool), taken before the branches pool them -> logits (B, classes).
    """

    def __init__(self, channels: int, classes: int, pool: int) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("classes", classes), ("pool", pool)):
            check.count(name, value)
        self.channels = channels
        self.pool = pool
        self.depthwise: nn.Conv2d = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels, bias=False)
        self.depthwise_norm: nn.BatchNorm2d = nn.BatchNorm2d(2 * channels)
        self.pointwise: nn.Conv2d = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.pointwise_norm: nn.BatchNorm2d = nn.BatchNorm2d(channels)
        self.classifier: nn.Linear = nn.Linear(channels, classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        if not isinstance(maps, (list, tuple)) or len(maps) != 2:
            raise TypeError("maps must be a list of two maps, one per branch")
        for index, x in enumerate(maps):
            check.maps(f"maps[{index}]", x)
            if x.shape[1:] != (self.channels, self.pool, self.pool):
                expected = f"(B, {self.channels}, {self.pool}, {self.pool})"
                raise ValueError(f"maps[{index}] must have shape {expected}, got {tuple(x.shape)}")
        x = torch.relu(self.depthwise_norm(self.depthwise(torch.cat(list(maps), 1))))
        x = torch.relu(self.pointwise_norm(self.pointwise(x)))
        return self.classifier(x.mean((2, 3)))

    def extra_repr(self) -> str:
        return f"channels={self.channels}, pool={self.pool}"


@made_of_settings
class CollaborativeLearning(Loss):
    """CL-ILR - Collaborative Learning for Deep Neural Networks (Song and Chai, NeurIPS 2018).

    ``sum_h CE(z_h) + alpha ramp sum_h KL_eps(mean_{j != h} z_j || z_h)`` averaged over the batch, as in the OKDDip
    repository, for the authors published no code: KL_eps and ramp are those of :class:`ONE`, and ramp is 1 with
    rampup_epochs=None.
    Shapes: logits a list of at least two (B, C) or one (M, B, C), labels (B,) integers, epoch an int or a 0-d tensor
    (or None with rampup_epochs=None); 0-d, in nats. The targets are not detached, as in that repository; in the paper
    they are. :func:`rescale_gradient` goes with it, after the shared layers. Op: ``mixed_logits_kl``.

    Args:
        temperature: T, above 0.
        alpha: weight of the divergences.
        rampup_epochs: until the ramp is 1; None: no ramp.
        eps: added to the targets.
    """

    temperature: float = setting(3.0, check.positive)
    alpha: float = setting(1.0, check.number)
    rampup_epochs: int | None = setting(None, or_none(AT_LEAST_0))
    eps: float = setting(1e-7, SHARE)

    def forward(self, logits: Networks, labels: Tensor, epoch: float | Tensor | None = None) -> Tensor:
        tensors, count, rows = _heads(logits, least=2)
        if epoch is None and self.rampup_epochs is not None:
            raise ValueError(f"epoch must be given with rampup_epochs={self.rampup_epochs}, got None")
        mix = (1 - torch.eye(count, dtype=accumulator(tensors[0]), device=tensors[0].device)) / (count - 1)
        given = (tensors, mix.expand(rows, -1, -1), labels, epoch)
        return _ramped(self, *given, kl_weight=self.alpha, through_targets=True)


class _RescaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, heads):
        ctx.heads = heads
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.heads, None


def rescale_gradient(x: Tensor, heads: int) -> Tensor:
    """`x` itself, whose gradient is divided by the number of `heads` that share it (Song and Chai, NeurIPS 2018)."""
    check.tensor("x", x)
    check.count("heads", heads)
    return _RescaleGradient.apply(x, heads)


@made_of_settings
class KDCL(Loss):
    """KDCL - Online Knowledge Distillation via Collaborative Learning (Guo et al., CVPR 2020).

    ``sum_i [CE(z_i) + weight T^2 KL(t || z_i)]`` averaged over the batch, with one target t for all networks:

    - "naive": the logits of the network with the smallest cross-entropy, sample by sample;
    - "linear": sum_m a_m z_m with the a on the simplex that gives the batch the smallest cross-entropy, solved exactly;
    - "minlogit": ``min_m (z_m - z_m[label])`` of each class;
    - "general": log sum_m a_m p_m, at least log 1e-30, with ``a = C^-1 1`` normalised and
      ``C_ij = mean_b (p_i - onehot) . (p_j - onehot)`` of this batch, where the paper takes a validation set;
    - "mean": mean_m z_m, which is none of the paper's.

    Shapes: logits a list of (B, C) or one (M, B, C), labels (B,) integers; 0-d, in nats. The target is a constant;
    :meth:`target` gives it. There is no official code. Op: ``mixed_logits_kl``.

    Args:
        temperature: T, above 0.
        rule: one of the five.
        weight: of the divergences.
    """

    RULES = ("naive", "linear", "minlogit", "general", "mean")

    temperature: float = setting(2.0, check.positive)
    rule: str = setting("minlogit", one_of(*RULES))
    weight: float = setting(1.0, check.number)

    def forward(self, logits: Networks, labels: Tensor) -> Tensor:
        tensors, count, rows = _heads(logits)
        labels = check.class_indices(labels, matrices(tensors)[0])
        if self.rule == "general":
            target = self._general(tensors, labels)
            tensors = [*tensors, target.to(tensors[0].dtype)]
            mix = nn.functional.pad(_zeros(target, rows, 1, count), (0, 1), value=1.0)
        else:
            mix = self._mix(tensors, labels)
        return mixed_loss(tensors, mix, labels, self.temperature, kl_weight=self.weight, learners=count)

    @torch.no_grad()
    def target(self, logits: Networks, labels: Tensor) -> Tensor:
        """The target's logits (B, C), a constant, in the type of sums."""
        tensors, _, rows = _heads(logits)
        networks = matrices(tensors)
        labels = check.class_indices(labels, networks[0])
        if self.rule == "general":
            return self._general(tensors, labels)
        mix, dtype = self._mix(tensors, labels), accumulator(*networks)
        origin = [torch.zeros(rows, dtype=dtype, device=labels.device)] * len(networks)
        if mix is None:
            return least(networks, origin, label_column(labels, networks[0].shape[1])[0], dtype)
        return mixed([x.to(dtype) for x in networks], mix[:, 0])

    @torch.no_grad()
    def _mix(self, tensors, labels):
        """Weights (B, 1, M) of the networks' logits; None for the least logits."""
        networks = matrices(tensors)
        if self.rule == "minlogit":
            return None
        if self.rule == "naive":
            terms = torch.stack([cross_entropy(z, labels, reduction="none") for z in networks], 1)
            best = torch.arange(len(networks), device=terms.device) == terms.argmin(1, keepdim=True)
            return best[:, None].to(terms.dtype)
        if self.rule == "mean":
            weights = _zeros(networks[0], len(networks)) + 1 / len(networks)
        else:
            weights = best_mixture(networks, labels).to(accumulator(*networks))
        return weights.expand(len(labels), 1, -1)

    @torch.no_grad()
    def _general(self, tensors, labels):
        return _least_error_mixture(matrices(tensors), labels)


def _least_error_mixture(networks, labels):
    """log sum_m a_m p_m [rows, cols] with a = C^-1 1 of the networks' errors p - onehot, normalised."""
    dtype = accumulator(*networks)
    column, *_ = label_column(labels, networks[0].shape[1])
    p = [log_softmax(z, *row_stats(z, 1.0, dtype), 1.0).exp() for z in networks]
    errors = [x - torch.zeros_like(x).scatter(1, column, 1.0) for x in p]
    products = [[fixed_sum(fixed_sum(x * y).double()) for y in errors] for x in errors]
    c = torch.stack([torch.stack(row) for row in products])
    largest = c.diagonal().amax()
    c = torch.where(largest > 0, c / largest, 0.0) + RIDGE * torch.eye(len(c), dtype=c.dtype, device=c.device)
    a, _ = torch.linalg.solve_ex(c, torch.ones_like(c[0]))
    a = (a / a.sum()).to(dtype)
    mean = sum(weight * x for weight, x in zip(a.unbind(0), p, strict=True))
    masked = torch.stack([z == -INF for z in networks]).all(0)
    return torch.where(masked, -INF, mean.clamp(min=1e-30).log())
