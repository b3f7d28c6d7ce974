"""kdfast: knowledge-distillation losses for PyTorch, on fused CPU and CUDA kernels.

Papers are modules (``kdfast.KD()(student, teacher)``), kernels are functions (``kdfast.ops.softmax_kl``).
Student first, teacher second, logits unless an argument's name says otherwise; every loss is a 0-d tensor.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kdfast._api import *  # noqa: F403
    from kdfast._api import __all__  # noqa: F401


def _is_command():
    """Whether this process is the command line, whose --help and --version need no torch."""
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    return program in ("-m", "kdfast", "kdfast.exe")


def _load():
    """Load the library: its names, and the ops that it registers."""
    api = importlib.import_module("kdfast._api")
    globals().update({name: getattr(api, name) for name in api.__all__}, __all__=api.__all__)


def __getattr__(name: str) -> Any:
    if "__all__" not in globals() and (name == "__all__" or not name.startswith("_")):
        _load()
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module 'kdfast' has no attribute {name!r}")


if not _is_command():
    _load()
