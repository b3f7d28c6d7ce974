"""How every op behaves in PyTorch: layouts, and checks that all families share. A `function(*leaves)` is a 0-d loss."""

import contextlib
import tempfile

import oracles
import pytest
import registry
import torch
from conftest import assert_close

import kdfast
from kdfast import ops

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float64, torch.float32, *HALVES)


# ---- layouts of a [rows, cols] tensor --------------------------------------------------------------------------------
def _strided(x):
    wide = x.new_full((x.shape[0], 3 * x.shape[1]), 99.0)
    wide[:, 1::3] = x
    return wide[:, 1::3]


def _offset(x):
    """Contiguous rows, none of which starts at a multiple of 16 bytes."""
    wide = x.new_full((x.shape[0], x.shape[1] + 2), 99.0)
    wide[:, 1:-1] = x
    return wide[:, 1:-1]


def _channels_last(x):
    """The rows of a (B, C, H, W) map that lies in memory as (B, H, W, C)."""
    maps = x.unflatten(0, (1, len(x), 1)).movedim(-1, 1).contiguous(memory_format=torch.channels_last)
    return maps.movedim(1, -1).flatten(0, -2)


LAYOUTS = {
    "strided": _strided,
    "offset": _offset,
    "transposed": lambda x: x.t().contiguous().t(),
    "rows_expanded": lambda x: x[:1].expand_as(x),
    "columns_expanded": lambda x: x[:, :1].expand_as(x),
    "channels_last": _channels_last,
}


# ---- layouts of a map (B, C, H, W) -----------------------------------------------------------------------------------
def _strided_map(x):
    wide = x.new_full((*x.shape[:3], 3 * x.shape[3]), 99.0)
    wide[..., 1::3] = x
    return wide[..., 1::3]


def _offset_map(x):
    """No sample starts at a multiple of 16 bytes."""
    memory = x.new_full((x.numel() + 1,), 99.0)
    return memory[1:].view(x.shape).copy_(x)


def _part_of_channels(x):
    """A part of the channels of a map in channels_last memory, as torch.split gives it."""
    wide = x.new_full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), 99.0).contiguous(memory_format=torch.channels_last)
    wide[:, 2:-1] = x
    return wide[:, 2:-1]


def _gaps(x):
    """Channels that are far apart, none at a multiple of 16 bytes."""
    wide = x.new_full((x.shape[0], x.shape[1], x[0, 0].numel() + 3), 99.0)
    wide[..., 1:-2] = x.flatten(2)
    return wide[..., 1:-2].unflatten(2, x.shape[2:])


MAP_LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": _strided_map,
    "offset": _offset_map,
    "padded": _part_of_channels,
    "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:, :, :1, :1].expand_as(x),
    "one_channel": lambda x: x[:1, :1].expand_as(x),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "gaps": _gaps,
}


def laid_out(group, x, layout, names):
    """The inputs of a group with `names` in a layout of rows or of maps; a column has gaps in any."""
    change = {
        "rows": LAYOUTS.get(layout),
        "maps": MAP_LAYOUTS.get(layout),
        "column": lambda t: torch.stack([t] * 2, 1)[:, 1],
    }

    def lay_out(name, t):
        kind = group.layouts.get(name)
        if kind is None or name not in names:
            return t
        return change.get(kind, kind)(t)

    return registry.mapped(x, lay_out)


@contextlib.contextmanager
def sparse_memory(elements, device):
    """A bfloat16 tensor of so many elements: on a CPU a file that is mostly holes."""
    if torch.device(device).type == "cuda":
        yield torch.empty(elements, dtype=torch.bfloat16, device=device)
        return
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(2 * elements)
        yield torch.from_file(file.name, shared=False, size=elements, dtype=torch.bfloat16)


# ---- values ----------------------------------------------------------------------------------------------------------
def check_oracle(op, x, upstream=None, leaves=None):
    """The op's value and gradients on the inputs `x` against the formula's, within the rule of conftest.py.

    `leaves` are the inputs as the op gets them, if not contiguous copies of `x`.
    """
    leaves = op.collecting(x) if leaves is None else leaves
    exact = op.collecting(registry.widened(x))
    value, want = op(ops, leaves), op(oracles, exact)
    upstream = torch.ones_like(want) if upstream is None else upstream.to(want).expand_as(want)
    got, grads = (
        torch.autograd.grad(v, registry.tensors(y, op.leaves), upstream.to(v.dtype), allow_unused=True)
        for v, y in ((value, leaves), (want, exact))
    )
    size, *sizes = op.sizes_of(upstream.abs(), registry.widened(x), want, grads)
    cols, *all_cols = op.cols_of(x, len(got))
    assert value.dtype == op.accumulator(leaves)
    assert_close(value, want, size, cols, value.dtype)
    for (label, t), a, b, entries, cols in zip(
        registry.labelled(leaves, op.leaves), got, grads, sizes, all_cols, strict=True
    ):
        if entries is None:
            assert a is None, f"a gradient of {label}"
            continue
        assert a.dtype == t.dtype and a.shape == t.shape
        b = torch.zeros_like(entries) if b is None else b
        assert_close(a, b, entries, cols, value.dtype, f"gradient of {label}")
    return value, got


# ---- autograd and compilers ------------------------------------------------------------------------------------------
def leaves_of(tensors):
    """The same tensors, contiguous and collecting gradients."""
    return [x.detach().clone().requires_grad_() for x in tensors]


