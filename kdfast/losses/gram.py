"""Losses on inner products: among samples, channels, positions or layers. They run on the gram kernels."""

import math

import torch
from torch import nn

from kdfast.ops import check
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.gram import affinity, gram_distance, inner_products
from kdfast.ops.pairwise import _flat
from kdfast.ops.pool import to_smaller_square


class SP(nn.Module):
    """SP - Similarity-Preserving Knowledge Distillation (Tung and Mori, ICCV 2019).

    ``1 / B^2 sum_ij (q_ij - q'_ij)^2`` with ``q_i = G_i / |G_i|``, ``G_ij = x_i . x_j`` among the student's samples, q'
    the teacher's; summed over layers. Shapes: student (B, ...), teacher (B, ...), maps or features of any widths, or
    equally long lists of them; 0-d. Gradients flow to both. Op: ``gram_distance``.
    """

    def forward(self, student, teacher):
        return sum(gram_distance(_flat(s), _flat(t)) for s, t in check.layers(student, teacher, check.embeddings))


class PKT(nn.Module):
    """PKT - Learning Deep Representations with Probabilistic Knowledge Transfer (Passalis and Tefas, ECCV 2018).

    ``1 / B^2 sum_ij p'_ij log((p'_ij + eps) / (p_ij + eps))`` with ``p_ij = (1 + c_ij) / sum_k (1 + c_ik)``, c the
    cosines among the student's samples, the diagonal too, p' the teacher's. Shapes: student (B, D), teacher (B, D')
    embeddings, more dimensions are flattened; 0-d. Gradients flow to both; a row that is 0 gets none (official: NaN).
    The mean over B^2 is the official code's, for a weight of 30000. Op: ``gram_distance``.
    """

    def __init__(self, eps=1e-7):
        super().__init__()
        check.positive("eps", eps)
        self.eps = eps

    def forward(self, student, teacher):
        check.embeddings("student", student)
        check.same_batch("teacher", teacher, student)
        return gram_distance(_flat(student), _flat(teacher), "distribution", eps=self.eps)

    def extra_repr(self):
        return f"eps={self.eps}"


class CCKD(nn.Module):
    """CCKD - Correlation Congruence for Knowledge Distillation (Peng et al., ICCV 2019).

    ``1 / B^2 sum_ij (K(c_ij) - K(c'_ij))^2``, c the cosines among the student's samples, c' the teacher's. Gaussian: the
    Taylor series of exp(-gamma |u_i - u_j|^2), ``K(c) = exp(-2 gamma) sum_p<=order (2 gamma)^p / p! c^p``; bilinear:
    ``K(c) = c``. Shapes: student (B, D), teacher (B, D') embeddings, more dimensions are flattened; 0-d. Gradients flow
    to both. RepDistiller's loss of this name is another formula, which depends on the order of the batch; torchdistill
    normalises no rows and takes the root. Op: ``gram_distance``.
    """

    def __init__(self, kernel="gaussian", gamma=0.4, order=2):
        super().__init__()
        if kernel not in ("gaussian", "bilinear"):
            raise ValueError(f"kernel must be 'gaussian' or 'bilinear', got {kernel!r}")
        check.number("gamma", gamma)
        check.count("order", order)
        self.kernel = kernel
        self.gamma = gamma
        self.order = order

    def forward(self, student, teacher):
        check.embeddings("student", student)
        check.same_batch("teacher", teacher, student)
        g = 2 * self.gamma
        series = [math.exp(-g) * g**p / math.factorial(p) for p in range(self.order + 1)]
        coefficients = series if self.kernel == "gaussian" else [0.0, 1.0]
        return gram_distance(_flat(student), _flat(teacher), "polynomial", coefficients=coefficients)

    def extra_repr(self):
        return f"kernel={self.kernel!r}, gamma={self.gamma}, order={self.order}"


class FAKD(nn.Module):
    """FAKD - Feature-Affinity Based Knowledge Distillation for Super-Resolution (He et al., ICIP 2020).

    The mean of ``|s_ij - s'_ij|``, s' the teacher's. Spatial: ``s_ij = u_i . u_j``, u the positions of each map over their
    norm across channels (plus 1e-8), without a matrix of positions; channel: the same of the channels of each map;
    instance: ``s_i = G_i / |G_i|``, ``G_ij = x_i . x_j`` among the batch's samples. Summed over layers. Shapes: student (B, C, H, W), teacher (B, C', H, W) maps, or
    equally long lists; channel needs C = C', instance compares any sizes; 0-d. Gradients flow to both; a vector that is
    0 gets none (official: NaN). Ops: ``affinity``, ``gram_distance``.
    """

    def __init__(self, affinity="spatial"):
        super().__init__()
        if affinity not in ("spatial", "channel", "instance"):
            raise ValueError(f"affinity must be 'spatial', 'channel' or 'instance', got {affinity!r}")
        self.affinity = affinity

    def forward(self, student, teacher):
        of_layer = {"spatial": affinity, "channel": self.channel, "instance": self.instance}[self.affinity]
        return sum(of_layer(s, t) for s, t in check.layers(student, teacher, check.maps))

    @staticmethod
    def channel(student, teacher):
        if teacher.shape[1] != student.shape[1]:
            raise ValueError(f"teacher must have the student's {student.shape[1]} channels, got {teacher.shape[1]}")
        return gram_distance(student.flatten(2), teacher.flatten(2), "absolute", eps=1e-8)

    @staticmethod
    def instance(student, teacher):
        return gram_distance(_flat(student), _flat(teacher), "rows_absolute")

    def extra_repr(self):
        return f"affinity={self.affinity!r}"
