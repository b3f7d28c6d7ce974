"""The table of losses: one row per loss says how to build it and what it reads. A new loss is a new row.

A row's ``reads`` are the arguments of the loss in their order, as attributes of `train.Batch`:
``student.logits``, ``student.embedding``, ``student.maps`` (a list, one map per stage), ``student.preactivations``
(these before ReLU), the same of ``teacher``, ``teacher.probabilities``, ``labels``, ``images``, ``index`` (positions in
the training set), ``epoch``; of several networks ``students.logits``, ``students.embedding``, ``students.maps`` and
``teachers.logits``, lists with one entry per network. A builder is given a `train.Example`, which has more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

import kdfast
from kdfast.lab import layers
from kdfast.lab import students as ensembles

__all__ = ["ALONE", "ROWS", "TEACHERS", "LossRow", "needed"]

TEACHERS = 3  # of an ensemble of teachers


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
    # Which trained network is the teacher: "teacher", "student" for the student trained alone, or a row's student.
    teacher: str = "teacher"
    pre_stage: LossRow | None = None
    # How many students learn together, and the model they are: (function that makes one, their number) -> nn.Module.
    students: int = 1
    layout: Callable = ensembles.Apart
    # Whether the loss differentiates logits in the images: these then require a gradient, and the teacher has a graph.
    jacobians: bool = False

    @property
    def reads_student(self) -> bool:
        """Whether the students have to run in each step."""
        return bool(self.cross_entropy) or any(name.startswith(("student.", "students.")) for name in self.reads)

    @property
    def reads_teacher(self) -> bool:
        """Whether the teacher has to run in each step."""
        return any(name.startswith("teacher.") for name in self.reads)

    @property
    def teachers(self) -> int:
        """How many teachers run beside that one: those of `teachers.logits`, if one of its stages reads them."""
        return TEACHERS if any(name.startswith("teachers.") for stage in self.stages for name in stage.reads) else 0

    @property
    def stages(self) -> list[LossRow]:
        """The rows that are trained, in their order."""
        return [self] if self.pre_stage is None else [self.pre_stage, self]

    @property
    def taught(self) -> bool:
        """Whether one of its stages reads the teacher."""
        return any(stage.reads_teacher for stage in self.stages)

    @property
    def observes_teacher(self) -> bool:
        """Whether one of its stages reads layers of the teacher, and not its last one alone."""
        layers_read = ("teacher.embedding", "teacher.maps", "teacher.preactivations")
        return any(name in layers_read for stage in self.stages for name in stage.reads)

    def pre_stage_epochs(self, epochs: int) -> int:
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
        "irg",
        "a graph of the batch's samples, in two maps, embedding and logits",
        layers.Graph,
        tuple(f"{network}.{read}" for network in ("student", "teacher") for read in ("maps", "embedding", "logits")),
    ),
    LossRow(
        "at",
        "attention maps of every stage",
        _kdfast("AT", p=2),
        _MAPS,
        weight=1000.0 / 16,  # a mean over 16 times fewer positions than in the paper's 32 x 32 is so much larger
    ),
    LossRow(
        "sp",
        "similarities among a batch's samples",
        _kdfast("SP"),
        _MAPS,
        weight=3000.0 / 4,  # grows with 1 / batch size; the paper's batches are of 128
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

_STUDENTS = ("students.logits", "labels")
_RAMP = 7  # epochs: of the default 25, as many as the papers' 80 of 300

# Earlier generations as teachers.
_TABLE += [
    LossRow(
        "ban",
        "Born-Again: the student alone teaches one like it",
        _kdfast("KD", temperature=1.0, alpha=0.5),
        _LOGITS_LABELS,
        cross_entropy=0.0,
        teacher="student",
    ),
    LossRow(
        "ban-2",
        "Born-Again: ban's student teaches the next generation",
        _kdfast("KD", temperature=1.0, alpha=0.5),
        _LOGITS_LABELS,
        cross_entropy=0.0,
        teacher="ban",
    ),
    LossRow(
        "cwtm",
        "Born-Again: labels weighted by the confidence of the student alone",
        _kdfast("CWTM"),
        _LOGITS_LABELS,
        cross_entropy=0.0,
        teacher="student",
    ),
    LossRow(
        "dkpp",
        "Born-Again: the student alone teaches how sure to be",
        _kdfast("DKPP"),
        _LOGITS_LABELS,
        teacher="student",
    ),
    LossRow(
        "refinery-2",
        "a second round: label-refinery's student refines the labels",
        _kdfast("LabelRefinery"),
        ("student.logits", "teacher.probabilities"),
        cross_entropy=0.0,
        teacher="label-refinery",
    ),
]

# Several teachers.
_TABLE += [
    LossRow(
        "aekd",
        f"{TEACHERS} teachers weighed by their gradients",
        _kdfast("AEKD", temperature=4.0, slack=0.6),
        ("student.logits", "teachers.logits"),
        weight=0.9,
    ),
    LossRow(
        "end",
        f"the mean of {TEACHERS} teachers",
        _kdfast("EnD"),
        ("student.logits", "teachers.logits"),
        weight=10.0,  # the official mean is over the classes, too
        cross_entropy=0.0,
    ),
    LossRow(
        "endd",
        f"{TEACHERS} teachers as a Dirichlet distribution",
        _kdfast("EnDD", temperature=2.5),
        ("student.logits", "teachers.logits"),
        cross_entropy=0.0,
    ),
]

# Students that learn together; each loss contains their cross-entropies.
_TABLE += [
    LossRow(
        "dml",
        "two students teach each other",
        ensembles.Mutual,
        _STUDENTS,
        cross_entropy=0.0,
        students=2,
    ),
    LossRow(
        "codistillation",
        "two students, each the other's soft labels after 5 epochs",
        partial(ensembles.Codistillation, burn_in=5),
        (*_STUDENTS, "epoch"),
        cross_entropy=0.0,
        students=2,
    ),
    LossRow(
        "kdcl",
        "three students and the least logits among them",
        _kdfast("KDCL", rule="minlogit"),
        _STUDENTS,
        cross_entropy=0.0,
        students=3,
    ),
    LossRow(
        "one",
        "three branches and their gated ensemble",
        partial(ensembles.One, rampup_epochs=_RAMP),
        ("students.logits", "student.maps", "labels", "epoch"),
        cross_entropy=0.0,
        students=3,
        layout=ensembles.Branches,
    ),
    LossRow(
        "okddip",
        "three branches that attend to each other, and a leader",
        partial(ensembles.Leader, rampup_epochs=_RAMP),
        ("students.logits", "students.embedding", "labels", "epoch"),
        cross_entropy=0.0,
        students=4,
        layout=ensembles.Branches,
    ),
    LossRow(
        "collaborative",
        "three branches, each taught by the mean of the others",
        _kdfast("CollaborativeLearning", rampup_epochs=_RAMP),
        (*_STUDENTS, "epoch"),
        cross_entropy=0.0,
        students=3,
        layout=partial(ensembles.Branches, rescale=True),
    ),
    LossRow(
        "ffl",
        "two students and the fusion of their maps",
        partial(ensembles.Fusion, rampup_epochs=_RAMP),
        ("students.logits", "students.maps", "labels", "epoch"),
        cross_entropy=0.0,
        students=2,
    ),
    LossRow(
        "divcoop",
        "three students that agree about the wrong classes",
        partial(ensembles.Cooperation, relation="js", weight=10.0),
        _STUDENTS,
        cross_entropy=0.0,
        students=3,
    ),
]

ROWS = {row.name: row for row in _TABLE}


def needed(names: list[str]) -> list[LossRow]:
    """The rows of these names, each after the rows whose students teach it."""
    rows = {}
    for name in names:
        row = ROWS[name]
        if row.taught and row.teacher in ROWS:
            rows |= {earlier.name: earlier for earlier in needed([row.teacher])}
        rows[name] = row
    return list(rows.values())
