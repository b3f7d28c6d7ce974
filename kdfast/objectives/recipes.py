"""Recipes: which loss, what it reads, its weight, and who published them, as data; and the terms for two networks.

A read of a recipe is a place that networks have under different names: ``NETWORK.maps`` (a list, the ends of the chosen
stages), ``NETWORK.map`` (the last of them), ``NETWORK.preactivations`` (a list, before the last ReLU of each),
``NETWORK.embedding`` (what the classifier reads), ``NETWORK.logits``, or a target; NETWORK as in :class:`Term`. Of a
timm model the places are found by what timm says about it; another one says so itself, with an attribute ``places``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kdfast
from kdfast.objectives import connected
from kdfast.objectives.layouts import AsMaps, as_map
from kdfast.objectives.terms import LOGITS, Objective, Term

__all__ = ["RECIPES", "AsMaps", "Made", "Pair", "Part", "Places", "Recipe", "Setting", "plain", "recipe", "single"]

EMBEDDINGS = ("student.embedding", "teacher.embedding")
MAPS = ("student.maps", "teacher.maps")
LAST_MAP = ("student.map", "teacher.map")
PREACTIVATIONS = ("student.preactivations", "teacher.preactivations")


@dataclass(frozen=True)
class Places:
    """Where a network has what losses read, by the names of its layers; `norms` come before the `preactivations`."""

    maps: list[str]
    embedding: str
    preactivations: list[str] = field(default_factory=list)
    norms: list[nn.BatchNorm2d] = field(default_factory=list)


class Part(NamedTuple):
    """A term before its networks are known: ``loss(setting)`` makes the module, `reads` are places.

    stages: of the maps and pre-activations; all, where that leaves none. name: of the term, see :class:`Term`.
    """

    loss: Callable[["Setting"], nn.Module]
    reads: tuple[str, ...] = LOGITS
    weight: float = 1.0
    stages: slice = slice(None)
    name: str | None = None


@dataclass(frozen=True)
class Recipe:
    """The parts of an objective, the weight of the labels' cross-entropy beside them, and who published the weights."""

    parts: tuple[Part, ...]
    cross_entropy: float = 1.0
    source: str = ""

    def reads(self, network: str) -> set[str]:
        """The places that are read of "student", "teacher", "students" or "teachers"."""
        names = [read.partition(".") for part in self.parts for read in part.reads]
        return {place for of, _, place in names if of == network and place}

    def made(self, pair: "Pair", first: nn.Module | None = None) -> "Made":
        """The terms for two networks; `first` is the loss of the stage that was trained before."""
        return Made([Setting(pair, part, first).term() for part in self.parts], self.cross_entropy)


class Made(NamedTuple):
    """A recipe for two networks: its terms, and the weight of the labels' cross-entropy beside them."""

    terms: list[Term]
    cross_entropy: float

    def objective(self) -> Objective:
        """Both as one; the last of its terms is ``cross_entropy``, unless that weighs 0."""
        labels = Term(nn.CrossEntropyLoss(), self.cross_entropy, ("student.logits", "labels"), "cross_entropy")
        return Objective([*self.terms, *[labels] * bool(self.cross_entropy)])


def recipe(
    name: str,
    student: nn.Module,
    teacher: nn.Module,
    *,
    n_data: int | None = None,
    labels: Tensor | None = None,
    image_size: tuple[int, int, int] | None = None,
) -> Made:
    """The terms of the recipe `name` of `RECIPES` for two networks.

    Example::

        crd = recipe("crd", student, teacher, n_data=len(dataset))
        objective = crd.objective()  # for a loop of your own
        task = DistillationTask(student, teacher, crd.terms, task_loss_weight=crd.cross_entropy)  # for timm's

    student, teacher: timm models, or networks with an attribute ``places``, a :class:`Places`. Recipes with layers run
    one image of image_size (C, H, W) through them, by default of the size that timm says. n_data: samples of the
    training set, which CRD's banks need; labels (n_data,), a tensor: their classes, which it then leaves out of the
    negatives.

    Errors: ValueError for a name that is no recipe, n_data that is missing, and networks without the layers it needs,
    with those that they have.
    """
    if name not in RECIPES:
        raise ValueError(f"name must be one of {', '.join(RECIPES)}, got {name!r}")
    for side, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{side} must be an nn.Module, got {type(model).__name__}")
    return RECIPES[name].made(Pair(student, teacher, n_data, labels, image_size))


