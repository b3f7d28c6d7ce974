"""The benchmarks' machinery: what is compared, what is recorded, and the tables made from it. No time is asserted."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from kdfast import bench

pytest.importorskip("pytest_benchmark")
report, harness, softmax_kl = (bench.load(name) for name in ("report", "harness", "bench_softmax_kl"))

ROOT = Path(__file__).resolve().parent.parent
MILLISECOND = 1e-3


# ---- the record of a run ---------------------------------------------------------------------------------------------
def entry(kind, median, **info):
    """One benchmark as pytest-benchmark writes it."""
    stats = {"median": median, "q1": 0.9 * median, "q3": 1.1 * median, "rounds": 10, "mean": median}
    return {"name": "x", "stats": stats, "extra_info": {"kind": kind, **info}}


def loss_entry(implementation, milliseconds, shape="256 x 1000", phase="both", dtype="float32", peak=2_000_000):
    info = {"loss": "KD", "shape": shape, "dtype": dtype, "floor_bytes": 5_000_000, "peak_bytes": peak}
    return entry("loss", milliseconds * MILLISECOND, implementation=implementation, phase=phase, **info)


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


def test_ratios(results):
    figures = report.cases(results)["KD", "256 x 1000"]
    assert report.speed_up(figures, "eager") == pytest.approx(5)
    assert report.speed_up(figures, "compile") == pytest.approx(3)
    assert report.speed_up(figures, "liger") is None
    assert figures["kdfast"]["bytes_per_second"] == pytest.approx(12.5e9)
    assert figures["kdfast"]["share_of_copy"] == pytest.approx(0.5)


def test_share_is_left_out_without_a_measured_copy(raw):
    raw["benchmarks"] = raw["benchmarks"][1:]
    results = report.collect(raw, "softmax_kl")
    assert all(figure["share_of_copy"] is None for figure in results["figures"])
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
        assert content.count("| KD ") == 2 and "(some-cpu-r-9-2-cores/softmax_kl.md)" in content


def test_readme_needs_its_marks(results, tmp_path):
    path = report.save(results, tmp_path, chart=False)
    readme = tmp_path / "README.md"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="has no block"):
        report.update_readme(readme, path)


def test_readme_shows_the_committed_results():
    readme, committed = ROOT / "README.md", sorted(ROOT.glob("benchmarks/results/*/*.json"))
    if not (readme.exists() and committed):
        pytest.skip("no results are committed")
    assert report.readme_block(readme, *committed) in readme.read_text()


# ---- what is compared ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", softmax_kl.LOSSES)
def test_baselines_compute_the_same_loss(name):
    case = softmax_kl.case(name, 4, 16)
    student, *others = case.inputs("cpu")
    losses = [function(student, *others) for function in (case.eager, case.kdfast)]
    gradients = [torch.autograd.grad(loss, student)[0] for loss in losses]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_implementations_of_a_case_run_one_after_another(monkeypatch):
    monkeypatch.setattr(harness, "has_kernels", lambda device, family: True)
    settings = harness.Settings("cpu", quick=False)
    jobs = harness.jobs(softmax_kl.cases(settings, []), settings, "softmax_kl")
    names = ["eager", "compile", "fallback", "kdfast"]
    groups = [jobs[start : start + len(names)] for start in range(0, len(jobs), len(names))]
    assert all([job.implementation for job in group] == names for group in groups)
    assert all(len({(job.case, job.phase) for job in group}) == 1 for group in groups)
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
    assert [harness.rounds_within(1.0, seconds) for seconds in (100.0, 0.1, 1e-9, 0.0)] == [fewest, 10, most, most]


# ---- the command -----------------------------------------------------------------------------------------------------
def options(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(arguments)


def test_bench_measures_a_tiny_shape(tmp_path, capfd):
    select = "KD-4x16 and (eager or fallback) and not Reverse"
    assert bench.run(options("--quick", "--shape", "4x16", "-k", select, "--threads", "1", "--out", str(tmp_path))) == 0
    [path] = tmp_path.glob("*/softmax_kl.json")
    results = json.loads(path.read_text())
    assert {figure["implementation"] for figure in results["figures"]} == {"eager", "fallback"}
    assert {(figure["shape"], figure["phase"]) for figure in results["figures"]} == {("4 x 16", "both")}
    assert all(figure["rounds"] >= harness.ROUNDS[0] and figure["peak_bytes"] > 0 for figure in results["figures"])
    assert results["machine"]["threads"] == 1
    assert report.text(results) in capfd.readouterr().out


def test_bench_names_the_missing_extra(monkeypatch, capsys):
    monkeypatch.setattr(bench, "installed", lambda name: name != "pytest_benchmark")
    assert bench.run(options()) == 2
    assert capsys.readouterr().err == "kdfast bench needs pytest_benchmark: pip install 'kdfast[bench]'\n"


def test_bench_rewrites_a_readme_without_measuring(results, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "measure", None)
    path = report.save(results, tmp_path / "results", chart=False)
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.START}\n{report.END}\n")
    assert bench.run(options("--readme", str(readme), "--out", str(tmp_path / "results"))) == 0
    assert report.readme_block(readme, path) in readme.read_text()
    assert bench.run(options("--readme", str(readme), "--out", str(tmp_path / "nothing"))) == 1
