"""Builds the compiled kernels, where the machine can; metadata and settings are in pyproject.toml.

The kernels are plain libraries: kdfast._cpu_<set> (csrc/*/cpu.cpp) for each instruction set, of which one is loaded,
and kdfast._cuda (csrc/*/cuda.cu), which is loaded where torch has CUDA. They use LibTorch's stable ABI and nothing of
Python: one binary serves every torch from 2.11 on and every Python. kdfast._C (csrc/module.cpp, with the pybind11 in
torch) is a Python module that tells `kdfast doctor` how they were built; wheels leave it out, and so need no pybind11.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

TORCH_TARGET = (2, 11)
DEFAULT_ARCHS = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
COMMON_FLAGS = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET[0] << 56 | TORCH_TARGET[1] << 48:#018x}", "-std=c++17", "-O3"]
# No result depends on errno or on floating-point traps, but with them few loops vectorise.
# Functions of vectors are always inlined, so how a vector would be passed (psabi) does not matter.
CXX_FLAGS = [*COMMON_FLAGS, "-g0", "-Wall", "-Wno-psabi", "-fvisibility=hidden"]
CXX_FLAGS += ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
CPU_SETS = {"baseline": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]}  # narrowest first
NVCC_FLAGS = [*COMMON_FLAGS, "-DUSE_CUDA", "-Xcompiler=-Wall,-fvisibility=hidden", "--threads=2"]
CSRC, OBJECTS, STUB = os.path.abspath("csrc"), "build/objects", "build/stub"
WAY_OUT = "KDFAST_CPU_ONLY=1 leaves out the CUDA kernels, KDFAST_NO_EXTENSION=1 all of them (plain PyTorch, slower)."


def decide(env, system, cxx, nvcc, torch_version=None, torch_cuda=None):
    """What to build ("python", "cpu" or "cuda") and, as a clause, why.

    nvcc and torch_cuda are versions or None; a CPU or ROCm torch has torch_cuda None. "python" never depends on torch.
    """
    if env.get("KDFAST_NO_EXTENSION") == "1":
        return "python", "KDFAST_NO_EXTENSION=1 was set at install time"
    if system == "Windows":
        return "python", "no kernels are built on Windows"
    if not cxx:
        return "python", "no C++ compiler was found at install time (CXX, c++, g++, clang++)"
    if env.get("KDFAST_CPU_ONLY") == "1":
        return "cpu", "KDFAST_CPU_ONLY=1 was set at install time"
    if env.get("KDFAST_FORCE_CUDA") == "1":
        if not nvcc:
            raise SystemExit("kdfast: KDFAST_FORCE_CUDA=1, but there is no nvcc under CUDA_HOME or on PATH.")
        return "cuda", f"KDFAST_FORCE_CUDA=1 was set at install time, with nvcc {nvcc}"
    if not nvcc:
        return "cpu", "no working nvcc was found at install time (CUDA_HOME, PATH)"
    if not torch_cuda:
        return "cpu", f"nvcc {nvcc} was found, but torch {torch_version} has no CUDA (a CPU or ROCm build)"
    if nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        return "cpu", f"nvcc is {nvcc}, but torch {torch_version} is for CUDA {torch_cuda}: another major version"
    return "cuda", f"nvcc {nvcc} was found, and torch {torch_version} is for CUDA {torch_cuda}"


def choose_archs(requested, visible, supported):
    """CUDA architectures, e.g. ["8.0", "9.0+PTX"]: those requested, else the visible GPUs', else the default list.

    nvcc may not know some of the last two. The PTX of the newest one serves GPUs that are newer still.
    """
    if requested and requested != "native":
        return requested.replace(";", " ").split()
    wanted = sorted(set(visible) or DEFAULT_ARCHS, key=lambda arch: [int(part) for part in arch.split(".")])
    known = [arch for arch in wanted if arch in supported] or supported[-1:]
    return [*known[:-1], known[-1] + "+PTX"]


def find_cxx():
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((cxx for cxx in candidates if shutil.which(shlex.split(cxx)[0])), None)


def describe(cxx):
    """The compiler's name and version, e.g. "g++ (GCC) 14.2.1"."""
    return subprocess.run([*shlex.split(cxx), "--version"], capture_output=True, text=True).stdout.partition("\n")[0]


