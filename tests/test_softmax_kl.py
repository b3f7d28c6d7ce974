"""Softmax-KL and its relatives: what the contract of every op (test_ops_*.py) does not say."""

import math
import os
import subprocess
import sys
import warnings

import oracles
import pytest
import registry
import torch
from behaviour import LAYOUTS, check_oracle
from conftest import assert_close
from registry import Op
from registry.softmax_kl import added, dkd, of_rows, sizes_ce, sizes_kl, softmax_kl, top_k_of
from registry.softmax_kl import top_k as top_k_op

import kdfast
from kdfast import ops

INF = float("inf")
LOGITS, TOP_K = registry.family("softmax_kl").GROUPS
SMALL = LOGITS.small
every_op = pytest.mark.parametrize("op", [*LOGITS.ops, *TOP_K.ops], ids=str)


def ops_named(*names):
    return pytest.mark.parametrize("op", [LOGITS[name] for name in names], ids=str)


def make(implementation, rows, cols, *dtypes):
    """Logits of a student and a teacher, labels one of each kind, weights."""
    return LOGITS.inputs(implementation, (rows, cols), *dtypes)


def collecting(d):
    return LOGITS["kl"].collecting(d)


def given(op, d):
    """The inputs of the op from logits: a top-k op gets the teacher's largest."""
    return d if op.group is LOGITS else top_k_of(d)


def gradients(loss, d):
    return torch.autograd.grad(loss, (d.student, d.teacher), torch.ones_like(loss), allow_unused=True)


def run(op, d):
    """-> value and the gradients in the leaves."""
    x = op.collecting(given(op, d))
    value = op(ops, x)
    leaves = registry.tensors(x, op.leaves)
    return value, torch.autograd.grad(value, leaves, torch.ones_like(value), allow_unused=True)


# ---- arguments -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_label_dtypes(implementation, dtype):
    d = make(implementation, *SMALL)
    for op in (ops.cross_entropy_kl, ops.dkd):
        assert torch.equal(op(d.student, d.teacher, d.labels.to(dtype)), op(d.student, d.teacher, d.labels))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_reductions(implementation, reduction):
    """ "mean" is "batchmean": never divided by the number of classes."""
    d = make(implementation, *SMALL)
    rows = oracles.softmax_kl(d.student, d.teacher, 2.0, reduction="none")
    want = {"none": rows, "sum": rows.sum(), "mean": rows.mean(), "batchmean": rows.mean()}[reduction]
    torch.testing.assert_close(ops.softmax_kl(d.student, d.teacher, 2.0, reduction=reduction), want)
    got = ops.cross_entropy_kl(d.student, d.teacher, d.labels, 2.0, reduction=reduction)
    torch.testing.assert_close(got, oracles.cross_entropy_kl(d.student, d.teacher, d.labels, 2.0, reduction=reduction))
    got = ops.cross_entropy(d.student, d.labels, reduction=reduction)
    named = "mean" if reduction == "batchmean" else reduction
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(d.student, d.labels, reduction=named))


def test_weight(implementation):
    """A row of weight 0 counts as 0 even where it is infinite; the divisor stays the number of rows."""
    d = collecting(make(implementation, 4, 9))
    d.weight = torch.tensor([2.0, 0.0, 0.5, 1.0], dtype=torch.float64, device=d.student.device)
    broken = d.student.detach().clone()
    broken[1, :3] = -INF
    student = broken.requires_grad_()
    for beta in (0.0, 0.4, 1.0):
        loss = ops.softmax_kl(student, d.teacher, 3.0, beta=beta, weight=d.weight)
        keep = torch.tensor([0, 2, 3], device=student.device)
        rows = oracles.softmax_kl(d.student[keep], d.teacher[keep], 3.0, beta=beta, reduction="none")
        want = (d.weight[keep] * rows).sum() / 4
        torch.testing.assert_close(loss, want)
        grad, teacher_grad = torch.autograd.grad(loss, (student, d.teacher))
        want_grad, want_teacher = torch.autograd.grad(want, (d.student, d.teacher))
        torch.testing.assert_close(grad, want_grad)
        torch.testing.assert_close(teacher_grad, want_teacher)


