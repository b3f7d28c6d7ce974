"""`kdfast bench`: measures the losses on this machine, prints one table and writes JSON, Markdown and a chart.

The benchmarks are pytest-benchmark files, of which each bench_FAMILY.py is a family.
"""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kdfast._extras import install
from kdfast.runs.errors import RunError
from kdfast.runs.options import device, whole

PACKAGE = Path(__file__).resolve().parent
FOLDERS = (PACKAGE / "benchmarks", PACKAGE.parent / "benchmarks")  # in an installed package, beside one in a checkout
FAMILIES = tuple(sorted(p.stem.removeprefix("bench_") for folder in FOLDERS for p in folder.glob("bench_*.py")))
REQUIRED = ("pytest", "pytest_benchmark")
# An instruction set -> variables that hold kdfast, and torch and its libraries, to it.
SETS = {
    "avx512": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
NOTHING_SELECTED = 5  # pytest's exit status


def add_arguments(parser: Any) -> Any:
    """Declare the options of `kdfast bench`."""
    parser.add_argument("--out", default="bench-results", help="folder for the results (default: %(default)s)")
    parser.add_argument("--family", choices=FAMILIES, metavar="NAME", help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (default: cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--isa", choices=SETS, help="hold torch and kdfast to this instruction set of a CPU")
    parser.add_argument("--quick", action="store_true", help="one shape a loss and few rounds: a look, not a result")
    parser.add_argument("--seconds", type=float, metavar="N", help="leave out what has not begun by then")
    parser.add_argument(
        "--shape", action="append", default=[], metavar="ROWSxCOLS", help="measure this shape (repeatable)"
    )
    parser.add_argument(
        "--against",
        metavar="COMMIT",
        help="in a checkout: time a --family against this commit's, in pairs; -k is then a part of a case's name",
    )
    parser.add_argument("-k", dest="select", metavar="EXPRESSION", help="only the figures that pytest -k selects")
    parser.add_argument(
        "--readme", metavar="FILE", help="measure nothing; write this README's table anew from the results in --out"
    )


def run(options: Any) -> int:
    """Run the benchmarks as `options` say; returns the exit status."""
    try:
        check(options)
    except RunError as error:
        print(f"kdfast bench: error: {error}", file=sys.stderr)
        return 2
    if options.readme:
        return write_readme(options.readme, options.out)
    missing = [name for name in REQUIRED if not installed(name)]
    if options.against and not missing:
        return against(options)
    if missing:
        needed = install("bench", [name.replace("_", "-") for name in missing])
        print(f"kdfast bench needs {' and '.join(missing)}: {needed}", file=sys.stderr)
        return 2
    chart = installed("matplotlib")
    if not chart:
        print(f"kdfast bench draws no chart without matplotlib: {install('bench', ['matplotlib'])}", file=sys.stderr)
    families = [options.family] if options.family else FAMILIES
    statuses = [run_family(family, options, chart) for family in families]
    return max((status for status in statuses if status != NOTHING_SELECTED), default=NOTHING_SELECTED)


def check(options: Any) -> Any:
    """Raise a RunError that names an option which cannot be, before anything is measured."""
    device("--device", options.device)
    if options.threads is not None:
        whole(1, 1024)("--threads", options.threads)
    if options.seconds is not None and not options.seconds >= 0:
        raise RunError(f"--seconds: got {options.seconds}, expected a number of at least 0")
    if options.against:
        if not (options.family and (FOLDERS[1].parent / ".git").exists()):
            raise RunError("--against: needs a --family, and a kdfast that is imported from a git checkout")
        if options.device != "cpu" or options.threads is not None or options.seconds is not None:
            raise RunError("--against: measures one thread of a CPU, without --device, --threads and --seconds")
    for shape in options.shape:
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
            raise RunError(f"--shape: got {shape!r}, expected sizes of at least 1 as in 256x1000")
    if options.readme:
        if not Path(options.readme).is_file():
            raise RunError(f"--readme: {options.readme} is not a file; expected a README with the table's marks")
        return
    out = Path(options.out)
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RunError(f"--out: {there} is a file; expected a folder")
    if not os.access(there, os.W_OK):
        raise RunError(f"--out: cannot write to {there}")


def against(options: Any) -> int:
    """Print how the time of each case compares with another commit's; returns the exit status."""
    other = load("against")
    shapes = [list(map(int, shape.split("x"))) for shape in options.shape]
    chosen = (options.family, options.select or "", options.quick, shapes, variables(options.isa))
    try:
        found = other.compare(options.against, *chosen)
    except ValueError as error:
        print(f"kdfast bench: error: {error}", file=sys.stderr)
        return 2
    print(other.text(options.against, found))
    return 0 if found else NOTHING_SELECTED


def run_family(family: Any, options: Any, chart: Any) -> int:
    """Measure one family and report it; returns the exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw.json"
        status = measure(family, options, raw)
        record = json.loads(raw.read_text()) if raw.exists() and raw.stat().st_size else {}
    if not any(benchmark["extra_info"].get("kind") == "loss" for benchmark in record.get("benchmarks", ())):
        print(f"kdfast bench: no loss of {family} was measured", file=sys.stderr)
        return status or NOTHING_SELECTED
    report = load("report")
    results = report.collect(record, family)
    path = report.save(results, options.out, chart)
    print(f"\n{report.text(results)}\n\nwritten: {path} and what is beside it", flush=True)
    return status


def measure(family: Any, options: Any, raw: Any) -> Any:
    """Run the family's bench file under pytest in a process of its own; its figures go to the file `raw`."""
    command = [sys.executable, "-m", "pytest", str(benchmarks_folder() / f"bench_{family}.py"), "-q"]
    # The project's own pytest settings are for its tests, and an installed package is no place for a cache.
    command += ["-o", "addopts=", "-p", "no:cacheprovider", "--disable-warnings"]
    command += ["--benchmark-quiet", f"--benchmark-json={raw}"]
    command += [f"--bench-device={options.device}", *(f"--bench-shape={shape}" for shape in options.shape)]
    command += ["--bench-quick"] * options.quick
    command += [f"--bench-threads={options.threads}"] if options.threads else []
    command += [f"--bench-seconds={options.seconds}"] if options.seconds is not None else []
    command += ["-k", options.select] if options.select else []
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    # torch.compile's pool of workers would start, and load torch, while the first figures are measured.
    environment = {**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment |= variables(options.isa)
    return subprocess.run(command, env=environment).returncode


def variables(isa: str | None) -> dict[str, str]:
    """What holds a process to an instruction set."""
    return {"KDFAST_ISA": isa, **SETS[isa]} if isa else {}


def write_readme(readme: Any, folder: Any) -> Any:
    """Regenerate the README's benchmark block from every results file in `folder`."""
    results = load("report").measured(folder)
    if not results:
        print(f"kdfast bench: no results in {folder}", file=sys.stderr)
        return 1
    load("report").update_readme(readme, *results)
    return 0


def installed(name: Any) -> Any:
    """Whether the package `name` can be found."""
    return importlib.util.find_spec(name) is not None


def benchmarks_folder() -> Any:
    """Where the bench files are."""
    for folder in FOLDERS:
        if (folder / "harness.py").exists():
            return folder
    raise FileNotFoundError(f"kdfast's benchmarks are neither in {PACKAGE} nor beside it")


def load(name: Any) -> Any:
    """Import the module `name` of the benchmarks, from wherever they are."""
    folder = benchmarks_folder()
    if folder.parent == PACKAGE:
        return importlib.import_module(f"kdfast.benchmarks.{name}")
    if str(folder.parent) not in sys.path:
        sys.path.insert(0, str(folder.parent))
    return importlib.import_module(f"benchmarks.{name}")
