"""This checkout's losses against another commit's: two processes take turns, the ratio of their times has a spread.

`kdfast bench --against COMMIT` runs this. A process has one thread, so that nothing but the two is compared; the cases
are this checkout's, for both.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAIRS = 9
SECONDS = 0.2  # of one case in one process
ALONE = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "KDFAST_REQUIRE_KERNELS": "1"}


# ---- one process
def measure(family, words, quick, shapes):
    """Print {case: median seconds of forward + backward} of the kdfast that is imported."""
    spec = importlib.util.spec_from_file_location(
        "benchmarks", ROOT / "benchmarks/__init__.py", submodule_search_locations=[str(ROOT / "benchmarks")]
    )
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    harness, bench = (importlib.import_module(f"benchmarks.{name}") for name in ("harness", f"bench_{family}"))
    found = {}
    for case in bench.cases(harness.Settings("cpu", quick), shapes):
        if words and words not in str(case):
            continue
        call = harness.Call(case.kdfast, harness.input_sets(case, "cpu"), "both", "cpu")
        call.warm_up()
        times, begin = [], time.perf_counter()
        while time.perf_counter() - begin < SECONDS or len(times) < 3:
            arguments, _ = call.setup()
            start = time.perf_counter()
            call.run(*arguments)
            times.append(time.perf_counter() - start)
        found[str(case)] = sorted(times)[len(times) // 2]
    print(json.dumps(found))


# ---- both
def checkout(commit):
    """The folder of a commit with its kernels built, made once: build/against/COMMIT of this checkout."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--verify", f"{commit}^{{commit}}"], capture_output=True, text=True)
    if name.returncode:
        raise ValueError(f"--against: {commit} is no commit of {ROOT}")
    folder = ROOT / "build/against" / name.stdout.strip()[:12]
    if not list(folder.glob("kdfast/*.so")):
        print(f"building {commit} in {folder}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        files = subprocess.run([*git, "archive", commit], check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "-x", "-C", str(folder)], input=files, check=True)
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        built = subprocess.run(build, cwd=folder, capture_output=True, text=True)
        if built.returncode:
            raise ValueError(f"--against: {commit} does not build\n{built.stderr[-2000:]}")
    return folder


def compare(commit, family, words, quick, shapes, instruction_set):
    """-> {case: (seconds here, median and quartiles of here / there)}; `instruction_set`: variables for one."""
    folders, seconds = {"here": ROOT, "there": checkout(commit)}, {"here": [], "there": []}
    argument = json.dumps([family, words, quick, shapes])
    for turn in range(PAIRS):
        for name in sorted(folders, reverse=turn % 2 == 1):
            environment = {**os.environ, **ALONE, **instruction_set, "PYTHONPATH": str(folders[name])}
            command = [sys.executable, __file__, argument]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise ValueError(f"--against: {family} cannot be measured in {folders[name]}")
            seconds[name].append(json.loads(done.stdout.splitlines()[-1]))
    found = {}
    for case in seconds["here"][0]:
        ratios = sorted(here[case] / there[case] for here, there in zip(*seconds.values(), strict=True))
        middle = sorted(here[case] for here in seconds["here"])[PAIRS // 2]
        found[case] = middle, ratios[PAIRS // 2], ratios[PAIRS // 4], ratios[-1 - PAIRS // 4]
    return found


def text(commit, found):
    """A table of what `compare` gives."""
    width = max(map(len, found), default=0)
    lines = [f"{'case':<{width}}        ms   time here / {commit}, median and quartiles of {PAIRS} pairs, one thread"]
    for case, (seconds, median, low, high) in found.items():
        lines.append(f"{case:<{width}}  {1e3 * seconds:8.3f}   {median:.2f}  [{low:.2f}, {high:.2f}]")
    return "\n".join(lines)


if __name__ == "__main__":
    measure(*json.loads(sys.argv[1]))
