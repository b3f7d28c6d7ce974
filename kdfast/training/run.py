"""A whole training of timm models: processes, data, networks, the loop, the report; or a store of the teacher."""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.data import create_transform, resolve_data_config

import kdfast
from kdfast._text import printable
from kdfast.runs import checkpoints
from kdfast.runs.determinism import environment, reproducible
from kdfast.runs.errors import RunError
from kdfast.runs.files import locked
from kdfast.runs.folder import output_folder, settle
from kdfast.runs.tables import print_table
from kdfast.teacher_store import TeacherStoreWriter, refuse_others
from kdfast.training import networks, store
from kdfast.training.command import COMMAND
from kdfast.training.data import Images, Steps, Unread, loading
from kdfast.training.log import FILES, Log, Silent
from kdfast.training.ranks import Ranks, Stop, Stopped
from kdfast.training.readers import fingerprint, open_readers
from kdfast.training.settings import Settings
from kdfast.training.trainer import Trainer

__all__ = ["store_teacher", "train"]

STUDENT, AVERAGE = "student.pt", "student-ema.pt"  # as timm.create_model(checkpoint_path=...) reads them


def train(
    chosen: Settings, ranks: Ranks, folder: Path, stored: dict[str, Any] | None, options: argparse.Namespace
) -> None:
    """Train as `chosen` says, on from the run in `folder` whose settings are `stored`; `options` named the folder."""
    ranks.on_first(lambda: output_folder(options, Settings, COMMAND, (STUDENT, AVERAGE, *FILES)))
    with _prepared(chosen, ranks) as parts, contextlib.ExitStack() as held:  # by rank 0
        data = " ".join(parts.fingerprint(reader) for reader in (parts.train_images.reader, parts.val_images.reader))

        def begin():
            held.enter_context(locked(folder))
            versions = environment() | {"timm": timm.__version__, "torchvision": torchvision.__version__}
            settle(folder, chosen, stored, data, versions, warn=_say)

        ranks.on_first(begin)
        Loop(parts, folder).go()


def store_teacher(chosen: Settings, ranks: Ranks, folder: Path) -> None:
    """Write the shards that the store in `folder` lacks, each rank its share."""
    with _prepared(chosen, ranks) as parts, contextlib.ExitStack() as held:
        images, teacher = parts.train_images, parts.trainer.task.teacher
        terms = images.reader, parts.fingerprint(images.reader), images.transform, parts.classes, teacher, parts.terms
        holds = ranks.together(lambda: store.contents(chosen, *terms))

        def begin():
            refuse_others(folder)  # whose folder gets no lock either
            held.enter_context(locked(folder, "--store-teacher"))
            return TeacherStoreWriter(folder, holds).missing()

        missing = ranks.on_first(begin)
        writer = ranks.together(lambda: TeacherStoreWriter(folder, holds))
        with Stop() as stop:
            ranks.together(lambda: _write_shards(parts, writer, missing[ranks.rank :: ranks.size], stop))
    if ranks.first:
        kept = "all logits" if holds.top_k is None else f"the top {holds.top_k} and the rest"
        many = f"{holds.samples} images, {holds.augmentations} times augmented"
        print(printable(f"{folder}: {kept} of {holds.model} for {many}"))


def _write_shards(parts, writer, shards, stop):
    size = parts.shape[0]
    keys = [
        [(shard.augmentation, index) for index in range(first, min(first + size, shard.end))]
        for shard in shards
        for first in range(shard.begin, shard.end, size)
    ]
    with parts.loading(parts.train_images, keys) as batches:
        for number, shard in enumerate(shards, 1):
            logits, index = [], []
            for _ in range(shard.begin, shard.end, size):
                if stop.signal:
                    done = f"{number - 1} of {len(shards)} missing shards"
                    raise Stopped(stop.signal, f"the same command continues the store after {done}")
                batch = parts.taken(batches)
                logits.append(parts.trainer.teacher_logits(batch).float().cpu())
                index.append(batch.index)
            # In place of an image that cannot be read there is another one.
            writer.write(shard, torch.cat(logits), torch.cat(index) != torch.arange(shard.begin, shard.end))


def _say(text):
    print(f"{COMMAND}: {printable(text)}", file=sys.stderr)


