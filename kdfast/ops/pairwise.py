"""Rows of embeddings compared by the distances and angles among them: RKD and its relatives.

With p_ij = |x_i - x_j|^2, h the Huber function of threshold 1, and a dash for the teacher's:

    pairwise_distance     sqrt(p), or p, also between two sets of rows
    rkd                   1/B^2 sum_ij  h(d_ij - d'_ij),      d = sqrt(p) over its mean off the diagonal
                          1/B^3 sum_ijk h(cos_ijk - cos'_ijk), the angle at i between j and k
    weighted_differences  sum_j w_ij (x_i - y_j), the gradient of every function of distances

p comes from the differences themselves, never from scalar products, which cancel for close rows far from the origin.
The law of cosines, cos_ijk = (p_ij + p_ik - p_jk) / (2 sqrt(p_ij p_ik)), needs p in float64 (or two float32 numbers)
instead, and no sum over features for each triple. Equal rows have distance 0 and no direction: cos = 0, gradient 0.
"""

import torch
from torch import Tensor

from kdfast._kernels import op
from kdfast.ops import check, shapes
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.differentiable import gradient_formed
from kdfast.ops.layout import flat_rows
from kdfast.ops.saved import save, saved

__all__ = ["pairwise_distance", "rkd", "rkd_angle", "rkd_distance"]

BLOCK = 2**18  # elements of a temporary; a number fixed by shapes alone keeps results independent of the machine
CLOSE = 1e-6  # a squared distance of less than this share of the rows' squares is summed from differences
SMALLEST_SQUARE = 1e-12  # squared distances of RKD's distance term are clamped from below, off the diagonal


