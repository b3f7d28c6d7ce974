"""CRD, and what the contract of every op (test_ops_*.py) does not say of the ops that it is made of."""

import contextlib
import copy
import math

import behaviour
import oracles
import pytest
import registry
import torch
from behaviour import FLOATS, HALVES, check_oracle
from copies import saved
from official import Official, every_file
from registry.nce import crd as small_crd

import kdfast
from kdfast import ops
from kdfast.ops.nce import philox

raw = torch.ops.kdfast

GROUP = registry.family("nce").GROUPS[0]
NCE, CASES, SMALL = GROUP["nce"], GROUP.cases, GROUP.small


def make(implementation, shape, dtype=torch.float64, bank_dtype=None):
    bank_dtype = bank_dtype or dtype
    return GROUP.inputs(implementation, shape, dtype, dtype, bank_dtype, bank_dtype)


def anchors(data):
    return [data.student, data.teacher]


def fixed(data):
    """Banks, index, constants."""
    return list(data.values())[2:]


def unset(data):
    """All inputs, with constants that are not set."""
    return [*list(data.values())[:5], -data.z_student, -data.z_teacher]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bank_dtype", FLOATS, ids=str)
def test_low_precision(implementation, dtype, bank_dtype):
    """float32 accumulation and result, gradients in the anchors' dtype; exact in the rounded inputs."""
    check_oracle(NCE, make(implementation, GROUP.half, dtype, bank_dtype))


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("bank_dtype", HALVES, ids=str)
def test_low_precision_banks(implementation, shape, bank_dtype):
    check_oracle(NCE, make(implementation, shape, torch.float32, bank_dtype))


def test_no_gradient_to_banks(implementation):
    data = make(implementation, SMALL)
    for name in ("bank_student", "bank_teacher", "z_student", "z_teacher", "student"):
        data[name].requires_grad_()
    wanted = [x for x in fixed(data) if x.requires_grad]
    assert torch.autograd.grad(NCE(ops, data), wanted, allow_unused=True) == (None,) * 4


@pytest.mark.parametrize("shape", CASES, ids=str)
def test_scores(implementation, shape):
    """Of both directions where they are asked for; without a gradient, and with the same loss."""
    data = make(implementation, shape)
    student, teacher = behaviour.leaves_of(anchors(data))
    loss, scores = ops.nce(student, teacher, *fixed(data), 0.1, return_scores=True)
    want = [
        torch.einsum("bd,bkd->bk", x, bank[data.contrast_index]) / 0.1
        for x, bank in ((data.student, data.bank_teacher), (data.teacher, data.bank_student))
    ]
    torch.testing.assert_close(scores, torch.stack(want), rtol=1e-12, atol=1e-12)
    assert not scores.requires_grad and torch.equal(loss, ops.nce(student, teacher, *fixed(data), 0.1))


