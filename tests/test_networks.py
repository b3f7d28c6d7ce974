"""Several networks, mixed or as teachers: what the contract of every op does not say, and the official code."""

import math

import behaviour
import oracles
import pytest
import registry
import torch
from behaviour import FLOATS, check_oracle
from networks import MIXED, SMALL, TAUGHT, for_simt, given, gradients, make, run
from official import Official, every_file
from registry.mixed_logits import mixed_logits_kl
from registry.teachers import taught, teachers_kl
from torch.nn import functional as F

import kdfast
from kdfast import ops

INF = math.inf
every_op = pytest.mark.parametrize("op", [*MIXED.ops, *TAUGHT.ops], ids=str)


# ---- arguments -------------------------------------------------------------------------------------------------------
@every_op
def test_stacked_networks(implementation, op):
    """A list, one (N, B, C) tensor and a list of both are the same bits, and so are their gradients."""
    x = op.collecting(given(op, make(implementation, *SMALL, torch.float32)))
    value = op(ops, x)
    grads = dict(zip((label for label, _ in registry.labelled(x, op.leaves)), gradients(op, value, x), strict=True))
    name = "networks" if op.group is MIXED else "teachers"
    stacked = torch.stack([t.detach() for t in x[name][:2]]).requires_grad_()
    rest = [t.detach().clone().requires_grad_() for t in x[name][2:]]
    other = op(ops, {**x, name: [stacked, *rest] if rest else stacked})
    assert torch.equal(other, value)
    of_stacked, *of_rest = torch.autograd.grad(other, [stacked, *rest], allow_unused=True)
    want = grads[f"{name}[0]"], grads[f"{name}[1]"]
    assert of_stacked is None if want[0] is None else torch.equal(of_stacked, torch.stack(want))
    for i, got in enumerate(of_rest, 2):
        assert got is None if grads[f"{name}[{i}]"] is None else torch.equal(got, grads[f"{name}[{i}]"])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_label_dtypes(implementation, dtype):
    d = make(implementation, *SMALL)
    typed = registry.Inputs(d, labels=d.labels.to(dtype))
    for op in (MIXED["one"], TAUGHT["kl"]):
        assert torch.equal(op(ops, given(op, typed)), op(ops, given(op, d)))


# ---- edges -----------------------------------------------------------------------------------------------------------
@every_op
@pytest.mark.parametrize("shape", [SMALL, (2, 1, 2050)], ids=str)
def test_edges_minus_infinity_everywhere(implementation, op, shape):
    """Classes that all networks mask are as good as absent."""
    data = make(implementation, *shape, torch.float32)
    masked = torch.zeros(shape[2], dtype=torch.bool)
    masked[[0, 4, shape[2] - 1]] = True
    for x in data.networks:
        x[:, masked] = -INF
    data.labels.fill_(2)
    loss, grads = run(op, data)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads if g is not None)
    kept = registry.Inputs(data, networks=[x[:, ~masked] for x in data.networks], labels=data.labels - 1)
    exact = op.collecting(registry.widened(given(op, kept)))
    value = op(oracles, exact)
    want = gradients(op, value, exact)
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=1e-6)
    for (label, _), got, expected in zip(registry.labelled(exact, op.leaves), grads, want, strict=True):
        if got is None:
            continue
        if label != "mix":
            assert not got[:, masked].any()
            got = got[:, ~masked]
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5 if label == "mix" else 1e-6)


@every_op
def test_edges_minus_infinity_of_one(implementation, op):
    """Masked by the first network alone: +inf where the formula is, never a NaN."""
    data = make(implementation, *SMALL, torch.float32)
    data.networks[0][1, 5] = -INF
    data.labels.fill_(2)
    loss, grads = run(op, data)
    assert not loss.isnan()
    assert all(g is None or not g.isnan().any() for g in grads)
    if op.name in ("kl", "kl_sum", "cross_entropy"):
        assert loss == INF


