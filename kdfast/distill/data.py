"""Images and labels: scikit-learn's handwritten digits, or a folder of class folders."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kdfast._extras import require
from kdfast.distill import DistillError
from kdfast.distill.settings import DIGITS

__all__ = ["Data", "load", "subfolders"]

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
TEST_FOLDERS = ("test", "val", "valid", "validation")
# The split is part of the data, so that accuracies of different --seed are comparable.
SPLIT_SEED = 0


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
    def tensors(self):
        """The four tensors, training set first."""
        return self.train_images, self.train_labels, self.test_images, self.test_labels

    def fingerprint(self):
        """A digest of every image, label and class name: equal only for equal data."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for tensor in self.tensors:
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def to(self, device):
        """The same data on `device`."""
        return Data(self.name, self.classes, *(tensor.to(device) for tensor in self.tensors))


def load(name, image_size):
    """`DIGITS`, or the images under the folder `name`, resized to `image_size` squares."""
    return _digits() if name == DIGITS else _folder(Path(name), image_size)


def _digits():
    bunch = require("sklearn.datasets", extra="distill").load_digits()
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
    mean = train_images.mean(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
    deviation = train_images.std(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
    deviation[deviation == 0] = 1.0  # a constant channel carries nothing; it stays 0

    train_images, test_images = ((images - mean) / deviation for images in (train_images, test_images))
    arrays = train_images.astype(np.float32), train_labels, test_images.astype(np.float32), test_labels
    return Data(name, classes, *map(torch.from_numpy, arrays))


# ---- folders of images -----------------------------------------------------------------------------------------------
def _folder(root, size):
    if not root.is_dir():
        raise DistillError(f"--data: {root} is not a folder; expected a folder of class folders of images")
    train_root, test_root = _split_folders(root)
    classes = _classes(train_root)
    files, labels = _files(train_root, classes)
    if test_root is None:
        _need_two_images(root, classes, labels)
        images = _read_all(files, size)
        train, test = _split(labels, test_share=0.2)
        return _standardised(str(root), classes, images[train], labels[train], images[test], labels[test])
    if _classes(test_root) != classes:
        raise DistillError(f"--data: the class folders of {test_root} and {train_root} differ; expected the same names")
    test_files, test_labels = _files(test_root, classes)
    images = _read_all(files + test_files, size)  # together: if one is in colour, all are
    return _standardised(str(root), classes, images[: len(files)], labels, images[len(files) :], test_labels)


def _split_folders(root):
    """(training folder, test folder), or (root, None) where the class folders lie in `root` itself."""
    train = root / "train"
    # A folder "train" that holds images and no folders is a class: cars, trains, trams.
    if not subfolders(train):
        return root, None
    for name in TEST_FOLDERS:
        if (root / name).is_dir():
            return train, root / name
    raise DistillError(f"--data: {root} has a folder train and no test or val beside it; add one, or pass {train}")


def subfolders(folder):
    """The names of the folders in `folder` that are not hidden, sorted; none where it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _classes(root):
    classes = subfolders(root)
    if len(classes) < 2:
        found = f"only the class folder {classes[0]}" if classes else "no class folders"
        raise DistillError(f"--data: {root} has {found}; expected at least 2 folders, one per class, with images")
    return classes


def _files(root, classes):
    """The image files under the class folders, sorted, and their labels (N,)."""
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (root / name).rglob("*") if _is_image(path))
        if not found:
            expected = f"expected files ending in {', '.join(sorted(SUFFIXES))}"
            raise DistillError(f"--data: class folder {root / name} has no images; {expected}")
        files += found
        labels += [label] * len(found)
    return files, np.array(labels, dtype=np.int64)


def _is_image(path):
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _need_two_images(root, classes, labels):
    for name, count in zip(classes, np.bincount(labels), strict=True):
        if count < 2:
            raise DistillError(
                f"--data: class folder {root / name} has 1 image; expected at least 2, one to train and one to test on"
            )


def _read_all(files, size):
    """Images (N, channels, size, size), float32 in 0..255; 1 channel if all are gray, else 3."""
    arrays = [_read(path, size) for path in files]
    channels = max(len(array) for array in arrays)
    return np.stack([np.broadcast_to(array, (channels, size, size)) for array in arrays]).astype(np.float32)


def _read(path, size):
    """One image (1 or 3 channels, size, size)."""
    pillow = require("PIL.Image", extra="distill")
    try:
        with pillow.open(path) as image:
            image = _eight_bits(pillow, image)
            image = image.resize((size, size), pillow.Resampling.BILINEAR)
            array = np.asarray(image)
    except Exception as error:  # the decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise DistillError(f"--data: cannot read the image {path}: {error or repr(error)}") from error
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _eight_bits(pillow, image):
    """The image as gray ("L") or colour ("RGB")."""
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion would clip at 255
        return pillow.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
    return image.convert("L" if image.mode in ("1", "L", "LA", "F") else "RGB")
