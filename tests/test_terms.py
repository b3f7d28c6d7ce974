"""`kdfast.integrations.terms`: every loss of one student and one teacher as a term, and terms that are wrong."""

import importlib
import sys

import numpy as np
import pytest
import torch
from torch import nn

import kdfast
from kdfast._extras import MissingExtra
from kdfast.integrations.terms import LOGITS, Objective, Term, of_layers

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


def values():
    """What a student and a teacher say about a batch, its labels and its places in the data set."""
    found = {}
    for network in ("student", "teacher"):
        maps = {"stage1": (6, 8, 8), "stage2": (6, 4, 4), "stage3": (6, 4, 4)}
        shapes = {"logits": (CLASSES,), "embedding": (8,), **maps}
        for name, shape in shapes.items():
            found[f"{network}.{name}"] = torch.randn(BATCH, *shape).requires_grad_(network == "student")
    return found | {"labels": torch.randint(CLASSES, (BATCH,)), "index": torch.randperm(N_DATA)[:BATCH]}


@pytest.mark.parametrize("name", TERMS)
def test_every_loss_is_a_term(name):
    build, reads = TERMS[name]
    term = Term(build(), 0.5, reads, "loss")
    assert term.gather == (name in RELATIONAL)
    objective, batch = Objective([term]), values()
    loss = objective(batch)["loss"]
    assert loss.dim() == 0 and loss.isfinite()
    loss.backward()
    for read in term.names:
        if read.startswith("student."):
            assert batch[read].grad.isfinite().all() and batch[read].grad.any(), f"no gradient in {read}"
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)


def test_what_an_objective_reads():
    at, crd = Term(kdfast.AT(), 1000.0, MAPS), Term(kdfast.CRD(8, 8, N_DATA), 0.8, (*EMBEDDINGS, "index"))
    objective = Objective([Term(kdfast.KD()), at, crd])
    assert objective.layers("student") == ["stage1", "stage2", "embedding"] == objective.layers("teacher")
    assert objective.readers("index") == ["crd"] and objective.readers("labels") == []
    batch = values()
    batch["teacher.embedding"] *= 2
    want = kdfast.AT()(*([batch[name] for name in side] for side in MAPS))
    assert torch.equal(objective(batch)["at"], want)
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
        ({"reads": ("student.logits",)}, ValueError, r"reads must be the arguments of KD \(student, teacher, labels\)"),
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
        hint(values())


def test_a_missing_timm_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "timm" or name == "kdfast.integrations.timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"timm .*install it with: pip install .*timm"):
        importlib.import_module("kdfast.integrations.timm")