def test_edges_weight_zero(implementation):
    """A network of weight 0 may be -inf."""
    data = make(implementation, *SMALL)
    data.mix[:, :, 2] = 0.0
    options = {"learners": 2, "eps": 1e-7}
    broken = [*data.networks[:2], torch.full_like(data.networks[2], -INF)]
    a, b = (ops.mixed_logits_kl(x, data.mix[:, :2], data.labels, **options) for x in (data.networks, broken))
    assert torch.equal(a, b) and a.isfinite()
    student, *teachers = data.networks
    weight = torch.tensor([1.0, 0.0], dtype=torch.float64, device=student.device)
    student = student.clone()
    teachers[0][:, 3] = student[:, 3] = -INF  # the other teacher has a class that the student lacks
    leaf = student.requires_grad_()
    loss = ops.teachers_kl(leaf, teachers, weight=weight)
    assert loss.isfinite() and torch.autograd.grad(loss, leaf)[0].isfinite().all()


@every_op
def test_edges_rows_without_any_class(implementation, op):
    data = make(implementation, *SMALL, torch.float32)
    for x in data.networks:
        x[1] = -INF
    loss, grads = run(op, data)
    assert not loss.isnan()
    if op.name in ("no_labels", "kl_sum", "cross_entropy"):
        assert loss.isfinite()
    assert all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", [1, 9, 1025, 2049])
def test_edges_equal_networks(implementation, dtype, classes):
    """Exactly 0 without eps, and finite gradients."""
    data = make(implementation, 2, 3, classes, dtype)
    data.networks[1] = data.networks[0].clone()
    data.mix = torch.tensor([0.5, 0.5], dtype=data.mix.dtype, device=data.mix.device).expand(3, 2, 2)
    d = MIXED["one"].collecting(data)
    student, teacher = d.networks
    for loss in (
        ops.mixed_logits_kl(d.networks, d.mix, None, 3.0, through_targets=True),
        ops.mixed_logits_kl(d.networks, d.mix[:, :1], None, 0.3),
        ops.teachers_kl(student, [teacher, teacher]),
        ops.teachers_kl(student, [teacher.detach()] * 3, kind="reverse_kl"),
        ops.aekd(student, [teacher, teacher])[0],
    ):
        assert loss == 0
        assert all(g is None or g.isfinite().all() for g in gradients(MIXED["one"], loss, d))


@every_op
@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_edges_large_offsets(implementation, op, offset):
    """An offset of a network's logits changes nothing, and costs only the digits that the inputs lose."""
    if op.name == "least" and abs(offset) > 1e4:
        pytest.skip("measured from the label's logit: the same differences, but of the oracle in float64 only")
    data = make(implementation, *SMALL, torch.float32)
    data.networks = [x + offset * (1 - i / 2) for i, x in enumerate(data.networks)]
    check_oracle(op, given(op, data))


@every_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_edges_huge_logits(implementation, op, dtype):
    """Logits of 1e4: losses of that size, finite gradients."""
    for_simt(implementation, dtype == torch.float32)
    data = make(implementation, *SMALL, dtype)
    data.networks = [3e3 * x for x in data.networks]
    check_oracle(op, given(op, data))


