"""Losses on attention maps: where a network looks. They run on the attention kernels."""

from torch import Tensor

from kdfast._types import Tensors
from kdfast.losses.base import Loss, made_of_settings, setting
from kdfast.ops import check
from kdfast.ops.accumulate import total
from kdfast.ops.attention import attention_transfer
from kdfast.ops.pool import to_smaller_square


@made_of_settings
class AT(Loss):
    """AT - Paying More Attention to Attention (Zagoruyko and Komodakis, ICLR 2017).

    ``1 / (B N) sum_bn (q_bn - q'_bn)^2`` with ``q = m / |m|_2`` and ``m = mean_c x_c^p`` of a sample, N = H W, q' the
    teacher's; summed over layers. Shapes: student (B, C, H, W), teacher (B, C', H, W) maps or equally long lists of
    them; 0-d. Maps of different heights are average-pooled to a square of the smaller height first. Gradients flow to
    both. The paper's eq. 2 takes the norm of each sample's difference; its code, which this follows, the mean of
    squares. An odd p keeps the sign of x, as RepDistiller's code does. Op: ``attention_transfer``.
    Usual weight: 1000 (torchdistill on ImageNet).

    Args:
        p: power of the activations, a whole number above 0.
    """

    p: int = setting(2, check.count)

    def forward(self, student: Tensors, teacher: Tensors) -> Tensor:
        pairs = check.layers(student, teacher, check.maps)
        return total(attention_transfer(*to_smaller_square(s, t), self.p) for s, t in pairs)
