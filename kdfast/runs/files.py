"""A folder that belongs to one process, and files in it that are either whole or absent."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from kdfast import _files
from kdfast.runs.errors import RunError

try:
    import fcntl
except ImportError:  # Windows, where folders have no lock
    fcntl = None

__all__ = ["LOCK", "locked", "write_atomically"]

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path, option: str = "--out") -> Iterator[None]:
    """Inside, `folder`, which is made if it is not there, is this process's alone; a RunError if it is another's.

    The system frees the lock of a process that ends, in whichever way; what that has left half written is removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A link in its place could lead anywhere.
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise RunError(f"{option}: cannot write to {folder}: {error.strerror or error}") from error
    try:
        _lock(descriptor, f"{option}: another process is writing into {folder}; wait for it, or take another folder")
        for path in (*folder.glob(".*.tmp"), *folder.glob("checkpoints/.*.tmp")):
            _files.remove(path)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor, refusal):
    if fcntl is None:
        return
    try:
        # Not flock: processes that a loader has forked would share it, and hold it when this one is killed.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise RunError(refusal) from error
    except OSError:
        pass  # a file system without locks


def write_atomically(path: Path, content: bytes) -> None:
    """Write the bytes `content`; a kill or a full disk leaves the old file or the new one, never a part."""
    try:
        _files.write_atomically(path, content)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; what was written before is intact, and --resume continues"
        ) from error
