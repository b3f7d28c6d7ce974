"""linear_kl: language models from hidden states, against official code and formulas; chunks; groups of processes."""

import math
from unittest import mock

import oracles
import pytest
import torch
from official import Official, every_file
from processes import HAVE_GLOO, NO_GLOO, in_processes

import kdfast
from kdfast import ops
from kdfast.compat.liger import LigerFusedLinearJSD, LigerFusedLinearJSDLoss, LigerJSD, LigerKLDIVLoss
from kdfast.compat.modelopt import LogitsDistillationLoss
from kdfast.compat.trl import generalized_jsd_loss
from kdfast.ops import linear

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def given(x):
    """-> positional arguments and biases of `linear_kl`, of a file."""
    biases = {
        f"{side}_bias": x(name) for side, name in (("student", "bs"), ("teacher", "bt")) if f"in_{name}" in x.arrays
    }
    return [x(name) for name in ("hs", "ws", "ht", "wt")], biases


def check_file(x, loss, factor=1.0):
    """The loss and all gradients of a file, times a factor."""
    x.assert_close("loss", loss, x["loss"] * factor, x.of_type(1e-9, 2e-5), x.of_type(1e-14, 2e-7 * factor))
    for name, grad in x.gradients(loss).items():
        x.assert_close(name, grad, x[f"grad_{name}"] * factor, x.of_type(1e-8, 2e-5), x.of_type(1e-13, 1e-6))


def trl_options(x):
    """The settings of TRL's loss as those of `linear_kl`, and the factor between them."""
    p = x.parameters
    names = ("beta", "temperature", "student_softcap", "teacher_softcap", "student_scale", "teacher_scale")
    options = {name: p[name] for name in (*names, "kl_weight", "ce_weight")}
    if "in_labels" in x.arrays:
        options["labels"] = x("labels")
    elif p["num_items"] is None and p["reduction"] == "batchmean":
        options["divisor"] = len(x("hs"))
    if p["num_items"] is not None:
        options["divisor"] = p["num_items"]
    return options | {"reduction": "sum" if p["reduction"] == "sum" else "mean"}


# ---- official code ---------------------------------------------------------------------------------------------------
@every_file("linear_jsd_trl")
@DTYPES
def test_matches_trl(implementation, path, dtype):
    x = Official(path, dtype, implementation.device)
    if path.stem.endswith("none"):
        pytest.skip("its entries of classes are no result of linear_kl")
    (tensors, biases), options = given(x), trl_options(x)
    check_file(x, ops.linear_kl(*tensors, **biases, **options))
    x = Official(path, dtype, implementation.device)  # three rows at a time
    (tensors, biases), options = given(x), trl_options(x)
    check_file(x, ops.linear_kl(*tensors, **biases, **options, chunk=3))


@every_file("linear_jsd_trl")
def test_trl_drop_in(implementation, path):
    x = Official(path, torch.float64, implementation.device)
    p, ((hs, ws, ht, wt), biases) = x.parameters, given(x)
    if p["ce_weight"]:
        pytest.skip("with a cross-entropy")
    z_s, z_t = (
        torch.nn.functional.linear(h, w, biases.get(f"{side}_bias")) * p[f"{side}_scale"]
        for side, h, w in (("student", hs, ws), ("teacher", ht, wt))
    )
    caps = p["student_softcap"], p["teacher_softcap"]
    z_s, z_t = (z if cap is None else cap * torch.tanh(z / cap) for z, cap in zip((z_s, z_t), caps, strict=True))
    labels = x("labels") if "in_labels" in x.arrays else None
    loss = generalized_jsd_loss(z_s, z_t, labels, p["beta"], p["temperature"], p["reduction"], p["num_items"])
    check_file(x, (loss * x("element_weight")).sum() if p["reduction"] == "none" else loss)


@every_file("linear_jsd_liger")
@DTYPES
def test_matches_liger(implementation, path, dtype):
    x = Official(path, dtype, implementation.device)
    p, (tensors, biases) = x.parameters, given(x)
    labels = x("labels") if "in_labels" in x.arrays else None
    weights = {} if p["kind"] == "fused" else {"kl_weight": p["soft"], "ce_weight": p["hard"]}
    options = {"beta": p["beta"], "temperature": p["temperature"], "labels": labels}
    check_file(x, ops.linear_kl(*tensors, **biases, **weights, **options, ignore_index=p["ignore_index"]))
    x = Official(path, dtype, implementation.device)
    p, (tensors, biases) = x.parameters, given(x)
    if p["kind"] == "fused":
        loss = LigerFusedLinearJSD(p["beta"], p["ignore_index"], p["temperature"])(*tensors, labels)
        for name in ("ht", "wt"):  # the drop-in gives the teacher no gradient
            x.leaves.pop(name, None)
        return check_file(x, loss)
    settings = p["hard"], p["soft"], p["beta"], p["ignore_index"], p["temperature"]
    loss, soft, hard = LigerFusedLinearJSDLoss(*settings, return_soft_hard_loss=True)(*tensors, labels, **biases)
    torch.testing.assert_close(p["soft"] * soft + p["hard"] * hard, loss)
    check_file(x, loss)
    return None


