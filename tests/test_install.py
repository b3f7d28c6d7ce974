"""Every way of installing: what is decided, what is recorded, what is said. Slow ones carry the marker `install`."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from kdfast import _processor

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "setup.py").exists():
    pytest.skip("needs the source tree", allow_module_level=True)


def load_setup():
    spec = importlib.util.spec_from_file_location("kdfast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# A module and an op family that compile in a second; pybind11 alone takes ten.
TINY_MODULE = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() { return PyModule_Create(&module); }
"""
CPU_LIBRARIES = sorted(f"_cpu_{name}.so" for name in load_setup().cpu_sets())
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
TINY_CPU = "int kdfast_tiny = TORCH_TARGET_VERSION >> 56;"
TINY_CUDA = "#include <torch/csrc/stable/tensor.h>\n__global__ void kernel(float* x) { x[threadIdx.x] *= 2; }"


# ---- the decision ----------------------------------------------------------------------------------------------------
# (environment, compiler, nvcc, torch's CUDA) -> (situation, a word of the reason)
CASES = [
    ({"KDFAST_NO_EXTENSION": "1"}, "c++", "13.0", "13.0", "python", "KDFAST_NO_EXTENSION"),
    ({"KDFAST_NO_EXTENSION": "1", "KDFAST_FORCE_CUDA": "1"}, "c++", "13.0", "13.0", "python", "KDFAST_NO_EXTENSION"),
    ({}, None, "13.0", "13.0", "python", "no C++ compiler"),
    ({"KDFAST_CPU_ONLY": "1"}, "c++", "13.0", "13.0", "cpu", "KDFAST_CPU_ONLY"),
    ({}, "c++", None, "13.0", "cpu", "no working nvcc"),
    ({}, "c++", "13.0", None, "cpu", "no CUDA"),
    ({}, "c++", "12.6", "13.0", "cpu", "another major version"),
    ({}, "c++", "13.2", "13.0", "cuda", "nvcc 13.2"),
    ({"KDFAST_FORCE_CUDA": "1"}, "c++", "13.0", None, "cuda", "KDFAST_FORCE_CUDA"),
    ({"KDFAST_FORCE_CUDA": "0", "KDFAST_NO_EXTENSION": "0"}, "c++", "13.0", "13.0", "cuda", "nvcc 13.0"),
]


@pytest.mark.parametrize(("env", "cxx", "nvcc", "cuda", "situation", "reason"), CASES)
def test_decide(env, cxx, nvcc, cuda, situation, reason):
    decided = load_setup().decide(env, "Linux", cxx, nvcc, "2.13.0", cuda)
    assert decided[0] == situation
    assert reason in decided[1]


def test_decide_windows_and_impossible_force():
    assert load_setup().decide({}, "Windows", "cl", "13.0", "2.13.0", "13.0")[0] == "python"
    with pytest.raises(SystemExit, match="no nvcc"):
        load_setup().decide({"KDFAST_FORCE_CUDA": "1"}, "Linux", "c++", None, "2.13.0", None)


def test_choose_archs():
    choose, supported = load_setup().choose_archs, ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
    assert choose(None, [], supported) == ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]
    assert choose("", ["10.0", "9.0", "9.0"], supported) == ["9.0", "10.0+PTX"]
    assert choose("8.0;9.0+PTX 12.0", ["8.6"], supported) == ["8.0", "9.0+PTX", "12.0"]
    assert choose("native", ["8.6"], supported) == ["8.6+PTX"]
    assert choose(None, ["13.0"], supported) == ["12.0+PTX"]  # a GPU newer than this nvcc
    assert choose(None, [], supported[:5]) == ["7.5", "8.0", "8.6", "8.9", "9.0+PTX"]  # CUDA 12.4


def test_instruction_sets_are_those_chosen_from_at_run_time():
    assert list(load_setup().CPU_SETS) == list(_processor.FLAGS)


def test_setup_imports_without_torch():
    code = "import sys; sys.modules['torch'] = None; import setup; print(setup.decide({}, 'Linux', None, None)[0])"
    assert run([sys.executable, "-c", code], cwd=ROOT).stdout.strip() == "python"


