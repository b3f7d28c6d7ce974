"""The feature family: its ops against the formulas, on each implementation."""

from dataclasses import dataclass
from pathlib import Path

import behaviour
import numpy as np
import oracles
import pytest
import torch
from behaviour import FLOATS, HALVES, MAP_LAYOUTS
from conftest import assert_close

import kdfast
from kdfast import ops
from kdfast.ops.layout import flat

raw = torch.ops.kdfast
GOLDEN = Path(__file__).parent / "golden"

CASES = [  # B, C, H, W
    (1, 1, 1, 1),
    (2, 3, 1, 1),  # no positions: the channels are neighbours in every layout
    (3, 5, 7, 9),  # windows of the pyramid that overlap
    (2, 3, 2, 5),  # fewer rows than the pyramid's windows; columns are not asked
    (2, 33, 4, 3),  # one channel more than a warp has lanes
    (1, 130, 8, 8),  # one block of 128 channels, and two more; 8320 elements are more than a GPU block takes
    (1, 2, 33, 35),  # a channel longer than a chunk of 1024
    (1, 12, 53, 52),  # one channel more than the CPU takes at once of maps as large as this
]
SMALL = (3, 5, 6, 5)


# ---- the ops with their arguments ------------------------------------------------------------------------------------
@dataclass
class Variant:
    """`call(ops, student, teacher, margin)` is the same for kdfast.ops and the oracles.

    `sizes(student, teacher)` gives the magnitudes of its terms, for the value and both gradients; None where each term
    is exact up to a rounding of itself.
    """

    call: callable
    sizes: callable = None
    teacher: bool = True  # has a gradient


VARIANTS = {
    "squared": Variant(lambda o, s, t, m: o.squared_error(s, t)),
    "channels": Variant(lambda o, s, t, m: o.channel_squared_error(s, t)),
    "boundary": Variant(lambda o, s, t, m: o.activation_boundary(s, t, 0.5), teacher=False),
    "boundary_none": Variant(lambda o, s, t, m: o.activation_boundary(s, t, 2.0, reduction="none"), teacher=False),
    "partial": Variant(lambda o, s, t, m: o.partial_squared_error(s, t, m)),
    "partial_none": Variant(lambda o, s, t, m: o.partial_squared_error(s, t, m[None, :, None, None], reduction="none")),
    "partial_mean": Variant(lambda o, s, t, m: o.partial_squared_error(s, t, m, reduction="mean")),
    "normalized": Variant(lambda o, s, t, m: o.normalized_error(s, t), oracles.sizes_normalized),
    "normalized_2": Variant(
        lambda o, s, t, m: o.normalized_error(s, t, 2), lambda s, t: oracles.sizes_normalized(s, t, 2)
    ),
    "pyramid": Variant(lambda o, s, t, m: o.pyramid_error(s, t), oracles.sizes_pyramid),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def make(implementation, shape, dtype=torch.float64, teacher_dtype=None):
    """Student, teacher, margins below zero that have few digits."""
    student, teacher = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    margin = -(torch.arange(1, shape[1] + 1, dtype=torch.float64) % 7) / 4 - 0.25
    return [
        x.to(t).to(implementation.device)
        for x, t in ((student, dtype), (teacher, teacher_dtype or dtype), (margin, torch.float32))
    ]


def check(variant, inputs, upstream=None, want=None):
    """The op's value and gradients on `inputs` against the oracle's; `want` are other inputs for the oracle."""
    *maps, margin = inputs
    leaves = [x if x.requires_grad else x.detach().clone().requires_grad_() for x in maps]
    value = variant.call(ops, *leaves, margin)
    exact = [x.detach().double().requires_grad_() for x in (want or maps)[:2]]
    expected = variant.call(oracles, *exact, margin)
    upstream = torch.ones_like(expected) if upstream is None else upstream.to(value.device)
    got = torch.autograd.grad(value, leaves, upstream.to(value.dtype), allow_unused=True)
    grads = torch.autograd.grad(expected, exact, upstream, allow_unused=True)
    size, *sizes = (
        variant.sizes(*exact)
        if variant.sizes
        else (expected.detach(), *(None if g is None else g.abs() for g in grads))
    )
    scale = upstream.abs() if variant.sizes else 1.0
    cols = maps[0][0].numel()
    assert_close(value, expected.detach(), size, cols, value.dtype)
    for x, a, b, entries in zip(leaves, got, grads, sizes, strict=True):
        if not variant.teacher and x is leaves[1]:
            assert a is None
            continue
        assert a.dtype == x.dtype and a.shape == x.shape
        assert_close(a, b, scale * entries, cols, value.dtype, "gradient")


def upstream_like(variant, inputs):
    """A gradient for every entry of the op's value."""
    shape = variant.call(oracles, *inputs).shape
    return torch.randn(shape, dtype=torch.float64, device=inputs[0].device)


# ---- value and gradients ---------------------------------------------------------------------------------------------
@every_variant
@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matches_oracle(implementation, name, shape, dtype):
    if implementation.name == "simt" and shape == CASES[-1]:
        pytest.skip("no boundary of the CUDA kernels")
    inputs = make(implementation, shape, dtype)
    check(VARIANTS[name], inputs, upstream_like(VARIANTS[name], inputs))


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_oracle_channels_last(implementation, name, dtype):
    """More channels than the CPU or a block of the GPU takes at once."""
    *maps, margin = make(implementation, (2, 131, 5, 6), dtype)
    inputs = [*(x.contiguous(memory_format=torch.channels_last) for x in maps), margin]
    check(VARIANTS[name], inputs, upstream_like(VARIANTS[name], inputs))


@every_variant
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_low_precision(implementation, name, dtype):
    """float32 accumulation and result, gradients in the inputs' dtype; exact in the rounded inputs."""
    inputs = make(implementation, SMALL, dtype)
    assert VARIANTS[name].call(ops, *inputs).dtype == torch.float32
    check(VARIANTS[name], inputs, upstream_like(VARIANTS[name], inputs))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.float64)],
    ids=str,
)
@every_variant
def test_mixed_dtypes(implementation, name, student, teacher):
    inputs = make(implementation, SMALL, student, teacher)
    expected = torch.float64 if torch.float64 in (student, teacher) else torch.float32
    assert VARIANTS[name].call(ops, *inputs).dtype == expected
    check(VARIANTS[name], inputs)


