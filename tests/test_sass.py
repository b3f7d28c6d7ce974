"""The machine code of the CUDA kernels, executed: its numbers against float64, and what it does for them against
.ci/sass_counts.json, where nvcc is the one that the table was recorded with.

KDFAST_SASS_RECORD=1 records instead of comparing; what is worse is committed with its reason.
KDFAST_TEST_REQUIRE_SASS=1: nvcc and cuobjdump must be there, else the tests are skipped where they are not.
"""

import os

import oracles
import pytest
import registry
import sass_table
import simt_library
import torch
from behaviour import check_oracle
from conftest import assert_close
from registry.teachers import sizes_teachers_kl

from kdfast import _kernels, ops

if not (simt_library.ROOT / ".ci").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
import sass_benchmarks  # noqa: E402
import sass_library  # noqa: E402

RECORDING = os.environ.get("KDFAST_SASS_RECORD") == "1"
TABLE = sass_library.ROOT / ".ci/sass_counts.json"
OPS = {str(op): op for op in registry.every_op()}
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# Op, shape, dtype of the inputs. Rows of 1000 and 32768 and maps of 16x16 begin at multiples of 16 bytes.
ALL = [
    *(("softmax_kl.kl", (8, 1000), dtype) for dtype in (F32, BF16, F16, F64)),
    *(("softmax_kl.kl", (2, 32768), dtype) for dtype in (F32, BF16)),
    *(("softmax_kl.kl", (8, 1001), dtype) for dtype in (F32, BF16)),
    ("softmax_kl.kl", (2, 5003), F32),
    ("softmax_kl.kl_weighted", (8, 1000), F32),
    *(("softmax_kl.jsd", (8, 1000), dtype) for dtype in (F32, BF16)),
    ("softmax_kl.jsd", (2, 32768), BF16),
    *(("softmax_kl.ce", (8, 1000), dtype) for dtype in (F32, BF16)),
    *(("softmax_kl.ce_kl", (8, 1000), dtype) for dtype in (F32, BF16)),
    ("softmax_kl.ce_kl", (2, 32768), BF16),
    ("softmax_kl.ce_kl_soft", (8, 1000), F32),
    *(("softmax_kl.dkd", (8, 1000), dtype) for dtype in (F32, BF16)),
    ("softmax_kl.dkd", (2, 32768), F32),
    *(("softmax_kl.topk", (8, 1000), dtype) for dtype in (F32, BF16)),
    ("softmax_kl.topk", (2, 32768), F32),
    *(("divergence.skew", (8, 1000), dtype) for dtype in (F32, BF16)),
    ("divergence.skew", (2, 32768), F32),
    ("divergence.variation", (8, 1000), F32),
    ("divergence.alpha_beta", (8, 1000), F32),
    ("divergence.non_target", (8, 1000), F32),
    *(("divergence.standardized", (8, 1000), dtype) for dtype in (F32, BF16)),
    ("divergence.two_temperatures_jsd", (8, 1000), F32),
    *(("teachers.kl", (3, 8, 1000), dtype) for dtype in (F32, BF16)),
    ("teachers.cross_entropy", (3, 8, 1000), F32),
    ("teachers.reverse_kl", (3, 2, 32768), F32),
    *(("mixed_logits.one", (4, 8, 1000), dtype) for dtype in (F32, BF16)),
    ("mixed_logits.attention", (3, 8, 1000), F32),
    ("mixed_logits.constant", (3, 2, 32768), F32),
    *(("gram.rows", (96, 256), dtype) for dtype in (F32, BF16)),
    ("gram.rows_absolute", (96, 256), F32),
    ("gram.distribution", (96, 256), F32),
    ("gram.polynomial", (40, 128), F32),
    ("gram.absolute", (40, 128), F32),
    *(("gram.affinity", (2, 32, 8, 8), dtype) for dtype in (F32, BF16)),
    ("gram.affinity_positive", (2, 32, 8, 8), F32),
    ("gram.products", (2, 64, 256), F32),
    ("gram.products", (1, 40, 64), F64),
    *(("pairwise.rkd", (64, 256), dtype) for dtype in (F32, BF16)),
    ("pairwise.rkd_distance", (34, 64), F64),
    ("pairwise.rkd_angle", (40, 64), F32),
    ("pairwise.between", (64, 256), F32),
    *(("attention.power2", (2, 64, 16, 16), dtype) for dtype in (F32, BF16)),
    ("attention.power3", (2, 64, 16, 16), F32),
    *(("feature.squared", (2, 32, 16, 16), dtype) for dtype in (F32, BF16, F64)),
    ("feature.squared", (2, 32, 14, 15), F32),
    ("feature.channels", (2, 32, 16, 16), F32),
    *(("feature.boundary", (2, 32, 16, 16), dtype) for dtype in (F32, BF16)),
    *(("feature.partial", (2, 32, 16, 16), dtype) for dtype in (F32, BF16)),
    ("feature.normalized_2", (2, 32, 16, 16), F32),
    ("feature.pyramid", (2, 32, 16, 16), F32),
    *(("moments.moments", (4, 8, 32, 32), dtype) for dtype in (F32, BF16)),
    *(("moments.standardized", (4, 8, 32, 32), dtype) for dtype in (F32, BF16)),
    *(
        ("channel_kl.channel_kl_4", shape, dtype)
        for shape in ((2, 32, 16, 16), (1, 48, 17, 19))
        for dtype in (F32, BF16)
    ),
    *(("nce.nce", (4, 256, 128, 1000), dtype) for dtype in (F32, BF16)),
    ("nce.nce", (4, 100, 100, 500), F32),
]
POINTS = [point for point in ALL if point[0] in OPS]  # of the families that are tested


