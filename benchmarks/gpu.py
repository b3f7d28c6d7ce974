"""Builds kdfast for this machine's GPU, tests it, watches it with compute-sanitizer and measures it, without a network.

    python3 benchmarks/gpu.py [FOLDER] [--seconds N]

needs torch with CUDA, nvcc, ninja, pytest and pytest-benchmark, and takes less than nine minutes on 16 cores. FOLDER,
else $OUT, else gpu-results gets the logs, gpu.json and gpu.md about all steps, and DEVICE/FAMILY.json and .md with the
figures of each family. The table is printed last. Exit status: 0 if all is well, 1 if a step failed, 2 where there is
no GPU. What this machine cannot check, for want of compute-sanitizer, is listed as not proved.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 510.0  # for everything; the rest of the nine minutes is slack
QUICK_BELOW = 120.0  # seconds left for a family under which most of its full benchmarks would be left out
SHOWN_LINES = 25  # of a log, where its step failed
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Installing needs a network, and the SIMT build of the kernels stands in for a GPU.
TESTS = {
    name: ("-m", "pytest", "-q", "tests", "-p", "no:cacheprovider", "-m", "not install", "-k", select)
    for name, select in (("tests-cuda", "cuda"), ("tests-other", "not cuda and not simt"))
}
MACHINE = "import json; from benchmarks import harness; print(json.dumps(harness.machine(harness.Settings('cuda', 0))))"


@dataclass
class Step:
    """What was done and how it ended: "ok", "FAILED" or "not proved"; `reason` if not ok."""

    name: str
    status: str
    seconds: float
    reason: str = ""


def main(arguments):
    options = parse(arguments)
    import_error = "" if find_spec("torch") else f"{sys.executable} has no torch"
    if not import_error:
        import torch

        import_error = "" if torch.cuda.is_available() else "torch sees no CUDA device here"
    if import_error:
        print(f"no GPU: {import_error}, so there is nothing to build for, to test or to measure")
        return 2
    missing = [name for name in ("ninja", "pytest", "pytest_benchmark") if not find_spec(name)]
    if missing:
        print(f"gpu.py needs {', '.join(missing)} in {sys.executable}")
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, results in {options.folder}", flush=True)
    return Run(options.folder, options.seconds).everything()


def parse(arguments):
    parser = argparse.ArgumentParser(prog="gpu.py", description="builds, tests and measures kdfast on this GPU")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=os.environ.get("OUT") or "gpu-results", metavar="FOLDER"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default: %(default).0f)")
    options = parser.parse_args(arguments)
    options.folder = Path(options.folder).resolve()
    return options


def families():
    """Every family that has a bench file."""
    return sorted(path.stem.removeprefix("bench_") for path in ROOT.glob("benchmarks/bench_*.py"))


class Run:
    """The steps, one after another, within a number of seconds."""

    def __init__(self, folder, seconds):
        self.folder, self.end, self.steps = folder, time.monotonic() + seconds, []
        self.begin = time.time()
        self.folder.mkdir(parents=True, exist_ok=True)

    def everything(self):
        if self.step("build", 300, "setup.py", "build_ext", "--inplace"):
            self.step("doctor", 60, "-m", "kdfast", "doctor")
            self.step("machine", 60, "-c", MACHINE)
            self.prove(240)
            self.measure()
        return self.report()

    def left(self):
        """Seconds until the end, at least one."""
        return max(self.end - time.monotonic(), 1.0)

    # ---- steps -------------------------------------------------------------------------------------------------------
    def step(self, name, limit, *command):
        """Run `python *command`; returns whether it went well."""
        return self.finish(
            execute(self.folder / f"{name}.log", name, min(limit, self.left()), sys.executable, *command)
        )

    def finish(self, step):
        """Keep a step and say how it ended; of a log, only the end, and only where it failed."""
        self.steps.append(step)
        print(f"{step.name}: {step.status}, {step.seconds:.0f} s{step.reason and f' ({step.reason})'}", flush=True)
        log = self.folder / f"{step.name}.log"
        if step.status == "FAILED" and log.exists():
            print("\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]))
        return step.status == "ok"

    def prove(self, limit):
        """All tests, and compute-sanitizer's tools on tests/workload.py, at the same time: each needs a core or two."""
        commands = {name: (sys.executable, *command) for name, command in TESTS.items()}
        if program := compute_sanitizer():
            for tool in TOOLS:
                commands[tool] = program, "--tool", tool, "--error-exitcode", "1", sys.executable, "tests/workload.py"

        def run(name):
            log = self.folder / f"{name}.log"
            step = execute(log, name, min(limit, self.left()), *commands[name])
            return judge(step, log) if name in TOOLS else step

        with ThreadPoolExecutor(len(commands)) as pool:
            for step in pool.map(run, commands):
                self.finish(step)
        if not program:
            for tool in TOOLS:
                self.finish(Step(tool, "not proved", 0.0, "compute-sanitizer is not installed"))

    def measure(self):
        """Every family's benchmarks, each with its share of the time that is left."""
        names = families()
        for index, family in enumerate(names):
            seconds = max(self.left() - 5, 1.0) / (len(names) - index)
            # One that began in time may still compile; it is stopped only where that takes too long.
            command = ["-m", "kdfast", "bench", "--device", "cuda", "--family", family, "--out", str(self.folder)]
            command += ["--seconds", f"{0.85 * seconds:.0f}"] + ["--quick"] * (seconds < QUICK_BELOW)
            log = self.folder / f"bench-{family}.log"
            step = execute(log, f"bench-{family}", seconds, sys.executable, *command)
            left_out = re.search(r"\d+ figures were left out.*", log.read_text(errors="replace"))
            step.reason = step.reason or (left_out[0] if left_out else "")
            self.finish(step)

    # ---- report ------------------------------------------------------------------------------------------------------
    def report(self):
        """Write gpu.json and gpu.md, print the tables, and return the exit status."""
        sys.path.insert(0, str(ROOT))
        from benchmarks import report

        written = [path for path in sorted(self.folder.glob("*/*.json")) if path.stat().st_mtime >= self.begin - 1]
        results = [json.loads(path.read_text()) for path in written]
        known = any(step.name == "machine" for step in self.steps)
        machine = read_machine(self.folder / "machine.log") if known else {}
        summary = {"machine": machine, "steps": [asdict(step) for step in self.steps], "results": results}
        (self.folder / "gpu.json").write_text(json.dumps(summary, indent=1) + "\n")
        (self.folder / "gpu.md").write_text(markdown(summary, report))
        for family in results:
            print(f"\n{family['family']}\n{report.text(family)}")
            if family["host"]:
                print("\n" + "\n".join(report.aligned(report.host_rows(family), 1)))
        return verdict(self.steps)


