"""Residual distillation: the paths that lead from a plain student into a residual teacher."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdfast.ops import check
from kdfast.procedures.generations import frozen

__all__ = ["JointPaths", "PathOutputs"]


class PathOutputs(NamedTuple):
    """What the paths of a :class:`JointPaths` say, the plain student alone last."""

    logits: list[Tensor]  # one (B, C) per path
    features: list[Tensor]  # what enters the last stage, one (B, channels, ...) per path


class JointPaths(nn.Module):
    """The networks of JointRD - Residual Distillation: Towards Portable Deep Neural Networks without Shortcuts (Li et
    al., NeurIPS 2020): inputs -> :class:`PathOutputs`.

    ``z_i = teacher[n] .. teacher[c_i + 1] student[c_i] .. student[1] x`` for each cut c_i, and the student alone as the
    last path. Student and teacher are equally long lists of stages, each from the output of the one before, the last
    one the classifier; at each cut their outputs have the same shape. A prefix that several paths share runs once, and
    gets the sum of their gradients, which have come through the teacher's shortcuts::

        paths = JointPaths(plain_stages, residual_stages, cuts=[2, 4, 8])
        logits, features = paths(inputs)
        loss = JointLoss()(logits, labels, [distance(f, target) for f in features], epoch)

    The teacher is frozen, and in evaluation mode whatever ``train()`` says: only the student learns. (The official code
    first trains its teacher on the joint paths, too, in its stage "JOINT".) Deploy ``nn.Sequential(*paths.student)``.
    """

    def __init__(self, student: Sequence[nn.Module], teacher: Sequence[nn.Module], cuts: Sequence[int]) -> None:
        super().__init__()
        if len(student) != len(teacher) or len(student) < 2:
            raise ValueError(
                f"student and teacher must be equally long lists of at least 2 stages, got {len(student)} and "
                f"{len(teacher)}"
            )
        for cut in cuts:
            check.count("cuts", cut)
        self.cuts: list[int] = list(cuts)
        if self.cuts != sorted(set(self.cuts)) or not all(cut < len(student) for cut in self.cuts):
            raise ValueError(
                f"cuts must be rising numbers of stages from 1 to {len(student) - 1} that the student runs before the "
                f"teacher goes on, got {self.cuts}"
            )
        self.student: nn.ModuleList = nn.ModuleList(student)
        self.teacher: nn.ModuleList = nn.ModuleList(frozen(stage) for stage in teacher)

    def train(self, mode: bool = True) -> "JointPaths":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, inputs: Tensor) -> PathOutputs:
        logits, features = [], []
        for number, stage in enumerate(self.student):
            if number in self.cuts:
                self._go_on(self.teacher[number:], inputs, logits, features)
            if number + 1 == len(self.student):
                features.append(inputs)
            inputs = stage(inputs)
        logits.append(inputs)
        return PathOutputs(logits, features)

    @torch.no_grad()
    def targets(self, inputs: Tensor) -> PathOutputs:
        """What the teacher alone says, without gradients: lists of one."""
        outputs = PathOutputs([], [])
        self._go_on(self.teacher, inputs, *outputs)
        return outputs

    @staticmethod
    def _go_on(stages, x, logits, features):
        for stage in stages[:-1]:
            x = stage(x)
        features.append(x)
        logits.append(stages[-1](x))
