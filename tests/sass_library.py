"""Runs the ops of the CUDA build on the CPU, instruction by instruction: nvcc's host code of csrc/*/cuda.cu, linked
against the emulator of tests/sass/, launches nvcc's machine code for sm_90.

Needs nvcc, and cuobjdump and nvdisasm (PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm).

Environment:
    KDFAST_SASS_OBJECTS=FOLDER  has <family>/cuda.o, with code for sm_90, as a build of the wheel leaves it; by default
                                nvcc is run on csrc/
"""

import contextlib
import ctypes
import functools
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import simt_library
import torch
from simt_library import ROOT, Unavailable
from torch.utils import cpp_extension

from kdfast import _kernels

sys.path[:0] = [str(ROOT), str(ROOT / ".ci")]

import cuda_table  # noqa: E402

import setup  # noqa: E402

NAMESPACE = "kdfast_sass"  # of runtime.cpp
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-g1", "-O2", "-march=native", "-ffp-contract=off"]
WRAPPED = (  # runtime.cpp stands in for them
    *("aoti_torch_library_init_impl", "aoti_torch_get_data_ptr", "aoti_torch_empty_strided"),
    *("aoti_torch_create_device_guard", "aoti_torch_delete_device_guard", "aoti_torch_get_current_cuda_stream"),
)


@functools.cache
def tools():
    """The programs nvcc and cuobjdump, and nvcc's version."""
    if not shutil.which("c++filt"):
        raise Unavailable("no c++filt")
    version, home, _ = setup.find_nvcc()
    if not version:
        raise Unavailable("no nvcc")
    try:
        cuobjdump, environment = cuda_table.find_cuobjdump()
    except SystemExit as reason:
        raise Unavailable(str(reason)) from None
    os.environ["PATH"] = environment["PATH"]  # where cuobjdump looks for nvdisasm
    return f"{home}/bin/nvcc", cuobjdump, version


def compiled(folder, source):
    """-> the object that nvcc makes of a .cu file."""
    nvcc, _, version = tools()
    includes = [f"-I{ROOT / 'csrc'}", *(f"-isystem={path}" for path in cpp_extension.include_paths())]
    flags = [*setup.NVCC_FLAGS, *cpp_extension.COMMON_NVCC_FLAGS, "-gencode=arch=compute_90,code=sm_90"]
    command = [nvcc, *flags, "-Xcompiler=-fPIC", *includes, "-c"]
    name = "-".join(("cuda", *source.with_suffix("").parts[-2:]))
    headers = simt_library.headers(ROOT / "csrc")
    return simt_library.make(folder, name, ".o", headers, command, [source])


