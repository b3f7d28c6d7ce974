"""Builds csrc/*/cuda.cu as plain C++ over tests/simt/cuda_runtime.h, so that the CUDA kernels run without a GPU.

The scheduler there runs the threads of a block in random order and reports a deadlock; a missing barrier shows as a
wrong number. Slow (tens of milliseconds per op, a millisecond per row), so tests give it few rows.
"""

import functools
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

from kdfast import _kernels

ROOT = Path(__file__).parents[1]
NAMESPACE = "kdfast_simt"  # KD_CUDA_LIBRARY of a KD_SIMT build
FLAGS = [
    *("-x", "c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"),
    # Like nvcc: products and sums contract to fused multiply-adds. That needs a processor that has them.
    *("-march=native", "-ffp-contract=fast"),
    *("-DKD_SIMT", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
]


class Unavailable(Exception):
    """This machine cannot build the library."""


def _compiler():
    compiler = shutil.which("g++")
    if compiler is None:
        raise Unavailable("no g++")
    probe = subprocess.run(
        [compiler, "-x", "c++", "-fsyntax-only", "-"],
        input="#include <ucontext.h>\n#ifndef __GLIBC__\n#error no glibc\n#endif\n",
        capture_output=True,
        text=True,
    )
    if probe.returncode:
        raise Unavailable("no ucontext of glibc")
    return compiler


def _digest(sources, command):
    headers = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh"), *ROOT.glob("tests/simt/*.h")]
    digest = hashlib.sha256(repr((command, torch.__version__, torch.__file__)).encode())
    for path in sorted([*sources, *headers]):
        digest.update(path.read_bytes())
    cpuinfo = Path("/proc/cpuinfo")  # what -march=native means
    flags = re.search(r"^(flags|Features).*$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    digest.update(flags[0].encode() if flags else b"")
    return digest.hexdigest()[:16]


def _build(folder):
    """-> the library, compiled anew if a source, a header, a flag, torch or the processor changed."""
    sources = sorted(ROOT.glob("csrc/*/cuda.cu"))
    includes = [ROOT / "tests/simt", ROOT / "csrc", *cpp_extension.include_paths()]
    command = [_compiler(), *FLAGS, *(f"-I{path}" for path in includes), *map(str, sources)]
    command += [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]
    library = folder / f"simt-{_digest(sources, command)}.so"
    if not library.exists():
        partial = folder / f"{library.name}.{os.getpid()}"
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"building the SIMT library failed:\n{' '.join(command)}\n{done.stdout}{done.stderr}")
        for stale in folder.glob("simt-*.so"):
            stale.unlink(missing_ok=True)
        os.replace(partial, library)
    return library


@functools.lru_cache(maxsize=1)
def kernels(folder):
    """-> op name -> the SIMT build of its CUDA kernel, for `kdfast._kernels.override`."""
    torch.ops.load_library(str(_build(folder)))
    library = torch.library.Library(NAMESPACE, "DEF")
    kernels.library = library  # a Library that is collected takes its ops with it
    for op in _kernels.OPS.values():
        library.define(op.schema)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    built = [name for name in _kernels.OPS if has(f"{NAMESPACE}::{name}", "CPU")]
    return {name: getattr(getattr(torch.ops, NAMESPACE), name).default for name in built}
