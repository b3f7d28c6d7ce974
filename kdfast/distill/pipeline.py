"""The whole of `kdfast distill`: settings, data, the runs in their order, the report."""

import argparse
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import kdfast
from kdfast import _kernels
from kdfast._extras import require
from kdfast._text import printable
from kdfast.distill import DistillError, data, report, settings, storage, timing
from kdfast.distill.losses import ALONE, needed
from kdfast.distill.train import Run, Trainer, reproducible
from kdfast.imagenet import settings as imagenet

__all__ = ["COMMAND", "begin", "distill", "environment", "output_folder"]

COMMAND = "kdfast distill"
DEFAULT_ROOT = Path("runs")


def distill(options: argparse.Namespace, folder: Path) -> None:
    """Do what the parsed `options` ask for, in `folder`."""
    settings_file = folder / "settings.json"
    stored = settings.read(settings_file) if options.resume and settings_file.exists() else None
    chosen = settings.resolve(options, stored)
    _require_all(chosen)
    _require_kernels(chosen.device)
    images = data.load(chosen.data, chosen.image_size)
    here = environment()
    with storage.locked(folder):
        if stored is None:
            begin(folder, settings.record(chosen, images.fingerprint(), here))
        elif found := settings.differences(stored, chosen, images.fingerprint(), here):
            raise DistillError(f"cannot resume {folder}: {'; '.join(found)}; train anew with another --out")
        with reproducible(chosen.threads), warnings.catch_warnings():
            # The table says which path ran, row by row.
            warnings.simplefilter("ignore", kdfast.FallbackWarning)
            results = _train_all(chosen, images.to(chosen.device), folder)
        report.write_files(folder, results, f"Distillation on {images.name}")
    report.write_table(results, _notes(chosen, images, folder, results))


# ---- before the training ---------------------------------------------------------------------------------------------
def output_folder(options: argparse.Namespace, command: str = COMMAND, files: tuple[Any, ...] = report.FILES) -> Path:
    """The folder of a run of `command`, which writes `files`: a new one, or with --resume the one to continue."""
    stem = command.removeprefix("kdfast ").replace(" ", "-")
    if options.out is not None and not options.out:
        raise DistillError("--out: got '', expected a folder")
    folder = Path(options.out) if options.out else (_newest(stem) if options.resume else None) or _unused(stem)
    if folder.exists() and not folder.is_dir():
        raise DistillError(f"--out: {folder} is a file; expected a folder")
    if (folder / "settings.json").exists():
        if not options.resume:
            raise _taken(folder)
    elif taken := [name for name in files if (folder / name).exists()]:
        raise DistillError(f"--out: {folder} has a {taken[0]} that belongs to no run; take another --out")
    elif options.resume:
        if _only_resumes(options):
            where = folder if options.out else DEFAULT_ROOT
            start = "to start one, leave out --resume, or give options of the run"
            raise DistillError(f"--resume: there is no run in {where} to continue; {start}")
        print(f"{command}: nothing to resume, starting in {printable(str(folder))}", file=sys.stderr)
    return folder


def begin(folder: Path, content: bytes) -> None:
    """Start a run in the locked `folder`: its settings.json with these bytes, and a folder for checkpoints."""
    if (folder / "settings.json").exists():  # since the check of `output_folder`
        raise _taken(folder)
    folder.joinpath("checkpoints").mkdir(exist_ok=True)
    storage.write_atomically(folder / "settings.json", content)


def _taken(folder):
    return DistillError(f"--out: {folder} holds a run already; continue it with --resume, or take another --out")


def _only_resumes(options):
    """Whether `options` do not say what to run: where nothing can be resumed, the folder's name is then mistyped."""
    silent = ("command", "study", "out", "resume", *imagenet.OWN)  # a new run of timm models has --data, too
    return all(value is None for name, value in vars(options).items() if name not in silent)


def _newest(stem):
    runs = [path.parent for path in DEFAULT_ROOT.glob(f"{stem}-*/settings.json")]
    return max(runs, key=_order, default=None)


def _unused(stem):
    """A new folder that comes after those there, also where the clock was set back, and is no other process's."""
    folder = DEFAULT_ROOT / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    newest = max(DEFAULT_ROOT.glob(f"{stem}-*"), key=_order, default=folder)
    return (
        DEFAULT_ROOT / f"{newest.name}-{os.getpid()}" if folder.exists() or _order(newest) > _order(folder) else folder
    )