# ---- layers by what they are -----------------------------------------------------------------------------------------
def stages(model: nn.Module) -> dict[int, str]:
    """Stride -> the layer of a timm model that ends its stage of this stride, from 4 on: {4: "layer1", 8: ...}.

    Of a network with ``places`` their numbers stand for the strides.

    Raises ValueError, with the layers that the model has, where timm lists no such stages.
    """
    if places := getattr(model, "places", None):
        return dict(enumerate(places.maps))
    found = {row["reduction"]: row["module"] for row in _stage_rows(model)}
    existing = dict(model.named_modules())
    if not found or any(layer not in existing for layer in found.values()):
        raise ValueError(f"the model lists no stages in feature_info: {_read_by_name(model)}")
    return found


def _stage_rows(model):
    info = getattr(model, "feature_info", [])
    return [row for row in getattr(info, "info", info) if row["reduction"] >= 4]


def embedding(model: nn.Module) -> str:
    """The layer of a timm model that the classifier reads: "fc:input"."""
    if places := getattr(model, "places", None):
        return places.embedding
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier")
    classifier = classifier[0] if isinstance(classifier, (list, tuple)) else classifier
    if classifier not in dict(model.named_modules()):
        raise ValueError(f"the model names no classifier in pretrained_cfg: {_read_by_name(model)}")
    return f"{classifier}:input"


def preactivation(model: nn.Module, stage: str) -> tuple[str, nn.Module]:
    """Of a ResNet's stage the layer before its last ReLU and the batch norm before it: "layer4.1.act2:input", norm."""
    if places := getattr(model, "places", None):
        number = places.maps.index(stage)
        return places.preactivations[number], places.norms[number]
    blocks = model.get_submodule(stage)
    block = blocks[-1] if isinstance(blocks, nn.Sequential) and len(blocks) else None
    number = 3 if hasattr(block, "conv3") else 2
    norm = getattr(block, f"bn{number}", None)
    if not isinstance(norm, nn.BatchNorm2d) or not hasattr(block, f"act{number}"):
        raise ValueError(f"{stage} of {_kind(model)} does not end with batch norm and ReLU as a ResNet's blocks do")
    return f"{stage}.{len(blocks) - 1}.act{number}:input", norm


def _kind(model):
    return type(model).__name__


def _read_by_name(model):
    names = ", ".join(name for name, _ in model.named_children())
    return f"take a Term that reads layers by their names; those of {_kind(model)} are in {names}"


@dataclass(frozen=True)
class Pair:
    """Two networks and the data that a recipe is made for; the arguments are those of `recipe`."""

    student: nn.Module
    teacher: nn.Module
    n_data: int | None = None
    labels: torch.Tensor | None = None
    image_size: tuple[int, ...] | None = None

    def stages(self) -> dict[str, list[str]]:
        """ "student" and "teacher" -> the layers that end stages of equal strides."""
        student, teacher = stages(self.student), stages(self.teacher)
        both = [stride for stride in student if stride in teacher]
        if not both:
            raise ValueError(
                f"student and teacher must have stages of equal strides, got {list(student)} and {list(teacher)}: "
                f"{_read_by_name(self.student)}"
            )
        return {"student": [student[stride] for stride in both], "teacher": [teacher[stride] for stride in both]}


