"""Losses with a network between student and teacher: fused stages, and the teacher's classifier reused."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.losses.base import Loss, in_own_type
from kdfast.losses.feature import HCL
from kdfast.ops import check
from kdfast.ops.elementwise import sigmoid
from kdfast.ops.feature import squared_error
from kdfast.ops.pool import average_pool


def _unit_of(channels, out, kernel):
    """Convolution and batch norm."""
    return nn.Sequential(nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(out))


class _Fusion(nn.Module):
    """A stage: the student's map in `mid` channels, mixed with what came from the deeper stage, then the teacher's."""

    def __init__(self, channels, mid, teacher_channels, deepest):
        super().__init__()
        self.conv1 = _unit_of(channels, mid, 1)
        self.conv2 = _unit_of(mid, teacher_channels, 3)
        for conv in (self.conv1[0], self.conv2[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        self.att_conv = None if deepest else nn.Sequential(nn.Conv2d(2 * mid, 2, 1))

    def forward(self, x, deeper, size):
        """-> what the teacher's map is compared with, and what the next stage gets."""
        x = in_own_type(self.conv1, x)
        if self.att_conv is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            own, other = sigmoid(in_own_type(self.att_conv, torch.cat([x, deeper], 1))).to(x.dtype).split(1, 1)
            x = x * own + deeper * other
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="nearest")
        return in_own_type(self.conv2, x), x


class ReviewKD(Loss):
    """ReviewKD - Distilling Knowledge via Knowledge Review (Chen et al., CVPR 2021).

    :class:`HCL` between the teacher's maps and the student's, fused from the deepest stage to the first: a 1x1
    convolution to `mid_channels`, mixed with the deeper stage by an attention map of each, brought to the teacher's
    size (nearest), and a 3x3 convolution to its channels; batch norm behind both, trained with the student, and in the
    type of their weights, whatever autocast says. Shapes: student, teacher lists of maps, shallow first, the student's
    with `student_channels`, the teacher's with `teacher_channels`; sizes come from the maps. 0-d. Gradients flow to
    both.

    Args:
        student_channels, teacher_channels: of each stage, shallow first.
        mid_channels: None for min(512, the deepest of the student's). 512 or 256 on ImageNet, 256 in detection.

    Teacher's maps are those before the activation, and the pooled vector as a 1 x 1 map is the deepest stage. The
    official CIFAR code takes squares alone, its detection code never resizes for the teacher: both are here. The
    warm-up min(epoch / 20, 1) is yours. One image and 1 x 1 maps are refused by batch norm in training. The layers have
    the official names. Op: ``pyramid_error``.
    """

    def __init__(
        self, student_channels: Sequence[int], teacher_channels: Sequence[int], mid_channels: int | None = None
    ) -> None:
        super().__init__()
        if len(student_channels) != len(teacher_channels) or not len(student_channels):
            raise ValueError(
                "student_channels and teacher_channels must have one entry for each stage, and at least one, got "
                f"{len(student_channels)} and {len(teacher_channels)}"
            )
        for name, channels in (("student_channels", student_channels), ("teacher_channels", teacher_channels)):
            for i, n in enumerate(channels):
                check.count(f"{name}[{i}]", n)
        mid = min(512, student_channels[-1]) if mid_channels is None else mid_channels
        check.count("mid_channels", mid)
        self.student_channels: list[int] = list(student_channels)
        self.teacher_channels: list[int] = list(teacher_channels)
        self.mid_channels: int = mid
        stages = list(zip(student_channels, teacher_channels, strict=True))[::-1]
        self.abfs: nn.ModuleList = nn.ModuleList(_Fusion(s, mid, t, i == 0) for i, (s, t) in enumerate(stages))
        self.hcl: HCL = HCL()

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        pairs = check.layers(student, teacher, check.maps)
        if len(pairs) != len(self.abfs):
            raise ValueError(f"student must be a list of {len(self.abfs)} maps, got {len(pairs)}")
        for i, pair in enumerate(pairs):
            for name, x in zip(("student", "teacher"), pair, strict=True):
                want = getattr(self, f"{name}_channels")[i]
                if x.shape[1] != want:
                    raise ValueError(f"{name}[{i}] must have {want} channels, got shape {tuple(x.shape)}")
        fused, deeper = [], None
        for fusion, (s, t) in zip(self.abfs, reversed(pairs), strict=True):
            out, deeper = fusion(s, deeper, t.shape[2:])
            fused.insert(0, out)
        return self.hcl(fused, [t for _, t in pairs])


class SimKD(Loss):
    """SimKD - Knowledge Distillation with the Reused Teacher Classifier (Chen et al., CVPR 2022).

    The mean squared difference of the teacher's last map and the student's behind `transfer`: a 1x1, a 3x3 and a 1x1
    convolution, with teacher_channels / `factor` inside, each with batch norm and ReLU, trained with the student, in
    the type of their weights. Of two heights the higher map is average-pooled to a square of the lower; equal heights
    are left alone. Shapes: student (B, student_channels, H, W), teacher (B, teacher_channels, H', W'), the last maps
    before pooling, after the ReLU; 0-d. Gradients flow to both.

    The student's own classifier is not trained: predict with the teacher's, on the average of ``project(student)``.
    Official: cross-entropy and KL have weight 0, this loss 1; squares alone. A call of `project` in training mode moves
    the batch norms' statistics once more.
    Op: ``squared_error``.

    Args:
        student_channels, teacher_channels: of the last maps.
        factor: how many times fewer channels there are inside.
    """

    def __init__(self, student_channels: int, teacher_channels: int, factor: int = 2) -> None:
        super().__init__()
        check.count("student_channels", student_channels)
        check.count("teacher_channels", teacher_channels)
        check.count("factor", factor, most=teacher_channels)
        self.student_channels: int = student_channels
        self.teacher_channels: int = teacher_channels
        self.factor: int = factor
        inner = teacher_channels // factor
        self.transfer: nn.Sequential = nn.Sequential(
            *(*_unit_of(student_channels, inner, 1), nn.ReLU()),
            *(*_unit_of(inner, inner, 3), nn.ReLU()),
            *(*_unit_of(inner, teacher_channels, 1), nn.ReLU()),
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        self._check("student", student)
        self._check("teacher", teacher)
        check.same_batch("teacher", teacher, student)
        height, size = student.shape[2], teacher.shape[2]
        if height < size:
            teacher = average_pool(teacher, height, height)
        width = size if height > size else student.shape[3]
        if teacher.shape[3] != width:  # before the layers, whose statistics move
            raise ValueError(f"teacher must have the student's width {width}, got {tuple(teacher.shape)}")
        return squared_error(self.project(student, teacher.shape[2]), teacher)

    def project(self, student: Tensor, size: int | None = None) -> Tensor:
        """The map for the teacher's classifier, (B, teacher_channels, H, W), pooled to size x size if it is higher."""
        self._check("student", student)
        if size is not None:
            check.count("size", size)
        if size is not None and student.shape[2] > size:
            student = average_pool(student, size, size).to(student.dtype)
        return in_own_type(self.transfer, student)

    def _check(self, name, x):
        check.maps(name, x)
        channels = getattr(self, f"{name}_channels")
        if x.shape[1] != channels:
            raise ValueError(f"{name} must have {name}_channels={channels} channels, got shape {tuple(x.shape)}")
