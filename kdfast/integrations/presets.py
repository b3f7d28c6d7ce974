"""The terms of a paper for a pair of timm models, with the weights of a public ImageNet recipe.

The layers are found by what timm says about its models: `stages`, `preactivation` and `embedding` name them. A new
preset is a new row of the table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import kdfast
from kdfast.integrations.terms import LOGITS, Term, of_layers
from kdfast.lab import layers

if TYPE_CHECKING:
    from kdfast.lab.layers import Hints, Overhaul


__all__ = ["PRESETS", "AsMaps", "Pair", "Preset", "Recipe", "embedding", "preactivation", "recipe", "stages"]


@dataclass(frozen=True)
class Recipe:
    """The terms of an objective, and the weight of the labels' loss beside them."""

    terms: list[Any]
    task_loss_weight: float


@dataclass(frozen=True)
class Preset:
    """One row: `terms` makes them for a `Pair`; `source` says where the weights come from."""

    name: str
    source: str
    terms: Callable[..., Any]
    task_loss_weight: float = 1.0


def recipe(
    name: str,
    student: nn.Module,
    teacher: nn.Module | str,
    *,
    n_data: int | None = None,
    labels: Tensor | None = None,
    image_size: tuple[int, int, int] | None = None,
) -> "Recipe":
    """The terms of the preset `name` for two timm models.

    Example::

        crd = recipe("crd", student, teacher, n_data=len(dataset))
        task = DistillationTask(student, teacher, crd.terms, task_loss_weight=crd.task_loss_weight)

    student, teacher: models, of which presets with layers run one image of image_size (C, H, W), by default the
    student's own. n_data: samples of the training set, which CRD's banks need; labels (n_data,), a tensor: their
    classes, which it then leaves out of the negatives.

    Errors: ValueError for a name that is no preset, n_data that is missing, and models without the layers it needs,
    with those that they have.
    """
    if name not in PRESETS:
        raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}")
    for side, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{side} must be an nn.Module, got {type(model).__name__}")
    preset = PRESETS[name]
    return Recipe(preset.terms(Pair(student, teacher, n_data, labels, image_size)), preset.task_loss_weight)


# ---- layers by what they are -----------------------------------------------------------------------------------------
def stages(model: nn.Module) -> dict[int, str]:
    """Stride -> the layer of a timm model that ends its stage of this stride, from 4 on: {4: "layer1", 8: ...}.

    Raises ValueError, with the layers that the model has, where timm lists no such stages.
    """
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
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier")
    classifier = classifier[0] if isinstance(classifier, (list, tuple)) else classifier
    if classifier not in dict(model.named_modules()):
        raise ValueError(f"the model names no classifier in pretrained_cfg: {_read_by_name(model)}")
    return f"{classifier}:input"


