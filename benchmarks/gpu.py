"""Builds kdfast for this machine's GPU, tests it and measures it, within nine minutes and without a network.

    python3 benchmarks/gpu.py [FOLDER]

needs torch with CUDA, nvcc, ninja, pytest and pytest-benchmark. Logs and results go to FOLDER, else to $OUT, else to
gpu-results; the table is printed last. Exit status: 0 if all is well, 1 if a step failed, 2 where there is no GPU.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 510.0  # seconds for everything; the rest of the nine minutes is slack
QUICK_BELOW = 210.0  # seconds left under which the full benchmarks would not finish
SHOWN_LINES = 25


def main(arguments):
    import torch

    if not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device here, so there is nothing to build for, to test or to measure")
        return 2
    begin = time.monotonic()
    out = Path(arguments[0] if arguments else os.environ.get("OUT") or "gpu-results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, results in {out}", flush=True)

    if step("build", out, 300, "setup.py", "build_ext", "--inplace"):
        return 1
    failed = step("doctor", out, 60, "-m", "kdfast", "doctor")
    failed |= step("tests", out, 200, "-m", "pytest", "-q", "tests")
    left = DEADLINE - (time.monotonic() - begin)
    quick = ["--quick"] if left < QUICK_BELOW else []
    failed |= step("bench", out, left, "-m", "kdfast", "bench", "--device", "cuda", "--out", str(out), *quick)
    return int(failed)


def step(name, out, limit, *command):
    """Run `python *command`, keep its output in NAME.log and show the end of it; returns whether it failed."""
    begin = time.monotonic()
    log = out / f"{name}.log"
    # An older CUDA build, or none at all, must not pass for a build for this GPU.
    environment = {**os.environ, "KDFAST_FORCE_CUDA": "1", "PYTHONUNBUFFERED": "1"}
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the whole group: compilers and pytest run in children
            process.wait()
            status = f"stopped after {limit:.0f} s"
    lines = log.read_text(errors="replace").splitlines()
    print(f"\n== {name}: {'ok' if status == 0 else f'FAILED ({status})'}, {time.monotonic() - begin:.0f} s", flush=True)
    print("\n".join(lines if name == "bench" else lines[-SHOWN_LINES:]), flush=True)
    return status != 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
