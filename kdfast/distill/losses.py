"""The table of losses: one row per loss says how to build it and what it reads. A new loss is a new row.

A row's ``reads`` are the arguments of the loss in their order, as attributes of `train.Batch`:
``student.logits``, ``student.embedding``, ``student.maps`` (a list, one map per stage), ``student.preactivations``
(these before ReLU), the same of ``teacher``, ``teacher.probabilities``, ``labels``, ``images``, ``index`` (positions in
the training set). A builder is given a `train.Example`, which has more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import kdfast
from kdfast.distill import layers

__all__ = ["ALONE", "ROWS", "LossRow"]


@dataclass(frozen=True)
class LossRow:
    """One loss: what it is, what it reads, and what stands beside it in the objective.

    The objective of a training step is ``weight * loss + cross_entropy * CE(student.logits, labels)``.
    ``cross_entropy`` is 0 where the loss contains the labels' cross-entropy, or replaces it.

    ``pre_stage`` is a row of its own that is trained before, for an eighth of the epochs more, with an optimizer of its
    own: what the student and the layers of its loss have learnt there is where this row starts.

    Example::

        LossRow("hint", "the last map through a regressor", build_hint, ("student.maps", "teacher.maps"))
    """

    name: str
    summary: str
    # Example -> nn.Module. The example gives shapes to losses with layers of their own, whose parameters are then
    # trained along with the student's.
    build: Callable
    reads: tuple[str, ...]
    weight: float = 1.0
    cross_entropy: float = 1.0
    # Which trained network is the teacher: "teacher", or "student" for the student trained alone.
    teacher: str = "teacher"
    pre_stage: LossRow | None = None
    # Whether the loss differentiates logits in the images: these then require a gradient, and the teacher has a graph.
    jacobians: bool = False

    @property
    def reads_student(self):
        """Whether the student has to run in each step."""
        return bool(self.cross_entropy) or any(name.startswith("student.") for name in self.reads)

    @property
    def reads_teacher(self):
        """Whether a teacher has to run in each step."""
        return any(name.startswith("teacher.") for name in self.reads)

    @property
    def stages(self):
        """The rows that are trained, in their order."""
        return [self] if self.pre_stage is None else [self.pre_stage, self]

    def pre_stage_epochs(self, epochs):
        """How many epochs the pre-stage has before `epochs` of this row: RepDistiller's share, 30 before 240."""
        return 0 if self.pre_stage is None else -(-epochs // 8)


def _kdfast(name, **arguments):
    """A builder for ``kdfast.<name>(**arguments)``."""
    return lambda example: getattr(kdfast, name)(**arguments)


def _cross_entropy(example):
    return nn.CrossEntropyLoss()


def _crd(example):
    """CRD with its official settings: negatives of other classes, as many as a third of the training set at most."""
    dims = example.student.embedding.shape[1], example.teacher.embedding.shape[1]
    negatives = min(16384, max(1, example.samples // 3))
    return kdfast.CRD(*dims, example.samples, negatives=negatives, labels=example.train_labels)


_LOGITS = ("student.logits", "teacher.logits")
_LOGITS_LABELS = (*_LOGITS, "labels")
_MAPS = ("student.maps", "teacher.maps")
_PREACTIVATIONS = ("student.preactivations", "teacher.preactivations")

# The teacher itself and the student alone: the labels' cross-entropy is the whole objective.
ALONE = LossRow("alone", "the labels alone", _cross_entropy, ("student.logits", "labels"), cross_entropy=0.0)

# Settings are the papers' or their official code's, where these name them for image classification. ReverseKD and JSD,
# which come from other uses, take KD's temperature. JacobianMatching has no official code, so no weight: with 10 to 100
# the digits are classified worse. HCL stands without ReviewKD's fusion of stages.
_TABLE = [
    LossRow(
        "kd",
        "Hinton's distillation: softened teacher and labels",
        _kdfast("KD", temperature=4.0, alpha=0.9),
        _LOGITS_LABELS,
        cross_entropy=0.0,
    ),
    LossRow("reverse-kd", "KL the other way round", _kdfast("ReverseKD", temperature=4.0), _LOGITS),
    LossRow("jsd", "Jensen-Shannon divergence", _kdfast("JSD", beta=0.5, temperature=4.0), _LOGITS),
    LossRow(
        "dkd",
        "decoupled target and non-target classes",
        _kdfast("DKD", temperature=4.0, alpha=1.0, beta=8.0),
        _LOGITS_LABELS,
    ),
    LossRow(
        "rkd",
        "distances and angles among a batch's embeddings",
        _kdfast("RKD", distance_weight=25.0, angle_weight=50.0),
        ("student.embedding", "teacher.embedding"),
    ),
    LossRow(
        "at",
        "attention maps of every stage",
        _kdfast("AT", p=2),
        _MAPS,
        weight=1000.0,
    ),
    LossRow(
        "sp",
        "similarities among a batch's samples",
        _kdfast("SP"),
        _MAPS,
        weight=3000.0,
    ),
    LossRow(
        "pkt",
        "similarities as probabilities",
        _kdfast("PKT"),
        ("student.embedding", "teacher.embedding"),
        weight=30000.0,
    ),
    LossRow(
        "cckd",
        "Gaussian correlations among a batch's embeddings",
        _kdfast("CCKD"),
        ("student.embedding", "teacher.embedding"),
        weight=1.0,
    ),
    LossRow(
        "nst",
        "selectivity of the channels of every stage",
        _kdfast("NST"),
        _MAPS,
        weight=50.0,
    ),
    LossRow(
        "fakd",
        "affinities among the positions of every stage",
        _kdfast("FAKD"),
        _MAPS,
        weight=1.0,
    ),
    LossRow(
        "lkd",
        "correlations among local patches",
        _kdfast("LKD", patches=2),
        _MAPS,
        weight=1.0,
    ),
    LossRow(
        "crd",
        "contrast with memory banks of embeddings",
        _crd,
        ("student.embedding", "teacher.embedding", "index"),
        weight=0.8,
    ),
    LossRow(
        "fitnets",
        "hints from the middle stage, then kd",
        _kdfast("KD", temperature=4.0, alpha=0.9),
        _LOGITS_LABELS,
        cross_entropy=0.0,
        pre_stage=LossRow("hints", "the hint through a regressor", layers.Hints, _MAPS, cross_entropy=0.0),
    ),
    LossRow(
        "ft",
        "factors of the last maps, after their paraphraser",
        layers.Factors,
        _MAPS,
        weight=500.0,
        pre_stage=LossRow(
            "paraphraser", "the teacher's maps rebuilt", layers.Reconstruction, ("teacher.maps",), cross_entropy=0.0
        ),
    ),
    LossRow(
        "ab",
        "activation boundaries of every stage, then the labels",
        _cross_entropy,
        ("student.logits", "labels"),
        cross_entropy=0.0,
        pre_stage=LossRow(
            "boundaries", "the teacher's signs", layers.Boundaries, _PREACTIVATIONS, weight=3e-3, cross_entropy=0.0
        ),
    ),
    LossRow("ofd", "pre-activations above a margin", layers.Overhaul, _PREACTIVATIONS, weight=1e-3),
    LossRow("vid", "variational information of every stage", layers.Information, _MAPS, weight=1.0),
    LossRow("hcl", "maps of every stage, pooled to several sizes", layers.Hierarchy, _MAPS, weight=1.0),
    LossRow(
        "fsp",
        "inner products of consecutive stages, then the labels",
        _cross_entropy,
        ("student.logits", "labels"),
        cross_entropy=0.0,
        pre_stage=LossRow("flow", "the inner products alone", layers.Flow, _MAPS, cross_entropy=0.0),
    ),
    LossRow(
        "jacobian",
        "gradients of the labelled logit in the image",
        _kdfast("JacobianMatching"),
        ("student.logits", "teacher.logits", "images", "labels"),
        weight=1.0,
        jacobians=True,
    ),
    LossRow("dist", "correlations between and within classes", _kdfast("DIST", beta=1.0, gamma=1.0), _LOGITS),
    LossRow(
        "tfkd-self",
        "teacher-free: the student trained alone teaches",
        _kdfast("TfKDSelf"),
        _LOGITS_LABELS,
        cross_entropy=0.0,
        teacher="student",
    ),
    LossRow(
        "tfkd-reg",
        "teacher-free: a hand-made teacher",
        _kdfast("TfKDReg"),
        ("student.logits", "labels"),
        cross_entropy=0.0,
    ),
    LossRow(
        "label-refinery",
        "the teacher's probabilities replace the labels",
        _kdfast("LabelRefinery"),
        ("student.logits", "teacher.probabilities"),
        cross_entropy=0.0,
    ),
]

ROWS = {row.name: row for row in _TABLE}
