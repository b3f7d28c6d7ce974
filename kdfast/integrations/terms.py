"""The terms of an objective: losses of one student and one teacher, with their weights and what they read."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

import kdfast
from kdfast import distributed

__all__ = ["LOGITS", "Objective", "Term", "of_layers"]

LOGITS = ("student.logits", "teacher.logits")
NETWORKS = ("student", "teacher")
TARGETS = ("labels", "index")

# Losses of the relations among a batch's samples; FAKD is one in its instance form.
RELATIONAL = (
    kdfast.CCKD,
    kdfast.CWTM,
    kdfast.DIST,
    kdfast.HardDarkRank,
    kdfast.IRG,
    kdfast.IRGEdge,
    kdfast.IRGTransformation,
    kdfast.LKD,
    kdfast.PKT,
    kdfast.RKD,
    kdfast.RKDAngle,
    kdfast.RKDDistance,
    kdfast.SP,
)


@dataclass(frozen=True)
class Term:
    """One loss of an objective: ``weight * loss(*reads)``.

    loss: a module that returns a 0-d tensor; its parameters are trained with the student. reads: its arguments in their
    order, each a name or a list of names, which the loss gets as a list of tensors:

    - ``student.logits``, ``teacher.logits``: what the networks return;
    - ``student.LAYER``, ``teacher.LAYER``: LAYER as :class:`kdfast.capture` takes it, ``student.layer4`` or
      ``student.fc:input``;
    - ``labels``: the training loop's targets; ``index``: the samples' places in the data set.

    name: of its value in the results; by default that of the loss in small letters. gather: whether the loss sees the
    batches of all ranks of torch.distributed as one; by default the losses of relations among samples do.

    Example::

        Term(kdfast.AT(), 1000.0, of_layers(["layer3", "layer4"]))
        Term(kdfast.CRD(512, 2048, len(dataset)), 0.8, ("student.fc:input", "teacher.fc:input", "index"))
    """

    loss: nn.Module
    weight: float = 1.0
    reads: tuple[Any, ...] = LOGITS
    name: str | None = None
    gather: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.loss, nn.Module):
            raise TypeError(f"loss must be an nn.Module, got {type(self.loss).__name__}")
        object.__setattr__(self, "weight", finite("weight", self.weight))
        if isinstance(self.reads, str) or not isinstance(self.reads, (list, tuple)):
            raise TypeError(f"reads must be a tuple of the loss's arguments, got {self.reads!r}")
        for read in self.names:
            network, _, layer = read.partition(".") if isinstance(read, str) else ("", "", "")
            if read not in TARGETS and not (network in NETWORKS and layer):
                raise ValueError(
                    f"reads must be student.LAYER, teacher.LAYER, student.logits, teacher.logits, labels or index, "
                    f"got {read!r}"
                )
        _check_arguments(self.loss, self.reads)
        if self.name is None:
            object.__setattr__(self, "name", type(self.loss).__name__.lower())
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string, got {type(self.name).__name__}")
        if not self.name.isidentifier():
            raise ValueError(f"name must be an identifier, got {self.name!r}")
        if self.gather is None:
            object.__setattr__(self, "gather", any(map(_is_relational, self.loss.modules())))

    @property
    def names(self) -> list[str]:
        """All that it reads, without lists."""
        return [name for read in self.reads for name in ([read] if isinstance(read, str) else read)]


def finite(name: str, value: Any) -> float:
    """`value` as a float, where it is a finite number of Python or NumPy."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def of_layers(student: Sequence[str], teacher: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """The reads of a loss of lists: these layers of the student and of the teacher, by default of the same names."""
    teacher = student if teacher is None else teacher
    return [f"student.{name}" for name in student], [f"teacher.{name}" for name in teacher]


def _is_relational(loss):
    instance = isinstance(loss, kdfast.FAKD) and loss.affinity == "instance"
    return instance or isinstance(loss, RELATIONAL)


def _check_arguments(loss, reads):
    try:
        inspect.signature(loss.forward).bind(*reads)
    except TypeError as error:
        takes = ", ".join(inspect.signature(loss.forward).parameters)
        raise ValueError(f"reads must be the arguments of {type(loss).__name__} ({takes}), got {reads}") from error


class Objective(nn.Module):
    """The losses of `terms`, computed from the values of all names that they read."""

    def __init__(self, terms: "Term | Sequence[Term]") -> None:
        super().__init__()
        self.terms: tuple[Term, ...] = tuple(terms) if hasattr(terms, "__iter__") else (terms,)
        for term in self.terms:
            if not isinstance(term, Term):
                raise TypeError(f"terms must be Terms, got {type(term).__name__}; a recipe has them in .terms")
        names = [term.name for term in self.terms]
        if not names:
            raise ValueError("terms must have at least one Term, got none")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"terms must have different names, got {name!r} twice; set Term.name")
            if hasattr(self, name):
                raise ValueError(f"terms must not be named {name!r}, as an attribute of nn.Module is; set Term.name")
        for term in self.terms:
            self.add_module(term.name, term.loss)

    def layers(self, network: str) -> list[Any]:
        """The layers of "student" or "teacher" that are read, in their order."""
        read = dict.fromkeys(name for term in self.terms for name in term.names)
        layers = [name.partition(".")[2] for name in read if name.startswith(f"{network}.")]
        return [layer for layer in layers if layer != "logits"]

    def readers(self, name: str) -> list[Any]:
        """The names of the terms that read `name`."""
        return [term.name for term in self.terms if name in term.names]

    def forward(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name of a term -> its loss without the weight. `values`: name -> tensor."""
        gathered = {}
        if distributed.world_size() > 1:
            names = dict.fromkeys(name for term in self.terms if term.gather for name in term.names)
            gathered = {name: distributed.gather(values[name]) for name in names}
        losses = {}
        for term in self.terms:
            source = gathered if term.gather and gathered else values
            arguments = [
                source[read] if isinstance(read, str) else [source[name] for name in read] for read in term.reads
            ]
            losses[term.name] = self._loss(term, arguments)
        return losses

    def _loss(self, term, arguments):
        try:
            return getattr(self, term.name)(*arguments)
        except (TypeError, ValueError) as error:
            shapes = ", ".join(map(_described, arguments))
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"term {term.name} of {shapes}: {error}") from error


def _described(argument):
    if isinstance(argument, torch.Tensor):
        return str(tuple(argument.shape))
    if isinstance(argument, list):
        return f"[{', '.join(map(_described, argument))}]"
    return type(argument).__name__
