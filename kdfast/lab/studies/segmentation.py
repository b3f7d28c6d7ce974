"""Segmenters and detectors of generated scenes: a small student alone, and with losses on the teacher's maps.

The student learns from the labels and, taught, from one loss between its maps and the teacher's. Segmenters: KD of each
pixel, CWD and PKD on the logits. Detectors: MGD and FGD on the last map, whose layers are trained beside the student.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

import kdfast
from kdfast._extras import require
from kdfast.lab.studies import Findings, Step, digits, scenes
from kdfast.procedures.generations import frozen
from kdfast.runs.tables import mean_and_spread

if TYPE_CHECKING:
    from kdfast.lab.study import Settings


__all__ = ["DEFAULTS", "PICTURES", "findings", "steps"]

DEFAULTS = {"epochs": 20, "seed": 0, "seeds": 3}
PICTURES = ("segmentation.png",)

TRAINING, TEST, BATCH, RATE = 512, 256, 32, 5e-3
WIDTHS = {"segmenter": (16, 4), "detector": (12, 3)}  # of the teacher, of the student
LOSSES = {  # name -> label, weight beside the labels' loss
    "segmenter": {
        "KD": ("KD, each pixel", 1.0),
        "CWD": ("CWD", 3.0),
        "PKD": ("PKD", 6.0),
    },
    "detector": {"MGD": ("MGD", 2e-4), "FGD": ("FGD", 1.0)},
}
UNITS = {"segmenter": "mIoU %", "detector": "mAP %"}
SHOWN = 6  # scenes in the picture


def names(kind: str) -> list[str]:
    """The trainings of a kind of network, in their order."""
    return ["teacher", "alone", *LOSSES[kind]]


def label(kind: str, name: str) -> str:
    """How a training reads in the table."""
    return {"teacher": "teacher", "alone": "student alone"}.get(name) or LOSSES[kind][name][0]


def steps(settings: "Settings") -> "list[Step]":
    """For each seed and kind of network: the teacher, the student alone, and one with each loss."""
    return [
        Step(f"{kind} {name} seed {seed}", functools.partial(_train, settings, kind, name, seed))
        for kind in LOSSES
        for seed in settings.every_seed
        for name in names(kind)
    ]


@functools.cache
def drawn(count: int, seed: int) -> tuple[Any, ...]:
    """Scenes, and what their pixels are."""
    images, boxes, labels = scenes.scenes(count, seed)
    return images, boxes, labels, scenes.class_maps(boxes, labels)


def _network(kind, name):
    width = WIDTHS[kind][name != "teacher"]
    return scenes.Segmenter(width) if kind == "segmenter" else scenes.Detector(width)


def _train(settings, kind, name, seed, results, progress):
    network = digits.seeded(lambda: _network(kind, name), seed, WIDTHS[kind][name != "teacher"])
    teacher, loss = None, None
    if name in LOSSES[kind]:
        teacher = _network(kind, "teacher")
        teacher.load_state_dict(results[f"{kind} teacher seed {seed}"]["network"])
        loss = digits.seeded(lambda: _loss(network, teacher, name), seed, 1)
        teacher = frozen(teacher)
    objective = functools.partial({"segmenter": _segment, "detector": _detect}[kind], network, teacher, loss, name)
    trained = nn.ModuleList([network, *([loss] if loss is not None else [])])
    samples = drawn(TRAINING, 0)
    digits.fit(trained, objective, settings.epochs, RATE, seed, lambda e: progress((e + 1) / settings.epochs), samples,
               BATCH)  # fmt: skip
    images, boxes, labels, maps = drawn(TEST, 1)
    network.eval()
    with torch.no_grad():
        out = network(images)
    if kind == "segmenter":
        found = _full_size(out).argmax(1)
        return {"network": network.state_dict(), "percent": scenes.mean_overlap(found, maps), "found": found[:SHOWN]}
    percent = scenes.mean_average_precision(scenes.decode(out), boxes, labels)
    return {"network": network.state_dict(), "percent": percent}


def _loss(student, teacher, name):
    if name in ("MGD", "FGD"):
        channels = [network.norms[-1].num_features for network in (student, teacher)]
        return kdfast.MGD(*channels) if name == "MGD" else kdfast.FGD(*channels)
    return {"KD": kdfast.KD(2.0), "CWD": kdfast.CWD(), "PKD": kdfast.PKD()}[name]


def _full_size(logits):
    return F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)


def _segment(network, teacher, loss, name, images, boxes, labels, maps, epoch):
    logits = network(images)
    value = F.cross_entropy(_full_size(logits), maps)
    if loss is None:
        return value
    with torch.no_grad():
        target = teacher(images)
    if name == "KD":
        logits, target = logits.movedim(1, -1), target.movedim(1, -1)
    return value + LOSSES["segmenter"][name][1] * loss(logits, target)


def _detect(network, teacher, loss, name, images, boxes, labels, maps, epoch):
    features = network.body(images)
    value = scenes.detection_loss(network.head(features), boxes, labels)
    if loss is None:
        return value
    with torch.no_grad():
        target = teacher.body(images)
    more = ()
    if name == "FGD":
        there = [box[label >= 0] for box, label in zip(boxes, labels, strict=True)]
        more = there, [(scenes.SIDE, scenes.SIDE)] * len(images)
    return value + LOSSES["detector"][name][1] * loss(features, target, *more)


# ---- what they show --------------------------------------------------------------------------------------------------
def findings(settings: "Settings", results: dict[str, Any]) -> "Findings":
    """Quality of all networks over the seeds, and some scenes as the segmenters of the first seed see them."""
    records = [
        {"kind": kind, "network": name, "seed": seed, "percent": results[f"{kind} {name} seed {seed}"]["percent"]}
        for kind in LOSSES
        for name in names(kind)
        for seed in settings.every_seed
    ]
    rows = []
    for kind in LOSSES:
        for name in names(kind):
            group = [x["percent"] for x in records if (x["kind"], x["network"]) == (kind, name)]
            rows.append([kind, label(kind, name), UNITS[kind], mean_and_spread(group, 1)])
    return Findings(
        titles=["network", "trained with", "measure", "test scenes"],
        rows=rows,
        records=records,
        notes=[
            f"{TRAINING} scenes of {scenes.SIDE} x {scenes.SIDE} pixels with one to three shapes, {TEST} others for "
            "testing;",
            f"{settings.epochs} epochs, {settings.seeds} seeds; widths of teacher and student "
            f"{WIDTHS['segmenter'][0]} and {WIDTHS['segmenter'][1]}",
        ],
        pictures={"segmentation.png": _picture(settings, results)},
    )


def _picture(settings, results):
    """Scenes, what their pixels are, and what each segmenter of the first seed says."""
    images, _, _, maps = drawn(TEST, 1)
    found = {label("segmenter", name): results[f"segmenter {name} seed {settings.seed}"]["found"]
             for name in names("segmenter")}  # fmt: skip
    lines = {"scene": images[:SHOWN].movedim(1, -1), "pixels": maps[:SHOWN], **found}
    figure = require("matplotlib.figure", extra="compare").Figure(
        figsize=(1.2 * SHOWN + 1, 1.2 * len(lines)), dpi=150, layout="constrained"
    )
    panels = figure.subplots(len(lines), SHOWN, squeeze=False)
    for row, (title, shown) in zip(panels, lines.items(), strict=True):
        for panel, image in zip(row, shown, strict=True):
            panel.imshow(image.numpy(), cmap="viridis", vmin=0, vmax=len(scenes.CLASSES))
            panel.set(xticks=[], yticks=[])
        row[0].set_ylabel(title, fontsize=7)
    return figure
