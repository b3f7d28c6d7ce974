"""Which instruction sets this processor has, and which of the libraries built for them is taken."""

import ctypes
import mmap
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdfast import _processor

FLAGS = {name: flags.split() for name, flags in _processor.FLAGS.items()}
EVERY = [flag for flags in FLAGS.values() for flag in flags]


@pytest.mark.parametrize(
    ("flags", "sets"),
    [
        (EVERY, ["baseline", "avx2", "avx512"]),
        (FLAGS["avx2"], ["baseline", "avx2"]),
        (FLAGS["avx512"], ["baseline"]),  # one level is nothing without those below it
        ([flag for flag in EVERY if flag != "avx512vl"], ["baseline", "avx2"]),
        ([flag for flag in EVERY if flag != "movbe"], ["baseline"]),
        ([], ["baseline"]),
    ],
)
def test_instruction_sets(flags, sets, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nflags\t\t: fpu {' '.join(flags)}\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    monkeypatch.setattr(_processor, "CPUINFO", str(path))
    assert _processor.instruction_sets() == sets


def test_not_linux_or_not_x86(tmp_path, monkeypatch):
    monkeypatch.setattr(_processor, "CPUINFO", str(tmp_path / "none"))
    assert _processor.instruction_sets() == ["baseline"]
    (tmp_path / "none").write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert _processor.instruction_sets() == ["baseline"]


def test_glibc_agrees():
    """Its loader chooses by the same levels, which it reads from the processor itself."""
    loader = Path("/lib64/ld-linux-x86-64.so.2")
    said = subprocess.run([loader, "--help"], capture_output=True, text=True).stdout if loader.exists() else ""
    if "x86-64-v4" not in said:
        pytest.skip("needs glibc 2.33 or newer on x86-64")
    levels = {"avx2": "x86-64-v3", "avx512": "x86-64-v4"}
    theirs = [name for name, level in levels.items() if re.search(rf"{level} \(supported", said)]
    assert _processor.instruction_sets() == ["baseline", *theirs]


def test_choose(monkeypatch):
    monkeypatch.setattr(_processor, "instruction_sets", lambda: ["baseline", "avx2"])
    monkeypatch.delenv("KDFAST_ISA", raising=False)
    assert _processor.choose(["avx2", "avx512", "baseline"]) == "avx2"
    assert _processor.choose(["baseline"]) == "baseline"
    with pytest.raises(ValueError, match="none of the instruction sets avx512"):
        _processor.choose(["avx512"])
    monkeypatch.setenv("KDFAST_ISA", "")
    assert _processor.choose(["avx2", "baseline"]) == "avx2"
    monkeypatch.setenv("KDFAST_ISA", "baseline")
    assert _processor.choose(["avx2", "baseline"]) == "baseline"
    monkeypatch.setenv("KDFAST_ISA", "avx512")
    with pytest.raises(ValueError, match="KDFAST_ISA must be one of baseline, avx2 here, got 'avx512'"):
        _processor.choose(["avx2", "avx512", "baseline"])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this advice")
def test_huge_pages():
    """The advice is for the whole pages inside the tensor, and the kernel takes it."""
    bank = torch.empty(6 * _processor.HUGE_PAGE, dtype=torch.uint8)
    _processor.advise_huge_pages(bank.data_ptr(), bank.nbytes)
    maps = Path("/proc/self/smaps").read_text()
    if "VmFlags" not in maps or not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("this kernel does not say what was advised")
    inside = bank.data_ptr() + 2 * _processor.HUGE_PAGE
    regions = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags:(.*?)$", maps, re.MULTILINE | re.DOTALL)
    flags = next(flags for begin, end, flags in regions if int(begin, 16) <= inside < int(end, 16))
    assert "hg" in flags.split()
    assert bank.fill_(7).eq(7).all()


def test_small_tensors_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("an advice for a small tensor"))
    _processor.advise_huge_pages(1 << 30, 4 * _processor.HUGE_PAGE - 1)
