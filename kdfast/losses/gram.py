"""Losses on inner products: among samples, channels, positions or layers. They run on the gram kernels."""

import math
from functools import partial

import torch
from torch import Tensor

from kdfast._types import Tensors
from kdfast.losses.base import Loss, made_of_settings, one_of, setting
from kdfast.ops import check
from kdfast.ops.accumulate import fixed_sum, total
from kdfast.ops.gram import MOST_TERMS, affinity, gram_distance, inner_products, selectivity
from kdfast.ops.layout import flat_rows
from kdfast.ops.pool import average_pool, to_smaller_square


class SP(Loss):
    """SP - Similarity-Preserving Knowledge Distillation (Tung and Mori, ICCV 2019).

    ``1 / B^2 sum_ij (q_ij - q'_ij)^2`` with ``q_i = G_i / |G_i|``, ``G_ij = x_i . x_j`` among the student's samples, q'
    the teacher's; summed over layers. Shapes: student (B, ...), teacher (B, ...), maps or features of any widths, or
    equally long lists of them; 0-d. Gradients flow to both. Op: ``gram_distance``.
    Usual weight: 3000 (RepDistiller, as the paper).
    """

    def forward(self, student: Tensors, teacher: Tensors) -> Tensor:
        return total(
            gram_distance(flat_rows(s), flat_rows(t)) for s, t in check.layers(student, teacher, check.embeddings)
        )


@made_of_settings
class PKT(Loss):
    """PKT - Learning Deep Representations with Probabilistic Knowledge Transfer (Passalis and Tefas, ECCV 2018).

    ``1 / B^2 sum_ij p'_ij log((p'_ij + eps) / (p_ij + eps))`` with ``p_ij = (1 + c_ij) / sum_k (1 + c_ik)``, c the
    cosines among the student's samples, the diagonal too, p' the teacher's. Shapes: student (B, D), teacher (B, D')
    embeddings, more dimensions are flattened; 0-d. Gradients flow to both; a row that is 0 gets none (official: NaN).
    The mean over B^2 is the official code's, for a weight of 30000. Op: ``gram_distance``.

    Args:
        eps: keeps the logarithm finite.
    """

    eps: float = setting(1e-7, check.positive)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check.two_embeddings(student, teacher)
        return gram_distance(flat_rows(student), flat_rows(teacher), "distribution", eps=self.eps)


@made_of_settings
class CCKD(Loss):
    """CCKD - Correlation Congruence for Knowledge Distillation (Peng et al., ICCV 2019).

    ``1 / B^2 sum_ij (K(c_ij) - K(c'_ij))^2``, c the cosines among the student's samples, c' the teacher's. Gaussian:
    the Taylor series of exp(-gamma |u_i - u_j|^2), ``K(c) = exp(-2 gamma) sum_p<=order (2 gamma)^p / p! c^p``;
    bilinear: ``K(c) = c``. Shapes: student (B, D), teacher (B, D') embeddings, more dimensions are flattened; 0-d.
    Gradients flow to both. RepDistiller's loss of this name is another formula, which the order of the batch changes;
    torchdistill normalises no rows and takes the root. Op: ``gram_distance``.

    Args:
        kernel: "gaussian" or "bilinear".
        gamma: of the Gaussian.
        order: the highest power of the series, from 0 on.
    """

    kernel: str = setting("gaussian", one_of("gaussian", "bilinear"))
    gamma: float = setting(0.4, check.number)
    order: int = setting(2, partial(check.count, least=0, most=MOST_TERMS - 1))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check.two_embeddings(student, teacher)
        g = 2 * self.gamma
        series = [math.exp(-g) * g**p / math.factorial(p) for p in range(self.order + 1)]
        coefficients = series if self.kernel == "gaussian" else [0.0, 1.0]
        return gram_distance(flat_rows(student), flat_rows(teacher), "polynomial", coefficients=coefficients)


