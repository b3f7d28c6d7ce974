"""Distillation without data: images out of a detector (DIODE) and out of a classifier (DeepInversion), and their use.

A detector is trained on scenes of shapes. Then only its weights are left: images are made that it finds shapes in and
that its batch norms know, and a smaller detector learns its raw outputs on them. What it finds in real scenes stands
beside a student on the teacher's own training scenes, and one on noise. The same for a classifier of digits, with half
of the images made where student and teacher disagree, too (adaptive DeepInversion).
"""

import functools
from typing import TYPE_CHECKING, Any

import torch

from kdfast._extras import require
from kdfast.lab.networks import STUDENT, TEACHER, ConvNet
from kdfast.lab.studies import Findings, Step, digits, scenes
from kdfast.losses import KD, adaptive_inversion
from kdfast.ops import cross_entropy
from kdfast.procedures import Augment, ImagePrior, add_boxes, random_boxes, synthesize
from kdfast.procedures.generations import frozen
from kdfast.runs.determinism import derived_seed

if TYPE_CHECKING:
    from kdfast.lab.study import Settings


__all__ = ["DEFAULTS", "PICTURES", "findings", "steps"]

DEFAULTS = {"seed": 0}
PICTURES = ("scenes.png", "digits.png")

TRAINING, TEST = 1200, 400  # scenes
WIDTHS = {"teacher": 12, "student": 6}
EPOCHS = 12  # of the teacher on its scenes
STUDENT_STEPS = 450  # the same for every student, whatever it learns on
IMAGES, BATCHES = 64, 3  # made at a time, and how many times
STEPS = 100  # in the pixels
PRIOR = ImagePrior(statistics=1.0, p=2, variation_l2=3e-3)

DIGITS = 160  # made at a time
DIGIT_EPOCHS = 20  # of the teacher
DIGIT_STEPS = 200
DIGIT_STUDENT_STEPS = 600
DIGIT_PRIOR = ImagePrior(statistics=1.0, first=1.0, p=2, variation_l2=1e-3)
COMPETITION = 2.0  # weight of the adaptive term


def steps(settings: "Settings") -> "list[Step]":
    """First the detectors, then the digits."""
    seed = settings.seed

    def step(name, work, *arguments):
        return Step(name, functools.partial(work, seed, *arguments))

    return [
        step("detector", _detector),
        *(step(f"scenes {number}", _make_scenes, number) for number in range(BATCHES)),
        *(step(f"detector on {source}", _distil_detector, source) for source in SCENE_SOURCES),
        step("classifier", _classifier),
        step("digits", _make_digits, None, 0),
        step("more digits", _make_digits, None, 1),
        step("classifier on digits", _distil_classifier, ("digits",)),
        step("adaptive digits", _make_digits, "classifier on digits", 1),
        *(step(f"classifier on {name}", _distil_classifier, parts) for name, parts in DIGIT_SOURCES.items()),
    ]


# ---- detectors -------------------------------------------------------------------------------------------------------
@functools.cache
def _training_scenes(seed):
    return scenes.scenes(TRAINING, seed, 0)


def _precision(network):
    images, boxes, labels = _test_scenes()
    with torch.no_grad():
        return scenes.mean_average_precision(scenes.decode(network.eval()(images)), boxes, labels)


@functools.cache
def _test_scenes():
    return scenes.scenes(TEST, 0, 1)  # the same for every seed


def _detector(seed, results, progress):
    network = digits.seeded(lambda: scenes.Detector(WIDTHS["teacher"]), seed)

    def objective(images, boxes, labels, epoch):
        return scenes.detection_loss(network(images), boxes, labels)

    def after(epoch):
        progress((epoch + 1) / EPOCHS)

    digits.fit(network, objective, EPOCHS, 3e-3, seed, after, _training_scenes(seed), batch=32)
    return {"network": network.state_dict(), "score": _precision(network)}


def _teacher(results):
    network = scenes.Detector(WIDTHS["teacher"])
    network.load_state_dict(results["detector"]["network"])
    return frozen(network)