# ---- edges -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [0.01, 0.07, 10.0])
@pytest.mark.parametrize("length", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_edges_large_scores(implementation, temperature, length, dtype):
    """Finite where exp(s) has long overflowed: small temperatures, and rows that are not unit rows."""
    data = make(implementation, (3, 17, 24, 9), dtype)
    data.bank_student *= length
    student, teacher = behaviour.leaves_of(anchors(data))
    loss, scores = ops.nce(student, teacher, *fixed(data), temperature, return_scores=True)
    grads = torch.autograd.grad(loss, (student, teacher))
    log_c = math.log(17 / 9 + 1e-7)
    want, slopes = 0.0, []
    for s, z in zip(scores.double(), (data.z_student, data.z_teacher), strict=True):
        v = s - z.log() - log_c
        v[:, 0] *= -1
        want = want + (torch.nn.functional.softplus(v, threshold=700).sum(1)).mean() + 17 * math.log1p(1e-7 * 9 / 17)
        slope = v.sigmoid()
        slope[:, 0] *= -1
        slopes.append(slope)
    rtol = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(loss.double(), want, rtol=rtol, atol=0)
    for grad, slope, bank in zip(grads, slopes, (data.bank_teacher, data.bank_student), strict=True):
        exact = torch.einsum("bk,bkd->bd", slope, bank.double()[data.contrast_index]) / temperature / 3
        assert (grad.double() - exact).abs().max() <= rtol * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_edges_empty_batch(implementation, dtype):
    """0 with a graph: no rank of a distributed run is left without a backward."""
    data = make(implementation, (0, 5, 9, 7), dtype)
    student, teacher = behaviour.leaves_of(anchors(data))
    loss, scores = ops.nce(student, teacher, *fixed(data), return_scores=True)
    loss.backward()
    assert loss == 0 and student.grad.shape == (0, 9) and scores.shape == (2, 0, 6)
    sums = raw.nce_log_sums(*unset(data), 0.07)
    assert (sums == -math.inf).all()
    bank = data.bank_student.clone()
    ops.update_bank(bank, data.student, data.contrast_index[:, 0])
    assert torch.equal(bank, data.bank_student)
    assert ops.draw_negatives(data.contrast_index[:, 0], 4, 7, 0).shape == (0, 5)


@pytest.mark.parametrize("wrong", [-1, 7, 2**62])
def test_index_outside_the_bank(implementation, wrong):
    """An error that names it; device code cannot raise, reads nothing there, and gives NaN or leaves the row out."""
    data = make(implementation, SMALL)
    data.contrast_index[1, 2] = wrong
    index = data.contrast_index[:, 2].contiguous()
    bank = data.bank_student.clone()
    if implementation.raises_on_labels:
        text = rf"contrast_index\[1, 2\] is {wrong}, expected a row from 0 to 6"
        with pytest.raises(IndexError, match=text):
            ops.nce(*data.values())
        with pytest.raises(IndexError, match=text):
            raw.nce_log_sums(*unset(data), 0.07)
        for call in (
            lambda: ops.update_bank(bank, data.student, index),
            lambda: ops.draw_negatives(index, 3, 7, 0),
        ):
            with pytest.raises(IndexError, match=rf"^index\[1\] is {wrong}, expected a row from 0 to 6"):
                call()
        assert torch.equal(bank, data.bank_student)
        return
    student, teacher = behaviour.leaves_of(anchors(data))
    loss = ops.nce(student, teacher, *fixed(data))
    loss.backward()
    assert loss.isnan() and student.grad[1].isnan().all() and student.grad[[0, 2]].isfinite().all()
    assert raw.nce_log_sums(*unset(data), 0.07).isnan().all()
    ops.update_bank(bank, data.student, index)
    kept = data.bank_student.clone()
    want = oracles.update_bank(kept, data.student[[0, 2]], index[[0, 2]])
    torch.testing.assert_close(bank, want)
    drawn = ops.draw_negatives(index, 3, 7, 0, labels=torch.arange(7, device=index.device))
    assert torch.equal(drawn[:, 0], index) and ((drawn[:, 1:] >= 0) & (drawn[:, 1:] < 7)).all()


def test_large_index(implementation):
    """Rows beyond 2^31 elements of a bank."""
    dim, rows = 2**20, 2**11 + 8
    data = make(implementation, (2, 2, dim, 4), torch.float32, torch.bfloat16)
    data.contrast_index = torch.tensor([[0, 1, 2], [3, 2, 0]], device=implementation.device)
    far = torch.tensor([0, 1, rows - 2, rows - 1], device=implementation.device)
    near = oracles.nce(*anchors(data), data.bank_student, data.bank_student, *fixed(data)[2:])
    with behaviour.sparse_memory(rows * dim, implementation.device) as memory:
        bank = memory.view(rows, dim)
        bank[far] = data.bank_student
        index = far[data.contrast_index]
        # Z and c as they are with four rows.
        c, c_far = 2 / 4 + 1e-7, 2 / rows + 1e-7
        z = [x * c / c_far for x in fixed(data)[3:]]
        got = ops.nce(*anchors(data), bank, bank, index, *z)
        shift = 2 * 2 * (math.log1p(1e-7 / (2 / rows)) - math.log1p(1e-7 / (2 / 4)))
        torch.testing.assert_close(got.double(), near + shift, rtol=1e-5, atol=0)
        ops.update_bank(bank, data.student, index[:, 0].contiguous())
        moved = oracles.update_bank(data.bank_student.float(), data.student, data.contrast_index[:, 0])
        torch.testing.assert_close(bank[far].double(), moved, rtol=1e-2, atol=1e-5)


# ---- sums of exponentials --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_log_sums(implementation, shape, dtype):
    data = make(implementation, shape, dtype)
    for temperature in (0.01, 0.5):
        got = raw.nce_log_sums(*unset(data), temperature)
        count, rows = data.contrast_index.numel(), len(data.bank_student)
        want = [
            (oracles.nce_constant(*pair, data.contrast_index, temperature) / rows * count).log()
            for pair in ((data.student, data.bank_teacher), (data.teacher, data.bank_student))
        ]
        atol = 1e-11 if dtype == torch.float64 else 1e-6 / temperature
        torch.testing.assert_close(got, torch.stack(want), rtol=0, atol=atol)


def test_log_sums_of_known_constants(implementation):
    """A direction whose Z is set costs nothing: its banks are not read."""
    data = make(implementation, SMALL)
    both = raw.nce_log_sums(*unset(data), 0.07)
    for side, name in enumerate(("z_student", "z_teacher")):
        inputs = dict(zip(data, unset(data), strict=True))
        inputs[name] = data.z_student
        inputs[("bank_teacher", "bank_student")[side]] = torch.full_like(data.bank_student, math.nan)
        got = raw.nce_log_sums(*inputs.values(), 0.07)
        assert got[side] == 0 and got[1 - side] == both[1 - side]


# ---- the update of a bank --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dim", [1, 9, 260, 1030])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_update_bank(implementation, dim, dtype, momentum):
    """Equal indices: the last row of the batch counts, and every row starts from the old bank."""
    bank = torch.randn(9, dim).to(dtype).to(implementation.device)
    rows = torch.randn(6, dim).to(implementation.device)
    index = torch.tensor([3, 8, 3, 0, 8, 3], device=implementation.device)
    want = oracles.update_bank(bank, rows, index, momentum)
    ops.update_bank(bank, rows, index, momentum)
    atol = 2 * torch.finfo(dtype).eps if dtype in HALVES else 1e-6
    torch.testing.assert_close(bank.double(), want, rtol=0, atol=atol)


def test_update_bank_without_direction(implementation):
    """A new row of length 0, or that is not finite, leaves the old one, so that no NaN stays for ever."""
    bank = torch.randn(4, 5, device=implementation.device)
    old, rows = bank.clone(), torch.randn(4, 5, device=implementation.device)
    rows[0], rows[1, 2], rows[2, 1] = -old[0], math.nan, math.inf
    ops.update_bank(bank, rows, torch.arange(4, device=implementation.device))
    assert torch.equal(bank[:3], old[:3]) and not torch.equal(bank[3], old[3])


# ---- drawing ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox(key, counter, words):
    """The known answers of its authors' library Random123."""
    column, attempt, low, high = counter
    row = torch.tensor([high << 32 | low if high < 2**31 else (high << 32 | low) - 2**64])
    got = philox(torch.tensor(key), row, torch.tensor([column]), attempt)
    assert [int(word) for word in got] == list(words)


SOURCES = ["uniform", "labels", "table", "labels_table"]


def source(kind, rows, device):
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64) ** 4
    weights[::7] = 0
    return {
        "labels": (torch.arange(rows) % 3).to(device) if "labels" in kind else None,
        "table": ops.alias_table(weights).to(device) if "table" in kind else None,
    }


