"""The contract of every op in tests/registry/: values and gradients are those of the formula."""

import itertools

import oracles
import pytest
import registry
import torch
from behaviour import FLOATS, HALVES, check_oracle

from kdfast import ops
from kdfast.ops import blocks

OPS = registry.every_op()
every_op = pytest.mark.parametrize("op", OPS, ids=str)
CASES = [(op, shape) for op in OPS for shape in op.group.cases]


@pytest.mark.parametrize(("op", "shape"), CASES, ids=[f"{op}-{shape}" for op, shape in CASES])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matches_oracle(implementation, op, shape, dtype):
    if implementation.name == "simt" and not op.group.simt(shape, dtype):
        pytest.skip("no boundary of the CUDA kernels, or slow and covered by others")
    x = op.group.inputs(implementation, shape, dtype)
    check_oracle(op, x, op.upstream(x))


LAST = [(op, shape) for op in OPS for shape in op.group.channels_last]


@pytest.mark.parametrize(("op", "shape"), LAST, ids=[f"{op}-{shape}" for op, shape in LAST])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_matches_oracle_channels_last(implementation, op, shape, dtype):
    x = op.group.in_format(op.group.inputs(implementation, shape, dtype), torch.channels_last)
    check_oracle(op, x, op.upstream(x))


@every_op
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_low_precision(implementation, op, dtype):
    """float32 accumulation and result, gradients in the inputs' dtype; exact in the rounded inputs."""
    for memory_format in op.group.memory_formats:
        x = op.group.in_format(op.group.inputs(implementation, op.group.half, dtype), memory_format)
        value, _ = check_oracle(op, x, op.upstream(x))
        assert value.dtype == torch.float32


@every_op
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float32, torch.float32, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes(implementation, op, dtypes):
    """Each input in a dtype of its own, and its gradient; a single float64 makes everything float64."""
    x = op.group.inputs(implementation, op.group.small, *dtypes)
    if len({t.dtype for t in registry.tensors(x, op.inputs) if t.is_floating_point()}) == 1:
        pytest.skip("one floating-point input")
    check_oracle(op, x, op.upstream(x))


@every_op
def test_gradcheck(implementation, op):
    if op.gradcheck is None:
        pytest.skip("a gradient is stopped that exists")
    for memory_format in op.group.memory_formats:
        x = op.collecting(op.group.in_format(op.group.inputs(implementation, op.group.tiny), memory_format))
        leaves = registry.tensors(x, op.leaves)
        grads = torch.autograd.grad(op.total(x), leaves, allow_unused=True)
        learns = [t if g is not None else t.detach() for t, g in zip(leaves, grads, strict=True)]
        assert torch.autograd.gradcheck(
            lambda *t, x=x: op.gradcheck(op(ops, registry.replaced(x, op.leaves, t))), learns
        )


@every_op
def test_upstream_gradients(implementation, op):
    """Scaled, negative, tiny and 0, each one number for all entries with stride 0; others with gaps between them."""
    x = op.group.inputs(implementation, op.group.small, torch.float32)
    like = op.upstream(x)
    for factor in (3.0, -0.25, 1e-30, 0.0):
        check_oracle(op, x, torch.full((), factor, dtype=torch.float64).to(like).expand_as(like))
    if like.dim():
        check_oracle(op, x, torch.stack([like, like], -1)[..., 1])


@every_op
def test_gradient_paths(implementation, op):
    """One leaf at a time gets the gradient that it gets among all; without one, or without a graph, there is none."""
    x = op.group.inputs(implementation, op.group.small)
    leaves = op.collecting(x)
    value = op(ops, leaves)
    upstream = op.upstream(x).to(value.dtype)
    both = torch.autograd.grad(value, registry.tensors(leaves, op.leaves), upstream, allow_unused=True)
    for i, want in enumerate(both):
        tensors = [t.detach().clone().requires_grad_(i == j) for j, t in enumerate(registry.tensors(x, op.leaves))]
        alone = op(ops, registry.replaced(x, op.leaves, tensors))
        assert torch.equal(alone, value)
        if want is None:
            none = (
                torch.autograd.grad(alone, tensors[i], upstream, allow_unused=True) if alone.requires_grad else [None]
            )
            assert none[0] is None
            continue
        (got,) = torch.autograd.grad(alone, tensors[i], upstream)
        # A loop over two gradients may round otherwise than one over each.
        torch.testing.assert_close(got, want, **({} if op.group.elementwise else {"rtol": 0, "atol": 0}))
    assert not op(ops, x).requires_grad
    with torch.no_grad():
        assert torch.equal(op(ops, leaves), value)


# ---- edges -----------------------------------------------------------------------------------------------------------
@every_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_empty_batch(implementation, op, dtype):
    """0 with a graph: no rank of a distributed run is left without a backward."""
    for memory_format in op.group.memory_formats:
        x = op.group.in_format(op.group.inputs(implementation, op.group.rows(0), dtype), memory_format)
        x = op.collecting(x)
        value, leaves = op(ops, x), registry.tensors(x, op.leaves)
        assert value.requires_grad and value.shape == op(oracles, registry.widened(x)).shape
        assert value.isfinite().all() and not value.any()
        grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        assert grads[0] is not None
        for g, t in zip(grads, leaves, strict=True):
            assert g is None or (g.shape == t.shape and g.dtype == dtype and not g.any())


EQUAL = [(op, shape) for op in OPS if op.equal for shape in op.group.equal_shapes]


