"""Divergences beyond KL: what is true of this family alone. Its contract is in tests/registry/divergence.py."""

import math

import oracles
import pytest
import torch
from official import Official, every_file

import kdfast
from kdfast import ops

INF = math.inf


def logits(*shape, dtype=torch.float64, grad=True):
    return (2 * torch.randn(shape, dtype=dtype)).requires_grad_(grad)


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def assert_same(got, want, rtol=1e-9):
    torch.testing.assert_close(got, want.to(got.dtype), rtol=rtol, atol=1e-13)


# ---- rows that count -------------------------------------------------------------------------------------------------
OF_MASK = {
    "kl": lambda s, t, y, **o: ops.softmax_kl(s, t, 2.0, **o),
    "jsd": lambda s, t, y, **o: ops.softmax_kl(s, t, beta=0.3, **o),
    "skew": lambda s, t, y, **o: ops.skew_kl(s, t, **o),
    "variation": lambda s, t, y, **o: ops.total_variation_distance(s, t, **o),
    "alpha_beta": lambda s, t, y, **o: ops.alpha_beta(s, t, 0.2, 0.7, **o),
    "standardized": lambda s, t, y, **o: ops.softmax_kl(s, t, 2.0, standardize=True, **o),
    "non_target": lambda s, t, y, **o: ops.non_target_cross_entropy(s, t, y, **o),
    "dkd": lambda s, t, y, **o: ops.dkd(s, t, y, **o),
    "ce_kl": lambda s, t, y, **o: ops.cross_entropy_kl(s, t, y, 2.0, label_smoothing=0.1, **o),
    "ce_kl_soft": lambda s, t, y, **o: ops.cross_entropy_kl(s, t, t.detach().softmax(-1), label_smoothing=0.1, **o),
    "topk": lambda s, t, y, **o: ops.softmax_kl(s, kdfast.TopK.of(t.nan_to_num(0), 3, 2.0), 2.0, **o),
    "topk_jsd": lambda s, t, y, **o: ops.softmax_kl(s, kdfast.TopK.of(t.nan_to_num(0), 3), beta=0.3, **o),
}
every_masked = pytest.mark.parametrize("call", OF_MASK.values(), ids=OF_MASK)


@every_masked
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_masked_rows_are_neither_read_nor_counted(implementation, call, dtype):
    s, t = (logits(2, 5, 9, dtype=dtype).detach().to(implementation.device) for _ in range(2))
    y = torch.randint(9, (2, 5), device=s.device)
    mask = torch.arange(10, device=s.device).reshape(2, 5) % 3 == 0
    weight = torch.rand(2, 5, dtype=dtype, device=s.device)
    kept = [x[mask].clone().requires_grad_() for x in (s, t)]
    rows = call(*kept, y[mask], reduction="none")
    s[~mask] = t[~mask] = math.nan
    y[~mask] = -100
    s, t = s.requires_grad_(), t.requires_grad_()
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    for options, want in (
        ({}, rows.mean()),
        ({"reduction": "sum"}, rows.sum()),
        ({"weight": weight}, (weight[mask] * rows).mean()),
        ({"divisor": 7}, rows.sum() / 7),
        ({"divisor": torch.tensor(7, device=s.device), "reduction": "sum"}, rows.sum() / 7),
    ):
        loss = call(s, t, y, mask=mask, **options)
        torch.testing.assert_close(loss, want, rtol=rtol, atol=1e-6 * rtol)
        pairs = [(s, kept[0])] + [(t, kept[1])] * want_gradient(call)
        for leaf, of_kept in pairs:
            (got,), (expected,) = gradients(loss, leaf), torch.autograd.grad(want, of_kept, retain_graph=True)
            assert not got[~mask].any()
            torch.testing.assert_close(got[mask], expected, rtol=10 * rtol, atol=rtol)
            loss = call(s, t, y, mask=mask, **options)
    none = call(s, t, y, mask=mask, reduction="none")
    assert none.shape == (2, 5) and not none[~mask].any()
    torch.testing.assert_close(none[mask], rows, rtol=rtol, atol=1e-6 * rtol)


def want_gradient(call):
    """Whether the teacher gets one."""
    return call not in (OF_MASK["topk"], OF_MASK["topk_jsd"])


