"""Losses of one student and several teachers or peers, each of which counts by itself.

Several networks are a list of (B, C) tensors or one (M, B, C) tensor.
"""

from typing import ClassVar

import torch
from torch import Tensor

from kdfast._types import Networks
from kdfast.losses.base import AT_LEAST_0, SHARE, Loss, Settings, made_of_settings, one_of, setting
from kdfast.losses.epochs import epoch_of
from kdfast.ops import check
from kdfast.ops.networks import network_list
from kdfast.ops.teachers import aekd, teachers_kl, teachers_loss


@made_of_settings
class DML(Loss):
    """DML - Deep Mutual Learning (Zhang et al., CVPR 2018).

    ``[CE(student, labels)] + sum_j T^2 KL(p_j || q)`` of one network against its peers, averaged over the batch: a sum
    as in the official code, where the paper divides by the number of peers.
    Shapes: student (B, C), peers a list of (B, C) or one (M, B, C), labels (B,) integers or None for the divergences
    alone; 0-d, in nats. No gradient to the peers, which have losses of their own. The official TensorFlow code adds
    1e-8 in the logarithm, and shows each network peers that were updated in the same step. Op: ``teachers_kl``.

    Args:
        temperature: T, above 0.
    """

    temperature: float = setting(1.0, check.positive)

    def forward(self, student: Tensor, peers: Networks, labels: Tensor | None = None) -> Tensor:
        check.logits("student", student)
        return teachers_loss(student, _constants("peers", peers, student), labels, self.temperature)


def _constants(name, networks, student):
    """The networks as a checked list, without their graph."""
    return [x.detach() if x.requires_grad else x for x in network_list(name, networks, student)]


@made_of_settings
class Codistillation(Loss):
    """Codistillation - Large Scale Distributed Neural Network Training through Online Distillation (Anil, ICLR 2018).

    By Anil et al.: "cross_entropy" ``-sum_c r log q``, or "reverse_kl" ``KL(q || r)``, the default of a public
    implementation by others; q = softmax(student), r the mean of the peers' softmax, averaged over the batch.
    Shapes: student (B, C), peers a list of (B, C) or one (M, B, C), epoch an int, a 0-d tensor or None; 0-d, in nats.
    Before epoch `burn_in` the loss and its gradient are 0; None counts as after. No gradient to the peers, which in the
    paper are copies some steps old. There is no official code. Op: ``teachers_kl``.

    Args:
        mode: "cross_entropy" or "reverse_kl".
        burn_in: epochs without the loss.
    """

    MODES = ("cross_entropy", "reverse_kl")

    mode: str = setting("cross_entropy", one_of(*MODES))
    burn_in: int = setting(0, AT_LEAST_0)

    def forward(self, student: Tensor, peers: Networks, epoch: float | Tensor | None = None) -> Tensor:
        check.logits("student", student)
        epoch = None if epoch is None else epoch_of(epoch, student.device)
        weight = 1.0
        if epoch is not None and not isinstance(epoch, torch.Tensor):
            weight = 1.0 if epoch >= self.burn_in else 0.0
        tensors = _constants("peers", peers, student)
        loss = teachers_loss(student, tensors, None, 1.0, kind=self.mode, kl_weight=weight)
        return torch.where(epoch < self.burn_in, 0.0, loss) if isinstance(epoch, torch.Tensor) else loss


class AEKD(Loss):
    """AE-KD - Agree to Disagree: Adaptive Ensemble Knowledge Distillation in Gradient Space (Du et al., NeurIPS 2020).

    ``sum_m a_m T^2 KL(p_m || q)`` averaged over the batch, with one weight per teacher and batch:
    ``min a' G a, sum a = 1, 0 <= a <= slack``, G_mn = v_m . v_n, v_m the batch's mean gradient of teacher m's
    divergence in the student's logits. With `normalize`, v_m has length 1 there and a is divided by the lengths
    afterwards, so that a weight may exceed slack. slack <= 1 / M is the plain average.
    Shapes: student (B, C), teachers a list of (B, C) or one (M, B, C); 0-d, in nats; `weights` (M,) after each call.
    Gradients flow to the student; teachers and weights are constants. The weights are the optimum, found on the device
    and without a backward per teacher; the official code's solver stops early where gradients are small, with weights
    that depend on the teachers' order. Op: ``aekd``.

    Args:
        temperature: T, above 0.
        slack: the largest weight of a teacher, from 0 to 1.
        normalize: as above.
    """

    settings: ClassVar[Settings] = {"temperature": check.positive, "slack": SHARE}

    def __init__(self, temperature: float = 4.0, slack: float = 0.6, normalize: bool = False) -> None:
        super().__init__()
        self.temperature = temperature
        self.slack = slack
        self.normalize: bool = bool(normalize)
        self.weights: Tensor | None = None

    def forward(self, student: Tensor, teachers: Networks) -> Tensor:
        loss, self.weights = aekd(student, teachers, self.temperature, slack=self.slack, normalize=self.normalize)
        return loss


@made_of_settings
class EnD(Loss):
    """EnD - Ensemble Distribution Distillation, its baseline of mean predictions (Malinin et al., ICLR 2020).

    ``-T^2 mean_bc [r log q]``, r = mean_m softmax(teacher_m / T), q = softmax(student / T): the official mean over
    B * C, C times smaller than the usual cross-entropy.
    Shapes: student (B, C), teachers a list of (B, C) or one (M, B, C); 0-d, in nats. Gradients flow to all.
    The teachers are not smoothed. Op: ``teachers_kl``.

    Args:
        temperature: T, above 0.
    """

    temperature: float = setting(1.0, check.positive)

    def forward(self, student: Tensor, teachers: Networks) -> Tensor:
        check.logits("student", student)
        return teachers_kl(student, teachers, None, self.temperature, kind="cross_entropy", over_classes=True)
