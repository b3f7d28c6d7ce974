"""The checkpoints of a run: the newest and the one before, which is there if the newest is damaged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdfast.distill import DistillError, storage

__all__ = ["exist", "newest", "save"]

KEPT = 2


def save(folder: Path, step: int, state: dict[str, int]) -> None:
    """Write `state`, which has `step` steps behind it, and then remove all but the newest two."""
    storage.save_checkpoint(folder / f"step-{step:010d}.pt", state)
    for path in _paths(folder)[:-KEPT]:
        path.unlink()


def exist(folder: Path) -> bool:
    """Whether there are any, damaged ones too."""
    return bool(_paths(folder))


def newest(folder: Path, say: Callable[..., Any]) -> dict[str, int]:
    """The newest state that is whole; ``say(line)`` tells of damaged ones. A DistillError if none is whole."""
    for path in reversed(_paths(folder)):
        try:
            return storage.load_checkpoint(path)
        except DistillError:
            say(f"{path} is damaged; trying the one before")
    raise DistillError(f"{folder} has no checkpoint that is whole; train anew with another --out")


def _paths(folder):
    return sorted(folder.glob("step-*.pt"))
