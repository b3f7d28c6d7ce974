"""Residual distillation: how its losses behave; tests/test_papers.py has the formula and the official numbers."""

import behaviour
import oracles
import pytest
import torch

import kdfast

STAGES = ("joint", "ta")


def make(device, paths=4, rows=6, cols=9, dtype=torch.float64):
    logits = [(torch.randn(rows, cols, dtype=torch.float64) * 3).to(device, dtype) for _ in range(paths)]
    features = [torch.rand((), dtype=torch.float64).to(device, dtype) for _ in range(paths)]
    return logits, torch.randint(cols, (rows,), device=device), features


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_low_precision(implementation, stage, dtype):
    logits, labels, features = make(implementation.device, rows=33, cols=200, dtype=dtype)
    logits[0].requires_grad_(), logits[-1].requires_grad_()
    loss = kdfast.JointLoss(0.1, stage=stage)(logits, labels, features, 20)
    want = oracles.JointLoss(logits, labels, [x.double() for x in features], 20, 0.1, stage=stage)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=0)
    got, expected = (torch.autograd.grad(x, logits[-1])[0] for x in (loss, want))
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=1e-7)


def test_decay(implementation):
    """1 in the first epoch, half-way at half the time, the floor from then on."""
    loss = kdfast.JointLoss(decay_floor=0.2, decay_epochs=10)
    decays = [loss.decay(epoch).item() for epoch in (0, 5, 10, 11, 1e9)]
    assert decays == pytest.approx([1.0, 0.6, 0.2, 0.2, 0.2])
    assert kdfast.JointLoss(decay_floor=1.0).decay(33) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_epoch_as_number_or_tensor(implementation, stage):
    logits, labels, features = make(implementation.device)
    loss = kdfast.JointLoss(stage=stage)
    want = loss(logits, labels, features, 17)
    for epoch in (17.0, torch.tensor(17), torch.tensor(17, device=implementation.device), torch.tensor(17.0)):
        assert torch.equal(loss(logits, labels, features, epoch), want)
    stacked = loss(torch.stack(logits), labels, torch.stack(features), 17)
    torch.testing.assert_close(stacked, want)


@pytest.mark.parametrize("stage", STAGES)
def test_the_plain_student_alone(implementation, stage):
    logits, labels, features = make(implementation.device)
    alone = kdfast.JointLoss(0.0, stage=stage)(logits[:1], labels, features[:1], 3)
    torch.testing.assert_close(alone, kdfast.ops.cross_entropy(logits[0], labels))


