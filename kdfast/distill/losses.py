"""The table of losses: one row per loss says how to build it and what it reads. A new loss is a new row.

A row's ``reads`` are the arguments of the loss in their order, as attributes of `train.Batch`:
``student.logits``, ``student.embedding``, ``student.maps`` (a list, one map per stage), the same of ``teacher``,
``teacher.probabilities``, ``labels``, ``images``, ``index`` (positions in the training set), ``epoch``; of several
networks ``students.logits``, ``students.embedding``, ``students.maps`` and ``teachers.logits``, lists with one entry
per network. A builder may also look at ``samples`` and ``train_labels``, the size and the labels of the training set.
"""

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ALONE", "ROWS", "TEACHERS", "LossRow", "needed"]

TEACHERS = 3  # of an ensemble of teachers


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
    # Which trained network is the teacher: "teacher", "student" for the student trained alone, or a row's student.
    teacher: str = "teacher"
    # How many students learn together, and how they are laid out: a name in `ensembles.LAYOUTS`.
    students: int = 1
    layout: str = "apart"

    @property
    def reads_teacher(self):
        """Whether a teacher has to run in each step."""
        return any(name.startswith("teacher.") for name in self.reads)

    @property
    def teachers(self):
        """How many teachers have to run in each step beside that one: those of `teachers.logits`."""
        return TEACHERS if any(name.startswith("teachers.") for name in self.reads) else 0


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


def _together(name, **arguments):
    """A builder for the loss of students that learn together."""

    def build(example):
        from kdfast.distill import ensembles

        return ensembles.build(name, example, arguments)

    return build


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
        _together("dml"),
        (*_STUDENTS, "epoch"),
        cross_entropy=0.0,
        students=2,
    ),
    LossRow(
        "codistillation",
        "two students, each the other's soft labels after 5 epochs",
        _together("codistillation", burn_in=5),
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
        _together("one", rampup_epochs=_RAMP),
        ("students.logits", "student.maps", "labels", "epoch"),
        cross_entropy=0.0,
        students=3,
        layout="branches",
    ),
    LossRow(
        "okddip",
        "three branches that attend to each other, and a leader",
        _together("okddip", rampup_epochs=_RAMP),
        ("students.logits", "students.embedding", "labels", "epoch"),
        cross_entropy=0.0,
        students=4,
        layout="branches",
    ),
    LossRow(
        "collaborative",
        "three branches, each taught by the mean of the others",
        _kdfast("CollaborativeLearning", rampup_epochs=_RAMP),
        (*_STUDENTS, "epoch"),
        cross_entropy=0.0,
        students=3,
        layout="rescaled branches",
    ),
    LossRow(
        "ffl",
        "two students and the fusion of their maps",
        _together("ffl", rampup_epochs=_RAMP),
        ("students.logits", "students.maps", "labels", "epoch"),
        cross_entropy=0.0,
        students=2,
    ),
    LossRow(
        "divcoop",
        "three students that agree about the wrong classes",
        _together("divcoop", relation="js", weight=10.0),
        _STUDENTS,
        cross_entropy=0.0,
        students=3,
    ),
]

ROWS = {row.name: row for row in _TABLE}


def needed(names):
    """The rows of these names, each after the rows whose students teach it."""
    rows = {}
    for name in names:
        row = ROWS[name]
        if row.reads_teacher and row.teacher in ROWS:
            rows |= {earlier.name: earlier for earlier in needed([row.teacher])}
        rows[name] = row
    return list(rows.values())