@every_masked
def test_no_row_left(implementation, call):
    s, t = (torch.full((3, 9), math.nan, device=implementation.device, requires_grad=True) for _ in range(2))
    loss = call(s, t, torch.zeros(3, dtype=torch.long, device=s.device), mask=torch.zeros(3, device=s.device).bool())
    assert loss == 0 and not gradients(loss, s)[0].any()


@every_masked
def test_leading_dimensions(implementation, call):
    s, t = (logits(6, 9).detach().to(implementation.device) for _ in range(2))
    y = torch.randint(9, (6,), device=s.device)
    flat = call(s, t, y, reduction="none")
    deep = call(s.reshape(2, 1, 3, 9), t.reshape(2, 1, 3, 9), y.reshape(2, 1, 3), reduction="none")
    assert torch.equal(deep, flat.reshape(2, 1, 3))
    assert_same(call(s.reshape(3, 2, 9), t.reshape(3, 2, 9), y.reshape(3, 2)), flat.mean())
    strided = s.reshape(2, 3, 9).transpose(0, 1), t.reshape(2, 3, 9).transpose(0, 1)
    assert torch.equal(call(*strided, y.reshape(2, 3).t(), reduction="none"), flat.reshape(2, 3).t())


def test_counts_of_cross_entropy_and_kl_are_their_own(implementation):
    """A label that is ignored leaves the cross-entropy only."""
    s, t = (logits(4, 9).to(implementation.device) for _ in range(2))
    y = torch.tensor([1, -100, 3, 4], device=s.device)
    mask = torch.tensor([True, True, True, False], device=s.device)
    loss = ops.cross_entropy_kl(s, t, y, 2.0, mask=mask)
    want = oracles.softmax_kl(s[:3], t[:3], 2.0) + oracles.cross_entropy(s[:3], y[:3])
    assert_same(loss, want)
    for got, expected in zip(gradients(loss, s, t), gradients(want, s, t), strict=True):
        assert_same(got, expected)


# ---- temperatures ----------------------------------------------------------------------------------------------------
def of_temperatures(s, t, t_s, t_t, beta=0.0, standardize=False):
    """T^2 times the divergence of each row, in float64."""
    if standardize:
        s, t = oracles.standardized(s), oracles.standardized(t)
    log_q, log_p = ((z / (T if T.dim() == 0 else T[:, None])).log_softmax(1) for z, T in ((s, t_s), (t, t_t)))
    if beta in (0, 1):
        rows = oracles._kl(log_q, log_p) if beta else oracles._kl(log_p, log_q)
    else:
        log_m = oracles._mixed(log_p, log_q, beta)
        rows = beta * oracles._kl(log_p, log_m) + (1 - beta) * oracles._kl(log_q, log_m)
    return t_s**2 * rows


@pytest.mark.parametrize("cols", [9, 1025, 2049])
@pytest.mark.parametrize("of_rows", [False, True], ids=["one", "of_rows"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("teacher", [False, True], ids=["shared", "own"])
def test_temperatures_have_gradients(implementation, cols, of_rows, beta, standardize, teacher):
    s, t = (logits(5, cols).to(implementation.device).detach().requires_grad_() for _ in range(2))
    t_s, t_t = (
        (x + torch.rand((5,) if of_rows else (), dtype=torch.float64, device=s.device)).requires_grad_() for x in (1, 3)
    )
    options = {"beta": beta, "standardize": standardize}
    leaves = [s, t, t_s, *[t_t] * teacher]
    for reduction in ("mean", "none"):
        loss = ops.softmax_kl(s, t, t_s, teacher_temperature=t_t if teacher else None, reduction=reduction, **options)
        want = of_temperatures(s, t, t_s, t_t if teacher else t_s, **options)
        if reduction == "mean":
            want = want.mean()
        factors = torch.rand(want.shape, dtype=torch.float64, device=s.device)
        assert_same(loss, want)
        got, expected = (torch.autograd.grad(x, leaves, factors) for x in (loss, want))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12 * float(b.abs().max()) + 1e-14)


def test_gradcheck_of_temperatures(implementation):
    s, t = (logits(3, 5).to(implementation.device).detach().requires_grad_() for _ in range(2))
    temperature = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, device=s.device, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: ops.softmax_kl(x[0], x[1], x[2], standardize=True, reduction="sum"), (s, t, temperature)
    )


