"""EnDD, the uncertainties of an ensemble and the annealed temperature."""

import math

import behaviour
import oracles
import pytest
import torch
from official import Official, every_file

import kdfast

VARIANTS = ("dirichlet", "ensemble_temperature", "dirichlet_temperature", "reverse")
INF = math.inf


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(request.param)


def make(device, teachers, rows, cols, dtype=torch.float64, scale=3.0):
    draw = [(torch.randn(rows, cols, dtype=torch.float64) * scale).to(dtype).to(device) for _ in range(teachers + 1)]
    return draw[0], draw[1:]


def check(student, teachers, rtol=1e-11, **options):
    """Value and gradients, relative to the largest entry; what the tensors' dtype cannot hold is infinite."""
    leaves = behaviour.leaves_of([student, *teachers])
    loss = kdfast.EnDD(**options)(leaves[0], leaves[1:])
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want = oracles.EnDD(wide[0], wide[1:], **options)
    assert want.isfinite()
    torch.testing.assert_close(loss, want.to(loss.dtype), rtol=max(rtol, torch.finfo(loss.dtype).eps), atol=0)
    grads = (torch.autograd.grad(x, y) for x, y in ((loss, leaves), (want, wide)))
    for x, got, expected in zip(leaves, *grads, strict=True):
        assert got.dtype == x.dtype
        largest = torch.finfo(x.dtype).max
        expected = expected.clamp(-largest, largest)
        eps, spacing = 2 * torch.finfo(x.dtype).eps, torch.finfo(x.dtype).tiny * torch.finfo(x.dtype).eps
        off = max(rtol, eps) * expected.abs().max().item() + spacing
        torch.testing.assert_close(got.double(), expected, rtol=eps, atol=off)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", behaviour.FLOATS, ids=str)
def test_matches_oracle(device, variant, dtype):
    for shape in ((1, 1, 2), (3, 5, 9), (2, 33, 1025)):
        check(*make(device, *shape, dtype=dtype), variant=variant, temperature=2.5)
    check(*make(device, 3, 5, 9, dtype=dtype), variant=variant, smoothing=1e-3, teacher_smoothing=0.5)


def test_stacked_teachers(device):
    student, teachers = make(device, 3, 5, 9)
    stacked = torch.stack(teachers).requires_grad_()
    leaves = behaviour.leaves_of(teachers)
    a, b = kdfast.EnDD()(student, stacked), kdfast.EnDD()(student, leaves)
    assert torch.equal(a, b)
    assert torch.equal(torch.autograd.grad(a, stacked)[0], torch.stack(torch.autograd.grad(b, leaves)))


@pytest.mark.parametrize("peak", [20.0, 60.0, 89.0, 95.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_confident_student(device, dtype, peak):
    """Finite where its float64 value fits the loss's type, with all its digits; float32 ends between e^89 and e^95."""
    student, teachers = make(device, 3, 4, 9, scale=1.0)
    student = student + peak
    # The teachers nearly agree with the student: the loss is small beside its terms.
    teachers = [student - peak + 0.1 * x for x in teachers]
    student, teachers = student.to(dtype), [x.to(dtype) for x in teachers]
    tolerance = 1e-11 if peak < 100 else 1e-9  # the oracle's digits: terms of 300 cancel to 0.01
    check(student, teachers, rtol=tolerance)
    finite = kdfast.EnDD()(student, teachers).isfinite()
    assert finite == (dtype == torch.float64 or peak < 91)


@pytest.mark.parametrize("dtype", behaviour.FLOATS, ids=str)
def test_edges(device, dtype):
    """+inf where float64 overflows, never NaN, and a gradient that is finite."""
    student, teachers = make(device, 3, 4, 6, dtype=dtype, scale=1.0)

    def put(x, row, col, value):
        x = x.clone()
        x[row, col] = value
        return x

    masked = put(student, 1, 2, -INF)
    masked_teacher = put(teachers[0], slice(None), 3, -INF)
    empty_teacher = put(teachers[0], 2, slice(None), -INF)
    infinite_teacher = put(teachers[0], 2, 1, INF)
    overflow, overflow_all = put(student, 0, 0, 800.0), put(student, 0, slice(None), 800.0)
    for x, first, finite in (
        (masked, teachers[0], True),
        (put(student, 0, slice(None), -INF), teachers[0], True),
        (student, masked_teacher, True),
        (student, empty_teacher, True),
        (student, infinite_teacher, True),
        (overflow, teachers[0], False),
        (overflow_all, teachers[0], False),
        (put(student, 0, 0, INF), teachers[0], False),
        (put(student, 0, slice(None), INF), masked_teacher, False),
    ):
        for options in ({}, {"smoothing": 0.0}, {"smoothing": 0.0, "teacher_smoothing": 0.0}):
            leaves = behaviour.leaves_of([x, first, *teachers[1:]])
            loss = kdfast.EnDD(**options)(leaves[0], leaves[1:])
            if not options or not finite:
                assert loss.isfinite() if finite else loss == INF
            assert not loss.isnan()
            for upstream in (1.0, 0.0):
                grads = torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream), retain_graph=True)
                assert all(g.isfinite().all() for g in grads)
                assert upstream or not any(g.any() for g in grads)
    empty = student[:0].requires_grad_()
    loss = kdfast.EnDD()(empty, [x[:0] for x in teachers])
    assert loss == 0 and torch.autograd.grad(loss, empty)[0].shape == (0, 6)
    assert kdfast.EnDD()(put(student, 1, 1, math.nan), teachers).isnan()


