"""Residual distillation: a network without shortcuts learns with the help of one that has them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.losses.base import SHARE, Loss, made_of_settings, one_of, setting
from kdfast.losses.feature import ofd_margin
from kdfast.ops import check, cross_entropy, partial_squared_error


def residual_margin_loss(student: Tensor, teacher: Tensor, bn_weight: Tensor, bn_bias: Tensor) -> Tensor:
    """Distance of a path's features from the residual teacher's (Li et al., NeurIPS 2020), as OFD measures it.

    ``sum (s - u)^2 / (B + 1e-8)``, u = max(t, margin), without the elements where s <= u <= 0;
    the margin of each channel is :func:`ofd_margin` of the teacher's last batch norm (the official code rounds it to
    float32, and divides by zero at a weight of 0). Shapes: student, teacher (B, C, H, W) before the ReLU, the student's
    brought to the teacher's channels by an :class:`OFDConnector`; bn_weight, bn_bias (C,); 0-d. No gradient to the
    teacher. Op: ``partial_squared_error``.
    """
    check.two_embeddings(student, teacher, check.same_shape)
    for name, values in (("bn_weight", bn_weight), ("bn_bias", bn_bias)):
        check.shaped(name, values, student.shape[1:2], student)
    margin = ofd_margin(bn_weight, bn_bias)
    return partial_squared_error(student, teacher.detach(), margin) / (student.shape[0] + 1e-8)


@made_of_settings
class JointLoss(Loss):
    """RD - Residual Distillation: Towards Portable Deep Neural Networks without Shortcuts (Li et al., NeurIPS 2020).

    Called JointRD by its code. The plain student's prefixes go on through the residual teacher: each cut gives a joint
    path, and the plain student alone is the last one. Stage "joint" is
    ``1/n [m sum_{i<n} CE(z_i) + CE(z_n) + w (m sum_{i<n} d_i + d_n)]`` over n paths, d_i the feature losses
    (:func:`residual_margin_loss`), w = feature_weight, and
    ``m = floor + (1 - floor) (1 + cos(pi epoch / decay_epochs)) / 2`` until decay_epochs, floor after. Only so do the
    teacher's gradients reach the student's prefix. Stage "ta", which the public script runs, is ``CE(z_n) + w d_n``: it
    computes the joint paths and throws them away.
    Shapes: logits a list of (B, C) or one (n, B, C), feature_losses a list of n 0-d tensors or one (n,), labels (B,)
    integers, epoch an int or a 0-d tensor; 0-d. Op: ``cross_entropy``.

    Args:
        feature_weight: w.
        decay_floor: the least m, from 0 to 1.
        decay_epochs: until m is at its floor.
        stage: "joint" or "ta".
    """

    feature_weight: float = setting(1e-3, check.number)
    decay_floor: float = setting(0.5, SHARE)
    decay_epochs: int = setting(60, check.positive)
    stage: str = setting("joint", one_of("joint", "ta"))

    def forward(
        self, logits: Sequence[Tensor], labels: Tensor, feature_losses: Sequence[Tensor], epoch: float | Tensor
    ) -> Tensor:
        *joint, plain = self._paths("logits", logits)
        *joint_features, features = self._paths("feature_losses", feature_losses, dim=0)
        if len(joint_features) != len(joint):
            raise ValueError(
                f"feature_losses must have one for each path, {len(joint) + 1}, got {len(joint_features) + 1}"
            )

        def of_path(logits, features):
            loss = cross_entropy(logits, labels)
            return loss + self.feature_weight * features if self.feature_weight else loss

        loss = of_path(plain, features)
        if self.stage == "ta":
            return loss
        decay = self.decay(epoch, plain.device).to(loss.dtype)
        for path, path_features in zip(joint, joint_features, strict=True):
            loss = loss + torch.where(decay == 0, 0.0, decay * of_path(path, path_features))
        return loss / (len(joint) + 1)

    @staticmethod
    def _paths(name, values, dim=2):
        if not isinstance(values, (list, tuple, torch.Tensor)) or isinstance(values, torch.Tensor) and not values.dim():
            raise TypeError(f"{name} must be a list with one tensor for each path, or these stacked, got {values!r}")
        if not len(values):
            raise ValueError(f"{name} must have at least the plain student's, which comes last, got none")
        for i, x in enumerate(values):
            check.tensor(f"{name}[{i}]", x)
            if x.dim() != dim:
                raise ValueError(f"{name}[{i}] must be {dim}-d, got shape {tuple(x.shape)}")
        return list(values)

    def decay(self, epoch: float | Tensor, device: torch.device | None = None) -> float | Tensor:
        """m of an epoch, as a 0-d tensor on `device`, so that a compiled graph serves every epoch."""
        if not isinstance(epoch, torch.Tensor):
            check.number("epoch", epoch, 0)
            epoch = torch.full((), epoch, device=device)
        elif epoch.dim():
            raise ValueError(f"epoch must be a number or a 0-d tensor, got shape {tuple(epoch.shape)}")
        share = (epoch.to(device, torch.float64) / self.decay_epochs).clamp(0, 1)
        return self.decay_floor + (1 - self.decay_floor) * (1 + torch.cos(math.pi * share)) / 2