@every_variant
def test_gradcheck(implementation, name):
    shape = (
        (1, 2, 5, 1) if implementation.name == "simt" else (2, 2, 5, 2)
    )  # an element there costs two launches or more
    student, teacher, margin = make(implementation, shape)
    leaves = behaviour.leaves_of([student, teacher] if VARIANTS[name].teacher else [student])
    assert torch.autograd.gradcheck(lambda *x: VARIANTS[name].call(ops, *(x + (teacher,))[:2], margin), leaves)


def test_opcheck(implementation):
    """Schemas, shape functions and dynamic shapes of the raw ops, on inputs that need no gradient."""
    student, teacher, margin = make(implementation, SMALL, torch.float32)
    pair, grad = [flat(x) for x in (student, teacher)], student.new_tensor(2.0)
    last = [flat(x.contiguous(memory_format=torch.channels_last)) for x in (student, teacher)]
    stats = raw.normalized_error(*pair, 1)[1]
    per_channel, per_sample = student.new_ones(5), student.new_ones(3)
    calls = [
        ("feature_error", (*pair, None, 0, 0.0, 0, 2)),
        ("feature_error", (*last, None, 0, 0.0, 2, 2)),
        ("feature_error", (*pair, None, 1, 1.5, 1, 2)),
        ("feature_error", (*pair, margin, 2, 0.0, 1, 2)),
        ("feature_error_backward", (grad, *last, None, 0, 0.0, 0, 2, True, True)),
        ("feature_error_backward", (per_channel, *pair, None, 0, 0.0, 2, 2, True, False)),
        ("feature_error_backward", (per_sample, *pair, margin, 2, 0.0, 1, 2, False, True)),
        ("normalized_error", (*pair, 1)),
        ("normalized_error_backward", (grad, *last, stats, 1, True, True)),
        ("pyramid_error", (student, teacher)),
        ("pyramid_error_backward", (grad, student, teacher, True, True)),
        (
            "pyramid_error_backward",
            (grad, *(x.contiguous(memory_format=torch.channels_last) for x in (student, teacher)), True, False),
        ),
    ]
    for op, args in calls:
        torch.library.opcheck(getattr(raw, op).default, args)