def ignoring(ignore_index, reduction):
    options = {"kl_weight": 0.7, "ignore_index": ignore_index, "reduction": reduction}
    op = Op(
        "ignoring",
        lambda o, student, teacher, labels: o.cross_entropy_kl(student, teacher, labels, 2.0, **options),
        lambda g, student, teacher, labels: added(
            of_rows(g, sizes_kl(student, teacher, 2.0), 1.0, 2),
            of_rows(g, sizes_ce(student, labels % 9), 1.0, 2),
        ),
    )
    return LOGITS.bound(op)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_ignore_index(implementation, reduction):
    """Ignored rows leave the cross-entropy only, and its divisor."""
    d = make(implementation, 6, 9)
    for ignore_index in (-100, 3, 255):
        d.labels[1] = d.labels[4] = ignore_index
        check_oracle(ignoring(ignore_index, reduction), d)
        got = ops.cross_entropy(d.student, d.labels, ignore_index=ignore_index, reduction=reduction)
        want = torch.nn.functional.cross_entropy(d.student, d.labels, ignore_index=ignore_index, reduction=reduction)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_fully_ignored_batch(implementation, reduction):
    """0 with a graph and zero gradients, where torch's own mean is NaN."""
    student = make(implementation, *SMALL).student.requires_grad_()
    labels = torch.full((5,), -100, device=student.device)
    loss = ops.cross_entropy(student, labels, label_smoothing=0.1, reduction=reduction)
    assert loss.requires_grad and not loss.any()
    assert not torch.autograd.grad(loss.sum(), student)[0].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing(implementation, smoothing):
    d = collecting(make(implementation, *SMALL))
    for labels in (d.labels, d.probabilities):
        got = ops.cross_entropy(d.student, labels, label_smoothing=smoothing)
        want = torch.nn.functional.cross_entropy(d.student, labels, label_smoothing=smoothing)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(x, d.student)[0] for x in (got, want)))


def test_soft_labels(implementation):
    """Mixup: a mixture of one-hot labels is the mixture of the losses; targets need not sum to 1."""
    d = make(implementation, *SMALL)
    one, two = (torch.nn.functional.one_hot(x, 9).double() for x in (d.labels, d.labels.roll(1)))
    mixed = ops.cross_entropy_kl(d.student, d.teacher, 0.3 * one + 0.7 * two, 2.0)
    parts = [ops.cross_entropy_kl(d.student, d.teacher, labels, 2.0) for labels in (d.labels, d.labels.roll(1))]
    torch.testing.assert_close(mixed, 0.3 * parts[0] + 0.7 * parts[1])
    torch.testing.assert_close(ops.cross_entropy(d.student, 2 * one), 2 * ops.cross_entropy(d.student, d.labels))


def test_no_gradient_to_targets(implementation):
    d = collecting(make(implementation, *SMALL))
    probabilities = d.probabilities.clone().requires_grad_()
    loss = ops.cross_entropy_kl(d.student, d.teacher, probabilities)
    loss.backward()
    assert probabilities.grad is None and d.teacher.grad is not None
    with pytest.raises(ValueError, match="weight must not require a gradient"):
        ops.softmax_kl(d.student, d.teacher, weight=torch.ones(5, device=d.student.device, requires_grad=True))


# ---- a top-k teacher -------------------------------------------------------------------------------------------------
def top_k(d, k, temperature):
    """The same numbers for op and oracle, whose teacher is the same one in float64."""
    top = kdfast.TopK.of(d.teacher.double(), min(k, d.teacher.shape[1]), temperature)
    return top._replace(values=top.values.to(d.teacher.dtype), rest=top.rest.float())


def check_top_k(d, top, temperature):
    """Against the oracle, without a reduction; `top` with or without the rest."""
    values, indices, rest = (*top, None)[:3]
    op = TOP_K.bound(top_k_op("given", temperature, has_rest=rest is not None, reduction="none"))
    unread = values[:, 0]
    others = {"rest": unread if rest is None else rest, "weight": unread}
    check_oracle(op, registry.Inputs(student=d.student, values=values, indices=indices, **others))


