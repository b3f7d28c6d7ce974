"""Builds kdfast for this machine's GPU, tests it, watches it with compute-sanitizer and measures it, without a network.

    python3 benchmarks/gpu.py [FOLDER] [--part 1|2] [--seconds N]

needs torch with CUDA, nvcc, ninja, pytest and pytest-benchmark. Part 1 builds for the GPU and tests, part 2 measures;
that builds as well, which takes no time where part 1 has. Each takes six and a half minutes at most, both thirteen.

FOLDER, else $OUT, else gpu-results gets the logs, after each step gpu.json (of a part gpu-1.json, ...) about all steps
so far, and at the end gpu.md. DEVICE/FAMILY.json and .md have the figures of each family: every case in eager PyTorch
and with kdfast, forward + backward, the most used losses first. Where time is left, more/DEVICE/ has the other
implementations and the host's overhead, at the first shape of each loss. Measured times stand beside those that
benchmarks/predict.py predicted for such a GPU. The tables are printed last.

Exit status: 0 if all is well, 1 if a step failed, 2 where there is no GPU. What this machine cannot check, for want of
compute-sanitizer, is listed as not proved.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 390.0  # for a part; together thirteen minutes
WORTH_STARTING = 25.0  # seconds left for a family, of which a process and torch.compile take most
# Families by importance -> the share of the time that each gets; others come after them.
IMPORTANCE = {
    **{"softmax_kl": 4, "gram": 3, "pairwise": 3, "feature": 3, "nce": 2, "attention": 1, "teachers": 2},
    **{"mixed_logits": 2, "divergence": 2, "moments": 1, "linear": 2, "ops": 1, "step": 2, "compat": 1},
}
COMPARED = "ceiling or (both and not compile and not fallback and not host)"  # of a family's figures
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
    os.environ["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())  # an image may ask for all
    return Run(options.folder, options.seconds, options.part).everything()


def parse(arguments):
    parser = argparse.ArgumentParser(prog="gpu.py", description="builds, tests and measures kdfast on this GPU")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=os.environ.get("OUT") or "gpu-results", metavar="FOLDER"
    )
    parser.add_argument("--part", type=int, choices=(1, 2), help="1: build and test; 2: measure (default: both)")
    parser.add_argument("--seconds", type=float, help=f"for everything (default: {SECONDS:.0f} a part)")
    options = parser.parse_args(arguments)
    options.seconds = options.seconds or (SECONDS if options.part else 2 * SECONDS)
    options.folder = Path(options.folder).resolve()
    return options


def families():
    """Every family that has a bench file, the most important first."""
    names = sorted(path.stem.removeprefix("bench_") for path in ROOT.glob("benchmarks/bench_*.py"))
    order = [*IMPORTANCE, *names]
    return sorted(names, key=order.index)


class Run:
    """The steps, one after another, within a number of seconds."""

    def __init__(self, folder, seconds, part=None):
        self.folder, self.end, self.part, self.steps = folder, time.monotonic() + seconds, part, []
        self.begin = time.time()
        self.folder.mkdir(parents=True, exist_ok=True)

    def everything(self):
        if self.step("build", 240, "setup.py", "build_ext", "--inplace"):
            self.step("doctor", 60, "-m", "kdfast", "doctor")
            self.step("machine", 60, "-c", MACHINE)
            if self.part != 2:
                self.prove(240)
            if self.part != 1:
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
        self.write()
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
        """kdfast and eager PyTorch in every case; then, where time is left, the rest at the first shapes."""
        names = families()
        weights = [IMPORTANCE.get(name, 1) for name in names]
        for index, family in enumerate(names):
            share = weights[index] / sum(weights[index:])
            self.bench(f"bench-{family}", family, share * max(self.left() - 5, 1), self.folder, "-k", COMPARED)
        for family in names:
            if self.left() - 5 > WORTH_STARTING:
                self.bench(f"more-{family}", family, self.left() - 5, self.folder / "more", "--quick")

    def bench(self, name, family, seconds, folder, *options):
        """One run of `kdfast bench`, which begins no figure late; it is stopped where one takes too long."""
        command = ["-m", "kdfast", "bench", "--device", "cuda", "--family", family, "--out", str(folder)]
        command += ["--seconds", f"{0.85 * seconds:.0f}", *options]
        log = self.folder / f"{name}.log"
        step = execute(log, name, seconds, sys.executable, *command)
        left_out = re.search(r"\d+ figures were left out.*", log.read_text(errors="replace"))
        step.reason = step.reason or (left_out[0] if left_out else "")
        self.finish(step)

    # ---- report ------------------------------------------------------------------------------------------------------
    def written(self):
        """Results files of this run, those of the comparison first."""
        paths = [path for place in ("*", "more/*") for path in sorted(self.folder.glob(f"{place}/*.json"))]
        return [path for path in paths if path.stat().st_mtime >= self.begin - 1]

    def write(self):
        """Write gpu.json as far as things have come; returns its content and its path."""
        sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)
        results = [json.loads(path.read_text()) for path in self.written()]
        known = any(step.name == "machine" for step in self.steps)
        machine = read_machine(self.folder / "machine.log") if known else {}
        summary = {"machine": machine, "steps": [asdict(step) for step in self.steps]}
        summary |= {"predicted": predicted(results), "results": results}
        path = self.folder / (f"gpu-{self.part}.json" if self.part else "gpu.json")
        path.write_text(json.dumps(summary, indent=1) + "\n")
        return summary, path

    def report(self):
        """Write gpu.md, print the tables, and return the exit status."""
        summary, path = self.write()
        from benchmarks import report

        path.with_suffix(".md").write_text(markdown(summary, report))
        for family in summary["results"]:
            print(f"\n{family['family']}\n{report.text(family)}")
            if family["host"]:
                print("\n" + "\n".join(report.aligned(report.host_rows(family), 1)))
        if summary["predicted"]["figures"]:
            print(f"\n{PREDICTED.format(**summary['predicted'])}")
            print("\n".join(report.aligned(compared_rows(summary), 3)))
        return verdict(self.steps)


PREDICTED = (
    "Measured beside what had been predicted without a GPU, forward + backward. Half of the figures are within a "
    "factor of {half_within:.2f}; measured / predicted is {median_ratio:.2f} in the median."
)


def predicted(results):
    """Each measured figure of which a prediction exists, the logarithm of measured over predicted, and what is typical.

    The first measurement of a case counts.
    """
    from benchmarks import predict

    found = {}
    for family in results:
        for figure in predict.compared(family):
            found.setdefault(tuple(figure[key] for key in predict.FIGURE), figure)
    errors = [figure["log_ratio"] for figure in found.values()]
    typical = {"median_ratio": math.exp(statistics.median(errors))} if errors else {}
    typical |= {"half_within": math.exp(statistics.median(map(abs, errors)))} if errors else {}
    return {"figures": list(found.values()), **typical}


def compared_rows(summary):
    from benchmarks import predict

    return predict.compared_rows(summary["predicted"]["figures"])


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
    parts = ["# kdfast on a GPU", machine, report.markdown_table(rows, 2)]
    if summary["predicted"]["figures"]:
        words = PREDICTED.format(**summary["predicted"])
        parts += ["# Predicted and measured", words, report.markdown_table(compared_rows(summary), 3)]
    parts += map(report.markdown, summary["results"])
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
