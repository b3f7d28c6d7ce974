"""The benchmarks' machinery: what is compared, what is recorded, and the tables made from it. No time is asserted."""

import argparse
import copy
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import require_cpu_kernels

from kdfast import bench

pytest.importorskip("pytest_benchmark")
report, harness = (bench.load(name) for name in ("report", "harness"))
softmax_kl, pairwise, feature, step, compat, of_ops = (
    bench.load(f"bench_{family}") for family in ("softmax_kl", "pairwise", "feature", "step", "compat", "ops")
)

ROOT = Path(__file__).resolve().parent.parent
MILLISECOND = 1e-3


# ---- the record of a run ---------------------------------------------------------------------------------------------
def entry(kind, median, **info):
    """One benchmark as pytest-benchmark writes it."""
    stats = {"median": median, "q1": 0.9 * median, "q3": 1.1 * median, "rounds": 10, "mean": median}
    return {"name": "x", "stats": stats, "extra_info": {"kind": kind, **info}}


def loss_entry(implementation, milliseconds, shape="256 x 1000", phase="both", dtype="float32", peak=2_000_000):
    info = {"loss": "KD", "shape": shape, "dtype": dtype, "peak_bytes": peak}
    info |= {"floor": 5_000_000, "ceiling": "copy", "size": None, "left_out": {}}
    return entry("loss", milliseconds * MILLISECOND, implementation=implementation, phase=phase, **info)


def growth_entry(implementation, size, milliseconds, peak, left_out=None):
    """A figure of the pairwise family."""
    made = loss_entry(implementation, milliseconds, shape=f"{size} x 512", peak=peak)
    made["extra_info"] |= {"loss": "RKD", "size": size, "ceiling": "matmul", "floor": 1e9, "left_out": left_out or {}}
    return made


@pytest.fixture
def raw():
    """A run of KD at two shapes; at the second torch.compile did not work."""
    benchmarks = [
        entry("ceiling", 0.02, name="copy", work=500_000_000, unit="B/s"),  # 25 GB/s
        loss_entry("eager", 2.0, peak=5_120_000),
        loss_entry("compile", 1.2),
        loss_entry("fallback", 2.5),
        loss_entry("kdfast", 0.4, peak=1_024_000),
        loss_entry("eager", 1.0, phase="forward", peak=None),
        loss_entry("eager", 30.0, shape="64 x 151936", dtype="bfloat16"),
        loss_entry("kdfast", 12.0, shape="64 x 151936", dtype="bfloat16"),
        entry("host", 154e-6, loss="KD", implementation="eager", phase="both"),
        entry("host", 45e-6, loss="KD", implementation="kdfast", phase="both"),
    ]
    machine = {"device": "Some CPU (R) 9", "kind": "cpu", "cores": 2, "threads": 2, "torch": "2.13.0"}
    return {
        "benchmarks": benchmarks,
        "machine_info": {"kdfast": machine | {"python": "3.11", "kdfast": "0.1.0", "commit": "0123456789ab"}},
        "datetime": "2026-01-02T03:04:05+00:00",
    }


@pytest.fixture
def results(raw):
    return report.collect(raw, "softmax_kl")


def test_collect_keeps_every_figure(results):
    assert [len(results[name]) for name in ("ceilings", "figures", "host")] == [1, 7, 2]
    assert all({"median", "q1", "q3", "rounds"} <= figure.keys() for figure in results["figures"] + results["host"])
    assert (results["machine"]["commit"], results["date"]) == ("0123456789ab", "2026-01-02")


def test_an_instruction_set_has_a_folder_of_its_own(results):
    assert report.slug(results) == "some-cpu-r-9-2-cores"
    results["machine"]["isa"] = "avx2"
    assert report.slug(results) == "some-cpu-r-9-2-cores-avx2"
    assert "2 cores, threads: 2, held to avx2" in report.caption(results).replace("\n", " ")


