"""A teacher's logits on disk, for each image and augmentation: training from them needs no teacher.

Or its k largest log-probabilities, and for each sample one row, as of images, or as many as it has tokens.

A store is a folder. ``manifest.json`` tells its `Contents`: which teacher, which images, how augmented, how stored.
``logits-AAAA-NNNNN.safetensors`` is a shard: consecutive images of one augmentation, with "logits" [rows, classes], or
of a top-k store "values" and "indices" [rows, k] and, of logits, "rest" [rows] (see :class:`kdfast.TopK`). Of sequences
all tokens are rows, and "offsets" [samples + 1] tells where each sequence begins. Its metadata has the SHA-256 of its
tensors' bytes, in the order of their names, and that of the contents it belongs to. A shard is whole or absent.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast import _files
from kdfast._extras import require
from kdfast.ops import check
from kdfast.ops.top_k import TAILS, TopK

__all__ = ["Contents", "Shard", "StoreError", "TeacherStore", "TeacherStoreWriter", "refuse_others"]

FORMAT = "kdfast teacher logits, 2"
MANIFEST = "manifest.json"
SHARD_BYTES = 64 << 20  # of memory while a shard is made
MOST_SHARDS = 10_000_000
LONG = 100  # characters of a field that a message does not show whole
SHARD_ROWS = 32_768  # less than a minute of a teacher's work, which a kill loses
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class StoreError(ValueError):
    """A store that is not there, not whole, damaged or another's, or cannot be written; the message is one line."""