@pytest.mark.parametrize("temperature", [0.05, 1.0, 2.0, 4.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_edges_temperatures(implementation, temperature, dtype):
    for_simt(implementation, dtype == torch.float32 and temperature in (0.05, 20.0))
    data = make(implementation, *SMALL, dtype)
    for options in ({"through_targets": True}, {"targets": 1, "target_ce": True}):
        check_oracle(MIXED.bound(mixed_logits_kl("any", eps=1e-7, temperature=temperature, **options)), data)
    for kind in ("kl", "reverse_kl"):
        check_oracle(TAUGHT.bound(teachers_kl(kind, kind, temperature=temperature)), taught(data))


def test_edges_labels_out_of_range(implementation):
    """An error before any kernel where the host can look; else the loss and the row's gradient are NaN."""
    data = make(implementation, *SMALL)
    for label in (-1, -100, 9, 2**40, -(2**62)):
        data.labels[3] = label
        for op in (MIXED["one"], MIXED["least"], TAUGHT["kl"], TAUGHT["reverse_kl"]):
            if implementation.raises_on_labels:
                with pytest.raises(
                    (ValueError, RuntimeError), match=rf"labels\[3\] is {label}, expected a class from 0 to 8"
                ):
                    run(op, data)
            else:
                loss, grads = run(op, data)
                assert loss.isnan()
                assert grads[0].isfinite().all(1).tolist() == [True, True, True, False, True]


# ---- behaviour in PyTorch --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(4, 64, 100), (3, 2, 5000), (2, 1, 30_000), (2, 4099, 3)], ids=str)
def test_deterministic(implementation, shape, same_bits):
    """AE-KD and KDCL at sizes that threads share."""
    if implementation.name == "simt":
        shape = {64: (3, 10, 40), 2: (2, 1, 2100)}.get(shape[1])
        if shape is None:
            pytest.skip("a fiber per thread: a minute")
    data = make(implementation, *shape, torch.float32)

    def run():
        d = MIXED["one"].collecting(data)
        loss, weights = ops.aekd(d.networks[0], d.networks[1:])
        results = [loss, weights, *torch.autograd.grad(loss, d.networks[:1])]
        if shape[1] <= 64:
            results += [kdfast.KDCL(rule=rule)(d.networks, d.labels) for rule in kdfast.KDCL.RULES]
        return [x.detach() for x in results]

    assert same_bits(run)


@behaviour.every_compiled
@pytest.mark.parametrize("kind", ["int", "tensor"])
@pytest.mark.parametrize("name", ["ONE", "OKDDip", "FFL", "CollaborativeLearning", "Codistillation"])
def test_compile_epochs(implementation, name, kind):
    """Thirty epochs of training compile at most two graphs, with the numbers of the loss as it is."""
    from torch._dynamo.testing import CompileCounter

    behaviour.compiles(implementation)
    d = make(implementation, *SMALL)
    z, y, mix = d.networks, d.labels, d.mix
    module, inputs = {
        "ONE": lambda: (kdfast.ONE(), (z, mix[:, 0], y)),
        "OKDDip": lambda: (kdfast.OKDDip(), (z[:2], z[2], mix[:, :2, :2], y)),
        "FFL": lambda: (kdfast.FFL(), (z[:2], z[2], y)),
        "CollaborativeLearning": lambda: (kdfast.CollaborativeLearning(rampup_epochs=20), (z, y)),
        "Codistillation": lambda: (kdfast.Codistillation(burn_in=7), (z[0], z[1:])),
    }[name]()
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for epoch in range(30):
        at = epoch if kind == "int" else torch.tensor(epoch, device=y.device)
        torch.testing.assert_close(compiled(*inputs, at), module(*inputs, epoch))
    assert counter.frame_count <= 2


@behaviour.every_compiled
@pytest.mark.parametrize("name", ["KDCL linear", "KDCL naive", "KDCL minlogit", "KDCL general", "AEKD"])
def test_compile_losses(implementation, name):
    behaviour.compiles(implementation)
    d = make(implementation, *SMALL)
    student, *teachers = leaves = [x.clone().requires_grad_() for x in d.networks]
    torch.compiler.reset()
    if name == "AEKD":
        module, inputs = kdfast.AEKD(), (student, [x.detach() for x in teachers])
        leaves = [student]
    else:
        module, inputs = kdfast.KDCL(rule=name.split()[1]), (leaves, d.labels)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    loss, want = compiled(*inputs), module(*inputs)
    torch.testing.assert_close(loss, want)
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (loss, want)), strict=True):
        torch.testing.assert_close(a, b)


