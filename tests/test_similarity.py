"""Similarities as distributions: the queue step by step, and what test_papers.py does not ask of patches."""

import copy

import oracles
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import kdfast
from kdfast.losses import similarity


def steps(count=3, rows=6, dim=8):
    return [[torch.randn(rows, dim, dtype=torch.float64) for _ in range(2)] for _ in range(count)]


def queue_kl(**settings):
    return kdfast.QueueKL(8, **{"size": 16, "temperature": 0.2, "teacher_temperature": 0.1, **settings}).double()


@pytest.mark.parametrize("size", [16, 13, 6, 4], ids=str)  # 13: the batch goes on at the start; 4: less than a batch
def test_steps(size):
    """The queue is the last `size` embeddings of the teacher, the batch's own among them; so is each loss."""
    loss = queue_kl(size=size)
    seen = loss.queue.clone()
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(size, dtype=torch.float64))
    for student, teacher in steps():
        seen = torch.cat([seen, oracles._unit(teacher)])[-size:]
        x, y = student.clone().requires_grad_(), student.clone().requires_grad_()
        value, want = loss(x, teacher), oracles.similarity_kl(y, seen, teacher, seen, 0.2, 0.1).mean()
        torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-14)
        (grad,), (want_grad,) = torch.autograd.grad(value, x), torch.autograd.grad(want, y)
        torch.testing.assert_close(grad, want_grad, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(loss.queue[loss.queue[:, 0].argsort()], seen[seen[:, 0].argsort()])


def test_a_backward_after_the_next_step():
    loss, (first, second) = queue_kl(), steps(2)
    alone = copy.deepcopy(loss)
    x, y = (first[0].clone().requires_grad_() for _ in range(2))
    value = loss(x, first[1])
    loss(*second)
    value.backward()
    alone(y, first[1]).backward()
    assert torch.equal(x.grad, y.grad)


def test_resumed_from_its_state():
    loss = queue_kl()
    batches = steps(4)
    for batch in batches[:2]:
        loss(*batch)
    other = queue_kl()
    other.load_state_dict(loss.state_dict())
    for batch in batches[2:]:
        assert torch.equal(other(*batch), loss(*batch))
    assert torch.equal(other.queue, loss.queue) and int(loss.position) == 24 % 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_and_autocast(dtype):
    """float16 embeddings of 6e4, whose squares no float16 holds; the queue is float32."""
    student, teacher = (x.sign().to(dtype) * 6e4 for x in steps(1)[0])
    student.requires_grad_()
    loss = kdfast.QueueKL(8, 16)
    wide = copy.deepcopy(loss).double()
    with torch.autocast("cpu", dtype):
        value = loss(student, teacher)
    torch.testing.assert_close(value.double(), wide(student.double(), teacher.double()), rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(value, student)[0].isfinite().all()
    maps = [torch.randn(2, 5, 4, 3).sign().to(dtype) * 6e4 for _ in range(2)]
    maps[0].requires_grad_()
    with torch.autocast("cpu", dtype):
        value = kdfast.PatchKL()(*maps)
    torch.testing.assert_close(value.double(), oracles.PatchKL(*[x.double() for x in maps]), rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(value, maps[0])[0].isfinite().all()


def test_edges():
    """No rows, rows of zeros, equal networks, NaN."""
    loss = queue_kl()
    empty = torch.zeros(0, 8, dtype=torch.float64, requires_grad=True)
    loss(empty, empty.detach()).backward()
    assert empty.grad.shape == (0, 8) and int(loss.position) == 0
    student, teacher = steps(1)[0]
    zeros = torch.zeros_like(student, requires_grad=True)
    loss(zeros, teacher).backward()
    assert zeros.grad.isfinite().all()
    loss = queue_kl(teacher_temperature=None)
    assert loss(teacher, teacher).abs() < 1e-15
    teacher[2, 3] = float("nan")
    assert loss(student, teacher).isnan()
    assert kdfast.PatchKL()(*[torch.randn(0, 5, 2, 2, requires_grad=True) for _ in range(2)]) == 0
    x = torch.randn(2, 5, 4, 3)
    assert kdfast.PatchKL()(x, x).abs() < 1e-6


def test_patches_together_and_one_by_one(monkeypatch):
    """The same loss and gradients, whether all similarities are formed at once or some rows at a time."""
    maps, results = [torch.randn(3, c, 4, 5, dtype=torch.float64) for c in (6, 4)], []
    for at_once in (2**22, 0):
        monkeypatch.setattr(similarity, "AT_ONCE", at_once)
        leaves = [x.clone().requires_grad_() for x in maps]
        loss = kdfast.PatchKL(0.2)(*leaves)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-14)


def test_patches_one_by_one_in_a_graph(monkeypatch):
    """One opaque op; low precision, layouts, no second derivative."""
    monkeypatch.setattr(similarity, "AT_ONCE", 0)
    torch.compiler.reset()
    loss, maps = kdfast.PatchKL(0.2), [torch.randn(3, c, 4, 5).requires_grad_() for c in (6, 4)]
    compiled = torch.compile(lambda *x: loss(*x), fullgraph=True, backend="aot_eager")
    results = [[f(*maps), *torch.autograd.grad(3 * f(*maps), maps)] for f in (compiled, loss)]
    torch.testing.assert_close(*results)
    last = [x.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for x in maps]
    torch.testing.assert_close([loss(*last), *torch.autograd.grad(3 * loss(*last), last)], results[1])
    half = [x.detach().bfloat16().requires_grad_() for x in maps]
    want = oracles.PatchKL(*[x.detach().double() for x in half], 0.2)
    torch.testing.assert_close(loss(*half).double(), want, rtol=1e-5, atol=1e-6)
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in torch.autograd.grad(loss(*half), half))
    with pytest.raises(RuntimeError, match="patch_kl has no second derivative"):
        torch.autograd.grad(loss(*maps), maps[0], create_graph=True)


def test_patches_do_not_store_similarities():
    """At most the gradient twice, some copies of an image, and the similarities of 256 of its positions."""
    student, teacher = (torch.randn(8, 48, 32, 32) for _ in range(2))
    student.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        kdfast.PatchKL()(student, teacher).backward()
    size = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        size += event.nbytes()
        most = max(most, size)
    assert events and most < 2 * student.nbytes + 6 * 256 * 1024 * 4 + 8 * student[0].nbytes


def test_compiled():
    torch.compiler.reset()
    loss = queue_kl()
    eager = copy.deepcopy(loss)
    compiled = torch.compile(lambda s, t: loss(s, t), fullgraph=True, backend="aot_eager")
    for student, teacher in steps(2):
        x, y = (student.clone().requires_grad_() for _ in range(2))
        values = compiled(x, teacher), eager(y, teacher)
        torch.testing.assert_close(*values)
        values[0].backward(), values[1].backward()
        torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(loss.queue, eager.queue)


def test_on_meta():
    with torch.device("meta"):
        loss = kdfast.QueueKL(8, 16)
    loss = loss.to_empty(device="cpu")
    loss.reset_parameters()
    assert loss(torch.randn(3, 8), torch.randn(3, 8)).isfinite()


def test_not_recomputed():
    loss = queue_kl()
    student, teacher = steps(1)[0]
    value = checkpoint(lambda s: loss(s, teacher), student.requires_grad_(), use_reentrant=False)
    with pytest.raises(RuntimeError, match="Call QueueKL outside of the checkpoint"):
        value.backward()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, t: queue_kl()(s[:, :3], t), ValueError, r"student must have dim = 8 features, got shape \(6, 3\)"),
        (lambda s, t: queue_kl()(s, t[:2]), ValueError, "teacher must have the student's batch size 6"),
        (lambda s, t: queue_kl()(s, 1.0), TypeError, "teacher must be a torch.Tensor, got float"),
        (lambda s, t: queue_kl(size=0), ValueError, "size must be"),
        (lambda s, t: queue_kl(temperature=0.0), ValueError, "temperature must be"),
        (lambda s, t: kdfast.PatchKL()(s, t), ValueError, r"student must be \(batch, channels, height, width\)"),
        (
            lambda s, t: kdfast.PatchKL()(s.view(6, 2, 2, 2), t.view(6, 2, 4, 1)),
            ValueError,
            "teacher must have the student's height and width",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(*steps(1)[0])
