"""What a trainer and a store of its teacher's logits have to agree on."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

import kdfast
from kdfast.objectives import LOGITS
from kdfast.runs.errors import RunError
from kdfast.teacher_store import Contents, TeacherStore

if TYPE_CHECKING:
    from kdfast.objectives import Term
    from kdfast.training.readers import ClassFolders
    from kdfast.training.settings import Settings


__all__ = ["check_terms", "check_transform", "contents", "opened"]


def opened(chosen: "Settings", reader: "ClassFolders", classes: int, data: str) -> "TeacherStore":
    """The store that --teacher names, for the training images of `reader`, whose fingerprint is `data`."""
    store = TeacherStore(chosen.teacher, name=lambda index: reader.filename(index, absolute=True))
    store.check(classes=classes, samples=len(reader), data=data, longest=None)
    return store


def contents(
    chosen: "Settings",
    reader: "ClassFolders",
    data: str,
    transform: Any,
    classes: int,
    teacher: Any,
    terms: "Sequence[Term]",
) -> "Contents":
    """What the store of a `teacher` holds that is written as `chosen` says; `terms` are those of the recipe."""
    weights = hashlib.sha256()
    for name, value in teacher.state_dict().items():
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    precision = " in bfloat16" if chosen.amp else ""
    try:
        return Contents(
            model=f"{chosen.teacher}{precision}, weights {weights.hexdigest()[:16]}",
            classes=classes,
            data=data,
            samples=len(reader),
            transform=_words(transform),
            seed=chosen.seed,
            augmentations=chosen.store_augmentations or chosen.epochs,
            dtype=chosen.store_dtype,
            top_k=chosen.store_top_k,
            temperature=None if chosen.store_top_k is None else _temperature(chosen.recipe, terms),
        )
    except ValueError as error:
        raise RunError(f"--store-top-k: {error}") from error


def check_transform(store: "TeacherStore", transform: Any) -> None:
    """Raise a RunError if the stored teacher saw images of another transform."""
    store.check(transform=_words(transform))


def check_terms(store: "TeacherStore", recipe: str, terms: "Sequence[Term]") -> None:
    """Raise a RunError if the recipe's terms read what the store does not have."""
    if store.contents.top_k is None:
        return
    temperature = _temperature(recipe, terms)
    if temperature != store.contents.temperature:
        raise RunError(
            f"--teacher: the rest of the store's top {store.contents.top_k} is of temperature "
            f"{store.contents.temperature}, --recipe {recipe} has {temperature}"
        )


def _temperature(recipe, terms):
    """The temperature at which the terms read the teacher's logits, and the other classes' sum."""
    losses = [term.loss for term in terms if LOGITS[1] in term.names]
    if not losses or not all(isinstance(loss, kdfast.KD) for loss in losses):
        raise RunError(f"--recipe {recipe} does not take the top k of the teacher's logits; store all of them")
    return float(losses[0].temperature)


def _words(transform):
    return " ".join(str(transform).split())