def test_turns_are_one_figure(raw):
    """All rounds of all turns count alike, and memory is the first turn's."""
    first, second, other = (loss_entry("kdfast", 1.0, shape=shape, peak=None) for shape in ("8 x 8", "8 x 8", "9 x 9"))
    first["stats"]["data"], second["stats"]["data"] = [1.0, 2.0, 9.0], [3.0, 4.0]
    first["extra_info"]["peak_bytes"] = 7
    raw["benchmarks"] += [first, other, second]
    figures = report.collect(raw, "softmax_kl")["figures"]
    (figure,) = [figure for figure in figures if figure["shape"] == "8 x 8"]
    assert [figure[name] for name in ("q1", "median", "q3", "rounds", "peak_bytes")] == [2.0, 3.0, 4.0, 5, 7]
    assert len(figures) == 7 + 2


def test_rounds_of_a_turn():
    assert harness.rounds_within(1.0, 0.01) == 100 and harness.rounds_within(1.0, 0.01, turns=4) == 25
    assert harness.rounds_within(1.0, 0.5) == 8 and harness.rounds_within(1.0, 0.5, turns=4) == 2
    assert harness.rounds_within(1.0, 3.0, turns=4) == 1 and harness.rounds_within(1.0, 1e-9, turns=4) == 75


def test_ratios(results):
    figures = report.cases(results)["KD", "256 x 1000"]
    assert report.speed_up(figures, "eager") == pytest.approx(5)
    assert report.speed_up(figures, "compile") == pytest.approx(3)
    assert report.speed_up(figures, "liger") is None
    assert figures["kdfast"]["rate"] == pytest.approx(12.5e9)
    assert figures["kdfast"]["share"] == pytest.approx(0.5)


def test_share_is_left_out_without_a_measured_copy(raw):
    raw["benchmarks"] = raw["benchmarks"][1:]
    results = report.collect(raw, "softmax_kl")
    assert all(figure["share"] is None for figure in results["figures"])
    assert report.text(results)


def test_main_rows(results):
    heading, first, second = report.main_rows(results)
    assert "x liger" not in heading
    row = dict(zip(heading, first, strict=True))
    assert row["kdfast"] == "0.400" and row["x eager"] == "5.0" and row["x compile"] == "3.0"
    assert row["of copy"] == "50%" and row["extra MB"] == "5.12 / 1.02"
    row = dict(zip(heading, second, strict=True))
    assert row["shape"] == "64 x 151936 bf16" and row["compile"] == row["x compile"] == "-"


def test_liger_has_columns_where_it_was_measured(raw):
    raw["benchmarks"].append(loss_entry("liger", 1.0))
    heading, first, _ = report.main_rows(report.collect(raw, "softmax_kl"))
    assert dict(zip(heading, first, strict=True))["x liger"] == "2.5"


def test_tables_are_aligned(results):
    table = report.markdown_table(report.main_rows(results), 2).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert len({len(line) for line in table if "---" not in line}) == 1
    assert max(map(len, report.text(results).splitlines())) <= 110


def test_unsteady_figures_are_counted(results):
    results["figures"][0]["q3"] *= 2
    assert report.text(results).endswith("of the median: 1 of 7 figures.")


@pytest.fixture
def growth(raw):
    """Times that grow with the cube of the batch, memory with its square; at 1024 eager does not fit."""
    left_out = {"eager": "out of memory: 24 GB", "compile": "out of memory"}
    benchmarks = []
    for b in (64, 128, 256, 512, 1024):
        omitted = left_out if b == 1024 else {}
        benchmarks.append(growth_entry("kdfast", b, 5.0 if b == 64 else (b / 100) ** 3, 7 * b**2, omitted))
        benchmarks += [growth_entry("eager", b, (b / 10) ** 3, b**3)] * (not omitted)
    product = entry("ceiling", 0.1, name="matmul", work=10_000_000_000, unit="FLOP/s")
    return report.collect({**raw, "benchmarks": [product, *benchmarks]}, "pairwise")


