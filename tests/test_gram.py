"""The gram family: its ops against the formulas, on each implementation."""

import behaviour
import oracles
import pytest
import torch
from behaviour import FLOATS, HALVES, LAYOUTS
from conftest import assert_close

import kdfast
from kdfast import ops

raw = torch.ops.kdfast

CASES = [  # rows, features
    (1, 3),
    (2, 1),
    (5, 9),
    (33, 17),  # one row more than a block of 32, one feature more than a vector
    (67, 17),  # one tile of 64 and a bit, in rows
    (5, 67),  # and in features
    (5, 1037),  # more features than a panel of 1024
]
SMALL = (5, 9)
MAPS = [(1, 1, 1, 1), (2, 3, 4, 5), (2, 5, 9, 8), (1, 65, 6, 23)]  # positions for several blocks of 64, odd channels
SERIES = [0.4, 0.3, 0.2, 0.1]
VARIANTS = {
    "rows": {},
    "rows_absolute": {"kind": "rows_absolute"},
    "distribution": {"kind": "distribution", "eps": 1e-7},
    "polynomial": {"kind": "polynomial", "coefficients": SERIES},
    "absolute": {"kind": "absolute", "eps": 1e-8},
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def make(implementation, shape, dtype=torch.float64, teacher_dtype=None):
    """-> a student's embeddings [B, D] or maps, and a teacher's of another width."""
    other = (shape[0], shape[1] // 2 + 1, *shape[2:])
    pair = (torch.randn(*s, dtype=torch.float64) for s in (shape, other))
    dtypes = dtype, teacher_dtype or dtype
    return [x.to(t).to(implementation.device) for x, t in zip(pair, dtypes, strict=True)]


def check(function, oracle, sizes, student, teacher, upstream=1.0, **options):
    """Loss and both gradients against the oracle's."""
    leaves = [x if x.requires_grad else x.detach().clone().requires_grad_() for x in (student, teacher)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    loss, want = function(*leaves, **options), oracle(*exact, **options)
    value, *entries = sizes(*exact, **options)
    cols = max(x[0].numel() for x in exact)
    assert loss.shape == ()
    assert_close(loss, want.detach(), value, cols, loss.dtype)
    grads = (torch.autograd.grad(x, y, torch.full_like(x, upstream)) for x, y in ((loss, leaves), (want, exact)))
    for x, a, b, size, side in zip(leaves, *grads, entries, ("student", "teacher"), strict=True):
        assert a.dtype == x.dtype and a.shape == x.shape
        assert_close(a, b, abs(upstream) * size, cols, loss.dtype, f"gradient of the {side}")


def check_distance(student, teacher, name, upstream=1.0):
    check(ops.gram_distance, oracles.gram_distance, oracles.sizes_gram, student, teacher, upstream, **VARIANTS[name])


def check_affinity(student, teacher, upstream=1.0):
    check(ops.affinity, oracles.affinity, oracles.sizes_affinity, student, teacher, upstream)


# ---- value and gradients ---------------------------------------------------------------------------------------------
@every_variant
@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matches_oracle(implementation, name, shape, dtype):
    if implementation.name == "simt" and shape[1] > 1000:
        pytest.skip("a fiber per thread: slow, and CUDA has no panels")
    check_distance(*make(implementation, shape, dtype), name, upstream=-1.5)


@every_variant
def test_batches(implementation, name):
    student, teacher = (torch.randn(3, 5, d, device=implementation.device) for d in (7, 4))
    check_distance(student, teacher, name)


@pytest.mark.parametrize("terms", [1, 2, 3, 16])  # CASES have 4
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_polynomials(implementation, terms, dtype):
    coefficients = [0.9**k for k in range(terms)]
    functions = ops.gram_distance, oracles.gram_distance, oracles.sizes_gram
    check(*functions, *make(implementation, SMALL, dtype), kind="polynomial", coefficients=coefficients)


@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_affinity(implementation, shape, dtype):
    check_affinity(*make(implementation, shape, dtype), upstream=-1.5)


@every_variant
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_low_precision(implementation, name, dtype):
    """float32 accumulation and result, gradients in the inputs' dtype; exact in the rounded inputs."""
    pair = make(implementation, (5, 33), dtype)
    assert ops.gram_distance(*pair, **VARIANTS[name]).dtype == torch.float32
    check_distance(*pair, name)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.float64)],
    ids=str,
)
@every_variant
def test_mixed_dtypes(implementation, name, student, teacher):
    check_distance(*make(implementation, SMALL, student, teacher), name)