# ---- real installs ---------------------------------------------------------------------------------------------------
def run(command, cwd, check=True, **env):
    """Run a command with the environment plus `env` (None removes); KDFAST_ variables of the caller do not leak in."""
    merged = {name: value for name, value in os.environ.items() if not name.startswith("KDFAST_")} | env
    merged = {name: value for name, value in merged.items() if value is not None}
    result = subprocess.run(command, cwd=cwd, env=merged, capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


class Tree:
    """A copy of the source tree and a folder to install into, both inside a path with a space."""

    def __init__(self, folder, tiny):
        self.source, self.site = folder / "a tree", folder / "a site"
        tracked = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "benchmarks", "csrc", "kdfast"]
        self.source.mkdir(parents=True)
        junk = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        for name in tracked:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.source / name, **({"ignore": junk} if copy is shutil.copytree else {}))
        if tiny:
            shutil.rmtree(self.source / "csrc")
            (self.source / "csrc/tiny").mkdir(parents=True)
            (self.source / "csrc/module.cpp").write_text(TINY_MODULE)
            (self.source / "csrc/tiny/cpu.cpp").write_text(TINY_CPU)
            (self.source / "csrc/tiny/cuda.cu").write_text(TINY_CUDA)

    def pip(self, what=".", **options):
        command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
        command += ["--no-cache-dir", "--target", str(self.site), "--upgrade", str(what)]
        return run(command, self.source, **options)

    def record(self):
        return json.loads((self.site / "kdfast/_build.json").read_text())

    def libraries(self):
        return sorted(path.name for path in (self.site / "kdfast").glob("_*.so"))

    def python(self, code, **env):
        # -S: else the finder of an editable kdfast would add its compiled modules to this one.
        path = os.pathsep.join([str(self.site), *(entry for entry in sys.path if "site-packages" in entry)])
        return run([sys.executable, "-S", "-c", code], self.site.parent, PYTHONPATH=path, **env)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path, tiny=True)


@pytest.mark.install
def test_no_compiler(tree, tmp_path):
    (tmp_path / "bin").mkdir()
    tree.pip(PATH=str(tmp_path / "bin"), CXX=None)
    assert tree.libraries() == []
    assert tree.record()["situation"] == "python"
    assert "no C++ compiler" in tree.record()["reason"]
    assert "Root-Is-Purelib: true" in next(tree.site.glob("*.dist-info/WHEEL")).read_text()
    code = "import kdfast, torch; kdfast.KD()(torch.zeros(2, 3), torch.ones(2, 3)); kdfast.KD()(*torch.zeros(2, 2, 3))"
    said = tree.python(code).stderr
    assert said.count("FallbackWarning") == 1
    assert "no C++ compiler" in said


@pytest.mark.install
def test_chosen_by_hand_and_changed_later(tree):
    tree.pip(KDFAST_CPU_ONLY="1")
    assert (tree.libraries(), tree.record()["situation"]) == (CPU_LIBRARIES, "cpu")
    assert tree.record()["torch_target"] == "2.11"
    # The compiled library of the first install must not survive in the second.
    tree.pip(KDFAST_NO_EXTENSION="1")
    assert (tree.libraries(), tree.record()["situation"]) == ([], "python")


