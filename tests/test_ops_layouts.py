"""The contract of every op in tests/registry/: any strides, the memory format of maps, and tensors beyond 2^31."""

import itertools

import behaviour
import pytest
import registry
import torch
from behaviour import FLOATS, LAYOUTS, MAP_LAYOUTS, check_oracle

from kdfast import ops
from kdfast.ops.layout import flat

OPS = registry.every_op()
every_op = pytest.mark.parametrize("op", OPS, ids=str)


def layouts_of(op):
    return MAP_LAYOUTS if op.group.of_maps else LAYOUTS if "rows" in op.group.layouts.values() else ["its own"]


CASES = [(op, layout) for op in OPS for layout in layouts_of(op)]


@pytest.mark.parametrize(("op", "layout"), CASES, ids=[f"{op}-{layout}" for op, layout in CASES])
def test_layouts(implementation, op, layout):
    """All inputs in the layout, the first one alone, and all but that."""
    first, others = op.inputs[0], op.inputs[1:]
    for shape, dtype in itertools.product(op.group.laid_out, (torch.float32, torch.bfloat16)):
        x = op.group.inputs(implementation, shape, dtype)
        choices = [op.inputs, (first,), others] if others else [op.inputs]
        if implementation.name == "simt" and not op.group.elementwise:
            choices = choices[:1]  # of which each is read by itself
        for names in choices:
            given = behaviour.laid_out(op.group, x, layout, names)
            plain = registry.mapped(given, lambda name, t: t.clone(memory_format=torch.contiguous_format))
            leaves = [t.detach().requires_grad_() for t in registry.tensors(given, op.leaves)]
            _, grads = check_oracle(op, plain, op.upstream(plain), registry.replaced(given, op.leaves, leaves))
            if op.group.contiguous and not op.group.of_maps:
                assert all(g is None or g.is_contiguous() for g in grads)


@pytest.mark.parametrize("op", [op for op in OPS if op.group.of_maps], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_memory_format_is_kept(implementation, op, dtype):
    """A gradient is where the optimiser of a channels_last network wants it, and no map is copied."""
    if op.name.startswith("affinity"):
        pytest.skip("its gradients are contiguous")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = op.group.inputs(implementation, op.group.small, dtype)
        leaves = [t.contiguous(memory_format=memory_format).requires_grad_() for t in registry.tensors(x, op.leaves)]
        assert all(flat(t).data_ptr() == t.data_ptr() for t in leaves)
        value = op(ops, registry.replaced(x, op.leaves, leaves))
        grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        assert all(g is None or g.is_contiguous(memory_format=memory_format) for g in grads)


OTHER = [(op, shape) for op in OPS if not op.images for shape in op.group.other_dims]


@pytest.mark.parametrize(("op", "shape"), OTHER, ids=[f"{op}-{shape}" for op, shape in OTHER])
def test_other_dimensions(implementation, op, shape):
    """(B, C), (B, C, L) and (B, C, D, H, W) are maps without positions, or with more of them."""
    x = op.group.inputs(implementation, shape, torch.float32)
    check_oracle(op, x, op.upstream(x))


FAR = [(op, *far) for op in OPS for far in op.group.far]


@pytest.mark.parametrize(
    ("op", "shape", "strides"), FAR, ids=[f"{op}-{'-'.join(map(str, strides))}" for op, _, strides in FAR]
)
def test_large_index(implementation, op, shape, strides):
    """Elements of the first leaf beyond 2^31, in a file that is mostly holes: the bits of a near tensor."""
    x = op.collecting(op.group.inputs(implementation, shape, torch.bfloat16))
    near, *others = registry.tensors(x, op.leaves)
    last = sum(stride * (size - 1) for stride, size in zip(strides, near.shape, strict=True))
    with behaviour.sparse_memory(last + 1, implementation.device) as memory:
        far = memory.as_strided(near.shape, strides).copy_(near.detach()).requires_grad_()
        results = []
        for leaf in (far, near):
            value = op(ops, registry.replaced(x, op.leaves, [leaf, *others]))
            results.append([value.detach(), *torch.autograd.grad(value.sum(), leaf)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **({} if op.group.of_maps else {"rtol": 0, "atol": 0}))
