"""What every public loss keeps to, one promise a test; losses and inputs are those of tests/test_papers.py."""

import copy
import inspect
import math
import sys

import pytest
import torch
import torch.utils.checkpoint
from copies import saved
from test_papers import CALLS, CASES, FIXED, inputs, with_leaves
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import kdfast

NAN = float("nan")
every_case = pytest.mark.parametrize(
    ("name", "parameters", "kinds"), CASES, ids=[f"{name}{i}" for i, (name, *_) in enumerate(CASES)]
)
# The first case of each loss.
every_loss = pytest.mark.parametrize(
    ("name", "parameters", "kinds"), list({name: (name, *case) for name, *case in reversed(CASES)}.values())
)


def make(name, parameters, device, dtype=torch.float64):
    return getattr(kdfast, name)(**parameters).to(device, dtype)


def call(name, loss, arguments):
    return CALLS.get(name, lambda loss, *tensors: loss(*tensors))(loss, *arguments)


def convert(arguments, dtype):
    return tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, arguments)


def same(got, want):
    """Whether the tensors are equal, bit by bit; None stands for itself."""
    return all(a is None if b is None else torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- NaN in, NaN out
# (loss, kind of input, number of the tensor in it) of what a loss does not read: Jacobians do not depend on a bias of
# the output.
UNREAD = {("JacobianMatching", "network", 3), ("JacobianMatching", "wide_network", 3)}


def reads(name, parameters, kind, number):
    if kind in FIXED - {"probabilities"} or (name, kind, number) in UNREAD:
        return False
    if name == "KD" and parameters.get("alpha") == 0:
        return kind != "teacher"
    return not (name == "JointLoss" and parameters.get("stage") == "ta" and number < 2)


def broken(arguments, at, positions):
    """Copies of the arguments with one NaN in argument `at` -> (number of its tensor, arguments)."""
    flat, spec = tree_flatten(arguments[at])
    for number, x in enumerate(flat):
        if not x.is_floating_point() or not x.numel():
            continue
        for where in sorted({0, x.numel() // 2, x.numel() - 1})[:positions]:
            changed = x.clone()
            changed.view(-1)[where] = NAN
            yield number, [*arguments[:at], tree_unflatten([*flat[:number], changed, *flat[number + 1 :]], spec),
                           *arguments[at + 1 :]]  # fmt: skip


@every_case
def test_nan_in_nan_out(implementation, name, parameters, kinds):
    """One NaN in any argument that counts is NaN in the loss, and in a gradient unless that is a constant."""
    arguments = inputs(kinds, implementation.device)
    on_simt = implementation.name == "simt"
    for dtype in (torch.float32,) if on_simt else (torch.float32, torch.float64):
        module = make(name, parameters, implementation.device, dtype)
        for at, kind in enumerate(kinds):
            for number, changed in broken(convert(arguments, dtype), at, 1 if on_simt else 3):
                if not reads(name, parameters, kind, number):
                    continue
                changed, leaves = with_leaves(kinds, changed)
                loss = call(name, module, changed)
                grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
                where = dtype, kind, number
                assert loss.isnan().any(), where
                assert kind == "distances" or any(g is not None and g.isnan().any() for g in grads), where


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (kdfast.bn_statistics_loss, [(2, 3, 4, 4), (3,), (3,)]),
        (lambda *x: kdfast.bn_statistics_loss(*x, p=1), [(2, 3, 4, 4), (3,), (3,)]),
        (lambda x: kdfast.total_variation(x)[0], [(2, 3, 4, 4)]),
        (lambda x: kdfast.total_variation(x)[1], [(2, 3, 4, 4)]),
        (lambda x: kdfast.self_similarity(x, 0.1), [(2, 3, 4, 4)]),
        (kdfast.adaptive_inversion, [(4, 6), (4, 6)]),
        (kdfast.residual_margin_loss, [(2, 3, 4, 4), (2, 3, 4, 4), (3,), (3,)]),
        (lambda *x: kdfast.ensemble_uncertainty(list(x))["epkl"].sum(), [(4, 6), (4, 6)]),
        (lambda *x: kdfast.ops.pairwise_distance(*x).sum(), [(4, 6), (5, 6)]),
        (lambda *x: kdfast.ops.softmax_kl(*x, beta=0.3), [(4, 6), (4, 6)]),
        (lambda *x: kdfast.ops.teachers_kl(x[0], list(x[1:]), kind="reverse_kl"), [(4, 6), (4, 6), (4, 6)]),
    ],
)
def test_nan_in_nan_out_of_functions(implementation, function, shapes):
    arguments = [torch.rand(shape, device=implementation.device) for shape in shapes]
    for at in range(len(shapes)):
        for _, changed in broken(arguments, at, 3):
            assert function(*changed).isnan(), at


# ---- a weight of 0
def _logits(device):
    return [torch.randn(3, 6, device=device) for _ in range(3)]


# What has no weight reads NaN here, in the row 1 alone or in all rows: loss of (student, teacher, other, labels).
ZERO_WEIGHTS = {
    "row weight": (lambda s, t, u, y: kdfast.ops.softmax_kl(s, t, weight=_row(s)), [1]),
    "row weight, reverse": (lambda s, t, u, y: kdfast.ops.softmax_kl(s, t, beta=1.0, weight=_row(s)), [1]),
    "row weight, mixed": (lambda s, t, u, y: kdfast.ops.softmax_kl(s, t, beta=0.5, weight=_row(s)), [1]),
    "row weight, top-k": (
        lambda s, t, u, y: kdfast.ops.softmax_kl(s, kdfast.TopK(t[:, :2], _columns(t)), weight=_row(s)),
        [1],
    ),
    "KD(alpha=0)": (lambda s, t, u, y: kdfast.KD(alpha=0.0)(s, t, y), None),
    "kl_weight=0": (lambda s, t, u, y: kdfast.ops.cross_entropy_kl(s, t, y, kl_weight=0.0), None),
    "TfKDSelf(alpha=0)": (lambda s, t, u, y: kdfast.TfKDSelf(alpha=0.0)(s, t, y), None),
    "Codistillation, burn-in": (lambda s, t, u, y: kdfast.Codistillation(burn_in=5)(s, [t], 1), None),
    "Codistillation, reverse": (lambda s, t, u, y: kdfast.Codistillation("reverse_kl", 5)(s, [t], 1), None),
    "Codistillation, tensor": (
        lambda s, t, u, y: kdfast.Codistillation(burn_in=5)(s, [t], torch.tensor(1, device=s.device)),
        None,
    ),
    "a teacher's weight": (
        lambda s, t, u, y: kdfast.ops.teachers_kl(s, [t, u], weight=torch.tensor([0.0, 1.0], device=s.device)),
        None,
    ),
    "KDCL(weight=0)": (
        lambda s, t, u, y: kdfast.ops.mixed_logits_kl([s, t], _only(s), y, kl_weight=0, learners=1),
        None,
    ),
    "reduction none": (lambda s, t, u, y: kdfast.ops.softmax_kl(s, t, reduction="none")[[0, 2]].sum(), [1]),
    "DIST(0, 0)": (lambda s, t, u, y: kdfast.DIST(0.0, 0.0)(s, t), None),
    "bn_statistics_loss": (lambda s, t, u, y: kdfast.bn_statistics_loss(s, t[0], u[0], alpha_mean=0), None),
    "IRG": (
        lambda s, t, u, y: kdfast.IRG(vertex_weight=0)(*([_map(x), _map(x), x, z] for x, z in ((s, s), (u, t)))),
        None,
    ),
    "JointLoss": (lambda s, t, u, y: kdfast.JointLoss(feature_weight=0.0)([s, u], y, [t[0, 0], t[0, 1]], 3), None),
}


def _row(x):
    return torch.tensor([1.0, 0.0, 1.0], device=x.device)


def _columns(x):
    return torch.arange(2, device=x.device).expand(3, 2)


def _only(x):
    return torch.tensor([[[0.0, 1.0]]], device=x.device).expand(3, 1, 2)


def _map(x):
    return x.view(3, 1, 2, 3)


@pytest.mark.parametrize("case", ZERO_WEIGHTS)
@pytest.mark.parametrize("value", [NAN, math.inf], ids=str)
def test_a_term_of_weight_0_adds_nothing(implementation, case, value):
    """Neither to the loss nor to the gradient, whatever it reads."""
    loss_of, rows = ZERO_WEIGHTS[case]
    student, teacher, other = _logits(implementation.device)
    labels = torch.tensor([0, 3, 5], device=implementation.device)
    bad = teacher.clone()
    bad[rows if rows else slice(None)] = value
    results = []
    for t in (teacher, bad):
        leaf, peer = student.clone().requires_grad_(), t.clone()
        if case not in ("row weight, top-k", "bn_statistics_loss"):
            peer.requires_grad_()
        loss = loss_of(leaf, peer, other, labels)
        grads = torch.autograd.grad(loss, [leaf, peer] if peer.requires_grad else [leaf], allow_unused=True)
        results.append((loss, grads[0]))
        if t is bad and peer.requires_grad and grads[1] is not None:
            of_bad = grads[1] if rows is None else grads[1][rows]
            assert not of_bad.any()
    (want, want_grad), (got, got_grad) = results
    assert torch.equal(got, want) and torch.equal(got_grad, want_grad)
    if rows is not None:
        assert not got_grad[rows].any()


# ---- near networks
DIVERGENCES = {
    "KD": (lambda s, t, y: kdfast.KD(20.0)(s, t), 1),
    "KD(alpha=1)": (lambda s, t, y: kdfast.KD(20.0, alpha=1.0)(s, t, y), 1),
    "ReverseKD": (lambda s, t, y: kdfast.ReverseKD(20.0)(s, t), 1),
    "JSD": (lambda s, t, y: kdfast.JSD(0.5, 20.0)(s, t), 1),
    "JSD(0.1)": (lambda s, t, y: kdfast.JSD(0.1, 20.0)(s, t), 1),
    "JSD next to 1": (lambda s, t, y: kdfast.JSD(1 - 2e-8)(s, t), 1),
    "DKD": (lambda s, t, y: kdfast.DKD(20.0)(s, t, y), 1),
    # The log-sum of the other classes is stored in float32, which is an error of up to 1e-6 at any T.
    "top-k": (lambda s, t, y: kdfast.ops.softmax_kl(s, kdfast.TopK.of(t, 4, 20.0), 20.0), 10),
    "DML": (lambda s, t, y: kdfast.DML(20.0)(s, [t, s.detach()]), 1),
    "AEKD": (lambda s, t, y: kdfast.AEKD(20.0)(s, [t, t + (t - s.detach())]), 10),
    "Codistillation": (lambda s, t, y: kdfast.Codistillation("reverse_kl")(s, [t, t + (t - s.detach())]), 1),
    "mixed": (lambda s, t, y: kdfast.ops.mixed_logits_kl([s, t], _half(s), None, 20.0), 1),
}


def _half(x):
    return torch.tensor([0.5, 0.5], device=x.device).expand(len(x), 2)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_near_networks(implementation, name, offset):
    """A divergence is never below 0, and keeps its digits where it is tiny."""
    loss_of, slack = DIVERGENCES[name]
    rows = 8 if implementation.name == "simt" else 64
    teacher = torch.randn(rows, 10, device=implementation.device)
    student = teacher + 1e-3 * torch.randn_like(teacher) + offset
    labels = torch.arange(rows, device=implementation.device) % 10
    # An offset of the logits rounds them, and may move a digit of AE-KD's weights.
    want = loss_of(student.double(), teacher.double(), labels)
    got = loss_of(student, teacher, labels)
    assert 0 < got and abs(got - want) <= slack * 2e-3 * want
    for k in range(0, rows, rows // 4):
        row = slice(k, k + 1)
        assert loss_of(student[row], teacher[row], labels[row]) >= 0
        assert loss_of(teacher[row], teacher[row].clone(), labels[row]) <= (1e-9 if name == "top-k" else 0)


@pytest.mark.parametrize("beta", [1e-9, 1e-4, 1 - 1e-4, 1 - 2e-8])
def test_mixtures_next_to_one_side(implementation, beta):
    """Of far networks, too: the mixture is near one of them."""
    student, teacher = (3 * torch.randn(8, 20, device=implementation.device) for _ in range(2))
    want = kdfast.JSD(beta)(student.double(), teacher.double())
    assert kdfast.JSD(beta)(student, teacher) == pytest.approx(want.item(), rel=1e-4)


# ---- teachers of torch.inference_mode
@every_case
def test_takes_inference_tensors(implementation, name, parameters, kinds):
    """An argument that was made in inference_mode gives the bits of an ordinary one, to the student's gradient too."""
    if implementation.name == "simt":
        pytest.skip("how tensors are kept is the same for every kernel")
    if name == "JacobianMatching":
        pytest.skip("its teacher's logits need a graph")
    module, arguments = make(name, parameters, implementation.device), inputs(kinds, implementation.device)

    def run(arguments):
        student = tree_map(lambda x: x.clone().requires_grad_(), arguments[0])
        torch.manual_seed(1)
        loss = call(name, module, [student, *arguments[1:]])
        return loss, torch.autograd.grad(loss.sum(), tree_flatten(student)[0], allow_unused=True)

    want, want_grads = run(arguments)
    for at in range(1, len(kinds)):
        with torch.inference_mode():
            frozen = tree_map(torch.clone, arguments[at])
        got, grads = run([*arguments[:at], frozen, *arguments[at + 1 :]])
        assert same([got, *grads], [want, *want_grads]), kinds[at]


# ---- copies, files, other default devices
@every_case
def test_copies_and_default_devices(name, parameters, kinds):
    """deepcopy, a file, and what is made without a device: the loss is the same."""
    module, arguments = make(name, parameters, "cpu"), inputs(kinds, "cpu")

    def run(module):
        torch.manual_seed(1)
        _, leaves = result = with_leaves(kinds, arguments)
        loss = call(name, module, result[0])
        return loss, *torch.autograd.grad(loss.sum(), leaves, allow_unused=True)

    want = run(module)
    for duplicate in (copy.deepcopy, saved):
        assert same(run(duplicate(module)), want)
    with torch.device("meta"):
        got = run(module)
    assert same(got, want)


# ---- torch.utils.checkpoint
@every_case
def test_a_checkpoint_runs_it_once_more(name, parameters, kinds):
    """In the backward; gradients that a loss forms in its forward are no reason to run it again."""
    if name == "JacobianMatching":
        pytest.skip("its forward differentiates the networks, whose graph lies in the checkpoint")
    module, runs = make(name, parameters, "cpu"), []
    arguments, leaves = with_leaves(kinds, inputs(kinds, "cpu"))
    want = torch.autograd.grad(call(name, module, arguments).sum(), leaves, allow_unused=True)

    def counted(*x):
        runs.append(None)
        return call(name, module, x)

    loss = torch.utils.checkpoint.checkpoint(counted, *arguments, use_reentrant=False)
    assert len(runs) == 1
    got = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    assert len(runs) <= 2
    torch.testing.assert_close(got, want)


# ---- rows that do not count
MASKED = [  # MGD's mask is of positions
    case
    for case in CASES
    if "mask" in inspect.signature(getattr(kdfast, case[0]).forward).parameters and case[0] != "MGD"
]


@pytest.mark.parametrize(("name", "parameters", "kinds"), MASKED, ids=[f"{n}{i}" for i, (n, *_) in enumerate(MASKED)])
def test_masked_rows_are_neither_read_nor_counted(implementation, name, parameters, kinds):
    """They hold NaN, and labels that are none."""
    mask = torch.tensor([True, False, True, True, False, True], device=implementation.device)
    module = make(name, parameters, implementation.device)
    holed, kept = inputs(kinds, implementation.device), []
    for kind, x in zip(kinds, holed, strict=True):
        per_row = x.dim() and len(x) == len(mask) and "head" not in kind
        kept.append(x[mask].clone() if per_row else x.clone())
        if per_row:
            x[~mask] = NAN if x.is_floating_point() else -100
    (holed, leaves), (kept, exact) = with_leaves(kinds, holed), with_leaves(kinds, kept)
    loss, want = module(*holed, mask=mask), module(*kept)
    if loss.dim():
        assert not loss[~mask].any()
        loss = loss[mask]
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-14)
    pairs = zip(
        *(torch.autograd.grad(x.sum(), y, allow_unused=True) for x, y in ((loss, leaves), (want, exact))), strict=True
    )
    for got, expected in pairs:
        if expected is None:
            assert got is None or not got.any()
        elif got.shape == expected.shape:
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-14)
        else:
            assert not got[~mask].any()
            torch.testing.assert_close(got[mask], expected, rtol=1e-8, atol=1e-14)