# ---- arguments -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", MAP_LAYOUTS)
@every_variant
def test_layouts(implementation, name, layout):
    """Either map in the layout, or both; the gradient lies as the student does."""
    for dtype in (torch.float32, torch.bfloat16):
        *maps, margin = make(implementation, (2, 4, 6, 5), dtype)
        changed = [MAP_LAYOUTS[layout](x) for x in maps]
        for pair in (changed, (changed[0], maps[1]), (maps[0], changed[1])):
            plain = [x.clone(memory_format=torch.contiguous_format) for x in pair]
            check(VARIANTS[name], [x.detach().requires_grad_() for x in pair] + [margin], want=plain)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_memory_format_is_kept(implementation, dtype):
    """A gradient is where the optimiser of a channels_last network wants it, and no map is copied."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        *maps, margin = make(implementation, SMALL, dtype)
        maps = [x.contiguous(memory_format=memory_format) for x in maps]
        assert all(flat(x).data_ptr() == x.data_ptr() for x in maps)
        for variant in VARIANTS.values():
            leaves = [x.clone().requires_grad_() for x in maps]
            grads = torch.autograd.grad(variant.call(ops, *leaves, margin).sum(), leaves, allow_unused=True)
            assert all(g is None or g.is_contiguous(memory_format=memory_format) for g in grads)


@every_variant
def test_other_dimensions(implementation, name):
    """(B, C), (B, C, L) and (B, C, D, H, W) are maps without positions, or with more of them."""
    if name == "pyramid":
        pytest.skip("two dimensions of positions")
    for shape in ((3, 5), (3, 5, 12), (3, 5, 2, 3, 2)):
        inputs = make(implementation, shape, torch.float32)
        if name == "partial_none":
            inputs[2] = inputs[2].view(1, -1, 1, 1)
            call = lambda o, s, t, m: o.partial_squared_error(s, t, m, reduction="none")  # noqa: E731
            check(Variant(call), inputs)
        else:
            check(VARIANTS[name], inputs)


def test_upstream_gradients(implementation):
    """Scaled, negative, and one number for all entries with stride 0."""
    inputs = make(implementation, SMALL, torch.float32)
    for variant in VARIANTS.values():
        for factor in (3.0, -0.25, 1e-30, 0.0):
            shape = variant.call(oracles, *inputs).shape
            check(variant, inputs, torch.tensor(factor, dtype=torch.float64).expand(shape))


@every_variant
def test_gradient_paths(implementation, name):
    """To either map alone the same as to both, none to a boundary's teacher or to the margin."""
    student, teacher, margin = make(implementation, SMALL)
    variant, leaves = VARIANTS[name], behaviour.leaves_of((student, teacher, margin))
    both = torch.autograd.grad(variant.call(ops, *leaves).sum(), leaves, allow_unused=True)
    assert both[2] is None and (both[1] is not None) == variant.teacher
    alone = variant.call(ops, leaves[0], teacher, margin)
    torch.testing.assert_close(torch.autograd.grad(alone.sum(), leaves[0])[0], both[0])
    other = variant.call(ops, student, leaves[1], margin)
    assert other.requires_grad == variant.teacher
    if variant.teacher:
        torch.testing.assert_close(torch.autograd.grad(other.sum(), leaves[1])[0], both[1])


def test_reductions(implementation):
    student, teacher, margin = make(implementation, SMALL)
    for call in (
        lambda r: ops.activation_boundary(student, teacher, reduction=r),
        lambda r: ops.partial_squared_error(student, teacher, margin, reduction=r),
    ):
        each = call("none")
        assert each.shape == (3,)
        torch.testing.assert_close(call("sum"), each.sum())
        for mean in ("mean", "batchmean"):
            torch.testing.assert_close(call(mean), each.mean())


# ---- edges -----------------------------------------------------------------------------------------------------------
@every_variant
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [SMALL, (2, 3, 33, 35)], ids=str)
def test_edges_equal_networks(implementation, name, dtype, shape):
    """Exactly 0 with exactly zero gradients, in another dtype or layout, too (a boundary leaves its margin)."""
    student, _, margin = make(implementation, shape, dtype)
    if name.startswith("boundary"):
        student = 2 * student.sign()
    student.requires_grad_()
    last = student.detach().clone(memory_format=torch.channels_last)
    for teacher in (student.detach().clone(), student.detach().double(), last):
        if "normalized" in name and teacher is last and not implementation.kernel:
            continue  # torch sums a norm in the order of memory
        value = VARIANTS[name].call(ops, student, teacher, margin)
        assert not value.any()
        assert not torch.autograd.grad(value.sum(), student)[0].any()


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_edges_zero_sample(implementation, power, dtype):
    """A sample of zeros in either network or in both has no direction: finite, without gradient of its own."""
    student, teacher, _ = make(implementation, SMALL, dtype)
    student[0] = teacher[1] = student[2] = teacher[2] = 0
    leaves = behaviour.leaves_of((student, teacher))
    loss = ops.normalized_error(*leaves, power)
    assert_close(loss, oracles.normalized_error(student, teacher, power), 1.0, 150, loss.dtype)
    student_grad, teacher_grad = torch.autograd.grad(loss, leaves)
    assert not student_grad[[0, 2]].any() and not teacher_grad[[1, 2]].any()
    if power == 1:  # a unit vector's own length has no slope
        assert student_grad[1].any() and teacher_grad[0].any()
    assert student_grad.isfinite().all() and teacher_grad.isfinite().all()