def test_gradient_of_an_infinite_loss_descends(device):
    """One step down lowers the concentrations that overflow."""
    student, teachers = make(device, 2, 1, 4, dtype=torch.float32)
    student[0, 1] = 100.0  # a float64 loss of e^100
    student.requires_grad_()
    (grad,) = torch.autograd.grad(kdfast.EnDD()(student, teachers), student)
    assert grad[0, 1] == torch.finfo(torch.float32).max and grad[0, [0, 2, 3]].abs().max() < 1e5


@pytest.mark.parametrize("variant", VARIANTS)
def test_behaviour(device, variant, same_bits):
    student, teachers = make(device, 3, 64, 100, dtype=torch.float32)
    loss = kdfast.EnDD(2.0, variant=variant)

    def function(student, *teachers):
        return loss(student, teachers)

    behaviour.check_loss(function, [student, *teachers], same_bits, changed=(0, 2))


def test_compiled_without_gradient(device):
    """Evaluation, for any number of networks."""
    student, logits = make(device, 4, 5, 6)
    for count in range(1, 5):
        torch.compiler.reset()
        z = logits[:count]
        compiled = torch.compile(lambda z: kdfast.EnDD()(student, z), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(z), kdfast.EnDD()(student, z))


def test_errors(dtensor):
    student, teachers = make("cpu", 2, 4, 5)
    for arguments, error, message in (
        ((student, teachers[0]), ValueError, r"teachers must be a list of \(B, C\) tensors or one \(M, B, C\) tensor"),
        ((student, []), ValueError, "teachers must have from 1 to 128 networks, got 0"),
        ((student[:3], teachers), ValueError, r"teachers\[0\] must have the student's batch and classes \(3, 5\)"),
        ((student[0], teachers), ValueError, "student must be 2-D"),
        ((dtensor(student), teachers), TypeError, "student is a DTensor"),
    ):
        with pytest.raises(error, match=message):
            kdfast.EnDD()(*arguments)
    for options, message in (
        ({"temperature": 0}, "temperature must be finite and above 0"),
        ({"smoothing": -1e-8}, "smoothing must be from 0"),
        ({"teacher_smoothing": 1.5}, "teacher_smoothing must be from 0 to 1"),
        ({"variant": "rev"}, "variant must be one of dirichlet, ensemble_temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            kdfast.EnDD(**options)


# ---- uncertainties ---------------------------------------------------------------------------------------------------
@every_file("endd_uncertainties")
def test_uncertainties_match_official_code(path):
    x = Official(path)
    want = {name.lower(): value for name, value in x.results("out_").items()}
    got = kdfast.ensemble_uncertainty(x("teacher_logits"))
    assert set(got) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-14)


def test_uncertainties(device):
    _, teachers = make(device, 4, 7, 1030)
    want = oracles.ensemble_uncertainty(teachers)
    for inputs in (teachers, torch.stack(teachers)):
        for name, value in kdfast.ensemble_uncertainty(inputs).items():
            torch.testing.assert_close(value, want[name], rtol=1e-11, atol=1e-13)
    near = [(teachers[0] + 1e-3 * x).float() for x in teachers[1:]]
    want = oracles.ensemble_uncertainty(near)
    for name, value in kdfast.ensemble_uncertainty(near).items():
        # A difference of entropies, 1e-6 of them, would have no digit in float32.
        torch.testing.assert_close(value.double(), want[name], rtol=2e-2 if name[0] in "me" else 1e-5, atol=0)
    assert kdfast.ensemble_uncertainty([x.half() for x in teachers])["epkl"].dtype == torch.float32
    with pytest.raises(ValueError, match="teachers must have from 1 to 128 networks, got 0"):
        kdfast.ensemble_uncertainty([])


# ---- the temperature -------------------------------------------------------------------------------------------------
@every_file("endd_temperature")
def test_annealing_matches_official_code(path):
    x = Official(path)
    epochs, want, cycle = (x[name].tolist() for name in ("in_epoch", "out_temp", "out_temp_reproduce"))
    official, half_cycles = kdfast.TemperatureAnnealing(10.0, 5, 10, 1.0), kdfast.TemperatureAnnealing(10.0, 10, 10)
    for epoch in map(int, epochs):
        assert official(epoch) == pytest.approx(want[epoch], rel=1e-12)
        assert half_cycles(epoch) == pytest.approx(cycle[epoch], rel=1e-12)
        assert official(torch.tensor(epoch)).item() == pytest.approx(want[epoch], rel=1e-6)
    with pytest.raises(ValueError, match="decay_length must be finite and above 0"):
        kdfast.TemperatureAnnealing(10.0, 5, 0)