def test_growth(growth):
    assert report.exponent([2, 4, 8], [5, 20, 80]) == (pytest.approx(2), [2, 4, 8])
    assert report.exponent([2], [5]) == (None, [])
    rows = report.growth_rows(growth)
    assert rows[1:] == [
        ["RKD", "kdfast", "128 - 1024", "3.00", "2.00"],  # the smallest batch is all overhead
        ["RKD", "eager", "64 - 512", "3.00", "3.00"],
    ]


def test_what_does_not_fit_is_named(growth):
    heading, *rows = report.main_rows(growth)
    last = dict(zip(heading, rows[-1], strict=True))
    assert (last["eager"], last["compile"], last["fallback"]) == ("out of memory: 24 GB", "out of memory", "-")
    assert last["x eager"] == "-" and float(last["kdfast"]) == pytest.approx(10.24**3, rel=0.01)
    assert heading[-2] == "of matmul" and dict(zip(heading, rows[1], strict=True))["of matmul"] == "477%"


def test_growth_is_drawn(growth, tmp_path):
    pytest.importorskip("matplotlib")
    path = report.save(growth, tmp_path)
    assert path.name == "pairwise.json" and path.with_suffix(".png").stat().st_size > 0
    assert "## Growth" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0.00"), (0.00123, "0.00123"), (0.4, "0.400"), (0.9996, "1.00"), (25.04, "25.0"), (1284, "1284")],
)
def test_significant(value, shown):
    assert report.significant(value) == shown


def test_save_and_readme(results, tmp_path):
    pytest.importorskip("matplotlib")
    path = report.save(results, tmp_path)
    assert path == tmp_path / "some-cpu-r-9-2-cores" / "softmax_kl.json"
    assert json.loads(path.read_text()) == results
    assert path.with_suffix(".png").stat().st_size > 0
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.START}\na stale table\n{report.END}\nafter\n")
    for _ in range(2):  # the second time changes nothing
        report.update_readme(readme, path)
        content = readme.read_text()
        assert content.startswith("before\n") and content.endswith("\nafter\n") and "stale" not in content
        assert content.count("| KD ") == 1 and "(some-cpu-r-9-2-cores/softmax_kl.md)" in content


def test_readme_needs_its_marks(results, tmp_path):
    path = report.save(results, tmp_path, chart=False)
    readme = tmp_path / "README.md"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="has no block"):
        report.update_readme(readme, path)


@pytest.mark.parametrize("page", ["benchmarks", *(f"migrating-from-{x.lower()}" for x in compat.LIBRARIES)])
def test_pages_show_the_committed_results(page):
    path, committed = ROOT / "docs" / f"{page}.md", report.measured(ROOT / "benchmarks/results")
    if not (path.exists() and committed):
        pytest.skip("no results are committed")
    assert report.updated(path, *committed) == path.read_text()


def test_a_page_shows_its_library(raw, tmp_path):
    for entry in raw["benchmarks"][1:]:
        entry["extra_info"]["loss"] = "mdistiller kd_loss"
    raw["benchmarks"][1]["extra_info"]["loss"] = "RepDistiller PKT"
    path = report.save(report.collect(raw, "compat"), tmp_path, chart=False)
    page = tmp_path / "page.md"
    for library, has, has_not in (("mdistiller", "| kd_loss", "PKT"), ("RepDistiller", "| PKT", "kd_loss")):
        page.write_text(f"before\n{report.START[:-4]} {library} -->\nstale\n{report.END}\nafter\n")
        report.update_readme(page, path)
        text = page.read_text()
        assert has in text and has_not not in text and "stale" not in text and text.endswith(f"{report.END}\nafter\n")
    page.write_text(f"{report.START}\nstale\n{report.END}\n")  # as docs/benchmarks.md: no library's losses
    report.update_readme(page, path)
    assert page.read_text() == f"{report.START}\n\n{report.END}\n"