@pytest.mark.parametrize("kind", SOURCES)
def test_draws_are_the_same_everywhere(implementation, kind):
    """Bit for bit those of plain PyTorch, for any seed; a row's draws do not depend on its place in the batch."""
    index = torch.tensor([5, 0, 36, 5], device=implementation.device)
    options = source(kind, 37, implementation.device)
    for seed in (0, 1, -3, 2**62 + 5):
        got = ops.draw_negatives(index, 70, 37, seed, **options)
        with kdfast.fallback():
            assert torch.equal(got, ops.draw_negatives(index, 70, 37, torch.tensor(seed).to(index), **options))
        assert torch.equal(got[:, 0], index) and got.shape == (4, 71)
        assert got.min() >= 0 and got.max() < 37
        assert torch.equal(got[0], got[3])
        for place in range(3):
            alone = ops.draw_negatives(index[place : place + 1], 40, 37, seed, **options)
            assert torch.equal(alone[0], got[place, :41])
        if options["labels"] is not None:
            assert (options["labels"][got[:, 1:]] != options["labels"][index][:, None]).all()


@pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
@pytest.mark.parametrize("kind", SOURCES)
def test_draws_have_the_distribution(implementation, kind):
    """Shares of a million draws within five standard deviations, rows of weight 0 never."""
    rows, draws = 37, 2**20
    options = source(kind, rows, implementation.device)
    index = torch.tensor([4], device=implementation.device)
    counts = ops.draw_negatives(index, draws, rows, 11, **options)[0, 1:].bincount(minlength=rows).double().cpu()
    share = torch.ones(rows, dtype=torch.float64)
    if options["table"] is not None:
        generator = torch.Generator().manual_seed(1)
        share = torch.rand(rows, generator=generator, dtype=torch.float64) ** 4
        share[::7] = 0
    if options["labels"] is not None:
        share[torch.arange(rows) % 3 == 4 % 3] = 0
    share /= share.sum()
    assert ((counts - draws * share).abs() <= 5 * (draws * share * (1 - share)).sqrt()).all()


