"""The attention family: its ops against the formulas, on each implementation."""

import behaviour
import oracles
import pytest
import torch
import torch.nn.functional as F
from behaviour import FLOATS, HALVES
from conftest import assert_close

import kdfast
from kdfast import ops
from kdfast.ops.pool import average_pool

raw = torch.ops.kdfast

CASES = [  # batch, channels, height, width
    (1, 1, 1, 1),
    (3, 4, 1, 5),
    (2, 3, 5, 4),
    (2, 33, 2, 3),  # more channels than a warp has lanes
    (2, 5, 17, 16),  # positions for more than one of a block's pieces of 256
    (2, 1100, 1, 3),  # channels in more than one chunk
]
SMALL = (3, 6, 4, 5)
POWERS = (1, 2, 3, 4)


def make(implementation, shape, dtype=torch.float64, teacher_dtype=None):
    """-> a student's maps, and a teacher's with other channels."""
    other = (shape[0], shape[1] // 2 + 1, *shape[2:])
    pair = (torch.randn(*s, dtype=torch.float64) for s in (shape, other))
    dtypes = dtype, teacher_dtype or dtype
    return [x.to(t).to(implementation.device) for x, t in zip(pair, dtypes, strict=True)]


def check(student, teacher, power=2, upstream=1.0):
    """Loss and both gradients against the oracle's."""
    leaves = [x if x.requires_grad else x.detach().clone().requires_grad_() for x in (student, teacher)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    loss, want = ops.attention_transfer(*leaves, power), oracles.attention_transfer(*exact, power)
    value, *entries = oracles.sizes_attention(*exact, power)
    cols = max(max(x.shape[1], x[0, 0].numel()) for x in exact)
    assert loss.shape == ()
    assert_close(loss, want.detach(), value, cols, loss.dtype)
    grads = (torch.autograd.grad(x, y, torch.full_like(x, upstream)) for x, y in ((loss, leaves), (want, exact)))
    for x, a, b, size, side in zip(leaves, *grads, entries, ("student", "teacher"), strict=True):
        assert a.dtype == x.dtype and a.shape == x.shape
        assert_close(a, b, abs(upstream) * size, cols, loss.dtype, f"gradient of the {side}")


# ---- value and gradients ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("power", POWERS)
def test_matches_oracle(implementation, shape, dtype, power):
    check(*make(implementation, shape, dtype), power, upstream=-1.5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("power", POWERS[:3])
def test_low_precision(implementation, dtype, power):
    """float32 accumulation and result, gradients in the inputs' dtype; exact in the rounded inputs."""
    pair = make(implementation, SMALL, dtype)
    assert ops.attention_transfer(*pair).dtype == torch.float32
    check(*pair, power)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.float64)],
    ids=str,
)
def test_mixed_dtypes(implementation, student, teacher):
    check(*make(implementation, SMALL, student, teacher))


def test_gradcheck(implementation):
    for power in POWERS:
        leaves = behaviour.leaves_of(make(implementation, (2, 2, 1, 3)))
        assert torch.autograd.gradcheck(lambda s, t, p=power: ops.attention_transfer(s, t, p), leaves)


def test_opcheck(implementation):
    """Schemas, shape functions and dynamic shapes of the raw ops, on inputs that need no gradient."""
    student, teacher = (x.flatten(2) for x in make(implementation, SMALL, torch.float32))
    grad, slope = torch.tensor(2.0, device=student.device), torch.randn(3, 20, device=student.device)
    calls = [
        ("attention_transfer", (student, teacher, 2, True, True)),
        ("attention_transfer", (student, teacher.half(), 3, False, False)),
        ("attention_gradient", (grad, slope, student, 2)),
        ("attention_gradient", (grad, slope, student.transpose(1, 2).contiguous().transpose(1, 2), 3)),
    ]
    for op, args in calls:
        torch.library.opcheck(getattr(raw, op).default, args)


# ---- arguments -------------------------------------------------------------------------------------------------------
def _strided(x):
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 99.0)
    wide[..., ::2] = x
    return wide[..., ::2]


def _offset(x):
    """No channel starts at a multiple of 16 bytes."""
    wide = x.new_full((x.shape[0], x.shape[1], x[0, 0].numel() + 3), 99.0)
    wide[..., 1:-2] = x.flatten(2)
    return wide[..., 1:-2].unflatten(2, x.shape[2:])


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": _strided,
    "offset": _offset,
    "expanded": lambda x: x[:1, :1].expand_as(x),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [SMALL, (2, 40, 3, 7)], ids=str)
def test_layouts(implementation, layout, shape):
    for dtype in (torch.float32, torch.bfloat16):
        check(*(LAYOUTS[layout](x).requires_grad_() for x in make(implementation, shape, dtype)))