def _order(folder):
    """The numbers in its name: date, time, process."""
    return [int(number) for number in re.findall(r"\d+", folder.name)]


def _require_all(chosen):
    """Import every optional dependency of this run now, so that none is found missing after the training."""
    images = "sklearn.datasets" if chosen.data == settings.DIGITS else "PIL.Image"
    for module in ("rich.console", "matplotlib.figure", images):
        require(module, extra="distill")


def _require_kernels(device):
    library = _kernels.status()["_cuda" if device.startswith("cuda") else "_C"]
    if os.environ.get("KDFAST_REQUIRE_KERNELS") == "1" and not library.loaded:
        raise DistillError(f"--device {device}: it has no kernels, and KDFAST_REQUIRE_KERNELS is 1: {library.reason}")


def environment() -> dict[str, str]:
    """What decides the bits of the results besides the settings and the images."""
    loaded = [name for name, library in _kernels.status().items() if library.loaded]
    return {
        "kdfast": kdfast.__version__,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "kernels": " ".join(loaded) or "none",
    }


# ---- the training ----------------------------------------------------------------------------------------------------
OTHER_TEACHERS = 1000  # from the seed of a teacher to that of the next one in an ensemble of teachers


def _seeds(chosen):
    return range(chosen.seed, chosen.seed + chosen.seeds)


def _plan(chosen):
    """The runs: teachers, students alone, then each loss after those that teach it; a seed has its own teachers."""
    rows = needed(chosen.losses)
    kinds = [("teacher", "teacher", ALONE, OTHER_TEACHERS * i) for i in range(max(1, *(row.teachers for row in rows)))]
    kinds += [("student", "student", ALONE, 0), *((row.name, "student", row, 0) for row in rows)]
    return [Run(name, network, row, seed + more) for name, network, row, more in kinds for seed in _seeds(chosen)]


def _train_all(chosen, images, folder):
    """Train what is not trained yet; returns one Result per run, but for the further teachers of an ensemble."""
    runs = _plan(chosen)
    trained = {}  # (name, seed) -> network, for the runs that others learn from
    learnt_from = {"teacher", "student", *(run.row.teacher for run in runs)}
    results = []
    epochs = sum(run.row.pre_stage_epochs(chosen.epochs) + chosen.epochs for run in runs)
    with report.RunProgress(len(runs), epochs) as progress:
        for run in runs:
            teacher = trained[run.row.teacher, run.seed] if run.row.taught else None
            teachers = [trained["teacher", run.seed + OTHER_TEACHERS * i] for i in range(run.row.teachers)]
            with Trainer(run, images, chosen.epochs, chosen.batch_size, teacher, teachers) as trainer:
                times = _train(trainer, folder / "checkpoints" / run.file_name, progress)
            if run.name in learnt_from:
                trained[run.name, run.seed] = trainer.student.eval().requires_grad_(False)
            result = report.Result(run.name, run.seed, trainer.history, times)
            progress.run(result, trainer.all_epochs)
            if run.seed in _seeds(chosen):
                results.append(result)
    return results


def _train(trainer, path, progress):
    """Bring `trainer` to its last epoch, from the checkpoint at `path` if there is one; returns the times of a step."""
    state = _restore(trainer, path) if path.exists() else {}
    while len(trainer.history) < trainer.epochs:
        trainer.train_epoch()
        state = trainer.state()
        storage.save_checkpoint(path, state)
        progress.epoch(trainer.run, trainer.epochs_done)
    if "times" not in state:
        times = timing.measure(trainer)
        state = _restore(trainer, path)  # the measured steps have moved the weights
        state["times"] = times
        storage.save_checkpoint(path, state)
    return state["times"]


def _restore(trainer, path):
    state = storage.load_checkpoint(path)
    try:
        trainer.load(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:  # a checkpoint of something else
        raise storage.damaged(path) from error
    return state


# ---- after the training ----------------------------------------------------------------------------------------------
def _notes(chosen, images, folder, results):
    sizes = f"{len(images.train_labels)} training and {len(images.test_labels)} test images"
    seeds = f"seeds {chosen.seed} to {chosen.seed + chosen.seeds - 1}" if chosen.seeds > 1 else f"seed {chosen.seed}"
    paths = {result.times["path"] for result in results}
    before = {row.name: row.pre_stage_epochs(chosen.epochs) for row in needed(chosen.losses) if row.pre_stage}
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
