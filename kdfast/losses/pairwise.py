"""Losses on the relations among a batch's rows: distances, angles, ranks. They run on the pairwise kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.losses.base import Loss, made_of_settings, setting
from kdfast.ops import check
from kdfast.ops.accumulate import accumulator, fixed_sum, total, weighted_sum
from kdfast.ops.elementwise import power
from kdfast.ops.pairwise import pairwise_distance, rkd, rkd_angle, rkd_distance
from kdfast.ops.pool import average_pool
from kdfast.ops.saved import save, saved


class RKDDistance(Loss):
    """RKD-D - Relational Knowledge Distillation, the distance-wise loss (Park, Kim, Lu and Cho, CVPR 2019).

    ``1 / B^2 sum_ij h(D_ij / mean D - D'_ij / mean D')``: D the distances among the student's rows, D' the teacher's, h
    the Huber function of threshold 1. Shapes: student (B, D), teacher (B, D') embeddings, more dimensions are
    flattened; 0-d. The gradient goes to the student, also through its mean distance, and stops at the teacher.
    The official code takes distances from scalar products, wrong by 3e-3 in the float32 gradient of rows that are close
    or far from the origin; here they come from differences. One row gives 0 (official: NaN). Op: ``rkd_distance``.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return rkd_distance(student, teacher)


class RKDAngle(Loss):
    """RKD-A - Relational Knowledge Distillation, the angle-wise loss (Park, Kim, Lu and Cho, CVPR 2019).

    ``1 / B^3 sum_ijk h(cos_ijk - cos'_ijk)``: the angle at row i between rows j and k, h the Huber function of
    threshold 1. Shapes: student (B, D), teacher (B, D') embeddings, more dimensions are flattened; 0-d. The gradient
    goes to the student and stops at the teacher. The official code builds tensors of B^2 D and B^3 elements; this takes
    O(B^2) memory at any D. Rows equal in the student alone have no gradient between them (official: about 1e9).
    Op: ``rkd_angle``.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return rkd_angle(student, teacher)


@made_of_settings
class RKD(Loss):
    """RKD - Relational Knowledge Distillation, both terms (Park, Kim, Lu and Cho, CVPR 2019).

    ``distance_weight RKD-D + angle_weight RKD-A`` from one pair of distance matrices; the default weights are
    RepDistiller's (the official scripts take 1 and 2). Shapes: student (B, D), teacher (B, D') embeddings, more
    dimensions are flattened; 0-d. The gradient goes to the student and stops at the teacher. Op: ``rkd``.

    Args:
        distance_weight, angle_weight: of the two terms.
    """

    distance_weight: float = setting(25.0, check.number)
    angle_weight: float = setting(50.0, check.number)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return rkd(student, teacher, self.distance_weight, self.angle_weight)


class _Take(torch.autograd.Function):
    """x [rows, cols] at `count` distinct `columns` of a row; backward without a scatter, whose order is not fixed."""

    @staticmethod
    def forward(ctx, x, columns, count):
        save(ctx, columns)
        ctx.cols, ctx.count = x.shape[1], count
        return x.gather(1, columns)

    @staticmethod
    def backward(ctx, grad):
        (columns,) = saved(ctx)
        every = torch.arange(ctx.cols, device=grad.device)
        x_grad = grad.new_zeros(grad.shape[0], ctx.cols)
        for k in range(ctx.count):
            x_grad = torch.where(every == columns[:, k : k + 1], grad[:, k : k + 1], x_grad)
        return x_grad, None, None


@made_of_settings
class HardDarkRank(Loss):
    """HardDarkRank - DarkRank: Cross Sample Similarities Transfer (Chen, Wang and Zhang, AAAI 2018).

    ``-mean_b sum_i [S_pi(i) - logsumexp_j>=i S_pi(j)]``: minus the log-likelihood, under the student's scores
    ``S = -alpha D^beta``, of the order in which the teacher sees the `permute_len` rows pi(1), pi(2), ... nearest to b.
    Shapes: student (B, D), teacher (B, D') embeddings, more dimensions are flattened; 0-d. The gradient goes to the
    student; the teacher only ranks. Formula and defaults are those of RKD's official code, which leaves the order of
    equally near rows open; here the first comes first. Op: ``pairwise_distance``.

    Args:
        alpha, beta: of the scores S.
        permute_len: how many rows are ranked, from 1 on.
    """

    alpha: float = setting(3.0, check.positive)
    beta: float = setting(3.0, check.positive)
    permute_len: int = setting(4, check.count)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check.two_embeddings(student, teacher)
        rows = student.shape[0]
        # A row comes before all others in its own order, those that equal it too.
        distances = pairwise_distance(teacher.detach(), squared=True)
        each = torch.arange(rows, device=distances.device)
        order = torch.where(each == each[:, None], -1.0, distances).argsort(dim=1, stable=True)
        # As a comparison, so that a compiled graph has a fixed number of steps for every batch that is large enough.
        count = self.permute_len if rows > self.permute_len else max(rows - 1, 0)
        kept = order[:, 1 : count + 1]
        scores = -self.alpha * power(_Take.apply(pairwise_distance(student), kept, count), self.beta)
        likelihood = scores.sum(1)
        for k in range(count):
            likelihood = likelihood - scores[:, k:].logsumexp(1)
        # Distances that are NaN have no order: loss and gradient are NaN.
        likelihood = likelihood * torch.where(distances.isnan().any(1), float("nan"), 1.0)
        return -fixed_sum(likelihood) / max(rows, 1)


def _over_largest(x, constant):
    """Nonnegative x over its largest entry, which is a constant for the gradient or not; 0 where all are 0."""
    if not x.numel():
        return x
    largest = (x.detach() if constant else x).amax()
    return x / torch.where(largest == 0, 1.0, largest)


def _edge_error(student, teacher, constant):
    """Sum over pairs of rows of the squared difference between both networks' normalised squared distances."""
    edges = [_over_largest(pairwise_distance(x, squared=True), constant) for x in (student, teacher)]
    return fixed_sum(fixed_sum((edges[0] - edges[1]).square()))


class _RowDistance(torch.autograd.Function):
    """Squared distance of each row of `a` from the same row of `b` [B], both flattened, in the accumulation type."""

    @staticmethod
    def forward(ctx, a, b):
        save(ctx, a, b)
        dtype = accumulator(a, b)
        return fixed_sum((a.to(dtype) - b.to(dtype)).square().flatten(1))

    @staticmethod
    def backward(ctx, grad):
        check.first_derivative_only("RowDistance")
        a, b = saved(ctx)
        factor = 2 * grad.view(-1, *[1] * (a.dim() - 1))
        a_grad = factor * (a.to(grad.dtype) - b.to(grad.dtype))
        return a_grad.to(a.dtype), (-a_grad).to(b.dtype)


class IRGEdge(Loss):
    """IRG edges - Knowledge Distillation via Instance Relationship Graph (Liu et al., CVPR 2019).

    ``1 / (2 B) sum_ij (E_ij - E'_ij)^2`` with ``E_ij = |x_i - x_j|^2 / max_kl |x_k - x_l|^2`` of the student and E' of
    the teacher. Shapes: student (B, D), teacher (B, D') features, more dimensions are flattened (the paper pools maps
    first); 0-d. The gradient goes to the student and stops at the teacher and at the maximum. The official Caffe layer
    returns half of this gradient, and its release weighs the loss with 0.005. Rows that are all equal have E = 0
    (official: NaN). Op: ``pairwise_distance``.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check.two_embeddings(student, teacher)
        return _edge_error(student, teacher.detach(), constant=True) / (2 * max(student.shape[0], 1))


class IRGTransformation(Loss):
    """IRG transformations - Knowledge Distillation via Instance Relationship Graph (Liu et al., CVPR 2019).

    ``1 / 2 sum_i (v_i - v'_i)^2`` with ``v_i = |late_i - early_i|^2 / max_k |late_k - early_k|^2`` of the student and
    v' of the teacher: how far each sample moves between two layers. A sum, as the official Caffe layer has it, without
    the release's weight 0.005. Shapes: both of the student's features (B, D) or more dimensions, both of the teacher's
    (B, D'); 0-d. The gradient goes to the student's two and stops at the teacher and at the maximum. Plain PyTorch.
    """

    def forward(
        self, student_late: Tensor, student_early: Tensor, teacher_late: Tensor, teacher_early: Tensor
    ) -> Tensor:
        check.embeddings("student_late", student_late)
        check.same_batch("teacher_late", teacher_late, student_late, of="student_late")
        check.same_shape("student_early", student_early, student_late, of="student_late")
        check.same_shape("teacher_early", teacher_early, teacher_late, of="teacher_late")
        moved = _RowDistance.apply(student_late, student_early)
        moved_teacher = _RowDistance.apply(teacher_late.detach(), teacher_early.detach())
        error = _over_largest(moved, constant=True) - _over_largest(moved_teacher, constant=True)
        return fixed_sum(error.square()) / 2


def _movement(early, late):
    """|pooled early - channel-averaged late|^2 per sample [B] of two maps."""
    dtype = accumulator(early, late)
    early, late = early.to(dtype), late.to(dtype)
    if early.shape[1] < late.shape[1]:
        late = late.unflatten(1, (-1, 2)).mean(2)
    if early.shape[2:] != late.shape[2:]:
        early = average_pool(early, *late.shape[2:])
    return _RowDistance.apply(early, late)


@made_of_settings
class IRG(Loss):
    """IRG - Knowledge Distillation via Instance Relationship Graph, vertices and edges (Liu et al., CVPR 2019).

    ``vertex_weight mse(logits) + edge_weight / 3 [mse(E_feature) + mse(E_map1) + mse(E_map2)] + transformation_weight
    mse(v)``: E and v as in :class:`IRGEdge` and :class:`IRGTransformation`, v between map1, average-pooled to map2's
    size, and map2, whose channels are averaged in pairs if it has twice as many. Shapes: student and teacher are lists
    [map1, map2, feature, logits] of (B, C1, H1, W1), (B, C2, H2, W2), (B, D), (B, C); each network has its own sizes,
    both the same C; 0-d. Nothing is detached: gradients flow to both, through the maxima too. This is the formula of
    the widely used PyTorch code (AberHu); the authors' release has no vertices. Op: ``pairwise_distance``.

    Args:
        vertex_weight, edge_weight, transformation_weight: of the three parts.
    """

    vertex_weight: float = setting(0.1, check.number)
    edge_weight: float = setting(5.0, check.number)
    transformation_weight: float = setting(5.0, check.number)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        first = _checked_layers("student", student, None)
        _checked_layers("teacher", teacher, first)
        check.same_shape("teacher[3]", teacher[3], student[3], of="student[3]")
        rows = max(first.shape[0], 1)

        def vertex():
            return fixed_sum(_RowDistance.apply(student[3], teacher[3])) / (rows * student[3].shape[1])

        def edge():
            errors = (_edge_error(s, t, constant=False) for s, t in zip(student[:3], teacher[:3], strict=True))
            return total(errors) / (3 * rows**2)

        def transformation():
            moved = [_over_largest(_movement(*network[:2]), constant=False) for network in (student, teacher)]
            return fixed_sum((moved[0] - moved[1]).square()) / rows

        return weighted_sum(
            student[3],
            (self.vertex_weight, vertex),
            (self.edge_weight, edge),
            (self.transformation_weight, transformation),
        )


def _checked_layers(name, layers, first):
    """`layers` is [map1, map2, feature, logits] of one batch, the one of the tensor `first`; -> that tensor."""
    if not isinstance(layers, (list, tuple)) or len(layers) != 4:
        got = f"{len(layers)} entries" if isinstance(layers, (list, tuple)) else type(layers).__name__
        raise ValueError(f"{name} must be a list [map1, map2, feature, logits], got {got}")
    for index, x in enumerate(layers):
        this = f"{name}[{index}]"
        check.embeddings(this, x)
        if x.dim() != (4 if index < 2 else 2):
            wanted = "(batch, channels, height, width)" if index < 2 else "(batch, features)"
            raise ValueError(f"{this} must be {wanted}, got shape {tuple(x.shape)}")
        first = x if first is None else first
        check.same_batch(this, x, first, of="student[0]")
    early, late = layers[0].shape[1], layers[1].shape[1]
    if late not in (early, 2 * early):
        raise ValueError(f"{name}[1] must have as many channels as {name}[0], {early}, or twice as many, got {late}")
    return first
