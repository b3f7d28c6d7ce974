"""Feature maps element by element: what the contract of every op (test_ops_*.py) does not say."""

import behaviour
import oracles
import pytest
import registry
import torch
from behaviour import check_oracle
from conftest import assert_close
from official import Official, every_file

import kdfast
from kdfast import ops

GROUP = registry.family("feature").GROUPS[0]


def make(implementation, dtype=torch.float64):
    """Student, teacher, margin."""
    return GROUP.inputs(implementation, GROUP.small, dtype).values()


def test_reductions(implementation):
    student, teacher, margin = make(implementation)
    for call in (
        lambda r: ops.activation_boundary(student, teacher, reduction=r),
        lambda r: ops.partial_squared_error(student, teacher, margin, reduction=r),
    ):
        each = call("none")
        assert each.shape == (3,)
        torch.testing.assert_close(call("sum"), each.sum())
        for mean in ("mean", "batchmean"):
            torch.testing.assert_close(call(mean), each.mean())


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_edges_zero_sample(implementation, power, dtype):
    """A sample of zeros in either network or in both has no direction: finite, without gradient of its own."""
    student, teacher, _ = make(implementation, dtype)
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
    x = {"student": student.view(1, 1, 2, 4), "teacher": teacher.view(1, 1, 2, 4), "margin": torch.tensor([-1.0])}
    x = registry.mapped(x, lambda name, t: t.to(implementation.device))
    check_oracle(GROUP["partial"], x)
    check_oracle(GROUP["boundary"], x)


def test_no_gradient_to_a_margin(implementation):
    student, teacher, margin = make(implementation)
    margin.requires_grad_()
    loss = ops.partial_squared_error(student.requires_grad_(), teacher, margin)
    assert torch.autograd.grad(loss, margin, allow_unused=True) == (None,)


# ---- losses ----------------------------------------------------------------------------------------------------------
def test_compile_refuses_jacobians():
    """An error that says why, where a whole graph is asked for."""
    loss = torch.compile(kdfast.JacobianMatching(), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="second derivatives"):
        loss(torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 4), torch.zeros(2, dtype=torch.long))


def test_autocast_of_vid(implementation):
    """Its regressor is convolutions."""
    vid = kdfast.VID(4, 5, 4).to(implementation.device)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [torch.randn(3, 4, 6, 5, device=implementation.device).to(dtype) for _ in range(2)]
        behaviour.check_autocast(vid, tensors)


@pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
def test_deterministic_algorithms_are_enough_for_vid(implementation, deterministic_algorithms):
    student = torch.randn(3, 4, 7, 7, device=implementation.device, requires_grad=True)  # pooled in uneven windows
    teacher = torch.randn(3, 4, 4, 4, device=implementation.device)
    kdfast.VID(4, 5, 4).to(implementation.device)(student, teacher).backward()
    assert student.grad.isfinite().all()


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


@every_file("ofd_margin")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_margin_of_official_code(path, dtype):
    """Each channel to 1e-7: the official margins are float32."""
    x = Official(path, dtype)
    margin = kdfast.ofd_margin(x("bnw"), x("bnb"))
    assert margin.dtype == dtype
    torch.testing.assert_close(margin.double(), x["loss"], rtol=x.of_type(1e-7, 2e-7), atol=0)


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