def linked(folder, name, objects):
    """-> a library of nvcc's objects and of the emulator."""
    headers = simt_library.headers(ROOT / "tests/sass")
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]

    def compile_part(source):
        command = [simt_library.compiler(), *FLAGS, *includes, "-c"]
        return simt_library.make(folder, f"emulator-{source.stem}", ".o", headers, command, [source])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(compile_part, sorted(ROOT.glob("tests/sass/*.cpp"))))
    command = [simt_library.compiler(), "-shared", "-Wl,-z,defs", *(f"-Wl,--wrap={name}" for name in WRAPPED)]
    command += [*(f"-L{path}" for path in cpp_extension.library_paths()), "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
    return simt_library.make(folder, f"sass-{name}", ".so", headers, command, [*objects, *parts])


class Emulator:
    """A library of ops, loaded, whose kernels the emulator finds."""

    def __init__(self, folder, name, objects):
        with simt_library.locked(folder):
            library = linked(folder, name, objects)
            folders = [self._extracted(folder / f"cubins-{name}", path) for path in objects]
            for stale in {*folders[0].parent.iterdir()} - {*folders}:
                shutil.rmtree(stale)
        torch.ops.load_library(str(library))
        self._library = ctypes.CDLL(str(library))
        self._library.sass_counts.restype = ctypes.c_char_p
        self._library.sass_disassembler(tools()[1].encode())
        self._facts = {}
        for cubin in [cubin for place in folders for cubin in sorted(place.glob("*.cubin"))]:
            for kernel, facts in cuda_table.read_cubin(cubin.read_bytes()).items():
                places = [part for _, place in sorted(facts.get("parameters", {}).items()) for part in place]
                array = (ctypes.c_int * len(places))(*places)
                shared = facts.get("shared", 0)
                self._facts[kernel] = facts
                self._library.sass_kernel(kernel.encode(), str(cubin).encode(), shared, array, len(places) // 2)

    @staticmethod
    def _extracted(folder, path):
        """-> a folder with the cubins of sm_90 in an object."""
        place = folder / simt_library.digest([path], ["cuobjdump"])
        if not place.exists():
            partial = Path(f"{place}.{os.getpid()}")
            partial.mkdir(parents=True)
            done = simt_library.run([tools()[1], "-xelf", "sm_90", str(path.resolve())], cwd=partial)
            if done.returncode:
                raise RuntimeError(f"cuobjdump failed: {done.stdout}{done.stderr}")
            os.replace(partial, place)
        return place

    @functools.cached_property
    def blocks_at_once(self):
        """{short name of a kernel: blocks of 256 threads that a multiprocessor holds}."""
        names, found = list(self._facts), {}
        for name, short in zip(names, cuda_table.demangle(names), strict=True):
            facts = self._facts[name]
            shared = max(facts.get("shared", 0) - 1024, 0)  # without the system's
            found[short] = cuda_table.blocks_at_once("sm_90", 256, facts["registers"], shared)
        return found

    @contextlib.contextmanager
    def sampled(self, blocks):
        """Inside, at most so many blocks of a launch run, spread over its grid; counts are as if all had done that."""
        self._library.sass_sample(blocks)
        try:
            yield
        finally:
            self._library.sass_sample(0)

    def run(self, function, *arguments):
        """The function's kernels may touch its own tensors alone, and are counted from here on."""
        self._library.sass_begin()
        return function(*arguments)

    def counted(self, function, *arguments):
        """-> the function's result, and the counts of what it launched."""
        result = self.run(function, *arguments)
        counts = json.loads(self._library.sass_counts())
        names = list(counts["kernels"])
        short = cuda_table.demangle(names) if names else []
        assert len(set(short)) == len(short), f"kernels of one name: {short}"
        counts["kernels"] = {s: counts["kernels"][name] for s, name in zip(short, names, strict=True)}
        return result, counts


@functools.cache
def library(folder):
    """-> the emulator, and op name -> the op of the CUDA build that it runs."""
    if given := os.environ.get("KDFAST_SASS_OBJECTS"):
        objects = sorted(Path(given).glob("*/cuda.o"))
        if not objects:
            raise RuntimeError(f"KDFAST_SASS_OBJECTS: there is no */cuda.o in {given}")
    else:
        with simt_library.locked(folder), ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(functools.partial(compiled, folder), sorted(ROOT.glob("csrc/*/cuda.cu"))))
    emulator = Emulator(folder, "kernels", objects)
    emulator.library = torch.library.Library(NAMESPACE, "DEF")  # one that is collected takes its ops with it
    for op in _kernels.OPS.values():
        emulator.library.define(op.schema)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    built = [name for name in _kernels.OPS if has(f"{NAMESPACE}::{name}", "CPU")]
    return emulator, {name: getattr(getattr(torch.ops, NAMESPACE), name).default for name in built}


def kernels(folder):
    """-> op name -> the op of the CUDA build under the emulator, for `kdfast._kernels.override`."""
    emulator, ops = library(folder)
    return {name: functools.partial(emulator.run, op) for name, op in ops.items()}


@contextlib.contextmanager
def emulated(folder):
    """Inside, ops of tensors on the CPU run under the emulator -> list of (op name, counts, arguments, result)."""
    emulator, ops = library(folder)
    calls = []

    def recorded(name):
        def call(*arguments):
            result, counts = emulator.counted(ops[name], *arguments)
            calls.append((name, counts, arguments, result))
            return result

        return call

    with _kernels.override({name: recorded(name) for name in ops}, ("CPU",)):
        yield calls