def test_edges_ties(implementation):
    """Where teacher and margin are equal, and where student and target are."""
    student = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, -1.0, 0.0, 1.0], dtype=torch.float64)
    teacher = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0, -3.0, 0.0, 1.0], dtype=torch.float64)
    inputs = [x.view(1, 1, 2, 4).to(implementation.device) for x in (student, teacher)]
    margin = torch.tensor([-1.0], device=implementation.device)
    check(VARIANTS["partial"], [*inputs, margin])
    check(VARIANTS["boundary"], [*inputs, margin])


@every_variant
def test_edges_no_samples(implementation, name):
    """0 with a graph: no rank of a distributed run is left without a backward."""
    student, teacher, margin = make(implementation, (0, 4, 6, 5), torch.float32)
    student.requires_grad_()
    value = VARIANTS[name].call(ops, student, teacher, margin)
    assert value.requires_grad and not value.any()
    (grad,) = torch.autograd.grad(value.sum(), student)
    assert grad.shape == (0, 4, 6, 5)


@every_variant
def test_edges_nan_is_seen(implementation, name):
    """A NaN of the student is no zero."""
    student, teacher, margin = make(implementation, SMALL, torch.float32)
    student[1, 2, 3, 4] = float("nan")
    assert VARIANTS[name].call(ops, student, teacher, margin).isnan().any()


@every_variant
def test_edges_largest_half(implementation, name):
    """float16 values up to 6e4, whose squares no float16 holds."""
    student, teacher, margin = make(implementation, SMALL, torch.float16)
    for x in (student, teacher):
        x.copy_(x.clamp(-1, 1) * 6e4)
    upstream = upstream_like(VARIANTS[name], [student, teacher, margin]).sign() * 1e-3
    check(VARIANTS[name], [student, teacher, margin], upstream)


def test_large_index(implementation):
    """Elements beyond 2^31 of a tensor."""
    far = 2**30 + 8
    *maps, margin = make(implementation, (3, 4, 5, 4), torch.bfloat16)
    with behaviour.sparse_memory(3 * far + 80, implementation.device) as memory:
        for strides in ((far, 20, 4, 1), (far, 1, 16, 4)):
            x = memory.as_strided(maps[0].shape, strides).copy_(maps[0])
            for variant in VARIANTS.values():
                same = [variant.call(ops, y, maps[1], margin) for y in (x, maps[0])]
                torch.testing.assert_close(*same)
            x.zero_()


# ---- behaviour in PyTorch --------------------------------------------------------------------------------------------
def total(name, margin):
    """A variant as a function of its maps that gives one number."""
    return lambda student, teacher: VARIANTS[name].call(ops, student, teacher, margin).square().sum()


@every_variant
def test_double_backward_raises(implementation, name):
    *maps, margin = make(implementation, SMALL)
    leaves = behaviour.leaves_of(maps)
    behaviour.check_refuses_second_derivative(total(name, margin)(*leaves), leaves[0])


@every_variant
def test_inplace_change_raises(implementation, name):
    *maps, margin = make(implementation, SMALL)
    for index in range(1 + VARIANTS[name].teacher):
        behaviour.check_refuses_changed_input(total(name, margin), maps, index)


