"""Builds .cu sources as plain C++ over tests/simt/, so that the CUDA kernels run without a GPU.

There a scheduler runs the threads of a block in random order, and faults of a kernel are exceptions: see the headers
of tests/simt/scheduler.cpp and memory.cpp. Slow (up to a millisecond per block), so tests give it few rows.

Environment:
    KDFAST_SIMT=VARIANT        one of VARIANTS below; by default "races". "sass" is no build of this file, but nvcc's
                               machine code under the emulator of sass_library.py
    KDFAST_SIMT_SEED=NUMBER    the order of threads; by default another one in each test
    KDFAST_SIMT_CSRC=FOLDER    the sources, instead of csrc/
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import cpp_extension

from kdfast import _kernels

ROOT = Path(__file__).parents[1]
RUNTIME = [ROOT / "tests/simt/scheduler.cpp", ROOT / "tests/simt/memory.cpp"]
NAMESPACE = "kdfast_simt"  # KD_CUDA_LIBRARY of a KD_SIMT build
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-g1"]
RUNTIME_FLAGS = ["-O3"]
KERNEL_FLAGS = [
    *("-x", "c++", "-O1", "-DKD_SIMT", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
    # Like nvcc: products and sums contract to fused multiply-adds. That needs a processor that has them.
    *("-march=native", "-ffp-contract=fast"),
]


@dataclass(frozen=True)
class Variant:
    """Flags for kernels, and for everything."""

    kernels: tuple = ()
    all: tuple = ()


VARIANTS = {
    "plain": Variant(),  # finds what random schedules and poisoned memory find, as every variant does
    "races": Variant(kernels=("-fsanitize=thread",)),  # the sanitizer's runtime is memory.cpp
    # Accesses out of bounds and undefined behaviour. The process must start as `sanitized` says, and ends at a fault.
    "address": Variant(all=("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")),
}


class Unavailable(Exception):
    """This machine cannot build the library."""


COMPILERS = ("g++", "c++", "clang++")
PROBE = """
#include <cstdint>
#include <ucontext.h>
#ifndef __GLIBC__
#error no glibc
#endif
"""


def run(command, **options):
    """A compiler, which in a process that runs the variant "address" need not be watched itself."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


@functools.lru_cache(maxsize=1)
def compiler():
    """The first compiler that takes the flags of a kernel, and finds its headers and glibc's ucontext."""
    reasons = []
    for name in COMPILERS:
        if not (compiler := shutil.which(name)):
            reasons.append(f"no {name}")
            continue
        command = [compiler, *FLAGS, *KERNEL_FLAGS, *VARIANTS["races"].kernels, "-c", "-", "-o", os.devnull]
        probe = run(command, input=PROBE)
        if not probe.returncode:
            return compiler
        reasons.append(f"{name}: {(probe.stderr.strip() or 'no reason given').splitlines()[0]}")
    raise Unavailable("; ".join(reasons))


def sanitized():
    """The environment of a process that runs the variant "address"."""
    names = "libasan.so", f"libclang_rt.asan-{platform.machine()}.so"  # of gcc, of clang
    ask = ([compiler(), f"-print-file-name={name}"] for name in names)
    found = (run(command).stdout.strip() for command in ask)
    runtime = next(filter(os.path.isabs, found), None)
    if runtime is None:
        raise Unavailable("no address sanitizer")
    return {
        **os.environ,
        # First of all, so that torch's tensors, too, have guarded ends; it looks for exceptions in libstdc++ at once.
        "LD_PRELOAD": f"{runtime}:libstdc++.so.6",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",  # neither Python nor fibers bear them
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "KDFAST_SIMT": "address",
    }


def digest(inputs, command):
    """What a made file depends on, in 16 digits."""
    result = hashlib.sha256(repr((command, torch.__version__, torch.__file__)).encode())
    for path in inputs:
        result.update(path.read_bytes())
    cpuinfo = Path("/proc/cpuinfo")  # what -march=native means
    flags = re.search(r"^(flags|Features).*$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    result.update(flags[0].encode() if flags else b"")
    return result.hexdigest()[:16]


def headers(*folders):
    return [path for folder in folders for pattern in ("*.h", "*.cuh") for path in folder.rglob(pattern)]


def make(folder, name, suffix, headers, command, inputs):
    """-> what `command` makes of `inputs`, anew if one of them, a header, a flag, torch or the processor changed."""
    made = folder / f"{name}-{digest([*inputs, *sorted(headers)], command)}{suffix}"
    if not made.exists():
        partial = folder / f"{made.name}.{os.getpid()}"
        done = run([*command, *map(str, inputs), "-o", str(partial)])
        if done.returncode:
            raise RuntimeError(f"building {name} failed:\n{' '.join(command)}\n{done.stdout}{done.stderr}")
        for stale in folder.glob(f"{name}-*{suffix}"):
            stale.unlink(missing_ok=True)
        os.replace(partial, made)
    return made


@contextlib.contextmanager
def locked(folder):
    """Processes that run side by side build once."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(folder, name, sources, variant, csrc=ROOT / "csrc"):
    """-> a library of the .cu files `sources`, with the headers of `csrc`, each source compiled on its own."""
    flags, included = VARIANTS[variant], headers(csrc, ROOT / "tests/simt")
    includes = [f"-I{path}" for path in (ROOT / "tests/simt", csrc, *cpp_extension.include_paths())]

    def compile_source(source):
        own = RUNTIME_FLAGS if source in RUNTIME else [*KERNEL_FLAGS, *flags.kernels, *includes]
        part = "runtime" if source in RUNTIME else name  # of which one is enough
        stem = "-".join((part, variant, *source.with_suffix("").parts[-2:]))
        return make(folder, stem, ".o", included, [compiler(), *FLAGS, *own, *flags.all, "-c"], [source])

    link = [compiler(), "-shared", "-Wl,-z,defs", *flags.all]
    link += [*(f"-L{path}" for path in cpp_extension.library_paths()), "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
    with locked(folder):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_source, [*sources, *RUNTIME]))
        return make(folder, f"{name}-{variant}", ".so", included, link, objects)


@functools.lru_cache(maxsize=1)
def kernels(folder):
    """-> op name -> the SIMT build of its CUDA kernel, for `kdfast._kernels.override`."""
    variant, csrc = os.environ.get("KDFAST_SIMT", "races"), Path(os.environ.get("KDFAST_SIMT_CSRC", ROOT / "csrc"))
    torch.ops.load_library(str(build(folder, "kernels", sorted(csrc.glob("*/cuda.cu")), variant, csrc)))
    library = torch.library.Library(NAMESPACE, "DEF")
    kernels.library = library  # a Library that is collected takes its ops with it
    for op in _kernels.OPS.values():
        library.define(op.schema)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    built = [name for name in _kernels.OPS if has(f"{NAMESPACE}::{name}", "CPU")]
    return {name: getattr(getattr(torch.ops, NAMESPACE), name).default for name in built}
