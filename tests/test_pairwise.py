"""The pairwise family: its ops against the formulas, on each implementation."""

import math
from dataclasses import dataclass

import behaviour
import oracles
import pytest
import torch
from behaviour import FLOATS, HALVES, LAYOUTS
from conftest import assert_close

import kdfast
from kdfast import ops
from kdfast.ops.layout import flat_rows

raw = torch.ops.kdfast

CASES = [  # rows, features
    (2, 1),  # one pair: its distance is the mean, and every angle is 0 or straight
    (3, 1),  # on a line all cosines are 1 or -1
    (3, 5),
    (5, 9),
    (32, 33),  # the rows of a block
    (66, 7),  # three blocks, so that a triple may lie in three
    (34, 70),  # more features than are read at a time on CUDA
    (34, 1030),  # and by a CPU
    (150, 70),  # several blocks for each thread
]
SMALL = (5, 9)


# ---- the ops with their arguments ------------------------------------------------------------------------------------
@dataclass
class Data:
    """`student` [B, D] and `teacher` [B, D'] are one batch; `other` [m, D] is a second set of the student's width."""

    student: torch.Tensor
    teacher: torch.Tensor
    other: torch.Tensor


def make(implementation, rows, cols, dtype=torch.float64, teacher_dtype=None):
    shapes = (rows, cols), (rows, cols // 2 + 1), (rows + 2, cols)
    dtypes = dtype, teacher_dtype or dtype, teacher_dtype or dtype
    tensors = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    return Data(*(x.to(t).to(implementation.device) for x, t in zip(tensors, dtypes, strict=True)))


@dataclass
class Variant:
    """`call(ops, *inputs)` is the same for kdfast.ops and the oracles; `sizes` gives the magnitudes of its terms.

    `sizes(upstream, *inputs)` is that of the value, then those of the gradients in the inputs; no more of these than
    inputs with a gradient.
    """

    inputs: tuple
    call: callable
    sizes: callable

    def of(self, data):
        return [getattr(data, name) for name in self.inputs]


def _mix_sizes(student, teacher):
    return tuple(
        25 * a + 50 * b
        for a, b in zip(
            oracles.sizes_rkd_distance(student, teacher), oracles.sizes_rkd_angle(student, teacher), strict=True
        )
    )


PAIR = ("student", "teacher")
VARIANTS = {
    "distance": Variant(
        ("student",), lambda o, x: o.pairwise_distance(x), lambda g, x: oracles.sizes_distance(x, None, g)
    ),
    "squared": Variant(
        ("student",),
        lambda o, x: o.pairwise_distance(x, squared=True),
        lambda g, x: oracles.sizes_distance(x, None, g, squared=True),
    ),
    "between": Variant(
        ("student", "other"), lambda o, x, y: o.pairwise_distance(x, y), lambda g, x, y: oracles.sizes_distance(x, y, g)
    ),
    "between_squared": Variant(
        ("student", "other"),
        lambda o, x, y: o.pairwise_distance(x, y, squared=True),
        lambda g, x, y: oracles.sizes_distance(x, y, g, squared=True),
    ),
    "rkd_distance": Variant(PAIR, lambda o, s, t: o.rkd_distance(s, t), lambda g, s, t: _scaled(g, s, t, "distance")),
    "rkd_angle": Variant(PAIR, lambda o, s, t: o.rkd_angle(s, t), lambda g, s, t: _scaled(g, s, t, "angle")),
    "rkd": Variant(PAIR, lambda o, s, t: o.rkd(s, t), lambda g, s, t: _scaled(g, s, t, "both")),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)
every_loss = pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle", "rkd"])


def _scaled(upstream, student, teacher, term):
    sizes = {"distance": oracles.sizes_rkd_distance, "angle": oracles.sizes_rkd_angle, "both": _mix_sizes}[term]
    value, entries = sizes(student, teacher)
    return value, upstream.abs().double() * entries


def gradients(value, inputs, upstream):
    """Of the inputs that the op differentiates: a teacher gets None."""
    return torch.autograd.grad(value, inputs, upstream.to(value.dtype), allow_unused=True)


def check(variant, inputs, upstream=None, want=None):
    """The op's value and gradients on `inputs` against the oracle's; `want` are other inputs for the oracle."""
    leaves = [x if x.requires_grad else x.detach().clone().requires_grad_() for x in inputs]
    value = variant.call(ops, *leaves)
    exact = [x.detach().double().requires_grad_() for x in want or inputs]
    expected = variant.call(oracles, *exact)
    upstream = torch.ones_like(expected) if upstream is None else upstream.to(value.device)
    size, *sizes = variant.sizes(upstream.expand_as(expected), *exact)
    rows, cols = inputs[0].shape
    assert_close(value, expected.detach(), size, max(rows, cols), value.dtype)
    got, grads = (gradients(v, x, upstream) for v, x in ((value, leaves), (expected, exact)))
    for index, (x, a, b) in enumerate(zip(leaves, got, grads, strict=True)):
        if b is None:
            assert a is None
            continue
        assert a.dtype == x.dtype and a.shape == x.shape
        assert_close(a, b, sizes[index], max(rows, cols), value.dtype, f"gradient of {variant.inputs[index]}")


def upstream_like(variant, data):
    """A gradient for every entry of the op's value."""
    shape = variant.call(oracles, *variant.of(data)).shape
    return torch.randn(shape, dtype=torch.float64, device=data.student.device)


def skip_slow(implementation, shape):
    if implementation.name == "simt" and math.prod(shape) > 5000:
        pytest.skip("a fiber per thread: slow, and nothing new to CUDA")


# ---- value and gradients ---------------------------------------------------------------------------------------------
@every_variant
@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matches_oracle(implementation, name, shape, dtype):
    skip_slow(implementation, shape)
    data = make(implementation, *shape, dtype)
    check(VARIANTS[name], VARIANTS[name].of(data), upstream_like(VARIANTS[name], data))


@every_variant
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_low_precision(implementation, name, dtype):
    """float32 accumulation and result, gradients in the inputs' dtype; exact in the rounded inputs."""
    data = make(implementation, 5, 33, dtype)
    assert VARIANTS[name].call(ops, *VARIANTS[name].of(data)).dtype == torch.float32
    check(VARIANTS[name], VARIANTS[name].of(data), upstream_like(VARIANTS[name], data))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("name", ["between", "rkd_distance", "rkd_angle", "rkd"])
def test_mixed_dtypes(implementation, name, student, teacher):
    data = make(implementation, *SMALL, student, teacher)
    inputs = VARIANTS[name].of(data)
    expected = torch.float64 if torch.float64 in (student, teacher) else torch.float32
    assert VARIANTS[name].call(ops, *inputs).dtype == expected
    check(VARIANTS[name], inputs)


@every_variant
def test_gradcheck(implementation, name):
    variant = VARIANTS[name]
    first, *others = behaviour.leaves_of(variant.of(make(implementation, 4, 3)))
    if "teacher" in variant.inputs:
        others = [x.detach() for x in others]
    # The diagonal of a distance matrix is a constant 0, but finite differences would see a kink there.
    away = not variant.inputs[1:] and ~torch.eye(4, dtype=torch.bool, device=first.device)

    def f(*inputs):
        value = variant.call(ops, *inputs)
        return value if away is False else value[away]

    assert torch.autograd.gradcheck(f, (first, *others))


def test_opcheck(implementation):
    """Schemas, shape functions and dynamic shapes of the raw ops, on inputs that need no gradient."""
    d = make(implementation, *SMALL, torch.float32)
    weights, factor = torch.randn(5, 7, device=d.student.device), torch.tensor(2.0, device=d.student.device)
    calls = [
        ("pairwise_distance", (d.student, None, False)),
        ("pairwise_distance", (d.student, d.other, True)),
        ("weighted_differences", (weights[:, :5], d.student, None, None)),
        ("weighted_differences", (weights, d.student.half(), d.other, factor)),
        ("rkd", (d.student, d.teacher, 25.0, 50.0, True)),
        ("rkd", (d.student, d.teacher, 0.0, 1.0, False)),
    ]
    for op, args in calls:
        torch.library.opcheck(getattr(raw, op).default, args)


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weighted_differences(implementation, shape, dtype):
    """factor * sum_j w_ij (x_i - y_j): y or x itself, weights of any strides, with and without a factor."""
    skip_slow(implementation, shape)
    data = make(implementation, *shape, dtype)
    x, y = data.student, data.other
    accumulator = torch.promote_types(dtype, torch.float32)
    weights = torch.randn(len(x), len(y), dtype=accumulator, device=x.device)
    factor = torch.tensor(-2.5, dtype=accumulator, device=x.device)
    square = weights[:, : len(x)]
    for w, a, b, f in ((square, x, None, None), (square.t(), x, None, factor), (weights, x, y, factor)):
        got = raw.weighted_differences(w, a, b, f)
        differences = a.double()[:, None] - (a if b is None else b).double()
        scale = 1.0 if f is None else f.double()
        want = scale * (w.double()[..., None] * differences).sum(1)
        size = abs(scale) * (w.double()[..., None] * differences).abs().sum(1)
        assert got.dtype == dtype and got.is_contiguous()
        assert_close(got, want, size, len(y), accumulator)


# ---- arguments -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
@every_variant
def test_layouts(implementation, name, layout):
    variant, change = VARIANTS[name], LAYOUTS[layout]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [change(x) for x in variant.of(make(implementation, 4, 35, dtype))]
        plain = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
        check(variant, [x.requires_grad_() for x in inputs], want=plain)


@every_variant
def test_more_dimensions(implementation, name):
    """Maps are flattened, whatever their memory format; the gradient has the shape of the map."""
    variant = VARIANTS[name]
    data = make(implementation, 4, 24)
    maps = [x[:, : x.shape[1] // 4 * 4].contiguous().unflatten(1, (-1, 2, 2)) for x in variant.of(data)]
    first, *others = behaviour.leaves_of(maps)
    want = variant.call(ops, *(x.flatten(1) for x in (first, *others)))
    (want_grad,) = torch.autograd.grad(want.sum(), first)
    for one in (torch.contiguous_format, torch.channels_last):
        for two in (torch.contiguous_format, torch.channels_last):
            leaf = first.detach().contiguous(memory_format=one).requires_grad_()
            got = variant.call(ops, leaf, *(x.contiguous(memory_format=two) for x in others))
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(torch.autograd.grad(got.sum(), leaf)[0], want_grad)


def test_maps_are_not_copied():
    """Features may come in any order, but in the same one for two sets."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        maps = torch.randn(3, 4, 5, 6).contiguous(memory_format=memory_format)
        assert flat_rows(maps).shape == (3, 120) and flat_rows(maps).data_ptr() == maps.data_ptr()
        for other in (torch.contiguous_format, torch.channels_last):
            assert torch.equal(flat_rows(maps.contiguous(memory_format=other), maps), flat_rows(maps))


def test_upstream_gradients(implementation):
    """Scaled, negative, and one number for all entries with stride 0."""
    data = make(implementation, *SMALL, torch.float32)
    for variant in VARIANTS.values():
        for factor in (3.0, -0.25, 1e-30, 0.0):
            shape = variant.call(oracles, *variant.of(data)).shape
            check(variant, variant.of(data), torch.tensor(factor, dtype=torch.float64).expand(shape))


def test_gradient_paths(implementation):
    """To the student alone, to either set of a distance, and none without a student that wants one."""
    data = make(implementation, *SMALL)
    student, teacher, other = behaviour.leaves_of((data.student, data.teacher, data.other))
    for op in (ops.rkd, ops.rkd_angle, ops.rkd_distance):
        assert torch.autograd.grad(op(student, teacher), teacher, allow_unused=True) == (None,)
        assert not op(data.student, teacher).requires_grad
        with torch.no_grad():
            assert torch.equal(op(student, data.teacher), op(data.student, data.teacher))
    both = torch.autograd.grad(ops.pairwise_distance(student, other).sum(), (student, other))
    for index, inputs in enumerate(((student, data.other), (data.student, other))):
        (alone,) = torch.autograd.grad(ops.pairwise_distance(*inputs).sum(), inputs[index])
        assert torch.equal(alone, both[index])
    twice = ops.pairwise_distance(student, student)
    torch.testing.assert_close(
        *(torch.autograd.grad(d.square().sum(), student)[0] for d in (twice, ops.pairwise_distance(student)))
    )


def test_weights_are_made_where_they_are_needed(implementation):
    data = make(implementation, *SMALL)
    loss, weights = raw.rkd(data.student, data.teacher, 25.0, 50.0, True)
    alone, none = raw.rkd(data.student, data.teacher, 25.0, 50.0, False)
    assert weights.shape == (5, 5) and torch.equal(weights, weights.t()) and torch.equal(loss, alone)
    assert none.shape == (0,)


def test_terms(implementation):
    """rkd is the weighted sum of both terms, and does without a term of weight 0."""
    data = make(implementation, *SMALL)
    student, teacher = data.student.requires_grad_(), data.teacher
    parts = ops.rkd_distance(student, teacher), ops.rkd_angle(student, teacher)
    grads = [torch.autograd.grad(x, student)[0] for x in parts]
    for a, b in ((25.0, 50.0), (-1.0, 0.5), (2.0, 0.0), (0.0, 3.0), (0.0, 0.0)):
        loss = ops.rkd(student, teacher, a, b)
        torch.testing.assert_close(loss, a * parts[0] + b * parts[1])
        torch.testing.assert_close(torch.autograd.grad(loss, student)[0], a * grads[0] + b * grads[1])
    broken = torch.full_like(teacher, 1e200)  # squares overflow, which the distances' mean would not survive
    broken[0] = 0
    assert ops.rkd(student, broken, 0.0, 0.0) == 0


# ---- edges -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5, 9), (33, 3), (3, 1030)], ids=str)
def test_edges_exact_zeros(implementation, dtype, shape):
    """Equal rows are at distance exactly 0 without gradient, and a matrix of distances is symmetric to the last bit."""
    x = make(implementation, *shape, dtype).student
    x[2] = x[0]
    x.requires_grad_()
    y = x.detach()[[0, 1]].clone().requires_grad_()
    for squared in (False, True):
        d = ops.pairwise_distance(x, squared=squared)
        assert not d.diagonal().any() and d[0, 2] == d[2, 0] == 0 and torch.equal(d, d.t())
        assert not torch.autograd.grad(d[0, 2] + d[2, 0] + d[1, 1], x)[0].any()
        d = ops.pairwise_distance(x, y, squared=squared)
        assert d[0, 0] == d[2, 0] == d[1, 1] == 0
        assert not any(g.any() for g in torch.autograd.grad(d[2, 0] + d[1, 1], (x, y)))


@every_loss
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(2, 1), (5, 9), (17, 1), (33, 40)], ids=str)
def test_edges_equal_networks(implementation, name, dtype, shape):
    """Exactly 0 with exactly zero gradients, equal rows included, and with the same numbers in another dtype."""
    student = make(implementation, *shape, dtype).student
    student[-1] = student[0]
    student.requires_grad_()
    for teacher in (student.detach().clone(), student.detach().double()):
        loss = getattr(ops, name)(student, teacher)
        assert loss == 0
        assert not torch.autograd.grad(loss, student, torch.full_like(loss, 3.0))[0].any()


EQUAL_ROWS = {
    "in_both": ([(0, 3), (1, 4)], [(0, 3), (1, 4)]),
    "in_student": ([(0, 3), (1, 4), (1, 2)], []),
    "in_teacher": ([], [(0, 3), (1, 4), (1, 2)]),
    "elsewhere": ([(0, 3)], [(1, 4)]),
}


@every_variant
@pytest.mark.parametrize("where", EQUAL_ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_edges_equal_rows(implementation, name, where, dtype):
    """Finite everywhere: a pair of equal rows has no direction, so that it moves nothing."""
    data = make(implementation, 7, 9, dtype)
    for x, pairs in zip((data.student, data.teacher), EQUAL_ROWS[where], strict=True):
        for i, j in pairs:
            x[j] = x[i]
    data.other[1] = data.student[3]
    check(VARIANTS[name], VARIANTS[name].of(data))


@every_loss
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_edges_all_rows_equal(implementation, name, side):
    data = make(implementation, 5, 9, torch.float32)
    for x in {"student": [data.student], "teacher": [data.teacher], "both": [data.student, data.teacher]}[side]:
        x.copy_(x[:1].clone().expand_as(x))
    check(VARIANTS[name], VARIANTS[name].of(data))
    if side != "teacher":
        student = data.student.requires_grad_()
        assert not torch.autograd.grad(getattr(ops, name)(student, data.teacher), student)[0].any()


@every_variant
@pytest.mark.parametrize("rows", [0, 1])
def test_edges_no_pairs(implementation, name, rows):
    """0 with a graph: no rank of a distributed run is left without a backward, and the official NaN does not occur."""
    variant = VARIANTS[name]
    leaves = behaviour.leaves_of(variant.of(make(implementation, rows, 9, torch.float32)))
    value = variant.call(ops, *leaves)
    assert value.requires_grad and value.isfinite().all()
    (grad,) = torch.autograd.grad(value.sum(), leaves[:1])
    assert grad.shape == (rows, 9) and grad.isfinite().all()
    if "other" not in variant.inputs:
        assert not value.any() and not grad.any()


@every_variant
def test_edges_largest_half(implementation, name):
    """float16 values up to 6e4, whose squares no float16 holds (official code: NaN)."""
    data = make(implementation, *SMALL, torch.float16)
    for x in (data.student, data.teacher, data.other):
        x.copy_(x.sign() * 6e4)
        x[:, 0] = torch.linspace(-6e4, 6e4, len(x))
    variant = VARIANTS[name]
    check(
        variant, variant.of(data), 1e-3 * torch.ones_like(upstream_like(variant, data))
    )  # or float16 gradients overflow


def _offset_rows(x):
    x += 100


def _close_rows(x):
    """Pairs of rows 1e-4 apart."""
    half = len(x) // 2
    x[half : 2 * half] = x[:half] + 1e-4 / x.shape[1] ** 0.5 * torch.randn_like(x[:half])


def _both(x):
    """Close pairs far from the origin, as close as float32 can hold them there."""
    _close_rows(x)
    x *= 10
    x += 100


@every_variant
@pytest.mark.parametrize("place", [_offset_rows, _close_rows, _both], ids=lambda f: f.__name__.strip("_"))
def test_edges_accuracy(implementation, name, place):
    """float32 gradients within 1e-5 of the largest entry, where scalar products lose 3e-3; within the rule, too."""
    variant = VARIANTS[name]
    data = make(implementation, 32, 24, torch.float32)
    for x in (data.student, data.teacher, data.other):
        place(x)
    check(variant, variant.of(data))
    leaves, exact = behaviour.leaves_of(variant.of(data)), behaviour.leaves_of(x.double() for x in variant.of(data))
    got, want = (torch.autograd.grad(variant.call(o, *x).sum(), x[:1])[0] for o, x in ((ops, leaves), (oracles, exact)))
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


@every_loss
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_edges_scale(implementation, name, scale):
    """Ratios of distances and angles do not see the scale of the embeddings."""
    data = make(implementation, *SMALL, torch.float32)
    data.student *= scale
    check(VARIANTS[name], VARIANTS[name].of(data))


def test_edges_below_the_least_distance(implementation):
    """Rows nearer than 1e-6 count as 1e-6 apart, which is a constant."""
    data = make(implementation, 5, 9)
    data.student[3] = data.student[1] + 1e-8
    data.teacher[4] = data.teacher[2] + 1e-8
    check(VARIANTS["rkd_distance"], [data.student, data.teacher])


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_losses_without_pairs(implementation, rows, dtype):
    """0 with a graph, and in float32 or better, as of any batch; IRG's vertices are compared without pairs, too."""
    student, teacher = _networks(implementation, rows, dtype)
    leaves = behaviour.leaves_of(student)
    maps, late, feature, logits = leaves
    losses = [
        kdfast.HardDarkRank()(feature, teacher[2]),
        kdfast.IRGEdge()(feature, teacher[2]),
        kdfast.IRGTransformation()(feature, feature.detach(), teacher[2], teacher[2]),
        kdfast.IRG()([maps, late, feature, teacher[3]], teacher),
        kdfast.RKD()(feature, teacher[2]),
    ]
    for loss in losses:
        assert loss.shape == () and loss.dtype == torch.promote_types(dtype, torch.float32)
        assert loss.requires_grad and loss.isfinite()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        assert all(g is None or (g.isfinite().all() and g.dtype == dtype) for g in grads)
    assert not any(loss.any() for loss in losses[:2])
    vertex = kdfast.IRG(edge_weight=0.0, transformation_weight=0.0)(leaves, teacher)
    want = (logits.double() - teacher[3].double()).square().sum() / (10 * max(logits.numel(), 1))
    torch.testing.assert_close(vertex.double(), want, rtol=1e-5, atol=0)


def test_losses_of_equal_rows(implementation):
    """A row's nearest rows never include itself; relations among rows that are all equal are 0 (official code: NaN)."""
    data = make(implementation, 7, 9)
    data.teacher[4] = data.teacher[1]
    data.teacher[6] = data.teacher[5]
    student, exact = behaviour.leaves_of([data.student, data.student])
    loss = kdfast.HardDarkRank(0.5, 1.0, 3)(student, data.teacher)
    want = oracles.HardDarkRank(exact, data.teacher, 0.5, 1.0, 3)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], torch.autograd.grad(want, exact)[0])
    networks = _networks(implementation, 5, torch.float32)
    student, teacher = ([x[:1].expand_as(x) for x in layers] for layers in networks)
    leaves = behaviour.leaves_of(student)
    for loss in (
        kdfast.IRGEdge()(leaves[2], teacher[2]),
        kdfast.IRGTransformation()(leaves[2], leaves[2].detach(), teacher[2], teacher[2]),
        kdfast.IRG(vertex_weight=0.0)(leaves, teacher),
    ):
        assert loss == 0
        assert all(g is None or not g.any() for g in torch.autograd.grad(loss, leaves, allow_unused=True))


def test_large_index(implementation):
    """Elements beyond 2^31 of a tensor: rows far apart and features far apart."""
    rows, cols, far = 4, 40, 2**30 + 8
    data = make(implementation, rows, cols, torch.bfloat16)
    with behaviour.sparse_memory(3 * far + 8 * cols, implementation.device) as memory:
        for strides in ((far, 1), (1, far)):
            x = memory.as_strided((rows, cols if strides[1] == 1 else 4), strides)
            x.copy_(data.student[:, : x.shape[1]])
            plain = data.student[:, : x.shape[1]].contiguous()
            assert torch.equal(ops.pairwise_distance(x), ops.pairwise_distance(plain))
            assert torch.equal(ops.rkd(x, data.teacher), ops.rkd(plain, data.teacher))
            w = torch.randn(rows, rows, device=x.device)
            assert torch.equal(*(raw.weighted_differences(w, y, None, None) for y in (x, plain)))
            x.zero_()


# ---- behaviour in PyTorch --------------------------------------------------------------------------------------------
def total(name):
    """A variant as a function of its inputs that gives one number."""
    return lambda *inputs: VARIANTS[name].call(ops, *inputs).square().sum()


@every_variant
def test_double_backward_raises(implementation, name):
    leaves = behaviour.leaves_of(VARIANTS[name].of(make(implementation, *SMALL)))
    behaviour.check_refuses_second_derivative(total(name)(*leaves), leaves[0])


@every_variant
def test_inplace_change_raises(implementation, name):
    inputs = VARIANTS[name].of(make(implementation, *SMALL))
    for index in range(len(inputs)) if "teacher" not in VARIANTS[name].inputs else (0,):
        behaviour.check_refuses_changed_input(total(name), inputs, index)


ERRORS = [
    (
        lambda s, t: ops.rkd(s[0], t),
        ValueError,
        r"student must be \(batch, features\) or \(batch, ...\), got shape \(9,\)",
    ),
    (lambda s, t: ops.rkd(s, t[:4]), ValueError, r"teacher must have the student's batch size 5, got shape \(4, 3\)"),
    (lambda s, t: ops.rkd_angle(s.long(), t), TypeError, "student must be float32, float64, float16 or bfloat16"),
    (lambda s, t: ops.rkd_angle(s, t.tolist()), TypeError, "teacher must be a torch.Tensor, got list"),
    (lambda s, t: ops.rkd_angle(s[:, :0], t), ValueError, r"student must have at least one feature, got .* \(5, 0\)"),
    (lambda s, t: ops.rkd_distance(s, t.to("meta")), ValueError, "teacher must be on the student's device cpu"),
    (lambda s, t: ops.rkd(s, t, "1", 2.0), TypeError, "distance_weight must be a number, got str"),
    (lambda s, t: ops.rkd(s, t, 1.0, float("nan")), ValueError, "angle_weight must be finite, got nan"),
    (
        lambda s, t: ops.pairwise_distance(s, t),
        ValueError,
        r"rows like those of x, shape \(m, 9\), got \(5, 3\)",
    ),
    (lambda s, t: ops.pairwise_distance(s, s.to("meta")), ValueError, "y must be on x's device cpu, got meta"),
    (lambda s, t: ops.pairwise_distance(s.int()), TypeError, "x must be float32"),
    (lambda s, t: kdfast.RKD(distance_weight=None), TypeError, "distance_weight must be a number, got NoneType"),
    (lambda s, t: kdfast.HardDarkRank(alpha=0), ValueError, "alpha must be finite and above 0, got 0"),
    (lambda s, t: kdfast.HardDarkRank(permute_len=0), ValueError, "permute_len must be at least 1, got 0"),
    (lambda s, t: kdfast.HardDarkRank(permute_len=4.0), TypeError, "permute_len must be an int, got float"),
    (lambda s, t: kdfast.HardDarkRank()(s, t[1:]), ValueError, "teacher must have the student's batch size"),
    (lambda s, t: kdfast.IRGEdge()(s, t[1:]), ValueError, "teacher must have the student's batch size"),
    (
        lambda s, t: kdfast.IRGTransformation()(s, t, t, t),
        ValueError,
        r"student_early must have student_late's shape \(5, 9\), got \(5, 3\)",
    ),
    (
        lambda s, t: kdfast.IRG()(s, t),
        ValueError,
        r"student must be a list \[map1, map2, feature, logits\], got Tensor",
    ),
    (lambda s, t: kdfast.IRG()([s] * 3, [t] * 4), ValueError, r"student must be a list .*, got 3 entries"),
    (
        lambda s, t: kdfast.IRG()([s] * 4, [t] * 4),
        ValueError,
        r"student\[0\] must be \(batch, channels, ",
    ),
    (
        lambda s, t: kdfast.IRG()([s[..., None, None], s[:, :5, None, None], s, s], []),
        ValueError,
        r"student\[1\] must have as many channels as student\[0\], 9, or twice as many, got 5",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(call, error, message):
    with kdfast.fallback(), pytest.raises(error, match=message):
        call(torch.randn(5, 9), torch.randn(5, 3))


def _all_ops(student, teacher, other):
    return (
        ops.rkd(student, teacher)
        + ops.rkd_distance(student, teacher)
        + ops.rkd_angle(student, teacher)
        + ops.pairwise_distance(student, other).square().sum()
        + ops.pairwise_distance(student, squared=True).sum()
    )


def _networks(implementation, rows, dtype):
    """Maps, features and logits of a student and of a teacher, for IRG."""
    shapes = (rows, 2, 6, 5), (rows, 4, 3, 2), (rows, 9), (rows, 4)
    return [[torch.randn(*shape).to(dtype).to(implementation.device) for shape in shapes] for _ in range(2)]


def _layers(implementation, rows=6, dtype=torch.float32):
    student, teacher = _networks(implementation, rows, dtype)
    return [*student, *teacher]


def _all_losses(*layers):
    student, teacher = layers[:4], layers[4:]
    return (
        kdfast.IRG()(student, teacher)
        + kdfast.IRGEdge()(student[2], teacher[0])
        + kdfast.IRGTransformation()(student[2], student[2] * 2, teacher[2], teacher[2] * 3)
        + kdfast.HardDarkRank(1.0, 1.0)(student[2], teacher[2])
        + kdfast.RKD()(student[1], teacher[0])
    )


def _inputs(implementation, rows=6, dtype=torch.float32):
    data = make(implementation, rows, 9, dtype)
    return data.student, data.teacher, data.other


@pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
def test_compile(implementation):
    behaviour.check_compiled(_all_ops, _inputs(implementation), backend="aot_eager")
    behaviour.check_compiled(_all_losses, _layers(implementation), backend="aot_eager")


@pytest.mark.parametrize("implementation", ["cpu", "cuda"], indirect=True)
def test_compile_inductor(implementation):
    behaviour.check_compiled(_all_ops, _inputs(implementation))
    behaviour.check_compiled(_all_losses, _layers(implementation))


@pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
def test_compile_dynamic(implementation):
    """Another batch size needs no graph break; sizes may be symbols."""
    torch.compiler.reset()
    compiled = torch.compile(_all_ops, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 6, 7):
        inputs = _inputs(implementation, rows)
        torch.testing.assert_close(compiled(*inputs), _all_ops(*inputs))


def test_autocast(implementation):
    """Embeddings are taken in the dtype in which they come, sums stay in float32."""
    behaviour.check_autocast(_all_ops, _inputs(implementation))
    for dtype in (torch.float32, torch.bfloat16):
        behaviour.check_autocast(_all_losses, _layers(implementation, dtype=dtype))


DETERMINISTIC = [
    (64, 100),  # several rows and tiles for each thread
    (33, 5),
    (5, 2100),  # sums over features in several blocks
    (300, 9),  # the fallback takes a few vertices at a time
]


@pytest.mark.parametrize("shape", DETERMINISTIC, ids=str)
def test_deterministic(implementation, shape, same_bits):
    """Equal bits from run to run, for any number of threads, and in any order of CUDA's threads."""
    if implementation.name == "simt" and shape[0] > 33:
        pytest.skip("a fiber per thread: a minute")
    data = make(implementation, *shape, torch.float32)

    def run():
        results = []
        for variant in VARIANTS.values():
            leaves = behaviour.leaves_of(variant.of(data))
            value = variant.call(ops, *leaves)
            results += [value, torch.autograd.grad(value.sum(), leaves[0])[0]]
        return results

    same_bits(run)


def test_losses_are_deterministic(implementation, same_bits):
    layers = _layers(implementation, 9)

    def run():
        leaves = behaviour.leaves_of(layers)
        loss = _all_losses(*leaves)
        return [loss, *torch.autograd.grad(loss, leaves)]

    same_bits(run)


@pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
def test_deterministic_algorithms_are_enough(implementation, deterministic_algorithms):
    for function, inputs in (
        (_all_ops, _inputs(implementation)),
        (_all_losses, _layers(implementation)),
    ):
        leaves = behaviour.leaves_of(inputs)
        grads = torch.autograd.grad(function(*leaves), leaves, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)


def test_transforms_refused(implementation):
    data = make(implementation, *SMALL)
    behaviour.check_refuses_transforms(lambda s: ops.rkd(s, data.teacher), data.student)
    behaviour.check_refuses_transforms(lambda s: ops.pairwise_distance(s).sum(), data.student)


def test_dtensor_refused(dtensor):
    plain = torch.randn(5, 9)
    for student, teacher, name in ((dtensor(plain), plain, "student"), (plain, dtensor(plain), "teacher")):
        with pytest.raises(TypeError, match=rf"{name} is a DTensor.*{name}.to_local\(\)"):
            ops.rkd_angle(student, teacher)


@pytest.mark.parametrize("implementation", ["fallback", "cpu"], indirect=True)
@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle", "rkd"])
def test_memory(implementation, name, threads):
    """Matrices of B x B, whatever the number of features, and not many: eight in float32 with two threads."""
    harness = pytest.importorskip("kdfast.bench").load("harness")
    threads(2)
    rows, cols = 384, 160
    data = make(implementation, rows, cols, torch.float32)
    student = data.student.requires_grad_()
    peak = harness.peak_cpu(lambda: getattr(ops, name)(student, data.teacher).backward())
    matrices = (peak - student.nbytes) / (4 * rows * rows)
    assert matrices <= (8 if implementation.kernel else 40)


# ---- CUDA only -------------------------------------------------------------------------------------------------------
def test_no_host_sync(cuda):
    behaviour.check_no_host_sync(_all_ops, _inputs(cuda, 64, torch.bfloat16))
    behaviour.check_no_host_sync(_all_losses, _layers(cuda, 64, torch.bfloat16))


def test_cuda_graph(cuda):
    behaviour.check_cuda_graph(_all_ops, _inputs(cuda, 64), _inputs(cuda, 64))
    layers, others = (_layers(cuda, 64) for _ in range(2))
    behaviour.check_cuda_graph(_all_losses, layers, others)
