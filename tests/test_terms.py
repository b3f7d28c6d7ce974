"""`kdfast.objectives`: every loss of one student and one teacher as a term, and terms that are wrong."""

import importlib
import sys

import numpy as np
import pytest
import torch
from torch import nn

import kdfast
from kdfast._extras import MissingExtra
from kdfast.objectives import LOGITS, Objective, Term, of_layers

BATCH, CLASSES, N_DATA = 6, 5, 20
MAPS, EMBEDDINGS = of_layers(["stage1", "stage2"]), ("student.embedding", "teacher.embedding")
ONE_MAP = ("student.stage2", "teacher.stage2")


class Hint(nn.Module):
    """FitNets with its regressor."""

    def __init__(self):
        super().__init__()
        self.regressor, self.loss = kdfast.HintRegressor((1, 6, 4, 4), (1, 6, 4, 4)), kdfast.FitNets()

    def forward(self, student, teacher):
        return self.loss(self.regressor(student), teacher)


class Factors(nn.Module):
    """FT with its translator, and a paraphraser that stays as it is."""

    def __init__(self):
        super().__init__()
        self.translator, self.paraphraser = kdfast.Translator(6, 3), kdfast.Paraphraser(6, 3).requires_grad_(False)

    def forward(self, student, teacher):
        return kdfast.FT()(self.translator(student), self.paraphraser(teacher))


class Overhaul(nn.Module):
    """OFD with its connector and the teacher's margin."""

    def __init__(self):
        super().__init__()
        self.connector = kdfast.OFDConnector(6, 6)
        self.register_buffer("margin", kdfast.ofd_margin(torch.ones(6), torch.zeros(6)))

    def forward(self, student, teacher):
        return kdfast.OFD()(self.connector(student), teacher, self.margin)


# Every loss that trains with one student and one teacher: how it is built, and what it reads.
TERMS = {
    "kd": (kdfast.KD, LOGITS),
    "kd of labels": (lambda: kdfast.KD(alpha=0.9), (*LOGITS, "labels")),
    "reverse kd": (kdfast.ReverseKD, LOGITS),
    "jsd": (kdfast.JSD, LOGITS),
    "dkd": (kdfast.DKD, (*LOGITS, "labels")),
    "dist": (kdfast.DIST, LOGITS),
    "tfkd": (kdfast.TfKDSelf, (*LOGITS, "labels")),
    "cwtm": (kdfast.CWTM, (*LOGITS, "labels")),
    "dkpp": (kdfast.DKPP, (*LOGITS, "labels")),
    "fitnets": (Hint, ONE_MAP),
    "at": (kdfast.AT, MAPS),
    "ft": (Factors, ONE_MAP),
    "ab": (kdfast.AB, MAPS),
    "ofd": (Overhaul, ONE_MAP),
    "vid": (lambda: kdfast.VID(6, 6, 6), ONE_MAP),
    "hcl": (kdfast.HCL, MAPS),
    "nst": (kdfast.NST, MAPS),
    "fsp": (kdfast.FSP, MAPS),
    "sp": (kdfast.SP, MAPS),
    "fakd": (kdfast.FAKD, MAPS),
    "fakd of samples": (lambda: kdfast.FAKD("instance"), MAPS),
    "lkd": (lambda: kdfast.LKD(patches=2), ONE_MAP),
    "rkd": (kdfast.RKD, EMBEDDINGS),
    "rkd distance": (kdfast.RKDDistance, EMBEDDINGS),
    "rkd angle": (kdfast.RKDAngle, EMBEDDINGS),
    "hard dark rank": (kdfast.HardDarkRank, EMBEDDINGS),
    "pkt": (kdfast.PKT, EMBEDDINGS),
    "cckd": (kdfast.CCKD, EMBEDDINGS),
    "irg edge": (kdfast.IRGEdge, EMBEDDINGS),
    "irg": (kdfast.IRG, of_layers(["stage1", "stage2", "embedding", "logits"])),
    "irg transformation": (
        kdfast.IRGTransformation,
        ("student.stage3", "student.stage2", "teacher.stage3", "teacher.stage2"),
    ),
    "crd": (lambda: kdfast.CRD(8, 8, N_DATA, feature_dim=4, negatives=6), (*EMBEDDINGS, "index")),
}
RELATIONAL = {
    "cwtm", "dist", "sp", "fakd of samples", "lkd", "rkd", "rkd distance", "rkd angle", "hard dark rank", "pkt",
    "cckd", "irg edge", "irg", "irg transformation",
}  # fmt: skip


