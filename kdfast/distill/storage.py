"""Files that are either whole or absent, in a folder of one process: atomic writes, checkpoints and their checks."""

import contextlib
import io
import os
import secrets
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, where folders have no lock
    fcntl = None

import torch

from kdfast.distill import DistillError

__all__ = ["LOCK", "damaged", "load_checkpoint", "locked", "save_checkpoint", "write_atomically"]

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path, option: str = "--out") -> Iterator[None]:
    """Inside, `folder`, which is made if it is not there, is this process's alone; a DistillError if it is another's.

    The system frees the lock of a process that ends, in whichever way; what that has left half written is removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A link in its place could lead anywhere.
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise DistillError(f"{option}: cannot write to {folder}: {error.strerror or error}") from error
    try:
        _lock(descriptor, f"{option}: another process is writing into {folder}; wait for it, or take another folder")
        for path in (*folder.glob(".*.tmp"), *folder.glob("checkpoints/.*.tmp")):
            _remove(path)
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
        raise DistillError(refusal) from error
    except OSError:
        pass  # a file system without locks


def write_atomically(path: Path, content: bytes, then: str = "--resume continues") -> None:
    """Write the bytes `content` so that a kill or a full disk leaves the old file or the new one, never a part.

    `then` is what the message of a failure says of going on.

    The temporary file lies in the same folder, because a rename is atomic only within one file system.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:  # never through a link that somebody has put there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the content must be on the disk before the name points to it
        os.replace(temporary, path)
    except OSError as error:
        intact = f"what was written before is intact, and {then}"
        raise DistillError(f"cannot write {path}: {error.strerror or error}; {intact}") from error
    finally:
        for part in path.parent.glob(f".{path.name}.*.tmp"):  # a full disk gets its space back; of a kill, too
            _remove(part)


def _remove(path):
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # the write's own error is the one to report


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save the dict `state` atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The dict that `save_checkpoint` stored, its tensors on the CPU; a DistillError names a damaged file."""
    try:
        content = path.read_bytes()
        # torch.load does not compare the checksums that the file has; a flipped bit would be trained on.
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("checksum mismatch")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise damaged(path) from error


def damaged(path: Path) -> "DistillError":
    """The error for a checkpoint that cannot be used."""
    return DistillError(f"{path} is damaged; delete it and --resume trains this part again from its start")