# ---- what both need --------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _prepared(chosen: Settings, ranks: Ranks) -> Iterator["Parts"]:
    """Inside, all that a step needs, and steps give the same bits."""
    readers = ranks.on_first(
        lambda: open_readers(chosen.data, chosen.train_split, chosen.val_split, chosen.classes, _say)
    )
    with reproducible(chosen.threads, warn_only=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", kdfast.FallbackWarning)  # `kdfast doctor` says it
        yield Parts(chosen, ranks, *readers)


class Parts:
    """Images, order and trainer, made in every process of `ranks` alike; `store` where the teacher is one."""

    def __init__(self, chosen: Settings, ranks: Ranks, train_reader: Any, val_reader: Any, classes: int) -> None:
        self.chosen = chosen
        self.ranks = ranks
        self.classes = classes
        self.fingerprints = {}
        self.store = None
        if chosen.from_store:
            data = self.fingerprint(train_reader)
            self.store = ranks.together(lambda: store.opened(chosen, train_reader, classes, data))
        shape = len(train_reader), chosen.batch_size, chosen.accumulate
        augmentations = None if self.store is None else self.store.contents.augmentations
        self.steps = ranks.together(lambda: Steps(*shape, ranks, chosen.seed, chosen.epochs, augmentations))
        task, config = ranks.together(lambda: self._task(train_reader, classes))
        self.train_images, self.val_images = ranks.together(lambda: self._images(train_reader, val_reader, config))
        normalization = config["mean"], config["std"]
        self.shape = chosen.batch_size // chosen.accumulate // ranks.size, *config["input_size"]
        self.trainer = ranks.together(
            lambda: Trainer(chosen, ranks, task, self.steps.an_epoch, normalization, self.store)
        )
        self.unread = Unread(chosen.strict, _say)

    def fingerprint(self, reader: Any) -> str:
        """That of `reader`, which rank 0 makes once; all ranks have to call it."""
        if reader not in self.fingerprints:
            self.fingerprints[reader] = self.ranks.on_first(lambda: fingerprint(reader))
        return self.fingerprints[reader]

    def _task(self, train_reader, classes):
        """-> timm's task, and its data config for the student."""
        chosen = self.chosen
        student = networks.student(chosen, classes)
        size = {} if chosen.image_size is None else {"img_size": chosen.image_size}
        config = resolve_data_config(size, model=student)
        image_size = config["input_size"][-1]
        teacher = networks.teacher(chosen, classes, image_size) if self.store is None else None
        labels = torch.tensor([label for _, label, *_ in train_reader.samples])
        task = networks.task(chosen, student, teacher, labels, image_size, self.ranks.device)
        self.terms = task.trainable_module.objective.terms
        if self.store is not None:
            store.check_terms(self.store, chosen.recipe, self.terms)
        return task, config

    def _images(self, train_reader, val_reader, config):
        common = {name: config[name] for name in ("input_size", "interpolation", "mean")}
        common["normalize"] = False  # bytes travel to the device
        try:
            augmented = create_transform(
                **common, is_training=True, color_jitter=None, auto_augment=self.chosen.auto_augment
            )
        except Exception as error:  # timm asserts
            raise RunError(
                f"--auto-augment: timm does not take {self.chosen.auto_augment!r}, expected such as rand-m9-mstd0.5: "
                f"{error or repr(error)}"
            ) from error
        plain = create_transform(**common, crop_pct=config["crop_pct"], crop_mode=config["crop_mode"])
        seed = augmented_seed = self.chosen.seed
        if self.store is not None:  # its teacher has seen these augmentations, and the student learns from the same
            store.check_transform(self.store, augmented)
            augmented_seed = self.store.contents.seed
        train = Images(train_reader, augmented, augmented_seed, replace=True)
        return train, Images(val_reader, plain, seed, replace=False)

    # ---- batches -----------------------------------------------------------------------------------------------------
    def loading(self, images: Images, keys: Any) -> contextlib.AbstractContextManager[Iterator[Any]]:
        """Inside, the batches of these keys."""
        return loading(images, keys, self.chosen.workers, pin_memory=self.ranks.device.type == "cuda")

    def taken(self, batches: Iterator[Any]) -> Any:
        """The next of the training batches, which has no gaps."""
        batch = next(batches)
        self.unread.note(batch, self.train_images.reader)
        self.unread.refuse_gaps(batch)
        return batch


# ---- the loop --------------------------------------------------------------------------------------------------------
class Loop:
    """A training in `folder`."""

    def __init__(self, parts: Parts, folder: Path) -> None:
        self.parts, self.folder, self.checkpoints = parts, folder, folder / "checkpoints"
        self.chosen, self.ranks, self.steps, self.trainer = parts.chosen, parts.ranks, parts.steps, parts.trainer

    def go(self) -> None:
        """Train from the newest checkpoint, or the start, to the end."""
        self.ranks.on_first(self._first_checkpoint)
        if self.ranks.size > 1:
            self.trainer.warm_up(self.parts.shape)
        self.ranks.together(self._restore)
        start, total = self.trainer.steps, self.steps.total
        log = self.ranks.together(lambda: self._log(start))
        with Stop() as stop, log:
            ended = start and start % self.steps.an_epoch == 0
            if ended and not self.ranks.on_first(lambda: log.evaluated(start)):
                self._evaluate(log, stop)
            self.steps.start = start
            if self.chosen.compile and self.ranks.first:
                log.progress.say("compiling: the first step takes minutes")
            with self.parts.loading(self.parts.train_images, self.steps) as batches:
                log.restart_clock(start)
                while self.trainer.steps < total:
                    self._step(batches, log, stop)
        self._finish(log)

    def _log(self, start):
        return Log(self.folder, start, self.steps.total, self.steps.an_epoch) if self.ranks.first else Silent()

    def _first_checkpoint(self):
        """One before the first step: the state to start from, and a disk that cannot be written is known at once."""
        if not checkpoints.exist(self.checkpoints):
            checkpoints.save_newest(self.checkpoints, 0, self.trainer.state())

    def _restore(self):
        state = checkpoints.load_newest(self.checkpoints, _say if self.ranks.first else lambda text: None)
        checkpoints.continue_from(
            self.trainer.load, state, f"{self.checkpoints} are of another run; take another --out"
        )
        if self.ranks.first and self.trainer.steps:
            _say(f"resumed after step {self.trainer.steps} of {self.steps.total}")

    def _step(self, batches, log, stop):
        trainer, chosen = self.trainer, self.chosen
        trainer.step([self.parts.taken(batches) for _ in range(chosen.accumulate)])
        ended = trainer.steps % self.steps.an_epoch == 0
        if trainer.steps % chosen.log_every == 0 or ended:
            log.steps(trainer.steps, chosen.batch_size, trainer.learning_rate, self.ranks.together(trainer.losses))
        number = stop.agreed()
        if number or ended or trainer.steps % chosen.checkpoint_every == 0:
            self._save()
            log.restart_clock(trainer.steps)
        if number:
            raise Stopped(number)
        if ended:
            self._evaluate(log, stop)
            log.restart_clock(trainer.steps)

    def _save(self):
        state = self.ranks.together(self.trainer.state)
        if self.ranks.first:
            checkpoints.save_newest(self.checkpoints, self.trainer.steps, state)

    def _evaluate(self, log, stop):
        """Test the epoch that has just ended; its checkpoint is written already."""
        ranks, size = self.ranks, max(1, self.chosen.batch_size // self.ranks.size)
        mine = range(ranks.rank, len(self.parts.val_images), ranks.size)
        keys = [[(0, index) for index in mine[first : first + size]] for first in range(0, len(mine), size)]
        with self.parts.loading(self.parts.val_images, keys) as batches:
            log.epoch(self.trainer.steps, self.trainer.evaluate(self._readable(batches, stop)))

    def _readable(self, batches, stop):
        for batch in batches:
            if stop.signal:
                raise Stopped(stop.signal)
            self.parts.unread.note(batch, self.parts.val_images.reader)
            yield batch

    # ---- after the training ------------------------------------------------------------------------------------------
    def _finish(self, log):
        skipped = len(set().union(*self.ranks.gather(self.parts.unread.names)))
        if not self.ranks.first:
            return
        weights = {STUDENT: self.trainer.task.get_checkpoint_state()["state_dict"]}
        if self.chosen.ema is not None:
            weights[AVERAGE] = self.trainer.task.get_checkpoint_state(ema=True)["state_dict_ema"]
        for name, state in weights.items():
            checkpoints.save(self.folder / name, state)
        last = {name: float(value) for name, value in log.epochs.rows[-1].items()}
        rows = [["student", *(f"{last[name]:.2f}" for name in ("top1", "top5"))]]
        if self.chosen.ema is not None:
            rows.append(["its average", *(f"{last[f'ema_{name}']:.2f}" for name in ("top1", "top5"))])
        chosen, images = self.chosen, (len(self.parts.train_images), len(self.parts.val_images))
        notes = [
            f"{chosen.student} from {chosen.teacher} with {chosen.recipe}: {self.steps.total} steps",
            f"{images[0]} training and {images[1]} validation images, {skipped} skipped",
            f"written: {', '.join(str(self.folder / name) for name in (*weights, *FILES))}",
        ]
        print_table(["last epoch", "top-1 %", "top-5 %"], rows, notes)