def copies_of(tensors):
    """The same tensors; those collect gradients that do already, or all floating-point ones where none does."""
    some = any(x.requires_grad for x in tensors)
    wants = [x.requires_grad if some else x.is_floating_point() for x in tensors]
    return [x.detach().clone().requires_grad_(want) for x, want in zip(tensors, wants, strict=True)]


def collecting(tensors):
    return [x for x in tensors if x.requires_grad]


def check_refuses_second_derivative(loss, leaf):
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)
    # A gradient penalty: the inner gradient is asked for with a graph.
    with pytest.raises(RuntimeError, match="no second derivative"):
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (loss + grad.pow(2).sum()).backward()


def check_refuses_changed_input(function, tensors, index):
    """The input `index`, changed in place between forward and backward, is noticed."""
    leaves = leaves_of(tensors)
    leaves[index] = changed = leaves[index] * 1.0
    loss = function(*leaves)
    changed.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# A graph calls the ops by name: the one that was compiled for a kernel runs on the fallback and under SIMT, too.
every_compiled = pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)


def has_graphs(implementation):
    """Graphs are compiled for this implementation, and not for another one that is tested, too."""
    others = ("fallback", "simt") if kdfast._kernels.status()["_cpu"].loaded else ("simt",)
    return implementation.name not in others


def compiles(implementation):
    if not has_graphs(implementation):
        pytest.skip("runs where the graph for the kernels does")


def check_compiled_for_all(implementation, function, tensors, backend="aot_eager"):
    """One graph, with the numbers of the function as it is; with the fallback's where that runs."""
    compiles(implementation)
    compiled = check_compiled(function, tensors, backend=backend)
    with kdfast.fallback():
        check_same(compiled, function, tensors)


def check_compiled(function, tensors, **options):
    """One graph with the numbers of the function as it is; -> the graph."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, **options)
    check_same(compiled, function, tensors)
    return compiled


def check_same(compiled, function, tensors):
    """Loss and gradients of a graph are those of the function."""
    ours, theirs = copies_of(tensors), copies_of(tensors)
    loss, eager = compiled(*ours), function(*theirs)
    torch.testing.assert_close(loss, eager, rtol=1e-6, atol=0)
    grads = (torch.autograd.grad(x, collecting(y), allow_unused=True) for x, y in ((loss, ours), (eager, theirs)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def check_autocast(function, tensors):
    """Neither autocast nor the precision that torch allows to products of float32 changes a bit."""
    ours, theirs = copies_of(tensors), copies_of(tensors)
    loss, precision = function(*ours), torch.get_float32_matmul_precision()
    want = torch.autograd.grad(loss, collecting(ours), allow_unused=True)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(loss.device.type, dtype=torch.bfloat16):
            inside = function(*theirs)
        got = torch.autograd.grad(inside, collecting(theirs), allow_unused=True)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert inside.dtype == loss.dtype and torch.equal(inside, loss)
    for a, b in zip(got, want, strict=True):
        assert a is None if b is None else torch.equal(a, b)


def check_refuses_transforms(function, x):
    """torch.func sees no gradient of a kernel: an error rather than a wrong number."""
    stacked = torch.stack([x, x])
    with pytest.raises(RuntimeError, match="torch.func transform"):
        torch.vmap(function)(stacked)
    with pytest.raises(RuntimeError, match="torch.func transform"):
        torch.func.grad(function)(x)


# ---- CUDA ------------------------------------------------------------------------------------------------------------
def check_no_host_sync(function, tensors):
    leaves = copies_of(tensors)
    function(*leaves).backward()  # loads modules, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*leaves).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.grad is None or x.grad.isfinite().all() for x in leaves)


def check_cuda_graph(function, tensors, others):
    """Captured once with `tensors`, replayed on the numbers of `others`."""
    leaves, fresh = copies_of(tensors), copies_of(others)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*leaves).backward()
    torch.cuda.current_stream().wait_stream(stream)
    for x in leaves:
        x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = function(*leaves)
        loss.backward()
    with torch.no_grad():
        for x, y in zip(leaves, fresh, strict=True):
            x.copy_(y)
    graph.replay()
    expected = function(*fresh)
    expected.backward()
    assert torch.equal(loss, expected)
    for x, y in zip(leaves, fresh, strict=True):
        assert (x.grad is None) == (y.grad is None)
        assert x.grad is None or torch.equal(x.grad, y.grad)


# ---- losses ----------------------------------------------------------------------------------------------------------
def check_loss(function, tensors, same_bits, changed=(0,)):
    """What a loss without an op of its own keeps to; the inputs `changed` in place are noticed."""
    check_compiled(function, tensors, backend="aot_eager")
    check_autocast(function, tensors)
    leaves = leaves_of(tensors)
    check_refuses_second_derivative(function(*leaves), leaves[0])
    for index in changed:
        check_refuses_changed_input(function, tensors, index)
    if tensors[0].is_cuda:
        check_no_host_sync(function, tensors)
        check_cuda_graph(function, tensors, tensors[::-1])

    def run():
        leaves = leaves_of(tensors)
        loss = function(*leaves)
        return [loss, *torch.autograd.grad(loss, leaves, allow_unused=True)]

    assert same_bits(run)