# ---- the losses ------------------------------------------------------------------------------------------------------
def test_gradients_stop(implementation):
    """Where the official code has constants."""
    d = MIXED["one"].collecting(make(implementation, *SMALL))
    z, y = d.networks, d.labels
    fresh = lambda: [x.detach().requires_grad_() for x in z]  # noqa: E731

    student, *peers = fresh()
    for loss in (kdfast.DML(), kdfast.Codistillation(), kdfast.Codistillation("reverse_kl"), kdfast.AEKD()):
        grads = torch.autograd.grad(loss(student, peers), [student, *peers], allow_unused=True)
        assert grads[0].any() and grads[1:] == (None, None)
    student, *peers = fresh()
    assert all(g.any() for g in torch.autograd.grad(kdfast.EnD()(student, peers), [student, *peers]))
    # A gate that sees one branch alone: what it learns is the slope of CE(z_e).
    gate = torch.rand(5, 3, dtype=torch.float64, device=y.device).requires_grad_()
    networks = fresh()
    (got,) = torch.autograd.grad(kdfast.ONE()(networks, gate, y, 50), gate)
    mixed = torch.einsum("bm,mbc->bc", gate, torch.stack(networks))
    torch.testing.assert_close(got, torch.autograd.grad(F.cross_entropy(mixed, y), gate)[0])


# ---- numbers of the official code ------------------------------------------------------------------------------------
class Networks(Official):
    """Every floating-point input is a leaf, and so are parameters whose values are in the file."""

    def __call__(self, name):
        x = super().__call__(name)
        if x.is_floating_point():
            self.leaves.setdefault(name, x.requires_grad_())
        return x

    def bind(self, module, **names):
        module.to(self.device, self.dtype)
        for name, key in names.items():
            parameter = module.get_parameter(name.replace("__", "."))
            parameter.data.copy_(self[f"in_{key}"])
            self.leaves[key] = parameter
        return module


def _one(g, p):
    gate = g.bind(kdfast.ONEGate(6, 3), linear__weight="gw", linear__bias="gb", norm__weight="bw", norm__bias="bb")
    loss = kdfast.ONE(float(p["T"]), p["rampup"])
    return loss([g("z1"), g("z2"), g("z3")], gate(g("gate_feat")), g("labels"), p["epoch"])


def _okddip(g, p):
    features = g["in_feat"].shape[2]
    attention = g.bind(kdfast.OKDDipAttention(features), query__weight="wq", key__weight="wk")
    loss = kdfast.OKDDip(p["T"], p["alpha"], p["rampup"])
    peers = g("pro").permute(2, 0, 1)
    return loss(peers, g("leader"), attention(g("feat")), g("labels"), p["epoch"])


def _fusion(g, p):
    module = kdfast.FusionModule(p["channel"], p["numclass"], p["sptial"])
    keys = ("conv1_weight", "bn1_weight", "bn1_bias", "conv1_1_weight", "bn1_1_weight", "bn1_1_bias", "fc2_weight")
    names = [name.replace(".", "__") for name, _ in module.named_parameters()]
    g.bind(module, **dict(zip(names, (*keys, "fc2_bias"), strict=True)))
    return (module([g("fmap1"), g("fmap2")]) * g("cot").detach()).sum()


def _mean_rule(g, p):
    a = p["alpha"]
    return (1 - a) * kdfast.KDCL(p["T"], "mean", a / (1 - a))(g("logits"), g("labels"))