WEIGHTED = [case for case in MASKED if "weight" in inspect.signature(getattr(kdfast, case[0]).forward).parameters]


@pytest.mark.parametrize(
    ("name", "parameters", "kinds"), WEIGHTED, ids=[f"{n}{i}" for i, (n, *_) in enumerate(WEIGHTED)]
)
def test_weight_and_divisor_of_rows(implementation, name, parameters, kinds):
    """The sum of the rows' own losses, each times its weight, over the divisor; rows of weight 0 may hold NaN."""
    if parameters.get("reduction") == "none":
        pytest.skip("a divisor divides a sum")
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0, 3.0], dtype=torch.float64, device=implementation.device)
    module, arguments = make(name, parameters, implementation.device), inputs(kinds, implementation.device)

    def per_row(kind, x):
        return x.dim() and len(x) == len(weight) and "head" not in kind

    def alone(i):
        rows = [x[i : i + 1] if per_row(kind, x) else x for kind, x in zip(kinds, arguments, strict=True)]
        return module(*rows)

    want = sum(w * alone(i) for i, w in enumerate(weight.tolist()) if w) / 7
    for kind, x in zip(kinds, arguments, strict=True):
        if per_row(kind, x) and x.is_floating_point():
            x[weight == 0] = NAN
    got = module(*arguments, weight=weight, divisor=7)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