def test_bad_temperature_in_a_tensor(implementation):
    s, t = (logits(3, 5).to(implementation.device) for _ in range(2))
    temperature = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64, device=s.device)
    if s.device.type == "cpu":
        with pytest.raises(ValueError, match="temperature must be above 0, got -1 in a tensor"):
            ops.softmax_kl(s, t, temperature)
    else:
        rows = ops.softmax_kl(s, t, temperature, reduction="none")
        assert rows.isnan().tolist() == [False, True, True]


# ---- edges -----------------------------------------------------------------------------------------------------------
EDGES = {name: call for name, call in OF_MASK.items() if not name.startswith(("topk", "ce", "dkd", "kl", "jsd"))}
EDGES |= {
    "skew_0": lambda s, t, y, **o: ops.skew_kl(s, t, 0, **o),
    "skew_1": lambda s, t, y, **o: ops.skew_kl(s, t, 1.0, **o),
    "skew_reverse": lambda s, t, y, **o: ops.skew_kl(s, t, reverse=True, **o),
    "two_temperatures": lambda s, t, y, **o: ops.softmax_kl(s, t, 1.0, teacher_temperature=4.0, **o),
    **{
        f"alpha_beta_{a}_{b}": lambda s, t, y, a=a, b=b, **o: ops.alpha_beta(s, t, a, b, **o)
        for a, b in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.0), (0.5, -0.5), (0.0, 0.0), (2.0, 0.5), (-0.3, 0.8))
    },
}


