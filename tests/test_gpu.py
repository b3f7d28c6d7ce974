"""`make gpu` without a GPU: its arguments, what becomes of steps that fail, and its report of recorded figures."""

import argparse
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import fake_gpu
import pytest
import torch
from conftest import require_cpu_kernels

from kdfast import bench

pytest.importorskip("pytest_benchmark")
gpu = bench.load("gpu")

TESTS = Path(__file__).resolve().parent
RECORDED = TESTS.parent / "benchmarks/results/amd-epyc-2-cores/softmax_kl.json"
MACHINE = {"device": "Fake GPU", "driver": "580.1", "torch": "2.11.0", "commit": "0123456789ab", "liger": None}


# ---- arguments -------------------------------------------------------------------------------------------------------
def test_folder(monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    assert gpu.parse([]).folder == Path("gpu-results").resolve()
    monkeypatch.setenv("OUT", "/somewhere")
    assert gpu.parse([]).folder == Path("/somewhere")
    assert gpu.parse(["/elsewhere", "--seconds", "60"]).folder == Path("/elsewhere")
    assert [gpu.parse(x).seconds for x in ([], ["--part", "1"], ["--seconds", "60"])] == [780, 390, 60]
    with pytest.raises(SystemExit):
        gpu.parse(["a", "b"])


def test_no_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([str(tmp_path / "out")]) == 2
    assert "no GPU: torch sees no CUDA device" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert gpu.main([]) == 2
    assert f"no GPU: {sys.executable} has no torch" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "ninja" else name)
    assert gpu.main([]) == 1
    assert "needs ninja" in capsys.readouterr().out


# ---- one step --------------------------------------------------------------------------------------------------------
def test_a_step_that_fails(tmp_path, capsys):
    run = gpu.Run(tmp_path, 60)
    assert run.step("good", 30, "-c", "print('fine')")
    assert not run.step("bad", 30, "-c", "import os; print('\\n' * 99 + 'the reason'); os._exit(3)")
    assert [(s.name, s.status, s.reason) for s in run.steps] == [("good", "ok", ""), ("bad", "FAILED", "exit status 3")]
    assert (tmp_path / "good.log").read_text() == "fine\n"
    shown = capsys.readouterr().out
    assert "bad: FAILED" in shown and "the reason" in shown and "fine" not in shown


def test_a_step_that_hangs_is_stopped_with_its_children(tmp_path):
    child = "import time, pathlib; time.sleep(3); pathlib.Path('survived').touch()"
    parent = (
        f"import os, subprocess, sys; os.chdir({str(tmp_path)!r}); subprocess.run([sys.executable, '-c', {child!r}])"
    )
    run = gpu.Run(tmp_path, 60)
    assert not run.step("hangs", 1, "-c", parent)
    assert run.steps[0].reason == "stopped after 1 s"
    time.sleep(3)
    assert not (tmp_path / "survived").exists()


def test_the_environment_of_a_step(tmp_path):
    code = "import os; print(*(os.environ.get(n) for n in ('KDFAST_FORCE_CUDA', 'KDFAST_TEST_REQUIRE_KERNELS')))"
    assert gpu.Run(tmp_path, 60).step("environment", 30, "-c", code)
    assert (tmp_path / "environment.log").read_text() == "1 cuda\n"


CLEAN = "workload: 200 results, all finite\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("status", "output", "judged"),
    [
        ("ok", CLEAN, "ok"),
        ("ok", CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed"), "ok"),
        ("ok", CLEAN.replace("0 errors", "10 errors"), "FAILED"),
        ("ok", "========= ERROR SUMMARY: 0 errors", "FAILED"),  # nothing ran under the tool
        ("ok", "workload: 200 results, all finite", "FAILED"),  # nothing was looked at
        ("FAILED", CLEAN, "FAILED"),
        ("FAILED", "========= Error: Device not supported.", "not proved"),
    ],
)
def test_what_a_tool_of_compute_sanitizer_proves(tmp_path, status, output, judged):
    (tmp_path / "log").write_text(output)
    assert gpu.judge(gpu.Step("memcheck", status, 1.0), tmp_path / "log").status == judged


# ---- the whole run ---------------------------------------------------------------------------------------------------
@pytest.fixture
def play(monkeypatch, tmp_path):
    """Runs everything with steps that only pretend; -> exit status, commands, the folder. `fail` names steps."""
    if not RECORDED.exists():
        pytest.skip("no figures are recorded")

    def run(fail=(), sanitizer="compute-sanitizer", seconds=780.0, part=None, device="Fake GPU", spent=1.0):
        commands, clock = {}, [0.0]
        monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])

        def execute(log, name, limit, *command):
            assert 0 < limit <= seconds
            commands[name] = command
            log.write_text({"machine": json.dumps(MACHINE) + "\n"}.get(name, CLEAN))
            if name.startswith(("bench-", "more-")):
                folder = Path(command[command.index("--out") + 1]) / "fake-gpu"
                folder.mkdir(exist_ok=True, parents=True)
                results = json.loads(RECORDED.read_text()) | {"family": name.partition("-")[2]}
                results["machine"]["device"] = device
                (folder / f"{results['family']}.json").write_text(json.dumps(results))
                log.write_text("7 figures were left out: no time left\n")
            clock[0] += spent
            return gpu.Step(name, "FAILED" if name in fail else "ok", 1.0, "exit status 1" if name in fail else "")

        monkeypatch.setattr(gpu, "execute", execute)
        monkeypatch.setattr(gpu, "compute_sanitizer", lambda: sanitizer)
        return gpu.Run(tmp_path, seconds, part).everything(), commands, tmp_path

    return run