def batch():
    """What a student and a teacher say about a batch, its labels and its places in the data set."""
    maps = {"stage1": (6, 8, 8), "stage2": (6, 4, 4), "stage3": (6, 4, 4)}
    shapes = {"logits": (CLASSES,), "embedding": (8,), **maps}
    student, teacher = ({name: torch.randn(BATCH, *shape) for name, shape in shapes.items()} for _ in range(2))
    for x in student.values():
        x.requires_grad_()
    labels, index = torch.randint(CLASSES, (BATCH,)), torch.randperm(N_DATA)[:BATCH]
    return {"student": student, "teacher": teacher, "labels": labels, "index": index}


@pytest.mark.parametrize("name", TERMS)
def test_every_loss_is_a_term(name):
    build, reads = TERMS[name]
    term = Term(build(), 0.5, reads, "loss")
    assert term.gather == (name in RELATIONAL)
    objective, said = Objective([term]), batch()
    loss = objective(**said)
    assert loss.dim() == 0 and loss.isfinite()
    loss.backward()
    for read in term.names:
        if read.startswith("student."):
            grad = said["student"][read.removeprefix("student.")].grad
            assert grad.isfinite().all() and grad.any(), f"no gradient in {read}"
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


def test_a_sum_of_terms():
    """In a plain loop: logits alone, labels by position, weights that change, one of 0 that adds nothing."""
    student, teacher, labels = (batch()[name] for name in ("student", "teacher", "labels"))
    terms = [Term(nn.CrossEntropyLoss(), 0.3, ("student.logits", "labels"), "labels_loss"), Term(kdfast.KD(), 0.7)]
    objective = Objective(terms)
    ce, kd = nn.CrossEntropyLoss()(student["logits"], labels), kdfast.KD()(student["logits"], teacher["logits"])
    torch.testing.assert_close(objective(student, teacher, labels), 0.3 * ce + 0.7 * kd)
    assert torch.equal(objective(student["logits"], teacher["logits"], labels), objective(student, teacher, labels))
    top = kdfast.TopK.of(teacher["logits"], 2, 4.0)
    assert torch.equal(objective.losses(student, top, labels)["kd"], kdfast.KD()(student["logits"], top))
    objective.weights["kd"] = 0
    assert torch.equal(objective(student, {"logits": teacher["logits"] * float("nan")}, labels), 0.3 * ce)
    objective.weights["labels_loss"] = 0
    objective(student, teacher, labels).backward()
    assert objective(student, teacher, labels) == 0 and not student["logits"].grad.any()


def test_several_networks():
    """The first of a list is the student, or the teacher; probabilities are the softmax of the logits."""
    students, teachers = [batch()["student"] for _ in range(3)], [batch()["teacher"] for _ in range(2)]
    labels = batch()["labels"]
    terms = [
        Term(kdfast.KDCL(), 1.0, ("students.logits", "labels")),
        Term(kdfast.EnD(), 1.0, ("student.logits", "teachers.logits")),
        Term(kdfast.LabelRefinery(), 1.0, ("student.logits", "teacher.probabilities")),
    ]
    objective = Objective(terms)
    assert objective.reads("student") == objective.reads("teacher") == ["logits"] and not objective.layers("teacher")
    losses = objective.losses(students, teachers, labels)
    ours, theirs = ([x["logits"] for x in networks] for networks in (students, teachers))
    assert torch.equal(losses["kdcl"], kdfast.KDCL()(ours, labels))
    assert torch.equal(losses["end"], kdfast.EnD()(ours[0], theirs))
    assert torch.equal(losses["labelrefinery"], kdfast.LabelRefinery()(ours[0], theirs[0].softmax(1)))


def test_what_is_missing_is_named():
    objective = Objective([Term(kdfast.AT(), 1.0, MAPS), Term(kdfast.KD(alpha=0.9), 1.0, (*LOGITS, "labels"))])
    said = batch()
    with pytest.raises(ValueError, match="labels must be given, for kd reads it"):
        objective(said["student"], said["teacher"])
    with pytest.raises(ValueError, match="teacher must be given, for at reads it"):
        objective(said["student"], None, said["labels"])
    with pytest.raises(ValueError, match="student.stage1 is read, and the outputs have logits"):
        objective(said["student"]["logits"], said["teacher"], said["labels"])


