"""Where the images are: class folders, or webdataset shards, behind timm's readers."""

import contextlib
import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key

from kdfast._extras import require
from kdfast.runs.errors import RunError
from kdfast.runs.images import SUFFIXES, class_files, names, said_of, same_classes, subfolders

__all__ = ["fingerprint", "open_readers"]

SHARDS = "wds/"  # timm's prefix of a webdataset
TRAIN_FOLDERS = ("train", "training")
VALIDATION_FOLDERS = ("val", "valid", "validation", "eval")
SAMPLED = 1024  # files whose bytes a fingerprint has


def open_readers(
    data: str, train_split: str | None, val_split: str | None, classes: int | None, say: Callable[..., Any] = print
) -> tuple[Any, ...]:
    """-> a training and a validation reader of `data`, and the number of classes.

    `data` is a folder, or ``wds/`` before a folder of shards whose splits are named as timm names them. `classes` is
    the number that was given, or None; ``say(line)`` tells of files that are left out. A reader has ``reader[index] ->
    (file, label)``, ``filename(index)`` and ``size(index)``; the index of an image is the same in every run.
    """
    if not data.startswith(SHARDS):
        train, val = _folders(Path(data), say)
        counted = len(train.class_to_idx)
        if classes not in (None, counted):
            raise RunError(f"--classes: got {classes}, but {data} has {counted} class folders; leave the option out")
        return train, val, counted
    train, val = (IndexedShards(data.removeprefix(SHARDS), split) for split in (train_split, val_split))
    classes = classes or max(label for _, label, *_ in train.samples) + 1
    train.check_labels(classes)
    val.check_labels(classes)
    return train, val, classes


def fingerprint(reader: "ClassFolders | IndexedShards") -> str:
    """A digest of every file's name, label and size in their order, and of the bytes of up to 1,024 files among them.

    All bytes of a large data set would take hours to read.
    """
    digest, count = hashlib.sha256(), len(reader)
    for index, sample in enumerate(reader.samples):
        words = f"{reader.filename(index)}\n{sample[1]}\n{reader.size(index)}\n"
        digest.update(words.encode("utf-8", "surrogateescape"))
    for index in range(0, count, -(-count // SAMPLED)):
        with contextlib.suppress(OSError), reader[index][0] as file:  # one that cannot be read has no bytes
            digest.update(file.read())
    return digest.hexdigest()


# ---- folders ---------------------------------------------------------------------------------------------------------
def _folders(root, say):
    if not root.is_dir():
        raise RunError(f"--data: {root} is not a folder; expected one with train/ and val/, or wds/ before shards")
    train, val = _child(root, TRAIN_FOLDERS), _child(root, VALIDATION_FOLDERS)
    readers = ClassFolders(train), ClassFolders(val)
    same_classes(train, val, *(reader.class_to_idx for reader in readers))
    classes = list(readers[0].class_to_idx)
    if len(classes) < 2:
        only = f"only the class {classes[0]!r}" if classes else "no class folders"
        raise RunError(f"--data: {train} has {only}; expected at least 2 class folders")
    if line := said_of(readers[0].others + readers[1].others):
        say(f"{root}: {line}")
    return readers


def _child(root, expected):
    for name in expected:
        if (root / name).is_dir():
            return root / name
    raise RunError(f"--data: {root} has no folder {expected[0]}; expected train/ and val/ with a folder per class")


class ClassFolders(Reader):
    """The images of class folders: labels and order of timm's reader, files and classes of `kdfast.runs.images`."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        classes = sorted(subfolders(root), key=natural_key)
        self.class_to_idx: dict[Any, int] = {name: label for label, name in enumerate(classes)}
        found, self.others = class_files(root, classes)
        samples = [(file, self.class_to_idx[name]) for name, files in found.items() for file in files]
        self.samples: list[tuple[Any, int]] = sorted(samples, key=lambda sample: natural_key(sample[0]))

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return open(path, "rb"), label

    def __len__(self) -> int:
        return len(self.samples)

    def size(self, index: int) -> int:
        """Bytes of the file, None where there is none."""
        with contextlib.suppress(OSError):
            return os.stat(self.samples[index][0]).st_size

    def _filename(self, index, basename=False, absolute=False):
        path = self.samples[index][0]
        return path if absolute else os.path.relpath(path, self.root)


# ---- webdataset shards -----------------------------------------------------------------------------------------------
class IndexedShards(Reader):
    """Samples of webdataset shards by number: timm's own reader streams them, and cannot go back to one.

    The shards of `split` are those that timm finds: a split of the folder's ``_info.json``, or file names in braces,
    ``train-{0000..0099}.tar``. All headers are read once at the start. A sample has an image and a ``.cls``.
    """

    def __init__(self, root: str, split: str) -> None:
        super().__init__()
        self.root: Path = Path(root)
        self.split: str = split
        self.paths: list[Any] = _shards(root, split)
        self.samples = []  # (shard, label, offset, bytes, key)
        for number, path in enumerate(self.paths):
            self._index(number, path)
        if not self.samples:
            raise RunError(f"--data: the shards of split {split!r} in {root} hold no images")

    def _index(self, number, path):
        split_name = require("webdataset.tariterators", extra="train").base_plus_ext
        images, labels = {}, {}  # by key, which is the name up to its first dot
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    key, suffix = split_name(member.name)
                    if suffix and f".{suffix.lower()}" in SUFFIXES:
                        images[key] = member.offset_data, member.size
                    elif suffix == "cls":
                        labels[key] = int(archive.extractfile(member).read())
        except (OSError, tarfile.TarError, ValueError) as error:
            raise RunError(f"--data: cannot read the shard {path}: {error}") from error
        if lonely := images.keys() - labels.keys():
            raise RunError(f"--data: {path} has no .cls beside the image {min(lonely)!r}")
        self.samples += [(number, labels[key], *place, key) for key, place in images.items()]

    def check_labels(self, classes: int) -> None:
        """Raise a RunError that names a label outside of 0 .. classes - 1, or a class without images."""
        for index, (_, label, *_) in enumerate(self.samples):
            if not 0 <= label < classes:
                expected = f"expected 0 to {classes - 1} (see --classes)"
                raise RunError(f"--data: {self.filename(index)} has label {label}, {expected}")
        if missing := set(range(classes)) - {label for _, label, *_ in self.samples}:
            raise RunError(f"--data: split {self.split!r} of {self.root} has no image of class {names(missing)}")

    def __getitem__(self, index: int) -> tuple[Any, int]:
        number, label, offset, size, _ = self.samples[index]
        with open(self.paths[number], "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size)), label

    def __len__(self) -> int:
        return len(self.samples)

    def size(self, index: int) -> int:
        """Bytes of the image."""
        return self.samples[index][3]

    def _filename(self, index, basename=False, absolute=False):
        number, *_, key = self.samples[index]
        return f"{self.paths[number].name}/{key}"


def _shards(root, split):
    if not Path(root).is_dir():
        raise RunError(f"--data: {root} is not a folder; expected wds/ and a folder of shards")
    try:
        names = create_dataset("wds/", root=root, split=split).reader.split_info.filenames
    except Exception as error:  # timm and webdataset raise RuntimeError, KeyError, ValueError
        hint = "expected a split of its _info.json, or names of shards as --train-split 'train-{0000..0099}.tar'"
        raise RunError(f"--data: timm finds no split {split!r} in {root} ({error}); {hint}") from error
    paths = [Path(root) / name for name in names]
    if missing := [path for path in paths if not path.is_file()]:
        raise RunError(f"--data: the shard {missing[0]} is missing")
    return paths
