"""Which images a step sees, and how each is augmented: functions of (seed, epoch, index) alone.

So a resumed run needs a step number and nothing else to see the same batches, ranks share a batch without talking, and
an augmented image can be made again later: ``Images(...)[augmentation, index]``.
"""

import contextlib
import random
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from kdfast.runs.determinism import derived_seed
from kdfast.runs.errors import RunError
from kdfast.runs.images import eight_bits
from kdfast.training.ranks import end_with_parent

if TYPE_CHECKING:
    from kdfast.training.ranks import Ranks
    from kdfast.training.readers import ClassFolders, IndexedShards


__all__ = ["Batch", "Images", "Steps", "Unread", "loading", "seeded"]

UNREADABLE_IN_A_ROW = 10  # then it is the disk, and not an image


class Batch(NamedTuple):
    """One rank's share of a micro-batch."""

    images: torch.Tensor  # (B, 3, H, W) uint8
    labels: torch.Tensor  # (B,) int64; -1 for a validation image that could not be read
    index: torch.Tensor  # (B,) int64, places in the data set of the images that were read
    augmentation: int
    unread: list[tuple[int, str]]  # (index, message) of the images that could not be read


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[Any]:
    """Inside, the random numbers of Python, numpy and torch's CPU are those of `seed`; afterwards as if nothing was.

    But not in a process of a DataLoader, where nothing else draws any, and numpy's state takes long to copy.
    """
    alone = torch.utils.data.get_worker_info() is not None
    states = None if alone else (random.getstate(), np.random.get_state(), torch.random.default_generator.get_state())
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        if states:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.random.default_generator.set_state(states[2])


class Images(Dataset[Any]):
    """The images of a timm reader by (augmentation, index): the same pair gives the same bytes in every process.

    An item is ``(image (3, H, W) uint8, label, augmentation, index, unread)``. An image that cannot be read is replaced
    by the next one that can (`replace`), else by zeros with the label -1; `unread` lists (index, message) of those.
    """

    def __init__(self, reader: Any, transform: Any, seed: int, replace: bool) -> None:
        self.reader = reader
        self.transform = transform
        self.seed = seed
        self.replace = replace

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...]:
        augmentation, index = key
        unread = []
        while True:
            try:
                image, label = self._read(index)
                break
            except MemoryError:
                raise
            except Exception as error:  # the decoders raise OSError, SyntaxError, ValueError, struct.error and more
                unread.append((index, str(error) or repr(error)))
            if not self.replace or len(unread) == UNREADABLE_IN_A_ROW:
                image, label = Image.new("RGB", (32, 32)), -1
                break
            index = (index + 1) % len(self)
        with seeded(derived_seed(self.seed, augmentation, index)):
            return self.transform(image), label, augmentation, index, unread

    def _read(self, index):
        file, label = self.reader[index]
        with file, Image.open(file) as image:
            return eight_bits(image).convert("RGB"), label


class Steps:
    """The keys of one rank's micro-batches from step ``start`` to the end of the training, in order.

    A step is a global batch of `batch_size` images in `accumulate` micro-batches. Of each micro-batch every rank has
    one slice, in the order of the ranks, so that together they are the micro-batch of one process. An epoch is a
    permutation of the data set without its last images, which would not fill a batch. The augmentation of a key is the
    epoch, or counts from 0 to `augmentations` - 1 again and again.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        accumulate: int,
        ranks: "Ranks",
        seed: int,
        epochs: int,
        augmentations: int | None = None,
    ) -> None:
        if samples < batch_size:
            raise RunError(f"--batch-size: got {batch_size}, expected at most the {samples} training images")
        if batch_size % (accumulate * ranks.size):
            parts = f"{accumulate} micro-batches (--accumulate) on {ranks.size} processes"
            raise RunError(f"--batch-size: got {batch_size}, expected a multiple of {parts}")
        if batch_size // (accumulate * ranks.size) < 2:
            raise RunError(
                f"--accumulate: got {accumulate}, which leaves 1 of the {batch_size} images of --batch-size to a "
                f"micro-batch on {ranks.size} processes; expected at least 2, for batch statistics and relations"
            )
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.accumulate = accumulate
        self.rank: int = ranks.rank
        self.ranks: int = ranks.size
        self.augmentations: int = augmentations or epochs
        self.an_epoch: int = samples // batch_size
        self.total: int = self.an_epoch * epochs
        self.start = 0

    def __len__(self) -> int:
        return (self.total - self.start) * self.accumulate

    def __iter__(self) -> Iterator[Any]:
        order = None
        for step in range(self.start, self.total):
            epoch, position = divmod(step, self.an_epoch)
            if order is None or position == 0:
                generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
                order = torch.randperm(self.samples, generator=generator)
            batch = order[position * self.batch_size :][: self.batch_size]
            for micro in batch.chunk(self.accumulate):
                yield [(epoch % self.augmentations, index) for index in micro.chunk(self.ranks)[self.rank].tolist()]


@contextlib.contextmanager
def loading(images: "Images", keys: "Steps | list[list[Any]]", workers: int, pin_memory: bool) -> Iterator[Any]:
    """Inside, an iterator of `Batch`es, one for each list of keys in `keys`; its processes end with the block.

    However the block ends: at the interpreter's end, processes that ignore its SIGTERM would be waited for without end.
    """
    batches = iter(
        DataLoader(
            images,
            batch_sampler=keys,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            worker_init_fn=end_with_parent,
        )
    )
    try:
        yield batches
    except Exception as error:  # of the processes' pipes and sockets, or torch's RuntimeError
        if ended := _ended(batches):
            raise RunError(
                f"--workers: one of the {workers} processes that load images was ended by {ended}; if it was out of "
                "memory, take fewer; what is written is intact, and the run can be continued"
            ) from error
        raise
    finally:
        if workers:
            with contextlib.suppress(RuntimeError):  # which torch raises anywhere when a process has been killed
                batches._shutdown_workers()  # has no public name, and an exception keeps the iterator alive
            for worker in batches._workers:
                if worker.is_alive():
                    worker.kill()


def _ended(batches):
    """The name of a signal that has ended one of the processes behind `batches`, or None."""
    for worker in getattr(batches, "_workers", ()):
        with contextlib.suppress(RuntimeError):
            worker.join(0.1)  # its end may be seen in its socket first
        if worker.exitcode is not None and worker.exitcode < 0:
            return signal.Signals(-worker.exitcode).name
    return None


def _collate(items):
    images, labels, (augmentation, *_), index, unread = zip(*items, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(index), augmentation, sum(unread, []))


class Unread:
    """The images that could not be read: ``say(line)`` names each once; where `strict`, the first ends the run."""

    def __init__(self, strict: bool, say: Callable[..., Any]) -> None:
        self.strict = strict
        self.say = say
        self.names: set[Any] = set()

    def note(self, batch: "Batch", reader: "ClassFolders | IndexedShards") -> None:
        """Look at a `batch` of images from `reader`."""
        for index, message in batch.unread:
            name = reader.filename(index, absolute=True)
            if self.strict:
                raise RunError(f"--data: cannot read {name}: {message}")
            if name not in self.names:
                self.names.add(name)
                self.say(f"cannot read {name}, skipped ({len(self.names)} so far): {message}")

    def refuse_gaps(self, batch: "Batch") -> None:
        """Raise a RunError if a training image was not replaced, because too many in a row cannot be read."""
        if (batch.labels < 0).any():
            raise RunError(f"--data: {UNREADABLE_IN_A_ROW} images in a row cannot be read, see the lines above")