# Points whose kernels read each input once: they may touch 2 % more sectors than their arguments and results have.
ONCE = ("softmax_kl", "divergence", "teachers", "mixed_logits.constant", "feature", "moments")
TWICE = ("feature.normalized_2", "moments.standardized")  # for norms or moments, and for the difference


# ---- what no entry of the registry runs: results, and what they have to be
def random(*shape):
    return torch.randn(shape, dtype=F64).float()  # in float32 the processor's vectors would decide the last bit


def update_bank():
    bank, rows, index = random(50, 128), random(16, 128), torch.randperm(50)[:16]
    want = oracles.update_bank(bank, rows, index, 0.5)
    ops.update_bank(bank, rows, index, 0.5)
    torch.testing.assert_close(bank.double(), want, rtol=0, atol=1e-6)


def draw_negatives():
    index, labels, table = torch.arange(4), torch.arange(500) % 3, ops.alias_table(torch.rand(500))
    for options in ((None, None), (labels, table)):
        want = _kernels.OPS["draw_negatives"].fallback(index, 256, 500, torch.tensor(7), *options)
        assert torch.equal(ops.draw_negatives(index, 256, 500, 7, *options), want)


def log_sums():
    x = registry.family("nce").GROUPS[0].inputs("cpu", (4, 256, 128, 1000), F32)
    unset = [-x.z_student, -x.z_teacher]
    arguments = x.student, x.teacher, x.bank_student, x.bank_teacher, x.contrast_index, *unset, 0.1
    want = _kernels.OPS["nce_log_sums"].fallback(*(t.double() if i < 4 else t for i, t in enumerate(arguments)))
    torch.testing.assert_close(torch.ops.kdfast.nce_log_sums(*arguments), want, rtol=0, atol=1e-5)


