"""Distances and angles among rows: what the contract of every op (test_ops_*.py) does not say."""

import behaviour
import oracles
import pytest
import registry
import torch
from behaviour import FLOATS, check_oracle
from conftest import assert_close
from registry.pairwise import make_layers

import kdfast
from kdfast import ops
from kdfast.ops.layout import flat_rows

raw = torch.ops.kdfast
PAIR, SETS = registry.family("pairwise").GROUPS
SMALL = (5, 9)
every_op = pytest.mark.parametrize("op", [*PAIR.ops, *SETS.ops], ids=str)
every_loss = pytest.mark.parametrize("op", PAIR.ops, ids=str)


def make(implementation, shape, dtype=torch.float64):
    """One batch of a student and of a teacher."""
    return PAIR.inputs(implementation, shape, dtype)


def networks_of(implementation, rows, dtype):
    layers = make_layers(implementation.device, rows, dtype)
    return layers[:4], layers[4:]


# ---- ops -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", SETS.cases, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weighted_differences(implementation, shape, dtype):
    """factor * sum_j w_ij (x_i - y_j): y or x itself, weights of any strides, with and without a factor."""
    if implementation.name == "simt" and not SETS.simt(shape, dtype):
        pytest.skip("nothing new to CUDA")
    x, y = SETS.inputs(implementation, shape, dtype).values()
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


@pytest.mark.parametrize(("rows", "cols"), [(130, 70), (200, 20)], ids=["in pieces", "whole"])
def test_large_tiles(implementation, rows, cols):
    """Matrices of several large tiles on CUDA, whose features are cut into pieces if there are few tiles."""
    x, y = (torch.randn(n, cols, device=implementation.device) for n in (rows, rows + 3))
    for other in (x, y):
        want = (x.double()[:, None] - other.double()).square().sum(2)
        got = ops.pairwise_distance(x, None if other is x else other, squared=True)
        assert_close(got, want, want, cols, torch.float32)
        assert torch.equal(got, got.t()) or other is y