@made_of_settings
class FAKD(Loss):
    """FAKD - Feature-Affinity Based Knowledge Distillation for Super-Resolution (He et al., ICIP 2020).

    The mean of ``|s_ij - s'_ij|``, s' the teacher's. Spatial: ``s_ij = u_i . u_j``, u the positions of each map over
    their norm across channels (plus 1e-8), without a matrix of positions; channel: the same of each map's channels;
    instance: ``s_i = G_i / |G_i|``, ``G_ij = x_i . x_j`` among the batch's samples. Summed over layers. Shapes: student
    (B, C, H, W), teacher (B, C', H, W) maps, or equally long lists; channel needs C = C', instance compares any sizes;
    0-d. Gradients flow to both; a vector that is 0 gets none (official: NaN). Ops: ``affinity``, ``gram_distance``.

    Args:
        affinity: "spatial", "channel" or "instance".
    """

    affinity: str = setting("spatial", one_of("spatial", "channel", "instance"))

    def forward(self, student: Tensors, teacher: Tensors) -> Tensor:
        of_layer = {"spatial": affinity, "channel": self.channel, "instance": self.instance}[self.affinity]
        return total(of_layer(s, t) for s, t in check.layers(student, teacher, check.maps))

    @staticmethod
    def channel(student: Tensor, teacher: Tensor) -> Tensor:
        if teacher.shape[1] != student.shape[1]:
            raise ValueError(f"teacher must have the student's {student.shape[1]} channels, got {teacher.shape[1]}")
        return gram_distance(student.flatten(2), teacher.flatten(2), "absolute", eps=1e-8)

    @staticmethod
    def instance(student: Tensor, teacher: Tensor) -> Tensor:
        return gram_distance(flat_rows(student), flat_rows(teacher), "rows_absolute")


@made_of_settings
class GramAnchoring(Loss):
    """Gram anchoring - DINOv3 (Siméoni et al., 2025).

    The mean of ``(max(c_ij, 0) - max(c'_ij, 0))^2`` over images and pairs of positions: c the cosines between the
    positions (patches) of the student's map, c' of the teacher's, an earlier state of the student in the paper.
    Without `positive` the cosines are taken as they are. Nothing of size positions^2 is stored. Shapes: student
    (B, C, H, W), teacher (B, C', H, W), or equally long lists, whose losses are added; tokens by
    :class:`kdfast.objectives.AsMaps`; 0-d. Gradients flow to both; a position that is 0 gets none.
    The official code has negatives clamped by default, too, and an option for the teacher's alone, which is not here.
    Op: ``affinity``.

    Args:
        positive: whether negative cosines count as 0.
    """

    positive: bool = setting(True)

    def forward(self, student: Tensors, teacher: Tensors) -> Tensor:
        kind = "positive" if self.positive else "squared"
        pairs = check.layers(student, teacher, check.maps)
        return total(affinity(s, t, kind=kind, eps=0.0) for s, t in pairs)


class FSP(Loss):
    """FSP - A Gift from Knowledge Distillation: the flow of the solution procedure (Yim, Joo, Bae and Kim, CVPR 2017).

    The mean of ``(G_bij - G'_bij)^2`` with ``G_bij = 1 / N sum_n top_bin bottom_bjn`` between a layer (bottom) and the
    next (top), G' the teacher's; summed over consecutive layers. Shapes: student and teacher are equally long lists of
    at least two maps (B, C, H, W) with the same channels in both networks; 0-d. Of two layers of unlike heights, the
    larger is average-pooled to a square of the smaller height, as RepDistiller does it; torchdistill pools maxima and
    takes norms of columns. Gradients flow to both. Op: ``inner_products``.
    """

    def forward(self, student: Tensors, teacher: Tensors) -> Tensor:
        for name, x in (("student", student), ("teacher", teacher)):
            if not isinstance(x, (list, tuple)) or len(x) < 2:
                got = f"{len(x)}" if isinstance(x, (list, tuple)) else type(x).__name__
                raise ValueError(f"{name} must be a list of at least two maps, got {got}")
        pairs = check.layers(student, teacher, check.maps)
        for index, (s, t) in enumerate(pairs):
            check.same_batch(f"student[{index}]", s, student[0], of="student[0]")
            if s.shape[1] != t.shape[1]:
                raise ValueError(
                    f"teacher[{index}] must have the {s.shape[1]} channels of student[{index}], got {t.shape[1]}"
                )
        loss = 0
        for bottom, top in zip(pairs, pairs[1:], strict=False):
            gap = torch.sub(*(self.flow(*layers) for layers in zip(bottom, top, strict=True)))
            loss = loss + fixed_sum(fixed_sum(fixed_sum(gap.square()))) / max(gap.numel(), 1)
        return loss

    @staticmethod
    def flow(bottom: Tensor, top: Tensor) -> Tensor:
        """Inner products of the channels of two layers over their positions [B, C_top, C_bottom], averaged."""
        bottom, top = to_smaller_square(bottom, top)
        return inner_products(top.flatten(2), bottom.flatten(2)) / (top.shape[2] * top.shape[3])