def aekd():
    """The loss and its gradient with the weights as they came."""
    student, *teachers = random(4, 8, 1000)
    loss, weights = ops.aekd(student.requires_grad_(), teachers, 4.0)
    (grad,) = torch.autograd.grad(loss, student)
    exact, teachers = student.detach().double().requires_grad_(), [t.double() for t in teachers]
    want = oracles.teachers_kl(exact, teachers, None, 4.0, weight=weights.double())
    size, entries, _ = sizes_teachers_kl(exact.detach(), teachers, None, 4.0, weight=weights.double())
    assert_close(loss, want, size, 1000, F32)
    assert_close(grad, torch.autograd.grad(want, exact)[0], entries, 1000, F32)
    torch.testing.assert_close(weights.double(), oracles.aekd_weights(exact, teachers, 4.0), rtol=0, atol=1e-4)


def simplex_minimum():
    x = torch.randn(6, 8, dtype=F64)
    gram, zero = x @ x.t(), torch.zeros(6, dtype=F64)
    got = torch.ops.kdfast.simplex_minimum(gram, zero, 0.4)
    torch.testing.assert_close(got, _kernels.OPS["simplex_minimum"].fallback(gram, zero, 0.4), rtol=0, atol=1e-12)


OTHERS = {
    "nce.update_bank": update_bank,
    "nce.draw_negatives": draw_negatives,
    "nce.log_sums": log_sums,
    "teachers.aekd": aekd,
    "teachers.simplex_minimum": simplex_minimum,
}


def name_of(point):
    op, shape, dtype = point
    return f"{op} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"


@pytest.fixture(scope="module")
def folder(request):
    try:
        if not hasattr(request.config, "cache"):
            raise simt_library.Unavailable("libraries are kept in pytest's cache, which is off")
        sass_library.tools()
        simt_library.compiler()
    except simt_library.Unavailable as reason:
        if os.environ.get("KDFAST_TEST_REQUIRE_SASS") == "1":
            pytest.fail(f"{reason} (KDFAST_TEST_REQUIRE_SASS=1)")
        pytest.skip(str(reason))
    return request.config.cache.mkdir("simt")  # where KDFAST_SIMT=sass has them, too


@pytest.fixture(scope="module")
def hold(folder, one_thread):
    """A function that holds what was found at a point against the table, or records it."""
    table, version, recorded = sass_table.load(TABLE), sass_library.tools()[2], {}

    def check(name, found):
        if RECORDING:
            recorded[name] = found
        elif table["nvcc"] == version:
            assert name in table["points"], f"{TABLE.name} has no such point; record it"
            worse, other = sass_table.compare(found, table["points"][name])
            assert not worse, f"worse than {TABLE.name} says; if it has to be so, record it:\n" + "\n".join(worse)
            assert not other, f"{TABLE.name} is out of date; record it:\n" + "\n".join(other)

    yield check
    if RECORDING:
        names = {*map(name_of, ALL), *OTHERS}
        with simt_library.locked(folder):  # each process of pytest-xdist adds the points that it ran
            points = {**sass_table.load(TABLE)["points"], **recorded}
            sass_table.save(TABLE, version, {name: found for name, found in points.items() if name in names})


# ---- the emulator
@pytest.fixture(scope="module")
def planted(folder):
    """A function that runs a kernel of faults.cu -> its result, its counts."""
    with simt_library.locked(folder):
        compiled = sass_library.compiled(folder, sass_library.ROOT / "tests/sass/faults.cu")
    emulator = sass_library.Emulator(folder, "faults", [compiled])
    x = torch.arange(1024).roll(-1).int().view(F32)  # as numbers: where the next one is

    def run(name, k, x=x):
        y, counts = emulator.counted(torch.ops.kdfast_sass_faults.run, x, name, k)
        (kernel,) = counts["kernels"].values()
        return y, kernel

    return run


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("misaligned", "thread 0 reads 16 bytes of global memory at 0x.*, which is misaligned\n  at 0x.*: .*LDG"),
        ("reads_global_out_of_bounds", "thread 0 reads 4 bytes of global memory at 0x.*, which is out of bounds"),
        ("writes_global_out_of_bounds", "thread 0 writes 4 bytes of global memory at 0x.*, which is out of bounds"),
        ("reads_shared_out_of_bounds", "thread 30 reads 4 bytes of shared memory at 0x480, which is out of bounds"),
        ("writes_shared_out_of_bounds", "thread 31 writes 4 bytes of shared memory at 0x480, which is out of bounds"),
        ("divergent_barrier", "a barrier of the block that only some lanes of a warp reach\n  at 0x.*: .*BAR.SYNC"),
        ("absent_lanes", "a warp collective of lanes that are apart|thread 16 reads lane 0, which takes no part in it"),
    ],
)
def test_fault_is_caught(planted, name, said):
    planted(name, 0)
    with pytest.raises(RuntimeError, match=f"(?s)sass: ({said}).*in warp 0 of block 0.*of .*{name}"):
        planted(name, 1)