def test_memory_format(implementation):
    """Channels_last maps are not copied, and their gradient is channels_last as well."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        student, teacher = (x.contiguous(memory_format=memory_format) for x in make(implementation, SMALL))
        student.requires_grad_()
        assert student.flatten(2).data_ptr() == student.data_ptr()
        (grad,) = torch.autograd.grad(ops.attention_transfer(student, teacher), student)
        assert grad.is_contiguous(memory_format=memory_format)


def test_one_side_needs_a_gradient(implementation):
    student, teacher = make(implementation, SMALL)
    leaves = behaviour.leaves_of((student, teacher))
    both = torch.autograd.grad(ops.attention_transfer(*leaves), leaves)
    for index, leaf in enumerate(leaves):
        pair = [leaf if i == index else x for i, x in enumerate((student, teacher))]
        assert torch.equal(torch.autograd.grad(ops.attention_transfer(*pair), leaf)[0], both[index])


# ---- edges -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [SMALL, (2, 40, 7, 9)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_edges_equal_networks(implementation, shape, dtype):
    for power in POWERS:
        student = make(implementation, shape, dtype)[0].requires_grad_()
        loss = ops.attention_transfer(student, student.detach(), power)
        assert loss == 0 and not torch.autograd.grad(loss, student)[0].any()


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_edges_zero_maps(implementation, side):
    """A sample without any activation has q = 0, and gets no gradient: finite, as the official code."""
    pair = make(implementation, SMALL, torch.float32)
    for x, name in zip(pair, ("student", "teacher"), strict=True):
        if side in (name, "both"):
            x[1] = 0
    check(*pair)


def test_edges_no_samples(implementation):
    leaves = behaviour.leaves_of(make(implementation, (0, 3, 2, 2), torch.float32))
    loss = ops.attention_transfer(*leaves)
    assert loss == 0 and torch.autograd.grad(loss, leaves)[0].shape == (0, 3, 2, 2)


def test_edges_largest_half(implementation):
    """float16 values up to 6e4, whose squares no float16 holds."""
    pair = make(implementation, SMALL, torch.float16)
    check(*(x.sign() * 6e4 * torch.rand_like(x) for x in pair))


@pytest.mark.parametrize("gap", [1e-2, 1e-4])
def test_edges_close_networks(implementation, gap):
    """The loss of networks that nearly agree keeps its digits: 1 - cos would lose all of them at 1e-4."""
    student, _ = make(implementation, (3, 40, 6, 5), torch.float32)
    teacher = student * (1 + gap * torch.rand_like(student))
    loss, want = ops.attention_transfer(student, teacher), oracles.attention_transfer(student, teacher)
    assert abs(loss.item() - want.item()) <= 1e-6 / gap * want.item()
    check(student, teacher)


def test_pool(implementation):
    """torch's adaptive average pooling, also where windows overlap or positions repeat."""
    for size, bins in (((6, 8), (3, 4)), ((7, 5), (3, 3)), ((7, 5), (4, 5)), ((3, 4), (6, 7)), ((5, 5), (1, 2))):
        ours, theirs = behaviour.leaves_of([torch.randn(2, 3, *size, dtype=torch.float64)] * 2)
        got, want = average_pool(ours, *bins), F.adaptive_avg_pool2d(theirs, bins)
        torch.testing.assert_close(got, want)
        upstream = torch.randn_like(want)
        grads = (torch.autograd.grad(x, y, upstream)[0] for x, y in ((got, ours), (want, theirs)))
        torch.testing.assert_close(*grads)


# ---- behaviour in PyTorch --------------------------------------------------------------------------------------------
def _loss(student, teacher):
    """The op, and the loss with pooling."""
    return ops.attention_transfer(student, teacher) + kdfast.AT(3)([student[:, :, :3, :3], teacher], [teacher, student])


def test_double_backward_raises(implementation):
    leaves = behaviour.leaves_of(make(implementation, SMALL))
    behaviour.check_refuses_second_derivative(ops.attention_transfer(*leaves), leaves[0])


def test_inplace_change_raises(implementation):
    for index in range(2):
        behaviour.check_refuses_changed_input(ops.attention_transfer, make(implementation, SMALL), index)


