"""Images and labels: scikit-learn's handwritten digits, or a folder of class folders."""

import hashlib
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdfast._extras import require
from kdfast._text import printable
from kdfast.lab.compare import DIGITS
from kdfast.runs.errors import RunError
from kdfast.runs.images import class_files, eight_bits, said_of, same_classes, subfolders

__all__ = ["Data", "load"]

TEST_FOLDERS = ("test", "val", "valid", "validation")
# The split is part of the data, so that accuracies of different --seed are comparable.
SPLIT_SEED = 0
MOST_NAMED = 20  # broken images in a message
CHUNK = 1024  # images that are there as float64 at a time


@dataclass(frozen=True)
class Data:
    """A training and a test set: float32 images (N, channels, H, W), standardised, and int64 labels (N,)."""

    name: str
    classes: list[str]
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors, training set first."""
        return self.train_images, self.train_labels, self.test_images, self.test_labels

    def fingerprint(self) -> str:
        """A digest of every image, label and class name: equal only for equal data."""
        digest = hashlib.sha256("\n".join(self.classes).encode("utf-8", "surrogateescape"))
        for tensor in self.tensors:
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(np.ascontiguousarray(tensor.numpy()))
        return digest.hexdigest()

    def to(self, device: str) -> "Data":
        """The same data on `device`."""
        return Data(self.name, self.classes, *(tensor.to(device) for tensor in self.tensors))


def load(name: str, image_size: int | None) -> "Data":
    """`DIGITS`, or the images under the folder `name`, resized to `image_size` squares."""
    try:
        return _digits() if name == DIGITS else _folder(Path(name), image_size)
    except MemoryError as error:
        fewer = f"expected fewer images, or less than the {image_size} of --image-size"
        raise RunError(f"--data: the images of {name} do not fit into the memory; {fewer}") from error


def _digits():
    bunch = require("sklearn.datasets", extra="compare").load_digits()
    images = bunch.images[:, None].astype(np.float32)  # (1797, 1, 8, 8)
    labels = bunch.target.astype(np.int64)
    # Half for testing: 899 test images make the spread over seeds smaller than the differences between losses.
    train, test = _split(labels, test_share=0.5)
    classes = [str(name) for name in bunch.target_names]
    return _standardised("scikit-learn digits", classes, images[train], labels[train], images[test], labels[test])


def _split(labels, test_share):
    """Positions of a training and a test set with every class in its share, at least one image each."""
    generator = np.random.default_rng(SPLIT_SEED)
    train, test = [], []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        cut = min(max(1, round(len(members) * test_share)), len(members) - 1)
        test.extend(members[:cut])
        train.extend(members[cut:])
    return np.array(train), np.array(test)


def _standardised(name, classes, train_images, train_labels, test_images, test_labels):
    """Data whose training images have mean 0 and standard deviation 1 in each channel."""
    axes, pixels = (0, 2, 3), train_images.size // train_images.shape[1]
    mean = train_images.mean(axis=axes, keepdims=True, dtype=np.float64)
    squares = sum(np.square(part - mean).sum(axis=axes, keepdims=True) for part in _chunks(train_images))
    deviation = np.sqrt(squares / pixels)
    deviation[deviation == 0] = 1.0  # a constant channel carries nothing; it stays 0

    def standardised(images):
        result = np.empty(images.shape, np.float32)
        for place, part in zip(_chunks(result), _chunks(images), strict=True):
            place[:] = (part - mean) / deviation
        return torch.from_numpy(result)

    train_labels, test_labels = map(torch.from_numpy, (train_labels, test_labels))
    return Data(name, classes, standardised(train_images), train_labels, standardised(test_images), test_labels)


def _chunks(images):
    return [images[first : first + CHUNK] for first in range(0, len(images), CHUNK)]


# ---- folders of images -----------------------------------------------------------------------------------------------
def _folder(root, size):
    if not root.is_dir():
        raise RunError(f"--data: {root} is not a folder; expected a folder of class folders of images")
    train_root, test_root = _split_folders(root)
    classes = _classes(train_root)
    files, labels, others = _files(train_root, classes)
    if test_root is None:
        _need_two_images(root, classes, labels)
        _tell(root, others)
        images = _read_all(files, size)
        train, test = _split(labels, test_share=0.2)
        return _standardised(str(root), classes, images[train], labels[train], images[test], labels[test])
    same_classes(train_root, test_root, classes, _classes(test_root))
    test_files, test_labels, more = _files(test_root, classes)
    _tell(root, others + more)
    images = _read_all(files + test_files, size)  # together: if one is in colour, all are
    return _standardised(str(root), classes, images[: len(files)], labels, images[len(files) :], test_labels)


def _tell(root, others):
    if line := said_of(others):
        print(f"{printable(str(root))}: {line}", file=sys.stderr)


def _split_folders(root):
    """(training folder, test folder), or (root, None) where the class folders lie in `root` itself."""
    train = root / "train"
    # A folder "train" that holds images and no folders is a class: cars, trains, trams.
    if not subfolders(train):
        return root, None
    for name in TEST_FOLDERS:
        if (root / name).is_dir():
            return train, root / name
    raise RunError(f"--data: {root} has a folder train and no test or val beside it; add one, or pass {train}")


def _classes(root):
    classes = subfolders(root)
    if len(classes) < 2:
        found = f"only the class folder {classes[0]}" if classes else "no class folders"
        raise RunError(f"--data: {root} has {found}; expected at least 2 folders, one per class, with images")
    return classes


def _files(root, classes):
    """The image files under the class folders, sorted, their labels (N,), and the other files' suffixes, counted."""
    found, others = class_files(root, classes)
    files = [path for name in classes for path in sorted(map(Path, found[name]))]
    labels = [label for label, name in enumerate(classes) for _ in found[name]]
    return files, np.array(labels, dtype=np.int64), others


def _need_two_images(root, classes, labels):
    for name, count in zip(classes, np.bincount(labels), strict=True):
        if count < 2:
            raise RunError(
                f"--data: class folder {root / name} has 1 image; expected at least 2, one to train and one to test on"
            )


def _read_all(files, size):
    """Images (N, channels, size, size), uint8; 1 channel if all are gray, else 3."""
    arrays, broken = deque(), []
    for path in files:
        try:
            arrays.append(_read(path, size))
        except MemoryError:
            raise
        except Exception as error:  # the decoders raise OSError, SyntaxError, ValueError, struct.error and more
            broken.append(f"{path}: {error or repr(error)}")
    if broken:
        images = "the image" if len(broken) == 1 else f"{len(broken)} images, such as"
        more = f"; and {len(broken) - MOST_NAMED} more" if len(broken) > MOST_NAMED else ""
        raise RunError(f"--data: cannot read {images} {'; '.join(broken[:MOST_NAMED])}{more}")
    images = np.empty((len(files), max(map(len, arrays)), size, size), np.uint8)
    for place in images:
        place[:] = arrays.popleft()  # so that an image is there once
    return images


def _read(path, size):
    """One image (1 or 3 channels, size, size)."""
    pillow = require("PIL.Image", extra="compare")
    with pillow.open(path) as image:
        array = np.asarray(eight_bits(image).resize((size, size), pillow.Resampling.BILINEAR))
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