def _make_scenes(seed, number, results, progress):
    """A batch of images from the detector: one random box each, and twice what it sees beside them."""
    generator = torch.Generator().manual_seed(derived_seed(seed, number, IMAGES))
    teacher = _teacher(results)
    wanted = random_boxes(IMAGES, len(scenes.CLASSES), scenes.SIDE, *scenes.SIZES, generator)

    def loss(raw, shown, change, step):
        nonlocal wanted
        if step in (STEPS // 3, STEPS // 2):
            found = scenes.decode(raw, threshold=0.3)
            wanted = add_boxes(*wanted, [(change.restored(boxes), labels) for boxes, labels, _ in found])
        progress(step / STEPS)
        boxes, labels = wanted
        return scenes.detection_loss(raw, change.boxes(boxes), labels)

    start = 0.3 + 0.2 * torch.rand(IMAGES, 3, scenes.SIDE, scenes.SIDE, generator=generator)
    augment = Augment(generator=generator)
    images = synthesize(teacher, teacher.norms, loss, start, STEPS, PRIOR, 0.05, augment, limits=(0, 1))
    return {"images": images}


SCENE_SOURCES: dict[str, Any] = {
    "real scenes": lambda seed, results: _training_scenes(seed)[0],
    "synthetic scenes": lambda seed, results: torch.cat([results[f"scenes {i}"]["images"] for i in range(BATCHES)]),
    "noise": lambda seed, results: digits.seeded(
        lambda: torch.rand(BATCHES * IMAGES, 3, scenes.SIDE, scenes.SIDE), seed, IMAGES
    ),
}


def _distil_detector(seed, source, results, progress):
    """A student of the raw outputs alone, without a label."""
    images = SCENE_SOURCES[source](seed, results)
    teacher, network = _teacher(results), digits.seeded(lambda: scenes.Detector(WIDTHS["student"]), seed)
    augment = Augment(generator=torch.Generator().manual_seed(seed))

    def objective(images, epoch):
        images = augment.draw(scenes.SIDE).images(images)
        with torch.no_grad():
            target = teacher(images)
        return (network(images) - target).square().mean()

    _fit_student(network, objective, images, STUDENT_STEPS, 32, seed, progress)
    return {"network": network.state_dict(), "score": _precision(network), "images": len(images)}


def _fit_student(network, objective, images, steps, batch, seed, progress):
    epochs = max(1, steps * batch // len(images))
    digits.fit(network, objective, epochs, 1e-2, seed, lambda epoch: progress((epoch + 1) / epochs), (images,), batch)


# ---- digits ----------------------------------------------------------------------------------------------------------
def _classifier(seed, results, progress):
    network = digits.seeded(lambda: ConvNet(1, 10, TEACHER), seed)

    def objective(images, labels, epoch):
        return cross_entropy(network(images), labels)

    digits.fit(network, objective, DIGIT_EPOCHS, 2e-3, seed, lambda epoch: progress((epoch + 1) / DIGIT_EPOCHS))
    return {"network": network.state_dict(), "score": digits.accuracy(network)}


def _stored(results, name, widths):
    network = ConvNet(1, 10, widths)
    network.load_state_dict(results[name]["network"])
    return frozen(network)


def _make_digits(seed, student, number, results, progress):
    """A batch of digits; with the name of a `student`, such that it disagrees with the teacher about them."""
    generator = torch.Generator().manual_seed(derived_seed(seed, number, DIGITS))
    teacher = _stored(results, "classifier", TEACHER)
    rival = student and _stored(results, student, STUDENT)
    labels = torch.arange(DIGITS) % 10

    def loss(logits, shown, change, step):
        progress(step / DIGIT_STEPS)
        value = cross_entropy(logits, labels)
        return value if rival is None else value + COMPETITION * adaptive_inversion(rival(shown), logits)

    real = digits.load().train_images
    limits = real.amin().item(), real.amax().item()  # of a pixel, which is known without any image
    start = torch.randn(DIGITS, 1, 8, 8, generator=generator).clamp(*limits)
    augment = Augment(flip=False, jitter=1, contrast=0, brightness=0, generator=generator)
    norms = [stage.norm for stage in teacher.stages]
    return {"images": synthesize(teacher, norms, loss, start, DIGIT_STEPS, DIGIT_PRIOR, 0.1, augment, limits)}


DIGIT_SOURCES: dict[str, Any] = {  # name -> the steps whose images it has; none: the training set, or noise
    "training set": (),
    "noise": None,
    "all digits": ("digits", "more digits"),
    "adaptive digits": ("digits", "adaptive digits"),
}


def _distil_classifier(seed, parts, results, progress):
    """A student of the logits alone, without a label."""
    if parts:
        images = torch.cat([results[name]["images"] for name in parts])
    elif parts is None:
        images = digits.seeded(lambda: torch.randn(2 * DIGITS, 1, 8, 8), seed, DIGITS)
    else:
        images = digits.load().train_images
    teacher = _stored(results, "classifier", TEACHER)
    network = digits.seeded(lambda: ConvNet(1, 10, STUDENT), seed)
    loss = KD(temperature=4.0, alpha=1.0)

    def objective(images, epoch):
        with torch.no_grad():
            target = teacher(images)
        return loss(network(images), target, target.argmax(1))

    _fit_student(network, objective, images, DIGIT_STUDENT_STEPS, 32, seed, progress)
    return {"network": network.state_dict(), "score": digits.accuracy(network), "images": len(images)}


# ---- what they show --------------------------------------------------------------------------------------------------
def _rows(results):
    yield "detector: teacher, by labels", TRAINING, results["detector"]["score"]
    for source in SCENE_SOURCES:
        result = results[f"detector on {source}"]
        yield f"detector: student, {source}", result["images"], result["score"]
    yield "digits: teacher, by labels", len(digits.load().train_labels), results["classifier"]["score"]
    labels = ["training set", "noise", "DeepInversion", "half of it adaptive"]
    for label, source in zip(labels, DIGIT_SOURCES, strict=True):
        result = results[f"classifier on {source}"]
        yield f"digits: student, {label}", result["images"], result["score"]


def findings(settings: "Settings", results: dict[str, Any]) -> "Findings":
    """Scores of teachers and students, and pictures of what the students have learnt on."""
    rows = list(_rows(results))
    records = [
        {
            "network": name,
            "images": images,
            "score_percent": score,
            "score": "mAP" if "detector" in name else "accuracy",
        }
        for name, images, score in rows
    ]
    made = torch.cat([results[f"scenes {number}"]["images"] for number in range(BATCHES)])
    found = digits.load().train_images
    found = found[torch.linspace(0, len(found) - 1, 10).long()]
    return Findings(
        titles=["network, learnt on", "images", "mAP or accuracy %"],
        rows=[[name, str(images), f"{score:.2f}"] for name, images, score in rows],
        records=records,
        notes=[
            f"detector: mean average precision at an overlap of 0.5, {TEST} scenes of {len(scenes.CLASSES)} classes; "
            "digits: accuracy on the test set",
            "students learn the teacher's raw outputs without labels, all in the same number of steps",
        ],
        pictures={
            "scenes.png": _gallery({"made": made, "real": _training_scenes(settings.seed)[0]}),
            "digits.png": _gallery(
                {
                    "DeepInversion": results["digits"]["images"],
                    "adaptive": results["adaptive digits"]["images"],
                    "real": found,
                }
            ),
        },
        sections=[rows[len(SCENE_SOURCES)][0]],
    )


def _gallery(groups):
    """Ten images of each group, one row each."""
    size = (9.6, 1.05 * len(groups) + 0.2)
    figure = require("matplotlib.figure", extra="compare").Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(len(groups), 10, squeeze=False)
    for line, (label, images) in zip(panels, groups.items(), strict=True):
        line[0].set_ylabel(label, fontsize=8)
        for panel, image in zip(line, images, strict=False):
            panel.imshow(image.permute(1, 2, 0).squeeze(2).numpy(), cmap="gray_r")
        for panel in line:
            panel.set(xticks=[], yticks=[])
    return figure