@pytest.mark.parametrize("shape", [(3, 9), (2, 33), (2, 2049)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_top_k_of_all_classes(implementation, shape, temperature):
    """k = C is the whole teacher, in any order of the classes."""
    d = make(implementation, *shape)
    order = torch.rand(shape, device=d.student.device).argsort(1)
    shuffled = (d.teacher.gather(1, order), order)
    for top in (kdfast.TopK.of(d.teacher, shape[1], temperature), shuffled):
        (student, whole) = (collecting(d).student for _ in range(2))
        got, want = ops.softmax_kl(student, top, temperature), ops.softmax_kl(whole, d.teacher, temperature)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(*x)[0] for x in ((got, student), (want, whole))))


@pytest.mark.parametrize(
    ("shape", "k"),
    [
        ((3, 9), 1),
        ((3, 2048), 100),  # the longest row of a warp, more classes than it has lanes
        ((1, 16385), 1100),  # classes on both sides of what a block marks, more than the CPU reads at a time
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_top_k(implementation, shape, k, dtype):
    d = make(implementation, *shape, dtype)
    top = top_k(d, k, 2.0)
    check_top_k(d, top, 2.0)
    shuffle = torch.randperm(k, device=d.student.device)
    check_top_k(d, (top.values[:, shuffle], top.indices[:, shuffle]), 2.0)


def test_top_k_is_at_most_the_whole(implementation):
    """Classes seen as one hide what they differ in; where they differ alike, nothing."""
    d = make(implementation, 4, 40)
    whole = ops.softmax_kl(d.student, d.teacher, 2.0, reduction="none")
    before = torch.zeros_like(whole)
    for k in (1, 3, 10, 40):
        now = ops.softmax_kl(d.student, kdfast.TopK.of(d.teacher, k, 2.0), 2.0, reduction="none")
        assert (now >= before - 1e-9).all() and (now <= whole + 1e-9).all()
        before = now
    top = kdfast.TopK.of(d.teacher, 5, 2.0)
    shifted = (d.teacher + 3).scatter(1, top.indices, d.student.gather(1, top.indices))
    torch.testing.assert_close(ops.softmax_kl(shifted, top, 2.0), ops.softmax_kl(shifted, d.teacher, 2.0))


def test_top_k_without_rest(implementation):
    """As a teacher that is -inf at the other classes, at any temperature."""
    d = make(implementation, *SMALL)
    values, indices = d.teacher.topk(4)
    dense = torch.full_like(d.teacher, -INF).scatter(1, indices, values)
    for temperature in (0.1, 1.0, 20.0):
        want = ops.softmax_kl(d.student, dense, temperature)
        torch.testing.assert_close(ops.softmax_kl(d.student, (values, indices), temperature), want)
        nothing = torch.full((5,), -INF, device=d.student.device)
        torch.testing.assert_close(
            ops.softmax_kl(d.student, (values, indices, nothing, temperature), temperature), want
        )


def test_top_k_temperature(implementation):
    """The rest belongs to one temperature."""
    d = make(implementation, *SMALL)
    top = kdfast.TopK.of(d.teacher, 3, 4.0)
    with pytest.raises(ValueError, match="at temperature 4.0, which does not tell that at temperature 2.0: store it"):
        ops.softmax_kl(d.student, top, 2.0)
    for temperature in (0.05, 20.0):
        check_top_k(d, top_k(d, 3, temperature), temperature)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_top_k_dtypes(implementation, dtype):
    """Classes in any integer type, values and rest in any floating-point type."""
    d = make(implementation, *SMALL, torch.float32, torch.float16)
    top = top_k(d, 4, 2.0)
    assert top.values.dtype == torch.float16
    as_stored = top._replace(indices=top.indices.to(dtype), rest=top.rest.half())
    check_top_k(d, as_stored, 2.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_top_k_layouts(implementation, layout):
    d = make(implementation, 3, 35, torch.float32)
    top = top_k(d, 5, 2.0)
    values, rest = LAYOUTS[layout](top.values), torch.stack([top.rest] * 2, 1)[:, 1]
    if layout == "columns_expanded":
        indices = top.indices  # equal classes are none
    else:
        indices = LAYOUTS[layout](top.indices)
    check_top_k(d, kdfast.TopK(values, indices, rest, 2.0), 2.0)


@pytest.mark.parametrize("low", [-1e9, -1e4, -200.0, -INF])
def test_top_k_student_without_the_rest(implementation, low):
    """All other classes far below the kept ones, where their probability underflows: a finite loss all the same."""
    d = make(implementation, 3, 20, torch.float32)
    top = top_k(d, 4, 1.0)
    d.student = d.student.scatter(1, top.indices, 5.0)
    kept = torch.zeros_like(d.student, dtype=torch.bool).scatter(1, top.indices, True)
    d.student = torch.where(kept, d.student, d.student + low)
    loss = ops.softmax_kl(d.student, top)
    assert not loss.isnan() and loss.isinf() == (low == -INF)
    check_top_k(d, top, 1.0)
    check_top_k(d, top[:2], 1.0)


def test_top_k_unusable_indices(implementation):
    """No class, or a class twice: an error where the host can look; else the row is NaN, memory untouched."""
    d = collecting(make(implementation, *SMALL))
    values, indices, rest, *_ = kdfast.TopK.of(d.teacher, 4)
    twice = int(indices[3, 0])
    for at, index in ((1, -1), (2, 9), (0, 2**40), (3, -(2**63)), (2, twice)):
        bad = indices.clone()
        bad[3, at] = index
        what = "which the row has already" if index == twice else "expected a class from 0 to 8"
        if implementation.raises_on_labels:
            with pytest.raises((ValueError, RuntimeError), match=rf"teacher.indices\[3, {at}\] is {index}, {what}"):
                ops.softmax_kl(d.student, (values, bad, rest))
            continue
        assert ops.softmax_kl(d.student, (values, bad, rest)).isnan()
        rows = ops.softmax_kl(d.student, (values, bad, rest), reduction="none")
        assert rows.isnan().tolist() == [False, False, False, True, False]
        grad, _ = gradients(rows, d)
        assert grad.isfinite().all(1).tolist() == [True, True, True, False, True]


def test_top_k_in_kd(implementation):
    d = collecting(make(implementation, *SMALL))
    top = kdfast.TopK.of(d.teacher, 3, 4.0)
    kl = oracles.softmax_kl(d.student, top, 4.0, reduction="none")
    torch.testing.assert_close(kdfast.KD(4.0)(d.student, top), kl.mean())
    ce = oracles.cross_entropy(d.student, d.labels, label_smoothing=0.1, reduction="none")
    for reduction, reduce in (("batchmean", torch.mean), ("none", lambda rows: rows)):
        loss = kdfast.KD(4.0, alpha=0.7, label_smoothing=0.1, reduction=reduction)
        torch.testing.assert_close(loss(d.student, top, d.labels), reduce(0.7 * kl + 0.3 * ce))
    broken = d.student.detach().clone().fill_(-INF)
    broken[:, 0] = 0
    labels = torch.zeros_like(d.labels)
    assert ops.cross_entropy_kl(broken, top, labels, 4.0) == INF
    assert ops.cross_entropy_kl(broken, top, labels, 4.0, kl_weight=0) == 0


TOP_K_ERRORS = [
    (lambda s, t: (t[0],), ValueError, r"got a tuple of 1"),
    (lambda s, t: (*t, 1.0, "rest", 2), ValueError, r"got a tuple of 6"),
    (
        lambda s, t: (t[0][:4], t[1][:4]),
        ValueError,
        r"teacher.values must be \(5, k\) with k from 1 to 9 .* got \(4, 3\)",
    ),
    (lambda s, t: (t[0][:, :0], t[1][:, :0]), ValueError, r"teacher.values must be \(5, k\)"),
    (lambda s, t: (t[0].repeat(1, 4), t[1].repeat(1, 4)), ValueError, r"k from 1 to 9 .* got \(5, 12\)"),
    (lambda s, t: (t[1], t[1]), TypeError, "teacher.values must be float32"),
    (lambda s, t: (t[0], t[0]), TypeError, "teacher.indices must be integers, got torch.float32"),
    (lambda s, t: (t[0], t[1][:, :2]), ValueError, r"teacher.indices must have the shape of teacher.values \(5, 3\)"),
    (lambda s, t: (t[0], t[1].to("meta")), ValueError, "teacher.indices must be on the student's device"),
    (lambda s, t: (t[0], t[1], t[2][:, None]), ValueError, r"teacher.rest must have shape \(5,\), got \(5, 1\)"),
    (lambda s, t: (t[0], t[1], t[2].long()), TypeError, "teacher.rest must be float32"),
    (lambda s, t: (t[0].clone().requires_grad_(), t[1]), ValueError, "teacher.values must not require a gradient"),
    (lambda s, t: (*t, 0), ValueError, "teacher.temperature must be finite and above 0, got 0"),
]


@pytest.mark.parametrize(("teacher", "error", "message"), TOP_K_ERRORS, ids=[message for *_, message in TOP_K_ERRORS])
def test_top_k_errors(teacher, error, message):
    logits = torch.randn(5, 9)
    with kdfast.fallback(), pytest.raises(error, match=message):
        ops.softmax_kl(torch.randn(5, 9), teacher(None, kdfast.TopK.of(logits, 3)[:3]))


def test_top_k_of_errors():
    logits = torch.randn(5, 9)
    for call, error, message in (
        (lambda: kdfast.TopK.of(logits, 10), ValueError, "k must be at most the number of classes 9, got 10"),
        (lambda: kdfast.TopK.of(logits, 0), ValueError, "k must be at least 1, got 0"),
        (lambda: kdfast.TopK.of(logits[0], 1), ValueError, r"logits must be \(batch, classes\) or"),
        (lambda: kdfast.TopK.of(logits, 1, 0.0), ValueError, "temperature must be finite and above 0"),
        (lambda: ops.softmax_kl(logits, kdfast.TopK.of(logits, 1), beta=1.5), ValueError, "beta must be from 0 to 1"),
        (
            lambda: ops.softmax_kl(logits, kdfast.TopK.of(logits, 1), standardize=True),
            ValueError,
            "a top-k teacher takes neither teacher_temperature nor standardize",
        ),
        (
            lambda: ops.dkd(logits, kdfast.TopK.of(logits, 1), None),
            TypeError,
            "teacher must be a torch.Tensor, got TopK",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


# ---- edges -----------------------------------------------------------------------------------------------------------
@every_op
@pytest.mark.parametrize("shape", [SMALL, (1, 2050)], ids=str)
def test_edges_minus_infinity_on_both_sides(implementation, op, shape):
    """Masked classes are as good as absent. With smoothing, a masked class is a target that cannot be met: +inf."""
    data = make(implementation, *shape, torch.float32)
    cols = shape[1]
    masked = torch.zeros(cols, dtype=torch.bool)
    masked[[0, 4, cols - 1]] = True
    data.student[:, masked] = data.teacher[:, masked] = -INF
    data.labels.fill_(2)
    data.probabilities[:, masked] = 0
    loss, grads = run(op, data)
    assert all(g.isfinite().all() for g in grads if g is not None)
    if op.name in ("ce_kl_smooth", "ce_kl_soft"):
        assert (loss == INF).all()
        return
    assert loss.isfinite().all()
    assert not any(g[:, masked].any() for g in grads if g is not None)
    check_oracle(op, given(op, data))
    keep = ~masked
    kept = registry.Inputs(data, student=data.student[:, keep], teacher=data.teacher[:, keep], labels=data.labels - 1)
    torch.testing.assert_close(loss, op(ops, given(op, kept)), rtol=1e-5, atol=1e-6)


@ops_named("kl", "kl_weighted", "ce_kl", "dkd", "reverse", "jsd")
def test_edges_minus_infinity_of_weight_zero(implementation, op):
    """-inf where only the weighting side has it: that class adds nothing; the other side still gets its gradient."""
    data = make(implementation, *SMALL, torch.float32)
    data.labels.fill_(2)
    for side in {"reverse": ["student"], "jsd": ["student", "teacher"]}.get(op.name, ["teacher"]):
        d = registry.Inputs(data, **{side: data[side].clone()})
        d[side][:, 5] = -INF
        check_oracle(op, d)


@ops_named("kl", "reverse", "ce_kl", "dkd")
def test_edges_minus_infinity_elsewhere(implementation, op):
    """+inf as the formula says, only in the rows concerned, and never a NaN in the gradient."""
    data = make(implementation, *SMALL, torch.float32)
    data.labels.fill_(2)
    broken = data.teacher if op.name == "reverse" else data.student
    broken[1, 5] = -INF
    loss, grads = run(op, data)
    assert loss == INF
    assert all(g.isfinite().all() for g in grads)
    rest = torch.arange(5, device=data.student.device) != 1
    others = registry.mapped(data, lambda name, t: t[rest])
    exact = op.collecting(registry.widened(others))
    for got, expected in zip(grads, gradients(op(oracles, exact), exact), strict=True):
        torch.testing.assert_close(got[rest].double(), expected * 4 / 5, rtol=1e-4, atol=1e-6)


@every_op
def test_edges_rows_without_any_class(implementation, op):
    """-inf everywhere on both sides: an empty distribution. No NaN in any divergence nor in any gradient."""
    data = make(implementation, *SMALL, torch.float32)
    data.student[1] = data.teacher[1] = -INF
    loss, grads = run(op, data)
    assert not loss.isnan().any()
    if op.name in ("kl", "kl_weighted", "reverse", "jsd", "dkd"):
        assert loss.isfinite().all()
    assert all(g is None or g.isfinite().all() for g in grads)


@every_op
def test_edges_teacher_underflow(implementation, op):
    """Confident networks: all but one probability underflows, also where they disagree."""
    data = make(implementation, 4, 9, torch.float32)
    data.teacher *= 1 / 3
    data.teacher[:, 3] += 1000
    data.student[1] = data.teacher[1]
    data.student[2, 3] += 1000
    data.student[3, 4] += 1000
    data.labels = torch.tensor([3, 3, 4, 0], device=data.labels.device)
    check_oracle(op, given(op, data))


@pytest.mark.parametrize("beta", [0.5, 0.1, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_edges_mixture_underflow(implementation, dtype, beta):
    """Probabilities down to the smallest number there is: a share of it is 0, but its logarithm must not count."""
    deepest = math.log(torch.finfo(dtype).tiny * torch.finfo(dtype).eps)
    rows = 32 if implementation.name == "simt" else 128
    logits = torch.zeros(rows, 2, dtype=dtype, device=implementation.device)
    logits[:, 1] = torch.linspace(deepest - 1, deepest + 8, rows)
    none = logits.clone()
    none[:, 1] *= 2
    op = LOGITS.bound(softmax_kl("mixture", beta=beta, reduction="none"))
    for other in (none, logits.flip(0)):
        check_oracle(op, registry.Inputs(student=logits, teacher=other))
        check_oracle(op, registry.Inputs(student=other, teacher=logits))


@every_op
@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_edges_large_offsets(implementation, op, offset):
    """An offset of all logits changes nothing, and costs only the digits that the inputs lose."""
    data = make(implementation, *SMALL, torch.float32)
    data.student, data.teacher = data.student + offset, data.teacher - offset / 2
    check_oracle(op, given(op, data))


@every_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_edges_huge_logits(implementation, op, dtype):
    """Logits of 1e4: losses of that size, finite gradients."""
    data = make(implementation, *SMALL, dtype)
    data.student, data.teacher = 3e3 * data.student, 3e3 * data.teacher
    check_oracle(op, given(op, data))


@pytest.mark.parametrize("temperature", [0.05, 0.3, 20.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_edges_temperatures(implementation, temperature, dtype):
    data = make(implementation, *SMALL, dtype)
    for beta in (0.0, 0.5, 1.0):
        check_oracle(LOGITS.bound(softmax_kl("kl", temperature, beta=beta)), data)
    check_oracle(LOGITS.bound(dkd("dkd", temperature, beta=1.0)), data)


def test_edges_labels_out_of_range(implementation):
    """An error before any kernel where the host can look; else the row and a reduced loss are NaN, memory untouched."""
    d = collecting(make(implementation, *SMALL))
    for label in (-1, 9, 2**40, -(2**62)):
        labels = d.labels.clone()
        labels[3] = label
        for op in (ops.cross_entropy_kl, ops.dkd):
            if implementation.raises_on_labels:
                with pytest.raises(
                    (ValueError, RuntimeError), match=rf"labels\[3\] is {label}, expected a class from 0 to 8"
                ):
                    op(d.student, d.teacher, labels)
            else:
                assert op(d.student, d.teacher, labels).isnan()
        if not implementation.raises_on_labels:
            rows = ops.cross_entropy_kl(d.student, d.teacher, labels, reduction="none")
            assert rows.isnan().tolist() == [False, False, False, True, False]
            grad, _ = gradients(rows, d)
            assert grad.isfinite().all(1).tolist() == [True, True, True, False, True]


def test_more_than_2_31_elements(implementation):
    """One row of logits seen as two million: more elements, and offsets of gradients, than 32 bits can count."""
    if implementation.name in ("fallback", "simt"):
        pytest.skip("the fallback would need tens of GiB, SIMT hours")
    if implementation.name == "cpu" and os.environ.get("KDFAST_TEST_LARGE") != "1":
        pytest.skip("needs 12 GiB: KDFAST_TEST_LARGE=1")
    rows, cols = 2**31 // 1000 + 5, 1000
    d = make(implementation, 1, cols, torch.bfloat16)
    student = d.student.expand(rows, cols).requires_grad_()
    loss = ops.softmax_kl(student, d.teacher.expand(rows, cols), 4.0, reduction="sum")
    one = collecting(d)
    want = ops.softmax_kl(one.student, one.teacher, 4.0, reduction="sum")
    torch.testing.assert_close(loss, want * rows)
    (grad,) = torch.autograd.grad(loss, student)
    assert torch.equal(grad[-1:], torch.autograd.grad(want, one.student)[0])
    assert torch.equal(grad[rows // 2 : rows // 2 + 1], grad[-1:])


# ---- behaviour in PyTorch --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
def test_compile_dynamic(implementation):
    """Another batch size or temperature needs no graph break; sizes and numbers may be symbols."""
    torch.compiler.reset()
    by_argument = torch.compile(ops.softmax_kl, fullgraph=True, backend="aot_eager")
    for rows, temperature in ((5, 2.0), (6, 3.0), (7, 4.0)):
        d = make(implementation, rows, 9)
        got, want = (f(d.student, d.teacher, temperature) for f in (by_argument, ops.softmax_kl))
        torch.testing.assert_close(got, want)


def test_autocast(implementation):
    """Logits that autocast itself made are taken in the dtype in which they come."""
    d = make(implementation, *SMALL, torch.float32)
    leaves = collecting(d)
    with torch.autocast(implementation.device.type, dtype=torch.bfloat16):
        product = torch.nn.functional.linear(leaves.student, torch.eye(9, device=leaves.student.device))
        assert product.dtype == torch.bfloat16
        from_autocast = ops.softmax_kl(product, leaves.teacher)
    assert from_autocast.dtype == torch.float32
    assert torch.equal(from_autocast, ops.softmax_kl(d.student.bfloat16(), d.teacher))
    assert torch.autograd.grad(from_autocast, leaves.student)[0].dtype == torch.float32


def test_sum_over_many_rows(implementation):
    """8193 rows: one more than one block adds up, so that the sum has two levels."""
    d = make(implementation, 8193, 2, torch.float32)
    d.labels[::3] = -100  # the rows kept are summed, too
    size = sizes_ce(d.student, d.labels)[0].sum() / (d.labels >= 0).sum()
    assert_close(
        ops.cross_entropy(d.student, d.labels), oracles.cross_entropy(d.student, d.labels), size, 2, torch.float32
    )
    if implementation.name == "simt":
        return  # a fiber per thread: the rest would take a minute
    check_oracle(LOGITS["kl"], make(implementation, 8193, 5, torch.float32))
    check_oracle(LOGITS["ce"], make(implementation, 8193, 5, torch.float32))


def test_parameters_are_logits_too(implementation):
    """Logits may be optimised themselves."""
    d = make(implementation, *SMALL)
    parameter = torch.nn.Parameter(d.student)
    ops.softmax_kl(parameter, d.teacher).backward()
    assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("beta", [1e-3, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("empty", ["student", "teacher"])
def test_a_mixture_with_an_empty_row(implementation, beta, empty):
    """A row that is -inf everywhere has no mass: the other is compared with its own share of the mixture."""
    d = make(implementation, 2, 5)
    d[empty] = torch.full_like(d[empty], -INF)
    x = {name: d[name].clone().requires_grad_() for name in ("student", "teacher")}
    value = ops.softmax_kl(x["student"], x["teacher"], beta=beta, reduction="none")
    share = 1 - beta if empty == "teacher" else beta
    torch.testing.assert_close(value, torch.full_like(value, -share * math.log(share)))
    for grad in torch.autograd.grad(value.sum(), list(x.values())):  # that of a constant
        torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-15, rtol=0)


# ---- choosing a path -------------------------------------------------------------------------------------------------
def run_python(code, **environment):
    """Runs `code` in a new process in which kdfast has no compiled kernels."""
    hide = (
        "import glob, os.path\nfiles, exists = glob.glob, os.path.exists\n"
        "glob.glob = lambda p, *a, **k: [] if p == '_cpu_*.so' else files(p, *a, **k)\n"
        "os.path.exists = lambda p: not str(p).endswith('_cuda.so') and exists(p)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True, env=env)


def test_fallback_warns_once():
    code = (
        "import warnings, torch, kdfast\nx = torch.randn(2, 3)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    with kdfast.fallback(): kdfast.KD()(x, x)\n"
        "    assert not seen, seen\n"
        "    kdfast.KD()(x, x); kdfast.KD()(x, x); kdfast.ReverseKD()(x, x)\n"
        "assert [w.category for w in seen] == [kdfast.FallbackWarning], seen\n"
        "text = str(seen[0].message)\n"
        "assert 'softmax_kl' in text and 'fallback on cpu' in text and 'kdfast doctor' in text, text\n"
    )
    done = run_python(code, KDFAST_REQUIRE_KERNELS="0")
    assert done.returncode == 0, done.stderr


def test_require_kernels():
    done = run_python("import torch, kdfast\nx = torch.randn(2, 3)\nkdfast.KD()(x, x)", KDFAST_REQUIRE_KERNELS="1")
    assert done.returncode != 0 and "KDFAST_REQUIRE_KERNELS=1 makes this an error" in done.stderr


def test_kernels_run_without_a_warning(implementation):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for op in (*LOGITS.ops, *TOP_K.ops):
            assert all(g is None or g.isfinite().all() for g in run(op, make(implementation, *SMALL))[1])


# ---- CUDA only -------------------------------------------------------------------------------------------------------
def test_checked_labels(cuda, monkeypatch):
    """KDFAST_CHECK=1 looks at labels on the device, and waits for it."""
    monkeypatch.setenv("KDFAST_CHECK", "1")
    d = make(cuda, *SMALL)
    d.labels[3] = 9
    with pytest.raises(ValueError, match=r"labels\[3\] is 9"):
        ops.dkd(d.student, d.teacher, d.labels)
    values, indices = d.teacher.topk(2)
    indices[3, 1] = indices[3, 0]
    with pytest.raises(ValueError, match=r"teacher.indices\[3, 1\] is .* which the row has already"):
        ops.softmax_kl(d.student, (values, indices))
