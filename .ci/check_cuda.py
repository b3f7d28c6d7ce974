"""Compiles every csrc/*/cuda.cu with nvcc; fails on a warning, or where a float32 kernel spills registers.

Usage: python .ci/check_cuda.py [ARCH ...], e.g. 9.0; by default every architecture kdfast is released for.
Needs torch's headers, but no GPU.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import setup  # noqa: E402

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compile_source(source, archs):
    """nvcc's whole output for one source, and whether it compiled."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

    _, home, _ = setup.find_nvcc()
    if not home:
        raise SystemExit("check_cuda: no nvcc under CUDA_HOME or on PATH")
    numbers = [arch.replace(".", "") for arch in archs]
    flags = [*COMMON_NVCC_FLAGS, *setup.NVCC_FLAGS, "-Xcompiler=-fPIC", "-Xptxas=-v", f"-I{ROOT / 'csrc'}"]
    flags += [f"-isystem={path}" for path in include_paths()]
    flags += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    with tempfile.TemporaryDirectory() as folder:
        command = [f"{home}/bin/nvcc", *flags, "-c", str(source), "-o", f"{folder}/out.o"]
        result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout + result.stderr, result.returncode == 0


def demangle(names):
    result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def inspect(output):
    """The kernels in ptxas' report, and what is wrong: warnings, and float32 kernels that spill."""
    kernels = [match.groupdict() for match in ENTRY.finditer(output)]
    for kernel, name in zip(kernels, demangle([kernel["name"] for kernel in kernels]), strict=True):
        kernel["name"] = name
    problems = [line for line in output.splitlines() if re.search(r"\bwarning\b", line, re.IGNORECASE)]
    for kernel in kernels:
        # A kernel that names no other type than float works in float32.
        other = re.search(r"double|Half|BFloat16", kernel["name"])
        if not other and int(kernel["stores"]) + int(kernel["loads"]):
            problems.append("{arch} {name}: {stores} bytes spill stores, {loads} bytes spill loads".format(**kernel))
    return kernels, problems


def main(archs):
    sources = sorted(ROOT.glob("csrc/*/cuda.cu"))
    failed = not sources
    for source in sources:
        output, compiled = compile_source(source, archs)
        kernels, problems = inspect(output)
        failed |= bool(problems) or not compiled or not kernels
        if not compiled:
            print(output)
        most = max((int(kernel["registers"]) for kernel in kernels), default=0)
        print(f"{source.relative_to(ROOT)}: {len(kernels)} kernels on {' '.join(archs)}, at most {most} registers")
        print("".join(f"  {problem}\n" for problem in problems), end="")
    print("check_cuda:", "FAILED" if failed else "no warning, no spilled register in a float32 kernel")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or setup.DEFAULT_ARCHS))