@dataclass(frozen=True)
class Contents:
    """What a store holds. Two runs may share it if all of this is equal."""

    model: str  # the teacher's name, with its weights
    classes: int
    data: str  # a fingerprint of the images, in the order of their indices
    samples: int
    transform: str  # how an image becomes the teacher's input
    seed: int  # of the augmentations
    augmentations: int  # of each image, numbered from 0
    dtype: str = "float16"
    top_k: int | None = None  # None: all logits
    temperature: float | None = None  # of the rest of a top-k store, or of its log-probabilities
    tail: str = "rest"  # of a top-k store: "rest" of logits, of log-probabilities another tail of `TopK`
    longest: int | None = None  # tokens of the longest sequence; None: each sample is one row

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name in ("classes", "samples", "augmentations"):
            if not _is_whole(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        if not (self.top_k is None or _is_whole(self.top_k)):
            raise ValueError(f"top_k must be a whole number or None, got {self.top_k!r}")
        if not (self.temperature is None or isinstance(self.temperature, (int, float))):
            raise ValueError(f"temperature must be a number or None, got {self.temperature!r}")
        if self.top_k is not None and not 1 <= self.top_k <= self.classes:
            raise ValueError(f"top_k must be from 1 to the {self.classes} classes, got {self.top_k}")
        if (self.top_k is None) != (self.temperature is None):
            raise ValueError(
                f"top_k and temperature go together: the rest of a top-k teacher has one, got top_k={self.top_k} and "
                f"temperature={self.temperature}"
            )
        check.one_of("tail", self.tail, ("rest", *TAILS))
        if self.tail != "rest" and self.top_k is None:
            raise ValueError(f"tail={self.tail!r} is that of a top-k store: it needs top_k, got None")
        if self.longest is not None and not (_is_whole(self.longest) and self.longest >= 1):
            raise ValueError(f"longest must be a whole number of at least 1 or None, got {self.longest!r}")

    def encode(self, teacher: "Tensor | TopK") -> dict[str, Tensor]:
        """(rows, classes) logits, or log-probabilities where the tail is theirs, as the tensors of a shard, by name."""
        dtype = DTYPES[self.dtype]
        if self.top_k is None:
            return {"logits": self._narrow(teacher, dtype)}
        top = TopK.of(teacher, self.top_k, self.temperature) if self.tail == "rest" else teacher
        tensors = {"values": self._narrow(top.values, dtype), "indices": top.indices.to(self._index_dtype)}
        return tensors if top.rest is None else {**tensors, "rest": top.rest.float()}

    def layout(self, samples: int, rows: int) -> dict[str, Any]:
        """Name -> (shape, dtype) of the tensors of a shard of so many samples, which are one row each or sequences."""
        tensors = {} if self.longest is None else {"offsets": ((samples + 1,), torch.int64)}
        dtype, wide = DTYPES[self.dtype], (rows, self.top_k)
        if self.top_k is None:
            return {**tensors, "logits": ((rows, self.classes), dtype)}
        tensors |= {"values": (wide, dtype), "indices": (wide, self._index_dtype)}
        return tensors if self.tail != "rest" else {**tensors, "rest": ((rows,), torch.float32)}

    def blank(self, rows: int) -> "TopK | Tensor":
        """What a teacher says of so many rows that could not be read."""
        if self.tail == "rest":
            return torch.zeros(rows, self.classes)
        values = torch.zeros(rows, self.top_k)
        return TopK.of_log_probabilities(values, torch.full_like(values, -1).long(), self.temperature, self.tail)

    @property
    def values(self) -> str:
        """The name of the tensor whose NaN marks what could not be read."""
        return "logits" if self.top_k is None else "values"

    @property
    def _index_dtype(self):
        return torch.int16 if self.classes <= 1 << 15 else torch.int32

    def decode(self, tensors: dict[str, Tensor]) -> "TopK | Tensor":
        """The teacher that `kdfast.ops.softmax_kl` takes."""
        if self.top_k is None:
            return tensors["logits"]
        return TopK(tensors["values"], tensors["indices"], tensors.get("rest"), self.temperature, self.tail)

    def _narrow(self, values, dtype):
        narrow = values.to(dtype)
        if (narrow.isinf() & values.isfinite()).any():
            largest = values[values.isfinite()].abs().max()
            raise StoreError(f"the teacher's logits are up to {largest:g}, too large for {self.dtype}: store float32")
        return narrow

    @property
    def row_bytes(self) -> int:
        """What one image or token takes."""
        size = DTYPES[self.dtype].itemsize
        if self.top_k is None:
            return self.classes * size
        return self.top_k * (size + self._index_dtype.itemsize) + 4 * (self.tail == "rest")

    @property
    def rows_at_most(self) -> int:
        """Samples in a shard."""
        return max(1, min(SHARD_ROWS, SHARD_BYTES // (self.row_bytes * (self.longest or 1))))

    def as_dict(self) -> dict[str, Any]:
        """The fields that a manifest has: those that came later only where they say something."""
        later = {"tail": "rest", "longest": None}
        return {name: value for name, value in asdict(self).items() if later.get(name, ...) != value}

    @property
    def digest(self) -> str:
        """The SHA-256 that shards name."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    def differences(self, other: dict[str, Any]) -> list[Any]:
        """Words "name ours, not theirs" for the fields of the dict `other` that are not equal."""
        mine = asdict(self)
        both = {name: _apart(mine[name], value) for name, value in other.items() if mine[name] != value}
        found = {name: f"{ours!r}, not {theirs!r}" for name, (ours, theirs) in both.items()}
        if "data" in found:  # the digests alone tell nobody what has changed
            same = "" if "samples" in found else f", or other names, sizes, labels or order of the {self.samples}"
            found["data"] = f"of other images{same} ({found['data']})"
        return [f"{name} {words}" for name, words in found.items()]


def _apart(ours, theirs):
    """Both values; of long texts the words that differ, and "..." for the same words around them."""
    if not (isinstance(ours, str) and isinstance(theirs, str)) or min(len(ours), len(theirs)) < LONG:
        return ours, theirs
    ours, theirs = ours.split(), theirs.split()
    same = len(os.path.commonprefix([ours, theirs]))
    same_end = len(os.path.commonprefix([ours[same:][::-1], theirs[same:][::-1]]))
    return tuple(
        " ".join(["..."] * (same > 0) + words[same : len(words) - same_end] + ["..."] * (same_end > 0))
        for words in (ours, theirs)
    )


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


class Shard(NamedTuple):
    """Images `begin` .. `end` - 1 of one augmentation."""

    augmentation: int
    number: int
    begin: int
    end: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"logits-{self.augmentation:04d}-{self.number:05d}.safetensors"


class _Folder:
    """A folder with a manifest: the part that readers and writers share."""

    def __init__(self, folder, contents, rows):
        self.folder, self.contents, self.rows = Path(folder), contents, rows

    @classmethod
    def of(cls, folder):
        """The store in `folder`, as its manifest tells."""
        path = Path(folder) / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise StoreError(f"{path} has the format {manifest['format']!r}, expected {FORMAT!r}")
            contents, rows = Contents(**manifest["contents"]), manifest["rows"]
            if not _is_whole(rows) or rows < 1:
                raise ValueError(f"rows must be a whole number of at least 1, got {rows!r}")
            if contents.augmentations * contents.samples / rows > MOST_SHARDS:
                raise ValueError(f"{contents.samples} images in shards of {rows} are too many")
            return cls(folder, contents, rows)
        except FileNotFoundError:
            raise StoreError(f"{folder} is no teacher store: it has no {MANIFEST}") from None
        except StoreError:
            raise
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise StoreError(f"{path} is damaged: {error}") from error

    def shards(self):
        """All shards that the whole store has."""
        for augmentation in range(self.contents.augmentations):
            for number in range(-(-self.contents.samples // self.rows)):
                yield self.shard(augmentation, number)

    def shard(self, augmentation, number):
        begin = number * self.rows
        return Shard(augmentation, number, begin, min(begin + self.rows, self.contents.samples))

    def missing(self):
        """Those that are not there."""
        there = {path.name for path in self.folder.glob("logits-*.safetensors")}
        return [shard for shard in self.shards() if shard.name not in there]


def refuse_others(folder: Path) -> None:
    """Raise a StoreError if `folder` has files, but for hidden ones such as a lock, and is no store."""
    if not folder.is_dir() or (folder / MANIFEST).exists():
        return
    if any(not path.name.startswith(".") for path in folder.iterdir()):
        raise StoreError(f"{folder} is neither empty nor a teacher store: expected another folder")


# ---- writing ---------------------------------------------------------------------------------------------------------
class TeacherStoreWriter:
    """Writes the shards of a store that are not there yet, in any order, and several processes different ones.

    Opening it creates the folder and the manifest (one process first), or finds what an earlier writer left.

    Example::

        writer = TeacherStoreWriter("store", contents)
        for shard in writer.missing()[rank::ranks]:
            writer.write(shard, teacher(images(shard.augmentation, range(shard.begin, shard.end))))

    Args:
        folder: where; new, empty, or a store of the same contents.
        contents: the `Contents`.
        rows: samples in a shard of a new store (default: as many as fill 64 MiB, up to 32768).

    Raises: StoreError if the folder holds something else, naming what differs, or its disk has too little space (of
    sequences, whose size nobody knows before, a full disk shows when a shard is written).
    """

    def __init__(self, folder: Path, contents: "Contents", rows: int | None = None) -> None:
        self._safetensors = require("safetensors.torch", extra="train")
        folder = Path(folder)
        if (folder / MANIFEST).exists():
            store = _Folder.of(folder)
            if differences := store.contents.differences(asdict(contents)):
                raise StoreError(f"{folder} has another store: {'; '.join(differences)}; expected another folder")
        else:
            store = self._create(folder, contents, rows or contents.rows_at_most)
        self._store = store
        needed = sum(shard.end - shard.begin for shard in self.missing()) * contents.row_bytes
        if contents.longest is None and needed > (free := shutil.disk_usage(folder).free):
            raise StoreError(f"{folder}: the missing shards need {needed / 1e9:.3g} GB, the disk has {free / 1e9:.3g}")

    @staticmethod
    def _create(folder, contents, rows):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            refuse_others(folder)
        except OSError as error:
            raise StoreError(f"cannot write to {folder}: {error.strerror or error}") from error
        manifest = {"format": FORMAT, "contents": contents.as_dict(), "rows": rows}
        _write(folder / MANIFEST, json.dumps(manifest, indent=2).encode(), "start again")
        return _Folder(folder, contents, rows)

    def missing(self) -> list[Any]:
        """The shards that are still to be written."""
        return self._store.missing()

    def write(self, shard: "Shard", logits: Any, absent: Tensor | None = None) -> None:
        """Write what the teacher says of all samples of `shard`, in their order.

        Args:
            shard: one of :meth:`missing`.
            logits: (rows, classes); where the contents' tail is not "rest" a `TopK` of log-probabilities (rows, k), of
                that tail and temperature. Of sequences a list with one of them for each, whose rows are its tokens.
            absent: (rows,) marks samples that could not be read: a reader raises if it is asked for them.

        Raises: TypeError, ValueError for another kind, shape, tail or temperature, and for what is no log-probability;
        StoreError for NaN or inf, if the disk is full or the dtype too narrow.
        """
        contents, samples = self._store.contents, shard.end - shard.begin
        absent = torch.zeros(samples, dtype=torch.bool) if absent is None else absent.cpu()
        if contents.longest is None:
            expected, called = (samples, shard.name), lambda row: f"image {shard.begin + row}"
            rows = _checked(contents, "logits", logits, expected, absent, called)
            tensors = contents.encode(_without(rows, absent))
        else:
            tensors = _joined(contents, shard, logits, absent.tolist())
        tensors = {name: x.contiguous() for name, x in tensors.items()}
        metadata = {"sha256": _digest(tensors), "contents": contents.digest}
        content = _in_order(self._safetensors.save(tensors, metadata))
        _write(self._store.folder / shard.name, content, "the same command continues")


def _joined(contents, shard, sequences, absent):
    """The tensors of a shard of sequences, one after the other; one that is absent is a single row."""
    if isinstance(sequences, TopK) or not isinstance(sequences, (list, tuple)):
        raise TypeError(f"logits must be a list of sequences, got {type(sequences).__name__}")
    if len(sequences) != len(absent):
        raise ValueError(f"logits must have the {len(absent)} sequences of {shard.name}, got {len(sequences)}")
    rows, offsets = [contents.encode(contents.blank(0))], [0]
    for i, (sequence, gone) in enumerate(zip(sequences, absent, strict=True)):
        if gone:
            sequence = contents.blank(1)
        values = sequence.values if isinstance(sequence, TopK) else sequence
        check.tensor(f"logits[{i}]", values)
        tokens = len(values) if values.dim() else 0
        if tokens > contents.longest:
            raise ValueError(f"logits[{i}] must have at most longest={contents.longest} tokens, got {tokens}")
        gone, called = torch.full((tokens,), gone), f"token {{}} of sequence {shard.begin + i}".format
        sequence = _checked(contents, f"logits[{i}]", sequence, (tokens, shard.name), gone, called)
        rows.append(contents.encode(_without(sequence, gone)))
        offsets.append(offsets[-1] + tokens)
    joined = {name: torch.cat([tensors[name] for tensors in rows]) for name in rows[0]}
    return {**joined, "offsets": torch.tensor(offsets)}


def _without(teacher, absent):
    """The same with NaN in the rows that are absent."""
    if not isinstance(teacher, TopK):
        return teacher.masked_fill(absent[:, None], float("nan"))
    return teacher._replace(values=teacher.values.masked_fill(absent[:, None], float("nan")))


def _checked(contents, name, teacher, expected, absent, called):
    """Logits, or log-probabilities whose padding is -inf, on the CPU.

    expected: how many rows, and of which file. absent: rows that may hold anything. called: row -> its name.
    """
    rows, file = expected
    if contents.tail != "rest":
        return _checked_top_k(contents, name, teacher, expected, absent, called)
    check.floating(name, teacher)
    _check_shape(name, teacher, (rows, contents.classes), file)
    teacher = teacher.detach().cpu()
    _check_numbers("logits", teacher, absent, called)
    return teacher


def _checked_top_k(contents, name, teacher, expected, absent, called):
    rows, file = expected
    if not isinstance(teacher, TopK):
        raise TypeError(f"{name} must be a TopK of log-probabilities, got {type(teacher).__name__}")
    for what in ("tail", "temperature"):
        ours, theirs = getattr(contents, what), getattr(teacher, what)
        if ours != theirs:
            raise ValueError(f"{name} must have the store's {what} {ours!r}, got {theirs!r}")
    check.floating(f"{name}.values", teacher.values)
    check.tensor(f"{name}.indices", teacher.indices)
    _check_shape(f"{name}.values", teacher.values, (rows, contents.top_k), file)
    _check_shape(f"{name}.indices", teacher.indices, (rows, contents.top_k), file)
    if teacher.indices.dtype not in check.INTEGERS:
        raise TypeError(f"{name}.indices must be integers, got {teacher.indices.dtype}")
    indices = teacher.indices.cpu().long().masked_fill(absent[:, None], -1)
    check.distinct_classes(indices, contents.classes, True, f"{name}.indices")
    values = teacher.values.detach().cpu().masked_fill(indices < 0, -float("inf"))
    _check_numbers("log-probabilities", values, absent, called)
    check.log_probabilities(f"{name}.values", values)
    return teacher._replace(values=values, indices=indices)


def _check_shape(name, x, expected, file):
    if x.shape != expected:
        raise ValueError(f"{name} must have the shape {expected} of {file}, got {tuple(x.shape)}")


def _check_numbers(kind, values, absent, called):
    bad = (values.isnan() | (values == float("inf"))).any(1) & ~absent
    if bad.any():
        row = called(int(bad.nonzero()[0]))
        raise StoreError(f"the teacher's {kind} must be numbers, got NaN or inf for {row}")


def _write(path, content, then):
    try:
        _files.write_atomically(path, content)
    except OSError as error:
        intact = f"what was written before is intact, and {then}"
        raise StoreError(f"cannot write {path}: {error.strerror or error}; {intact}") from error


def _in_order(content):
    """The bytes of a safetensors file with the keys of its header in order, so that equal tensors are equal files."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    return content[:8] + header.ljust(size) + content[8 + size :]


def _words(layout):
    parts = [f"{name} {shape} {str(dtype).removeprefix('torch.')}" for name, (shape, dtype) in sorted(layout.items())]
    return ", ".join(parts) or "no tensors"


def _digest(tensors):
    """SHA-256 of the tensors' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- reading ---------------------------------------------------------------------------------------------------------
class TeacherStore:
    """A whole store, read through memory maps: `logits(index, augmentation)` is a batch for the losses.

    Example::

        store = TeacherStore("store")
        store.check(classes=1000, samples=len(images))
        loss = kdfast.KD()(student(x), store.logits(index, augmentation=epoch % store.contents.augmentations))

    Args:
        folder: where the store is.
        verify: compare a shard with its checksum when it is first used.
        name: index -> what a message calls an image beside its index, such as its file.

    Raises: StoreError if the store is not there, not whole or damaged.
    """

    def __init__(self, folder: Path | str, verify: bool = True, name: Callable[..., Any] | None = None) -> None:
        self._safetensors = require("safetensors", extra="train")
        self._store = _Folder.of(folder)
        self._verify, self._name = verify, name
        self._open = {}  # (augmentation, number) -> name -> tensor
        if missing := self._store.missing():
            total = sum(1 for _ in self._store.shards())
            raise StoreError(
                f"{folder} is not whole: {len(missing)} of {total} shards are missing, first {missing[0].name}; "
                "the command that wrote it continues"
            )

    @property
    def contents(self) -> "Contents":
        """The `Contents`."""
        return self._store.contents

    def check(self, **expected: Any) -> None:
        """Raise a StoreError that names every field of `contents` that is not as `expected`, with both values."""
        if differences := self.contents.differences(expected):
            raise StoreError(f"{self._store.folder} does not fit: it has {'; '.join(differences)}")

    def logits(self, index: Tensor | int | list[int], augmentation: int = 0) -> Any:
        """What the teacher says of samples `index` (B,): (B, classes) logits, or a `TopK`; on the CPU.

        Of sequences a list with one of them for each, whose rows are its tokens.

        Args:
            index: places of the samples in the data set.
            augmentation: of which augmentation.

        Raises: IndexError for an image or augmentation that the store does not have; StoreError for a damaged shard
        and for an image that could not be read when it was written.
        """
        contents, rows = self.contents, self._store.rows
        if not 0 <= augmentation < contents.augmentations:
            raise IndexError(f"augmentation must be from 0 to {contents.augmentations - 1}, got {augmentation}")
        index = torch.as_tensor(index).reshape(-1)
        if len(index) and not (0 <= index.min() and index.max() < contents.samples):
            raise IndexError(f"index must be from 0 to {contents.samples - 1}, got {index.min()} to {index.max()}")
        if contents.longest is not None:
            return [self._sequence(i, augmentation) for i in index.tolist()]
        numbers = index // rows
        batch = {}
        for number in numbers.unique().tolist() or [0]:
            places = (numbers == number).nonzero()[:, 0]
            for name, rows_of in self._shard(augmentation, number).items():
                if name not in batch:
                    batch[name] = rows_of.new_empty((len(index), *rows_of.shape[1:]))
                batch[name][places] = rows_of[index[places] - number * rows]
        absent = batch[contents.values][:, 0].isnan()
        if absent.any():
            self._refuse(int(index[absent][0]), augmentation)
        return contents.decode(batch)

    def _sequence(self, i, augmentation):
        number, place = divmod(i, self._store.rows)
        tensors = dict(self._shard(augmentation, number))
        begin, end = tensors.pop("offsets")[place : place + 2].tolist()
        sequence = {name: x[begin:end].clone() for name, x in tensors.items()}
        if sequence[self.contents.values][:1, 0].isnan().any():
            self._refuse(i, augmentation)
        return self.contents.decode(sequence)

    def _refuse(self, i, augmentation):
        kind = "image" if self.contents.longest is None else "sequence"
        called = f" ({self._name(i)})" if self._name else ""
        raise StoreError(
            f"{self._store.folder} has no logits of {kind} {i}{called} in augmentation {augmentation}, which "
            "could not be read when they were written: write the store anew"
        )

    def verify(self) -> None:
        """Compare every shard with its checksum; a StoreError names the first that is damaged."""
        for shard in self._store.shards():
            self._load(shard, verify=True)

    def _shard(self, augmentation, number):
        if (augmentation, number) not in self._open:
            self._open[augmentation, number] = self._load(self._store.shard(augmentation, number), self._verify)
        return self._open[augmentation, number]

    def _load(self, shard, verify):
        """The tensors of a shard, which stay in its file until they are read."""
        path, contents = self._store.folder / shard.name, self.contents
        try:
            with self._safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:  # a damaged header can raise anything
            raise StoreError(f"{path} is damaged ({error}): delete it, and write it again") from error
        if metadata.get("contents") != contents.digest:
            raise StoreError(f"{path} belongs to another store: delete it, and write it again")
        samples = shard.end - shard.begin
        rows = samples if contents.longest is None else sum(tensors.get(contents.values, torch.empty(0)).shape[:1])
        expected = contents.layout(samples, rows)
        if (found := {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}) != expected:
            raise StoreError(f"{path} has {_words(found)}, expected {_words(expected)}: delete it, and write it again")
        if verify and _digest(tensors) != metadata.get("sha256"):
            raise StoreError(f"{path} is damaged (its checksum differs): delete it, and write it again")
        if contents.longest is not None:
            begins = tensors["offsets"]
            if begins[0] != 0 or begins[-1] != rows or (begins.diff() < 0).any():
                raise StoreError(
                    f"{path} is damaged (its offsets do not divide {rows} rows): delete it, and write it again"
                )
        return tensors