def find_nvcc():
    """nvcc's version, toolkit folder and architectures. All three are asked of nvcc: on PATH it may be a script."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("/usr/local/cuda/bin/nvcc")
    if not nvcc:
        return None, None, []

    def ask(*question):
        answer = subprocess.run([nvcc, *question], capture_output=True, text=True)
        return answer.stdout + answer.stderr

    version = re.search(r"release (\d+\.\d+)", ask("--version"))
    home = re.search(r"TOP=(.+)", ask("--dryrun", "x.cu"))
    if not version or not home:  # without a host compiler it says nothing
        return None, None, []
    archs = re.findall(r"compute_(\d+)(\d)\b", ask("--list-gpu-arch"))
    return version[1], os.path.realpath(home[1]), [f"{major}.{minor}" for major, minor in archs]


def find_torch():
    """The torch to build against, or None where there is none from 2.11 on.

    In an isolated build pip hides the environment being installed into. Its torch is the one kdfast will run beside,
    and taking it saves a download, so it is looked up all the same, behind the isolated packages.
    """
    if not find_spec("torch"):
        sys.path.append(sysconfig.get_path("platlib"))
    if not find_spec("torch"):
        return None
    import torch

    return torch if tuple(map(int, torch.__version__.split(".")[:2])) >= TORCH_TARGET else None


def make_plan():
    """The torch to build with, the CUDA toolkit's folder, and what will be recorded in the package."""
    cxx, (nvcc, home, supported), archs = find_cxx(), find_nvcc(), []
    situation, reason = decide(os.environ, platform.system(), cxx, nvcc)
    torch = find_torch() if situation != "python" else None
    if torch:
        situation, reason = decide(os.environ, platform.system(), cxx, nvcc, torch.__version__, torch.version.cuda)
    if torch and situation == "cuda":
        visible = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        visible = [f"{major}.{minor}" for major, minor in visible]
        archs = choose_archs(os.environ.get("TORCH_CUDA_ARCH_LIST"), visible, supported)
    record = {
        "situation": situation,
        "reason": reason,
        "torch": torch.__version__ if torch else None,
        "torch_target": "{}.{}".format(*TORCH_TARGET),
        "cuda": nvcc if situation == "cuda" else None,
        "archs": archs,
        "cpu_sets": cpu_sets() if situation != "python" else [],
        "compiler": describe(cxx) if situation != "python" else None,
    }
    return torch, home, record


def cpu_sets():
    """Instruction sets that kernels are compiled for here."""
    return list(CPU_SETS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]


def cpu_extensions(cpp_extension, record):
    """The module, and a library of kernels for each instruction set."""
    built = {
        "KDFAST_CUDA_VERSION": record["cuda"] or "",
        "KDFAST_CUDA_ARCHS": " ".join(record["archs"]),
        "KDFAST_CPU_SETS": " ".join(record["cpu_sets"]),
    }
    kernels = sorted(map(str, Path("csrc").glob("*/cpu.cpp")))
    libraries = {"_C": (["csrc/module.cpp"], [f'-D{name}="{value}"' for name, value in built.items()])}
    libraries |= {f"_cpu_{name}": (kernels, CPU_SETS[name]) for name in record["cpu_sets"]}
    return [
        Extension(
            f"kdfast.{name}",
            sources=sources,
            include_dirs=[CSRC, *cpp_extension.include_paths()],
            library_dirs=cpp_extension.library_paths(),
            libraries=["torch_cpu"],
            extra_compile_args=[*CXX_FLAGS, *flags],
            language="c++",
        )
        for name, (sources, flags) in libraries.items()
    ]


def cuda_extension(cpp_extension, record, home):
    # cpp_extension reads both, but finds no CUDA_HOME beside a CPU torch and no architecture without a GPU.
    cpp_extension.CUDA_HOME = home
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(record["archs"])
    # By file name: NVIDIA's PyPI packages have no plain libcudart.so.
    cudart = f"-l:libcudart.so.{record['cuda'].split('.')[0]}"
    return Extension(
        "kdfast._cuda",
        sources=sorted(map(str, Path("csrc").glob("*/cuda.cu"))),
        include_dirs=[CSRC, *cpp_extension.include_paths(), f"{home}/include"],
        library_dirs=[STUB, *cpp_extension.library_paths(), f"{home}/lib64", f"{home}/lib"],
        extra_compile_args={"nvcc": NVCC_FLAGS},
        extra_link_args=["-Wl,--no-as-needed", "-ltorch_cuda", "-ltorch_cpu", cudart],
        language="c++",
    )