OFFICIAL = {
    "dml_aberhu": lambda g, p: kdfast.DML()(g("own"), [g("peer")]),
    "one_total": _one,
    "okddip_total": _okddip,
    "kdcl_meanlogit": _mean_rule,
    "ffl_total": lambda g, p: kdfast.FFL(float(p["T"]), p["rampup"], p["eps"])(
        [g("z1"), g("z2")], g("fused"), g("labels"), p["epoch"]
    ),
    "ffl_fusion_module": _fusion,
    "codistill_ce": lambda g, p: kdfast.Codistillation()(g("output"), [g("peer")]),
    "clilr_okddip": lambda g, p: kdfast.CollaborativeLearning(p["T"], p["alpha"] * p["consistency"])(
        g("pro").permute(2, 0, 1), g("labels")
    ),
    "clilr_backprop_rescale": lambda g, p: (kdfast.rescale_gradient(g("x"), p["num_branches"]) * g("w").detach()).sum(),
    "aekd_average": lambda g, p: kdfast.AEKD(p["kd_T"], 1 / len(g("logit_t")))(g("logit_s"), g("logit_t")),
    "endd_endloss": lambda g, p: kdfast.EnD(p["temp"])(g("logits"), g("teacher_logits").transpose(0, 1)),
}


@every_file(*OFFICIAL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matches_official_code(implementation, path, dtype):
    """float64: 1e-9 of the loss, 1e-8 of the largest gradient; float32: 2e-5, with floors as in test_papers.py."""
    for_simt(implementation, dtype == torch.float32)
    g = Networks(path, dtype, implementation.device)
    loss = OFFICIAL[g.name](g, g.parameters)
    assert loss.shape == () and loss.dtype == dtype
    temperature = max([1.0, *(float(v) for k, v in g.parameters.items() if k in ("T", "temp", "kd_T"))])
    floor = g.of_type(1e-14, 2e-7 * temperature**2)
    g.assert_close("loss", loss, g["loss"].sum(), g.of_type(1e-9, 2e-5), floor)
    grads = dict(zip(g.leaves, torch.autograd.grad(loss, list(g.leaves.values()), allow_unused=True), strict=True))
    for name, want in g.results("grad_").items():
        if name == "gb":  # 0 behind a batch norm: both are rounding
            continue
        if grads[name] is None:
            assert name == "peer"  # a constant here; the public code leaves it to the caller
            continue
        # Batch norm over few samples loses a digit in float32.
        g.assert_close(name, grads[name], want, g.of_type(1e-8, 5e-5), g.of_type(1e-13, 2e-8 * temperature))


@every_file("kdcl_naive", "kdcl_minlogit")
def test_targets_of_public_code(implementation, path):
    g = Networks(path, device=implementation.device)
    target = kdfast.KDCL(rule=g.name.removeprefix("kdcl_")).target(g("logits"), g("labels"))
    torch.testing.assert_close(target.cpu(), g["out_target"])


@every_file("aekd_logits")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_aekd_on_official_gradients(implementation, path, dtype):
    """Weights no worse than an independent solver's on the official gradients; loss and gradient with our weights."""
    g = Networks(path, dtype, implementation.device)
    module = kdfast.AEKD(g.parameters["kd_T"], g.parameters["C"], g.parameters["svm_norm"])
    loss = module(g("logit_s"), g("logit_t").detach())
    w = module.weights.double().cpu()
    if not g.parameters["svm_norm"]:
        assert w @ g["out_gram"] @ w / 2 <= float(g["out_qp_objective"]) * (1 + g.of_type(1e-9, 1e-4))
    torch.testing.assert_close(loss.item(), float(w @ g["out_losses"]), rtol=2e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(loss, g("logit_s"))
    want = (w[:, None, None] * g["out_grads"]).sum(0)
    g.assert_close("gradient", grad, want, g.of_type(1e-8, 2e-5), g.of_type(1e-13, 1e-7))


# ---- CUDA only -------------------------------------------------------------------------------------------------------
def test_checked_labels(cuda, monkeypatch):
    """KDFAST_CHECK=1 looks at labels on the device, and waits for it."""
    monkeypatch.setenv("KDFAST_CHECK", "1")
    d = make(cuda, *SMALL)
    d.labels[3] = 9
    for op in (MIXED["one"], TAUGHT["kl"]):
        with pytest.raises(ValueError, match=r"labels\[3\] is 9"):
            run(op, d)