@every_file("liger_jsd")
def test_liger_jsd(path):
    x = Official(path)
    labels = x("labels") if "in_labels" in x.arrays else None
    loss = LigerJSD(x.parameters["beta"], x.parameters["ignore_index"])
    check_file(x, loss(x("s").log_softmax(-1), x("t").log_softmax(-1), labels))


@every_file("liger_kl_div")
def test_liger_kl_div(path):
    x = Official(path)
    p, target = x.parameters, x("t").log_softmax(-1)
    loss = LigerKLDIVLoss(reduction=p["reduction"], log_target=p["log_target"])
    value = loss(x("s").log_softmax(-1), target if p["log_target"] else target.exp())
    value = (value * x("element_weight")).sum() if p["reduction"] == "none" else value
    x.assert_close("loss", value, "loss", 1e-9, 1e-8 * x("s").numel())  # eps enters where a target is below it
    x.assert_close("s", torch.autograd.grad(value, x("s"))[0], "grad_s", 1e-8, 1e-13)


@every_file("modelopt_logits")
def test_modelopt(path):
    x = Official(path)
    loss = LogitsDistillationLoss(x.parameters["temperature"], x.parameters["reduction"])(x("s"), x("t"))
    loss = (loss * x("row_weight")).sum() if x.parameters["reduction"] == "none" else loss
    x.assert_close("loss", loss, "loss", 1e-9, 1e-14)
    x.assert_close("s", torch.autograd.grad(loss, x("s"))[0], "grad_s", 1e-8, 1e-13)


# ---- formulas --------------------------------------------------------------------------------------------------------
def inputs(device, rows=7, classes=13, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (rows, 5), (classes, 5), (classes,), (rows, 4), (classes, 4), (classes,)
    return [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]


def logits(hidden, weight, bias, scale=1.0, cap=None):
    z = (hidden.double() @ weight.double().t() + bias.double()) * scale
    return z if cap is None else cap * torch.tanh(z / cap)


def call(x, **options):
    hs, ws, bs, ht, wt, bt = x
    return ops.linear_kl(hs, ws, ht, wt, student_bias=bs, teacher_bias=bt, **options)


def assert_alike(got, want, leaves, digits=1e-9):
    torch.testing.assert_close(got, want.to(got.dtype), rtol=digits, atol=1e-13)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=10 * digits, atol=digits * float(b.abs().max()))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_formula(implementation, beta, chunk):
    x = inputs(implementation.device)
    labels = torch.tensor([1, -100, 3, 4, 5, 6, 12], device=x[0].device)
    mask = torch.tensor([True, True, False, True, True, True, True], device=x[0].device)
    kept = mask & (labels != -100)
    weight = torch.rand(7, dtype=torch.float64, device=x[0].device)
    options = {"beta": beta, "temperature": 2.0, "kl_weight": 0.7, "ce_weight": 0.3, "scale_by_t2": True}
    forms = {"student_softcap": 3.0, "teacher_softcap": 5.0, "student_scale": 0.5}
    loss = call(x, labels=labels, mask=mask, weight=weight, chunk=chunk, **options, **forms)
    z_s, z_t = (z[kept] for z in (logits(*x[:3], 0.5, 3.0), logits(*x[3:], 1.0, 5.0)))
    want = 0.7 * oracles.softmax_kl(z_s, z_t, 2.0, beta=beta, reduction="none")
    want = want + 0.3 * oracles.cross_entropy(z_s, labels[kept], reduction="none")
    assert_alike(loss, (weight[kept] * want).mean(), x)


