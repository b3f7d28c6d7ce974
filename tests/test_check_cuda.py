"""The check of the wheel's build in CI finds what nvcc complains about, and that it has looked at all."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / ".ci/check_cuda.py"
if not SCRIPT.exists():
    pytest.skip("needs the source tree", allow_module_level=True)
if not shutil.which("c++filt"):
    pytest.skip("needs binutils", allow_module_level=True)

spec = importlib.util.spec_from_file_location("check_cuda", SCRIPT)
check_cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_cuda)

ARCHS = ["8.0", "12.0+PTX"]
SOURCES = {"first": "csrc/at/cuda.cu", "second": "csrc/kl/cuda.cu"}
KERNEL = """\
  ptxas info    : Compiling entry function '{name}' for '{arch}'
  ptxas info    : Function properties for {name}
      0 bytes stack frame, {stores} bytes spill stores, 0 bytes spill loads
  ptxas info    : Used 46 registers, used 0 barriers
"""


def kernels(*names, archs=("sm_80", "sm_120"), stores=0):
    return "".join(KERNEL.format(name=name, arch=arch, stores=stores) for arch in archs for name in names)


FLOAT, DOUBLE = "_ZN6kdfast1kIfEEvv", "_ZN6kdfast1kIdEEvv"


def log(first="", second=""):
    """What pip prints of a build, as far as it matters."""
    return f"""\
  warning: BuildPy: byte-compiling is disabled, skipping.
  [1/1] c++ -c /src/csrc/at/cpu.cpp -o /src/build/objects/csrc/at/cpu.o -Wall
  /src/csrc/at/cpu.cpp:1:1: warning: not of nvcc
  c++ -Wall -shared /src/build/objects/csrc/at/cpu.o -o build/lib/kdfast/_C.so
  building 'kdfast._cuda' extension
  [1/2] /cuda/bin/nvcc -c -c /src/csrc/at/cuda.cu -o /src/build/objects/csrc/at/cuda.o --threads=2
{first}  [2/2] /cuda/bin/nvcc -c -c /src/csrc/kl/cuda.cu -o /src/build/objects/csrc/kl/cuda.o --threads=2
{second}  c++ -Wall -shared /src/build/objects/csrc/at/cuda.o -o build/lib/kdfast/_cuda.so
  warning: install_lib: byte-compiling is disabled, skipping.
"""


def problems(report, archs=ARCHS):
    return check_cuda.inspect(report, archs)[1]


def test_reports_are_those_of_nvcc():
    reports = check_cuda.reports(log(kernels(FLOAT, DOUBLE), kernels(FLOAT)))
    assert list(reports) == list(SOURCES.values())
    found, wrong = check_cuda.inspect(reports["csrc/at/cuda.cu"], ARCHS)
    assert [kernel["name"] for kernel in found] == ["void kdfast::k<float>()", "void kdfast::k<double>()"] * 2
    assert {kernel["registers"] for kernel in found} == {"46"} and not wrong
    assert not problems(reports["csrc/kl/cuda.cu"])


@pytest.mark.parametrize(
    ("report", "named"),
    [
        (kernels(FLOAT) + "  cuda.cu(47): warning #177-D: variable was declared but never referenced\n", "#177-D"),
        ("  ptxas warning : Registers are spilled\n" + kernels(FLOAT), "ptxas warning"),
        (kernels(FLOAT, stores=8), "sm_80 void kdfast::k<float>(): 8 bytes spill stores"),
        ("", "nvcc reports 0 kernels"),
        (kernels(FLOAT, archs=["sm_80"]), "sm_120 lacks 1 kernels"),
        (kernels(FLOAT) + kernels(DOUBLE, archs=["sm_120"]), "sm_80 lacks 1 kernels"),
        (kernels(FLOAT).replace("Used 46", "Uses 46"), "nvcc reports 2 kernels, 0 of them"),
    ],
    ids=["warning", "ptxas", "spill", "nothing", "no-arch", "no-kernel", "other-words"],
)
def test_what_is_wrong(report, named):
    for where in ("first", "second"):
        reports = check_cuda.reports(log(**{where: report}))
        assert any(named in problem for problem in problems(reports[SOURCES[where]]))


def test_spills_of_wider_types_are_allowed():
    assert not problems(kernels(DOUBLE, stores=8))


def test_main(tmp_path, monkeypatch, capsys):
    """0 only where there is a wheel, and nothing is wrong with any source; objects of before are compiled anew."""
    stale = tmp_path / "build/objects/csrc/at/cuda.o"
    for path in (stale, *(tmp_path / source for source in SOURCES.values())):
        path.parent.mkdir(parents=True)
        path.touch()
    said, code = "", 0

    def pip(command, env, **more):
        assert not stale.exists() and "wheels" in command and env["KDFAST_FORCE_CUDA"] == "1"
        assert env["TORCH_CUDA_ARCH_LIST"] == "8.0 12.0+PTX" and "-Xptxas=-v" in env["NVCC_APPEND_FLAGS"]
        return subprocess.CompletedProcess(command, code, said)

    monkeypatch.setattr(check_cuda, "ROOT", tmp_path)
    demangle = check_cuda.demangle(["_ZN6kdfast1kIfEEvv"])
    monkeypatch.setattr(check_cuda, "demangle", lambda names: demangle * len(names))
    monkeypatch.setattr(check_cuda.subprocess, "run", pip)
    said = log(kernels(FLOAT), kernels(FLOAT))
    assert check_cuda.main("wheels", *ARCHS) == 0
    assert "csrc/kl/cuda.cu: 2 kernels on 8.0 12.0+PTX, at most 46 registers" in capsys.readouterr().out
    said = log(kernels(FLOAT), kernels(FLOAT, stores=4))
    assert check_cuda.main("wheels", *ARCHS) == 1
    said = log(kernels(FLOAT))[: log(kernels(FLOAT)).index("  [2/2]")]  # ninja had nothing to do for the other
    assert check_cuda.main("wheels", *ARCHS) == 1
    said, code = log(kernels(FLOAT), "  cuda.cu(7): error: expected an expression\n"), 1
    with pytest.raises(SystemExit, match="FAILED"):
        check_cuda.main("wheels", *ARCHS)
    assert "expected an expression" in capsys.readouterr().out