class NST(Loss):
    """NST - Like What You Like: Knowledge Distill via Neuron Selectivity Transfer (Huang and Wang, 2017).

    ``mean k(t, t) + mean k(s, s) - 2 mean k(s, t)``, ``k(a, b) = (a . b)^2``, over the channels s and t of a sample,
    each a unit vector of N = H W positions: that is ``|S^T S / C - T^T T / C'|^2``, here from matrices of positions or
    of channels, whichever are smaller, never of both; mean over the batch, summed over layers. Shapes: student
    (B, C, H, W), teacher (B, C', H, W) maps or equally long lists; 0-d. Maps of different heights are average-pooled to
    a square of the smaller height. The gradient reaches the teacher through k(s, t) alone, as in RepDistiller's code; a
    channel that is 0 gets none. Op: ``selectivity``.
    Usual weight: 50 (RepDistiller).
    """

    def forward(self, student: Tensors, teacher: Tensors) -> Tensor:
        pairs = check.layers(student, teacher, check.maps)
        return total(selectivity(*(x.flatten(2) for x in to_smaller_square(s, t))) for s, t in pairs)


def _patch_vectors(x, patches):
    """Maps (B, C, H, W) cut into `patches` x `patches`: (B, patches^2, features)."""
    height, width = (size // patches * patches for size in x.shape[2:])
    x = average_pool(x, height, width)
    x = x.unflatten(3, (patches, width // patches)).unflatten(2, (patches, height // patches))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


@made_of_settings
class LKD(Loss):
    """LKD - Local Correlation Consistency for Knowledge Distillation, its relations (Li et al., ECCV 2020).

    With c the cosines among all patches of a batch, ``patches`` x ``patches`` to a map and each flattened with its
    channels, c' the teacher's: ``intra_weight mean (c - c')^2`` over pairs of patches of one sample, plus
    ``inter_weight`` times the mean over pairs at one place in two samples (or the same), plus ``cross_weight`` times
    the mean over pairs at two places in two samples. Summed over layers. Shapes: student (B, C, H, W), teacher
    (B, C', H', W') maps or equally long lists; 0-d. Gradients flow to both.
    No code of the authors is public, so this is a choice: cosines, means of squares and equal weights; a map whose
    height or width is no multiple of ``patches`` is average-pooled to the next smaller multiple; the paper's
    class-aware attention is left to the caller, who multiplies the maps with it. Op: ``gram_distance``.

    Args:
        patches: along a side of the map.
        intra_weight, inter_weight, cross_weight: of the three means.
    """

    patches: int = setting(4, check.count)
    intra_weight: float = setting(1.0, check.number)
    inter_weight: float = setting(1.0, check.number)
    cross_weight: float = setting(1.0, check.number)

    def forward(self, student: Tensors, teacher: Tensors) -> Tensor:
        return total(self.of_layer(s, t) for s, t in check.layers(student, teacher, self.check_maps))

    def check_maps(self, name: str, x: Tensor) -> None:
        check.maps(name, x)
        if min(x.shape[2:]) < self.patches:
            raise ValueError(f"{name} must be at least {self.patches} positions high and wide, got {tuple(x.shape)}")

    def of_layer(self, student: Tensor, teacher: Tensor) -> Tensor:
        pair = [_patch_vectors(x, self.patches) for x in (student, teacher)]
        batch, places = pair[0].shape[:2]

        def error(vectors):
            return gram_distance(*vectors, "polynomial", coefficients=[0.0, 1.0])

        intra, inter = error(pair), error([x.transpose(0, 1) for x in pair])
        loss = self.intra_weight * intra + self.inter_weight * inter
        others = batch * (batch - 1) * places * (places - 1)
        if self.cross_weight and others:
            # Sums over all pairs, less those of the other two terms; a patch with itself adds 0 to each.
            every = (batch * places) ** 2 * error([x.flatten(0, 1) for x in pair])
            rest = every - batch * places**2 * intra - places * batch**2 * inter
            loss = loss + self.cross_weight / others * rest
        return loss