def test_launch_is_refused(planted):
    """Of 128 bytes and dynamic ones that are together more than 48 KiB, unasked, or than there are."""
    planted("too_much_shared", 48 * 1024 - 128)
    for dynamic in (48 * 1024, 227 * 1024):
        with pytest.raises(RuntimeError, match=f"1 blocks of 32 threads with {dynamic + 128} bytes of shared memory"):
            planted("too_much_shared", dynamic)
    planted("too_much_shared", 227 * 1024 - 128)  # for which `launch` asks


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unknown_opcode", "unknown opcode POPC\n  at 0x.*: POPC R"),
        ("unknown_form", "unknown form of opcode MUFU\n  at 0x.*: MUFU.SIN"),
    ],
)
def test_what_is_unknown(planted, name, said):
    with pytest.raises(RuntimeError, match=f"(?s)sass: {said}.*of .*{name}"):
        planted(name, 0)


@pytest.mark.parametrize(
    ("name", "k", "counts"),
    [
        ("strided_load", 1, {"loads": [1, 4, 4]}),
        ("strided_load", 2, {"loads": [1, 8, 8]}),
        ("strided_load", 8, {"loads": [1, 32, 32]}),
        ("strided_load", 0, {"loads": [1, 1, 1]}),
        ("offset_load", 1, {"loads": [1, 5, 5]}),
        ("offset_load", 8, {"loads": [1, 4, 4]}),
        ("one_store", 0, {"loads": [1, 16, 16], "stores": [1, 16, 16]}),
        ("split_store", 0, {"loads": [1, 16, 16], "stores": [4, 64, 16]}),
        ("chained_loads", 0, {"trips": [1, 1], "in_flight": 4}),
        ("chained_loads", 7, {"trips": [8, 8], "in_flight": 4}),
        ("loads_at_once", 0, {"trips": [1, 1], "in_flight": 16}),
        *(("shared_float", k, {"banks": [2, lost]}) for k, lost in ((1, 0), (2, 2), (3, 0), (8, 14), (32, 62))),
        *(("shared_float2", k, {"banks": [2, lost]}) for k, lost in ((1, 0), (2, 4), (16, 60))),
        *(("shared_float4", k, {"banks": [2, lost]}) for k, lost in ((1, 0), (2, 8), (8, 56))),
    ],
)
def test_counts(planted, name, k, counts):
    """Of patterns whose counts follow from their addresses."""
    _, found = planted(name, k)
    assert {key: found[key] for key in counts} == counts
    assert found["launches"] == found["warps"] == 1


