"""The table of losses: one row per loss says how to build it and what it reads. A new loss is a new row.

A row's ``reads`` are the arguments of the loss in their order, as attributes of `train.Batch`:
``student.logits``, ``student.embedding``, ``student.maps`` (a list, one map per stage), the same of ``teacher``,
``teacher.probabilities``, ``labels``, ``images``, ``index`` (positions in the training set). A builder may also look at
``samples`` and ``train_labels``, the size and the labels of the training set.
"""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ALONE", "ROWS", "LossRow"]


@dataclass(frozen=True)
class LossRow:
    """One loss: what it is, what it reads, and what stands beside it in the objective.

    The objective of a training step is ``weight * loss + cross_entropy * CE(student.logits, labels)``.
    ``cross_entropy`` is 0 where the loss contains the labels' cross-entropy, or replaces it.

    Example::

        LossRow("fitnets", "hints from the last maps", build_fitnets, ("student.maps", "teacher.maps"))
    """

    name: str
    summary: str
    # Batch of example outputs -> nn.Module. The batch gives shapes to losses with layers of their own, whose parameters
    # are then trained along with the student's.
    build: Callable
    reads: tuple[str, ...]
    weight: float = 1.0
    cross_entropy: float = 1.0
    # Which trained network is the teacher: "teacher", or "student" for the student trained alone.
    teacher: str = "teacher"

    @property
    def reads_teacher(self):
        """Whether a teacher has to run in each step."""
        return any(name.startswith("teacher.") for name in self.reads)


def _kdfast(name, **arguments):
    """A builder for ``kdfast.<name>(**arguments)``; the import waits until a loss is built."""

    def build(example):
        import kdfast

        return getattr(kdfast, name)(**arguments)

    return build


def _cross_entropy(example):
    from torch import nn

    return nn.CrossEntropyLoss()


def _crd(example):
    """CRD with its official settings: negatives of other classes, as many as a third of the training set at most."""
    import kdfast

    dims = example.student.embedding.shape[1], example.teacher.embedding.shape[1]
    negatives = min(16384, max(1, example.samples // 3))
    return kdfast.CRD(*dims, example.samples, negatives=negatives, labels=example.train_labels)


_LOGITS = ("student.logits", "teacher.logits")
_LOGITS_LABELS = (*_LOGITS, "labels")

# The teacher itself and the student alone: the labels' cross-entropy is the whole objective.
ALONE = LossRow("alone", "the labels alone", _cross_entropy, ("student.logits", "labels"), cross_entropy=0.0)

# Settings are the papers' or their official code's, where these name them for image classification. ReverseKD and JSD,
# which come from other uses, take KD's temperature.
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
        ("student.maps", "teacher.maps"),
        weight=1000.0,
    ),
    LossRow(
        "sp",
        "similarities among a batch's samples",
        _kdfast("SP"),
        ("student.maps", "teacher.maps"),
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
        ("student.maps", "teacher.maps"),
        weight=50.0,
    ),
    LossRow(
        "fakd",
        "affinities among the positions of every stage",
        _kdfast("FAKD"),
        ("student.maps", "teacher.maps"),
        weight=1.0,
    ),
    LossRow(
        "lkd",
        "correlations among local patches",
        _kdfast("LKD", patches=2),
        ("student.maps", "teacher.maps"),
        weight=1.0,
    ),
    LossRow(
        "crd",
        "contrast with memory banks of embeddings",
        _crd,
        ("student.embedding", "teacher.embedding", "index"),
        weight=0.8,
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
