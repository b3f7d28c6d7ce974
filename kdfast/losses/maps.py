"""Losses on maps of dense prediction that run on kernels: channels as distributions, and channels standardised."""

from torch import Tensor
from torch.nn import functional as F

from kdfast._types import Tensors
from kdfast.losses.base import Loss, made_of_settings, setting
from kdfast.ops import check
from kdfast.ops.accumulate import total
from kdfast.ops.channel_kl import channel_kl
from kdfast.ops.moments import standardized_error


@made_of_settings
class CWD(Loss):
    """CWD - Channel-wise Knowledge Distillation for Dense Prediction (Shu et al., ICCV 2021).

    ``T^2 / (B C) sum KL(softmax(t / T) || softmax(s / T))``, the softmax of a channel over its H W positions. Shapes:
    student, teacher of one shape (B, C, H, W), or equally long lists, whose losses are added; 0-d, in nats. Maps of
    other widths need a 1x1 convolution of yours. Gradients flow to both; the authors' code detaches the teacher,
    mmrazor's does not. The authors take the logarithm of a softmax, which is -inf from gaps of 103 on in float32; and
    mmrazor's default temperature is 1, with a weight of 5 on logits. One position gives 0.
    Op: ``channel_kl``; contiguous and channels_last maps are read as they lie.
    Usual weight: 3 on logits at the authors' T = 4.

    Args:
        temperature: T, above 0.
    """

    temperature: float = setting(4.0, check.positive)

    def forward(self, student: Tensors, teacher: Tensors) -> Tensor:
        pairs = check.layers(student, teacher, check.maps, check.same_shape)
        return total(channel_kl(s, t, self.temperature) for s, t in pairs)


def _same_height(student, teacher):
    """The student's map in the teacher's height and width, if the heights differ."""
    if student.shape[2] == teacher.shape[2]:
        return student
    return F.interpolate(student, size=teacher.shape[2:], mode="bilinear", align_corners=False)


def _same_channels(name, teacher, student, of="the student"):
    check.same_batch(name, teacher, student, of)
    check.maps(name, teacher)
    if teacher.shape[1] != student.shape[1]:
        raise ValueError(f"{name} must have {of}'s {student.shape[1]} channels, got shape {tuple(teacher.shape)}")
    if teacher.shape[2] == student.shape[2] and teacher.shape[3] != student.shape[3]:
        raise ValueError(
            f"{name} must have {of}'s width {student.shape[3]} where the heights are equal, got shape "
            f"{tuple(teacher.shape)}"
        )


class PKD(Loss):
    """PKD - General Distillation Framework for Object Detectors via Pearson Correlation Coefficient (Cao et al., 2022).

    ``mean (s' - t')^2 / 2``, each channel standardised over batch and positions: x' = (x - mean) / (std + 1e-6), the
    std with n - 1. It is (1 - r) (n - 1) / n averaged over channels, r Pearson's correlation. Shapes: student, teacher
    (B, C, H, W), or equally long lists, whose losses are added; 0-d. Where the heights differ, the student's map is
    resized to the teacher's (bilinear, align_corners=False); its gradient on a GPU has the same bits in every run under
    ``torch.use_deterministic_algorithms(True)`` alone, as all of torch's. Gradients flow to both. Scaling or shifting
    a channel changes nothing. Statistics are those of the process's own batch. A channel of one value is a ValueError.
    Op: ``standardized_error``.
    Usual weight: 6 (mmrazor).
    """

    def forward(self, student: Tensors, teacher: Tensors) -> Tensor:
        pairs = check.layers(student, teacher, check.maps, _same_channels)
        return total(standardized_error(_same_height(s, t), t) for s, t in pairs)
