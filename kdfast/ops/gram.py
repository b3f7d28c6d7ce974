"""Matrices of inner products (Gram matrices), compared without what surrounds them in memory.

With G_ij = x_i . x_j of the rows of one network, G' of the other, c_ij = G_ij / (n_i n_j), n_i = |x_i| + eps:

    gram_distance     rows          1/B^2 sum_ij (q_ij - q'_ij)^2,   q_i = G_i / |G_i|
                      rows_absolute 1/B^2 sum_ij |q_ij - q'_ij|
                      distribution  1/B^2 sum_ij p'_ij log((p'_ij + eps) / (p_ij + eps)),
                                    p_i = (1 + c_i) / sum_j (1 + c_ij)
                      polynomial    1/B^2 sum_ij (K(c_ij) - K(c'_ij))^2,   K(c) = sum_k coefficient_k c^k
                      absolute      1/B^2 sum_ij |c_ij - c'_ij|
    affinity          absolute          |c_ij - c'_ij|, averaged, of the positions of a map,
                      squared           (c_ij - c'_ij)^2,
                      positive          (max(c_ij, 0) - max(c'_ij, 0))^2, with nothing of size positions^2

Each comparison gives its gradient as one symmetric matrix M with dL/dx_i = sum_j M_ij x_j. A row that is 0 has no
direction: its cosines and its gradient are 0.

The products are kdfast's own: an order of sums that no number of threads changes, and no setting for products of
float32 (TF32, torch.set_float32_matmul_precision, autocast) reaches them. Plain PyTorch takes them in float64 for that.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast._kernels import op
from kdfast.ops import check, shapes
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.differentiable import gradient_formed
from kdfast.ops.saved import save, saved

__all__ = ["affinity", "gram_distance", "inner_products", "selectivity"]

AFFINITIES = ("absolute", "squared", "positive")
KINDS = ("rows", "rows_absolute", "distribution", "polynomial", "absolute")
FLOOR = 1e-12  # smallest norm of a row of G, as in torch.nn.functional.normalize
MOST_TERMS = 16  # of a polynomial: what a kernel holds
BLOCK = 2**20  # elements of a temporary


# ---- plain PyTorch: the readable definition --------------------------------------------------------------------------
def products(a: Tensor, b: Tensor | None = None) -> Tensor:
    """a_zi . b_zj [Z, n, m]; of a with itself without b. In float64, some columns at a time."""
    out = a.new_zeros((*a.shape[:2], (a if b is None else b).shape[1]), dtype=torch.float64)
    for columns in _columns(a):
        left = a[..., columns].double()
        out.baddbmm_(left, (left if b is None else b[..., columns].double()).transpose(1, 2))
    return out.to(accumulator(a, b))


def weighted_rows(weights: Tensor, x: Tensor, factor: Tensor | None = None) -> Tensor:
    """factor sum_j w_zij x_zj [Z, n, D] in x's dtype."""
    weights = weights.double() if factor is None else weights.double() * factor
    out = x.new_empty((*weights.shape[:2], x.shape[2]))
    for columns in _columns(x):
        out[..., columns] = weights @ x[..., columns].double()
    return out