def preactivation(model: nn.Module, stage: str) -> tuple[str, nn.Module]:
    """Of a ResNet's stage the layer before its last ReLU and the batch norm before it: "layer4.1.act2:input", norm."""
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
    """Two models and the data that a preset is built for; the arguments are those of `recipe`."""

    student: nn.Module
    teacher: nn.Module
    n_data: int | None = None
    labels: torch.Tensor | None = None
    image_size: tuple[int, ...] | None = None

    def stages(self) -> tuple[list[str], list[str]]:
        """The layers of the student and of the teacher that end stages of equal strides, as two lists."""
        student, teacher = stages(self.student), stages(self.teacher)
        both = [stride for stride in student if stride in teacher]
        if not both:
            raise ValueError(
                f"student and teacher must have stages of equal strides, got {list(student)} and {list(teacher)}: "
                f"{_read_by_name(self.student)}"
            )
        return [student[stride] for stride in both], [teacher[stride] for stride in both]

    def embeddings(self) -> tuple[str, str]:
        """The layers of both embeddings."""
        return embedding(self.student), embedding(self.teacher)

    def example(self, student: Sequence[str], teacher: Sequence[str]) -> Any:
        """What these layers, of the student and of the teacher, return for one image: zeros of these shapes."""
        size = self.image_size or getattr(self.student, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
        names = {"student": student, "teacher": teacher}
        maps = {network: _shapes(getattr(self, network), names[network], size) for network in names}
        return SimpleNamespace(**{network: SimpleNamespace(maps=maps[network]) for network in names})

    def maps(self, student: Sequence[str], teacher: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        """These stages' maps (B, C, H, W) for one image, as `example` has them, and how the layers lay them out.

        Raises ValueError for stages that return no maps.
        """
        example, layouts = self.example(student, teacher), {}
        for network, names in (("student", student), ("teacher", teacher)):
            outputs = getattr(example, network)
            layouts[network] = _layouts(network, getattr(self, network), names, outputs.maps)
            outputs.maps = [_as_map(*pair) for pair in zip(outputs.maps, layouts[network], strict=True)]
        return example, layouts

    def in_its_type(self, loss: "Hints | Overhaul") -> "Hints | Overhaul":
        """The loss with convolutions in the student's type, as they read its maps: torch multiplies no two types."""
        return loss.to(next(self.student.parameters()).dtype)


@torch.no_grad()
def _shapes(model, names, size):
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
    rows = {row["module"]: row["num_chs"] for row in _stage_rows(model)}
    found = []
    for name, x in zip(names, outputs, strict=True):
        likely = getattr(model, "output_fmt", "NCHW")  # of Swin "NHWC"; where it has none, the channels tell
        fits = [layout for layout in ("NCHW", "NHWC") if x.dim() == 4 and x.shape[layout.index("C")] == rows[name]]
        if not fits:
            raise ValueError(
                f"{network} must have stages of maps (B, C, H, W), got shape {tuple(x.shape)}: take a preset of "
                f"logits or embeddings, or a Term of AsMaps(loss, {network}=(H, W)) for tokens in the order of the map"
            )
        found.append(likely if likely in fits else fits[0])
    return found


class AsMaps(nn.Module):
    """A loss of maps (B, C, H, W), on layers that lay them out in another way.

    Of student and teacher, the layout is "NCHW", "NHWC" (Swin), or (H, W): tokens (B, T, C) with one for each place of
    a map of this size, row by row, behind class and register tokens, which are left out (ViT). A list of layouts is
    for a loss of lists, one for each layer.

    Example::

        Term(AsMaps(kdfast.AT(), student=(14, 14), teacher="NHWC"), 1000.0, ("student.blocks.11", "teacher.layers.2"))
    """

    def __init__(
        self, loss: Any, student: Sequence[Any] | str | tuple[int, int] = "NCHW", teacher: Sequence[str] | str = "NCHW"
    ) -> None:
        super().__init__()
        for name, layouts in (("student", student), ("teacher", teacher)):
            for layout in layouts if isinstance(layouts, list) else [layouts]:
                if layout not in ("NCHW", "NHWC") and not _is_size(layout):
                    raise ValueError(
                        f"{name} must be NCHW, NHWC or the map's (H, W), or a list of these, got {layout!r}"
                    )
        self.loss = loss
        self.student = student
        self.teacher = teacher

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        """The loss of the maps."""
        return self.loss(self._maps("student", student), self._maps("teacher", teacher))

    def _maps(self, name, outputs):
        layouts = getattr(self, name)
        if isinstance(outputs, torch.Tensor):
            return _as_map(outputs, layouts)
        if not isinstance(layouts, list):
            layouts = [layouts] * len(outputs)
        if len(layouts) != len(outputs):
            raise ValueError(f"{name} must have {len(layouts)} layers, as many as layouts, got {len(outputs)}")
        return [_as_map(x, layout) for x, layout in zip(outputs, layouts, strict=True)]


def _is_size(layout):
    return isinstance(layout, tuple) and len(layout) == 2 and all(isinstance(n, int) and n > 0 for n in layout)


def _as_map(x, layout):
    if layout == "NCHW":
        return x
    if layout == "NHWC":
        if x.dim() != 4:
            raise ValueError(f"a map in the layout NHWC must be (B, H, W, C), got shape {tuple(x.shape)}")
        return x.permute(0, 3, 1, 2)
    places = layout[0] * layout[1]
    if x.dim() != 3 or x.shape[1] < places:
        raise ValueError(f"tokens of a map of {layout} must be (B, {places} or more, C), got shape {tuple(x.shape)}")
    return x[:, -places:].transpose(1, 2).unflatten(2, layout)


# ---- terms -----------------------------------------------------------------------------------------------------------
def _logits(loss, weight, *others):
    return lambda pair: [Term(loss(), weight, (*LOGITS, *others))]


def _embeddings(loss, weight):
    def terms(pair):
        student, teacher = pair.embeddings()
        return [Term(loss(), weight, (f"student.{student}", f"teacher.{teacher}"))]

    return terms


def _last_stage(loss, weight):
    """Of a loss that takes features of any shape."""

    def terms(pair):
        student, teacher = pair.stages()
        return [Term(loss(), weight, of_layers(student[-1:], teacher[-1:]))]

    return terms


def _maps(name, build, weight, chosen):
    """Of a loss of maps, of the stages in the slice `chosen`, or of all; ``build(pair, example)`` makes it."""

    def terms(pair):
        student, teacher = (names[chosen] or names for names in pair.stages())
        example, layouts = pair.maps(student, teacher)
        loss = build(pair, example)
        if any(layout != "NCHW" for network in layouts.values() for layout in network):
            loss = AsMaps(loss, **layouts)
        return [Term(loss, weight, of_layers(student, teacher), name)]

    return terms


def _ofd(pair):
    student, teacher = pair.stages()
    student = [preactivation(pair.student, stage)[0] for stage in student]
    teacher, norms = zip(*(preactivation(pair.teacher, stage) for stage in teacher), strict=True)
    example = pair.example(student, teacher)
    example.teacher_network = SimpleNamespace(stages=[SimpleNamespace(norm=norm) for norm in norms])
    return [Term(pair.in_its_type(layers.Overhaul(example)), 1e-4, of_layers(student, teacher), "ofd")]


def _crd(pair):
    if pair.n_data is None:
        raise ValueError("n_data must be the number of samples of the training set, which crd's banks have, got None")
    student, teacher = pair.embeddings()
    example = pair.example([student], [teacher])
    dims = (network.maps[0][0].numel() for network in (example.student, example.teacher))
    negatives = min(16384, max(1, pair.n_data // 3))
    loss = kdfast.CRD(*dims, pair.n_data, negatives=negatives, labels=pair.labels)
    return [Term(loss, 0.8, (f"student.{student}", f"teacher.{teacher}", "index"))]


def _crd_kd(pair):
    return [*_crd(pair), Term(kdfast.KD(temperature=4.0))]


# "torchdistill" are its ImageNet configurations of ResNet-34 and ResNet-18 (configs/official/ilsvrc2012, "sample": in
# configs/sample/ilsvrc2012, some of other ResNets); "mdistiller" is configs/imagenet/r34_r18; "RepDistiller" are its
# scripts for CIFAR-100, where no recipe for ImageNet is public.
_TABLE = [
    Preset(
        "kd", "torchdistill and mdistiller: T 1, half and half", _logits(lambda: kdfast.KD(temperature=1.0), 0.5), 0.5
    ),
    # There the weight of DKD rises from 0 during the first epoch.
    Preset(
        "dkd",
        "mdistiller: T 1, alpha 1, beta 0.5",
        _logits(lambda: kdfast.DKD(temperature=1.0, alpha=1.0, beta=0.5), 1.0, "labels"),
    ),
    Preset(
        "dist",
        "torchdistill, sample: beta, gamma and T 1, weight 2, as the paper's code",
        _logits(lambda: kdfast.DIST(beta=1.0, gamma=1.0, temperature=1.0), 2.0),
    ),
    # There on the last maps; here on the embeddings, which the paper and RepDistiller take and ranks exchange cheaply.
    Preset(
        "rkd",
        "torchdistill, sample: distances 1, angles 2, as the paper",
        _embeddings(lambda: kdfast.RKD(distance_weight=1.0, angle_weight=2.0), 1.0),
    ),
    Preset("pkt", "torchdistill, sample: weight 30000", _embeddings(kdfast.PKT, 30000.0)),
    Preset("sp", "RepDistiller, as the paper: weight 3000, the last maps", _last_stage(kdfast.SP, 3000.0)),
    Preset(
        "at",
        "torchdistill: weight 1000, the last two stages",
        _maps("at", lambda *_: kdfast.AT(), 1000.0, slice(-2, None)),
    ),
    Preset("nst", "RepDistiller: weight 50, every stage", _maps("nst", lambda *_: kdfast.NST(), 50.0, slice(None))),
    Preset(
        "fitnets",
        "RepDistiller: weight 100, the second stage through a regressor",
        _maps("fitnets", lambda pair, example: pair.in_its_type(layers.Hints(example)), 100.0, slice(1, 2)),
    ),
    Preset(
        "vid",
        "torchdistill, sample: weight 1, every stage, as wide as the teacher",
        _maps("vid", lambda _, example: layers.Information(example), 1.0, slice(None)),
    ),
    Preset("ofd", "the paper's code for ImageNet: weight 1e-4, an earlier stage counts half", _ofd),
    Preset("crd", "torchdistill: weight 0.8, 16384 negatives, 128 features, T 0.07, momentum 0.5", _crd),
    Preset("crd-kd", "torchdistill, sample: crd, and KD of T 4 with weight 1", _crd_kd),
]

PRESETS = {preset.name: preset for preset in _TABLE}
