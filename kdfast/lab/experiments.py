"""The table of `kdfast compare`: how each loss is trained and weighed on small images. A new loss is a new row.

A row's objective is a :class:`kdfast.objectives.Recipe`, whose reads are places of the networks; what stands beside it
is who teaches, who learns together, and what is trained before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

import kdfast
from kdfast.lab.networks import Apart, Branches
from kdfast.objectives import LOGITS, Recipe, connected
from kdfast.objectives.recipes import (
    CRD,
    EMBEDDINGS,
    LAST_MAP,
    MAPS,
    PREACTIVATIONS,
    hints,
    information,
    overhaul,
    plain,
    single,
)

__all__ = ["ALONE", "ROWS", "TEACHERS", "Experiment", "needed"]

TEACHERS = 3  # of an ensemble of teachers


@dataclass(frozen=True)
class Experiment:
    """One row: an objective, and how its students are trained.

    ``pre_stage`` is an objective of its own that is trained before, for an eighth of the epochs more, with an optimizer
    of its own: what the student and the layers of its loss have learnt there is where this row starts.
    """

    recipe: Recipe
    pre_stage: Recipe | None = None
    # Which trained network is the teacher: "teacher", "student" for the student trained alone, or a row's student.
    teacher: str = "teacher"
    # How many students learn together, and the model they are: (function that makes one, their number) -> nn.Module.
    students: int = 1
    layout: Callable[..., nn.Module] = field(default=Apart)

    @property
    def stages(self) -> list[Recipe]:
        """The objectives that are trained, in their order."""
        return [self.recipe] if self.pre_stage is None else [self.pre_stage, self.recipe]

    @property
    def teachers(self) -> int:
        """How many networks teach: one, several, or none."""
        if any(stage.reads("teachers") for stage in self.stages):
            return TEACHERS
        return int(any(stage.reads("teacher") for stage in self.stages))

    def pre_stage_epochs(self, epochs: int) -> int:
        """How many epochs the pre-stage has before `epochs` of this row: RepDistiller's share, 30 before 240."""
        return 0 if self.pre_stage is None else -(-epochs // 8)


def _row(*arguments: Any, teacher: str = "teacher", students: int = 1, **more: Any) -> Experiment:
    """A row of a `single` loss."""
    own = {name: more.pop(name) for name in ("layout", "pre_stage") if name in more}
    return Experiment(single(*arguments, **more), teacher=teacher, students=students, **own)


def _connected(loss, reads, **more):
    """A builder of a loss with connectors."""
    return lambda setting: connected.Connected(loss(), *map(setting.channels, reads), **more)


def _fusion(setting):
    _, channels, _, side = setting.shapes("student.map")[0]
    return connected.Fusion(channels, setting.pair.student.classifier.out_features, side, rampup_epochs=RAMP)


LABELS = ("student.logits", "labels")
LOGITS_LABELS = (*LOGITS, "labels")
STUDENTS = ("students.logits", "labels")
RAMP = 7  # epochs: of the default 25, as many as the papers' 80 of 300
GRAPH = tuple(f"{network}.{place}" for network in ("student", "teacher") for place in ("maps", "embedding", "logits"))

KD = plain(kdfast.KD, temperature=4.0, alpha=0.9)
BORN_AGAIN = plain(kdfast.KD, temperature=1.0, alpha=0.5)
BOUNDARIES = _connected(partial(kdfast.AB, reduction="mean"), PREACTIVATIONS, halved=True)
CROSS_ENTROPY = plain(nn.CrossEntropyLoss)

# The teacher itself and the student alone: the labels' cross-entropy is the whole objective.
ALONE = _row(CROSS_ENTROPY, LABELS, labels=0.0)

# Settings are the papers' or their official code's, where these name them for image classification. ReverseKD and JSD,
# which come from other uses, take KD's temperature. JacobianMatching has no official code, so no weight: with 10 to 100
# the digits are classified worse. HCL is that of ReviewKD, without its fusion of stages.
ROWS = {
    "kd": _row(KD, LOGITS_LABELS, labels=0.0),
    "reverse-kd": _row(plain(kdfast.ReverseKD, temperature=4.0)),
    "jsd": _row(plain(kdfast.JSD, beta=0.5, temperature=4.0)),
    "dkd": _row(plain(kdfast.DKD, temperature=4.0, alpha=1.0, beta=8.0), LOGITS_LABELS),
    # Of those made for language models each stands beside the labels with the weight 1, at the temperature 1.
    "lskd": _row(plain(kdfast.LSKD, temperature=2.0), LOGITS, 9.0),
    "nkd": _row(plain(kdfast.NKD), LOGITS_LABELS),
    "ttm": _row(plain(kdfast.TTM)),
    "wttm": _row(plain(kdfast.WTTM)),
    "ctkd": _row(plain(kdfast.CTKD), (*LOGITS, "epoch"), 0.9),
    "skew-kl": _row(plain(kdfast.SkewKL)),
    "tvd": _row(plain(kdfast.TVD)),
    "akl": _row(plain(kdfast.AKL)),
    "taid": _row(plain(kdfast.TAID)),
    "alpha-beta": _row(plain(kdfast.AlphaBeta)),
    "rkd": _row(plain(kdfast.RKD, distance_weight=25.0, angle_weight=50.0), EMBEDDINGS),
    "irg": _row(plain(connected.Graph), GRAPH, stages=slice(-2, None)),
    # A mean over 16 times fewer positions than in the paper's 32 x 32 is so much larger.
    "at": _row(plain(kdfast.AT, p=2), MAPS, 1000.0 / 16),
    # Grows with 1 / batch size; the paper's batches are of 128.
    "sp": _row(plain(kdfast.SP), MAPS, 3000.0 / 4),
    "pkt": _row(plain(kdfast.PKT), EMBEDDINGS, 30000.0),
    "cckd": _row(plain(kdfast.CCKD), EMBEDDINGS),
    "nst": _row(plain(kdfast.NST), MAPS, 50.0),
    "fakd": _row(plain(kdfast.FAKD), MAPS),
    "lkd": _row(plain(kdfast.LKD, patches=2), MAPS),
    "crd": Experiment(Recipe((CRD,))),
    "fitnets": _row(KD, LOGITS_LABELS, labels=0.0, pre_stage=single(hints, MAPS, stages=slice(1, 2), labels=0.0)),
    "ft": _row(
        lambda setting: connected.Factors(setting.channels("student.map")[0], setting.first),
        LAST_MAP,
        500.0,
        pre_stage=single(
            lambda setting: connected.Reconstruction(setting.channels("teacher.map")[0]), LAST_MAP[1:], labels=0.0
        ),
    ),
    "ab": _row(
        CROSS_ENTROPY,
        LABELS,
        labels=0.0,
        pre_stage=single(BOUNDARIES, PREACTIVATIONS, 3e-3, labels=0.0),
    ),
    "ofd": _row(overhaul, PREACTIVATIONS, 1e-3),
    "vid": _row(information, MAPS),
    "hcl": _row(_connected(kdfast.HCL, MAPS), MAPS),
    "reviewkd": _row(lambda setting: kdfast.ReviewKD(*map(setting.channels, MAPS)), MAPS),
    "mgd": _row(lambda setting: kdfast.MGD(*(setting.channels(read)[0] for read in LAST_MAP)), LAST_MAP, 7e-5),
    "gram-anchoring": _row(plain(kdfast.GramAnchoring), MAPS),
    "patch-kl": _row(plain(kdfast.PatchKL), MAPS),
    "fsp": _row(CROSS_ENTROPY, LABELS, labels=0.0, pre_stage=single(_connected(kdfast.FSP, MAPS), MAPS, labels=0.0)),
    "jacobian": _row(plain(kdfast.JacobianMatching), (*LOGITS, "images", "labels")),
    "dist": _row(plain(kdfast.DIST, beta=1.0, gamma=1.0)),
    "tfkd-self": _row(plain(kdfast.TfKDSelf), LOGITS_LABELS, labels=0.0, teacher="student"),
    "tfkd-reg": _row(plain(kdfast.TfKDReg), LABELS, labels=0.0),
    "label-refinery": _row(plain(kdfast.LabelRefinery), ("student.logits", "teacher.probabilities"), labels=0.0),
    # Earlier generations as teachers.
    "ban": _row(BORN_AGAIN, LOGITS_LABELS, labels=0.0, teacher="student"),
    "ban-2": _row(BORN_AGAIN, LOGITS_LABELS, labels=0.0, teacher="ban"),
    "cwtm": _row(plain(kdfast.CWTM), LOGITS_LABELS, labels=0.0, teacher="student"),
    "dkpp": _row(plain(kdfast.DKPP), LOGITS_LABELS, teacher="student"),
    "refinery-2": _row(
        plain(kdfast.LabelRefinery),
        ("student.logits", "teacher.probabilities"),
        labels=0.0,
        teacher="label-refinery",
    ),
    # Several teachers. EnD's official mean is over the classes, too.
    "aekd": _row(plain(kdfast.AEKD, temperature=4.0, slack=0.6), ("student.logits", "teachers.logits"), 0.9),
    "end": _row(plain(kdfast.EnD), ("student.logits", "teachers.logits"), 10.0, labels=0.0),
    "endd": _row(plain(kdfast.EnDD, temperature=2.5), ("student.logits", "teachers.logits"), labels=0.0),
    # Students that learn together; each loss contains their cross-entropies.
    "dml": _row(plain(connected.Mutual), STUDENTS, labels=0.0, students=2),
    "codistillation": _row(plain(connected.Codistilled, burn_in=5), (*STUDENTS, "epoch"), labels=0.0, students=2),
    "kdcl": _row(plain(kdfast.KDCL, rule="minlogit"), STUDENTS, labels=0.0, students=3),
    "one": _row(
        lambda setting: connected.Gated(setting.channels("student.map")[0], 3, rampup_epochs=RAMP),
        ("students.logits", "student.map", "labels", "epoch"),
        labels=0.0,
        students=3,
        layout=Branches,
        stages=slice(None, -1),  # which the branches share
    ),
    "okddip": _row(
        lambda setting: connected.Leader(setting.channels("student.embedding")[0], rampup_epochs=RAMP),
        ("students.logits", "students.embedding", "labels", "epoch"),
        labels=0.0,
        students=4,
        layout=Branches,
    ),
    "collaborative": _row(
        plain(kdfast.CollaborativeLearning, rampup_epochs=RAMP),
        (*STUDENTS, "epoch"),
        labels=0.0,
        students=3,
        layout=partial(Branches, rescale=True),
    ),
    "ffl": _row(_fusion, ("students.logits", "students.map", "labels", "epoch"), labels=0.0, students=2),
    "divcoop": _row(plain(connected.Cooperation, relation="js", weight=10.0), STUDENTS, labels=0.0, students=3),
}


def needed(names: list[str]) -> dict[str, Experiment]:
    """The rows of these names, each after the rows whose students teach it."""
    rows = {}
    for name in names:
        row = ROWS[name]
        if row.teachers and row.teacher in ROWS:
            rows |= needed([row.teacher])
        rows[name] = row
    return rows