@behaviour.every_compiled
@pytest.mark.parametrize("stage", STAGES)
def test_compile_serves_every_epoch(implementation, stage):
    """At most two graphs for epochs as Python numbers, one for a tensor's."""
    behaviour.compiles(implementation)
    logits, labels, features = make(implementation.device, dtype=torch.float32)
    loss = kdfast.JointLoss(stage=stage)
    for epochs, most in ((range(6), 2), ([torch.tensor(float(epoch)) for epoch in range(6)], 1)):
        torch.compiler.reset()
        graphs = []

        def backend(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(loss, fullgraph=True, backend=backend)
        for epoch in epochs:
            torch.testing.assert_close(compiled(logits, labels, features, epoch), loss(logits, labels, features, epoch))
        assert len(graphs) <= most


def test_no_samples(implementation):
    logits, labels, features = make(implementation.device, rows=0)
    leaf = logits[-1].requires_grad_()
    for stage in STAGES:
        loss = kdfast.JointLoss(stage=stage)(logits, labels, features, 3)
        assert loss.isfinite() and torch.autograd.grad(loss, leaf)[0].shape == leaf.shape


# ---- features --------------------------------------------------------------------------------------------------------
def features(device, dtype=torch.float64):
    student, teacher = (torch.randn(3, 4, 5, 6, dtype=torch.float64).to(device, dtype) for _ in range(2))
    weight = torch.tensor([1.0, -0.5, 0.1, 0.0], device=device)
    bias = torch.tensor([0.0, 0.3, 0.5, -0.7], device=device)
    return student, teacher, weight, bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_margin_loss(implementation, dtype):
    """The three cases of the official code are one; a weight of 0 is finite; no gradient to the teacher."""
    student, teacher, weight, bias = features(implementation.device, dtype)
    student.requires_grad_(), teacher.requires_grad_()
    loss = kdfast.residual_margin_loss(student, teacher, weight, bias)
    want = oracles.residual_margin_loss(student, teacher, kdfast.ofd_margin(weight, bias).double())
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    grad, teacher_grad = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
    assert teacher_grad is None and grad.dtype == dtype
    torch.testing.assert_close(grad, torch.autograd.grad(want, student)[0], rtol=1e-3, atol=1e-6)


def test_margin_loss_edges(implementation):
    """Equal positive features: exactly 0. No samples: 0 with a graph."""
    student, _, weight, bias = features(implementation.device)
    student = student.abs().requires_grad_()
    loss = kdfast.residual_margin_loss(student, student.detach(), weight, bias)
    assert loss == 0 and not torch.autograd.grad(loss, student)[0].any()
    none = kdfast.residual_margin_loss(student[:0], student[:0], weight, bias)
    assert none == 0 and none.requires_grad


def test_no_host_sync(cuda):
    logits, labels, distances = make("cuda")
    student, teacher, weight, bias = features("cuda")

    def total(student, *logits):
        plain = kdfast.residual_margin_loss(student, teacher, weight, bias)
        return kdfast.JointLoss()(list(logits), labels, [*distances[:-1], plain], 7)

    behaviour.check_no_host_sync(total, [student, *logits])


ERRORS = [
    (lambda z, y, d: kdfast.JointLoss("1"), TypeError, "feature_weight must be a number, got str"),
    (lambda z, y, d: kdfast.JointLoss(decay_floor=2), ValueError, "decay_floor must be from 0 to 1, got 2"),
    (lambda z, y, d: kdfast.JointLoss(decay_epochs=0), ValueError, "decay_epochs must be finite and above 0, got 0"),
    (lambda z, y, d: kdfast.JointLoss(stage="kd"), ValueError, "stage must be .*joint.*ta.*got 'kd'"),
    (lambda z, y, d: kdfast.JointLoss()([], y, d, 1), ValueError, "logits must have at least the plain student's"),
    (lambda z, y, d: kdfast.JointLoss()(z, y, [], 1), ValueError, "feature_losses must have at least"),
    (
        lambda z, y, d: kdfast.JointLoss()(z, y, d[1:], 1),
        ValueError,
        "feature_losses must have one for each path, 4, got 3",
    ),
    (lambda z, y, d: kdfast.JointLoss()(z, y, 0.5, 1), TypeError, "feature_losses must be a list"),
    (lambda z, y, d: kdfast.JointLoss()(z, y, [*d[:3], "x"], 1), TypeError, r"feature_losses\[3\] must be"),
    (lambda z, y, d: kdfast.JointLoss()(z, y, [*d[:3], z[0]], 1), ValueError, r"feature_losses\[3\] must be 0-d"),
    (lambda z, y, d: kdfast.JointLoss()(z, y, d, "1"), TypeError, "epoch must be a number, got str"),
    (lambda z, y, d: kdfast.JointLoss()(z, y, d, -1), ValueError, "epoch must be from 0"),
    (lambda z, y, d: kdfast.JointLoss()(z, y, d, torch.zeros(2)), ValueError, r"epoch must be .*0-d.*\(2,\)"),
    (lambda z, y, d: kdfast.JointLoss()(z, y[:2], d, 1), ValueError, "labels must have shape"),
    (lambda z, y, d: kdfast.JointLoss()(z, y + 9, d, 1), ValueError, r"labels\[0\] is"),
    (
        lambda z, y, d: kdfast.residual_margin_loss(z[0], z[0], torch.ones(3), torch.ones(3)),
        ValueError,
        r"bn_weight must have shape \(9,\), got \(3,\)",
    ),
    (
        lambda z, y, d: kdfast.residual_margin_loss(z[0], z[0], None, torch.ones(9)),
        TypeError,
        "bn_weight must be a torch.Tensor, got NoneType",
    ),
    (
        lambda z, y, d: kdfast.residual_margin_loss(z[0], z[0], torch.ones(9), torch.ones(8)),
        ValueError,
        "bn_bias must have",
    ),
    (lambda z, y, d: kdfast.residual_margin_loss(z[0], z[0][:2], torch.ones(9), torch.ones(9)), ValueError, "teacher"),
    (lambda z, y, d: kdfast.residual_margin_loss(z[0], 1, torch.ones(9), torch.ones(9)), TypeError, "teacher must be"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(call, error, message):
    with kdfast.fallback(), pytest.raises(error, match=message):
        call(*make("cpu"))
