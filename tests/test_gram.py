"""Gram matrices: what the contract of every op (test_ops_*.py) does not say."""

import math

import behaviour
import pytest
import registry
import torch
from behaviour import check_oracle
from conftest import assert_close
from registry.gram import LAYERWISE, gram_distance, make_maps

from kdfast import ops

ROWS = registry.family("gram").GROUPS[0]
raw = torch.ops.kdfast
every_loss = pytest.mark.parametrize("loss", LAYERWISE)


@pytest.mark.parametrize("op", ROWS.ops, ids=str)
def test_batches(implementation, op):
    student, teacher = (torch.randn(3, 5, d, device=implementation.device) for d in (7, 4))
    check_oracle(op, {"student": student, "teacher": teacher})


@pytest.mark.parametrize("terms", [1, 2, 3, 16])  # CASES have 4
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_polynomials(implementation, terms, dtype):
    op = gram_distance("polynomial", kind="polynomial", coefficients=[0.9**k for k in range(terms)])
    check_oracle(ROWS.bound(op), ROWS.inputs(implementation, ROWS.small, dtype))


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 40, 33), (1, 70, 65)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_weighted_sums(implementation, shape, dtype):
    """Weights of any strides, and a factor."""
    z, n, d = shape
    b = torch.randn(z, n + 3, d, dtype=dtype).to(implementation.device)
    w = torch.randn(z, n + 3, n, dtype=dtype, device=b.device).transpose(1, 2)
    got, want = raw.weighted_sums(w, b, torch.tensor(-2.5, dtype=dtype)), -2.5 * w.double() @ b.double()
    assert_close(got, want, 2.5 * w.double().abs() @ b.double().abs(), n, dtype)


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
    student = ROWS.inputs(implementation, (33, 40), torch.float32)["student"]
    check_oracle(ROWS[name], {"student": student, "teacher": student + 1e-4 * torch.randn_like(student)})


@every_loss
def test_double_backward_raises(implementation, loss):
    leaves = behaviour.leaves_of(make_maps(implementation.device, 3, torch.float32))
    behaviour.check_refuses_second_derivative(LAYERWISE[loss](*leaves), leaves[0])


@pytest.mark.parametrize("loss", [name for name in LAYERWISE if name != "LKD"])  # that one works on its patches, a copy
def test_inplace_change_raises(implementation, loss):
    behaviour.check_refuses_changed_input(LAYERWISE[loss], make_maps(implementation.device, 3, torch.float32), 0)


@every_loss
def test_transforms_refused(implementation, loss):
    student, teacher = make_maps(implementation.device, 3, torch.float32)
    behaviour.check_refuses_transforms(lambda s: LAYERWISE[loss](s, teacher), student)


@pytest.mark.parametrize("kind", ["rows", "rows_absolute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_single_rows(implementation, kind, dtype):
    """A row is at distance 0 from every other, at distance 1 from a row that is 0, without a gradient; NaN is seen."""
    x = torch.randn(1, 7, dtype=dtype, device=implementation.device, requires_grad=True)
    for teacher, want in ((torch.randn(1, 4), 0.0), (torch.zeros(1, 4), 1.0), (torch.full((1, 4), math.nan), math.nan)):
        loss = ops.gram_distance(x, teacher.to(x), kind)
        torch.testing.assert_close(loss, x.new_tensor(want), rtol=0, atol=0, equal_nan=True)
        (grad,) = torch.autograd.grad(loss, x)
        assert (grad == 0).all() or math.isnan(want)
    tiny = torch.full((1, 4), 1e-7, dtype=torch.float64, requires_grad=True)  # 4e-14 of the floor of 1e-12
    loss = ops.gram_distance(tiny, torch.zeros(1, 4, dtype=torch.float64), "rows")
    torch.testing.assert_close(loss, torch.tensor(0.04**2, dtype=torch.float64))
    torch.testing.assert_close(torch.autograd.grad(loss, tiny)[0], torch.full_like(tiny, 2 * 0.04 * 2e-7 / 1e-12))
