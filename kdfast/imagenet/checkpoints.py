"""The checkpoints of a run: the newest and the one before, which is there if the newest is damaged."""

from kdfast.distill import DistillError, storage

__all__ = ["newest", "save"]

KEPT = 2


def save(folder, step, state):
    """Write `state`, which has `step` steps behind it, and then remove all but the newest two."""
    storage.save_checkpoint(folder / f"step-{step:010d}.pt", state)
    for path in _paths(folder)[:-KEPT]:
        path.unlink()


def newest(folder, say):
    """The newest state that is whole, or None where there is none at all; ``say(line)`` tells of damaged ones.

    Raises a DistillError if there are checkpoints, and none of them is whole.
    """
    for path in reversed(_paths(folder)):
        try:
            return storage.load_checkpoint(path)
        except DistillError:
            say(f"{path} is damaged; trying the one before")
    if _paths(folder):
        raise DistillError(f"{folder} has only damaged checkpoints; train anew with another --out")
    return None


def _paths(folder):
    return sorted(folder.glob("step-*.pt"))
