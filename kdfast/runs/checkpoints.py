"""Checkpoints: a dict of tensors and numbers in a file that is whole or absent, and is checked when it is read."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdfast.runs.errors import RunError
from kdfast.runs.files import write_atomically

__all__ = ["continue_from", "exist", "load", "load_newest", "save", "save_newest"]

KEPT = 2


def save(path: Path, state: dict[str, Any]) -> None:
    """Save the dict `state` atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """The dict that `save` stored, its tensors on the CPU; a RunError names a damaged file."""
    try:
        content = path.read_bytes()
        # torch.load does not compare the checksums that the file has; a flipped bit would be trained on.
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("checksum mismatch")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise RunError(f"{path} is damaged; delete it and --resume trains this part again from its start") from error


def continue_from(restore: Callable[[dict[str, Any]], None], state: dict[str, Any], otherwise: str) -> dict[str, Any]:
    """``restore(state)``, and `state`; a RunError with the line `otherwise` where it is the state of something else."""
    try:
        restore(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise RunError(otherwise) from error
    return state


# ---- the newest of several -------------------------------------------------------------------------------------------
def save_newest(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `state`, which has `step` steps behind it, and then remove all but the newest two."""
    save(folder / f"step-{step:010d}.pt", state)
    for path in _paths(folder)[:-KEPT]:
        path.unlink()


def exist(folder: Path) -> bool:
    """Whether there are any, damaged ones too."""
    return bool(_paths(folder))


def load_newest(folder: Path, say: Callable[[str], Any]) -> dict[str, Any]:
    """The newest state that is whole; ``say(line)`` tells of damaged ones. A RunError if none is whole."""
    for path in reversed(_paths(folder)):
        try:
            return load(path)
        except RunError:
            say(f"{path} is damaged; trying the one before")
    raise RunError(f"{folder} has no checkpoint that is whole; train anew with another --out")


def _paths(folder):
    return sorted(folder.glob("step-*.pt"))
