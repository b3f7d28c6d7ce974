"""The check of the wheel's build in CI finds what nvcc complains about, kernels that became worse than the committed
table says, and that it has looked at all."""

import copy
import importlib.util
import shutil
import struct
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
cuda_table = check_cuda.cuda_table

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
  c++ -Wall -shared /src/build/objects/csrc/at/cpu.o -o build/lib/kdfast/_cpu_baseline.so
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
    stale = tmp_path / "build/objects/kdfast._cuda/csrc/at/cuda.o"
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
    measured = []
    monkeypatch.setattr(check_cuda, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(cuda_table, "measure", lambda family, *_: measured.append(family) or {family: FACTS})
    monkeypatch.setattr(check_cuda.setup, "find_nvcc", lambda: ("13.0", None, []))
    monkeypatch.setattr(check_cuda.subprocess, "run", pip)
    said = log(kernels(FLOAT), kernels(FLOAT))
    assert check_cuda.main("wheels", *ARCHS, record=True) == check_cuda.main("wheels", *ARCHS) == 0
    assert measured == ["at", "kl"] * 2
    assert "csrc/kl/cuda.cu: 2 kernels on 8.0 12.0+PTX, at most 46 registers" in capsys.readouterr().out
    said = log(kernels(FLOAT), kernels(FLOAT, stores=4))
    assert check_cuda.main("wheels", *ARCHS) == 1
    said = log(kernels(FLOAT))[: log(kernels(FLOAT)).index("  [2/2]")]  # ninja had nothing to do for the other
    assert check_cuda.main("wheels", *ARCHS) == 1
    said, code = log(kernels(FLOAT), "  cuda.cu(7): error: expected an expression\n"), 1
    with pytest.raises(SystemExit, match="FAILED"):
        check_cuda.main("wheels", *ARCHS)
    assert "expected an expression" in capsys.readouterr().out


# ---- the table
FACTS = {
    "registers": {"sm_80": 96, "sm_90": 100},
    "shared": {"sm_80": 64, "sm_90": 64},
    "stack": {"sm_80": 0, "sm_90": 0},
    "code": {"sm_80": 3200, "sm_90": 3840},
    "blocks": {"sm_80": 2, "sm_90": 2},
    "loads": {128: 4, 16: 2},
    "stores": {128: 8, 32: 1},
    "generic": 0,
    "local_in_loops": 0,
}
SASS = """
\t\tFunction : _ZN6kdfast1kIfEEvv
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                      /* 0x00000a00ff017b82 */
                                                                              /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDL.64 R8, [R1] ;                           /* 0x0000000001087983 */
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ;   /* 0x0000000602047981 */
        /*0030*/                   LDL R9, [R1+0x8] ;                          /* 0x0000000001097983 */
        /*0040*/               @P1 STG.E.128.STRONG.GPU desc[UR6][R2.64], R4 ; /* 0x0000000402007986 */
        /*0050*/                   STG.E desc[UR6][R2.64+0x10], R8 ;           /* 0x0000000402007986 */
        /*0060*/                   LDG.E.U16 R5, desc[UR6][R2.64] ;            /* 0x0000000602057981 */
        /*0070*/                   LD.E R7, desc[UR6][R2.64] ;                 /* 0x0000000602077980 */
        /*0080*/              @!P2 BRA 0x20 ;                                  /* 0xfffffffc00a48947 */
        /*0090*/                   EXIT ;                                      /* 0x000000000000794d */
        /*00a0*/                   BRA 0xa0;                                   /* 0xfffffffc00fc7947 */

\t\tFunction : _ZN6kdfast1kIdEEvv
        /*0000*/                   STG.E.64 desc[UR6][R2.64], R8 ;             /* 0x0000000402007986 */
"""


def test_sass_is_read():
    found = cuda_table.read_sass(SASS)
    assert found[FLOAT] == {"loads": {128: 1, 16: 1}, "stores": {128: 1, 32: 1}, "generic": 1, "local_in_loops": 1}
    assert found[DOUBLE] == {"loads": {}, "stores": {64: 1}, "generic": 0, "local_in_loops": 0}


def test_cubins_are_read():
    """An ELF file of one kernel with 256 threads in its launch bounds, behind another attribute, and two parameters."""
    names = b"\0.shstrtab\0.text.k\0.nv.info.k\0.nv.shared.k\0"
    info = struct.pack("<BBH", 3, 0x1B, 255) + struct.pack("<BBH3I", 4, 5, 12, 256, 1, 1)
    for number, offset, size in ((1, 8, 40), (0, 0, 8)):
        info += struct.pack("<BBHIHHI", 4, 0x17, 12, 0, number, offset, size << 18 | 0x1F00)
    header = struct.pack("<40xQ10xHHH", 64 + len(names) + len(info), 64, 5, 1)
    sections = [(0, 0, 0), (1, 64, len(names)), (11, 64, 128), (19, 64 + len(names), len(info)), (30, 64, 1088)]
    table = b"".join(struct.pack("<II16xQQ24x", name, 1, at, size) for name, at, size in sections)
    (kernel,) = cuda_table.read_cubin(header.ljust(64, b"\0") + names + info + table).values()
    assert kernel == {"code": 128, "threads": 256, "shared": 1088, "parameters": {0: (0, 8), 1: (8, 40)}}


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "blocks"),
    [("sm_90", 32, 0, 8), ("sm_86", 32, 0, 6), ("sm_90", 128, 0, 2), ("sm_90", 129, 0, 1), ("sm_86", 32, 33 << 10, 2)],
)
def test_occupancy(arch, registers, shared, blocks):
    assert cuda_table.blocks_at_once(arch, 256, registers, shared) == blocks
    assert cuda_table.blocks_at_once(arch, None, registers, shared) == 0


