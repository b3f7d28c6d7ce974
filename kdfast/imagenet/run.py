"""The whole of the trainer of timm models: settings, processes, data, networks, the loop, the report."""

import argparse
import contextlib
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
import torchvision
from timm.data import create_transform, resolve_data_config

import kdfast
from kdfast._text import printable
from kdfast.distill import DistillError, pipeline, report, storage
from kdfast.distill import settings as stored_runs
from kdfast.distill.train import reproducible
from kdfast.imagenet import checkpoints, networks, settings, stored
from kdfast.imagenet.data import Images, Steps, Unread, loading
from kdfast.imagenet.log import FILES, Log, Silent
from kdfast.imagenet.ranks import Stop, Stopped
from kdfast.imagenet.readers import fingerprint, open_readers
from kdfast.imagenet.train import Trainer
from kdfast.teacher_store import TeacherStoreWriter, refuse_others

if TYPE_CHECKING:
    from kdfast.imagenet.ranks import Ranks
    from kdfast.imagenet.settings import Settings


__all__ = ["train"]

STUDENT, AVERAGE = "student.pt", "student-ema.pt"  # as timm.create_model(checkpoint_path=...) reads them


def train(chosen: "Settings", options: argparse.Namespace, folder: Path, here: "Ranks") -> None:
    """Train as `chosen` says, or store the teacher; among the processes `here`, `options` of the command line."""
    if not chosen.store_teacher:
        here.on_first(lambda: pipeline.output_folder(options, files=(STUDENT, AVERAGE, *FILES)))
    train_reader, val_reader, classes = here.on_first(
        lambda: open_readers(chosen.data, chosen.train_split, chosen.val_split, chosen.classes, _say)
    )
    with reproducible(chosen.threads, warn_only=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", kdfast.FallbackWarning)  # `kdfast doctor` says it
        run = _Run(chosen, here, folder, train_reader, val_reader, classes)
        with contextlib.ExitStack() as held:  # of rank 0
            if chosen.store_teacher:
                return run.store_teacher(held)
            data = run.fingerprint(train_reader), run.fingerprint(val_reader)
            here.on_first(lambda: _settle(chosen, options, folder, " ".join(data), held))
            run.go()


def _settle(chosen, options, folder, data, held):
    """Write down what is asked for, or compare it with what was, in the folder that is `held` from now on."""
    held.enter_context(storage.locked(folder))
    path = folder / "settings.json"
    here = pipeline.environment() | {"timm": timm.__version__, "torchvision": torchvision.__version__}
    if not (options.resume and path.exists()):
        return pipeline.begin(folder, stored_runs.record(chosen, data, here))
    stored = settings.read(path)
    stored["settings"] |= {name: getattr(chosen, name) for name in settings.FREE}
    if found := stored_runs.differences(stored, chosen, data, stored["environment"]):
        raise DistillError(f"cannot resume {folder}: {'; '.join(found)}; train anew with another --out")
    if found := stored_runs.differences(stored, chosen, data, here):
        _say(f"the weights may differ in their last bits: {'; '.join(found)}")


def _say(text):
    print(f"{pipeline.COMMAND}: {printable(text)}", file=sys.stderr)


class _Run:
    """What the loop needs, made in every process."""

    def __init__(self, chosen, here, folder, train_reader, val_reader, classes):
        self.chosen, self.here, self.folder, self.checkpoints = chosen, here, folder, folder / "checkpoints"
        self.classes = classes
        self.fingerprints = {}
        self.store = None
        if stored.is_store(chosen.teacher):
            data = self.fingerprint(train_reader)
            self.store = here.together(lambda: stored.opened(chosen, train_reader, classes, data))
        shape = len(train_reader), chosen.batch_size, chosen.accumulate
        augmentations = None if self.store is None else self.store.contents.augmentations
        self.steps = here.together(lambda: Steps(*shape, here, chosen.seed, chosen.epochs, augmentations))
        task, config = here.together(lambda: self._task(train_reader, classes))
        self.train_images, self.val_images = here.together(lambda: self._images(train_reader, val_reader, config))
        normalization = config["mean"], config["std"]
        self.shape = chosen.batch_size // chosen.accumulate // here.size, *config["input_size"]
        self.trainer = here.together(
            lambda: Trainer(chosen, here, task, self.steps.an_epoch, normalization, self.store)
        )
        self.unread = Unread(chosen.strict, _say)

    def fingerprint(self, reader):
        """That of `reader`, which rank 0 makes once; all ranks have to call it."""
        if reader not in self.fingerprints:
            self.fingerprints[reader] = self.here.on_first(lambda: fingerprint(reader))
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
        task = networks.task(chosen, student, teacher, labels, image_size, self.here.device)
        self.terms = task.trainable_module.objective.terms
        if self.store is not None:
            stored.check_terms(self.store, chosen.preset, self.terms)
        return task, config

    def _images(self, train_reader, val_reader, config):
        common = {name: config[name] for name in ("input_size", "interpolation", "mean")}
        common["normalize"] = False  # bytes travel to the device
        try:
            augmented = create_transform(
                **common, is_training=True, color_jitter=None, auto_augment=self.chosen.auto_augment
            )
        except Exception as error:  # timm asserts
            raise DistillError(
                f"--auto-augment: timm does not take {self.chosen.auto_augment!r}, expected such as rand-m9-mstd0.5: "
                f"{error or repr(error)}"
            ) from error
        plain = create_transform(**common, crop_pct=config["crop_pct"], crop_mode=config["crop_mode"])
        seed = augmented_seed = self.chosen.seed
        if self.store is not None:  # its teacher has seen these augmentations, and the student learns from the same
            stored.check_transform(self.store, augmented)
            augmented_seed = self.store.contents.seed
        train = Images(train_reader, augmented, augmented_seed, replace=True)
        return train, Images(val_reader, plain, seed, replace=False)

    # ---- the loop ----------------------------------------------------------------------------------------------------
    def go(self):
        """Train from the newest checkpoint, or the start, to the end."""
        self.here.on_first(self._first_checkpoint)
        if self.here.size > 1:
            self.trainer.warm_up(self.shape)
        self.here.together(self._restore)
        start, total = self.trainer.steps, self.steps.total
        log = self.here.together(lambda: self._log(start))
        with Stop() as stop, log:
            ended = start and start % self.steps.an_epoch == 0
            if ended and not self.here.on_first(lambda: log.evaluated(start)):
                self._evaluate(log, stop)
            self.steps.start = start
            if self.chosen.compile and self.here.first:
                log.say("compiling: the first step takes minutes")
            with self._loading(self.train_images, self.steps) as batches:
                log.restart_clock(start)
                while self.trainer.steps < total:
                    self._step(batches, log, stop)
        self._finish(log)

    def _log(self, start):
        return Log(self.folder, start, self.steps.total, self.steps.an_epoch) if self.here.first else Silent()

    def _first_checkpoint(self):
        """One before the first step: the state to start from, and a disk that cannot be written is known at once."""
        if not checkpoints.exist(self.checkpoints):
            checkpoints.save(self.checkpoints, 0, self.trainer.state())

    def _restore(self):
        state = checkpoints.newest(self.checkpoints, _say if self.here.first else lambda text: None)
        try:
            self.trainer.load(state)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:  # of something else
            raise DistillError(f"{self.checkpoints} are of another run ({error}); take another --out") from error
        if self.here.first and self.trainer.steps:
            _say(f"resumed after step {self.trainer.steps} of {self.steps.total}")

    def _loading(self, images, keys):
        return loading(images, keys, self.chosen.workers, pin_memory=self.here.device.type == "cuda")

    def _step(self, batches, log, stop):
        trainer, chosen = self.trainer, self.chosen
        trainer.step([self._taken(batches) for _ in range(chosen.accumulate)])
        ended = trainer.steps % self.steps.an_epoch == 0
        if trainer.steps % chosen.log_every == 0 or ended:
            log.steps(trainer.steps, chosen.batch_size, trainer.learning_rate, self.here.together(trainer.losses))
        number = stop.agreed()
        if number or ended or trainer.steps % chosen.checkpoint_every == 0:
            self._save()
            log.restart_clock(trainer.steps)
        if number:
            raise Stopped(number)
        if ended:
            self._evaluate(log, stop)
            log.restart_clock(trainer.steps)

    def _taken(self, batches):
        batch = next(batches)
        self.unread.note(batch, self.train_images.reader)
        self.unread.refuse_gaps(batch)
        return batch

    def _save(self):
        state = self.here.together(self.trainer.state)
        if self.here.first:
            checkpoints.save(self.checkpoints, self.trainer.steps, state)

    def _evaluate(self, log, stop):
        """Test the epoch that has just ended; its checkpoint is written already."""
        here, size = self.here, max(1, self.chosen.batch_size // self.here.size)
        mine = range(here.rank, len(self.val_images), here.size)
        keys = [[(0, index) for index in mine[first : first + size]] for first in range(0, len(mine), size)]
        with self._loading(self.val_images, keys) as batches:
            log.epoch(self.trainer.steps, self.trainer.evaluate(self._readable(batches, stop)))

    def _readable(self, batches, stop):
        for batch in batches:
            if stop.signal:
                raise Stopped(stop.signal)
            self.unread.note(batch, self.val_images.reader)
            yield batch

    # ---- a store of the teacher's logits -----------------------------------------------------------------------------
    def store_teacher(self, held):
        """Write the shards that the store lacks, each rank its share, into the folder that is `held` from now on."""
        chosen, here, images = self.chosen, self.here, self.train_images
        teacher = self.trainer.task.teacher
        data = self.fingerprint(images.reader)
        terms = images.reader, data, images.transform, self.classes, teacher, self.terms
        holds = here.together(lambda: stored.contents(chosen, *terms))
        folder = Path(chosen.store_teacher)
        missing = here.on_first(lambda: self._missing(folder, holds, held))
        writer = here.together(lambda: TeacherStoreWriter(folder, holds))
        with Stop() as stop:
            here.together(lambda: self._write(writer, missing[here.rank :: here.size], stop))
        if here.first:
            kept = "all logits" if holds.top_k is None else f"the top {holds.top_k} and the rest"
            many = f"{holds.samples} images, {holds.augmentations} times augmented"
            print(printable(f"{folder}: {kept} of {holds.model} for {many}"))

    @staticmethod
    def _missing(folder, holds, held):
        refuse_others(folder)  # whose folder gets no lock either
        held.enter_context(storage.locked(folder, "--store-teacher"))
        return TeacherStoreWriter(folder, holds).missing()

    def _write(self, writer, shards, stop):
        size = self.shape[0]
        keys = [
            [(shard.augmentation, index) for index in range(first, min(first + size, shard.end))]
            for shard in shards
            for first in range(shard.begin, shard.end, size)
        ]
        with self._loading(self.train_images, keys) as batches:
            for number, shard in enumerate(shards, 1):
                logits, index = [], []
                for _ in range(shard.begin, shard.end, size):
                    if stop.signal:
                        done = f"{number - 1} of {len(shards)} missing shards"
                        raise Stopped(stop.signal, f"the same command continues the store after {done}")
                    batch = self._taken(batches)
                    logits.append(self.trainer.teacher_logits(batch).float().cpu())
                    index.append(batch.index)
                # In place of an image that cannot be read there is another one.
                writer.write(shard, torch.cat(logits), torch.cat(index) != torch.arange(shard.begin, shard.end))

    # ---- after the training ------------------------------------------------------------------------------------------
    def _finish(self, log):
        skipped = len(set().union(*self.here.gather(self.unread.names)))
        if not self.here.first:
            return
        weights = {STUDENT: self.trainer.task.get_checkpoint_state()["state_dict"]}
        if self.chosen.ema is not None:
            weights[AVERAGE] = self.trainer.task.get_checkpoint_state(ema=True)["state_dict_ema"]
        for name, state in weights.items():
            storage.save_checkpoint(self.folder / name, state)
        last = {name: float(value) for name, value in log.epochs.rows[-1].items()}
        rows = [["student", *(f"{last[name]:.2f}" for name in ("top1", "top5"))]]
        if self.chosen.ema is not None:
            rows.append(["its average", *(f"{last[f'ema_{name}']:.2f}" for name in ("top1", "top5"))])
        chosen = self.chosen
        notes = [
            f"{chosen.student} from {chosen.teacher} with {chosen.preset}: {self.steps.total} steps",
            f"{len(self.train_images)} training and {len(self.val_images)} validation images, {skipped} skipped",
            f"written: {', '.join(str(self.folder / name) for name in (*weights, *FILES))}",
        ]
        report.print_table(["last epoch", "top-1 %", "top-5 %"], rows, notes)