# ---- whole steps -----------------------------------------------------------------------------------------------------
@pytest.fixture
def steps(raw):
    """KD and CRD alone and in a step; the machine cannot hold eager CRD's."""
    benchmarks = [growth_entry("kdfast", 256, ms, 10**6, {"compile": "-", "fallback": "-"}) for ms in (2.0, 40.0)]
    for alone, loss in zip(benchmarks, ("KD", "CRD"), strict=True):
        alone["extra_info"]["loss"] = loss
    benchmarks[1]["extra_info"] |= {
        "ceiling": "gather",
        "left_out": {"eager": "out of memory: 73 GB"} | {"compile": "-", "fallback": "-"},
    }
    for loss, ms in (("KD", 200.0), ("CRD", 250.0)):
        whole = growth_entry("kdfast", None, ms, 10**9)
        whole["extra_info"] |= {"loss": loss, "shape": "256 x 3 x 32 x 32", "part": [loss, "256 x 512"]}
        benchmarks.append(whole)
    return report.collect(raw | {"benchmarks": [*raw["benchmarks"][:1], *benchmarks]}, "step")


def test_steps_have_a_table_of_their_own(steps):
    heading, *rows = report.step_rows(steps)
    kd, crd = (dict(zip(heading, row, strict=True)) for row in rows)
    assert (kd["kdfast"], kd["kdfast, loss"], kd["kdfast / KD"]) == ("200", "2.00", "1.00")
    assert (crd["kdfast"], crd["kdfast, loss"], crd["kdfast / KD"]) == ("250", "40.0", "1.25")
    assert crd["eager"] == crd["eager, loss"] == crd["eager / KD"] == crd["x eager"] == "-"
    for text in (report.text(steps), report.markdown(steps)):
        assert "256 x 3 x 32 x 32" in text and report.STEPS in text
    assert "256 x 3 x 32 x 32" not in str(report.main_rows(steps))


def test_columns_that_no_case_has_are_left_out(steps):
    heading, kd, crd = report.main_rows(steps)
    assert heading == ["loss", "shape", "eager", "kdfast", "x eager", "of limit", "extra MB"]
    assert dict(zip(heading, crd, strict=True))["eager"] == "out of memory: 73 GB"
    assert kd[-2] == "-" and "eager PyTorch and kdfast's kernels;" in " ".join(report.caption(steps).split())
    assert report.SHARES["matmul"] in (caption := " ".join(report.caption(steps).split()))
    assert report.SHARES["gather"] in caption


# ---- what is compared ------------------------------------------------------------------------------------------------
CASES = [module.case(name, 5, 16) for module in (softmax_kl, pairwise) for name in module.LOSSES]
CASES += [feature.case(name, 3, 4, 9, 7) for name in feature.LOSSES]
CASES += of_ops.host_cases()
CASES += [step.alone(name, 6, 20, "cpu", rows=500) for name in step.WIDTHS]
CASES += [step.part_of_step("AT", 3, 64, 500, "cpu"), *compat.cases(harness.Settings("cpu", quick=False), [(6, 0)])]

