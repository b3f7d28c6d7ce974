"""Builds the wheel with its CUDA kernels; fails on a warning of nvcc, where a float32 kernel spills registers, or where
a kernel is other than .ci/cuda_kernels.json says: worse, or better and not yet recorded.

Usage: python .ci/check_cuda.py [--record] WHEEL_FOLDER [ARCH ...], e.g. wheels 9.0; by default every architecture that
kdfast is released for. --record writes the table anew. Needs nvcc, cuobjdump and nvdisasm, and torch and ninja beside
this Python, but no GPU.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / ".ci")]

import cuda_table  # noqa: E402

import setup  # noqa: E402

TABLE = ROOT / ".ci/cuda_kernels.json"

ENTRY = re.compile(
    r"Compiling entry function '(?P<mangled>\S+)' for '(?P<arch>\S+)'(?:(?!Compiling entry).)*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"(?:(?!Compiling entry).)*?Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
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
    for kernel, name in zip(kernels, demangle([kernel["mangled"] for kernel in kernels]), strict=True):
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


def check_table(kernels, nvcc, record):
    """Compare {kernel: facts} with the table, or write it. -> whether something is wrong"""
    table = cuda_table.load(TABLE)
    if not record and table["nvcc"] != nvcc:
        print(f"{TABLE.name} was recorded with nvcc {table['nvcc']}, this is {nvcc}: not compared")
        return False
    worse, other = cuda_table.compare(kernels, table["kernels"])
    print("".join(f"  worse: {line}\n" for line in worse) + "".join(f"  other: {line}\n" for line in other), end="")
    if record:
        cuda_table.save(TABLE, nvcc, kernels, table)
    elif worse:
        print(f"{len(worse)} numbers are worse than {TABLE.name} says; if it has to be so: --record, and say why")
    elif other:
        print(f"{TABLE.name} is out of date: run .ci/check_cuda.py --record, and commit it")
    return bool(worse or other) and not record


def main(folder, *archs, record=False):
    archs = archs or setup.choose_archs(None, [], setup.DEFAULT_ARCHS)
    log, built = build(folder, archs)
    if not built:
        noise = re.compile(r"ptxas info|bytes stack frame|^ *(copying|adding|creating) ")
        print("\n".join(line for line in log.splitlines() if not noise.search(line)))
        raise SystemExit("check_cuda: FAILED, there is no wheel")
    sources, said = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*/cuda.cu")), reports(log)
    failed, measured = not sources, {}
    for source in sources:
        kernels, problems = inspect(said.get(source, ""), archs)
        failed |= bool(problems)
        most = max((int(kernel["registers"]) for kernel in kernels), default=0)
        print(f"{source}: {len(kernels)} kernels on {' '.join(archs)}, at most {most} registers")
        print("".join(f"  {problem}\n" for problem in problems), end="")
        with tempfile.TemporaryDirectory() as scratch:
            compiled = ROOT / setup.OBJECTS / "kdfast._cuda" / source.replace(".cu", ".o")
            measured |= cuda_table.measure(Path(source).parent.name, compiled, kernels, scratch)
    failed |= not failed and check_table(measured, setup.find_nvcc()[0], record)
    print("check_cuda:", "FAILED" if failed else "no warning, no spilled register in a float32 kernel, none worse")
    return int(failed)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--record"]
    if not arguments:
        sys.exit(__doc__)
    sys.exit(main(*arguments, record="--record" in sys.argv))