ERRORS = [
    (lambda s, t: ops.squared_error(s[0, 0, 0], t), ValueError, r"student must be \(batch, features\)"),
    (
        lambda s, t: ops.squared_error(s, t[:2]),
        ValueError,
        r"teacher must have the student's shape \(3, 5, 6, 5\), got \(2, 5, 6, 5\)",
    ),
    (lambda s, t: ops.squared_error(s.long(), t), TypeError, "student must be float32, float64, float16 or bfloat16"),
    (lambda s, t: ops.channel_squared_error(s, [1.0]), TypeError, "teacher must be a torch.Tensor, got list"),
    (lambda s, t: ops.squared_error(s, t.to("meta")), ValueError, "teacher must be on the student's device cpu"),
    (lambda s, t: ops.activation_boundary(s, t, "1"), TypeError, "margin must be a number, got str"),
    (lambda s, t: ops.activation_boundary(s, t, reduction="max"), ValueError, "reduction must be one of none, sum"),
    (
        lambda s, t: ops.partial_squared_error(s, t, torch.zeros(6)),
        ValueError,
        r"margin must be \(5,\) or \(1, 5, 1, 1\), got shape \(6,\)",
    ),
    (lambda s, t: ops.partial_squared_error(s, t, -1.0), TypeError, "margin must be a torch.Tensor, got float"),
    (lambda s, t: ops.normalized_error(s, t, 3), ValueError, "power must be 1 or 2, got 3"),
    (lambda s, t: ops.pyramid_error(s[0], t[0]), ValueError, r"student must be \(batch, channels, height, width"),
    (
        lambda s, t: kdfast.FitNets()([s, s], [t]),
        ValueError,
        "student and teacher must have as many layers, and at least one, got 2 and 1",
    ),
    (lambda s, t: kdfast.FitNets()([], []), ValueError, "as many layers, and at least one, got 0 and 0"),
    (lambda s, t: kdfast.FitNets()(s, 1.0), TypeError, "teacher must be a torch.Tensor, got float"),
    (lambda s, t: kdfast.FitNets()(s, t[:2]), ValueError, r"teacher must have the student's shape \(3, 5, 6, 5\)"),
    (
        lambda s, t: kdfast.FT()(s[0, 0, 0], t),
        ValueError,
        r"student_factor must be \(batch, features\) or \(batch, ...\)",
    ),
    (
        lambda s, t: kdfast.HCL()([s, s], [t, t[:1]]),
        ValueError,
        r"teacher\[1\] must have student\[1\]'s shape \(3, 5, 6, 5\), got \(1, 5, 6, 5\)",
    ),
    (lambda s, t: kdfast.HCL()([s, s[0]], [t, t[0]]), ValueError, r"student\[1\] must be \(batch, channels, height"),
    (
        lambda s, t: kdfast.OFD()([s], [t], []),
        ValueError,
        "student, teacher and margin must have as many layers, and at least one, got 1, 1 and 0",
    ),
    (
        lambda s, t: kdfast.OFD()([s], [t], torch.zeros(5)),
        TypeError,
        "student, teacher and margin must all be tensors, or all lists with one per layer, got list, list and Tensor",
    ),
    (lambda s, t: kdfast.OFD()(s, t, None), TypeError, "margin must be a torch.Tensor, got NoneType"),
    (
        lambda s, t: kdfast.OFD()([s, s], [t, t], [torch.zeros(5), torch.zeros(4)]),
        ValueError,
        r"margin\[1\] must be \(5,\) or \(1, 5, 1, 1\), got shape \(4,\)",
    ),
    (lambda s, t: kdfast.AB(margin=None), TypeError, "margin must be a number, got NoneType"),
    (lambda s, t: kdfast.OFD(reduction="b"), ValueError, "reduction must be one of"),
    (lambda s, t: kdfast.VID(4, 5, 5)(s, t), ValueError, r"student must have student_channels=4 channels, got shape"),
    (lambda s, t: kdfast.VID(5, 5, 4)(s, t), ValueError, r"teacher must have teacher_channels=4 channels, got shape"),
    (lambda s, t: kdfast.VID(5, 5, 5)(s, t[:1]), ValueError, "teacher must have the student's batch size 3"),
    (
        lambda s, t: kdfast.VID(5, 5, 5)([s, s], [t, t[:, :4]]),
        ValueError,
        r"teacher\[1\] must have teacher_channels=5 channels, got shape \(3, 4, 6, 5\)",
    ),
    (lambda s, t: kdfast.VID(5, 5.0, 5), TypeError, "mid_channels must be an int"),
    (
        lambda s, t: kdfast.VID(5, 5, 5, init_variance=1e-6),
        ValueError,
        "init_variance must be above eps=1e-05, got 1e-06",
    ),
    (
        lambda s, t: kdfast.HintRegressor((1, 4, 5, 5), (1, 4, 7, 7)),
        ValueError,
        "student_shape must be as large as teacher_shape, or half or twice its size, got 5 x 5 for 7 x 7",
    ),
    (lambda s, t: kdfast.HintRegressor((4, 5, 5), t.shape), ValueError, r"student_shape must be \(batch, channels, "),
    (lambda s, t: kdfast.Paraphraser(4, 0), ValueError, "factors must be at least 1, got 0"),
    (lambda s, t: kdfast.ofd_margin(s, s), ValueError, r"weight must have \(channels,\), got shape \(3, 5, 6, 5\)"),
    (
        lambda s, t: kdfast.ofd_margin(torch.ones(3), torch.ones(4)),
        ValueError,
        r"bias must have weight's shape \(3,\), got shape \(4,\)",
    ),
    (
        lambda s, t: kdfast.JacobianMatching()(s[0, 0], t[0, 0], s[0], torch.zeros(6, dtype=torch.long)),
        ValueError,
        "images must have the student's batch size 6",
    ),
    (
        lambda s, t: kdfast.JacobianMatching()(s[0, 0], t[0, 0], s[0, 0], torch.zeros(6, dtype=torch.long)),
        ValueError,
        "images must require a gradient before both networks run",
    ),
    (
        lambda s, t: kdfast.JacobianMatching()(
            s[0, 0], t[0, 0], s[0, 0].clone().requires_grad_(), torch.zeros(6, dtype=torch.long)
        ),
        ValueError,
        "teacher must be logits with their graph from images",
    ),
    (
        lambda s, t: kdfast.JacobianMatching()(
            s[0, 0], t[0, 0], s[0, 0].clone().requires_grad_(), torch.full((6,), 5, dtype=torch.long)
        ),
        ValueError,
        r"labels\[0\] is 5, expected a class from 0 to 4",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(call, error, message):
    with kdfast.fallback(), pytest.raises(error, match=message):
        call(torch.randn(3, 5, 6, 5), torch.randn(3, 5, 6, 5))


def _all_ops(student, teacher):
    margin = torch.linspace(-1, 0, student.shape[1], device=student.device)
    return sum(variant.call(ops, student, teacher, margin).square().sum() for variant in VARIANTS.values())


def _all_losses(student, teacher, weight):
    layers = [student, student * 2], [teacher, teacher + 1]
    margin = kdfast.ofd_margin(weight, weight)
    return (
        kdfast.FitNets()(*layers)
        + kdfast.FT()(*layers)
        + kdfast.AB(reduction="mean")(*layers)
        + kdfast.OFD(reduction="mean")(*layers, [margin, margin])
        + kdfast.HCL()(*layers)
    )


def _inputs(implementation, rows=3, dtype=torch.float32):
    return make(implementation, (rows, 4, 6, 5), dtype)[:2]


def _layers(implementation, rows=3, dtype=torch.float32):
    return [*_inputs(implementation, rows, dtype), torch.rand(4, device=implementation.device)]


def test_compile(implementation):
    behaviour.check_compiled(_all_ops, _inputs(implementation), backend="aot_eager")
    behaviour.check_compiled(_all_losses, _layers(implementation), backend="aot_eager")


def test_compile_inductor(implementation):
    if implementation.name in ("simt", "fallback"):
        pytest.skip("test_compile is enough")
    behaviour.check_compiled(_all_ops, _inputs(implementation))
    behaviour.check_compiled(_all_losses, _layers(implementation))


@pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
def test_compile_channels_last(implementation):
    inputs = [x.contiguous(memory_format=torch.channels_last) for x in _inputs(implementation)]
    behaviour.check_compiled(_all_ops, inputs, backend="aot_eager")


@pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
def test_compile_dynamic(implementation):
    """Another batch size needs no graph break; sizes may be symbols."""
    torch.compiler.reset()
    compiled = torch.compile(_all_ops, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 4, 5):
        inputs = _inputs(implementation, rows)
        torch.testing.assert_close(compiled(*inputs), _all_ops(*inputs))


def test_compile_refuses_jacobians():
    """An error that says why, where a whole graph is asked for."""
    loss = torch.compile(kdfast.JacobianMatching(), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="second derivatives"):
        loss(torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 4), torch.zeros(2, dtype=torch.long))


def test_autocast(implementation):
    """Autocast changes no loss: maps are taken in the dtype in which they come, sums stay in float32."""
    vid = kdfast.VID(4, 5, 4).to(implementation.device)

    def with_vid(student, teacher, weight):
        return _all_losses(student, teacher, weight) + vid(student, teacher)

    for function, inputs in (
        (_all_ops, _inputs(implementation)),
        (with_vid, _layers(implementation)),
        (with_vid, _layers(implementation, dtype=torch.bfloat16)),
    ):
        plain, leaves = behaviour.leaves_of(inputs), behaviour.leaves_of(inputs)
        loss = function(*plain)
        with torch.autocast(implementation.device.type, dtype=torch.bfloat16):
            inside = function(*leaves)
            assert inside.dtype == torch.float32 and torch.equal(inside, loss)
        grads = (torch.autograd.grad(x, y, allow_unused=True) for x, y in ((loss, plain), (inside, leaves)))
        for want, got in zip(*grads, strict=True):
            assert torch.equal(want, got) if want is not None else got is None


DETERMINISTIC = [
    (5, 3, 9, 7),
    (2, 40, 60, 50),  # several pieces of a sample, and groups of samples
    (70, 130, 2, 2),  # more rows than a block adds up
]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", DETERMINISTIC, ids=str)
def test_deterministic(implementation, shape, memory_format, same_bits):
    """Equal bits from run to run, for any number of threads, and in any order of CUDA's threads."""
    if implementation.name == "simt" and shape[0] != 5:
        pytest.skip("a fiber per thread: a minute")
    *maps, margin = make(implementation, shape, torch.float32)
    maps = [x.contiguous(memory_format=memory_format) for x in maps]

    def run():
        results = []
        for variant in VARIANTS.values():
            leaves = [x.clone().requires_grad_() for x in maps]
            value = variant.call(ops, *leaves, margin)
            grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
            results += [value, *(g for g in grads if g is not None)]
        return results

    same_bits(run)


@pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
def test_deterministic_algorithms_are_enough(implementation, deterministic_algorithms):
    for function, inputs in ((_all_ops, _inputs(implementation)), (_all_losses, _layers(implementation))):
        leaves = behaviour.leaves_of(inputs)
        grads = torch.autograd.grad(function(*leaves), leaves, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)
    student = torch.randn(3, 4, 7, 7, device=implementation.device, requires_grad=True)  # pooled in uneven windows
    kdfast.VID(4, 5, 4).to(implementation.device)(student, _inputs(implementation)[1][..., :4, :4]).backward()
    assert student.grad.isfinite().all()


def test_transforms_refused(implementation):
    student, teacher, _ = make(implementation, SMALL)
    behaviour.check_refuses_transforms(lambda s: ops.squared_error(s, teacher), student)
    behaviour.check_refuses_transforms(lambda s: ops.pyramid_error(s, teacher), student)


def test_dtensor_refused(dtensor):
    plain = torch.randn(2, 3, 4, 4)
    for student, teacher, name in ((dtensor(plain), plain, "student"), (plain, dtensor(plain), "teacher")):
        with pytest.raises(TypeError, match=rf"{name} is a DTensor.*{name}.to_local\(\)"):
            ops.squared_error(student, teacher)


@pytest.mark.parametrize("implementation", ["cpu"], indirect=True)
@every_variant
def test_memory(implementation, name):
    """Nothing of the size of a map but the gradients."""
    harness = pytest.importorskip("kdfast.bench").load("harness")
    student, teacher, margin = make(implementation, (4, 16, 64, 64), torch.float32)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        maps = [x.contiguous(memory_format=memory_format).requires_grad_() for x in (student, teacher)]
        peak = harness.peak_cpu(lambda maps=maps: VARIANTS[name].call(ops, *maps, margin).sum().backward())
        assert peak <= (1 + VARIANTS[name].teacher) * student.nbytes + 4096


# ---- the losses' own arithmetic --------------------------------------------------------------------------------------
def test_margin():
    """Truncated means from an integral; finite where the official code divides by zero."""
    weight = torch.tensor([1.0, -0.5, 2.0, 0.1, 1e-3, 0.0, 0.0, 0.0], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.3, -4.0, 0.5, -1.0, 0.7, -0.7, 0.0], dtype=torch.float64)
    margin = kdfast.ofd_margin(weight, bias)
    x = torch.linspace(-20, 0, 2_000_001, dtype=torch.float64)
    for m, w, b in zip(margin[:5], weight.abs(), bias, strict=False):
        density = torch.exp(-((x - b) / w).square() / 2)
        mass = density.sum() * 1e-5 / (w * (2 * torch.pi) ** 0.5)
        want = (x * density).sum() / density.sum() if mass > 0.001 else -3 * w
        torch.testing.assert_close(m, want, rtol=1e-4, atol=0)
    assert margin[5:].tolist() == [0, -0.7, 0]
    assert kdfast.ofd_margin(weight.half(), bias.float()).dtype == torch.float32


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("ofd_margin__*.npz")), ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_margin_of_official_code(path, dtype):
    """Each channel to 1e-7: the official margins are float32."""
    with np.load(path) as stored:
        weight, bias, want = (torch.from_numpy(stored[name]) for name in ("in_bnw", "in_bnb", "loss"))
    margin = kdfast.ofd_margin(weight.to(dtype), bias.to(dtype))
    assert margin.dtype == dtype
    torch.testing.assert_close(margin.double(), want, rtol=1e-7 if dtype == torch.float64 else 2e-7, atol=0)


