"""The whole of a comparison: settings, data, the trainings in their order, the report."""

import argparse
import os
import warnings
from pathlib import Path

import kdfast
from kdfast import _kernels
from kdfast._extras import require
from kdfast.lab import data, report, timing
from kdfast.lab.compare import DIGITS, Settings
from kdfast.lab.experiments import ALONE, needed
from kdfast.lab.trainer import Trainer, Training
from kdfast.runs import checkpoints
from kdfast.runs.determinism import environment, reproducible
from kdfast.runs.errors import RunError
from kdfast.runs.files import locked
from kdfast.runs.folder import settle, stored_settings
from kdfast.runs.options import resolve

__all__ = ["compare"]


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Do what the parsed `options` ask for, in `folder`."""
    stored = stored_settings(options, Settings, folder)
    if options.image_size is not None and options.data is None and (not stored or stored["settings"]["data"] == DIGITS):
        raise RunError("--image-size: the digits have a size of their own; expected only with --data")
    chosen = resolve(Settings, options, stored)
    _require_all(chosen)
    _require_kernels(chosen.device)
    images = data.load(chosen.data, chosen.image_size)
    with locked(folder):
        settle(folder, chosen, stored, images.fingerprint(), environment())
        with reproducible(chosen.threads), warnings.catch_warnings():
            # The table says which path ran, row by row.
            warnings.simplefilter("ignore", kdfast.FallbackWarning)
            results = _train_all(chosen, images.to(chosen.device), folder)
        report.write_files(folder, results, f"Distillation on {images.name}")
    report.write_table(results, _notes(chosen, images, folder, results))


def _require_all(chosen):
    """Import every optional dependency of this run now, so that none is found missing after the training."""
    images = "sklearn.datasets" if chosen.data == DIGITS else "PIL.Image"
    for module in ("rich.console", "matplotlib.figure", images):
        require(module, extra="compare")


def _require_kernels(device):
    library = _kernels.status()["_cuda" if device.startswith("cuda") else "_cpu"]
    if os.environ.get("KDFAST_REQUIRE_KERNELS") == "1" and not library.loaded:
        raise RunError(f"--device {device}: it has no kernels, and KDFAST_REQUIRE_KERNELS is 1: {library.reason}")


# ---- the training ----------------------------------------------------------------------------------------------------
OTHER_TEACHERS = 1000  # from the seed of a teacher to that of the next one in an ensemble of teachers


def _plan(chosen):
    """Teachers, students alone, then each loss after those that teach it; a seed has its own teachers."""
    rows = needed(chosen.losses)
    teachers = max(1, *(row.teachers for row in rows.values()))
    kinds = [("teacher", "teacher", ALONE, OTHER_TEACHERS * i) for i in range(teachers)]
    kinds += [("student", "student", ALONE, 0), *((name, "student", row, 0) for name, row in rows.items())]
    return [
        Training(name, network, row, seed + more) for name, network, row, more in kinds for seed in chosen.every_seed
    ]


def _train_all(chosen, images, folder):
    """Train what is not trained yet; returns one Result per training, but for the further teachers of an ensemble."""
    trainings = _plan(chosen)
    trained = {}  # (name, seed) -> network, for those that others learn from
    learnt_from = {"teacher", "student", *(training.row.teacher for training in trainings)}
    results = []
    epochs = sum(training.row.pre_stage_epochs(chosen.epochs) + chosen.epochs for training in trainings)
    with report.TrainingProgress(len(trainings), epochs) as progress:
        for training in trainings:
            teachers = [
                trained[training.row.teacher, training.seed + OTHER_TEACHERS * i] for i in range(training.row.teachers)
            ]
            with Trainer(training, images, chosen.epochs, chosen.batch_size, teachers) as trainer:
                times = _train(trainer, folder / "checkpoints" / training.file_name, progress)
            if training.name in learnt_from:
                trained[training.name, training.seed] = trainer.student.eval().requires_grad_(False)
            result = report.Result(training.name, training.seed, trainer.history, times)
            progress.finish(result, trainer.all_epochs)
            if training.seed in chosen.every_seed:
                results.append(result)
    return results


def _train(trainer, path, progress):
    """Bring `trainer` to its last epoch, from the checkpoint at `path` if there is one; returns the times of a step."""
    state = _restore(trainer, path) if path.exists() else {}
    while len(trainer.history) < trainer.epochs:
        trainer.train_epoch()
        state = trainer.state()
        checkpoints.save(path, state)
        progress.epoch(trainer.training, trainer.epochs_done)
    if "times" not in state:
        times = timing.measure(trainer)
        state = _restore(trainer, path)  # the measured steps have moved the weights
        state["times"] = times
        checkpoints.save(path, state)
    return state["times"]


def _restore(trainer, path):
    damaged = f"{path} is damaged; delete it and --resume trains this part again from its start"
    return checkpoints.continue_from(trainer.load, checkpoints.load(path), damaged)


# ---- after the training ----------------------------------------------------------------------------------------------
def _notes(chosen, images, folder, results):
    sizes = f"{len(images.train_labels)} training and {len(images.test_labels)} test images"
    seeds = f"seeds {chosen.seed} to {chosen.seed + chosen.seeds - 1}" if chosen.seeds > 1 else f"seed {chosen.seed}"
    paths = {result.times["path"] for result in results}
    rows = needed(chosen.losses)
    before = {name: row.pre_stage_epochs(chosen.epochs) for name, row in rows.items() if row.pre_stage}
    stages = [f"epochs of a pre-stage before: {max(before.values())} ({', '.join(before)})"] if before else []
    unbuilt = ["fallback: its kernel is not built for this device, see `kdfast doctor`"] if "fallback" in paths else []
    return [
        f"{images.name}: {sizes}, {chosen.epochs} epochs, {seeds}, {chosen.device}",
        "accuracy: test set, last epoch, mean and standard deviation over the seeds",
        *stages,
        "in the loss: forward and backward of loss and cross-entropy, share of a step",
        "fused : fallback: the loss alone, by kernel and in plain PyTorch (-: no kernel)",
        *unbuilt,
        f"written: {', '.join(str(folder / name) for name in report.FILES)}",
    ]