MODULES = {  # of the losses with a state
    "CRD": lambda: step.contrast(20, 500, torch.device("cpu")),
    "RepDistiller CRDLoss": lambda: compat.contrast(256, compat.bench_nce.CIFAR, torch.device("cpu")),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_baselines_compute_the_same_loss(case):
    inputs, module = case.inputs("cpu"), torch.nn.Identity()
    if case.loss in MODULES:  # in float32 the official formula loses digits to the sum of 1 and something small
        module = MODULES[case.loss]().double()
        inputs = [as_float64(x) for x in inputs]
    leaves = [x for x in inputs if x.requires_grad]
    state = copy.deepcopy(module.state_dict())
    losses, gradients = [], []
    for function in (case.eager, case.kdfast):
        module.load_state_dict(state)  # the banks have moved
        losses.append(function(*inputs).view(()))
        gradients.append(torch.autograd.grad(losses[-1], leaves))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def as_float64(x):
    """A wider input; a parameter of the module already is, and an index stays."""
    if x.dtype != torch.float32:
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


@pytest.mark.parametrize("name", pairwise.LOSSES)
@pytest.mark.parametrize("shape", [(128, 256), (192, 64)], ids=str)
def test_memory_of_a_baseline_is_foreseen(name, shape):
    case = pairwise.case(name, *shape)
    call = harness.Call(case.eager, [case.inputs("cpu")], "both", "cpu")
    assert pairwise.eager_bytes(name, *shape) == pytest.approx(call.peak_bytes(), rel=0.3)


def test_a_baseline_that_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(harness, "has_kernels", lambda device, family: True)
    monkeypatch.setattr(harness, "memory_limit", lambda device: 10e9)
    settings = harness.Settings("cpu", quick=False)
    jobs = harness.jobs(pairwise.cases(settings, []), settings, "pairwise")
    sizes = {name: [job.case.size for job in jobs if job.implementation == name] for name in report.IMPLEMENTATIONS}
    angle = {
        name: max(job.case.size for job in jobs if job.implementation == name and job.case.loss == "RKD angle")
        for name in ("eager", "compile", "fallback", "kdfast")
    }
    assert angle == {"eager": 512, "compile": 512, "fallback": pairwise.LARGEST_FALLBACK, "kdfast": 4096}
    assert max(sizes["eager"]) == 4096  # distances alone fit
    left_out = next(job.case.left_out for job in jobs if job.case.size == 4096)
    assert left_out["eager"] == f"out of memory: {pairwise.eager_bytes('RKD angle', 4096, 512) / 1e9:.0f} GB"


@pytest.mark.parametrize("name", step.LOSSES)
def test_a_step_trains(name):
    """The student's weights move, the same way with the baseline as with kdfast, and no gradient is left behind."""
    part = step.part_of_step(name, 4, 64, 500, "cpu")
    case = step.step_case(name, part, 4, 64, 500)
    assert case.part == (part.loss, part.shape)
    inputs, moves = case.inputs("cpu"), []
    for function in (case.eager, case.kdfast):
        step.training.cache_clear()
        step.contrast.cache_clear()
        student = step.training(name, 500, inputs[0].device).student
        before = torch.cat([p.detach().flatten() for p in student.parameters()])
        call = harness.Call(function, [inputs], "both", "cpu")
        (argument,), _ = call.setup()
        call.run(argument)
        assert all(p.grad is None for p in student.parameters())
        moves.append(torch.cat([p.detach().flatten() for p in student.parameters()]) - before)
    step.training.cache_clear()
    step.contrast.cache_clear()
    assert moves[0].any()
    assert (moves[1] - moves[0]).norm() < 1e-3 * moves[0].norm()


def test_a_step_needs_the_operations_of_its_networks():
    """ImageNet's resnet18 multiplies 1.814 billion times for an image, resnet34 3.664 billion times."""
    assert step.operations(2, 224) == pytest.approx(2 * 2 * (3 * 1.814e9 + 3.664e9), rel=0.001)


def test_implementations_of_a_case_run_one_after_another(monkeypatch):
    monkeypatch.setattr(harness, "has_kernels", lambda device, family: True)
    settings = harness.Settings("cpu", quick=False)
    jobs = harness.jobs(softmax_kl.cases(settings, []), settings, "softmax_kl")
    names = ["eager", "compile", "fallback", "kdfast"]
    groups = [jobs[start : start + len(names)] for start in range(0, len(jobs), len(names))]
    assert all([job.implementation for job in group] == names for group in groups)
    assert all(len({(job.case, job.phase, job.turn) for job in group}) == 1 for group in groups)
    turns = [(group[0].turn, group[0].turns) for group in groups if group[0].phase == "both"]
    assert turns == [(turn, harness.TURNS) for turn in range(harness.TURNS)] * (len(turns) // harness.TURNS)
    assert all(group[0].turns == 1 for group in groups if group[0].phase != "both")
    assert len(set(map(str, jobs))) == len(jobs)
    assert {str(job.case) for job in jobs if job.case.loss == "KD"} == {
        f"KD-{rows}x{cols}-float32" for rows, cols in softmax_kl.SHAPES
    }


def test_a_call_starts_without_gradients():
    case = softmax_kl.case("KD", 4, 16)
    sets = [case.inputs("cpu"), case.inputs("cpu")]
    call = harness.Call(case.eager, sets, "both", "cpu")
    for expected in (sets[0], sets[1], sets[0]):
        (inputs,), _ = call.setup()
        assert inputs is expected and inputs[0].grad is None
        call.run(inputs)
        assert inputs[0].grad is not None


def test_peak_memory_counts_what_lives_at_the_same_time():
    def work():
        first = torch.ones(100_000)
        second = first + 1
        del first
        return second.exp_()

    assert harness.peak_cpu(work) == pytest.approx(2 * 400_000, rel=0.01)
    assert harness.peak_cpu(lambda: [torch.ones(100_000).sum() for _ in range(3)]) == pytest.approx(400_000, rel=0.01)


def test_rounds_fit_the_budget():
    fewest, most = harness.ROUNDS
    slow = harness.SLOW_ROUNDS
    seconds = (100.0, 0.5, 0.1, 1e-9, 0.0)
    assert [harness.rounds_within(1.0, each) for each in seconds] == [slow, fewest, 10, most, most]


# ---- the command -----------------------------------------------------------------------------------------------------
def options(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("family", "loss", "baselines"),
    [("softmax_kl", "KD", {"eager", "fallback"}), ("pairwise", "RKDangle", {"fallback"}), ("step", "RKD", {"eager"})],
)
def test_bench_measures_a_tiny_shape(family, loss, baselines, tmp_path, capfd):
    select = f"{loss}-4x16 and ({' or '.join(baselines)}) and not Reverse"
    arguments = ("--quick", "--shape", "4x16", "-k", select, "--threads", "1", "--out", str(tmp_path))
    assert bench.run(options("--family", family, *arguments)) == 0
    [path] = tmp_path.glob("*/*.json")
    results = json.loads(path.read_text())
    assert path.stem == results["family"] == family
    assert {figure["implementation"] for figure in results["figures"]} == baselines
    assert {(figure["shape"], figure["phase"]) for figure in results["figures"]} == {("4 x 16", "both")}
    assert all(figure["rounds"] >= harness.SLOW_ROUNDS and figure["peak_bytes"] > 0 for figure in results["figures"])
    assert results["machine"]["threads"] == 1
    assert report.text(results) in capfd.readouterr().out


def test_bench_against_a_commit(monkeypatch, capfd):
    """Pairs of processes that measure the same cases; here both are this checkout."""
    require_cpu_kernels()
    against = bench.load("against")
    monkeypatch.setattr(against, "checkout", lambda commit: against.ROOT)
    monkeypatch.setattr(against, "PAIRS", 1)
    command = ("--against", "HEAD", "--family", "softmax_kl", "--shape", "4x16", "-k", "KD")
    assert bench.run(options(*command)) == 0
    table = capfd.readouterr().out
    rows = re.findall(r"^(\S+)-4x16-float32 +[\d.]+ +([\d.]+)  \[([\d.]+), ([\d.]+)\]$", table, re.MULTILINE)
    assert {"KD", "KD+CE", "DKD", "ReverseKD"} <= {row[0] for row in rows}
    assert all(median == low == high and float(median) > 0 for _, median, low, high in rows)


def test_bench_against_no_commit(capsys):
    assert bench.run(options("--against", "no-such-commit", "--family", "nce")) == 2
    assert "--against: no-such-commit is no commit of" in capsys.readouterr().err


def test_bench_measures_all_families_by_default(monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(bench, "measure", lambda family, options, raw: measured.append(family) or 5)
    assert bench.run(options()) == bench.NOTHING_SELECTED
    assert tuple(measured) == bench.FAMILIES
    assert capsys.readouterr().err.count("was measured") == len(bench.FAMILIES)


@pytest.mark.parametrize("family", bench.FAMILIES)
def test_every_family_is_measured(family):
    """By the harness, in each of its three ways, at every shape and at a small one of the host's."""
    module = bench.load(f"bench_{family}")
    ways = harness.measure_ceiling, harness.measure_loss, harness.measure_host
    assert (module.test_ceiling, module.test_loss, module.test_host) == ways and module.FAMILY == family
    for case in [*module.cases(harness.Settings("cpu", quick=False), []), *module.host_cases()]:
        assert set(case.floor) == set(harness.PHASES) and case.floor["both"] > 0 and case.ceiling in harness.CEILINGS


def test_bench_names_the_missing_extra(monkeypatch, capsys):
    monkeypatch.setattr(bench, "installed", lambda name: name != "pytest_benchmark")
    assert bench.run(options()) == 2
    said = capsys.readouterr().err
    assert said.startswith("kdfast bench needs pytest_benchmark: pip install ") and "pytest-benchmark" in said
    assert "kdfast[" not in said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--threads", "-1"], "--threads: got '-1', expected a whole number of at least 1 and at most 1024"),
        (["--threads", "100000"], "--threads: got '100000', expected a whole number"),
        (["--shape", "5"], "--shape: got '5', expected sizes of at least 1 as in 256x1000"),
        (["--shape", "0x5"], "--shape: got '0x5', expected sizes"),
        (["--shape", "4x16", "--shape", "axb"], "--shape: got 'axb', expected sizes"),
        (["--seconds", "nan"], "--seconds: got nan, expected a number of at least 0"),
        (["--out", "file"], "--out: file is a file; expected a folder"),
        (["--out", "file/results"], "file is a file; expected a folder"),
        (["--against", "HEAD"], "--against: needs a --family"),
        (["--against", "HEAD", "--family", "nce", "--threads", "2"], "--against: measures one thread of a CPU"),
        (["--readme", "nothing.md"], "--readme: nothing.md is not a file"),
    ],
)
def test_bench_refuses_before_it_measures(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("of somebody")
    monkeypatch.setattr(bench, "measure", None)
    assert bench.run(options(*arguments)) == 2
    assert expected in capsys.readouterr().err


def test_bench_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(bench, "measure", None)
    assert bench.run(options("--device", "cuda")) == 2
    assert "--device: got 'cuda', but torch" in capsys.readouterr().err


def test_bench_of_a_shape_that_does_not_fit(tmp_path, capfd):
    """Logits have two sizes; the family that is asked for says so."""
    arguments = ("--quick", "--family", "softmax_kl", "--shape", "4x16x3", "--out", str(tmp_path / "results"))
    assert bench.run(options(*arguments)) != 0
    printed = capfd.readouterr()
    assert (
        "--shape does not fit softmax_kl" in printed.err + printed.out and "Traceback" not in printed.err + printed.out
    )


def test_bench_rewrites_a_readme_without_measuring(results, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure", None)
    path = report.save(results, tmp_path / "results", chart=False)
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.START}\n{report.END}\n")
    assert bench.run(options("--readme", str(readme), "--out", str(tmp_path / "results"))) == 0
    assert report.readme_block(readme, path) in readme.read_text()
    assert bench.run(options("--readme", str(readme), "--out", str(tmp_path / "nothing"))) == 1