def execute(log, name, limit, *command):
    """Run a command with its output in `log`, and stop it after `limit` seconds."""
    begin = time.monotonic()
    environment = os.environ | {
        # An older CUDA build, or none at all, must not pass for a build for this GPU.
        "KDFAST_FORCE_CUDA": "1",
        "KDFAST_TEST_REQUIRE_KERNELS": "cuda",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    if name in TOOLS:  # an allocation for each tensor, so that the tool sees where it ends
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=limit)
            reason = f"exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            reason = f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the whole group: compilers and pytest run in children
                process.wait()
    return Step(name, "FAILED" if reason else "ok", time.monotonic() - begin, reason)


def compute_sanitizer():
    """The program, beside nvcc or on PATH; None where there is none."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    home = os.environ.get("CUDA_HOME") or Path(nvcc).resolve().parent.parent
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def judge(step, log):
    """A tool that found nothing has to say so, and the workload to end; one that cannot look here proves nothing."""
    output = log.read_text(errors="replace")
    if "Device not supported" in output:
        return Step(step.name, "not proved", step.seconds, "compute-sanitizer does not support this device or driver")
    if step.status == "ok" and not ("workload:" in output and re.search(r"SUMMARY: 0 (errors|hazards)", output)):
        return Step(step.name, "FAILED", step.seconds, "no summary of the tool, or the workload did not end")
    return step


def read_machine(log):
    """What the step "machine" printed last; {} where it failed."""
    try:
        return json.loads(log.read_text().splitlines()[-1])
    except (OSError, IndexError, ValueError):
        return {}


def markdown(summary, report):
    """All steps and all tables."""
    machine = ", ".join(f"{name} {value}" for name, value in summary["machine"].items() if value is not None)
    rows = [["step", "result", "seconds", "why"]]
    rows += [[s["name"], s["status"], f"{s['seconds']:.0f}", s["reason"]] for s in summary["steps"]]
    parts = ["# kdfast on a GPU", machine, report.markdown_table(rows, 2), *map(report.markdown, summary["results"])]
    return "\n\n".join(parts)


def verdict(steps):
    """Say what went well and what not; the exit status."""
    names = {status: [s.name for s in steps if s.status == status] for status in ("ok", "FAILED", "not proved")}
    parts = [f"{len(names['ok'])} of {len(steps)} steps ok"]
    parts += [f"{status}: {', '.join(names[status])}" for status in ("FAILED", "not proved") if names[status]]
    print(f"\n{'; '.join(parts)}", flush=True)
    return 1 if names["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