# ---- plain PyTorch: the readable definition --------------------------------------------------------------------------
def _blocks(rows, size):
    """Slices of `rows` indices, so many that `size` elements for each make one temporary."""
    step = max(1, BLOCK // max(1, size))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def squared_distances(x: Tensor, y: Tensor, dtype: torch.dtype, accumulation: torch.dtype) -> Tensor:
    """|x_i - y_j|^2 [n, m] in `dtype`; symmetric with a zero diagonal for x = y."""
    if x.device.type == "cpu" and accumulation == torch.float32 and x.shape[0] and y.shape[0]:
        return _guarded_distances(x, y).to(dtype)
    x, y = x.to(dtype), y.to(dtype)
    out = x.new_empty((x.shape[0], y.shape[0]))
    for rows in _blocks(x.shape[0], y.numel()):
        out[rows] = fixed_sum((x[rows, None] - y).square())
    return out


def _guarded_distances(x, y):
    """The same in float64 from products of less precise rows, and from differences where a product would cancel."""
    same, origin = x is y, x[:1].double()
    x = x.double() - origin  # exact, and a common offset is gone
    y = x if same else y.double() - origin
    squares, others = (x * x).sum(1), (y * y).sum(1)
    scale = squares[:, None] + others
    out = scale - 2 * (x @ y.t())
    # Not one comparison the other way round: NaN and inf are close.
    close = ~(out > CLOSE * scale).logical_and(scale < torch.finfo(torch.float64).max)
    rows, columns = close.nonzero(as_tuple=True)
    for part in _blocks(len(rows), x.shape[1]):
        out[rows[part], columns[part]] = (x[rows[part]] - y[columns[part]]).square().sum(1)
    return out


@op("pairwise", lambda x, y, **_: shapes.sums((x.shape[0], (x if y is None else y).shape[0]), x, y))
def _pairwise_distance(x: Tensor, y: Tensor | None, squared: bool) -> Tensor:
    """-> distances, or their squares, [n, m]."""
    p = squared_distances(x, x if y is None else y, *[accumulator(x, y)] * 2)
    return p if squared else p.sqrt()


@op("pairwise", lambda x, **_: shapes.gradient(x))
def _weighted_differences(weights: Tensor, x: Tensor, y: Tensor | None, factor: Tensor | None) -> Tensor:
    """-> factor sum_j weights_ij (x_i - y_j) [n, D], in the dtype of x."""
    if x.device.type == "cpu" and weights.dtype == torch.float32 and weights.numel():
        out = _from_products(weights, x, y)
    else:
        a = x.to(weights.dtype)
        b = a if y is None else y.to(weights.dtype)
        out = torch.empty_like(a, memory_format=torch.contiguous_format)
        for rows in _blocks(a.shape[0], b.numel()):
            out[rows] = (weights[rows, :, None] * (a[rows, None] - b)).sum(1)
    return (out if factor is None else out * factor).to(x.dtype)


def _from_products(weights, x, y):
    """sum_j weights_ij x_i - sum_j weights_ij y_j in float64, both without a common offset."""
    weights, origin = weights.double(), x[:1].double()
    a = x.contiguous().double() - origin
    b = a if y is None else y.double() - origin
    return (weights.sum(1, keepdim=True) * a).addmm_(weights, b, alpha=-1)


def huber(x: Tensor) -> tuple[Tensor, Tensor]:
    """-> h(x) = x^2 / 2 where |x| < 1, |x| - 1/2 elsewhere, and its slope."""
    slope = x.clamp(-1, 1)
    return slope * (x - slope / 2), slope


def distance_term(p_student: Tensor, p_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """-> sum_ij h(d_ij - d'_ij), and its derivative in p_student [B, B]."""
    rows = p_student.shape[0]
    pairs = rows * (rows - 1)

    def over_mean(p):
        distance = p.clamp(min=SMALLEST_SQUARE).sqrt().fill_diagonal_(0)
        mean = fixed_sum(fixed_sum(distance)) / pairs
        return distance, mean, distance / mean

    distance, mean, ratio = over_mean(p_student)
    losses, slope = huber(ratio - over_mean(p_teacher)[2])
    # The mean of the student's distances is differentiated: a common factor of all of them changes nothing.
    slope = (slope - fixed_sum(fixed_sum(slope * ratio)) / pairs) / mean
    return fixed_sum(fixed_sum(losses)), torch.where(p_student > SMALLEST_SQUARE, slope / (2 * distance), 0.0)


def cosines(p: Tensor, inverse: Tensor, rows: slice) -> Tensor:
    """cos_ijk [rows, B, B] of the vertices i in `rows`; `inverse` is 1 / sqrt(p), 0 where p = 0."""
    p_ij, p_ik = p[rows, :, None], p[rows, None, :]
    # The larger side first: close to equal sides leave an exact difference.
    numerator = (torch.maximum(p_ij, p_ik) - p) + torch.minimum(p_ij, p_ik)
    cos = numerator * inverse[rows, :, None] * inverse[rows, None, :] / 2
    cos.diagonal(dim1=1, dim2=2).copy_(p[rows] > 0)  # j = k: 1 without rounding, and thereby without slope
    return cos


def angle_term(p_student: Tensor, p_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """-> sum_ijk h(cos_ijk - cos'_ijk), and its derivative in p_student [B, B]; a few vertices at a time."""
    inverse, inverse_teacher = (torch.where(p == 0, 0.0, p.rsqrt()) for p in (p_student, p_teacher))
    total, grad = p_student.new_zeros(()), torch.zeros_like(p_student)
    for rows in _blocks(p_student.shape[0], p_student.numel()):
        cos = cosines(p_student, inverse, rows)
        losses, slope = huber(cos - cosines(p_teacher, inverse_teacher, rows))
        total = total + fixed_sum(fixed_sum(fixed_sum(losses)))
        # p_jk is the side that lies opposite; p_ij and p_ik, each the other's twin, are the sides at the vertex.
        side = inverse[rows]
        grad -= (slope * side[:, :, None] * side[:, None, :]).sum(0) / 2
        grad[rows] += side * (fixed_sum(slope * side[:, None, :]) - side * fixed_sum(slope * cos))
    return total, grad


def _loss_and_weights(student, teacher, need_student, **_):
    shape = (student.shape[0], student.shape[0]) if need_student else 0
    return shapes.sums((), student, teacher), shapes.sums(shape, student, teacher)


@op("pairwise", _loss_and_weights)
def _rkd(
    student: Tensor, teacher: Tensor, distance_weight: float, angle_weight: float, need_student: bool
) -> tuple[Tensor, Tensor]:
    """-> loss; weights [B, B] with d loss / d student_i = sum_j weights_ij (student_i - student_j)."""
    dtype, rows = accumulator(student, teacher), student.shape[0]
    p_student, p_teacher = (squared_distances(x, x, torch.float64, dtype) for x in (student, teacher))
    loss, grad = p_student.new_zeros(()), torch.zeros_like(p_student)
    terms = ((distance_term, distance_weight, rows**2), (angle_term, angle_weight, rows**3))
    for term, weight, divisor in terms if rows > 1 else ():
        if weight:
            value, slope = term(p_student, p_teacher)
            loss = loss + weight / divisor * value
            grad += weight / divisor * slope
    # p_ij and p_ji are the same number, whose derivative in x_i is 2 (x_i - x_j).
    weights = (2 * (grad + grad.t())).to(dtype) if need_student else student.new_empty(0, dtype=dtype)
    return loss.to(dtype), weights


# ---- differentiable functions ----------------------------------------------------------------------------------------
# Written out: through `differentiable.py` a small call would take 5 % longer.
class _PairwiseDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, squared):
        distance = _pairwise_distance(x, y, squared)
        save(ctx, x, y, None if squared else distance)
        return distance

    @staticmethod
    def backward(ctx, grad):
        check.first_derivative_only("pairwise_distance")
        x, y, distance = saved(ctx)
        weights = 2 * grad if distance is None else torch.where(distance == 0, 0.0, grad / distance)
        if y is None:
            return _weighted_differences(weights + weights.t(), x, None, None), None, None
        need_x, need_y = ctx.needs_input_grad[:2]
        x_grad = _weighted_differences(weights, x, y, None) if need_x else None
        return x_grad, _weighted_differences(weights.t(), y, x, None) if need_y else None, None


_rkd_function = gradient_formed(
    _rkd, lambda grad, weights, x, *_: _weighted_differences(weights, x, None, grad), "rkd", sides=1
)


# ---- public functions ------------------------------------------------------------------------------------------------
def pairwise_distance(x: Tensor, y: Tensor | None = None, *, squared: bool = False) -> Tensor:
    """Euclidean distances |x_i - y_j| (``squared=True``: their squares), of `x` with itself if `y` is absent.

    Args:
        x, y: embeddings (n, D) and (m, D), float32, float64, float16 or bfloat16, any strides; dtypes may differ. More
            dimensions are flattened.

    Returns: (n, m) in the accumulation type: float64 if an input is float64, else float32. Exactly 0 for equal rows.

    Gradients flow to x and y, and are 0 between equal rows; there is no second derivative (RuntimeError).

    Raises: TypeError, ValueError naming the argument.
    """
    check.embeddings("x", x)
    if y is not None:
        check.embeddings("y", y)
        if y.shape[1:] != x.shape[1:]:
            row = ", ".join(map(str, x.shape[1:]))
            raise ValueError(f"y must have rows like those of x, shape (m, {row}), got {tuple(y.shape)}")
        check.same_device("y", y, x, of="x")
    return _PairwiseDistance.apply(flat_rows(x), None if y is None else flat_rows(y, x), bool(squared))


def rkd(student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """``distance_weight * rkd_distance + angle_weight * rkd_angle`` over one pair of distance matrices.

    A term of weight 0 is not computed. Shapes, gradients and errors are those of :func:`rkd_distance`.
    """
    check.two_embeddings(student, teacher)
    check.number("distance_weight", distance_weight)
    check.number("angle_weight", angle_weight)
    return _rkd_function((float(distance_weight), float(angle_weight)), flat_rows(student), flat_rows(teacher.detach()))


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """``1 / B^2 sum_ij h(D_ij / mean D - D'_ij / mean D')``, h the Huber function of threshold 1, D' the teacher's.

    D are the distances among a batch's rows, at least 1e-6 off the diagonal, and the means leave the diagonal out.

    Args:
        student, teacher: embeddings (B, D) and (B, D'), float32, float64, float16 or bfloat16, any strides; dtypes and
            widths may differ. More dimensions are flattened.

    Returns: 0-d in the accumulation type: float64 if an input is float64, else float32.

    The gradient goes to the student, through the mean too, none to the teacher; it is 0 between equal rows. With fewer
    than three rows the loss is 0. There is no second derivative (RuntimeError).

    Raises: TypeError, ValueError naming the argument.
    """
    return rkd(student, teacher, 1.0, 0.0)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """``1 / B^3 sum_ijk h(cos_ijk - cos'_ijk)``: cosines of the angles at row i between rows j and k.

    h is the Huber function of threshold 1; equal rows have no direction between them: their cosines are 0, without
    gradient. B^3 triples, no feature read more than B times, and memory of a few (B, B) matrices. Shapes, gradients and
    errors are those of :func:`rkd_distance`.
    """
    return rkd(student, teacher, 0.0, 1.0)