def test_what_is_worse(tmp_path, planted):
    """A table that was written and read says of each number whether it is worse or has to be recorded."""
    _, kernel = planted("split_store", 0)
    found = sass_table.by_op([("run", {"allocations": 1, "kernels": {"split": kernel}}, (), torch.zeros(8))])
    sass_table.save(tmp_path / "table.json", "13.0", {"point": found})
    recorded = sass_table.load(tmp_path / "table.json")["points"]["point"]
    assert recorded == found and sass_table.compare(found, recorded) == ([], [])
    narrow, wide = ({"run": {"kernels": {"split": {"stores": [n, 64, 16]}}}} for n in (4, 1))
    assert sass_table.compare(narrow, wide) == (["run: kernels: split: stores: 0: 1 -> 4"], [])
    assert sass_table.compare(wide, narrow) == ([], ["run: kernels: split: stores: 0: 4 -> 1"])
    more, less = ({"in_flight": 16, "int": 1009}, {"in_flight": 8, "int": 1000})
    assert sass_table.compare(less, more) == (["in_flight: 16 -> 8"], [])
    assert sass_table.compare(more, less) == ([], ["in_flight: 8 -> 16"])
    assert sass_table.compare({"int": 1020}, less) == (["in_flight: 8 -> 0", "int: 1000 -> 1020"], [])


# ---- some blocks of a launch, at the benchmarks' shapes
RECOUNTED = (
    "softmax_kl: KD, 4096 x 1000, float32",
    "softmax_kl: KD, 64 x 151936, bfloat16",
    "attention: AT, 64 x 256 x 14 x 14, float32",
    "gram: SP, 256 x 2048, float32",
)


def test_some_blocks_stand_for_all(folder):
    (case,) = (c for c in sass_benchmarks.cases("softmax_kl") if str(c) == "KD-256x1000-float32")
    some, every = (sass_benchmarks.kdfast(case, folder, blocks)[0] for blocks in (5, 0))
    for few, all_ in zip(some, every, strict=True):
        assert few["bytes"] == all_["bytes"] and few["kernels"].keys() == all_["kernels"].keys()
        for now, before in zip(few["kernels"].values(), all_["kernels"].values(), strict=True):
            assert now["warps"] == before["warps"] and now["launches"] == before["launches"]
            for key in sass_benchmarks.KEPT:
                assert now.get(key, 0) == pytest.approx(before.get(key, 0), rel=0.05), key


@pytest.mark.parametrize("name", RECOUNTED)
def test_counts_at_the_benchmarks_shapes_are_up_to_date(folder, one_thread, name):
    """Some of them; `python tests/sass_benchmarks.py` records all."""
    table = sass_benchmarks.load()
    if (table["nvcc"], table["torch"]) != (sass_library.tools()[2], torch.__version__.split("+")[0]):
        pytest.skip("recorded with another nvcc or torch")
    recorded = table["cases"][name]
    (case,) = (c for c in sass_benchmarks.cases(recorded["family"]) if name.endswith(sass_benchmarks.name_of("", c)))
    found = sass_benchmarks.found(case, folder)
    assert found["eager"] == recorded["eager"] and found["beside"] == recorded["beside"]
    assert [op["op"] for op in found["ops"]] == [op["op"] for op in recorded["ops"]]
    now, before = ([{**op, "op": 0} for op in facts["ops"]] for facts in (found, recorded))
    worse, other = sass_table.compare(now, before)
    assert not worse + other, "\n".join(worse + other)


# ---- the ops
@pytest.mark.parametrize("point", POINTS, ids=name_of)
def test_point(folder, hold, point):
    """The value and the gradients are the formula's."""
    name, shape, dtype = point
    op = OPS[name]
    x = op.group.inputs("cpu", shape, dtype)
    with sass_library.emulated(folder) as calls:
        check_oracle(op, x, op.upstream(x))
    found = sass_table.by_op(calls)
    hold(name_of(point), found)
    if name.startswith(ONCE) and name not in TWICE:
        assert all(op["traffic"] <= 1.02 for op in found.values())


@pytest.mark.parametrize("name", OTHERS)
def test_other(folder, hold, name):
    with sass_library.emulated(folder) as calls:
        OTHERS[name]()
    hold(name, sass_table.by_op(calls))


def test_every_op_is_run(folder):
    """By some point."""
    if RECORDING:
        pytest.skip("the table is being written")
    table = sass_table.load(TABLE)
    run = {op.split()[0] for ops in table["points"].values() for op in ops}
    assert run == set(sass_library.kernels(folder))
