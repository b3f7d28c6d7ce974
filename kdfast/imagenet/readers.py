"""Where the images are: class folders, or webdataset shards, behind timm's readers."""

import hashlib
import io
import tarfile
from pathlib import Path

from timm.data import create_dataset
from timm.data.readers.reader import Reader

from kdfast._extras import require
from kdfast.distill import DistillError
from kdfast.distill.data import subfolders

__all__ = ["fingerprint", "open_readers"]

SHARDS = "wds/"  # timm's prefix of a webdataset
TRAIN_FOLDERS = ("train", "training")
VALIDATION_FOLDERS = ("val", "valid", "validation", "eval")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")  # in a shard


def open_readers(data, train_split, val_split, classes):
    """-> a training and a validation reader of `data`, and the number of classes.

    `data` is a folder, or ``wds/`` before a folder of shards whose splits are named as timm names them. `classes` is
    the number that was given, or None. A reader has ``reader[index] -> (file, label)`` and ``filename(index)``; the
    index of an image is the same in every run.
    """
    if not data.startswith(SHARDS):
        train, val = _folders(Path(data))
        counted = len(train.class_to_idx)
        if classes not in (None, counted):
            raise DistillError(
                f"--classes: got {classes}, but {data} has {counted} class folders; leave the option out"
            )
        return train, val, counted
    train, val = (IndexedShards(data.removeprefix(SHARDS), split) for split in (train_split, val_split))
    classes = classes or max(label for _, label, *_ in train.samples) + 1
    train.check_labels(classes)
    val.check_labels(classes)
    return train, val, classes


def fingerprint(*readers):
    """A digest of every file name and label, in their order: what an image's index means."""
    digest = hashlib.sha256()
    for reader in readers:
        for index, sample in enumerate(reader.samples):
            digest.update(f"{reader.filename(index)}\n{sample[1]}\n".encode())
    return digest.hexdigest()


# ---- folders ---------------------------------------------------------------------------------------------------------
def _folders(root):
    if not root.is_dir():
        raise DistillError(f"--data: {root} is not a folder; expected one with train/ and val/, or wds/ before shards")
    train, val = _child(root, TRAIN_FOLDERS), _child(root, VALIDATION_FOLDERS)
    readers = _folder(train), _folder(val)
    ours, theirs = (set(reader.class_to_idx) for reader in readers)
    if ours != theirs:
        parts = [f"{val} has no {_names(ours - theirs)}"] if ours - theirs else []
        parts += [f"{train} has no {_names(theirs - ours)}"] if theirs - ours else []
        raise DistillError(f"--data: {' and '.join(parts)}; expected the same class folders in both")
    if len(ours) < 2:
        raise DistillError(f"--data: {train} has only the class {_names(ours)}; expected at least 2 class folders")
    return readers


def _child(root, names):
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DistillError(f"--data: {root} has no folder {names[0]}; expected train/ and val/ with a folder per class")


def _folder(root):
    named = set(subfolders(root))
    try:
        reader = create_dataset("", root=str(root), search_split=False).reader
    except RuntimeError as error:  # no images at all
        raise DistillError(f"--data: {error}") from error
    if empty := named - set(reader.class_to_idx):
        raise DistillError(f"--data: {root} has no images in {_names(empty)}; expected some in every class folder")
    if nested := set(reader.class_to_idx) - named:
        raise DistillError(f"--data: {root} has images in {_names(nested)}; expected them right in the class folders")
    return reader


def _names(names, most=5):
    names = sorted(names)
    return ", ".join(repr(name) for name in names[:most]) + (f" and {len(names) - most} more" * (len(names) > most))


# ---- webdataset shards -----------------------------------------------------------------------------------------------
class IndexedShards(Reader):
    """Samples of webdataset shards by number: timm's own reader streams them, and cannot go back to one.

    The shards of `split` are those that timm finds: a split of the folder's ``_info.json``, or file names in braces,
    ``train-{0000..0099}.tar``. All headers are read once at the start. A sample has an image and a ``.cls``.
    """

    def __init__(self, root, split):
        super().__init__()
        self.root, self.split, self.paths = Path(root), split, _shards(root, split)
        self.samples = []  # (shard, label, offset, bytes, key)
        for number, path in enumerate(self.paths):
            self._index(number, path)
        if not self.samples:
            raise DistillError(f"--data: the shards of split {split!r} in {root} hold no images")

    def _index(self, number, path):
        split_name = require("webdataset.tariterators", extra="imagenet").base_plus_ext
        images, labels = {}, {}  # by key, which is the name up to its first dot
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    key, suffix = split_name(member.name)
                    if suffix and suffix.lower() in IMAGE_SUFFIXES:
                        images[key] = member.offset_data, member.size
                    elif suffix == "cls":
                        labels[key] = int(archive.extractfile(member).read())
        except (OSError, tarfile.TarError, ValueError) as error:
            raise DistillError(f"--data: cannot read the shard {path}: {error}") from error
        if lonely := images.keys() - labels.keys():
            raise DistillError(f"--data: {path} has no .cls beside the image {min(lonely)!r}")
        self.samples += [(number, labels[key], *place, key) for key, place in images.items()]

    def check_labels(self, classes):
        """Raise a DistillError that names a label outside of 0 .. classes - 1, or a class without images."""
        for index, (_, label, *_) in enumerate(self.samples):
            if not 0 <= label < classes:
                expected = f"expected 0 to {classes - 1} (see --classes)"
                raise DistillError(f"--data: {self.filename(index)} has label {label}, {expected}")
        if missing := set(range(classes)) - {label for _, label, *_ in self.samples}:
            raise DistillError(f"--data: split {self.split!r} of {self.root} has no image of class {_names(missing)}")

    def __getitem__(self, index):
        number, label, offset, size, _ = self.samples[index]
        with open(self.paths[number], "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size)), label

    def __len__(self):
        return len(self.samples)

    def _filename(self, index, basename=False, absolute=False):
        number, *_, key = self.samples[index]
        return f"{self.paths[number].name}/{key}"


def _shards(root, split):
    if not Path(root).is_dir():
        raise DistillError(f"--data: {root} is not a folder; expected wds/ and a folder of shards")
    try:
        names = create_dataset("wds/", root=root, split=split).reader.split_info.filenames
    except Exception as error:  # timm and webdataset raise RuntimeError, KeyError, ValueError
        raise DistillError(f"--data: timm finds no split {split!r} in {root}: {error}") from error
    paths = [Path(root) / name for name in names]
    if missing := [path for path in paths if not path.is_file()]:
        raise DistillError(f"--data: the shard {missing[0]} is missing")
    return paths
