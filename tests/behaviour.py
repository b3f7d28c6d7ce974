"""How every op behaves in PyTorch: layouts, and checks that all families share. A `function(*leaves)` is a 0-d loss."""

import contextlib
import tempfile

import pytest
import torch

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


MAP_LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": _strided_map,
    "offset": _offset_map,
    "padded": _part_of_channels,
    "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:, :, :1, :1].expand_as(x),
}


@contextlib.contextmanager
def sparse_memory(elements, device):
    """A bfloat16 tensor of so many elements: on a CPU a file that is mostly holes."""
    if torch.device(device).type == "cuda":
        yield torch.empty(elements, dtype=torch.bfloat16, device=device)
        return
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(2 * elements)
        yield torch.from_file(file.name, shared=False, size=elements, dtype=torch.bfloat16)


# ---- autograd and compilers ------------------------------------------------------------------------------------------
def leaves_of(tensors):
    """The same tensors, contiguous and collecting gradients."""
    return [x.detach().clone().requires_grad_() for x in tensors]


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


def check_compiled(function, tensors, **options):
    """One graph with the numbers of the function as it is."""
    torch.compiler.reset()
    ours, theirs = leaves_of(tensors), leaves_of(tensors)
    loss, eager = torch.compile(function, fullgraph=True, **options)(*ours), function(*theirs)
    torch.testing.assert_close(loss, eager, rtol=1e-6, atol=0)
    grads = (torch.autograd.grad(x, y, allow_unused=True) for x, y in ((loss, ours), (eager, theirs)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def check_autocast(function, tensors):
    """Autocast changes no bit of a loss or a gradient."""
    ours, theirs = leaves_of(tensors), leaves_of(tensors)
    loss = function(*ours)
    with torch.autocast(loss.device.type, dtype=torch.bfloat16):
        inside = function(*theirs)
    assert inside.dtype == loss.dtype and torch.equal(inside, loss)
    grads = (torch.autograd.grad(x, y, allow_unused=True) for x, y in ((inside, theirs), (loss, ours)))
    for got, want in zip(*grads, strict=True):
        assert got is None if want is None else torch.equal(got, want)


def check_refuses_transforms(function, x):
    """torch.func sees no gradient of a kernel: an error rather than a wrong number."""
    stacked = torch.stack([x, x])
    with pytest.raises(RuntimeError, match="torch.func transform"):
        torch.vmap(function)(stacked)
    with pytest.raises(RuntimeError, match="torch.func transform"):
        torch.func.grad(function)(x)


# ---- CUDA ------------------------------------------------------------------------------------------------------------
def check_no_host_sync(function, tensors):
    leaves = leaves_of(tensors)
    function(*leaves).backward()  # loads modules, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*leaves).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.grad is None or x.grad.isfinite().all() for x in leaves)


def check_cuda_graph(function, tensors, others):
    """Captured once with `tensors`, replayed on the numbers of `others`."""
    leaves, fresh = leaves_of(tensors), leaves_of(others)
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