def test_draws_differ_between_seeds_and_rows(implementation):
    index = torch.arange(4, device=implementation.device)
    first, second = (ops.draw_negatives(index, 64, 1000, seed) for seed in (1, 2))
    rows = torch.cat([first[:, 1:], second[:, 1:]])
    assert len({tuple(row) for row in rows.tolist()}) == 8


@pytest.mark.parametrize("implementation", ["fallback", "cpu", "simt"], indirect=True)
def test_draws_beside_a_class_that_is_nearly_everything(implementation):
    """One row of 5000 is left to draw: after 256 draws the rows that follow are searched."""
    labels = torch.zeros(5000, dtype=torch.int64)
    labels[77] = 1
    drawn = ops.draw_negatives(torch.tensor([3, 4999]), 3, 5000, 0, labels=labels)
    assert (drawn[:, 1:] == 77).all()
    if implementation.name == "simt":
        assert (ops.draw_negatives(torch.tensor([3]), 1, 5, 0, labels=torch.zeros(5, dtype=int))[:, 1:] == -1).all()
        return
    with pytest.raises(ValueError, match="labels has one class only, that of row 3"):
        ops.draw_negatives(torch.tensor([3]), 2, 5, 0, labels=torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize("rows", [1, 2, 7, 33, 1000])
@pytest.mark.parametrize("kind", ["equal", "random", "zeros", "one", "steep"])
def test_alias_table(rows, kind):
    """What the table draws is the weights' share, exactly to 2^-32 of a row's even share."""
    weights = {
        "equal": torch.full((rows,), 3.0),
        "random": torch.rand(rows),
        "zeros": torch.rand(rows) * (torch.arange(rows) % 2 == (rows - 1) % 2),
        "one": torch.eye(rows)[rows // 2],
        "steep": 2.0 ** -torch.arange(rows).clamp(max=100),
    }[kind].double()
    table = ops.alias_table(weights)
    threshold, alias = table.unbind(1)
    assert threshold.min() >= 0 and threshold.max() <= 2**32 and alias.min() >= 0 and alias.max() < rows
    units = threshold.clone().index_add_(0, alias, 2**32 - threshold)  # whole numbers, so the order does not matter
    assert int(units.sum()) == rows * 2**32
    want = weights / weights.sum() * rows * 2**32
    assert ((units.double() - want).abs() <= 1.5 + 1e-6 * rows).all()
    assert not units[weights == 0].any()


def test_alias_table_is_vectorised():
    """A million rows in well under the time of a loop over them; the even table is the identity."""
    weights = torch.ones(2**20)
    table = ops.alias_table(weights)
    assert (table[:, 0] == 2**32).all() and torch.equal(table[:, 1], torch.arange(2**20))


# ---- behaviour in PyTorch --------------------------------------------------------------------------------------------
def test_crd_of_several_ranks_is_no_graph(monkeypatch):
    """A graph would leave the other ranks' rows out of the banks and say nothing."""
    monkeypatch.setattr(kdfast.distributed, "world_size", lambda: 2)
    crd = kdfast.CRD(8, 8, 50, feature_dim=4, negatives=6)
    compiled = torch.compile(crd, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Observed exception|CRD exchanges rows"):
        compiled(torch.randn(4, 8), torch.randn(4, 8), torch.arange(4))


@pytest.mark.parametrize("shape", GROUP.deterministic, ids=str)
def test_deterministic(implementation, shape, same_bits):
    """What the contract does not run of the op itself, and the other ops: equal bits, whatever runs them."""
    if implementation.name == "simt" and shape[1] > 100:
        shape = (2, 600, 70, 90)
    data = make(implementation, shape, torch.float32)

    def run():
        _, scores = ops.nce(*anchors(data), *fixed(data), return_scores=True)
        sums = raw.nce_log_sums(*unset(data), 0.07)
        bank, index = data.bank_student.clone(), data.contrast_index[:, 0].contiguous() % 3
        ops.update_bank(bank, data.student, index)
        return [scores, sums, bank, ops.draw_negatives(index, 50, shape[3], 1)]

    assert same_bits(run)


# ---- CRD -------------------------------------------------------------------------------------------------------------
def assert_official(x, got, want, gradient=False):
    x.assert_close("number", got, want, x.of_type(1e-8 if gradient else 1e-9, 2e-5))


@every_file("crd_full")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matches_official_code(implementation, path, dtype):
    """RepDistiller's CRDLoss: loss, gradients, banks and Z of a first step, from a checkpoint of its own."""
    x = Official(path, dtype, implementation.device)
    p, student, teacher = x.parameters, x("f_s"), x("f_t")
    sizes = student.shape[1], teacher.shape[1], p["n_data"], p["feat_dim"], p["K"], p["T"], p["momentum"]
    crd = kdfast.CRD(*sizes, bank_dtype=dtype).to(implementation.device, dtype)
    linears = {f"{part[0]}_{side}": f"embed_{side}.linear.{part}" for side in "st" for part in ("weight", "bias")}
    checkpoint = {name: x(key).detach() for key, name in linears.items()}
    checkpoint |= {f"contrast.memory_v{i}": x(f"memory_v{i}") for i in (1, 2)}
    checkpoint["contrast.params"] = torch.tensor([p["K"], p["T"], -1.0, -1.0, p["momentum"]])
    kdfast.load_repdistiller_crd(crd, checkpoint)
    loss = crd(student, teacher, x("idx"), x("contrast_idx"))
    assert loss.shape == () and loss.dtype == dtype
    assert_official(x, loss, "loss")
    leaves = {"f_s": student, "f_t": teacher, **dict(zip(linears, crd.parameters(), strict=True))}
    for name, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        assert_official(x, grad, f"grad_{name}", gradient=True)
    assert_official(x, crd.bank_student, "state_after_memory_v1")
    assert_official(x, crd.bank_teacher, "state_after_memory_v2")
    assert_official(x, torch.stack([crd.z_student, crd.z_teacher]), "state_after_Z")


@every_file("crd_memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matches_official_memory(implementation, path, dtype):
    """RepDistiller's ContrastMemory on anchors that are not unit rows: two steps with the ops alone."""
    x = Official(path, dtype, implementation.device)
    p, student, teacher = x.parameters, x("f_s"), x("f_t")
    banks, pairs = [x("memory_v1"), x("memory_v2")], x("contrast_idx")
    none = torch.tensor(-1.0, device=implementation.device)
    with torch.no_grad():
        sums = raw.nce_log_sums(student, teacher, *banks, pairs, none, none, p["T"])
    z = (sums - math.log(pairs.numel())).exp() * p["n_data"]
    assert_official(x, z, "state_after_Z")
    loss = ops.nce(student, teacher, *banks, pairs, *z, p["T"])
    assert_official(x, loss, "loss")
    for name, grad in x.gradients(loss).items():
        assert_official(x, grad, f"grad_{name}", gradient=True)
    for step in ("", "step2_"):
        for bank, rows, name in zip(banks, (student, teacher), ("memory_v1", "memory_v2"), strict=True):
            ops.update_bank(bank, rows, x("idx"), p["momentum"])
            assert_official(x, bank, f"state_after_{step}{name}")
        if not step:
            second = ops.nce(student, teacher, *banks, pairs, *z, p["T"])
            assert_official(x, second.view(1), x["out_step2_loss_s"] + x["out_step2_loss_t"])


def example(implementation, rows=6, dtype=torch.float32, **options):
    """A CRD, and a batch for it with a repeated sample."""
    crd = kdfast.CRD(12, 7, 30, feature_dim=10, negatives=9, **options).to(implementation.device)
    batch = [torch.randn(rows, dim, dtype=dtype, device=implementation.device) for dim in (12, 7)]
    return crd, *batch, torch.arange(rows, device=implementation.device).remainder(5) * 6


def test_crd_matches_oracle(implementation):
    """Three steps in float64 with its own draws: loss, gradients, banks, Z, which stays that of the first step."""
    crd, *_ = example(implementation, bank_dtype=torch.float64)
    crd = crd.double()
    banks, z = [crd.bank_student.clone(), crd.bank_teacher.clone()], None
    for _ in range(3):
        _, student, teacher, index = example(implementation, dtype=torch.float64)
        leaves = behaviour.leaves_of((student, teacher))
        pairs = ops.draw_negatives(index, 9, 30, crd.seed)
        exact = behaviour.leaves_of((student, teacher))
        unit = []
        for x, linear in zip(exact, (crd.embed_student, crd.embed_teacher), strict=True):
            v = x @ linear.weight.detach().t() + linear.bias.detach()
            unit.append(v / v.norm(dim=1, keepdim=True))
        if z is None:
            z = [oracles.nce_constant(unit[i].detach(), banks[1 - i], pairs) for i in range(2)]
        want = oracles.nce(*unit, *banks, pairs, *z)
        banks = [oracles.update_bank(bank, v.detach(), index) for bank, v in zip(banks, unit, strict=True)]
        loss = crd(*leaves, index)
        torch.testing.assert_close(loss, want, rtol=1e-11, atol=0)
        for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, exact), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        for got, bank in zip((crd.bank_student, crd.bank_teacher), banks, strict=True):
            torch.testing.assert_close(got, bank, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(torch.stack([crd.z_student, crd.z_teacher]), torch.stack(z), rtol=1e-11, atol=0)


def test_crd_first_banks():
    """Independent uniform rows of length about 1; both Z unset."""
    crd = kdfast.CRD(3, 3, 2000, feature_dim=48)
    for bank in (crd.bank_student, crd.bank_teacher):
        assert bank.shape == (2000, 48) and bank.abs().max() <= 0.25 and not bank.requires_grad
        assert abs(bank.norm(dim=1).mean().item() - 1) < 0.02 and abs(bank.mean().item()) < 0.01
    assert not torch.equal(crd.bank_student, crd.bank_teacher)
    assert crd.z_student < 0 and crd.z_teacher < 0 and crd.z_student.shape == ()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bank_dtype", FLOATS, ids=str)
def test_crd_dtypes(implementation, dtype, bank_dtype):
    """float32 results but where something is float64; gradients in the inputs' dtype."""
    crd, student, teacher, index = example(implementation, dtype=dtype, bank_dtype=bank_dtype)
    leaves = behaviour.leaves_of((student, teacher))
    loss = crd(*leaves, index)
    loss.backward()
    assert loss.dtype == (torch.float64 if torch.float64 in (dtype, bank_dtype) else torch.float32)
    assert all(x.grad.dtype == dtype and x.grad.isfinite().all() and x.grad.any() for x in leaves)
    assert crd.bank_student.dtype == bank_dtype and crd.bank_student.isfinite().all()


def test_crd_keeps_z_in_float64(implementation):
    """exp(1 / 0.01) n_data is more than a float32 holds; another dtype of the module does not change it."""
    crd, student, teacher, index = example(implementation, temperature=0.01)
    with torch.no_grad():
        crd.embed_teacher.weight.copy_(torch.randn(10, 7))
        for name, linear, x in (("student", crd.embed_student, student), ("teacher", crd.embed_teacher, teacher)):
            v = linear(x)
            # The other side's banks hold the anchors themselves: scores of 100.
            bank = crd.bank_teacher if name == "student" else crd.bank_student
            bank[: len(v)] = v / v.norm(dim=1, keepdim=True)
    pairs = torch.arange(6, device=index.device).expand(6, 6).contiguous()
    loss = crd(student, teacher, index, pairs)
    assert loss.isfinite() and crd.z_student > 1e40
    z = crd.z_student.clone()
    for change in (lambda m: m.half(), lambda m: m.float(), lambda m: m.to(implementation.device)):
        change(crd)
        assert crd.z_student.dtype == torch.float64 and torch.equal(crd.z_student, z)


def test_crd_maps_and_eval(implementation):
    """More dimensions are flattened; eval mode and no_grad score and move the banks, too."""
    crd, student, teacher, index = example(implementation)
    other = copy.deepcopy(crd).eval()
    loss = crd(student, teacher, index)
    with torch.no_grad():
        assert torch.equal(other(student.view(6, 3, 2, 2), teacher[:, None], index), loss)
    for name in crd.state_dict():
        assert torch.equal(crd.state_dict()[name], other.state_dict()[name])
    assert not torch.equal(crd(student, teacher, index), loss)


def test_crd_labels(implementation):
    """With labels no negative has the positive's class, and the state does not grow by them."""
    labels = torch.arange(30) % 3
    crd, student, teacher, index = example(implementation, labels=labels)
    seen = []
    with torch.no_grad():
        for _ in range(3):
            seed = crd.seed.clone()
            crd(student, teacher, index)
            seen.append(ops.draw_negatives(index, 9, 30, seed, crd.labels))
    assert "labels" not in crd.state_dict() and not torch.equal(seen[0], seen[1])
    assert (crd.labels[torch.stack(seen)[..., 1:]] != crd.labels[index][:, None]).all()


def test_crd_errors_change_nothing(implementation):
    """A batch that is refused leaves banks, Z and seed as they were."""
    if not implementation.raises_on_labels:
        pytest.skip("device code cannot raise")
    crd, student, teacher, index = example(implementation)
    pairs = ops.draw_negatives(index, 4, 30, 0)
    for _ in range(2):  # with Z unset, and set
        before = copy.deepcopy(crd.state_dict())
        wrong_index, wrong_pairs = index.clone(), pairs.clone()
        wrong_index[-1], wrong_pairs[-1, -1] = 30, -5
        for arguments in ((wrong_index,), (wrong_index, pairs), (index, wrong_pairs)):
            with pytest.raises(IndexError):
                crd(student, teacher, *arguments)
        assert all(torch.equal(x, before[name]) for name, x in crd.state_dict().items())
        crd(student, teacher, index)


def test_crd_zero_embedding(implementation):
    """A row that is embedded as zero has no direction: finite numbers (official: NaN in the banks for ever)."""
    crd, student, teacher, index = example(implementation)
    with torch.no_grad():
        crd.embed_student.weight.zero_()
        crd.embed_student.bias.zero_()
    leaves = behaviour.leaves_of((student, teacher))
    crd(*leaves, index).backward()
    assert all(x.grad.isfinite().all() for x in (*leaves, *crd.parameters()))
    assert crd.bank_student.isfinite().all()


def results_of_step(crd, batch, index):
    """Loss, gradients and state of a step of a copy."""
    crd, leaves = copy.deepcopy(crd), behaviour.leaves_of(batch)
    loss = crd(*leaves, index)
    loss.backward()
    return [loss, *(x.grad for x in (*leaves, *crd.parameters())), *crd.buffers()]


def test_crd_deterministic(implementation, same_bits):
    crd, *_ = example(implementation)
    batch = [torch.randn(64, dim, device=implementation.device) for dim in (12, 7)]
    index = torch.randint(30, (64,), device=implementation.device)
    assert same_bits(lambda: results_of_step(crd, batch, index))


@pytest.mark.parametrize("implementation", ["fallback", "cpu"], indirect=True)
def test_crd_deterministic_at_usual_sizes(implementation, same_bits):
    """The embeddings of a batch of ImageNet's size, which torch multiplies with several threads."""
    crd = kdfast.CRD(512, 2048, 500, negatives=50)
    batch, index = [torch.randn(256, dim) for dim in (512, 2048)], torch.randint(500, (256,))
    assert same_bits(lambda: results_of_step(crd, batch, index))


@pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
def test_crd_deterministic_algorithms_are_enough(implementation, deterministic_algorithms):
    crd, student, teacher, index = example(implementation)
    leaves = behaviour.leaves_of((student, teacher))
    crd(*leaves, index).backward()
    assert all(x.grad.isfinite().all() for x in leaves)


def test_crd_settings_change_nothing(implementation):
    """Neither autocast nor the precision that torch allows to products of float32, which moves those of this size."""
    crd = kdfast.CRD(256, 192, 20, feature_dim=64, negatives=3).to(implementation.device)
    student, teacher = (torch.randn(64, d, device=implementation.device) for d in (256, 192))
    index = torch.arange(64, device=implementation.device) % 20

    want, precision = results_of_step(crd, (student, teacher), index), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(implementation.device.type, dtype=torch.bfloat16):
            got = results_of_step(crd, (student, teacher), index)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@behaviour.every_compiled
def test_crd_compile(implementation):
    """One graph, state included: three steps as they are without compiling, of the fallback, too."""
    behaviour.compiles(implementation)
    crd, student, teacher, index = example(implementation)
    torch.compiler.reset()
    graph = copy.deepcopy(crd)
    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    start = copy.deepcopy(crd.state_dict())
    for path in (contextlib.nullcontext(), kdfast.fallback()):
        for module in (crd, graph):
            module.load_state_dict(start)
        with path:
            for _ in range(3):
                ours, theirs = behaviour.leaves_of((student, teacher)), behaviour.leaves_of((student, teacher))
                loss, want = compiled(*ours, index), crd(*theirs, index)
                torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
                for a, b in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(want, theirs), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
                for a, b in zip(graph.buffers(), crd.buffers(), strict=True):
                    torch.testing.assert_close(a, b)


# ---- state -----------------------------------------------------------------------------------------------------------
def test_state_names():
    names = ["bank_student", "bank_teacher", "z_student", "z_teacher", "seed"]
    names += [f"embed_{side}.{part}" for side in ("student", "teacher") for part in ("weight", "bias")]
    assert sorted(small_crd().state_dict()) == sorted(names)


def test_resume_is_exact(implementation):
    """Saved in the middle of training and loaded into new modules: the same bits as if nothing had happened."""
    crd, student, teacher, index = example(implementation)

    def optimizer_of(crd):
        return torch.optim.SGD(crd.parameters(), lr=0.1, momentum=0.9)

    def train(crd, optimizer):
        loss = crd(student, teacher, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    optimizer = optimizer_of(crd)
    train(crd, optimizer)
    resumed, *_ = example(implementation)
    optimizers = optimizer, optimizer_of(resumed)
    for loaded, state in zip((resumed, optimizers[1]), saved((crd.state_dict(), optimizer.state_dict())), strict=True):
        loaded.load_state_dict(state)
    for _ in range(2):
        losses = [train(*each) for each in zip((crd, resumed), optimizers, strict=True)]
        assert torch.equal(*losses)
    for name, x in crd.state_dict().items():
        assert torch.equal(x, resumed.state_dict()[name])


def test_checkpoint_of_another_size_is_refused():
    """With the numbers named, and before anything is changed, embeddings included."""
    crd, other = small_crd(), kdfast.CRD(6, 4, 12, feature_dim=8)
    before = copy.deepcopy(crd.state_dict())
    with pytest.raises(RuntimeError, match="n_data x feature_dim = 12 x 8, this CRD has 10 x 8"):
        crd.load_state_dict(other.state_dict())
    assert all(torch.equal(x, before[name]) for name, x in crd.state_dict().items())


def test_load_repdistiller():
    crd = small_crd()
    checkpoint = {
        "embed_s.linear.weight": torch.randn(8, 6),
        "embed_s.linear.bias": torch.randn(8),
        "embed_t.linear.weight": torch.randn(8, 4),
        "embed_t.linear.bias": torch.randn(8),
        "contrast.memory_v1": torch.randn(10, 8),
        "contrast.memory_v2": torch.randn(10, 8),
        "contrast.params": torch.tensor([16384, 0.07, 2.5, 3.5, 0.5]),
    }
    kdfast.load_repdistiller_crd(crd, checkpoint)
    assert torch.equal(crd.embed_student.weight, checkpoint["embed_s.linear.weight"])
    assert torch.equal(crd.embed_teacher.bias, checkpoint["embed_t.linear.bias"])
    assert torch.equal(crd.bank_student, checkpoint["contrast.memory_v1"])
    assert torch.equal(crd.bank_teacher, checkpoint["contrast.memory_v2"])
    assert crd.z_student == 2.5 and crd.z_teacher == 3.5 and crd.negatives == 3
    before = copy.deepcopy(crd.state_dict())
    with pytest.raises(KeyError, match="state_dict has no contrast.params"):
        kdfast.load_repdistiller_crd(crd, {k: v + 1 for k, v in checkpoint.items() if k != "contrast.params"})
    with pytest.raises(ValueError, match=r"contrast.memory_v2 must have shape \(10, 8\) like the module, got \(9, 8\)"):
        kdfast.load_repdistiller_crd(crd, checkpoint | {"contrast.memory_v2": torch.randn(9, 8)})
    assert all(torch.equal(x, before[name]) for name, x in crd.state_dict().items())


# ---- CUDA only -------------------------------------------------------------------------------------------------------
def test_crd_no_host_sync(cuda):
    """In no step, not in the first either, which sets Z."""
    crd, student, teacher, index = example(cuda)
    warm, *_ = example(cuda)
    warm(*behaviour.leaves_of((student, teacher)), index).backward()  # loads modules, which may wait
    leaves = behaviour.leaves_of((student, teacher))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            crd(*leaves, index).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert crd.z_student > 0


def test_crd_cuda_graph(cuda):
    """A captured step draws other negatives, and moves the banks, in each replay."""
    crd, student, teacher, index = example(cuda)
    other = copy.deepcopy(crd)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        crd(student, teacher, index)
    torch.cuda.current_stream().wait_stream(stream)
    other(student, teacher, index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = crd(student, teacher, index)
    for _ in range(3):
        graph.replay()
        assert torch.equal(loss, other(student, teacher, index))
    assert all(torch.equal(x, y) for x, y in zip(crd.buffers(), other.buffers(), strict=True))
