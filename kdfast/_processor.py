"""The processor's instruction sets, and huge pages for large tensors in its memory."""

import ctypes
import mmap
import os

__all__ = ["advise_huge_pages", "choose", "instruction_sets"]

# Instruction set -> what it adds to the one before it, in the words of Linux; the narrowest first. They are the levels
# x86-64-v3 and x86-64-v4, for which setup.py compiles.
FLAGS = {
    "baseline": "",
    "avx2": "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave",
    "avx512": "avx512f avx512bw avx512cd avx512dq avx512vl",
}
CPUINFO = "/proc/cpuinfo"
HUGE_PAGE = 2 << 20


def instruction_sets() -> list[str]:
    """Those that this processor and system have, the narrowest first; beyond the first only known on Linux."""
    try:
        with open(CPUINFO) as lines:  # of the first core: the whole file takes long where there are hundreds
            has = set(next((line for line in lines if line.startswith("flags")), "").split())
    except OSError:
        has = set()
    found, needed = [], set()
    for name, flags in FLAGS.items():
        needed |= set(flags.split())
        if needed <= has:
            found.append(name)
    return found


def choose(built: list[str]) -> str:
    """The widest of the instruction sets `built` that this processor has, or the one that KDFAST_ISA names."""
    here = [name for name in instruction_sets() if name in built]
    wanted = os.environ.get("KDFAST_ISA")
    if wanted and wanted not in here:
        raise ValueError(f"KDFAST_ISA must be one of {', '.join(here)} here, got {wanted!r}")
    if not here:
        raise ValueError(f"this processor has none of the instruction sets {', '.join(built)}")
    return wanted or here[-1]


def advise_huge_pages(address: int, size: int) -> None:
    """Ask for huge pages at `size` bytes that have not been touched yet; only Linux has this advice."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or size < 4 * HUGE_PAGE:
        return
    begin = -(-address // HUGE_PAGE) * HUGE_PAGE
    end = (address + size) // HUGE_PAGE * HUGE_PAGE
    madvise = ctypes.CDLL(None).madvise
    madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(mmap.MADV_HUGEPAGE))