def extensions(torch, home, record):
    if record["situation"] == "python":
        return []
    if not torch:  # sdists and metadata need no torch, only to know that something will be compiled
        return [Extension("kdfast._cpu_baseline", ["csrc/module.cpp"])]
    from torch.utils import cpp_extension

    cuda = [cuda_extension(cpp_extension, record, home)] if record["situation"] == "cuda" else []
    return [*cpu_extensions(cpp_extension, record), *cuda]


def commands(torch, record):
    class Metadata(egg_info):
        """Adds a label to the version, e.g. "+cpu": wheels with and without CUDA kernels need names of their own."""

        def finalize_options(self):
            if label := os.environ.get("KDFAST_LOCAL_VERSION"):
                self.tag_build = f"+{label}"
            super().finalize_options()

    class BuildPy(build_py):
        """Records the plan in the package, and first removes what an earlier build with another plan left there."""

        def run(self):
            package = Path("kdfast" if self.editable_mode else f"{self.build_lib}/kdfast")
            for library in [file for name in ("_C", "_cpu_*", "_cuda") for file in package.glob(f"{name}.*")]:
                library.unlink()
            super().run()
            (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n")
            print(f"kdfast: building {record['situation']!r}, because {record['reason']}", flush=True)

    class NoTorch(build_ext):
        def run(self):
            raise SystemExit(
                "kdfast: compiling the kernels needs torch >= 2.11, and there is none here. "
                f"Install it first, or leave out --no-build-isolation. {WAY_OUT}"
            )

    class Wheel(bdist_wheel):
        """A wheel for every Python, without the one library that is made for one of them."""

        def run(self):
            modules = self.distribution.ext_modules
            self.distribution.ext_modules = [module for module in modules if module.name != "kdfast._C"]
            super().run()

        def get_tag(self):
            return "py3", "none", super().get_tag()[2]

    common = {"bdist_wheel": Wheel, "build_py": BuildPy, "egg_info": Metadata}
    if not torch:
        return {**common, "build_ext": NoTorch}
    from torch.utils.cpp_extension import BuildExtension

    class BuildKernels(BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            self.build_temp = OBJECTS  # an editable install would otherwise compile everything anew each time

        def get_ext_filename(self, name):
            usual = super().get_ext_filename(name)
            return usual if name.endswith("_C") else usual.partition(".")[0] + ".so"  # without the name of a Python

        def build_extension(self, extension):
            self.build_temp = f"{OBJECTS}/{extension.name}"  # sets compile the same sources
            super().build_extension(extension)

        def run(self):
            try:
                if record["situation"] == "cuda":
                    self.prepare_cuda()
                super().run()
            except Exception as error:
                raise SystemExit(f"kdfast: compiling the kernels failed, see above: {error}\n{WAY_OUT}") from error

        def prepare_cuda(self):
            # The library has to name libtorch_cuda.so, which a CPU torch lacks. An empty one of that name serves
            # beside every torch.
            os.makedirs(STUB, exist_ok=True)
            stub = ["-shared", "-x", "c", "/dev/null", "-Wl,-soname,libtorch_cuda.so", "-o", f"{STUB}/libtorch_cuda.so"]
            subprocess.run([*shlex.split(find_cxx()), *stub], check=True)
            if not torch.version.cuda:  # then cpp_extension does not track the headers of .cu files
                for stale in Path(OBJECTS).glob("kdfast._cuda/csrc/*/cuda.o"):
                    stale.unlink()

    return {**common, "build_ext": BuildKernels}


def main():
    torch, home, record = make_plan()
    if torch:
        os.environ.setdefault("CXX", find_cxx())  # what cpp_extension and setuptools call
    if find_spec("ninja"):  # it compiles in parallel, but only if its program is on PATH
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ["PATH"]])
    # An isolated build installs these first: torch only if there is something to compile and no torch yet.
    needed = [] if record["situation"] == "python" else ["ninja"] if torch else ["ninja", "torch>=2.11"]
    setup(
        ext_modules=extensions(torch, home, record),
        cmdclass=commands(torch, record),
        setup_requires=needed,
    )


if __name__ == "__main__":
    main()
