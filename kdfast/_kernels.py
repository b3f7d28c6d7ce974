"""The compiled kernels: loading them, defining ops, and saying which path an op takes.

An op is defined once. Its pure-PyTorch form is a dispatcher kernel for every device; the libraries ``_cpu_<set>``, one
for each instruction set, and ``_cuda`` register faster kernels, which the dispatcher prefers. Nothing else chooses.
"""

import contextlib
import glob
import inspect
import os
import sys
import warnings
from dataclasses import dataclass

import torch

from kdfast import _build_record, _processor

__all__ = ["FallbackWarning", "fallback", "load", "op", "override", "paths", "status"]

NAMESPACE = torch.library.Library("kdfast", "DEF")
OPS = {}  # name -> Op
FOLDER = os.path.dirname(os.path.abspath(__file__))  # of the package, where the libraries are
_warned = set()  # families that have said that they run on the fallback


class FallbackWarning(UserWarning):
    """A loss runs on plain PyTorch operations because its compiled kernel is not there."""


@dataclass(frozen=True)
class Op:
    """One dispatcher op: its family, its schema and the plain-PyTorch form."""

    family: str
    schema: str
    fallback: callable
    has_kernels: bool = True  # else it is plain PyTorch everywhere, around ops that have


@dataclass
class Library:
    """One compiled library: where it is, whether it is loaded, and if not, why, and what to do if that is known."""

    path: str | None = None
    loaded: bool = False
    error: str | None = None
    reason: str = ""
    remedy: str = ""


_libraries = {"_cpu": Library(), "_cuda": Library()}


# ---- loading ---------------------------------------------------------------------------------------------------------
def load():
    """Load the libraries that were built; one that is there and does not load is an ImportError with the reason."""
    _load_cpu(_libraries["_cpu"])
    _load_cuda(_libraries["_cuda"])
    errors = [f"{library.path}: {library.error}" for library in _libraries.values() if library.error]
    if errors and not _is_doctor():
        raise ImportError(
            "kdfast was built with compiled kernels, but they do not load: "
            + "; ".join(errors)
            + ". Run `kdfast doctor` for details, reinstall kdfast for this torch, "
            "or install with KDFAST_NO_EXTENSION=1 to do without kernels."
        )


def _is_doctor():
    """Whether this process is `kdfast doctor`, which must not fail on load errors: it reports them."""
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    return sys.argv[1:2] == ["doctor"] and program in ("-m", "__main__.py", "kdfast", "kdfast.exe")


def _load_cpu(library):
    found = _cpu_libraries()
    if not found:
        library.reason = _build_record.read().get("reason") or _unbuilt("_cpu")
        return
    library.path = FOLDER
    try:
        library.path = found[_processor.choose(list(found))]
        torch.ops.load_library(library.path)
        library.loaded = True
    except Exception as error:  # any failure to load is reported, never swallowed: see load()
        library.error = f"{type(error).__name__}: {error}"


def _cpu_libraries():
    """Instruction set -> path of the library of CPU kernels for it, of those that were built."""
    found = sorted(glob.glob("_cpu_*.so", root_dir=FOLDER))
    return {name.removeprefix("_cpu_").removesuffix(".so"): os.path.join(FOLDER, name) for name in found}


def _unbuilt(name):
    tree = os.path.dirname(FOLDER)
    if not os.path.exists(os.path.join(tree, "setup.py")):
        return f"kdfast.{name} was not built here"
    return (
        f"this kdfast is the source tree {tree}, where {name} is not built: start Python in another folder to import "
        "an installed kdfast, or build here with `pip install -e .`"
    )


def _load_cuda(library):
    path = os.path.join(FOLDER, "_cuda.so")
    if not os.path.exists(path):
        library.reason = _build_record.read().get("reason") or _unbuilt("_cuda")
        return
    library.path = path
    if torch.version.cuda is None:
        library.reason = "this torch has no CUDA, so the CUDA library is left alone"
        return
    here = torch.version.cuda
    built = _build_record.read().get("cuda") or here
    if built.split(".")[0] != here.split(".")[0]:
        library.reason = f"its CUDA library is for CUDA {built}, torch {torch.__version__} is for CUDA {here}"
        library.remedy = (
            "install a torch for its CUDA (pip install --force-reinstall torch --index-url "
            f"https://download.pytorch.org/whl/cu{built.replace('.', '')}), or build kdfast for this torch "
            f"(with nvcc {here.split('.')[0]}: pip install --no-build-isolation --no-binary kdfast kdfast)"
        )
        return
    try:
        torch.ops.load_library(library.path)
        library.loaded = True
    except Exception as error:
        library.error = f"{type(error).__name__}: {error}"