ERRORS = [
    (lambda s, t: ops.attention_transfer(s[0], t), ValueError, r"student must be \(batch, channels, height, width\)"),
    (lambda s, t: ops.attention_transfer(s, t[:2]), ValueError, "teacher must have the student's batch size 3"),
    (lambda s, t: ops.attention_transfer(s, t[..., :2]), ValueError, r"height and width \(4, 5\), got \(4, 2\)"),
    (lambda s, t: ops.attention_transfer(s.long(), t), TypeError, "student must be float32"),
    (lambda s, t: ops.attention_transfer(s, t, 0), ValueError, "power must be at least 1, got 0"),
    (lambda s, t: ops.attention_transfer(s, t.to("meta")), ValueError, "teacher must be on the student's device cpu"),
    (lambda s, t: kdfast.AT(2.0), TypeError, "p must be an int, got float"),
    (lambda s, t: kdfast.AT()([s, s], [t]), ValueError, "as many layers, and at least one, got 2 and 1"),
    (lambda s, t: kdfast.AT()([], []), ValueError, "as many layers, and at least one, got 0 and 0"),
    (lambda s, t: kdfast.AT()([s], t), TypeError, "all be tensors, or all lists .*, got list and Tensor"),
    (lambda s, t: kdfast.AT()([s, s], [t, t[0]]), ValueError, r"teacher\[1\] must be \(batch, channels"),
    (lambda s, t: kdfast.AT()([s, s], [t, t[:2]]), ValueError, r"teacher\[1\] must have student\[1\]'s batch size 3"),
    (lambda s, t: kdfast.AT()(s, t[..., :3]), ValueError, r"one width.*got \(4, 5\) and \(4, 3\)"),
    (lambda s, t: kdfast.AT()(s[:, :, :2], t), ValueError, r"must be square: got \(2, 5\) and \(2, 2\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(call, error, message):
    with kdfast.fallback(), pytest.raises(error, match=message):
        call(torch.randn(SMALL), torch.randn(3, 2, 4, 5))


@pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
def test_compile(implementation):
    behaviour.check_compiled(_loss, make(implementation, (3, 4, 5, 5), torch.float32), backend="aot_eager")


@pytest.mark.parametrize("implementation", ["cpu", "cuda"], indirect=True)
def test_compile_inductor(implementation):
    behaviour.check_compiled(_loss, make(implementation, (3, 4, 5, 5), torch.float32))


def test_autocast(implementation):
    """Autocast changes no loss: maps are taken in the dtype in which they come, sums stay in float32."""
    for dtype in (torch.float32, torch.bfloat16):
        pair = make(implementation, (3, 4, 5, 5), dtype)
        plain, leaves = behaviour.leaves_of(pair), behaviour.leaves_of(pair)
        loss = _loss(*plain)
        with torch.autocast(implementation.device.type, dtype=torch.bfloat16):
            inside = _loss(*leaves)
        assert inside.dtype == torch.float32 and torch.equal(inside, loss)
        for a, b in zip(torch.autograd.grad(loss, plain), torch.autograd.grad(inside, leaves), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(3, 70, 17, 16), (3, 9, 48, 50)], ids=str)
def test_deterministic(implementation, shape, same_bits):
    """Equal bits from run to run, for any number of threads, and in any order of CUDA's threads."""
    if implementation.name == "simt" and shape[2] > 17:
        pytest.skip("a fiber per thread: slow, and CUDA has no pieces of 2048 positions")
    pair = make(implementation, shape, torch.float32)

    def run():
        results = []
        for memory_format in (torch.contiguous_format, torch.channels_last):
            leaves = behaviour.leaves_of(x.contiguous(memory_format=memory_format) for x in pair)
            loss = _loss(*leaves)
            results += [loss, *torch.autograd.grad(loss, leaves)]
        return results

    same_bits(run)


@pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
def test_deterministic_algorithms_are_enough(implementation, deterministic_algorithms):
    leaves = behaviour.leaves_of(make(implementation, (3, 4, 5, 5), torch.float32))
    assert all(g.isfinite().all() for g in torch.autograd.grad(_loss(*leaves), leaves))


def test_transforms_refused(implementation):
    student, teacher = make(implementation, SMALL)
    behaviour.check_refuses_transforms(lambda s: ops.attention_transfer(s, teacher), student)


def test_dtensor_refused(dtensor):
    plain = torch.randn(SMALL)
    for student, teacher, name in ((dtensor(plain), plain, "student"), (plain, dtensor(plain), "teacher")):
        with pytest.raises(TypeError, match=rf"{name} is a DTensor.*{name}.to_local\(\)"):
            ops.attention_transfer(student, teacher)


@pytest.mark.parametrize("implementation", ["cpu"], indirect=True)
def test_memory(implementation):
    """Nothing of the size of a map but its gradient."""
    harness = pytest.importorskip("kdfast.bench").load("harness")
    student, teacher = make(implementation, (4, 64, 20, 20), torch.float32)
    peak = harness.peak_cpu(lambda: ops.attention_transfer(student.requires_grad_(), teacher).backward())
    assert peak <= student.nbytes * (1 + 4 / 64)


# ---- CUDA only -------------------------------------------------------------------------------------------------------
def test_no_host_sync(cuda):
    behaviour.check_no_host_sync(_loss, make(cuda, (8, 4, 5, 5), torch.bfloat16))


def test_cuda_graph(cuda):
    behaviour.check_cuda_graph(_loss, make(cuda, (8, 4, 5, 5), torch.float32), make(cuda, (8, 4, 5, 5), torch.float32))
