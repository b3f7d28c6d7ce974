"""What a training minimises: losses of students and teachers, with their weights and what they read."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

import kdfast
from kdfast import distributed
from kdfast.capture import capture
from kdfast.ops.accumulate import weighted, weighted_sum

__all__ = ["LOGITS", "Objective", "Observed", "Term", "finite", "of_layers"]

LOGITS = ("student.logits", "teacher.logits")
NETWORKS = ("student", "teacher", "students", "teachers")
TARGETS = ("labels", "index", "images", "epoch")

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
    - ``teacher.probabilities`` and the like: the softmax of the logits;
    - ``students.LAYER``, ``teachers.LAYER``: of several networks, a list with a tensor of each;
    - ``labels``: the training loop's targets; ``index``: the samples' places in the data set; ``images``, ``epoch``.

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
                    "reads must be student.LAYER, teacher.LAYER, the same of students and teachers, "
                    f"{', '.join(TARGETS)}, got {read!r}"
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

    def arguments(self, values: Mapping[str, Any]) -> list[Any]:
        """What the loss is called with, of the `values` of all names that it reads."""
        return [values[read] if isinstance(read, str) else [values[name] for name in read] for read in self.reads]


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


class Observed:
    """A network and its `layers`: images -> ``{"logits": what it returns, layer: what that returns, ...}``.

    The layers are watched, see :class:`kdfast.capture`, until the ``with`` block around it ends, or ``remove()``.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str] = ()) -> None:
        self.network = network
        self.features: Mapping[str, Tensor] = capture(network, layers) if layers else {}

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        logits = self.network(images)
        return {"logits": logits, **self.features}

    def __enter__(self) -> "Observed":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Watch the layers no longer."""
        if isinstance(self.features, capture):
            self.features.remove()


class Objective(nn.Module):
    """``sum term.weight * term.loss(...)`` of the `terms`, from what the networks say about a batch.

    Example::

        objective = Objective(
            [
                Term(nn.CrossEntropyLoss(), 1.0, ("student.logits", "labels")),
                Term(kdfast.KD(temperature=4.0)),
                Term(kdfast.AT(), 1000.0, of_layers(["layer3", "layer4"])),
            ]
        )
        with objective.observed("student", student) as ours, objective.observed("teacher", teacher) as theirs:
            for images, labels in loader:
                with torch.no_grad():
                    target = theirs(images)
                loss = objective(ours(images), target, labels)

    Its parameters, those of the losses, are trained with the student's. ``objective.weights``, name of a term ->
    weight, may be changed at any time; a term of weight 0 adds nothing, whatever its value is.
    """

    def __init__(self, terms: "Term | Sequence[Term]") -> None:
        super().__init__()
        self.terms: tuple[Term, ...] = tuple(terms) if hasattr(terms, "__iter__") else (terms,)
        for term in self.terms:
            if not isinstance(term, Term):
                raise TypeError(f"terms must be Terms, got {type(term).__name__}; a recipe has them in .terms")
        names = [term.name for term in self.terms]
        if not names:
            raise ValueError("terms must have at least one Term, got none")
        self.weights: dict[str, float] = {term.name: term.weight for term in self.terms}
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"terms must have different names, got {name!r} twice; set Term.name")
            if hasattr(self, name):
                raise ValueError(f"terms must not be named {name!r}, as an attribute of nn.Module is; set Term.name")
        for term in self.terms:
            self.add_module(term.name, term.loss)

    # ---- what it reads -----------------------------------------------------------------------------------------------
    def reads(self, network: str) -> list[str]:
        """What is read of "student" or "teacher", or of several of them: layers, "logits", in their order."""
        read = dict.fromkeys(name for term in self.terms for name in term.names)
        parts = [name.partition(".") for name in read]
        layers = [layer for of, _, layer in parts if of.removesuffix("s") == network]
        return list(dict.fromkeys("logits" if layer == "probabilities" else layer for layer in layers))

    def layers(self, network: str) -> list[str]:
        """The layers of "student" or "teacher" that are read, in their order."""
        return [layer for layer in self.reads(network) if layer != "logits"]

    def readers(self, name: str) -> list[str]:
        """The names of the terms that read `name`."""
        return [term.name for term in self.terms if name in term.names]

    def observed(self, side: str, network: nn.Module) -> Observed:
        """`network`, which is the "student" or the "teacher", with the layers that are read of it."""
        return Observed(network, self.layers(side))

    # ---- its value ---------------------------------------------------------------------------------------------------
    def forward(self, student: Any, teacher: Any = None, labels: Any = None, **targets: Any) -> Tensor:
        """The weighted sum of the losses; the arguments are those of :meth:`values`."""
        return self.total(self.losses(student, teacher, labels, **targets))

    def losses(self, student: Any, teacher: Any = None, labels: Any = None, **targets: Any) -> dict[str, Tensor]:
        """Name of a term -> its loss without the weight; the arguments are those of :meth:`values`."""
        values = self.values(student, teacher, labels, **targets)
        gathered = {}
        if distributed.world_size() > 1:
            names = dict.fromkeys(name for term in self.terms if term.gather for name in term.names)
            gathered = {name: _gathered(values[name]) for name in names}
        return {
            term.name: self._loss(term, term.arguments(gathered if term.gather and gathered else values))
            for term in self.terms
        }

    def values(
        self,
        student: Any,
        teacher: Any = None,
        labels: Any = None,
        *,
        index: Tensor | None = None,
        images: Tensor | None = None,
        epoch: Any = None,
    ) -> dict[str, Any]:
        """All that the terms read, by its names.

        student, teacher: what the network says, a dict of :class:`Observed` or its logits; a list of these for several
        networks, of which the first is ``student``, or ``teacher``. The others are needed where a term reads them.
        """
        networks = {"student": student, "teacher": teacher}
        targets = {"labels": labels, "index": index, "images": images, "epoch": epoch}
        names = dict.fromkeys(name for term in self.terms for name in term.names)
        return {name: self._value(name, networks, targets) for name in names}

    def total(self, losses: dict[str, Tensor], like: Tensor | None = None) -> Tensor:
        """The weighted sum of these losses; if all weigh 0, a 0 with a graph to `like`, by default to the first."""
        like = next(iter(losses.values())) if like is None else like
        value = weighted_sum(like, *((self.weights[name], lambda x=x: x) for name, x in losses.items()))
        # A loss with parameters stays in the graph, which DistributedDataParallel expects of every parameter.
        for term in self.terms:
            if not self.weights[term.name] and any(True for _ in term.loss.parameters()):
                value = value + weighted(0, losses[term.name])
        return value

    def _value(self, name, networks, targets):
        network, _, layer = name.partition(".")
        side = network.removesuffix("s")
        given = networks[side] if layer else targets[name]
        if given is None:
            raise ValueError(f"{side if layer else name} must be given, for {', '.join(self.readers(name))} reads it")
        if not layer:
            return given
        said = [_of(outputs, layer, name) for outputs in (given if isinstance(given, list) else [given])]
        return said if network.endswith("s") else said[0]

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


def _of(outputs, layer, name):
    """What a network says of `layer`."""
    if layer == "probabilities":
        return _of(outputs, "logits", name).softmax(-1)
    if not isinstance(outputs, Mapping):
        outputs = {"logits": outputs}
    if layer not in outputs:
        raise ValueError(f"{name} is read, and the outputs have {', '.join(outputs)}")
    return outputs[layer]


def _gathered(value):
    return [distributed.gather(x) for x in value] if isinstance(value, list) else distributed.gather(value)
