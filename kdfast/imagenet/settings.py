"""The options of the trainer of timm models, their checks, and the run that they make."""

import argparse
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kdfast.distill import DistillError
from kdfast.distill import settings as stored_runs
from kdfast.distill.settings import device, whole
from kdfast.integrations.presets import PRESETS

__all__ = ["DEFAULTS", "FREE", "OWN", "Settings", "add_arguments", "asked_for", "read", "refuse", "resolve"]

# Options that may change when a run is resumed: they do not change the weights.
FREE = ("workers", "checkpoint_every", "log_every", "strict")


@dataclass(frozen=True)
class Settings:
    """The checked arguments; the defaults are those of the options."""

    data: str
    student: str
    teacher: str
    teacher_weights: str | None = None
    store_teacher: str | None = None
    store_top_k: int | None = None
    store_dtype: str = "float16"
    store_augmentations: int | None = None
    preset: str = "kd"
    train_split: str = "train"
    val_split: str = "validation"
    classes: int | None = None
    image_size: int | None = None
    epochs: int = 100
    batch_size: int = 256
    accumulate: int = 1
    optimizer: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 1e-4
    warmup_epochs: int = 0
    ema: float | None = None
    auto_augment: str | None = None
    amp: bool = False
    channels_last: bool = False
    compile: bool = False
    sync_bn: bool = False
    strict: bool = False
    workers: int = 4
    checkpoint_every: int = 1000
    log_every: int = 50
    seed: int = 0
    device: str | None = None
    threads: int = 1


DEFAULTS = {field.name: field.default for field in fields(Settings)}
# Options that `kdfast distill` has without a student, too.
SHARED = ("data", "image_size", "epochs", "batch_size", "seed", "device", "threads")
OWN = tuple(name for name in DEFAULTS if name not in SHARED)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that the other trainer does not have; one that is not given is None."""
    group = parser.add_argument_group(
        "timm models (--student and --teacher; needs --data and --out, runs under torchrun, too)",
        "--data is a folder with train/ and val/, or wds/FOLDER of webdataset shards; --batch-size counts the images "
        "of an optimizer step on all processes",
    )

    def add(name, metavar, text):
        default = DEFAULTS[name.removeprefix("--").replace("-", "_")]
        shown = f" (default: {default})" if isinstance(default, (int, float, str)) else ""
        group.add_argument(name, metavar=metavar, help=f"{text}{shown}")

    def switch(name, text):
        group.add_argument(name, action="store_const", const=True, help=text)

    add("--student", "NAME", "timm's name of the student, which starts from random weights")
    add("--teacher", "NAME", "timm's name of the teacher, or the folder that --store-teacher has written")
    add("--teacher-weights", "FILE", "the teacher's weights (default: the pretrained ones, from timm's cache)")
    add("--store-teacher", "FOLDER", "train nothing: write the teacher's logits of all images here, for --teacher")
    add("--store-top-k", "K", "of each image the K largest and the sum of the others (default: all)")
    add("--store-dtype", "NAME", "float16 or float32")
    add("--store-augmentations", "N", "of each image; epochs take them in turn (default: as many as --epochs)")
    add("--preset", "NAME", f"losses with their papers' weights for ImageNet: {', '.join(PRESETS)}")
    add("--train-split", "NAME", "of wds/: a split, or files in braces as timm takes them")
    add("--val-split", "NAME", "the same for validation")
    add("--classes", "N", "of wds/: number of classes (default: one more than the largest training label)")
    add("--accumulate", "N", "micro-batches a step; losses of relations see one micro-batch of all processes")
    add("--optimizer", "NAME", "timm's name of the optimizer")
    add("--lr", "X", "learning rate after the warm-up; a cosine leads from there to 0")
    add("--weight-decay", "X", "weight decay")
    add("--warmup-epochs", "N", "epochs in which the learning rate rises to --lr")
    add("--ema", "DECAY", "keep and test a moving average of the student, of this decay (0.9999)")
    add("--auto-augment", "POLICY", "timm's name of an augmentation beside crops and flips (rand-m9-mstd0.5)")
    switch("--amp", "compute in bfloat16 where autocast does")
    switch("--channels-last", "keep images and maps in the layout that tensor cores want")
    switch("--compile", "compile the networks with torch.compile")
    switch("--sync-bn", "batch statistics over all processes (CUDA)")
    switch("--strict", "stop at an image that cannot be read, instead of skipping it")
    add("--workers", "N", "processes that load images, for each process that trains")
    add("--checkpoint-every", "N", "steps between checkpoints; each epoch ends with one, and so does a SIGTERM")
    add("--log-every", "N", "steps between lines of the log")


def asked_for(options: argparse.Namespace) -> bool:
    """Whether `options` are for this trainer: they name a network, or resume a run that has one."""
    if options.student is not None or options.teacher is not None:
        return True
    if not (options.resume and options.out):
        return False
    try:
        return "student" in json.loads((Path(options.out) / "settings.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # the other trainer will say what is wrong


def read(path: Path) -> dict[str, Any]:
    """The dict of a settings.json of this trainer."""
    # Whether a file is there is asked where it is read: another one may be given on --resume.
    return stored_runs.read(path, DEFAULTS, {name: check for name, check in _CHECKS.items() if check is not _file})


def refuse(options: argparse.Namespace, names: tuple[Any, ...], why: str) -> None:
    """Raise a DistillError if one of the options `names` is given."""
    for name in names:
        if getattr(options, name) is not None:
            raise DistillError(f"--{name.replace('_', '-')}: {why}")


def resolve(options: argparse.Namespace, stored: dict[str, Any] | None = None) -> "Settings":
    """Settings from the parsed `options`; what was not given comes from the `stored` run's, else from the defaults."""
    refuse(options, ("loss", "seeds"), "does not go with --student and --teacher; expected --preset and --seed")
    values = {}
    for name, default in DEFAULTS.items():
        given, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        if given is not None and name in _CHECKS:
            values[name] = _CHECKS[name](flag, given)
        elif given is not None:
            values[name] = given
        elif stored is not None:
            values[name] = stored["settings"][name]
        elif name in ("data", "student", "teacher"):
            also = "" if options.store_teacher else ", and --out"
            raise DistillError(f"{flag}: is missing; expected --student, --teacher and --data{also}")
        else:
            values[name] = default
    values["device"] = values["device"] or _default_device()
    _check_store(options, values)
    if values["sync_bn"] and not values["device"].startswith("cuda"):
        raise DistillError("--sync-bn: torch has it for CUDA alone; leave it out, or take a student without batch norm")
    if values["warmup_epochs"] >= values["epochs"]:
        raise DistillError(
            f"--warmup-epochs: got {values['warmup_epochs']}, expected less than the {values['epochs']} of --epochs"
        )
    return Settings(**values)