@pytest.mark.parametrize("log_scale", [-30.0, -8.5, 0.0, 100.0])
def test_variance_of_vid(log_scale):
    """softplus to the last digits of float32 far below 0, and finite far above (official: off by 4e-4, infinite)."""
    vid, exact = (kdfast.VID(2, 3, 4).to(dtype) for dtype in (torch.float32, torch.float64))
    exact.load_state_dict(vid.state_dict())
    for module in (vid, exact):
        module.log_scale.data.fill_(log_scale)
    student, teacher = torch.randn(2, 2, 3, 3), torch.randn(2, 4, 3, 3)
    losses = [m(*(x.to(m.log_scale.dtype) for x in (student, teacher))) for m in (vid, exact)]
    grads = [torch.autograd.grad(loss, m.log_scale)[0] for loss, m in zip(losses, (vid, exact), strict=True)]
    for got, want in (losses, grads):
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-12)


def test_jacobians_reach_the_weights(implementation):
    """Through the double backward of convolutions; a network without slope is left alone, not thrown far away."""
    from torch import nn

    def network(width):
        return nn.Sequential(nn.Conv2d(2, width, 3), nn.Softplus(), nn.Flatten(), nn.Linear(width * 4, 3)).double()

    student, teacher = (network(width).to(implementation.device) for width in (3, 5))
    images = torch.randn(4, 2, 4, 4, dtype=torch.float64, device=implementation.device).requires_grad_()
    labels = torch.tensor([0, 2, 1, 1], device=implementation.device)
    loss = kdfast.JacobianMatching()(student(images), teacher(images), images, labels)
    want = oracles.JacobianMatching(student(images), teacher(images), images, labels)
    torch.testing.assert_close(loss, want)
    weights = [student[0].weight, student[3].weight, images]
    got, expected = (torch.autograd.grad(x, weights) for x in (loss, want))
    torch.testing.assert_close(got, expected)
    assert all(p.grad is None for p in teacher.parameters())
    student[3].weight.data.zero_()
    loss = kdfast.JacobianMatching()(student(images), teacher(images), images, labels)
    assert all(not g.any() for g in torch.autograd.grad(loss, weights))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((1, 4, 8, 8), (1, 6, 4, 4)),
        ((1, 4, 4, 4), (1, 6, 8, 8)),
        ((1, 4, 9, 7), (1, 6, 5, 7)),
        ((1, 4, 5, 5), (9, 6, 5, 5)),
    ],
    ids=str,
)
def test_hint_regressor(student, teacher):
    out = kdfast.HintRegressor(student, teacher)(torch.randn(2, *student[1:]))
    assert out.shape == (2, *teacher[1:]) and (out >= 0).all()