def _columns(x):
    """Slices of the last dimension of x [Z, n, D]: what one product in float64 copies."""
    step = max(64, BLOCK // max(1, x.shape[0] * x.shape[1]))
    return [slice(start, start + step) for start in range(0, x.shape[2], step)]


def inverse_norms(gram: Tensor, eps: float) -> Tensor:
    """1 / (|x_i| + eps) [Z, n] from the diagonal; 0 of a row that is 0."""
    norm = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    return torch.where(norm > 0, 1 / (norm + eps), 0.0)


def cosines(gram: Tensor, inverse: Tensor) -> Tensor:
    """Cosines [Z, n, n] of the rows, at most 1, from their inner products and `inverse_norms`."""
    return (gram * (inverse[:, :, None] * inverse[:, None, :])).clamp(max=1)


def through_cosines(slope: Tensor, gram: Tensor, inverse: Tensor) -> Tensor:
    """M from slope = dL/dc [Z, n, n]."""
    weights = (slope + slope.transpose(1, 2)) * (inverse[:, :, None] * inverse[:, None, :])
    # A row's norm moves all of its cosines.
    norm = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    along = torch.where(norm > 0, fixed_sum(weights * gram) * inverse / norm, 0.0)
    weights.diagonal(dim1=1, dim2=2).sub_(along)
    return weights


def compare_rows(gram: Tensor, other: Tensor, scale: float, absolute: bool) -> tuple[Tensor, Tensor]:
    """-> terms of the loss, M of the first; also where a row's norm is the floor, a constant."""

    def unit(g):
        norm = fixed_sum(g.double().square()).sqrt().to(g.dtype)[..., None]
        return g / norm.clamp(min=FLOOR), norm

    (q, norm), (p, _) = unit(gram), unit(other)
    gap = q - p
    slope = gap.sign() if absolute else 2 * gap
    along = torch.where(norm > FLOOR, fixed_sum(q * slope)[..., None], 0.0)
    slope = scale * (slope - q * along) / norm.clamp(min=FLOOR)
    # A row of G that is 0 is a sample that is 0, without a direction.
    slope = torch.where(norm > 0, slope, 0.0)
    return scale * (gap.abs() if absolute else gap.square()), slope + slope.transpose(1, 2)


def compare_distributions(gram: Tensor, other: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> terms of the loss, M of the student (first), M of the teacher."""

    def shares(g):
        inverse = inverse_norms(g, eps)
        c = (1 + cosines(g, inverse)) / 2
        total = fixed_sum(c)[..., None]
        return c / total, total, inverse

    (p, total_s, inverse_s), (t, total_t, inverse_t) = shares(gram), shares(other)
    gap = t - p
    log_ratio = (gap / (p + eps)).log1p()
    # A row's gaps sum to 0: taking them away leaves terms that are as small as their sum.
    terms = scale * (t * log_ratio - gap)
    # Likewise a constant added to a row's slopes in p or t changes nothing, as these sum to 1.
    slope_s, slope_t = (eps - gap) / (p + eps), log_ratio - eps / (t + eps)

    def weights(slope, share, total, g, inverse):
        slope = scale / 2 * (slope - fixed_sum(slope * share)[..., None]) / total
        return through_cosines(slope, g, inverse)

    return terms, weights(slope_s, p, total_s, gram, inverse_s), weights(slope_t, t, total_t, other, inverse_t)


def polynomial(c: Tensor, coefficients: Sequence[float]) -> tuple[Tensor, Tensor]:
    """-> K(c), K'(c)."""
    value, slope = torch.zeros_like(c), torch.zeros_like(c)
    for coefficient in reversed(coefficients):
        slope = slope * c + value
        value = value * c + coefficient
    return value, slope


def compare_cosines(
    gram: Tensor, other: Tensor, scale: float, eps: float, coefficients: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """-> terms of the loss, M of the first, M of the second: squares of K's differences, or without K absolute ones."""
    inverse, inverse_t = inverse_norms(gram, eps), inverse_norms(other, eps)
    c, t = cosines(gram, inverse), cosines(other, inverse_t)
    if coefficients:
        (k, k_slope), (k_t, k_t_slope) = (polynomial(x, coefficients) for x in (c, t))
        gap = k - k_t
        terms, slope, slope_t = scale * gap.square(), 2 * scale * gap * k_slope, -2 * scale * gap * k_t_slope
    else:
        terms, slope = scale * (c - t).abs(), scale * (c - t).sign()
        slope_t = -slope
    return terms, through_cosines(slope, gram, inverse), through_cosines(slope_t, other, inverse_t)


@op("gram", lambda a, b, **_: shapes.sums((*a.shape[:2], (a if b is None else b).shape[1]), a, b))
def _inner_products(a: Tensor, b: Tensor | None) -> Tensor:
    """a_zi . b_zj [Z, n, m]."""
    return products(a, b)


@op("gram", lambda weights, x, **_: x.new_empty((*weights.shape[:2], x.shape[2])))
def _weighted_sums(weights: Tensor, x: Tensor, factor: Tensor | None) -> Tensor:
    """factor sum_j w_zij x_zj [Z, n, D] in x's dtype."""
    return weighted_rows(weights, x, factor)


def _loss_and_weights(student, teacher, need_student, need_teacher, **_):
    return student.new_empty(()), *shapes.gradients(student, (student, need_student), (teacher, need_teacher))


@op("gram", _loss_and_weights)
def _compare_grams(
    student: Tensor,
    teacher: Tensor,
    kind: str,
    eps: float,
    coefficients: list[float],
    need_student: bool,
    need_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss; M [Z, n, n] of the sides that need it."""
    scale = 1 / max(student.numel(), 1)
    if kind in ("rows", "rows_absolute"):
        absolute = kind == "rows_absolute"
        terms, m_s = compare_rows(student, teacher, scale, absolute)
        m_t = compare_rows(teacher, student, scale, absolute)[1] if need_teacher else None
    elif kind == "distribution":
        terms, m_s, m_t = compare_distributions(student, teacher, scale, eps)
    else:
        terms, m_s, m_t = compare_cosines(student, teacher, scale, eps, coefficients)
    loss = fixed_sum(fixed_sum(fixed_sum(terms)))
    return loss, m_s if need_student else student.new_empty(0), m_t if need_teacher else student.new_empty(0)


def _loss_and_slopes(student, teacher, need_student, need_teacher, **_):
    sides = ((student, need_student), (teacher, need_teacher))
    slopes = (shapes.sums((x.shape[0], x.shape[2], x.shape[1]) if need else 0, student, teacher) for x, need in sides)
    return shapes.sums((), student, teacher), *slopes


@op("gram", _loss_and_slopes)
def _affinity(
    student: Tensor, teacher: Tensor, kind: str, eps: float, need_student: bool, need_teacher: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss; dL/du [B, N, C] of the sides that need it, u the unit positions."""
    units = [unit_positions(x, eps, accumulator(student, teacher)) for x in (student, teacher)]
    grads = [
        torch.zeros_like(u) if need else u.new_empty(0)
        for u, need in zip(units, (need_student, need_teacher), strict=True)
    ]
    batch, positions = student.shape[0], student.shape[2]
    scale = 1 / max(batch * positions**2, 1)
    loss = units[0].new_zeros(())
    step = max(1, BLOCK // max(1, batch * positions))
    for start in range(0, positions, step):
        rows = slice(start, start + step)
        cosines = [products(u[:, rows], u) for u in units]
        absent = [None if kind != "positive" else c < 0 for c in cosines]
        gap = torch.sub(*(c if no is None else c.masked_fill(no, 0.0) for c, no in zip(cosines, absent, strict=True)))
        terms, slope = (gap.abs(), gap.sign()) if kind == "absolute" else (gap.square(), 2 * gap)
        loss = loss + scale * fixed_sum(fixed_sum(fixed_sum(terms)))
        for u, grad, sign, no in zip(units, grads, (2, -2), absent, strict=True):
            if grad.numel():
                grad[:, rows] = weighted_rows(sign * scale * (slope if no is None else slope.masked_fill(no, 0.0)), u)
    return loss, *grads


def unit_positions(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x [B, C, N] as positions [B, N, C] over (their norm + eps); a position that is 0 stays 0."""
    x = x.to(dtype).transpose(1, 2)
    return (x / (fixed_sum(x.square()).sqrt() + eps)[..., None]).contiguous()


@op("gram", lambda x, **_: shapes.gradient(x))
def _affinity_backward(grad: Tensor, slope: Tensor, x: Tensor, eps: float) -> Tensor:
    """dL/dx [B, C, N] from slope = dL/du [B, N, C], u = x / (|x| + eps); 0 where x is 0."""
    y = x.to(slope.dtype).transpose(1, 2)
    norm = fixed_sum(y.square()).sqrt()[..., None]
    inverse = torch.where(norm > 0, 1 / (norm + eps), 0.0)
    along = torch.where(norm > 0, fixed_sum(slope * y)[..., None] * inverse / norm, 0.0)
    return (grad * inverse * (slope - along * y)).transpose(1, 2).to(x.dtype).contiguous()


# ---- differentiable functions ----------------------------------------------------------------------------------------
def _compare(student, teacher, *settings):
    dtype = accumulator(student, teacher)
    # float64 on one side makes the other side's sums float64, too.
    grams = (_inner_products(x if accumulator(x) == dtype else x.to(dtype), None) for x in (student, teacher))
    return _compare_grams(*grams, *settings)


_gram_distance_function = gradient_formed(
    _compare, lambda grad, weights, x, *_: _weighted_sums(weights, x, grad), "gram_distance"
)
_affinity_function = gradient_formed(
    _affinity, lambda grad, slope, x, kind, eps: _affinity_backward(grad, slope, x, eps), "affinity"
)


# Written out: through `differentiable.py` a small call would take 9 % longer.
class _InnerProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        save(ctx, a, b)
        return _inner_products(a, b)

    @staticmethod
    def backward(ctx, grad):
        check.first_derivative_only("inner_products")
        a, b = saved(ctx)
        if b is None:
            return _weighted_sums(grad + grad.transpose(1, 2), a, None), None
        need_a, need_b = ctx.needs_input_grad
        # The sums come in the dtype of what is summed.
        x, y = (a, b) if a.dtype == b.dtype else (a.to(grad.dtype), b.to(grad.dtype))
        a_grad = _weighted_sums(grad, y, None).to(a.dtype) if need_a else None
        return a_grad, _weighted_sums(grad.transpose(1, 2), x, None).to(b.dtype) if need_b else None


def _inverse_lengths(x, dtype):
    """1 / |x_bc| [B, C, 1] of channels over their positions; 0 of a channel that is 0."""
    length = fixed_sum(x.to(dtype).square()).sqrt()[..., None]
    return torch.where(length > 0, 1 / length.clamp(min=FLOOR), 0.0)


def _selectivity(student, teacher, need_student, need_teacher):
    """|S^T S / C - T^T T / C'|^2 of unit channels S [C, N] and T [C', N], a mean over the batch; dL/dS, dL/dT."""
    dtype = accumulator(student, teacher)
    s, t = (x.to(dtype) * _inverse_lengths(x, dtype) for x in (student, teacher))
    few_positions = 2 * s.shape[2] <= s.shape[1] + t.shape[1]
    return (_selectivity_by_positions if few_positions else _selectivity_by_channels)(s, t, need_student, need_teacher)


def _selectivity_by_positions(s, t, need_student, need_teacher):
    """-> loss; dL/dS, dL/dT through k(s, t) [B, C, N]; from products of positions [B, N, N]."""
    rows = max(s.shape[0], 1)
    s, t = (x.transpose(1, 2).contiguous() for x in (s, t))
    gram, other = (_inner_products(x, None) / x.shape[2] for x in (s, t))
    gap = gram - other
    loss = fixed_sum(fixed_sum(fixed_sum(gap.square()))) / rows
    slope_s = _weighted_sums(gap * (4 / (rows * s.shape[2])), s, None) if need_student else None
    slope_t = _weighted_sums(gram * (-4 / (rows * t.shape[2])), t, None) if need_teacher else None
    return loss, *(None if x is None else x.transpose(1, 2) for x in (slope_s, slope_t))


def _selectivity_by_channels(s, t, need_student, need_teacher):
    """The same from products of channels [B, C, C], [B, C', C'] and [B, C, C']."""
    rows, (own, other) = max(s.shape[0], 1), (s.shape[1], t.shape[1])
    k_s, k_t, k_st = _inner_products(s, None), _inner_products(t, None), _inner_products(s, t)
    terms = [(k / c).double().square() for k, c in ((k_s, own), (k_t, other), (k_st, (own * other) ** 0.5))]
    if own == other:  # entry by entry, which is exactly 0 for equal networks
        loss = fixed_sum(fixed_sum(fixed_sum(terms[0] + terms[1] - 2 * terms[2])))
    else:
        sums = [fixed_sum(fixed_sum(fixed_sum(x))) for x in terms]
        loss = sums[0] + sums[1] - 2 * sums[2]
    slope_s = slope_t = None
    if need_student:
        slope_s = _weighted_sums(k_s * (4 / (rows * own**2)), s, None)
        slope_s = slope_s - _weighted_sums(k_st * (4 / (rows * own * other)), t, None)
    if need_teacher:
        slope_t = _weighted_sums(k_st.transpose(1, 2) * (-4 / (rows * own * other)), s, None)
    return (loss / rows).to(s.dtype), slope_s, slope_t


def _selectivity_gradient(grad, slope, x):
    inverse = _inverse_lengths(x, slope.dtype)
    unit = x.to(slope.dtype) * inverse
    return (grad * inverse * (slope - unit * fixed_sum(unit * slope)[..., None])).to(x.dtype)


_selectivity_function = gradient_formed(_selectivity, _selectivity_gradient, "selectivity")


# ---- public functions ------------------------------------------------------------------------------------------------
def inner_products(a: Tensor, b: Tensor | None = None) -> Tensor:
    """``a_zi . b_zj`` [Z, n, m] of rows (Z, n, D) and (Z, m, D), of `a` with itself if `b` is absent.

    float32, float64, float16 or bfloat16, any strides. Sums and result in the accumulation type: float64 if an input is
    float64, else float32, whatever torch's settings for products of float32 are.

    Gradients flow to a and b; there is no second derivative (RuntimeError).

    Raises: TypeError, ValueError naming the argument.
    """
    check.floating("a", a)
    if a.dim() != 3:
        raise ValueError(f"a must be (batches, rows, features), got shape {tuple(a.shape)}")
    if b is not None:
        check.floating("b", b)
        if b.dim() != 3 or (b.shape[0], b.shape[2]) != (a.shape[0], a.shape[2]):
            raise ValueError(f"b must be ({a.shape[0]}, rows, {a.shape[2]}) as a is, got shape {tuple(b.shape)}")
        check.same_device("b", b, a, of="a")
    return _InnerProducts.apply(a, b)


def gram_distance(
    student: Tensor, teacher: Tensor, kind: str = "rows", *, eps: float = 0.0, coefficients: Sequence[float] = ()
) -> Tensor:
    """How the inner products among the student's rows differ from those among the teacher's: see the module's formulas.

    Args:
        student, teacher: rows (n, D) and (n, D'), or batches of them (Z, n, D) and (Z, n, D') over which the mean goes,
            too; float32, float64, float16 or bfloat16, any strides; dtypes may differ.
        kind: "rows", "rows_absolute", "distribution", "polynomial" or "absolute".
        eps: added to the rows' norms, and to the shares of "distribution".
        coefficients: of the polynomial, from c^0 on; at most 16.

    Returns: 0-d in the accumulation type: float64 if an input is float64, else float32. Exactly 0 for equal inputs.

    Gradients flow to both; there is no second derivative (RuntimeError).

    Raises: TypeError, ValueError naming the argument.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    check.number("eps", eps, low=0.0)
    if (kind == "polynomial") != (len(coefficients) > 0):
        raise ValueError(f"coefficients belong to kind 'polynomial', got {coefficients!r} with kind {kind!r}")
    if len(coefficients) > MOST_TERMS:
        raise ValueError(f"coefficients must be at most {MOST_TERMS}, got {len(coefficients)}")
    for name, x in (("student", student), ("teacher", teacher)):
        check.floating(name, x)
        if x.dim() not in (2, 3) or x.shape[-1] == 0:
            raise ValueError(f"{name} must be (rows, features) or (batches, rows, features), got {tuple(x.shape)}")
    if teacher.shape[:-1] != student.shape[:-1]:
        want, got = tuple(student.shape[:-1]), tuple(teacher.shape)
        raise ValueError(f"teacher must have the student's rows {want}, got shape {got}")
    check.same_device("teacher", teacher, student)
    s, t = (x if x.dim() == 3 else x[None] for x in (student, teacher))
    if kind in ("rows", "rows_absolute") and s.shape[1] == 1:
        return _distance_of_single_rows(s, t, kind == "rows_absolute")
    return _gram_distance_function((kind, float(eps), [float(x) for x in coefficients]), s, t)


def _distance_of_single_rows(student, teacher, absolute):
    """Where G has one entry g: over its length exactly 1, without a gradient; g / FLOOR below the floor."""

    def unit(x):
        g = fixed_sum(x.to(accumulator(student, teacher)).square())
        return (g / FLOOR).clamp(max=1) + 0.0 * g  # NaN where g is infinite

    gap = unit(student) - unit(teacher)
    return fixed_sum((gap.abs() if absolute else gap.square()).flatten()) / max(gap.numel(), 1)


def selectivity(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean k(t, t) + mean k(s, s) - 2 mean k(s, t)``, ``k(a, b) = (a . b)^2`` over unit channels.

    Args:
        student, teacher: channels (B, C, N) and (B, C', N) of N positions, float32, float64, float16 or bfloat16, any
            strides; dtypes may differ.

    Returns: 0-d, a mean over the batch, in the accumulation type: float64 if an input is float64, else float32.

    Gradients flow to both, to the teacher through k(s, t) alone; there is no second derivative (RuntimeError).

    Raises: TypeError, ValueError naming the argument.
    """
    for name, x in (("student", student), ("teacher", teacher)):
        check.embeddings(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name} must be (batch, channels, positions), got shape {tuple(x.shape)}")
    check.same_batch("teacher", teacher, student)
    if student.shape[2] != teacher.shape[2]:
        raise ValueError(f"teacher must have the student's {student.shape[2]} positions, got {teacher.shape[2]}")
    return _selectivity_function((), student, teacher)


def affinity(student: Tensor, teacher: Tensor, *, kind: str = "absolute", eps: float = 1e-8) -> Tensor:
    """``1 / (B N^2) sum_bij |u_bi . u_bj - u'_bi . u'_bj|``: u the positions of a map, x / (|x| + eps).

    Args:
        kind: "absolute"; "squared" takes the squares of the differences, and "positive" those of the positive parts.
        student, teacher: maps (B, C, H, W) and (B, C', H, W), N = H W positions, float32, float64, float16 or bfloat16,
            any strides; dtypes may differ.
        eps: added to the norm of a position.

    Returns: 0-d in the accumulation type: float64 if an input is float64, else float32. Exactly 0 for equal maps.

    Gradients flow to both, and are 0 at positions that are 0; memory of the size of the maps. There is no second
    derivative (RuntimeError).

    Raises: TypeError, ValueError naming the argument.
    """
    check.two_maps(student, teacher)
    check.one_of("kind", kind, AFFINITIES)
    check.number("eps", eps, low=0.0)
    return _affinity_function((kind, float(eps)), student.flatten(2), teacher.flatten(2))