class Setting:
    """What the loss of a `part` is built from: the two networks, and the places of them that it reads.

    `first` is the loss of the stage that was trained before this one, if there was one.
    """

    def __init__(self, pair: Pair, part: Part, first: nn.Module | None = None) -> None:
        self.pair = pair
        self.part = part
        self.first: Any = first
        self.n_data, self.labels = pair.n_data, pair.labels
        self._seen = {}  # (side, layers) -> their outputs

    def term(self) -> Term:
        """The term of the part."""
        loss = self.part.loss(self)
        name = self.part.name or type(loss).__name__.lower()
        layouts = {side: self._maps(side)[1] for side in ("student", "teacher") if f"{side}.maps" in self.part.reads}
        if any(layout != "NCHW" for of_side in layouts.values() for layout in of_side):
            loss = AsMaps(loss, **layouts)
        return Term(loss, self.part.weight, tuple(map(self._layers, self.part.reads)), name)

    def shapes(self, read: str) -> list[torch.Size]:
        """The shapes of this place, one for each stage or network; those of a batch of one image."""
        side, _, place = read.partition(".")
        side = side.removesuffix("s")
        maps = self._maps(side)[0] if place == "maps" else self._outputs(side, self._names(side, place))
        return [x.shape for x in maps]

    def channels(self, read: str) -> list[int]:
        """The channels of this place, one number for each stage."""
        return [shape[1] for shape in self.shapes(read)]

    def norms(self) -> list[nn.BatchNorm2d]:
        """The batch norms before the teacher's pre-activations."""
        return [preactivation(self.pair.teacher, stage)[1] for stage in self._names("teacher", "maps")]

    def in_its_type(self, loss: nn.Module) -> nn.Module:
        """The loss with convolutions in the student's type, as they read its maps: torch multiplies no two types."""
        return loss.to(next(self.pair.student.parameters()).dtype)

    def _names(self, side, place):
        """The layers of one network."""
        model = getattr(self.pair, side)
        if place == "embedding":
            return [embedding(model)]
        ends = self.pair.stages()[side]
        chosen = ends[self.part.stages] or ends
        if place == "preactivations":
            return [preactivation(model, stage)[0] for stage in chosen]
        return chosen[-1:] if place == "map" else chosen

    def _layers(self, read):
        """A place as a read of a `Term`."""
        network, _, place = read.partition(".")
        if place in ("", "logits", "probabilities"):
            return read
        names = [f"{network}.{name}" for name in self._names(network.removesuffix("s"), place)]
        return names if place in ("maps", "preactivations") else names[0]

    def _outputs(self, side, names):
        key = side, *names
        if key not in self._seen:
            size = getattr(self.pair.student, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
            self._seen[key] = _outputs(getattr(self.pair, side), names, self.pair.image_size or size)
        return self._seen[key]

    def _maps(self, side):
        """The maps (B, C, H, W) of one network for one image, zeros, and how its layers lay them out."""
        model, names = getattr(self.pair, side), self._names(side, "maps")
        outputs = self._outputs(side, names)
        layouts = _layouts(side, model, names, outputs)
        return [as_map(*pair) for pair in zip(outputs, layouts, strict=True)], layouts


@torch.no_grad()
def _outputs(model, names, size):
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with kdfast.capture(model, names) as features:
            model(next(model.parameters()).new_zeros(1, *size))
            return [torch.zeros(value.shape) for value in features.values()]
    finally:
        for module, mode in modes:
            module.training = mode


def _layouts(network, model, names, outputs):
    """ "NCHW" or "NHWC" for the output of each of these stages."""
    if getattr(model, "places", None):
        return ["NCHW"] * len(names)
    rows = {row["module"]: row["num_chs"] for row in _stage_rows(model)}
    found = []
    for name, x in zip(names, outputs, strict=True):
        likely = getattr(model, "output_fmt", "NCHW")  # of Swin "NHWC"; where it has none, the channels tell
        fits = [layout for layout in ("NCHW", "NHWC") if x.dim() == 4 and x.shape[layout.index("C")] == rows[name]]
        if not fits:
            raise ValueError(
                f"{network} must have stages of maps (B, C, H, W), got shape {tuple(x.shape)}: take a recipe of "
                f"logits or embeddings, or a Term of AsMaps(loss, {network}=(H, W)) for tokens in the order of the map"
            )
        found.append(likely if likely in fits else fits[0])
    return found


# ---- the table -------------------------------------------------------------------------------------------------------
def plain(loss: Callable[..., nn.Module], **arguments: Any) -> Callable[[Setting], nn.Module]:
    """A `Part.loss` for one that looks at no network: ``loss(**arguments)``."""
    return lambda setting: loss(**arguments)


def hints(setting: Setting) -> nn.Module:
    """FitNets' hints."""
    return setting.in_its_type(connected.Hints(setting.shapes(MAPS[0]), setting.shapes(MAPS[1])))


def information(setting: Setting) -> nn.Module:
    """VID of every stage."""
    return connected.Information(*map(setting.channels, MAPS))


def overhaul(setting: Setting) -> nn.Module:
    """OFD of every stage."""
    channels = map(setting.channels, PREACTIVATIONS)
    loss = connected.Connected(kdfast.OFD(reduction="mean"), *channels, halved=True, norms=setting.norms())
    return setting.in_its_type(loss)


def contrast(setting: Setting) -> nn.Module:
    """CRD with its official settings: negatives, of other classes if there are labels, at most a third of the data."""
    if setting.n_data is None:
        raise ValueError("n_data must be the number of samples of the training set, which crd's banks have, got None")
    dims = [shape[1:].numel() for read in EMBEDDINGS for shape in setting.shapes(read)]
    negatives = min(16384, max(1, setting.n_data // 3))
    return kdfast.CRD(*dims, setting.n_data, negatives=negatives, labels=setting.labels)


def single(
    loss: Callable[[Setting], nn.Module],
    reads: tuple[str, ...] = LOGITS,
    weight: float = 1.0,
    source: str = "",
    *,
    labels: float = 1.0,
    **places: Any,
) -> Recipe:
    """A recipe of one part, beside `labels` times the labels' cross-entropy."""
    return Recipe((Part(loss, reads, weight, **places),), labels, source)


CRD = Part(contrast, (*EMBEDDINGS, "index"), 0.8)
_KD, _KD_4 = plain(kdfast.KD, temperature=1.0), Part(plain(kdfast.KD, temperature=4.0))
_DKD = plain(kdfast.DKD, temperature=1.0, alpha=1.0, beta=0.5)
_DIST = plain(kdfast.DIST, beta=1.0, gamma=1.0, temperature=1.0)
_RKD = plain(kdfast.RKD, distance_weight=1.0, angle_weight=2.0)
_SAMPLE = "torchdistill, sample:"

# For ImageNet. "torchdistill" are its configurations of ResNet-34 and ResNet-18 (configs/official/ilsvrc2012, "sample":
# in configs/sample/ilsvrc2012, some of other ResNets); "mdistiller" is configs/imagenet/r34_r18; "RepDistiller" are its
# scripts for CIFAR-100, where no recipe for ImageNet is public.
RECIPES = {
    "kd": single(_KD, LOGITS, 0.5, "torchdistill and mdistiller: T 1, half and half", labels=0.5),
    # There the weight of DKD rises from 0 during the first epoch.
    "dkd": single(_DKD, (*LOGITS, "labels"), 1.0, "mdistiller: T 1, alpha 1, beta 0.5"),
    "dist": single(_DIST, LOGITS, 2.0, f"{_SAMPLE} beta, gamma and T 1, weight 2, as the paper's code"),
    # There on the last maps; here on the embeddings, which the paper and RepDistiller take and ranks exchange cheaply.
    "rkd": single(_RKD, EMBEDDINGS, 1.0, f"{_SAMPLE} distances 1, angles 2, as the paper"),
    "pkt": single(plain(kdfast.PKT), EMBEDDINGS, 30000.0, f"{_SAMPLE} weight 30000"),
    # Of features of any shape.
    "sp": single(plain(kdfast.SP), LAST_MAP, 3000.0, "RepDistiller, as the paper: weight 3000, the last maps"),
    "at": single(plain(kdfast.AT), MAPS, 1000.0, "torchdistill: the last two stages", stages=slice(-2, None)),
    "nst": single(plain(kdfast.NST), MAPS, 50.0, "RepDistiller: every stage"),
    "fitnets": single(hints, MAPS, 100.0, "RepDistiller: the second stage", stages=slice(1, 2), name="fitnets"),
    "vid": single(information, MAPS, 1.0, f"{_SAMPLE} every stage, as wide as the teacher", name="vid"),
    "ofd": single(overhaul, PREACTIVATIONS, 1e-4, "the paper's code for ImageNet: an earlier stage half", name="ofd"),
    "crd": Recipe((CRD,), source="torchdistill: 16384 negatives, 128 features, T 0.07, momentum 0.5"),
    "crd-kd": Recipe((CRD, _KD_4), source=f"{_SAMPLE} crd, and KD of T 4 with weight 1"),
}
