"""kdfast.compat.mmrazor against the formulas of the originals, in float64."""

import types

import pytest
import torch
from torch.nn import functional as F

from kdfast.compat import mmrazor


def cwd(s, t, tau):
    s, t = (x.reshape(-1, x.shape[2] * x.shape[3]) / tau for x in (s, t))
    p = t.softmax(1)
    return (p * t.log_softmax(1) - p * s.log_softmax(1)).sum() * tau**2


def standardized(x):
    rows = x.permute(1, 0, 2, 3).reshape(x.shape[1], -1)
    return (rows - rows.mean(-1, keepdim=True)) / (rows.std(-1, keepdim=True) + 1e-6)


def dkd(s, t, labels, tau, alpha, beta):
    target = F.one_hot(labels, s.shape[1]).bool()

    def kl(log_q, p):
        return F.kl_div(log_q, p, reduction="sum") * tau**2

    def two(x):
        p = (x / tau).softmax(1)
        return torch.stack([(p * target).sum(1), (p * ~target).sum(1)], 1)

    rest = [x / tau - 1000.0 * target for x in (s, t)]
    return alpha * kl(two(s).log(), two(t)) + beta * kl(rest[0].log_softmax(1), rest[1].softmax(1))


def pearson(a, b):
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()


def dist(s, t, inter, intra, tau):
    s, t = ((x / tau).softmax(1) for x in (s, t))
    return tau**2 * (inter * pearson(s, t) + intra * pearson(s.t(), t.t()))


def maps(*shape):
    return torch.randn(*(shape or (3, 4, 5, 6)), dtype=torch.float64)


def resized(x, size):
    return F.interpolate(x, size, mode="bilinear")


def sample(label, **more):
    class Label(dict):
        label = None

    gt = Label(label=label, **more)
    gt.label = torch.tensor([label])
    gt.__dict__.update(more)
    return types.SimpleNamespace(gt_label=gt)


LABELS = torch.tensor([0, 2, 3, 1, 1])
LOGITS = lambda: maps(5, 4)  # noqa: E731
CASES = {
    "cwd": (mmrazor.ChannelWiseDivergence(2.0, 5.0), lambda s, t: 5 * cwd(s, t, 2.0) / 12, maps, maps),
    "cwd, defaults": (mmrazor.ChannelWiseDivergence(), lambda s, t: cwd(s, t, 1.0) / 12, maps, maps),
    "pkd": (mmrazor.PKDLoss(6.0), lambda s, t: 6 * F.mse_loss(standardized(s), standardized(t)) / 2, maps, maps),
    "pkd, student resized": (
        mmrazor.PKDLoss(),
        lambda s, t: F.mse_loss(standardized(resized(s, (7, 9))), standardized(t)) / 2,
        maps,
        lambda: maps(3, 4, 7, 9),
    ),
    "pkd, teacher resized": (
        mmrazor.PKDLoss(resize_stu=False),
        lambda s, t: F.mse_loss(standardized(s), standardized(resized(t, (5, 6)))) / 2,
        maps,
        lambda: maps(3, 4, 7, 9),
    ),
    "mgd": (mmrazor.MGDLoss(0.1), lambda s, t: 0.1 * (s - t).square().sum() / 3, maps, maps),
    **{
        f"kl, {reduction}, {make.__name__}": (
            mmrazor.KLDivergence(3.0, reduction, 2.0, teacher_detach=False),
            lambda s, t, r=reduction: 2 * 9 * F.kl_div((s / 3).log_softmax(1), (t / 3).softmax(1), reduction=r),
            make,
            make,
        )
        for reduction in ("batchmean", "mean", "sum")
        for make in (maps, LOGITS)
    },
    "dkd": (
        lambda s, t: mmrazor.DKDLoss(loss_weight=0.5)(s, t, [sample(int(x)) for x in LABELS]),
        lambda s, t: 0.5 * dkd(s, t, LABELS, 4.0, 1.0, 8.0) / 5,
        LOGITS,
        LOGITS,
    ),
    "dkd, labels": (
        lambda s, t: mmrazor.DKDLoss(1.0, 2.0, 3.0, "none")(s, t, LABELS),
        lambda s, t: dkd(s, t, LABELS, 1.0, 2.0, 3.0),
        LOGITS,
        LOGITS,
    ),
    "dkd, scores": (
        lambda s, t: mmrazor.DKDLoss()(s, t, [sample(int(x), score=F.one_hot(x, 4).double()) for x in LABELS]),
        lambda s, t: dkd(s, t, LABELS, 4.0, 1.0, 8.0) / 5,
        LOGITS,
        LOGITS,
    ),
    "dist": (
        mmrazor.DISTLoss(2.0, 0.5, 3.0, 4.0, teacher_detach=False),
        lambda s, t: 4 * dist(s, t, 2.0, 0.5, 3.0),
        LOGITS,
        LOGITS,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers(name):
    ours, original, make_student, make_teacher = CASES[name]
    pair = make_student().requires_grad_(), make_teacher().requires_grad_()
    got, want = ours(*pair), original(*pair)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    for a, b in zip(torch.autograd.grad(got, pair), torch.autograd.grad(want, pair), strict=True):
        if name.startswith("dkd") and b.isnan().any():  # the teacher's: of p log p where p underflows
            assert a.isfinite().all()
            continue
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12 * float(b.abs().max()) + 1e-14)


@pytest.mark.parametrize("loss", [mmrazor.KLDivergence(), mmrazor.DISTLoss()], ids=str)
def test_the_teacher_is_detached(loss):
    student, teacher = LOGITS().requires_grad_(), LOGITS().requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.any() and teacher.grad is None


@pytest.mark.filterwarnings("ignore:.*size_average")
def test_reductions_of_dkd():
    """`size_average`, which the original passes to kl_div, wins over all but "batchmean"."""
    s, t = LOGITS(), LOGITS()
    log_q, p, total = s.log_softmax(1), t.softmax(1), F.kl_div(s.log_softmax(1), t.softmax(1), reduction="sum")
    of_ours = {r: mmrazor.DKDLoss(reduction=r)(s, t, LABELS) for r in ("batchmean", "mean", "sum", "none")}
    for reduction, loss in of_ours.items():
        share = F.kl_div(log_q, p, size_average=False, reduction=reduction) / total
        torch.testing.assert_close(loss / of_ours["sum"], share)


def test_bad_reduction():
    with pytest.raises(ValueError, match="reduction must be one of batchmean, mean, sum, got 'none'"):
        mmrazor.KLDivergence(reduction="none")