def test_temperatures_with_gradients(implementation):
    x = inputs(implementation.device)
    for shape in ((), (7,)):
        t_s, t_t = ((i + torch.rand(shape, dtype=torch.float64, device=x[0].device)).requires_grad_() for i in (1, 2))
        for reduction in ("mean", "none"):
            loss = call(x, temperature=t_s, teacher_temperature=t_t, scale_by_t2=True, reduction=reduction, chunk=3)
            column = (lambda t: t[:, None]) if shape else (lambda t: t)
            log_q, log_p = (logits(*x[3 * i : 3 * i + 3]) / column(t) for i, t in enumerate((t_s, t_t)))
            want = t_s**2 * oracles._kl(log_p.log_softmax(1), log_q.log_softmax(1))
            factor = torch.rand(7, dtype=torch.float64, device=loss.device)
            pair = (loss, want.mean()) if reduction == "mean" else ((loss * factor).sum(), (want * factor).sum())
            assert_alike(*pair, [*x, t_s, t_t])


def test_cross_entropy_alone(implementation):
    hidden, weight, bias = inputs(implementation.device)[:3]
    labels = torch.tensor([1, -100, 3, 4, 5, 6, 12], device=hidden.device)
    loss = ops.linear_cross_entropy(hidden, weight, labels, bias=bias, label_smoothing=0.1, chunk=2)
    want = oracles.cross_entropy(logits(hidden, weight, bias), labels, label_smoothing=0.1)
    assert_alike(loss, want, (hidden, weight, bias))


def test_masked_rows_are_not_read(implementation):
    x = inputs(implementation.device)
    mask = torch.arange(7, device=x[0].device) % 2 == 0
    want = call(x, mask=mask, beta=0.5)
    holed = [t.detach().clone() for t in x]
    holed[0][~mask] = holed[3][~mask] = math.nan
    holed = [t.requires_grad_() for t in holed]
    loss = call(holed, mask=mask, beta=0.5)
    torch.testing.assert_close(loss, want)
    for got, expected in zip(torch.autograd.grad(loss, holed), torch.autograd.grad(want, x), strict=True):
        torch.testing.assert_close(got, expected)
    nothing = call(holed, mask=torch.zeros_like(mask))
    assert nothing == 0 and not any(g.any() for g in torch.autograd.grad(nothing, holed))


def test_vocabularies_that_differ(implementation):
    hs, ws, bs, ht, wt, bt = inputs(implementation.device)
    small = wt[:9].detach().requires_grad_()
    with pytest.raises(ValueError, match="teacher_weight must have the student's 13 classes, got 9"):
        ops.linear_kl(hs, ws, ht, small)
    z_s, z_t = hs @ ws.t(), ht @ small.t()
    padded = torch.nn.functional.pad(z_t, (0, 4), value=-math.inf)
    assert_alike(
        ops.linear_kl(hs, ws, ht, small, vocabulary="pad"), oracles.softmax_kl(z_s, padded), (hs, ws, ht, small)
    )
    z_s, z_t = hs @ ws.t(), ht @ small.t()
    common = ops.linear_kl(hs, ws, ht, small, vocabulary="common", beta=0.5)
    assert_alike(common, oracles.softmax_kl(z_s[:, :9], z_t, beta=0.5), (hs, ws, ht, small))


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "drop"])
def test_top_k_teacher(implementation, tail):
    hs, ws, bs, ht, wt, bt = inputs(implementation.device)
    values, indices = (ht @ wt.t()).detach().log_softmax(1).topk(4)
    teacher = kdfast.TopK.of_log_probabilities(values, indices, tail=tail)
    for beta in (0.0, 0.4):
        loss = ops.linear_kl(hs, ws, teacher, None, student_bias=bs, beta=beta, chunk=3)
        assert_alike(loss, ops.softmax_kl(logits(hs, ws, bs), teacher, beta=beta), (hs, ws, bs))


# ---- accuracy, memory, graphs ----------------------------------------------------------------------------------------
def test_bfloat16_logits_are_not_rounded():
    """A student near its teacher: rounded logits would be wrong by 0.24, a gradient summed in bfloat16 by 0.005."""
    numbers = torch.Generator().manual_seed(0)
    hs, ws = torch.randn(96, 64, generator=numbers), torch.randn(512, 64, generator=numbers) * 3 / 8
    ht, wt = (t + 0.02 * t.std() * torch.randn(t.shape, generator=numbers) for t in (hs, ws))
    half = [t.bfloat16().requires_grad_() for t in (hs, ws, ht, wt)]
    exact = [t.detach().double().requires_grad_() for t in half]
    for beta in (0.0, 0.5, 1.0):
        loss = ops.linear_kl(*half, beta=beta, chunk=4)
        assert loss.dtype == torch.float32
        want = oracles.softmax_kl(exact[0] @ exact[1].t(), exact[2] @ exact[3].t(), beta=beta)
        torch.testing.assert_close(loss.double(), want, rtol=1e-3, atol=0)
        for got, expected in zip(torch.autograd.grad(loss, half), torch.autograd.grad(want, exact), strict=True):
            assert got.dtype == torch.bfloat16
            assert (got.double() - expected).norm() <= 2**-8 * expected.norm()


