"""Files that are either whole or absent."""

import os
import secrets
from pathlib import Path

__all__ = ["remove", "write_atomically"]


def write_atomically(path: Path, content: bytes) -> None:
    """Write the bytes `content` so that a kill or a full disk leaves the old file or the new one, never a part.

    The temporary file lies in the same folder, because a rename is atomic only within one file system. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:  # never through a link that somebody has put there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the content must be on the disk before the name points to it
        os.replace(temporary, path)
    finally:
        for part in path.parent.glob(f".{path.name}.*.tmp"):  # a full disk gets its space back; of a kill, too
            remove(part)


def remove(path: Path) -> None:
    """Delete `path` if that is possible: the error of the write itself is the one to report."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass
