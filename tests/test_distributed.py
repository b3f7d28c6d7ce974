"""Batches spread over processes give the banks, losses and gradients of one process with the whole batch."""

import functools

import pytest
import torch
from processes import HAVE_GLOO, NO_GLOO, in_processes

import kdfast
from kdfast import distributed

pytestmark = pytest.mark.skipif(not HAVE_GLOO, reason=NO_GLOO)

N_DATA, STEPS = 50, 2
SPLITS = [(4, 4), (3, 5), (2, 3, 1, 2), (1, 4, 0, 3)]  # rows of each rank
EQUAL = {"rtol": 1e-6, "atol": 1e-9}


def make_crd():
    torch.manual_seed(0)
    return kdfast.CRD(6, 5, N_DATA, feature_dim=16, negatives=20).double()


def batches(rows):
    """STEPS times student, teacher, index, contrast_index; an index is repeated, and negatives are drawn last."""
    numbers = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        student, teacher = (torch.randn(rows, dim, generator=numbers, dtype=torch.float64) for dim in (6, 5))
        index = torch.randint(N_DATA, (rows,), generator=numbers)
        index[-1] = index[0]
        contrast = torch.cat([index[:, None], torch.randint(N_DATA, (rows, 20), generator=numbers)], 1)
        yield student, teacher, index, None if step else contrast


def train(model, rows, mine=slice(None)):
    """-> loss and gradients of both embeddings and of the student's rows, step by step."""
    seen = []
    for student, teacher, index, contrast in batches(rows):
        student = student[mine].requires_grad_()
        loss = model(student, teacher[mine], index[mine], None if contrast is None else contrast[mine])
        parameters = list(model.parameters())
        seen.append([loss.detach(), *torch.autograd.grad(loss, [student, *parameters])])
    return seen