@pytest.mark.parametrize(
    ("planted", "verdict", "named"),
    [
        ({"stores": {32: 33}}, "worse", "stores {128: 8, 32: 1} -> {32: 33}"),
        ({"stores": {128: 4, 32: 17}}, "worse", "stores"),
        ({"stack": {"sm_80": 0, "sm_90": 64}}, "worse", "stack on sm_90 0 -> 64"),
        ({"generic": 1}, "worse", "generic 0 -> 1"),
        ({"local_in_loops": 3}, "worse", "local_in_loops 0 -> 3"),
        ({"registers": {"sm_80": 96, "sm_90": 106}}, "worse", "registers on sm_90 100 -> 106"),
        ({"code": {"sm_80": 3380, "sm_90": 3840}}, "worse", "code on sm_80"),
        ({"blocks": {"sm_80": 2, "sm_90": 1}}, "worse", "blocks on sm_90 2 -> 1"),
        ({"registers": {"sm_80": 96, "sm_90": 94}}, "other", "registers on sm_90 100 -> 94"),
        ({"stores": {128: 9}}, "other", "stores"),
        ({"loads": {128: 1, 16: 2}}, "other", "loads"),
        ({"registers": {"sm_80": 100, "sm_90": 95}, "code": {"sm_80": 3201, "sm_90": 3839}}, None, None),
    ],
)
def test_what_is_worse(planted, verdict, named, tmp_path, monkeypatch, capsys):
    """Against a table that was written and read; worse fails, better has to be recorded, which then passes."""
    monkeypatch.setattr(check_cuda, "TABLE", tmp_path / "table.json")
    assert not check_cuda.check_table({"at k": copy.deepcopy(FACTS), "kl k": FACTS}, "13.0", record=True)
    found = {"at k": FACTS, "kl k": {**FACTS, **planted}}
    capsys.readouterr()
    assert check_cuda.check_table(found, "13.0", record=False) == (verdict is not None)
    said = capsys.readouterr().out
    assert (f"  {verdict}: kl k: {named}" in said and "--record" in said) if verdict else not said
    assert not check_cuda.check_table(found, "12.9", record=False)
    assert not check_cuda.check_table(found, "13.0", record=True)
    assert not check_cuda.check_table(found, "13.0", record=False)


def test_kernels_that_come_and_go_are_recorded():
    assert cuda_table.compare({"new": FACTS}, {"old": FACTS}) == ([], ["new: is new", "old: is gone"])


def test_one_architecture_is_compared_and_recorded_alone(tmp_path):
    old = cuda_table.load(tmp_path / "table.json")
    cuda_table.save(tmp_path / "table.json", "13.0", {"k": copy.deepcopy(FACTS)}, old)
    old = cuda_table.load(tmp_path / "table.json")
    found = {"k": {key: {"sm_80": FACTS[key]["sm_80"]} for key in cuda_table.PER_ARCH}}
    assert cuda_table.compare(found, old["kernels"]) == ([], [])
    found["k"]["registers"]["sm_80"] = 40
    cuda_table.save(tmp_path / "table.json", "13.0", found, old)
    new = cuda_table.load(tmp_path / "table.json")["kernels"]["k"]
    assert new == {**FACTS, "registers": {"sm_80": 40, "sm_90": 100}}