def _check_store(options, values):
    writes, reads = values["store_teacher"] is not None, Path(values["teacher"]).is_absolute()
    if writes and options.out is not None:
        raise DistillError("--out: --store-teacher trains nothing, and writes to its own folder alone")
    if writes and reads:
        raise DistillError(f"--teacher: {values['teacher']} is a folder; expected a model, for --store-teacher")
    if not writes:
        refuse(options, ("store_top_k", "store_dtype", "store_augmentations"), "expected with --store-teacher")
    if reads and values["teacher_weights"] is not None:
        raise DistillError("--teacher-weights: does not go with a folder as --teacher, which has the logits already")


def _default_device():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _number(below=math.inf, zero=True):
    expected = f"a number {'of at least' if zero else 'greater than'} 0" + (f" and below {below}" * (below < math.inf))

    def check(argument, text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < below or (value == 0 and not zero):
            raise DistillError(f"{argument}: got {text!r}, expected {expected}")
        return value

    return check


def _data(argument, text):
    prefix = "wds/" if text.startswith("wds/") else ""
    if text == prefix:
        raise DistillError(f"{argument}: got {text!r}, expected a folder, or wds/ and a folder of shards")
    return prefix + str(Path(text.removeprefix(prefix)).resolve())


def _file(argument, text):
    if not Path(text).is_file():
        raise DistillError(f"{argument}: {text} is not a file; expected the teacher's weights")
    return str(Path(text).resolve())


def _teacher(argument, text):
    """A model's name as it is, a folder as an absolute path."""
    path = Path(text)
    is_store = (path / "manifest.json").is_file() or (path.is_dir() and len(path.parts) > 1)
    return str(path.resolve()) if is_store else text


def _store_dtype(argument, text):
    if text not in ("float16", "float32"):
        raise DistillError(f"{argument}: got {text!r}, expected float16 or float32")
    return text


_CHECKS = {
    "data": _data,
    "teacher": _teacher,
    "teacher_weights": _file,
    "store_top_k": whole(1),
    "store_dtype": _store_dtype,
    "store_augmentations": whole(1),
    "classes": whole(2),
    "image_size": whole(8, 4096),
    "epochs": whole(1),
    "batch_size": whole(2),
    "accumulate": whole(1),
    "lr": _number(zero=False),
    "weight_decay": _number(),
    "warmup_epochs": whole(0),
    "ema": _number(below=1),
    "workers": whole(0, 1024),
    "checkpoint_every": whole(1),
    "log_every": whole(1),
    "seed": whole(0),
    "device": device,
    "threads": whole(1, 1024),
}