@every_variant
def test_gradcheck(implementation, name):
    pair = behaviour.leaves_of(make(implementation, (4, 5)))
    assert torch.autograd.gradcheck(lambda s, t: ops.gram_distance(s, t, **VARIANTS[name]), pair)


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 40, 33), (1, 70, 65)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products(implementation, shape, dtype):
    """Inner products and weighted sums of any strides, with themselves and with others, and their gradients."""
    accumulator = torch.promote_types(dtype, torch.float32)
    z, n, d = shape
    a, b = (torch.randn(z, m, d, dtype=torch.float64).to(dtype).to(implementation.device) for m in (n, n + 3))
    for x, y in ((a, None), (a, b), (a.transpose(1, 2).contiguous().transpose(1, 2), b)):
        leaves = behaviour.leaves_of([x] if y is None else [x, y])
        exact = behaviour.leaves_of(v.double() for v in leaves)
        got, want = ops.inner_products(*leaves), exact[0] @ exact[-1].transpose(1, 2)
        assert_close(got, want.detach(), exact[0].abs() @ exact[-1].abs().transpose(1, 2), d, accumulator)
        upstream = torch.randn_like(want)
        grads = (torch.autograd.grad(v, w, upstream.to(v.dtype)) for v, w in ((got, leaves), (want, exact)))
        for p, q in zip(*grads, strict=True):
            assert p.dtype == dtype
            assert_close(p, q, 20 * q.abs().max(), n, accumulator)
    if dtype == accumulator:
        w = torch.randn(z, n + 3, n, dtype=dtype, device=a.device).transpose(1, 2)
        got, want = raw.weighted_sums(w, b, torch.tensor(-2.5, dtype=dtype)), -2.5 * w.double() @ b.double()
        assert_close(got, want, 2.5 * w.double().abs() @ b.double().abs(), n, accumulator)


def test_opcheck(implementation):
    """Schemas, shape functions and dynamic shapes of the raw ops, on inputs that need no gradient."""
    a, b = (torch.randn(2, n, 7, device=implementation.device) for n in (4, 3))
    gram, grad = a @ a.transpose(1, 2), torch.tensor(2.0, device=a.device)
    calls = [
        ("inner_products", (a, None)),
        ("inner_products", (a, b)),
        ("weighted_sums", (gram, a, grad)),
        ("compare_grams", (gram, gram + 1, "rows", 0.0, [], True, False)),
        ("compare_grams", (gram, gram + 1, "distribution", 1e-7, [], True, True)),
        ("compare_grams", (gram, gram + 1, "polynomial", 0.0, SERIES, False, False)),
        ("affinity", (a, a[:, :2], 1e-8, True, False)),
        ("affinity_gradient", (grad, torch.randn(2, 7, 4, device=a.device), a, 1e-8)),
    ]
    for op, args in calls:
        torch.library.opcheck(getattr(raw, op).default, args)


# ---- arguments -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["rows", "distribution"])
def test_layouts(implementation, name, layout):
    for dtype in (torch.float32, torch.bfloat16):
        check_distance(*(LAYOUTS[layout](x) for x in make(implementation, (4, 35), dtype)), name)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_affinity_layouts(implementation, memory_format):
    for dtype in (torch.float32, torch.bfloat16):
        pair = make(implementation, (2, 5, 9, 8), dtype)
        check_affinity(*(x.contiguous(memory_format=memory_format)[..., 1::2].requires_grad_() for x in pair))


# ---- edges -----------------------------------------------------------------------------------------------------------
LAYERWISE = {
    "SP": kdfast.SP(),
    "NST": kdfast.NST(),
    "FSP": lambda s, t: kdfast.FSP()([s, s.flip(1)], [t, t.flip(1)]),
    "FAKD": kdfast.FAKD(),
    "FAKD channel": kdfast.FAKD("channel"),
    "FAKD instance": kdfast.FAKD("instance"),
    "LKD": kdfast.LKD(2),
    "PKT": kdfast.PKT(),
    "CCKD": kdfast.CCKD(),
}
every_loss = pytest.mark.parametrize("loss", LAYERWISE)