def test_everything_goes_well(play, capsys):
    status, commands, folder = play()
    assert status == 0
    benches = [f"{pass_}-{family}" for pass_ in ("bench", "more") for family in gpu.families()]
    proofs = {"tests-cuda", "tests-other", *gpu.TOOLS}  # at the same time
    before, during, after = (list(commands)[part] for part in (slice(3), slice(3, 9), slice(9, None)))
    assert before == ["build", "doctor", "machine"] and set(during) == proofs and after == benches != []
    summary = json.loads((folder / "gpu.json").read_text())
    assert summary["machine"] == MACHINE and len(summary["steps"]) == len(commands)
    assert [results["family"] for results in summary["results"]] == 2 * sorted(gpu.families())
    figure = summary["results"][0]["figures"][0]
    assert {"median", "q1", "q3", "rounds", "rate", "share", "peak_bytes"} <= figure.keys()
    text = (folder / "gpu.md").read_text()
    assert "driver 580.1" in text and "commit 0123456789ab" in text and "| memcheck" in text and "| KD " in text
    shown = capsys.readouterr().out
    assert "7 figures were left out" in shown
    all_ok = f"{len(commands)} of {len(commands)} steps ok"
    assert shown.index("tests-cuda: ok") < shown.index("x eager") < shown.rindex(all_ok)


def test_a_build_that_fails_ends_the_run(play):
    status, commands, folder = play(fail=["build"])
    assert status == 1 and list(commands) == ["build"]
    assert json.loads((folder / "gpu.json").read_text())["steps"][0]["status"] == "FAILED"


@pytest.mark.parametrize("name", ["tests-cuda", "tests-other", "racecheck", "doctor"])
def test_a_step_that_fails_hinders_no_other(play, capsys, name):
    status, commands, _ = play(fail=[name])
    assert status == 1 and f"bench-{gpu.families()[0]}" in commands
    assert capsys.readouterr().out.endswith(f"steps ok; FAILED: {name}\n")


def test_without_compute_sanitizer_nothing_is_proved(play, capsys):
    status, commands, folder = play(sanitizer=None)
    assert status == 0 and not set(gpu.TOOLS) & set(commands)
    assert capsys.readouterr().out.endswith(f"not proved: {', '.join(gpu.TOOLS)}\n")
    assert "compute-sanitizer is not installed" in (folder / "gpu.md").read_text()


def test_benchmarks_share_the_time_by_importance(play):
    families = gpu.families()
    assert families[0] == "softmax_kl" and set(gpu.IMPORTANCE) == set(families)
    _, commands, _ = play(seconds=60.0, spent=2.0)
    seconds = {name: float(c[c.index("--seconds") + 1]) for name, c in commands.items() if "--seconds" in c}
    assert seconds["bench-softmax_kl"] > seconds["bench-attention"] > 0 and sum(seconds.values()) <= 60
    assert not any(name.startswith("more-") for name in commands)
    _, commands, _ = play(seconds=390.0, spent=10.0)
    assert "--quick" in commands["more-softmax_kl"] and "--quick" not in commands["bench-softmax_kl"]
    assert "more-compat" not in commands


def test_parts(play):
    """Each builds; the first tests and the second measures. Together they do what the whole does."""
    (_, first, folder), (_, second, _), (_, whole, _) = (play(part=part) for part in (1, 2, None))
    common = {"build", "doctor", "machine"}
    assert set(first) & set(second) == common and set(first) | set(second) == set(whole)
    assert "tests-cuda" in first and "bench-gram" in second
    names = ("gpu-1", "gpu-2", "gpu")
    assert all((folder / f"{name}{end}").exists() for name in names for end in (".json", ".md"))


def test_what_a_run_found_is_kept_when_it_is_stopped(play, monkeypatch, tmp_path):
    steps, finish = [], gpu.Run.finish

    def stopped(self, step):
        if step.name == "bench-gram":
            raise KeyboardInterrupt
        steps.append(step.name)
        return finish(self, step)

    monkeypatch.setattr(gpu.Run, "finish", stopped)
    with pytest.raises(KeyboardInterrupt):
        play()
    summary = json.loads((tmp_path / "gpu.json").read_text())
    assert [step["name"] for step in summary["steps"]] == steps and steps[-1] == "bench-softmax_kl"
    assert summary["results"][0]["family"] == "softmax_kl"