def descend(model, rows, mine=slice(None)):
    """STEPS of gradient descent -> the module's state."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for student, teacher, index, _ in batches(rows):
        optimizer.zero_grad()
        model(student[mine], teacher[mine], index[mine]).backward()
        optimizer.step()
    return getattr(model, "module", model).state_dict()


def relations(student, teacher):
    student.requires_grad_()
    loss = kdfast.RKD()(distributed.gather(student), distributed.gather(teacher))
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def crd_job(rank, split, mine):
    model = make_crd()
    if rank:  # rank 0 has the banks that count
        model.bank_student.mul_(0.5)
    return train(model, sum(split), mine), model.state_dict()


def ddp_job(rank, split, mine):
    """-> the state after some steps under DDP, and which buffers DDP leaves alone and sends."""
    wrapped = torch.nn.parallel.DistributedDataParallel(make_crd())
    state = descend(wrapped, sum(split), mine)
    nested = torch.nn.ModuleDict({"crd": make_crd(), "norm": torch.nn.BatchNorm1d(3)})
    nested = torch.nn.parallel.DistributedDataParallel(distributed.ignore_banks(nested))
    return state, [(sorted(x.parameters_to_ignore), len(x.modules_buffers)) for x in (wrapped, nested)]


def loaded_job(rank, split, mine):
    """One rank alone loads a state in the middle of training."""
    model = make_crd()
    first = {name: x.clone() for name, x in model.state_dict().items()}
    train(model, sum(split), mine)
    if rank == 0:
        model.load_state_dict(first)
    train(model, sum(split), mine)
    return model.state_dict()


def queue_job(rank, split, mine):
    torch.manual_seed(rank)  # rank 0's queue counts
    loss, seen = kdfast.QueueKL(5, size=7).double(), []
    for student, teacher, *_ in batches(sum(split)):
        student = student[mine, :5].clone().requires_grad_()
        value = loss(student, teacher[mine])
        seen.append([value.detach(), *torch.autograd.grad(value, student)])
    return seen, loss.state_dict()


def relations_job(rank, split, mine):
    student, teacher, *_ = next(batches(sum(split)))
    return relations(student[mine], teacher[mine])


def unequal_job(rank, split, mine):
    messages = []
    student, teacher, index, _ = next(batches(sum(split)))
    for wrong in (
        student[:, : 3 + rank],
        student.to(torch.float64 if rank else torch.float32),
        student.clone().requires_grad_(rank == 0),
    ):
        with pytest.raises(ValueError, match="x must have one dtype, requires_grad and shape .* on rank 1"):
            distributed.gather(wrong)
    with pytest.raises(ValueError, match="x must be a tensor of 1 to 8 dimensions on every rank; on rank 1 it is not"):
        distributed.gather([1.0] if rank == 1 else student)
    contrast = torch.zeros(split[rank], 3 + rank, dtype=torch.int64)
    with pytest.raises(ValueError, match="contrast_index must have as many columns.*3 columns.*on rank 0, 4"):
        make_crd()(student[mine], teacher[mine], index[mine], contrast)
    index = index[mine].clone()
    if rank == 1:
        index[0] = N_DATA
    try:
        make_crd()(student[mine], teacher[mine], index)
    except (IndexError, RuntimeError) as error:
        messages.append(str(error))
    return messages


JOBS = {split: [crd_job, queue_job, relations_job] for split in SPLITS}
JOBS[3, 5].append(ddp_job)
JOBS[4, 4].append(loaded_job)
JOBS[2, 3] = [unequal_job]


def of_rank(rank, split):
    mine = slice(sum(split[:rank]), sum(split[: rank + 1]))
    return {job.__name__: job(rank, split, mine) for job in JOBS[split]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(split, job)`: what the job gave on each rank; processes are started once for all jobs of a split."""

    @functools.cache
    def ranks(split):
        return in_processes(len(split), tmp_path_factory.mktemp("ranks"), of_rank, split)

    return lambda split, job: [results[job.__name__] for results in ranks(split)]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_crd_is_that_of_one_process(split, run):
    model = make_crd()
    want = train(model, sum(split))
    ranks = run(split, crd_job)
    for _, state in ranks:
        for name, x in model.state_dict().items():
            assert torch.equal(state[name], ranks[0][1][name]), f"{name} differs between the ranks"
            torch.testing.assert_close(state[name], x, **EQUAL)
    for step, (loss, student_grad, *grads) in enumerate(want):
        steps = [seen[step] for seen, _ in ranks]
        torch.testing.assert_close(sum(s[0] for s in steps) / len(split), loss, **EQUAL)
        torch.testing.assert_close(torch.cat([s[1] for s in steps]) / len(split), student_grad, **EQUAL)
        for i, grad in enumerate(grads, 2):
            torch.testing.assert_close(sum(s[i] for s in steps) / len(split), grad, **EQUAL)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_the_queue_is_that_of_one_process(split, run):
    want, state = queue_job(0, (sum(split),), slice(None))
    ranks = run(split, queue_job)
    for _, got in ranks:
        for name, x in state.items():
            torch.testing.assert_close(got[name], x, **EQUAL)
    for step, (loss, grad) in enumerate(want):
        steps = [seen[step] for seen, _ in ranks]
        torch.testing.assert_close(sum(s[0] for s in steps) / len(split), loss, **EQUAL)
        torch.testing.assert_close(torch.cat([s[1] for s in steps]) / len(split), grad, **EQUAL)


def test_ddp_averages_to_one_process_and_sends_no_bank(run):
    model = make_crd()
    want = descend(model, 8)
    own = ["bank_student", "bank_teacher", "seed", "z_student", "z_teacher"]
    for state, ddp in run((3, 5), ddp_job):
        for name, x in want.items():
            torch.testing.assert_close(state[name], x, **EQUAL)
        assert ddp == [(own, 0), ([f"crd.{name}" for name in own], 3)]  # three of the batch norm


def test_a_loaded_state_reaches_every_rank(run):
    model = make_crd()
    train(model, 8)
    for state in run((4, 4), loaded_job):
        for name, x in model.state_dict().items():
            torch.testing.assert_close(state[name], x, **EQUAL)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_gathered_relations_are_those_of_one_process(split, run):
    student, teacher, *_ = next(batches(sum(split)))
    loss, grad = relations(student, teacher)
    ranks = run(split, relations_job)
    for got, _ in ranks:
        torch.testing.assert_close(got, loss, **EQUAL)
    torch.testing.assert_close(torch.cat([g for _, g in ranks]) / len(split), grad, **EQUAL)


def test_an_error_reaches_every_rank(run):
    ranks = run((2, 3), unequal_job)
    assert ranks[0] == ["rank 1 could not score its batch: its own error says why"]
    assert ranks[1] == [f"index[0] is {N_DATA}, expected a row from 0 to {N_DATA - 1}"]


def test_alone_nothing_is_gathered():
    x = torch.randn(3, 2)
    assert distributed.gather(x) is x and distributed.world_size() == 1
