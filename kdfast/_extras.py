"""Optional dependencies: one place that imports them and says how to install a missing one."""

import importlib

__all__ = ["MissingExtra", "require"]

# Import name -> the name pip knows, where they differ.
_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}


class MissingExtra(ImportError):
    """An optional dependency is not installed; the message names the command that installs it."""


def require(module, extra):
    """Import and return `module` (dotted names too), which the optional dependency group `extra` brings.

    Example::

        datasets = require("sklearn.datasets", extra="distill")
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        root = module.split(".")[0]
        name = _DISTRIBUTIONS.get(root, root)
        missing = isinstance(error, ModuleNotFoundError) and error.name == root
        state = "is not installed" if missing else f"cannot be imported ({error})"
        raise MissingExtra(f"{name} {state}; install it with: pip install 'kdfast[{extra}]'") from error