@every_loss
@pytest.mark.parametrize("shape", [(3, 4, 6, 5), (2, 70, 3, 3), (40, 2, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_edges_equal_networks(implementation, loss, shape, dtype):
    student = torch.randn(shape, device=implementation.device).to(dtype).requires_grad_()
    value = LAYERWISE[loss](student, student.detach().clone())
    assert value == 0 and torch.autograd.grad(value, student)[0].isfinite().all()


@every_loss
@pytest.mark.parametrize("where", ["sample", "channel", "position", "all"])
def test_edges_zeros(implementation, loss, where):
    """A vector that is 0, in the student, the teacher or both: finite everywhere, where official codes give NaN."""
    for sides in ((0,), (1,), (0, 1)):
        pair = [torch.randn(3, 4, 4, 4, device=implementation.device) for _ in range(2)]
        for side in sides:
            x = pair[side]
            {"sample": x[1], "channel": x[:, 1], "position": x[:, :, 1, 2], "all": x}[where].zero_()
        leaves = behaviour.leaves_of(pair)
        value = LAYERWISE[loss](*leaves)
        assert value.isfinite()
        assert all(g.isfinite().all() for g in torch.autograd.grad(value, leaves))


@every_loss
@pytest.mark.parametrize("batch", [0, 1])
def test_edges_few_samples(implementation, loss, batch):
    pair = behaviour.leaves_of(torch.randn(batch, 4, 4, 4, device=implementation.device) for _ in range(2))
    value = LAYERWISE[loss](*pair)
    assert value.shape == () and value.isfinite()
    assert torch.autograd.grad(value, pair)[0].isfinite().all()


@pytest.mark.parametrize("name", ["rows", "distribution", "polynomial"])
def test_edges_close_networks(implementation, name):
    """A loss of networks that nearly agree keeps its digits."""
    student, _ = make(implementation, (33, 40), torch.float32)
    check_distance(student, student + 1e-4 * torch.randn_like(student), name)


def test_edges_largest_half(implementation):
    """float16 values up to 6e4, whose products no float16 holds."""
    pair = make(implementation, SMALL, torch.float16)
    check_distance(*(x.sign() * 6e4 for x in pair), "rows")


# ---- behaviour in PyTorch --------------------------------------------------------------------------------------------
def _all_losses(student, teacher):
    return sum(LAYERWISE[name](student, teacher) for name in LAYERWISE)


def _pair(implementation, dtype=torch.float32):
    return [torch.randn(3, 4, 4, 4).to(dtype).to(implementation.device) for _ in range(2)]


@every_loss
def test_double_backward_raises(implementation, loss):
    leaves = behaviour.leaves_of(_pair(implementation))
    behaviour.check_refuses_second_derivative(LAYERWISE[loss](*leaves), leaves[0])


@pytest.mark.parametrize("loss", [name for name in LAYERWISE if name != "LKD"])  # that one works on its patches, a copy
def test_inplace_change_raises(implementation, loss):
    behaviour.check_refuses_changed_input(LAYERWISE[loss], _pair(implementation), 0)


ERRORS = [
    (lambda s, t: ops.gram_distance(s, t, "none"), ValueError, "kind must be one of rows, .*, got 'none'"),
    (lambda s, t: ops.gram_distance(s, t[:2]), ValueError, "teacher must have the student's rows"),
    (lambda s, t: ops.gram_distance(s, t, "polynomial"), ValueError, "coefficients belong to kind 'polynomial'"),
    (
        lambda s, t: ops.gram_distance(s, t, "polynomial", coefficients=[0.1] * 17),
        ValueError,
        "coefficients must be at most 16, got 17",
    ),
    (lambda s, t: ops.gram_distance(s, t, eps=-1.0), ValueError, "eps must be from 0.0 to inf, got -1.0"),
    (lambda s, t: ops.gram_distance(s.int(), t), TypeError, "student must be float32"),
    (lambda s, t: ops.affinity(s, t), ValueError, "student must be .batch, channels, height, width"),
    (lambda s, t: ops.inner_products(s), ValueError, "a must be .batches, rows, features"),
    (lambda s, t: ops.inner_products(s[None], t[None]), ValueError, r"b must be \(1, rows, 9\)"),
    (lambda s, t: kdfast.CCKD("rbf"), ValueError, "kernel must be one of gaussian, bilinear, got 'rbf'"),
    (lambda s, t: kdfast.CCKD(order=-1), ValueError, "order must be at least 0"),
    (lambda s, t: kdfast.CCKD(order=16), ValueError, "order must be at most 15, got 16"),
    (lambda s, t: kdfast.PKT(0), ValueError, "eps must be finite and above 0"),
    (lambda s, t: kdfast.FAKD("rows"), ValueError, "affinity must be one of spatial, channel, instance"),
    (
        lambda s, t: kdfast.FAKD("channel")(s[..., None, None], t[..., None, None]),
        ValueError,
        "the student's 9 channels",
    ),
    (lambda s, t: kdfast.FSP()(s, t), ValueError, "student must be a list of at least two maps, got Tensor"),
    (lambda s, t: kdfast.FSP()([s[..., None, None]] * 2, [t[..., None, None]] * 2), ValueError, "the 9 channels"),
    (
        lambda s, t: kdfast.LKD()(s[..., None, None], t[..., None, None]),
        ValueError,
        "at least 4 positions high and wide",
    ),
    (lambda s, t: kdfast.SP()(s, t[1:]), ValueError, "teacher must have the student's batch size 5"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(call, error, message):
    with kdfast.fallback(), pytest.raises(error, match=message):
        call(torch.randn(5, 9), torch.randn(5, 3))


@pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
def test_compile(implementation):
    behaviour.check_compiled(_all_losses, _pair(implementation), backend="aot_eager")


@pytest.mark.parametrize("implementation", ["cpu", "cuda"], indirect=True)
def test_compile_inductor(implementation):
    behaviour.check_compiled(_all_losses, _pair(implementation))


@pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
def test_settings_change_nothing(implementation):
    """Neither autocast nor the precision that torch allows to products of float32."""
    precision = torch.get_float32_matmul_precision()
    for dtype in (torch.float32, torch.bfloat16):
        pair = _pair(implementation, dtype)
        plain, leaves = behaviour.leaves_of(pair), behaviour.leaves_of(pair)
        loss = _all_losses(*plain)
        want = torch.autograd.grad(loss, plain)
        torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast(implementation.device.type, dtype=torch.bfloat16):
                inside = _all_losses(*leaves)
            got = torch.autograd.grad(inside, leaves)
        finally:
            torch.set_float32_matmul_precision(precision)
        assert inside.dtype == torch.float32 and torch.equal(inside, loss)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("shape", [(5, 9, 6, 6), (40, 3, 8, 9), (2, 17, 9, 8)], ids=str)
def test_deterministic(implementation, shape, same_bits):
    """Equal bits from run to run, for any number of threads, and in any order of CUDA's threads."""
    if implementation.name == "simt" and shape[0] == 40:
        pytest.skip("a fiber per thread: a minute")
    pair = [torch.randn(shape, device=implementation.device) for _ in range(2)]

    def run():
        leaves = behaviour.leaves_of(pair)
        loss = _all_losses(*leaves)
        return [loss, *torch.autograd.grad(loss, leaves)]

    same_bits(run)


@pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
def test_deterministic_algorithms_are_enough(implementation, deterministic_algorithms):
    leaves = behaviour.leaves_of(_pair(implementation))
    assert all(g.isfinite().all() for g in torch.autograd.grad(_all_losses(*leaves), leaves))


@every_loss
def test_transforms_refused(implementation, loss):
    student, teacher = _pair(implementation)
    behaviour.check_refuses_transforms(lambda s: LAYERWISE[loss](s, teacher), student)


@pytest.mark.parametrize("implementation", ["cpu"], indirect=True)
def test_affinity_memory(implementation):
    """Nothing of the size of positions^2: a few copies of the maps."""
    harness = pytest.importorskip("kdfast.bench").load("harness")
    student, teacher = (torch.randn(1, 16, 48, 48) for _ in range(2))
    peak = harness.peak_cpu(lambda: ops.affinity(student.requires_grad_(), teacher).backward())
    assert peak <= 8 * student.nbytes < 4 * 2304**2


# ---- CUDA only -------------------------------------------------------------------------------------------------------
def test_no_host_sync(cuda):
    behaviour.check_no_host_sync(_all_losses, _pair(cuda, torch.bfloat16))


def test_cuda_graph(cuda):
    behaviour.check_cuda_graph(_all_losses, _pair(cuda), _pair(cuda))
