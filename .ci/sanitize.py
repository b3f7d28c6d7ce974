"""Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs the families' tests on them.

Usage: python .ci/sanitize.py [PYTEST_ARGUMENT ...]. Needs g++ on Linux; the build lies in build/sanitized, beside the
normal one. The first finding ends the run with its report; tests/test_sanitized.py plants some to see that it does.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitized"
sys.path.insert(0, str(ROOT))

import setup  # noqa: E402

CXX = shlex.split(os.environ.get("CXX") or "g++")
# The last two: line numbers in the report, and no minute spent on optimising.
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O1"]
CPU_SET = "baseline"
ASAN_OPTIONS = "detect_leaks=0"  # Python and torch leave much behind when they end


def start_compiling(extension, source):
    """-> the object file of one source, and the process that writes it."""
    target = BUILD / "objects" / f"{source.replace('/', '-')}.o"
    target.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in extension.include_dirs]
    command = [*CXX, *extension.extra_compile_args, *FLAGS, "-fPIC", *includes, "-c", source]
    return target, subprocess.Popen([*command, "-o", str(target)], cwd=ROOT)


def build():
    """A copy of the package with sanitized kernels, for one instruction set; -> the folder to import it from."""
    from torch.utils import cpp_extension

    record = {"cuda": None, "archs": [], "cpu_sets": [CPU_SET]}
    extension = setup.cpu_extensions(cpp_extension, record)[-1]
    started = [start_compiling(extension, source) for source in extension.sources]
    if any([process.wait() for _, process in started]):
        raise SystemExit("sanitize: compiling failed, see above")
    package = BUILD / "lib" / "kdfast"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "kdfast", package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.json"))
    shutil.copytree(
        ROOT / "benchmarks", package / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__")
    )
    libraries = [f"-L{path}" for path in extension.library_dirs] + [f"-l{name}" for name in extension.libraries]
    command = [*CXX, *FLAGS, "-shared", *(str(target) for target, _ in started), *libraries]
    subprocess.run([*command, "-o", str(package / f"_cpu_{CPU_SET}.so")], check=True)
    return package.parent


def runtime(name):
    """Where the compiler keeps a sanitizer's library, which has to be loaded before everything else."""
    path = subprocess.run([*CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"sanitize: the compiler has no {name}")
    return path


def main(arguments):
    folder = build()
    families = [path.stem for path in ROOT.glob("tests/registry/[a-z]*.py")]
    tests = [f"tests/test_{name}.py" for name in sorted(["sanitized", *families, "fuzz"])]
    tests += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_ops_*.py"))
    environment = {
        **os.environ,
        "ASAN_OPTIONS": ASAN_OPTIONS,
        "KDFAST_ISA": CPU_SET,
        "PYTHONPATH": str(folder),
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "KDFAST_TEST_REQUIRE_KERNELS": "1",
        "KDFAST_TEST_SANITIZED": str(folder),
    }
    # Captured by pytest, the report of a process that a sanitizer ends would be lost: --capture=sys lets it through.
    # Not `python -m pytest`: that would import the kdfast of this folder.
    code = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main())"
    select = ["-k", "cpu or sanitized or fuzz"]
    together = ["-n", "auto", "--dist", "worksteal", "--maxfail", "1"]  # a finding ends its process, and then the run
    command = [sys.executable, "-c", code, "-q", "--capture=sys", "-p", "no:cacheprovider", *together, *select, *tests]
    command += arguments
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
