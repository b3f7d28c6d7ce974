"""Files that are either whole or absent: atomic writes, checkpoints and their checks."""

import io
import os
import zipfile

import torch

from kdfast.distill import DistillError

__all__ = ["damaged", "load_checkpoint", "save_checkpoint", "write_atomically"]


def write_atomically(path, content, then="--resume continues"):
    """Write the bytes `content` so that a kill or a full disk leaves the old file or the new one, never a part.

    `then` is what the message of a failure says of going on.

    The temporary file lies in the same folder, because a rename is atomic only within one file system.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the content must be on the disk before the name points to it
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)  # a full disk gets its space back
        intact = f"what was written before is intact, and {then}"
        raise DistillError(f"cannot write {path}: {error.strerror or error}; {intact}") from error


def _remove(path):
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # the write's own error is the one to report


def save_checkpoint(path, state):
    """Save the dict `state` atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path):
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


def damaged(path):
    """The error for a checkpoint that cannot be used."""
    return DistillError(f"{path} is damaged; delete it and --resume trains this part again from its start")