def test_chunks_fit_their_memory():
    """By default the logits and gradients of a chunk have 64 MiB, whatever the rows are."""
    form = linear.Head.logits
    hs, ws, ht, wt = torch.randn(600, 8), torch.randn(32000, 8), torch.randn(600, 8), torch.randn(32000, 8)
    sizes = []
    with mock.patch.object(linear.Head, "logits", lambda head, at, dtype: _noted(sizes, form(head, at, dtype))):
        ops.linear_kl(hs.requires_grad_(), ws, ht, wt).backward()
    assert max(sizes) * 4 <= linear.BYTES < max(sizes) * 6 and len(sizes) > 2


def _noted(sizes, z):
    sizes.append(z.numel() * z.element_size())
    return z


def test_chunks_do_not_show(implementation):
    x = inputs(implementation.device, rows=70, dtype=torch.float32)
    results = [[*torch.autograd.grad(loss := call(x, chunk=chunk, beta=0.3), x), loss] for chunk in (None, 16, 32, 5)]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * float(a.abs().max()))
    again = [*torch.autograd.grad(loss := call(x, beta=0.3), x), loss]
    assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_upstream_gradient_and_second_backward(implementation):
    x = inputs(implementation.device)
    loss = call(x)
    (once,) = torch.autograd.grad(3 * loss, x[0], retain_graph=True)
    torch.testing.assert_close(once, 3 * torch.autograd.grad(call(x), x[0])[0])
    with pytest.raises(RuntimeError, match="a first backward used them: call it again"):
        torch.autograd.grad(loss, x[0])
    rows = call(x, reduction="none")
    first, second = (torch.autograd.grad(rows.sum(), x[0], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="linear_kl has no second derivative"):
        torch.autograd.grad(call(x), x[0], create_graph=True)


def test_tied_weight(implementation):
    """The gradient adds to that of an embedding."""
    hs, ws, *_ = inputs(implementation.device)
    ids = torch.tensor([1, 2, 3], device=hs.device)
    loss = ops.linear_kl(ws[ids], ws, hs[:3].detach(), ws.detach())
    want = oracles.softmax_kl(ws[ids] @ ws.t(), (hs[:3] @ ws.t()).detach())
    assert_alike(loss, want, (ws,))


def test_compile_and_autocast(implementation):
    x = inputs(implementation.device, dtype=torch.float32)
    want = call(x, beta=0.5)
    grads = torch.autograd.grad(want, x)
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: call(x, beta=0.5), fullgraph=True, backend="aot_eager")
    with torch.autocast(x[0].device.type, dtype=torch.bfloat16):
        cast = call(x, beta=0.5)
    assert torch.equal(cast, want)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(cast, x), grads, strict=True))
    graph = compiled(*x)  # there the temperature is in a tensor
    torch.testing.assert_close(graph, want)
    for a, b in zip(torch.autograd.grad(graph, x), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_checkpointing(implementation):
    """The forward runs once more, in the backward, and not while it forms its own gradients."""
    x, calls = inputs(implementation.device), []

    def counted(*x):
        calls.append(x)
        return call(x)

    loss = torch.utils.checkpoint.checkpoint(counted, *x, use_reentrant=False)
    assert len(calls) == 1
    assert_alike(loss, call(x), x)
    assert len(calls) == 2


ERRORS = [
    (lambda h, w: ops.linear_kl(h[0], w, h, w), ValueError, r"student_hidden must be \(\.\.\., features\)"),
    (
        lambda h, w: ops.linear_kl(h, w[:, :4], h, w),
        ValueError,
        r"student_weight must be \(classes, 5\), as that of nn",
    ),
    (lambda h, w: ops.linear_kl(h, w, h[:2], w), ValueError, r"teacher_hidden must have the leading shape \(3,\)"),
    (lambda h, w: ops.linear_kl(h, w, h.long(), w), TypeError, "teacher_hidden must be float32"),
    (lambda h, w: ops.linear_kl(h, w, h, w, student_bias=w[0]), ValueError, r"student_bias must have shape \(7,\)"),
    (lambda h, w: ops.linear_kl(h, w, h, w, ce_weight=1.0), ValueError, "labels are required because ce_weight=1.0"),
    (lambda h, w: ops.linear_kl(h, w, h, w, beta=2), ValueError, "beta must be from 0 to 1"),
    (lambda h, w: ops.linear_kl(h, w, h, w, chunk=0), ValueError, "chunk must be at least 1"),
    (
        lambda h, w: ops.linear_kl(h, w, h, w, student_softcap=-1),
        ValueError,
        "student_softcap must be finite and above 0",
    ),
    (lambda h, w: ops.linear_kl(h, w, h, w, vocabulary="any"), ValueError, "vocabulary must be one of strict"),
    (lambda h, w: ops.linear_kl(h, w, h, w, mask=h[:, 0]), TypeError, "mask must be a bool tensor"),
    (lambda h, w: ops.linear_kl(h, w, h, w, divisor=2, reduction="none"), ValueError, "divisor divides a sum"),
    (
        lambda h, w: ops.linear_kl(h, w, (h, h.long()), w),
        ValueError,
        "teacher_weight and teacher_bias must be None with a top-k teacher",
    ),
    (
        lambda h, w: ops.linear_cross_entropy(h, w, torch.full((3,), 9)),
        ValueError,
        r"labels\[0\] is 9, expected a class from 0 to 6",
    ),
]


@pytest.mark.parametrize(("bad", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(bad, error, message):
    with pytest.raises(error, match=message):
        bad(torch.randn(3, 5), torch.randn(7, 5))


# ---- a vocabulary in parts -------------------------------------------------------------------------------------------
FORMS = [
    {"beta": 0.0, "temperature": 2.0, "student_softcap": 3.0},
    {"beta": 0.3, "ce_weight": 0.5, "divisor": 5, "teacher_temperature": 2.0},
    {"beta": 1.0, "reduction": "sum", "scale_by_t2": True, "temperature": 2.0, "chunk": 3},
    {"beta": 0.5, "reduction": "none"},
]


def of_form(x, labels, options, **more):
    loss = call(x, labels=labels, **options, **more)
    factor = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, x, factor.to(loss.dtype))]


def dense_job(rank, parts):
    own = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
    labels = torch.tensor([1, -100, 3, 4, 5, 6, 12])
    x = [t.detach() if i in (0, 3) else t[own].detach() for i, t in enumerate(inputs("cpu"))]
    x = [t.requires_grad_() for t in x]
    return [of_form(x, labels, options, group=torch.distributed.group.WORLD) for options in FORMS]


def top_k_job(rank, parts):
    own = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
    hs, ws, _, ht, wt, _ = inputs("cpu")
    return [
        top_k(hs, ws[own].detach().requires_grad_(), ht, wt, *form, torch.distributed.group.WORLD) for form in TAILS
    ]


TAILS = [(tail, beta) for tail in ("bucket", "renormalise", "drop") for beta in (0.0, 0.4)]


def top_k(hs, ws, ht, wt, tail, beta, group=None):
    values, indices = (ht @ wt.t()).detach().log_softmax(1).topk(4)
    indices[2, 3] = -1  # a slot of padding
    teacher = kdfast.TopK.of_log_probabilities(values, indices, tail=tail)
    loss = ops.linear_kl(hs, ws, teacher, None, beta=beta, group=group)
    return [loss.detach(), *torch.autograd.grad(loss, (hs, ws))]


@pytest.mark.skipif(not HAVE_GLOO, reason=NO_GLOO)
@pytest.mark.parametrize("parts", [(7, 6), (5, 1, 4, 3)], ids=str)
def test_parts_of_the_vocabulary_equal_one_process(tmp_path, parts):
    labels = torch.tensor([1, -100, 3, 4, 5, 6, 12])
    ranks = in_processes(len(parts), tmp_path, dense_job, parts)
    for i, options in enumerate(FORMS):
        want = of_form(inputs("cpu"), labels, options)
        for rank in ranks:
            for at in (0, 1, 4):  # the loss, and of the hidden states each process has the whole gradient
                torch.testing.assert_close(rank[i][at], want[at], rtol=1e-12, atol=1e-13)
        for at in (2, 3, 5, 6):
            torch.testing.assert_close(torch.cat([rank[i][at] for rank in ranks]), want[at], rtol=1e-12, atol=1e-13)
    ranks = in_processes(len(parts), tmp_path, top_k_job, parts)
    hs, ws, _, ht, wt, _ = inputs("cpu")
    for i, form in enumerate(TAILS):
        loss, of_hidden, of_weight = top_k(hs, ws, ht, wt, *form)
        for rank in ranks:
            torch.testing.assert_close(rank[i][0], loss, rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(rank[i][1], of_hidden, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(torch.cat([rank[i][2] for rank in ranks]), of_weight, rtol=1e-11, atol=1e-12)