@pytest.mark.parametrize(("op", "shape"), EQUAL, ids=[f"{op}-{shape}" for op, shape in EQUAL])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equal_networks(implementation, op, shape, dtype):
    """Exactly 0 with exactly zero gradients: equal rows, other layouts and the same numbers in float64 included."""
    if implementation.name == "simt" and dtype in HALVES:
        pytest.skip("once read they are float32")
    x = op.group.inputs(implementation, shape, dtype)
    student = op.equal(x["student"])
    student[-1] = student[0]
    teachers = [student.clone(), student.double()]
    sums = op.name.startswith(("normalized", "standardized"))  # torch sums as memory lies
    if op.group.elementwise and (implementation.kernel or not sums):
        teachers.append(student.clone(memory_format=torch.channels_last))
    for teacher in teachers:
        leaves = op.collecting({**x, "student": student, "teacher": teacher})
        if teacher is teachers[-1]:
            leaves["teacher"] = teacher.detach().requires_grad_()
        value = op(ops, leaves)
        assert not value.any(), value
        tensors = registry.tensors(leaves, op.leaves)
        grads = torch.autograd.grad(value, tensors, torch.full_like(value, 3.0), allow_unused=True)
        assert not any(g is not None and g.any() for g in grads), [g and g.abs().max() for g in grads]


@every_op
def test_largest_half(implementation, op):
    """float16 values up to 6e4, whose squares no float16 holds."""
    x = op.group.inputs(implementation, op.group.small, torch.float16)
    x = registry.mapped(x, lambda name, t: op.group.largest(name, t) if name in op.leaves else t)
    check_oracle(op, x, op.upstream(x).sign() * op.group.largest_upstream)


@every_op
def test_nan_is_seen(implementation, op):
    """A NaN in any leaf that counts is a NaN in the value."""
    x = op.group.inputs(implementation, op.group.small, torch.float32)
    for i, (label, t) in enumerate(registry.labelled(x, op.leaves)):
        changed = t.clone()
        changed[(0,) * t.dim()] = float("nan")
        leaves = registry.tensors(x, op.leaves)
        value = op(ops, registry.replaced(x, op.leaves, [*leaves[:i], changed, *leaves[i + 1 :]]))
        assert value.isnan().any(), label


# ---- determinism -----------------------------------------------------------------------------------------------------
GROUPS = [(group, shape) for group in registry.groups() for shape in {*group.deterministic, *group.deterministic_simt}]


@pytest.mark.parametrize(
    ("group", "shape"), GROUPS, ids=[f"{group.family}.{group.ops[0].name}-{shape}" for group, shape in GROUPS]
)
def test_deterministic(implementation, group, shape, same_bits):
    """Equal bits from run to run, for any number of threads, and in any order of CUDA's threads."""
    if shape not in (group.deterministic_simt if implementation.name == "simt" else group.deterministic):
        pytest.skip("a shape of other implementations: under SIMT a thread is a fiber")
    x = group.inputs(implementation, shape, torch.float32)

    def run():
        results = []
        for op in group.ops:
            for memory_format in group.memory_formats:
                leaves = [t.clone(memory_format=memory_format) for t in registry.tensors(x, op.leaves)]
                leaves = [t.detach().requires_grad_() for t in leaves]
                value = op(ops, registry.replaced(x, op.leaves, leaves))
                grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
                results += [value.detach(), *(g for g in grads if g is not None)]
        return results

    assert same_bits(run)


@pytest.mark.parametrize("implementation", ["fallback"], indirect=True)
@pytest.mark.parametrize(("op", "shape"), CASES, ids=[f"{op}-{shape}" for op, shape in CASES])
def test_blocks_do_not_show(implementation, op, shape, monkeypatch):
    """Plain PyTorch goes through rows in blocks, whose size depends on the number of threads: the same bits for any."""
    for turned in (False, True):  # rows whose columns lie apart
        x = op.group.inputs(implementation, shape, torch.float32)
        x = registry.mapped(x, lambda name, t, turned=turned: t.t().contiguous().t() if turned and t.dim() == 2 else t)
        results = []
        for elements in (1, 64, 2**30):
            monkeypatch.setattr(blocks, "ELEMENTS", elements)
            leaves = op.collecting(x)
            value = op(ops, leaves)
            grads = torch.autograd.grad(value.sum(), registry.tensors(leaves, op.leaves), allow_unused=True)
            results.append([value.detach(), *(g for g in grads if g is not None)])
        for one_row, some, whole in zip(*results, strict=True):
            assert torch.equal(one_row, whole) and torch.equal(some, whole)


# ---- memory ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("implementation", ["fallback", "cpu"], indirect=True)
@pytest.mark.parametrize("op", [op for op in OPS if op.memory], ids=str)
def test_memory(implementation, op, threads):
    """What forward and backward may take beside their inputs, with two threads and in either memory format."""
    harness = pytest.importorskip("kdfast.bench").load("harness")
    threads(2)
    for dtypes, memory_format in itertools.product(op.group.memory_dtypes, op.group.memory_formats):
        x = op.group.inputs(implementation, op.group.memory, *dtypes)
        limit = op.memory(x, implementation.kernel)
        if limit is None:
            pytest.skip("the fallback may take more")
        given = op.group.in_format(x, memory_format)
        leaves = [t.detach().requires_grad_() for t in registry.tensors(given, op.leaves)]
        given = registry.replaced(given, op.leaves, leaves)
        assert harness.peak_cpu(lambda given=given: op(ops, given).sum().backward()) <= limit