@every_op
def test_more_dimensions(implementation, op):
    """Maps are flattened, whatever their memory format; the gradient has the shape of the map."""
    x = op.group.inputs(implementation, (4, 24))
    maps = [t[:, : t.shape[1] // 4 * 4].contiguous().unflatten(1, (-1, 2, 2)) for t in registry.tensors(x, op.inputs)]
    first, *others = behaviour.leaves_of(maps)
    want = op.call(ops, *(t.flatten(1) for t in (first, *others)))
    (want_grad,) = torch.autograd.grad(want.sum(), first)
    for one in (torch.contiguous_format, torch.channels_last):
        for two in (torch.contiguous_format, torch.channels_last):
            leaf = first.detach().contiguous(memory_format=one).requires_grad_()
            got = op.call(ops, leaf, *(t.contiguous(memory_format=two) for t in others))
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(torch.autograd.grad(got.sum(), leaf)[0], want_grad)


def test_maps_are_not_copied():
    """Features may come in any order, but in the same one for two sets."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        maps = torch.randn(3, 4, 5, 6).contiguous(memory_format=memory_format)
        assert flat_rows(maps).shape == (3, 120) and flat_rows(maps).data_ptr() == maps.data_ptr()
        for other in (torch.contiguous_format, torch.channels_last):
            assert torch.equal(flat_rows(maps.contiguous(memory_format=other), maps), flat_rows(maps))


def test_a_set_twice(implementation):
    """Distances of a set to itself, as another or not, have one gradient."""
    student = make(implementation, SMALL)["student"].requires_grad_()
    twice = ops.pairwise_distance(student, student)
    torch.testing.assert_close(
        *(torch.autograd.grad(d.square().sum(), student)[0] for d in (twice, ops.pairwise_distance(student)))
    )


def test_weights_are_made_where_they_are_needed(implementation):
    student, teacher = make(implementation, SMALL).values()
    loss, weights = raw.rkd(student, teacher, 25.0, 50.0, True)
    alone, none = raw.rkd(student, teacher, 25.0, 50.0, False)
    assert weights.shape == (5, 5) and torch.equal(weights, weights.t()) and torch.equal(loss, alone)
    assert none.shape == (0,)


def test_terms(implementation):
    """rkd is the weighted sum of both terms, and does without a term of weight 0."""
    student, teacher = make(implementation, SMALL).values()
    student.requires_grad_()
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
    x = make(implementation, shape, dtype)["student"]
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


EQUAL_ROWS = {
    "in_both": ([(0, 3), (1, 4)], [(0, 3), (1, 4)]),
    "in_student": ([(0, 3), (1, 4), (1, 2)], []),
    "in_teacher": ([], [(0, 3), (1, 4), (1, 2)]),
    "elsewhere": ([(0, 3)], [(1, 4)]),
}


@pytest.mark.parametrize("where", EQUAL_ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_op
def test_edges_equal_rows(implementation, op, where, dtype):
    """Finite everywhere: a pair of equal rows has no direction, so that it moves nothing."""
    x = op.group.inputs(implementation, (7, 9), dtype)
    for t, pairs in zip(x.values(), EQUAL_ROWS[where], strict=True):
        for i, j in pairs:
            t[j] = t[i]
    if "y" in x:
        x["y"][1] = x["x"][3]
    check_oracle(op, x)


@every_loss
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_edges_all_rows_equal(implementation, op, side):
    x = make(implementation, SMALL, torch.float32)
    for name in x:
        if side in (name, "both"):
            x[name].copy_(x[name][:1].clone().expand_as(x[name]))
    _, (grad, _) = check_oracle(op, x)
    assert side == "teacher" or not grad.any()


@every_op
def test_edges_one_row(implementation, op):
    """0 with a graph, where the official code gives NaN."""
    x = op.collecting(op.group.inputs(implementation, (1, 9), torch.float32))
    value = op(ops, x)
    assert value.requires_grad and value.isfinite().all()
    (grad,) = torch.autograd.grad(value.sum(), registry.tensors(x, op.leaves)[:1])
    assert grad.shape == (1, 9) and grad.isfinite().all()
    assert "y" in op.inputs or not (value.any() or grad.any())


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


@pytest.mark.parametrize("place", [_offset_rows, _close_rows, _both], ids=lambda f: f.__name__.strip("_"))
@every_op
def test_edges_accuracy(implementation, op, place):
    """float32 gradients within 1e-5 of the largest entry, where scalar products lose 3e-3; within the rule, too."""
    x = op.group.inputs(implementation, (32, 24), torch.float32)
    for t in x.values():
        place(t)
    _, (got, *_) = check_oracle(op, x)
    exact = op.collecting(registry.widened(x))
    (want,) = torch.autograd.grad(op(oracles, exact).sum(), registry.tensors(exact, op.leaves)[:1])
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


@every_loss
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_edges_scale(implementation, op, scale):
    """Ratios of distances and angles do not see the scale of the embeddings."""
    x = make(implementation, SMALL, torch.float32)
    x["student"] *= scale
    check_oracle(op, x)


def test_edges_below_the_least_distance(implementation):
    """Rows nearer than 1e-6 count as 1e-6 apart, which is a constant."""
    x = make(implementation, SMALL)
    x["student"][3] = x["student"][1] + 1e-8
    x["teacher"][4] = x["teacher"][2] + 1e-8
    check_oracle(PAIR["rkd_distance"], x)


# ---- losses ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_losses_without_pairs(implementation, rows, dtype):
    """0 with a graph, and in float32 or better, as of any batch; IRG's vertices are compared without pairs, too."""
    student, teacher = networks_of(implementation, rows, dtype)
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
    student, teacher = make(implementation, (7, 9)).values()
    teacher[4] = teacher[1]
    teacher[6] = teacher[5]
    student, exact = behaviour.leaves_of([student, student])
    loss = kdfast.HardDarkRank(0.5, 1.0, 3)(student, teacher)
    want = oracles.HardDarkRank(exact, teacher, 0.5, 1.0, 3)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], torch.autograd.grad(want, exact)[0])
    networks = networks_of(implementation, 5, torch.float32)
    student, teacher = ([x[:1].expand_as(x) for x in layers] for layers in networks)
    leaves = behaviour.leaves_of(student)
    for loss in (
        kdfast.IRGEdge()(leaves[2], teacher[2]),
        kdfast.IRGTransformation()(leaves[2], leaves[2].detach(), teacher[2], teacher[2]),
        kdfast.IRG(vertex_weight=0.0)(leaves, teacher),
    ):
        assert loss == 0
        assert all(g is None or not g.any() for g in torch.autograd.grad(loss, leaves, allow_unused=True))