def test_measured_stands_beside_predicted(play, capsys):
    _, _, folder = play(device="NVIDIA H200", part=2)
    predicted = json.loads((folder / "gpu-2.json").read_text())["predicted"]
    kd = next(f for f in predicted["figures"] if (f["loss"], f["shape"]) == ("KD", "256 x 1000"))
    assert kd["log_ratio"] == pytest.approx(math.log(kd["measured"] / kd["predicted"]), abs=1e-3)
    cases = [tuple(f[key] for key in ("loss", "shape", "dtype", "implementation")) for f in predicted["figures"]]
    assert len(set(cases)) == len(cases)
    ratios = sorted(f["log_ratio"] for f in predicted["figures"])
    assert ratios[0] <= math.log(predicted["median_ratio"]) <= ratios[-1] and predicted["half_within"] > 1
    assert "measured / predicted" in capsys.readouterr().out
    assert "# Predicted and measured" in (folder / "gpu-2.md").read_text()


def test_of_another_gpu_nothing_is_predicted(play):
    _, _, folder = play(part=2)
    assert json.loads((folder / "gpu-2.json").read_text())["predicted"] == {"figures": []}
    assert "# Predicted" not in (folder / "gpu-2.md").read_text()


def test_results_of_an_earlier_run_are_not_reported(play, tmp_path):
    old = tmp_path / "other-gpu" / "softmax_kl.json"
    old.parent.mkdir()
    shutil.copy(RECORDED, old)
    os.utime(old, (0, 0))
    _, _, folder = play()
    assert len(json.loads((folder / "gpu.json").read_text())["results"]) == 2 * len(gpu.families())


# ---- the benchmarks' CUDA path ---------------------------------------------------------------------------------------
def options(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(["--family", "softmax_kl", "--device", "cuda", *arguments])


@pytest.fixture
def fake_device(monkeypatch):
    require_cpu_kernels()
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p fake_gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # for this process, which checks the options
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("KDFAST_COMMIT", "0123456789ab")


def test_losses_are_timed_by_events_and_the_host_by_its_own_clock(fake_device, tmp_path):
    select = "(KD-4x16 or host) and not compile and not Reverse and not CE and not DKD"
    assert bench.run(options("--shape", "4x16", "-k", select, "--out", str(tmp_path))) == 0
    results = json.loads((tmp_path / "fake-gpu" / "softmax_kl.json").read_text())
    assert results["machine"]["device"] == "Fake GPU" and results["machine"]["commit"] == "0123456789ab"
    assert {"driver", "cuda", "torch", "liger"} <= results["machine"].keys()
    figures = results["figures"]
    assert {f["phase"] for f in figures} == {"both", "forward", "backward"}
    assert {f["implementation"] for f in figures} == {"eager", "fallback", "kdfast"}
    assert {f["dtype"] for f in figures} == {"float32", "bfloat16"}
    assert all(f["median"] == f["q1"] == f["q3"] == pytest.approx(fake_gpu.TICK) for f in figures)
    assert all(f["peak_bytes"] == 1000 for f in figures if f["phase"] == "both")
    assert results["host"] and all(f["median"] != pytest.approx(fake_gpu.TICK) for f in results["host"])


def test_kdfast_is_compared_with_eager_alone(fake_device, tmp_path):
    select = f"KD-4x16 and ({gpu.COMPARED}) and not Reverse"
    assert bench.run(options("--shape", "4x16", "-k", select, "--out", str(tmp_path))) == 0
    results = json.loads((tmp_path / "fake-gpu" / "softmax_kl.json").read_text())
    assert {(f["implementation"], f["phase"]) for f in results["figures"]} == {("eager", "both"), ("kdfast", "both")}
    assert results["host"] == results["ceilings"] == []


def test_what_does_not_begin_in_time_is_left_out(fake_device, tmp_path, capfd):
    bench.run(options("--shape", "4x16", "-k", "KD-4x16 and eager", "--seconds", "0", "--out", str(tmp_path)))
    assert "figures were left out: no time left" in capfd.readouterr().out


def test_inputs_rotate_through_more_than_the_cache(monkeypatch):
    harness, softmax_kl = bench.load("harness"), bench.load("bench_softmax_kl")
    case = softmax_kl.case("KD", 4, 16)
    properties = argparse.Namespace(L2_cache_size=2000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    size = 3 * 4 * 16 * 4 + 4 * 8  # student, its gradient, teacher, labels
    with fake_gpu.OnCpu():
        others = len(harness.input_sets(case, "cuda")) - 1
        assert (others - 1) * size < 2 * 2000 <= others * size
        properties.L2_cache_size = 1  # far less than a set: still another one in between
        harness.input_sets.cache_clear()
        assert len(harness.input_sets(case, "cuda")) == 2
        properties.L2_cache_size = 10**9
        harness.input_sets.cache_clear()
        assert len(harness.input_sets(case, "cuda")) == 1 + harness.ROUNDS[1]
    harness.input_sets.cache_clear()