def test_observed_networks():
    network, images = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, CLASSES)), torch.randn(BATCH, 4)
    objective = Objective([Term(kdfast.RKD(), 1.0, ("student.2:input", "teacher.0")), Term(kdfast.KD())])
    with objective.observed("student", network) as ours, objective.observed("teacher", network) as theirs:
        said, taught = ours(images), theirs(images)
    assert list(said) == ["logits", "2:input"] and list(taught) == ["logits", "0"]
    assert torch.equal(said["2:input"], taught["0"].relu()) and torch.equal(said["logits"], network(images))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in network.modules())


def test_what_an_objective_reads():
    at, crd = Term(kdfast.AT(), 1000.0, MAPS), Term(kdfast.CRD(8, 8, N_DATA), 0.8, (*EMBEDDINGS, "index"))
    objective = Objective([Term(kdfast.KD()), at, crd])
    assert objective.layers("student") == ["stage1", "stage2", "embedding"] == objective.layers("teacher")
    assert objective.readers("index") == ["crd"] and objective.readers("labels") == []
    said = batch()
    want = kdfast.AT()(*([said[side][name] for name in ("stage1", "stage2")] for side in ("student", "teacher")))
    assert torch.equal(objective.losses(**said)["at"], want)
    assert of_layers(["a"], ["b"]) == (["student.a"], ["teacher.b"])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"loss": len}, TypeError, "loss must be an nn.Module, got builtin_function"),
        ({"weight": "1"}, TypeError, "weight must be a number, got str"),
        ({"weight": True}, TypeError, "weight must be a number, got bool"),
        ({"weight": float("nan")}, ValueError, "weight must be finite, got nan"),
        ({"weight": torch.ones(())}, TypeError, "weight must be a number, got Tensor"),
        ({"reads": "student.logits"}, TypeError, "reads must be a tuple of the loss's arguments, got 'student.logits'"),
        ({"reads": ("student.logits", "fc")}, ValueError, "reads must be student.LAYER.*got 'fc'"),
        ({"reads": ("student.", "teacher.fc")}, ValueError, "reads must be student.LAYER.*got 'student.'"),
        ({"reads": (["student.fc", 3], "teacher.fc")}, ValueError, "reads must be student.LAYER.*got 3"),
        (
            {"reads": ("student.logits",)},
            ValueError,
            r"reads must be the arguments of KD \(student, teacher, labels, mask, weight, divisor\)",
        ),
        ({"name": "kd.1"}, ValueError, "name must be an identifier, got 'kd.1'"),
        ({"name": 1}, TypeError, "name must be a string, got int"),
    ],
)
def test_wrong_terms(arguments, error, message):
    with pytest.raises(error, match=message):
        Term(**{"loss": kdfast.KD(), **arguments})


@pytest.mark.parametrize("weight", [2, 2.0, np.float32(2), np.float64(2), np.int64(2)], ids=lambda x: type(x).__name__)
def test_weights_of_python_and_numpy(weight):
    got = Term(kdfast.KD(), weight).weight
    assert got == 2 and type(got) is float


@pytest.mark.parametrize("name", ["forward", "terms", "layers", "training", "half", "_modules", "__class__"])
def test_names_that_a_module_has(name):
    message = f"terms must not be named '{name}', as an attribute of nn.Module is; set Term.name"
    with pytest.raises(ValueError, match=message):
        Objective([Term(kdfast.KD(), name=name)])
    with pytest.raises(ValueError, match=message):  # without a name of its own
        Objective([Term(type(name.capitalize(), (kdfast.KD,), {})(), name=name)])


def test_wrong_objectives():
    with pytest.raises(TypeError, match="terms must be Terms, got KD"):
        Objective([kdfast.KD()])
    with pytest.raises(TypeError, match="terms must be Terms, got KD; a recipe has them in .terms"):
        Objective(kdfast.KD())
    with pytest.raises(ValueError, match="terms must have at least one Term, got none"):
        Objective([])
    with pytest.raises(ValueError, match="terms must have different names, got 'kd' twice"):
        Objective([Term(kdfast.KD()), Term(kdfast.KD(2.0))])
    hint = Objective([Term(kdfast.FitNets(), 1.0, ("student.stage1", "teacher.stage2"))])
    with pytest.raises(ValueError, match=r"term fitnets of \(6, 6, 8, 8\), \(6, 6, 4, 4\): teacher"):
        hint(**batch())


def test_a_missing_timm_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "timm" or name == "kdfast.integrations.timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"timm .*install it with: pip install .*timm"):
        importlib.import_module("kdfast.integrations.timm")