def status():
    """Library name -> Library (path, loaded, error, reason)."""
    return dict(_libraries)


def paths():
    """Name of each op that can have kernels -> {"cpu": "kernel" or "fallback", "cuda": ...}, as dispatched now."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    path = {True: "kernel", False: "fallback"}
    names = [name for name, op in OPS.items() if op.has_kernels]
    return {name: {key.lower(): path[has(f"kdfast::{name}", key)] for key in ("CPU", "CUDA")} for name in names}


# ---- defining ops ----------------------------------------------------------------------------------------------------
def op(family, fake, mutates=(), has_kernels=True):
    """Decorator: a plain-PyTorch function, annotated, becomes the op ``kdfast::<its name>`` of a family.

    Its signature is the schema; it runs where no kernel does. `fake` gets the arguments by name and gives empty results
    of the right shapes. The function's name may begin with ``_``, which the op's does not.
    """

    def define(function):
        name = function.__name__.removeprefix("_")
        names = tuple(inspect.signature(function).parameters)
        schema = torch.library.infer_schema(function, mutates_args=mutates, op_name=name)
        OPS[name] = Op(family, schema, function, has_kernels)
        NAMESPACE.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        run = _announced(family, function) if has_kernels else function
        NAMESPACE.impl(name, run, "CompositeExplicitAutograd")

        def fake_by_name(*args, **more):
            return fake(**dict(zip(names, args, strict=False)), **more)

        torch.library.register_fake(f"kdfast::{name}", fake_by_name, lib=NAMESPACE)
        return getattr(torch.ops.kdfast, name).default

    return define


def _announced(family, fallback):
    """`fallback`, which says once for its family that it is one."""

    def run(first, *args):
        tensor = first[0] if isinstance(first, (list, tuple)) else first
        _announce(family, tensor.device.type)
        return fallback(first, *args)

    return run


def _announce(family, device):
    if family in _warned and os.environ.get("KDFAST_REQUIRE_KERNELS") != "1":
        return
    library = _libraries["_cuda" if device == "cuda" else "_cpu"]
    why = library.error or library.reason or f"no kernel exists for device {device!r}"
    what = library.remedy or "reinstall kdfast where a C++ compiler (for CUDA also nvcc) is found"
    message = (
        f"kdfast.{family} runs on its plain-PyTorch fallback on {device}, slower and with more memory: {why}. "
        f"`kdfast doctor` says what was built; {what}."
    )
    if os.environ.get("KDFAST_REQUIRE_KERNELS") == "1":
        raise RuntimeError(message + " (KDFAST_REQUIRE_KERNELS=1 makes this an error.)")
    _warned.add(family)
    warnings.warn(message, FallbackWarning, stacklevel=4)


# ---- choosing a path by hand -----------------------------------------------------------------------------------------
@contextlib.contextmanager
def override(kernels, keys=("CPU", "CUDA")):
    """Inside, `kernels` (op name -> function) run for the dispatch keys `keys`; process-wide, also in compiled code."""
    library = torch.library.Library("kdfast", "IMPL")
    try:
        with warnings.catch_warnings():
            # The dispatcher warns that a kernel is overridden. Here that is the point.
            warnings.filterwarnings("ignore", message="(?s).*[Oo]verrid")
            for name, kernel in kernels.items():
                for key in keys:
                    library.impl(name, kernel, key, allow_override=True)
        yield
    finally:
        library._destroy()


@contextlib.contextmanager
def fallback():
    """Force the plain-PyTorch form of every op, for comparison.

    Process-wide (all threads, compiled graphs too) and without a warning, until the block ends.

    Example::

        with kdfast.fallback():
            slow = loss(student, teacher)
    """
    with override({name: op.fallback for name, op in OPS.items()}):
        yield