def test_factors():
    """A paraphraser learns to copy; both factors have one shape."""
    paraphraser, translator = kdfast.Paraphraser(6, 3), kdfast.Translator(4, 3)
    maps = torch.randn(8, 6, 5, 5)
    optimizer = torch.optim.Adam(paraphraser.parameters(), 1e-2)
    errors = []
    for _ in range(60):
        error = ops.squared_error(paraphraser.reconstruct(maps), maps)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.9 * errors[0]
    factor = translator(torch.randn(8, 4, 5, 5))
    assert factor.shape == paraphraser(maps).shape == (8, 3, 5, 5)
    kdfast.FT()(factor, paraphraser(maps).detach()).backward()
    assert all(p.grad is not None for p in translator.parameters())


def test_connector():
    connector = kdfast.OFDConnector(4, 6)
    assert [tuple(p.shape) for p in connector.parameters()] == [(6, 4, 1, 1), (6,), (6,)]
    assert connector(torch.randn(2, 4, 3, 3)).shape == (2, 6, 3, 3)


# ---- CUDA only -------------------------------------------------------------------------------------------------------
def test_no_host_sync(cuda):
    behaviour.check_no_host_sync(_all_ops, _inputs(cuda, 16, torch.bfloat16))
    behaviour.check_no_host_sync(_all_losses, _layers(cuda, 16))


def test_cuda_graph(cuda):
    behaviour.check_cuda_graph(_all_ops, _inputs(cuda, 16), _inputs(cuda, 16))
    behaviour.check_cuda_graph(_all_losses, _layers(cuda, 16), _layers(cuda, 16))
