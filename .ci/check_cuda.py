"""Builds the wheel with its CUDA kernels; fails on a warning of nvcc, or where a float32 kernel spills registers.

Usage: python .ci/check_cuda.py WHEEL_FOLDER [ARCH ...], e.g. wheels 9.0; by default every architecture kdfast is
released for. Needs nvcc, and torch and ninja beside this Python, but no GPU.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import setup  # noqa: E402

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'(?:(?!Compiling entry).)*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads(?:(?!Compiling entry).)*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def build(folder, archs):
    """Build the wheel into `folder`; all that pip and the compilers said, and whether it was built."""
    for stale in ROOT.glob(f"{setup.OBJECTS}/kdfast._cuda/csrc/*/cuda.o"):  # ninja would not compile those again
        stale.unlink()
    flags = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -Xptxas=-v"
    settings = {"KDFAST_FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": " ".join(archs), "NVCC_APPEND_FLAGS": flags}
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", folder, str(ROOT)]
    result = subprocess.run(
        command, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return result.stdout, result.returncode == 0


def reports(log):
    """What nvcc said of each csrc/*/cuda.cu. Pip, setuptools and the other compilers have warnings of their own."""
    said, current = {}, []
    for line in log.splitlines():
        # Ninja prints a command when it has ended, then what it said; the linker comes after the last one.
        if re.match(r" *\[\d+/\d+\] ", line) or " -shared " in line:
            source = re.search(r"\bcsrc/\w+/cuda\.cu\b", line)
            current = said.setdefault(source[0], []) if source else []
        else:
            current.append(line.strip())
    return {source: "\n".join(lines) for source, lines in said.items()}


def demangle(names):
    result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def inspect(report, archs):
    """The kernels in a source's report, and what is wrong: warnings, float32 kernels that spill, kernels not seen."""
    kernels = [match.groupdict() for match in ENTRY.finditer(report)]
    for kernel, name in zip(kernels, demangle([kernel["name"] for kernel in kernels]), strict=True):
        kernel["name"] = name
    problems = [line for line in report.splitlines() if re.search(r"\bwarning\b", line, re.IGNORECASE)]
    for kernel in kernels:
        # A kernel that names no other type than float works in float32.
        other = re.search(r"double|Half|BFloat16", kernel["name"])
        if not other and int(kernel["stores"]) + int(kernel["loads"]):
            problems.append("{arch} {name}: {stores} bytes spill stores, {loads} bytes spill loads".format(**kernel))
    if len(kernels) != (entries := report.count("Compiling entry function")) or not kernels:
        problems.append(f"nvcc reports {entries} kernels, {len(kernels)} of them in words that are known here")
    names = {kernel["name"] for kernel in kernels}
    for arch in archs:
        arch = f"sm_{arch.removesuffix('+PTX').replace('.', '')}"
        if unseen := names - {kernel["name"] for kernel in kernels if kernel["arch"] == arch}:
            problems.append(f"{arch} lacks {len(unseen)} kernels that another architecture has, e.g. {min(unseen)}")
    return kernels, problems


def main(folder, *archs):
    archs = archs or setup.choose_archs(None, [], setup.DEFAULT_ARCHS)
    log, built = build(folder, archs)
    if not built:
        noise = re.compile(r"ptxas info|bytes stack frame|^ *(copying|adding|creating) ")
        print("\n".join(line for line in log.splitlines() if not noise.search(line)))
        raise SystemExit("check_cuda: FAILED, there is no wheel")
    sources, said = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*/cuda.cu")), reports(log)
    failed = not sources
    for source in sources:
        kernels, problems = inspect(said.get(source, ""), archs)
        failed |= bool(problems)
        most = max((int(kernel["registers"]) for kernel in kernels), default=0)
        print(f"{source}: {len(kernels)} kernels on {' '.join(archs)}, at most {most} registers")
        print("".join(f"  {problem}\n" for problem in problems), end="")
    print("check_cuda:", "FAILED" if failed else "no warning, no spilled register in a float32 kernel")
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
