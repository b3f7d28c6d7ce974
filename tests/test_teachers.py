"""Several teachers: what the contract of every op (test_ops_*.py) and test_networks.py do not say."""

import itertools
import math

import behaviour
import oracles
import pytest
import torch
from behaviour import FLOATS, check_oracle
from conftest import assert_close
from networks import SMALL, TAUGHT, for_simt, given, make, taught_by
from registry.teachers import sizes_teachers_kl

from kdfast import ops
from kdfast.ops import blocks
from kdfast.ops.simplex import simplex_minimum
from kdfast.ops.teachers import aekd_weights

INF = math.inf


# ---- AE-KD's weights -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("slack", [0.0, 0.2, 0.35, 0.6, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_aekd_weights(implementation, count, slack, normalize):
    """The optimum that trying every set of active bounds finds; gradients of any magnitude."""
    for_simt(implementation, count == 3 and slack in (0.35, 0.6))
    for spread in (1.0, 1e-4):
        student, *teachers = taught_by(implementation, count, spread=spread)
        loss, weights = ops.aekd(student, teachers, 4.0, slack=slack, normalize=normalize)
        want = oracles.aekd_weights(student, teachers, 4.0, slack, normalize)
        torch.testing.assert_close(weights, want, rtol=0, atol=1e-6)
        exact = oracles.teachers_kl(student, teachers, None, 4.0, weight=weights)
        torch.testing.assert_close(loss, exact, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("shape", [(2, 1, 1), (3, 9, 33), (4, 40, 1025), (2, 3, 2049)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_aekd_matches_oracle(implementation, shape, dtype):
    """Loss and gradient with the weights as they came; the weights as good as the optimum, to the type's precision."""
    if implementation.name == "simt" and shape[1] > 9:
        shape = (4, 9, 130)
    student, *teachers = taught_by(implementation, *shape, dtype=dtype)
    leaf = student.clone().requires_grad_()
    loss, weights = ops.aekd(leaf, teachers, 4.0)
    assert weights.dtype == loss.dtype and not weights.requires_grad
    (grad,) = torch.autograd.grad(loss, leaf)
    exact = student.double().requires_grad_()
    value = oracles.teachers_kl(exact, teachers, None, 4.0, weight=weights)
    (want,) = torch.autograd.grad(value, exact)
    size, entries, _ = sizes_teachers_kl(student, teachers, None, 4.0, weight=weights)
    assert_close(loss, value.detach(), size, shape[2], loss.dtype)
    assert grad.dtype == dtype
    assert_close(grad, want, entries, shape[2], loss.dtype, "gradient")
    gram, w = oracles.aekd_gram(student, teachers, 4.0), weights.double()
    best = oracles.aekd_weights(student, teachers, 4.0)
    assert abs(w.sum() - 1) < 1e-6 and w.min() >= 0 and w.max() <= 0.6 + 1e-6
    room = 1e-5 if loss.dtype == torch.float32 else 1e-12
    assert w @ gram @ w <= best @ gram @ best + room * gram.diagonal().max()


@pytest.mark.parametrize("count", [2, 4, 9, 24])
def test_simplex_minimum(implementation, count):
    """The conditions of an optimum (a common slope among the free weights, none that pulls), for any rank of G."""
    generator = torch.Generator().manual_seed(count)
    for rank in {1, 2, count - 1, count, 3 * count}:
        for cap in (1.0, 0.6, 1.5 / count):
            v = torch.randn(count, rank, dtype=torch.float64, generator=generator)
            gram = v @ v.T
            found = [simplex_minimum(gram.to(implementation.device), torch.zeros(count).to(gram), cap).cpu()]
            found.append(aekd_weights(1e-9 * gram, cap, False))
            for a in found:
                assert abs(a.sum() - 1) < 1e-12 and a.min() >= 0 and a.max() <= max(cap, 1 / count) + 1e-12
                slope = gram @ a
                # No direction of the simplex goes down: the best swap of weight gains nothing.
                rises, falls = slope[a < cap - 1e-9], slope[a > 1e-9]
                if len(rises) and len(falls):
                    assert falls.max() - rises.min() <= 1e-9 * gram.diagonal().max()


def test_aekd_equal_teachers(implementation):
    """G of rank one, or 0: weights on the simplex, a finite loss, exactly 0 where the teachers are the student."""
    student, teacher, other = taught_by(implementation, 2)
    for normalize in (False, True):
        for teachers in ([teacher] * 3, [teacher, other, teacher], [student] * 3, [student, teacher, other]):
            leaf = student.clone().requires_grad_()
            loss, weights = ops.aekd(leaf, teachers, normalize=normalize)
            assert abs(weights.sum() - 1) < 1e-9 and (weights >= 0).all()
            assert loss.isfinite() and torch.autograd.grad(loss, leaf)[0].isfinite().all()
            if all(x is student for x in teachers):
                assert loss == 0


# ---- arguments -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtypes", list(itertools.product([torch.float32, torch.bfloat16], repeat=3)), ids=str)
def test_teachers_of_other_dtypes(implementation, dtypes):
    """Student and teachers may differ in their types; the types of one list are widened, which changes no value."""
    tensors = taught_by(implementation, 2, dtype=torch.bfloat16)
    student, *teachers = (x.to(dtype).requires_grad_() for x, dtype in zip(tensors, dtypes, strict=True))
    loss = ops.teachers_kl(student, teachers, temperature=2.0)
    grads = torch.autograd.grad(loss, [student, *teachers])
    assert [x.dtype for x in grads] == list(dtypes)
    wide = [x.float().requires_grad_() for x in tensors]
    want = ops.teachers_kl(wide[0], wide[1:], temperature=2.0)
    assert torch.equal(loss, want)
    for got, x in zip(grads, torch.autograd.grad(want, wide), strict=True):
        assert torch.equal(got, x.to(got.dtype))


# ---- edges -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("op", [TAUGHT[name] for name in ("kl", "kl_sum", "cross_entropy")], ids=str)
def test_edges_minus_infinity_of_the_teachers(implementation, op):
    """A class that only teachers mask adds nothing to their divergences."""
    data = make(implementation, *SMALL, torch.float32)
    data.networks[1][:, 5] = -INF
    check_oracle(op, given(op, data))


# ---- behaviour in PyTorch --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("implementation", ["fallback"], indirect=True)
def test_aekd_in_blocks_of_any_size(implementation, monkeypatch):
    """Its weights come from sums over all rows: these have blocks of their own, which no number of threads changes."""
    torch.manual_seed(0)
    student, *teachers = (torch.randn(300, 1000, dtype=torch.float64) for _ in range(4))
    monkeypatch.setattr(blocks, "ELEMENTS", 1)
    small = ops.aekd(student, teachers)
    monkeypatch.setattr(blocks, "ELEMENTS", 2**30)
    assert all(map(torch.equal, small, ops.aekd(student, teachers)))


def test_double_backward_of_aekd_raises(implementation):
    student, *teachers = taught_by(implementation, 3)
    leaf = student.requires_grad_()
    behaviour.check_refuses_second_derivative(ops.aekd(leaf, teachers)[0], leaf)


def test_aekd_refuses(implementation):
    student, *teachers = taught_by(implementation, 3)
    behaviour.check_refuses_transforms(lambda x: ops.aekd(x, teachers)[0], student)


def test_dtensor_of_aekd_refused(dtensor):
    plain = torch.randn(5, 9)
    with pytest.raises(TypeError, match=r"teachers\[0\] is a DTensor"):
        ops.aekd(plain, [dtensor(plain)])
