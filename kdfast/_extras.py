"""Optional dependencies: one place that imports them and says how to install a missing one."""

import importlib
import importlib.metadata
import shlex

__all__ = ["MissingExtra", "install", "require"]

# Import name -> the name pip knows, where they differ.
_DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn"}


class MissingExtra(ImportError):
    """An optional dependency is not installed; the message names the command that installs it."""


def require(module, extra):
    """Import and return `module` (dotted names too), which the optional dependency group `extra` brings.

    Example::

        datasets = require("sklearn.datasets", extra="compare")
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        root = module.split(".")[0]
        name = _DISTRIBUTIONS.get(root, root)
        missing = isinstance(error, ModuleNotFoundError) and error.name == root
        state = "is not installed" if missing else f"cannot be imported ({error})"
        raise MissingExtra(f"{name} {state}; install it with: {install(extra, [name])}") from error


def install(extra, packages):
    """The command that installs the group `extra`, or `packages` where it is not known.

    By the names of its packages: where kdfast came from, the registry's package of that name may be another.
    """
    try:
        listed = importlib.metadata.requires("kdfast") or []
    except importlib.metadata.PackageNotFoundError:  # a source tree
        listed = []
    parts = [requirement.replace("'", '"').partition(";") for requirement in listed]
    group = [package.strip() for package, _, marker in parts if f'extra == "{extra}"' in marker]
    return shlex.join(["pip", "install", *(group or packages)])
