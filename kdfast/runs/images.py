"""Folders of class folders of images: which files are images, of which class, and how they are decoded."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from kdfast._extras import require
from kdfast.runs.errors import RunError

__all__ = ["SUFFIXES", "class_files", "eight_bits", "names", "said_of", "same_classes", "subfolders"]

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def subfolders(folder: Path) -> list[Any]:
    """The names of the folders in `folder` that are not hidden, sorted; none where it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def class_files(root: Path, classes: list[str]) -> tuple[dict[str, Any], Any]:
    """-> class -> the image files anywhere below its folder in `root`; and a Counter of the other files' suffixes.

    Hidden files and folders do not count. A RunError names the classes without images.
    """
    files, others = {}, Counter()
    for name in classes:
        files[name] = found = []
        for folder, folders, there in os.walk(root / name, followlinks=True):
            folders[:] = [inner for inner in folders if not inner.startswith(".")]
            for file in there:
                suffix = os.path.splitext(file)[1].lower()
                if not file.startswith("."):
                    found.append(os.path.join(folder, file)) if suffix in SUFFIXES else others.update([suffix])
    if empty := [name for name, found in files.items() if not found]:
        endings = ", ".join(sorted(SUFFIXES))
        raise RunError(
            f"--data: {root} has no images in {names(empty)}; expected some in every class folder, ending in {endings}"
        )
    return files, others


def said_of(others: Any) -> str | None:
    """A line about the files that `class_files` has left out, or None."""
    if not others:
        return None
    kinds = ", ".join(f"{suffix or 'without a suffix'} ({count})" for suffix, count in others.most_common(5))
    return f"left out {others.total()} files in class folders whose suffixes are not those of images: {kinds}"


def same_classes(train: Path, test: Path, ours: dict[str, int] | list[str], theirs: dict[str, int] | list[str]) -> None:
    """Raise a RunError with the class folders that only one of the folders `train` and `test` has."""
    missing = {test: set(ours) - set(theirs), train: set(theirs) - set(ours)}
    if parts := [f"{folder} has no {names(missed)}" for folder, missed in missing.items() if missed]:
        raise RunError(f"--data: {' and '.join(parts)}; expected the same class folders in both")


def names(values: Iterable[Any], most: int = 5) -> str:
    """Some values for a message, and how many more there are."""
    values = sorted(values)
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(repr(value) for value in values[:most]) + more


def eight_bits(image: Any) -> Any:
    """A Pillow image as gray ("L") or colour ("RGB") of 8 bits, decoded to its last byte."""
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip at 255
        pixels = (np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8)
        return require("PIL.Image", extra="compare").fromarray(pixels)
    return image.convert("L" if image.mode in ("1", "L", "LA", "F") else "RGB")
