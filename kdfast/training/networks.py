"""Student and teacher: timm models, with errors that say what to do."""

import difflib
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn

from kdfast.integrations.timm import DistillationTask
from kdfast.objectives import Objective, recipe
from kdfast.runs.determinism import derived_seed
from kdfast.runs.errors import RunError

if TYPE_CHECKING:
    from kdfast.training.settings import Settings


__all__ = ["student", "task", "teacher"]


def student(chosen: "Settings | type[Any]", classes: int) -> nn.Module:
    """The student that `chosen` names, for `classes` classes, from random weights that depend on the seed alone."""
    torch.manual_seed(derived_seed(chosen.seed))
    try:
        model = _create("--student", chosen.student, num_classes=classes)
    except RunError:
        raise
    except Exception as error:  # what a prefix names may be anywhere, and anything
        raise RunError(f"--student: timm cannot make {chosen.student!r}: {_shortened(error)}") from error
    model = _sized(model, chosen.image_size)
    return timm.layers.convert_sync_batchnorm(model) if chosen.sync_bn else model


def teacher(chosen: "Settings", classes: int, image_size: int) -> nn.Module:
    """The teacher that `chosen` names, with its weights, for images of `image_size` pixels."""
    name, file = chosen.teacher, chosen.teacher_weights
    try:
        if file is not None:
            model = _create("--teacher", name, num_classes=classes)
            timm.models.load_checkpoint(model, file, weights_only=True)
        else:
            model = _create("--teacher", name, pretrained=True)
    except RunError:
        raise
    except Exception as error:  # a damaged file can raise anything, and so can a download
        where = f"--teacher-weights: {file}" if file else "--teacher"
        hint = f"expected those of a {name} of {classes} classes" if file else "name a file with --teacher-weights"
        raise RunError(f"{where}: cannot load the weights of {name}; {hint}: {_shortened(error)}") from error
    if model.num_classes != classes:
        raise RunError(
            f"--teacher: {name} knows {model.num_classes} classes, the data has {classes}; "
            "name a file of a teacher of these classes with --teacher-weights"
        )
    return _sized(model, image_size)


def task(
    chosen: "Settings",
    student: nn.Module,
    teacher: nn.Module | None,
    labels: Tensor,
    image_size: int,
    device: torch.device,
) -> "DistillationTask":
    """The DistillationTask of both models with the chosen recipe, on `device`; `labels` are the training set's.

    Without a teacher (None) it takes stored logits.
    """
    student, teacher = student.to(device), None if teacher is None else teacher.to(device)
    torch.manual_seed(derived_seed(chosen.seed))  # for the layers and banks of the losses
    try:
        sizes = {"n_data": len(labels), "image_size": (3, image_size, image_size)}
        # Where the teacher is not there, only recipes can follow that look at no model.
        made = recipe(chosen.recipe, student, student if teacher is None else teacher, labels=labels, **sizes)
        if teacher is None and (layers := Objective(made.terms).layers("teacher")):
            raise ValueError(f"it reads the teacher's layers {', '.join(layers)}, a store has its logits alone")
    except ValueError as error:
        raise RunError(f"--recipe {chosen.recipe}: {error}") from error
    return DistillationTask(student, teacher, made.terms, task_loss_weight=made.cross_entropy, verbose=False)


def _create(option, name, **arguments):
    known = timm.list_models()
    base = name.removeprefix("timm/").split(".")[0]
    if "/" not in base and ":" not in base and base not in known:  # a prefix names a place outside of timm
        near = difflib.get_close_matches(base, known, n=3)
        hint = f"expected {' or '.join(near)}" if near else "timm.list_models() has the names"
        raise RunError(f"{option}: timm has no model {name!r}; {hint}")
    return timm.create_model(name, **arguments)


def _sized(model, image_size):
    """The model for images of that many pixels; one that takes images of any size already does."""
    if image_size is not None and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(image_size, image_size))
    return model


def _shortened(error):
    text = " ".join(str(error).split()) or repr(error)
    return text if len(text) < 300 else f"{text[:300]} ..."