@pytest.mark.install
def test_editable(tree, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    command += ["--ignore-installed", "--prefix", str(tmp_path / "prefix"), "-e", "."]
    run(command, tree.source, KDFAST_CPU_ONLY="1")
    tree.site = tree.source
    assert (tree.libraries(), tree.record()["situation"]) == ([MODULE, *CPU_LIBRARIES], "cpu")
    run(command, tree.source, KDFAST_NO_EXTENSION="1")
    assert (tree.libraries(), tree.record()["situation"]) == ([], "python")


@pytest.mark.install
def test_compile_error(tree):
    (tree.source / "csrc/tiny/cpu.cpp").write_text("this is not C++;")
    result = tree.pip(check=False, KDFAST_CPU_ONLY="1")
    assert result.returncode != 0
    assert "KDFAST_NO_EXTENSION=1" in result.stdout + result.stderr


@pytest.mark.install
def test_torch_missing(tree, tmp_path):
    (tmp_path / "torch.py").write_text("__version__ = '2.10.0'")  # too old counts as missing
    result = tree.pip(check=False, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "needs torch >= 2.11" in result.stdout + result.stderr


@pytest.mark.install
def test_cuda_beside_a_cpu_torch(tree):
    if not load_setup().find_nvcc()[0]:
        pytest.skip("needs nvcc")
    tree.pip(KDFAST_FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0+PTX")
    assert tree.libraries() == [*CPU_LIBRARIES, "_cuda.so"]
    assert (tree.record()["situation"], tree.record()["archs"]) == ("cuda", ["9.0+PTX"])
    library = (tree.site / "kdfast/_cuda.so").read_bytes()
    assert b"libtorch_cuda.so" in library
    tree.python("import kdfast")  # the library is left alone where torch has no CUDA


def without_kernels(source):
    """All but the families' CPU kernels: nothing that an install does differently, and slow to compile."""
    for family in (source / "csrc").glob("*/cpu.cpp"):
        family.unlink()
    (source / "csrc/tiny").mkdir()
    (source / "csrc/tiny/cpu.cpp").write_text(TINY_CPU)


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_libraries_have_nothing_of_python():
    libraries = [*(ROOT / "kdfast").glob("_cpu_*.so"), *(ROOT / "kdfast").glob("_cuda.so")]
    if not libraries:
        pytest.skip("nothing is built here")
    needed = run(["nm", "-D", "--undefined-only", *libraries], ROOT).stdout
    assert "aoti_torch" in needed and not re.search(r"\bU _?Py", needed)


@pytest.mark.install
def test_module(tmp_path):
    """The real module, which is compiled in place alone, and says what the record says."""
    tree = Tree(tmp_path, tiny=False)
    without_kernels(tree.source)
    run([sys.executable, "setup.py", "-q", "build_py", "build_ext", "--inplace"], tree.source, KDFAST_CPU_ONLY="1")
    tree.site = tree.source
    info = json.loads(tree.python("import json, kdfast._C; print(json.dumps(kdfast._C.build_info()))").stdout)
    record = json.loads(next(tree.source.glob("build/lib*/kdfast/_build.json")).read_text())
    assert info.pop("compiler").split()[-1] in record["compiler"]
    assert info == {name: record[name] for name in info}
    assert (info["torch_target"], info["cuda"], len(info)) == ("2.11", None, 4)


@pytest.mark.install
def test_sdist_and_wheel(tmp_path):
    """sdist (without torch) -> wheel for any Python -> install."""
    tree = Tree(tmp_path, tiny=False)
    without_kernels(tree.source)
    (tree.source / "kdfast/_C.stale.so").write_text("left by an editable install")
    code = "import sys; sys.modules['torch'] = None; from setuptools import build_meta; build_meta.build_sdist('dist')"
    run([sys.executable, "-c", code], tree.source)
    sdist = next((tree.source / "dist").glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"csrc/module.cpp", "csrc/softmax_kl/math.h", "csrc/softmax_kl/cuda.cu", "setup.py", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", "_build.json")) or name.startswith("build/")]

    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", "dist"]
    run([*command, str(sdist)], tree.source, KDFAST_CPU_ONLY="1", KDFAST_LOCAL_VERSION="cpu")
    wheel = next((tree.source / "dist").glob("*.whl"))
    version, *tag = wheel.stem.split("-")[1:]
    assert version.endswith("+cpu") and tag[:2] == ["py3", "none"] and tag[2] != "any"
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".so")] == [f"kdfast/{name}" for name in CPU_LIBRARIES]
    assert {"kdfast/py.typed", "kdfast/_build.json", "kdfast/ops/softmax_kl.py"} <= set(names)
    assert all(name.startswith("kdfast") for name in names)

    # A machine without a compiler installs and runs it.
    (tmp_path / "bin").mkdir()
    alone = {"PATH": str(tmp_path / "bin"), "CXX": None, "CUDA_HOME": None}
    tree.pip(wheel, **alone)
    said = tree.python("import kdfast.cli; kdfast.cli.main(['doctor'])", **alone).stdout
    assert "cpu: KDFAST_CPU_ONLY=1" in said and "_cpu          loaded: " in said