@pytest.mark.parametrize("call", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_implementations_agree(implementation, call, dtype):
    """Near and far networks, of any exponents, with the plain-PyTorch form in float64."""
    s, t = (logits(6, 1030, dtype=dtype).detach().to(implementation.device) for _ in range(2))
    t[0] = s[0] + 1e-3 * torch.randn(1030, device=s.device)
    t[1] = s[1] + 0.1 * torch.randn(1030, device=s.device)
    y = torch.arange(6, device=s.device)

    def run(s, t):
        leaves = s.clone().requires_grad_(), t.clone().requires_grad_()
        rows = call(*leaves, y, reduction="none")
        return rows, *torch.autograd.grad(rows.sum(), leaves)

    got = run(s, t)
    with kdfast.fallback():
        want = run(s.double(), t.double())
    digits = 1e-11 if dtype == torch.float64 else 1e-5
    for a, b in zip(got, want, strict=True):
        error = (a.double() - b).abs().flatten(1) if a.dim() > 1 else (a.double() - b).abs()[:, None]
        size = b.abs().flatten(1).amax(1) if b.dim() > 1 else b.abs()
        assert (error.amax(1) <= digits * (size + size.amax())).all()  # of near networks d has as many digits less


@pytest.mark.parametrize("call", EDGES.values(), ids=EDGES)
def test_nan_shows(implementation, call):
    for side in range(2):
        x = [logits(3, 9, dtype=torch.float32).detach().to(implementation.device) for _ in range(2)]
        x[side][1, 4] = math.nan
        x = [z.requires_grad_() for z in x]
        rows = call(*x, torch.zeros(3, dtype=torch.long, device=x[0].device), reduction="none")
        assert rows.isnan().tolist() == [False, True, False]
        assert gradients(rows.sum(), x[0])[0].isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("reverse", [False, True])
def test_skew_is_bounded(implementation, reverse):
    """Where KL is infinite: at most log(1 / skew), with finite gradients."""
    rows = [[0.0, -INF, 0.0, 200.0], [0.0, 0.0, -INF, -INF]], [[0.0, 200.0, -INF, 0.0], [-INF, -INF, 0.0, 0.0]]
    s, t = (torch.tensor(x, device=implementation.device, requires_grad=True) for x in rows)
    rows = ops.skew_kl(s, t, 0.1, reverse=reverse, reduction="none")
    torch.testing.assert_close(rows, torch.full_like(rows, math.log(10)))
    assert all(g.isfinite().all() for g in gradients(rows.sum(), s, t))
    infinite = ops.skew_kl(s, t, 0.0, reverse=reverse, reduction="none")
    assert infinite.isinf().tolist() == [not reverse, True]
    assert all(g.isfinite().all() for g in gradients(infinite.sum(), s, t))


def test_constant_rows_are_standardized_to_zeros(implementation):
    s = torch.full((2, 7), 0.3, device=implementation.device, requires_grad=True)
    t = torch.tensor([[0.3] * 7, [1.0, 2, 3, 4, 5, 6, 7]], device=s.device)
    rows = ops.softmax_kl(s, t, standardize=True, reduction="none")
    assert_same(rows, oracles.divergence_kl(s, t, standardize=True, reduction="none"), 1e-6)
    (got,) = gradients(rows.sum(), s)
    (want,) = gradients(oracles.divergence_kl(s, t, standardize=True, reduction="sum"), s)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


# ---- losses with a state ---------------------------------------------------------------------------------------------
@every_file("ctkd")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_ctkd_matches_official_code(implementation, path, dtype):
    x = Official(path, dtype, implementation.device)
    p = x.parameters
    loss = kdfast.CTKD(p["t_start"], p["t_start"] + p["t_end"], p["decay_loops"]).to(implementation.device, dtype)
    raw = loss.raw
    with torch.no_grad():
        raw.fill_(float(x("raw")[0]))
    value = loss(x("s"), x("t"), p["epoch"])
    temperature = p["t_start"] + p["t_end"] * float(torch.sigmoid(raw))
    x.assert_close("loss", value, "loss", x.of_type(1e-9, 2e-5), x.of_type(1e-14, 2e-7 * temperature**2))
    grads = torch.autograd.grad(value, (x("s"), x("t"), raw))
    floors = (2e-8 * temperature, 2e-8 * temperature, 2e-7 * temperature**2)
    for name, grad, floor in zip(("s", "t", "raw"), grads, floors, strict=True):
        x.assert_close(
            name, grad.reshape(x[f"grad_{name}"].shape), f"grad_{name}", x.of_type(1e-8, 2e-5), x.of_type(1e-13, floor)
        )
    in_tensor = loss(x("s"), x("t"), torch.tensor(p["epoch"], device=implementation.device))
    torch.testing.assert_close(in_tensor, value)


@every_file("taid")
def test_taid_moves_as_the_official_code(path):
    """The official code is fed the cross-entropy: the file has its losses."""
    x = Official(path)
    p = x.parameters
    loss = kdfast.TAID(p["t_start"], p["t_end"], p["alpha"], p["beta"])
    moved = []
    for value, step in zip(x["in_losses"], x["in_steps"].tolist(), strict=True):
        loss.update(value, step, p["total"])
        moved.append(float(loss.t))
    torch.testing.assert_close(torch.tensor(moved, dtype=torch.float64), x["out_t"], rtol=1e-6, atol=0)


def test_taid_at_its_ends_leaves_a_side_out(implementation):
    """Also where that side is -inf."""
    s = torch.tensor([[0.0, -INF, 1.0]], device=implementation.device, requires_grad=True)
    t = torch.tensor([[-INF, 0.0, 1.0]], device=s.device)
    for end, side in ((0.0, s.detach()), (1.0, t)):
        loss = kdfast.TAID(start=end, end=1.0).to(s.device)
        assert torch.equal(loss(s, t), kdfast.KD(1.0)(s, side))


# ---- top-k teachers that give log-probabilities ----------------------------------------------------------------------
@every_file("topk_tail")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_tails_match_official_code(implementation, path, dtype):
    x = Official(path, dtype, implementation.device)
    p = x.parameters
    teacher = kdfast.TopK.of_log_probabilities(x("log_probabilities"), x("indices"), p["temperature"], p["tail"])
    loss = ops.softmax_kl(x("s"), teacher, p["temperature"], beta=p["beta"], mask=x("mask"))
    scale = p["temperature"] ** 2
    x.assert_close("loss", loss, x["loss"] * scale, x.of_type(1e-9, 2e-5), x.of_type(1e-14, 2e-7))
    (grad,) = gradients(loss, x("s"))
    x.assert_close("s", grad, x["grad_s"] * scale, x.of_type(1e-8, 2e-5), x.of_type(1e-13, 1e-7))


@every_file("topk_verl")
def test_dropped_tails_match_official_code(implementation, path):
    x = Official(path, torch.float64, implementation.device)
    teacher = kdfast.TopK.of_log_probabilities(x("log_probabilities"), x("indices"), tail="drop")
    rows = ops.softmax_kl(x("s"), teacher, reduction="none")
    x.assert_close("rows", rows, "out_rows", 1e-9, 1e-14)
    x.assert_close("s", gradients(rows.mean(), x("s"))[0], "grad_s", 1e-8, 1e-13)
    for name, value in zip(("student_mass", "teacher_mass", "overlap"), ops.topk_overlap(x("s"), teacher), strict=True):
        x.assert_close(name, value, x[f"out_{name}"].double(), 1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_bucket_is_the_teacher_of_logits(implementation, beta):
    """Whether the teacher gives logits and their rest, or log-probabilities."""
    s, t = (logits(4, 9).to(implementation.device) for _ in range(2))
    top = kdfast.TopK.of(t, 3, 2.0)
    log_p, indices = (t.detach() / 2).log_softmax(1).topk(3)
    given = kdfast.TopK.of_log_probabilities(log_p, indices, 2.0)
    losses = [ops.softmax_kl(s, x, 2.0, beta=beta) for x in (top, given)]
    assert_same(losses[1], losses[0])
    assert_same(gradients(losses[1], s)[0], gradients(losses[0], s)[0])
    whole = kdfast.TopK.of(t, 9, 2.0)
    assert_same(ops.softmax_kl(s, whole, 2.0, beta=beta), ops.softmax_kl(s, t, 2.0, beta=beta).detach())


def test_a_mass_next_to_1_keeps_its_digits():
    """1 - 1e-9 in the slots leaves 1e-9, or what the least mass is."""
    log_p = torch.tensor([[-1e-3]], dtype=torch.float64)
    s = torch.tensor([[3.0, 1.0, 0.0]], dtype=torch.float64)
    loss = ops.softmax_kl(s, kdfast.TopK.of_log_probabilities(log_p, torch.tensor([[0]])))
    p, q = math.exp(-1e-3), float(s.softmax(1)[0, 0])
    assert_same(
        loss, torch.tensor(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), dtype=torch.float64), 1e-12
    )


def test_padding_may_be_all_there_is(implementation):
    s = logits(2, 5).to(implementation.device).detach().requires_grad_()
    log_p = torch.tensor([[-0.1, math.nan], [math.nan, math.nan]], dtype=torch.float64, device=s.device)
    indices = torch.tensor([[2, -1], [-1, -1]], device=s.device)
    rows = ops.softmax_kl(s, kdfast.TopK.of_log_probabilities(log_p, indices), reduction="none")
    assert rows[0] > 0 and rows[1].abs() < 1e-6  # everything is the rest, on both sides
    assert gradients(rows.sum(), s)[0].isfinite().all()


TOP_K_ERRORS = [
    (lambda s, t: kdfast.TopK.of_log_probabilities(*t, tail="keep"), ValueError, "tail must be one of bucket"),
    (lambda s, t: kdfast.TopK.of_log_probabilities(t[1], t[1]), TypeError, "log_probabilities must be float32"),
    (
        lambda s, t: ops.softmax_kl(s, kdfast.TopK.of_log_probabilities(*t), 2.0),
        ValueError,
        "teacher.values are log-probabilities at temperature 1.0, which does not tell that at temperature 2.0",
    ),
    (
        lambda s, t: ops.softmax_kl(s, kdfast.TopK.of_log_probabilities(t[0], t[1] * 0)),
        ValueError,
        r"teacher.indices\[0, 1\] is 0, which the row has already",
    ),
    (
        lambda s, t: ops.softmax_kl(s, kdfast.TopK.of_log_probabilities(t[0], t[1] - 9)),
        ValueError,
        r"teacher.indices\[0, 0\] is -[0-9]+, expected a class from 0 to 4",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), TOP_K_ERRORS, ids=[message for *_, message in TOP_K_ERRORS])
def test_top_k_errors(call, error, message):
    s = logits(3, 5)
    with pytest.raises(error, match=message):
        call(s, s.detach().log_softmax(1).topk(2))
