"""The options of `kdfast train` and their checks."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdfast.runs.errors import RunError
from kdfast.runs.options import device, flag, number, option, resolve, whole

__all__ = ["RECIPES", "Settings", "settings_of"]

# Of `kdfast.objectives.recipes`: the table itself needs torch, and --help does not.
RECIPES = ("kd", "dkd", "dist", "rkd", "pkt", "sp", "at", "nst", "fitnets", "vid", "ofd", "crd", "crd-kd")
FOLDERS = "train/ and val/ with a folder per class, or wds/FOLDER of webdataset shards"


def _data(argument, text):
    prefix = "wds/" if text.startswith("wds/") else ""
    if text == prefix:
        raise RunError(f"{argument}: got {text!r}, expected a folder, or wds/ and a folder of shards")
    return prefix + str(Path(text.removeprefix(prefix)).resolve())


def _file(argument, text):
    if not Path(text).is_file():
        raise RunError(f"{argument}: {text} is not a file; expected the teacher's weights")
    return str(Path(text).resolve())


def _teacher(argument, text):
    """A model's name as it is, a folder as an absolute path."""
    path = Path(text)
    is_store = (path / "manifest.json").is_file() or (path.is_dir() and len(path.parts) > 1)
    return str(path.resolve()) if is_store else text


def _one_of(*names):
    def check(argument, text):
        if text not in names:
            raise RunError(f"{argument}: got {text!r}, expected one of {', '.join(names)}")
        return text

    return check


def _name(argument, text):
    """timm says which there are, where it is asked for one."""
    return text


def _of(group):
    """`option` of this group."""

    def grouped(*arguments: Any, **more: Any) -> Any:
        return option(*arguments, group=group, **more)

    return grouped


_network, _images, _training = _of("networks and losses"), _of("images"), _of("training")
_speed, _run, _store = _of("how a step computes"), _of("the run"), _of("a store of the teacher's logits")


@dataclass(frozen=True)
class Settings:
    """The checked options; `teacher` is timm's name of a model, or the absolute path of a store."""

    data: str = _images("PATH", FOLDERS, _data)
    student: str = _network("NAME", "timm's name of the student, which starts from random weights")
    teacher: str = _network("NAME", "timm's name of the teacher, or a folder that --store-teacher wrote", _teacher)
    # Whether a file is there is asked where it is read: another one may be given on --resume.
    teacher_weights: str | None = _network(
        "FILE", "the teacher's weights (default: the pretrained ones, from timm's cache)", _file, None, of_stored=False
    )
    recipe: str = _network(
        "NAME", f"losses with their papers' weights for ImageNet: {', '.join(RECIPES)}", _one_of(*RECIPES), "kd"
    )
    train_split: str = _images("NAME", "of wds/: a split, or files in braces as timm takes them", _name, "train")
    val_split: str = _images("NAME", "the same for validation", _name, "validation")
    classes: int | None = _images("N", "of wds/ (default: one more than the largest training label)", whole(2), None)
    image_size: int | None = _images("N", "side of the images (default: the model's)", whole(8, 4096), None)
    auto_augment: str | None = _images("POLICY", "timm's name of one, such as rand-m9-mstd0.5", _name, None)
    strict: bool = _images(
        None, "stop at an image that cannot be read, instead of skipping it", _name, False, free=True
    )
    workers: int = _images(
        "N", "processes that load images, for each process that trains", whole(0, 1024), 4, free=True
    )
    epochs: int = _training("N", "epochs", whole(1), 100)
    batch_size: int = _training("N", "images of an optimizer step on all processes", whole(2), 256)
    accumulate: int = _training(
        "N", "micro-batches a step; losses of relations see one micro-batch of all processes", whole(1), 1
    )
    optimizer: str = _training("NAME", "timm's name of the optimizer", _name, "sgd")
    lr: float = _training("X", "rate after the warm-up; a cosine leads from there to 0", number(zero=False), 0.1)
    weight_decay: float = _training("X", "weight decay", number(), 1e-4)
    warmup_epochs: int = _training("N", "epochs in which the learning rate rises to --lr", whole(0), 0)
    ema: float | None = _training("DECAY", "keep and test a moving average of the student (0.9999)", number(1), None)
    seed: int = _training("N", "of weights, order, augmentations and dropout", whole(0), 0)
    amp: bool = _speed(None, "compute in bfloat16 where autocast does", _name, False)
    channels_last: bool = _speed(None, "the layout that tensor cores want", _name, False)
    compile: bool = _speed(None, "compile the networks with torch.compile", _name, False)
    sync_bn: bool = _speed(None, "batch statistics over all processes (CUDA)", _name, False)
    device: str | None = _speed("NAME", "cpu or cuda (default: cuda if there is one)", device, None)
    threads: int = _speed("N", "CPU threads of each process", whole(1, 1024), 1)
    checkpoint_every: int = _run(
        "N", "steps between checkpoints; each epoch ends with one, and so does a SIGTERM", whole(1), 1000, free=True
    )
    log_every: int = _run("N", "steps between lines of the log", whole(1), 50, free=True)
    store_teacher: str | None = _store(
        "FOLDER", "train nothing: write the teacher's logits of all images here, for --teacher", _name, None
    )
    store_top_k: int | None = _store("K", "the K largest and the sum of the others (default: all)", whole(1), None)
    store_dtype: str = _store("NAME", "float16 or float32", _one_of("float16", "float32"), "float16")
    store_augmentations: int | None = _store(
        "N", "of each image; epochs take them in turn (default: as many as --epochs)", whole(1), None
    )

    @property
    def from_store(self) -> bool:
        """Whether the teacher is a store, and no model."""
        return Path(self.teacher).is_absolute()


def settings_of(options: argparse.Namespace, stored: dict[str, Any] | None = None) -> Settings:
    """The Settings of the parsed `options`; what was not given is as in the `stored` run, or else the default."""
    found = resolve(Settings, options, stored)
    if found.device is None:
        import torch  # here: no help text needs it

        found = replace(found, device="cuda" if torch.cuda.is_available() else "cpu")
    _check_store(options, found)
    if found.sync_bn and not found.device.startswith("cuda"):
        raise RunError("--sync-bn: torch has it for CUDA alone; leave it out, or take a student without batch norm")
    if found.warmup_epochs >= found.epochs:
        raise RunError(f"--warmup-epochs: got {found.warmup_epochs}, expected less than the {found.epochs} of --epochs")
    return found


def _check_store(options, found):
    if found.store_teacher is not None and options.out is not None:
        raise RunError("--out: --store-teacher trains nothing, and writes to its own folder alone")
    if found.store_teacher is not None and found.from_store:
        raise RunError(f"--teacher: {found.teacher} is a folder; expected a model, for --store-teacher")
    if found.store_teacher is None:
        for name in ("store_top_k", "store_dtype", "store_augmentations"):
            if getattr(options, name) is not None:
                raise RunError(f"{flag(name)}: expected with --store-teacher")
    if found.from_store and found.teacher_weights is not None:
        raise RunError("--teacher-weights: does not go with a folder as --teacher, which has the logits already")