# ---- torch.compile
@every_loss
def test_two_graphs_for_every_size_and_temperature(name, parameters, kinds):
    if name == "JacobianMatching":
        pytest.skip("it differentiates twice, which no graph does")
    if name == "FGD":
        pytest.skip("its boxes are a list as long as the batch: a graph for each length")
    torch.compiler.reset()
    module = make(name, parameters, "cpu")
    compiled = torch.compile(lambda *x, m=module: call(name, m, x), fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows, temperature in ((6, 1.5), (7, 1.75), (8, 1.75), (8, 2.0), (10, 2.5)):
            if hasattr(module, "temperature"):
                module.temperature = temperature
            arguments, leaves = with_leaves(kinds, inputs(kinds, "cpu", rows))
            loss = compiled(*arguments)
            if name != "DKPP" or "permutations" in kinds:
                torch.testing.assert_close(loss, call(name, module, arguments))
            loss.sum().backward()
            assert any(x.grad is not None for x in leaves)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["AT", "CCKD", "FAKD", "FitNets", "HCL", "IRGEdge", "NST", "OFD", "PKT", "RKD", "SP"])
def test_two_graphs_for_every_image_size(name, memory_format):
    torch.compiler.reset()
    loss = getattr(kdfast, name)()
    more = (-torch.rand(4),) if name == "OFD" else ()
    compiled = torch.compile(lambda *x: loss(*x), fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for size in (8, 9, 12, 14):
            maps = [torch.randn(5, 4, size, size).contiguous(memory_format=memory_format) for _ in range(2)]
            leaf = maps[0].requires_grad_()
            value = compiled(leaf, maps[1], *more)
            torch.testing.assert_close(value, loss(leaf, maps[1], *more))
            value.backward()
            assert leaf.grad.isfinite().all()


def test_two_graphs_for_every_batch_of_crd():
    torch.compiler.reset()
    crd = kdfast.CRD(3, 4, n_data=20, negatives=5)
    compiled = torch.compile(lambda *x: crd(*x), fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows in (6, 7, 8, 10):
            student = torch.randn(rows, 3, requires_grad=True)
            compiled(student, torch.randn(rows, 4), torch.arange(rows)).backward()
            assert student.grad.isfinite().all() and student.grad.any()


@every_loss
def test_temperature_in_a_tensor(implementation, monkeypatch, name, parameters, kinds):
    """What a compiled graph passes to the kernels: the same loss and gradients as of the number."""

    def in_tensor(temperature, like):
        return torch.full((), temperature, dtype=torch.float64, device=like.device), 1.0

    module = make(name, parameters, implementation.device)
    arguments = inputs(kinds, implementation.device)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        changed, leaves = with_leaves(kinds, arguments)
        loss = call(name, module, changed)
        results.append([loss, *torch.autograd.grad(loss.sum(), leaves, allow_unused=True)])
        for family in ("softmax_kl", "mixed_logits", "teachers"):
            monkeypatch.setattr(sys.modules[f"kdfast.ops.{family}"], "temperature_argument", in_tensor)
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


# ---- settings, words
@every_loss
def test_settings_are_checked_when_they_are_set_later(name, parameters, kinds):
    module = make(name, parameters, "cpu")
    for setting in getattr(module, "settings", ()):
        if not hasattr(module, setting):
            continue
        before = getattr(module, setting)
        for nonsense in (object(), NAN, "nonsense"):
            with pytest.raises((TypeError, ValueError), match=setting):
                setattr(module, setting, nonsense)
        assert getattr(module, setting) is before


S, T, Y = torch.zeros(3, 6), torch.zeros(3, 6), torch.zeros(3, dtype=torch.long)
WORDS = [
    (
        lambda: kdfast.KD()(S, (T, T)),
        TypeError,
        r"teacher.indices must be integers.*\(logits, \.\.\.\) pass the logits",
    ),
    (lambda: kdfast.KD(alpha=0.5, ignore_index=None)(S, T, Y), TypeError, "ignore_index must be an int, got NoneType"),
    (lambda: kdfast.KD()(S, T, "oops"), TypeError, "labels must be a torch.Tensor, got str"),
    (lambda: kdfast.KD(alpha=0.5)(S, T, Y.float()), TypeError, r"labels must be integers of shape \(3,\), or prob"),
    (lambda: kdfast.KD()(S, T.to_sparse()), TypeError, r"teacher must be a dense tensor, got a sparse_coo one"),
    (lambda: kdfast.KD()(S.to_mkldnn(), T), TypeError, "student must be a dense tensor, got a mkldnn one"),
    (lambda: kdfast.RKD()(torch.nested.nested_tensor([S, S]), T), TypeError, "student must be a dense tensor.*nested"),
    (lambda: kdfast.DML()(S, [T, T[:2]]), ValueError, r"peers\[1\] must have"),
    (lambda: kdfast.Codistillation()(S, [T[:2]]), ValueError, r"peers\[0\] must have"),
    (lambda: kdfast.Codistillation(burn_in=2)(S, [T], NAN), ValueError, "epoch must be a number, got nan"),
    (lambda: kdfast.ONE()([S, T], torch.ones(3, 2, dtype=torch.long), Y, 1), TypeError, "gate must be float32"),
    (
        lambda: kdfast.OKDDip()([S, T], S, torch.ones(3, 2, 2, dtype=torch.long), Y, 1),
        TypeError,
        "attention must be float32",
    ),
    (lambda: kdfast.LabelRefinery()(S, T.log_softmax(1)), ValueError, "labels.* sum to -10.7.* not logits or log-prob"),
    (lambda: kdfast.HintRegressor((1, 4, 8, 4), (1, 4, 16, 16)), ValueError, "student_shape must be as large"),
    (lambda: kdfast.CCKD(order=-1), ValueError, "order must be at least 0"),
]


@pytest.mark.parametrize(("function", "error", "message"), WORDS, ids=[message for *_, message in WORDS])
def test_words(function, error, message):
    with pytest.raises(error, match=message):
        function()


def test_numbers_of_numpy():
    numpy = pytest.importorskip("numpy")
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    want = kdfast.KD(2.0)(student, teacher)
    for two in (numpy.float32(2), numpy.float64(2), numpy.int64(2)):
        assert kdfast.KD(two)(student, teacher) == want
    assert kdfast.HardDarkRank(permute_len=numpy.int64(3))(student, teacher).isfinite()


def test_top_k_keeps_its_indices_and_is_collated():
    teacher = kdfast.TopK.of(torch.randn(4, 9), 3, 2.0)
    half = teacher.to(torch.float16)
    assert half.values.dtype == half.rest.dtype == torch.float16 and half.indices.dtype == torch.int64
    samples = [kdfast.TopK(*(x[i] for x in teacher[:3]), teacher.temperature) for i in range(4)]
    batch = torch.utils.data.default_collate(samples)
    student = torch.randn(4, 9)
    assert torch.equal(kdfast.KD(2.0)(student, batch), kdfast.KD(2.0)(student, teacher))
    with pytest.raises(ValueError, match="teacher.temperature must be one number"):
        kdfast.KD(2.0)(student, batch._replace(temperature=torch.tensor([1.0, 2.0])))


# ---- cases of their own
def test_exactly_0(implementation):
    """What no input changes: relations of one sample, and kernels of order 0."""
    x, y = (torch.randn(1, 3, 4, 4, device=implementation.device, requires_grad=True) for _ in range(2))
    for loss in (kdfast.FAKD("instance"), kdfast.SP()):
        value = loss(x, y)
        value.backward()
        assert value == 0 and not x.grad.any() and not y.grad.any()
    s, t = torch.randn(5, 4, device=implementation.device), torch.randn(5, 3, device=implementation.device)
    assert kdfast.CCKD(order=0)(s, t) == 0


def test_crd_is_not_recomputed():
    """A step of a checkpoint's recomputation would be another one."""
    from torch.utils.checkpoint import checkpoint

    crd = kdfast.CRD(3, 4, n_data=20, negatives=5)
    student, teacher, index = torch.randn(4, 3, requires_grad=True), torch.randn(4, 4), torch.arange(4)
    loss = checkpoint(lambda s: crd(s, teacher, index), student, use_reentrant=False)
    banks = crd.bank_student.clone()
    with pytest.raises(RuntimeError, match="outside of the checkpoint"):
        loss.backward()
    assert torch.equal(crd.bank_student, banks)
    crd(student, teacher, index).backward()


def test_crd_is_made_on_meta():
    with torch.device("meta"):
        crd = kdfast.CRD(3, 4, n_data=20, negatives=5)
    crd = crd.to_empty(device="cpu")
    for module in crd.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert crd.z_student == -1 and crd.z_student.dtype == torch.float64 and crd.bank_student.abs().max() <= 1
    assert crd(torch.randn(4, 3), torch.randn(4, 4), torch.arange(4)).isfinite()
    other = kdfast.CRD(3, 4, n_data=20, negatives=5)
    crd.load_state_dict(other.state_dict())
    assert torch.equal(crd.seed, other.seed)


def test_draws_do_not_follow_the_default_device():
    weights, index = torch.rand(20), torch.arange(4)
    table = kdfast.ops.alias_table(weights)
    want = kdfast.ops.draw_negatives(index, 6, 20, 1, table=table)
    with torch.device("meta"):
        assert torch.equal(kdfast.ops.alias_table(weights), table)
        assert torch.equal(kdfast.ops.draw_negatives(index, 6, 20, 1, table=table), want)
