"""Every public loss: against its oracle, against the numbers of the official code, and on the README's list."""

import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch

import kdfast

GOLDEN = Path(__file__).parent / "golden"
README = Path(__file__).parents[1] / "README.md"
PUBLIC = [
    name
    for name in kdfast.__all__
    if inspect.isclass(getattr(kdfast, name)) and issubclass(getattr(kdfast, name), torch.nn.Module)
    if getattr(kdfast, name) not in kdfast.losses.LAYERS
]
# Losses with weights and state, and how they are made: tests/test_nce.py compares them.
WITH_STATE = {"CRD": lambda: kdfast.CRD(student_dim=11, teacher_dim=7, n_data=20)}

# Parameters other than the defaults, and the kinds of the inputs, see `inputs`.
CASES = [
    ("AEKD", {}, "sZ"),
    ("AEKD", {"temperature": 2.0, "slack": 1.0, "normalize": True}, "sZ"),
    ("AT", {}, "mn"),
    ("AT", {"p": 1}, "mn"),
    ("AT", {"p": 3}, "MN"),
    ("CCKD", {}, "ef"),
    ("CCKD", {"gamma": 1.0, "order": 3}, "ef"),
    ("CCKD", {"kernel": "bilinear"}, "ef"),
    ("Codistillation", {}, "sZ"),
    ("Codistillation", {"mode": "reverse_kl"}, "sZ"),
    ("CollaborativeLearning", {}, "Zy"),
    ("CollaborativeLearning", {"temperature": 2.0, "alpha": 0.5, "rampup_epochs": 40, "eps": 1e-4}, "Zy#"),
    ("DIST", {}, "st"),
    ("DIST", {"beta": 2.0, "gamma": 0.5, "temperature": 4.0}, "st"),
    ("DKD", {}, "sty"),
    ("DKD", {"temperature": 1.0, "alpha": 0.5, "beta": 2.0}, "sty"),
    ("DML", {}, "sZ"),
    ("DML", {"temperature": 3.0}, "sZy"),
    ("EnD", {}, "sZ"),
    ("EnD", {"temperature": 2.5}, "sZ"),
    ("FAKD", {}, "MO"),
    ("FAKD", {"affinity": "channel"}, "mm"),
    ("FAKD", {"affinity": "instance"}, "MN"),
    ("FFL", {}, "Zsy#"),
    ("FFL", {"temperature": 1.0, "rampup_epochs": 0, "eps": 0.0}, "Zsy#"),
    ("FSP", {}, "QQ"),
    ("HardDarkRank", {}, "ef"),
    ("HardDarkRank", {"alpha": 0.2, "beta": 1.5, "permute_len": 2}, "ef"),
    ("HardDarkRank", {"alpha": 0.2, "beta": 1.0, "permute_len": 9}, "ef"),  # more than there are
    ("IRG", {}, "EF"),
    ("IRG", {"vertex_weight": 2.0, "edge_weight": 0.5, "transformation_weight": 1.0}, "EF"),
    ("IRGEdge", {}, "ef"),
    ("IRGTransformation", {}, "eeff"),
    ("JSD", {}, "st"),
    ("JSD", {"beta": 0.1, "temperature": 2.0}, "st"),
    ("JSD", {"beta": 0, "temperature": 2.0}, "st"),
    ("JSD", {"beta": 1, "temperature": 2.0}, "st"),
    ("KD", {}, "st"),
    ("KD", {}, "sty"),  # without alpha labels are ignored
    ("KD", {"temperature": 1.0, "reduction": "none"}, "st"),
    ("KD", {"alpha": 0.9}, "sty"),
    ("KD", {"alpha": 0.9}, "stP"),
    ("KD", {"alpha": 0.0, "temperature": 2.0, "reduction": "sum"}, "sty"),
    ("KD", {"alpha": 0.3, "label_smoothing": 0.1, "ignore_index": 2, "reduction": "mean"}, "sty"),
    ("KD", {"alpha": 0.3, "ignore_index": 2, "reduction": "none"}, "sty"),
    ("KDCL", {}, "Zy"),
    ("KDCL", {"rule": "naive", "weight": 0.5}, "Zy"),
    ("KDCL", {"rule": "general", "temperature": 3.0}, "Zy"),
    ("KDCL", {"rule": "mean", "temperature": 1.0}, "Zy"),
    ("LKD", {"patches": 2}, "MN"),
    ("LKD", {"patches": 3, "intra_weight": 2.0, "inter_weight": 0.5, "cross_weight": 0.25}, "mn"),
    ("LKD", {}, "qq"),
    ("LabelRefinery", {}, "sP"),
    ("LabelRefinery", {"reduction": "sum"}, "sP"),
    ("LabelRefinery", {"reduction": "none"}, "sP"),
    ("NST", {}, "MN"),
    ("NST", {}, "mm"),
    ("NST", {}, "qq"),
    ("OKDDip", {}, "Zsay#"),
    ("OKDDip", {"temperature": 2.0, "alpha": 0.3, "rampup_epochs": 10, "eps": 1e-5}, "Zsay#"),
    ("ONE", {}, "Zgy#"),
    ("ONE", {"temperature": 1.0, "rampup_epochs": 0, "eps": 0.0}, "Zgy#"),
    ("PKT", {}, "ef"),
    ("PKT", {"eps": 1e-3}, "ef"),
    ("RKD", {}, "ef"),
    ("RKD", {"distance_weight": 1.0, "angle_weight": 2.0}, "ef"),
    ("RKD", {"distance_weight": 0.0, "angle_weight": -2.0}, "ef"),
    ("RKDAngle", {}, "ef"),
    ("RKDDistance", {}, "ef"),
    ("ReverseKD", {}, "st"),
    ("ReverseKD", {"temperature": 5.0}, "st"),
    ("SP", {}, "MN"),
    ("SP", {}, "ef"),
    ("TfKDReg", {}, "sy"),
    ("TfKDReg", {"temperature": 1.0, "alpha": 0.5, "multiplier": 10.0}, "sy"),
    ("TfKDSelf", {}, "sty"),
    ("TfKDSelf", {"temperature": 6.0, "alpha": 0.5, "multiplier": 50.0}, "sty"),
]


@dataclass(frozen=True)
class Official:
    """Official code as a golden file names it: our module from its parameters, and which arrays are the inputs."""

    build: callable
    inputs: tuple  # a tuple in it is a list of inputs
    grad_scale: float = 1.0  # our gradient in theirs, the loss alike but for a weight of theirs
    softmax: bool = True  # compares probabilities: in float32 with an absolute floor


def _relation(build, inputs=("student", "teacher"), grad_scale=1.0):
    return Official(build, inputs, grad_scale, softmax=False)


LAYERS = ("fm1", "fm2", "feat", "out")
OFFICIAL = {
    "kd_distillkl": Official(lambda p: kdfast.KD(p["T"]), "st"),
    "kd_at_distillation": Official(lambda p: kdfast.KD(p["T"], alpha=p["alpha"]), "sty"),
    "codistill_rkl": Official(lambda p: kdfast.ReverseKD(), ("output", "peer")),
    "dkd": Official(lambda p: kdfast.DKD(p["temperature"], p["alpha"], p["beta"]), "sty"),
    "dist": Official(lambda p: kdfast.DIST(p["beta"], p["gamma"], p["tau"]), "st"),
    "dist_seg": Official(lambda p: kdfast.DIST(p["beta"], p["gamma"]), "st"),
    "tf_loss_kd": Official(lambda p: kdfast.TfKDSelf(p["temperature"], p["alpha"]), "sty"),
    "tf_loss_kd_self": Official(lambda p: kdfast.TfKDSelf(p["temperature"], p["alpha"], p["multiplier"]), "sty"),
    "tf_loss_kd_regularization": Official(
        lambda p: kdfast.TfKDReg(p["reg_temperature"], p["reg_alpha"], p["multiplier"]), "sy"
    ),
    "label_refinery": Official(
        lambda p: kdfast.LabelRefinery("mean" if p["size_average"] else "sum"), ("model_output", "refined_labels")
    ),
    "rkd_distance": _relation(lambda p: kdfast.RKDDistance()),
    "rkd_angle": _relation(lambda p: kdfast.RKDAngle()),
    "rkd_repdistiller": _relation(lambda p: kdfast.RKD(p["w_d"], p["w_a"])),
    "rkd_hard_darkrank": _relation(lambda p: kdfast.HardDarkRank(p["alpha"], p["beta"], p["permute_len"])),
    "irg_edge_caffe": _relation(lambda p: kdfast.IRGEdge(), grad_scale=2.0),
    "irg_trans_caffe": _relation(
        lambda p: kdfast.IRGTransformation(), ("student_late", "student_early", "teacher_late", "teacher_early")
    ),
    "irg_aberhu": _relation(
        lambda p: kdfast.IRG(p["w_irg_vert"], p["w_irg_edge"], p["w_irg_tran"]),
        tuple(tuple(f"{layer}_{side}" for layer in LAYERS) for side in "st"),
    ),
}


def _maps(build):
    """Official code on one list of maps per network, s0, s1 ... and t0, t1 ...: all that the file has."""
    return Official(build, ("s*", "t*"), softmax=False)


OFFICIAL |= {
    "at_official": _maps(lambda p: kdfast.AT()),
    "sp_rep": _maps(lambda p: kdfast.SP()),
    "nst_rep": _maps(lambda p: kdfast.NST()),
    "fsp_rep": _maps(lambda p: kdfast.FSP()),
    "fakd_sa": _maps(lambda p: kdfast.FAKD()),
    "fakd_ca": _maps(lambda p: kdfast.FAKD("channel")),
    "fakd_ia": _maps(lambda p: kdfast.FAKD("instance")),
    "pkt": _relation(lambda p: kdfast.PKT(p["eps"]), "st"),
    "cc_zoo_gaussian": _relation(lambda p: kdfast.CCKD("gaussian", p["gamma"], p["P_order"]), "st"),
    "at_rep": _maps(lambda p: kdfast.AT(p["p"])),
}
FILES = sorted(path for path in GOLDEN.glob("*.npz") if not path.name.startswith("crd_"))


def inputs(kinds, device, rows=6, cols=11):
    """Logits s and t, labels y, probabilities P, an epoch #; Z logits of three networks, g and a weights of them;

    embeddings e and f of two networks, E and F what IRG reads of them;

    maps m and n of two networks, M and N lists of them, of unlike heights too, O of M's sizes;
    Q for FSP; q of many positions.
    """

    def normal(*shape):
        return torch.randn(rows, *shape, dtype=torch.float64)

    labels = torch.randint(cols, (rows,))
    labels[:2] = 2  # what some cases ignore
    make = {
        "s": lambda: normal(cols) * 3,
        "t": lambda: normal(cols) * 3,
        "y": lambda: labels,
        "P": lambda: torch.softmax(normal(cols), 1),
        "#": lambda: torch.tensor(7),
        "Z": lambda: [normal(cols) * 3 for _ in range(3)],
        "g": lambda: torch.softmax(normal(3), 1),
        "a": lambda: torch.softmax(normal(3, 3), 2),
        "e": lambda: normal(cols),
        "f": lambda: normal(7),
        "m": lambda: normal(4, 5, 3),
        "n": lambda: normal(7, 5, 3),
        "M": lambda: [normal(4, 7, 6), normal(3, 4, 3)],
        "O": lambda: [normal(5, 7, 6), normal(4, 4, 3)],
        "Q": lambda: [normal(4, 7, 6), normal(3, 4, 4), normal(5, 4, 4)],
        "q": lambda: normal(3, 4, 5),
        "N": lambda: [normal(5, 3, 3), normal(3, 4, 3)],
        "E": lambda: [normal(2, 7, 4), normal(4, 3, 4), normal(9), normal(cols)],  # pooled, in windows that overlap
        "F": lambda: [normal(3, 4, 4), normal(3, 4, 4), normal(5), normal(cols)],
    }
    return torch.utils._pytree.tree_map(lambda x: x.to(device), [make[kind]() for kind in kinds])


def with_leaves(kinds, arguments):
    """The same arguments, those that a loss may differentiate as leaves; -> arguments, leaves."""
    leaves = []

    def leaf(x):
        leaves.append(x.detach().clone().requires_grad_())
        return leaves[-1]

    tree_map = torch.utils._pytree.tree_map
    return [x if kind in "yP#" else tree_map(leaf, x) for kind, x in zip(kinds, arguments, strict=True)], leaves


@pytest.mark.parametrize(("name", "parameters", "kinds"), CASES, ids=[f"{n}{i}" for i, (n, *_) in enumerate(CASES)])
def test_matches_oracle(implementation, name, parameters, kinds):
    """float64, also with the oracle's defaults, which are the paper's."""
    arguments = inputs(kinds, implementation.device)
    (ours, leaves), (theirs, exact) = (with_leaves(kinds, arguments) for _ in range(2))
    loss = getattr(kdfast, name)(**parameters)(*ours)
    want = oracles.LOSSES[name](*theirs, **parameters)
    assert loss.shape == ((6,) if parameters.get("reduction") == "none" else ())
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-14)
    factors = torch.linspace(-1, 2, loss.numel(), dtype=torch.float64, device=loss.device).view(loss.shape)
    got, expected = (torch.autograd.grad(x, y, factors, allow_unused=True) for x, y in ((loss, leaves), (want, exact)))
    for a, b in zip(got, expected, strict=True):
        assert a is not None or b is None
        if b is None:  # a gradient that stops
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-8 * b.abs().max().item())


def test_every_public_loss_is_covered():
    assert PUBLIC and set(PUBLIC) - set(WITH_STATE) == set(oracles.LOSSES) == {name for name, *_ in CASES}
    assert {path.name.split("__")[0] for path in FILES} == set(OFFICIAL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matches_official_code(implementation, path, dtype):
    """float64: 1e-9 of the loss, 1e-8 of the largest gradient. float32: 2e-5, and for softmax-KL an absolute floor.

    A log-probability in float32 is off by 1e-7, so a KL of 1e-8 between nearly equal networks has no digits to compare.
    """
    official = OFFICIAL[path.name.split("__")[0]]
    with np.load(path) as stored:
        arrays = dict(stored)
    parameters = json.loads(str(arrays["about"]))["params"]
    leaves = {}

    def tensor(name):
        x = torch.from_numpy(arrays[f"in_{name}"]).to(implementation.device)
        if x.is_floating_point():
            x = x.to(dtype)
        if f"grad_{name}" in arrays:
            leaves[name] = x.requires_grad_()
        return x

    def argument(name):
        if name.endswith("*"):
            return [tensor(key[3:]) for key in sorted(arrays) if re.fullmatch(f"in_{name[0]}[0-9]", key)]
        return tensor(name)

    arguments = [[tensor(n) for n in name] if isinstance(name, tuple) else argument(name) for name in official.inputs]
    loss = official.build(parameters)(*arguments)
    assert loss.shape == () and loss.dtype == dtype
    wide = dtype == torch.float64
    temperature = max([1.0, *(v for k, v in parameters.items() if k in ("T", "temperature", "tau", "reg_temperature"))])
    rows = len(arguments[0]) if parameters.get("size_average") is False else 1
    weight = parameters.get("loss_weight", 1.0)
    want = arrays["loss"].sum() / weight  # its parts are the layers
    floor = 1e-14 if wide else 2e-7 * temperature**2 * rows * official.softmax
    assert abs(loss.item() - want) <= (1e-9 if wide else 2e-5) * abs(want) + floor
    grads = torch.autograd.grad(loss, list(leaves.values()))
    for name, grad in zip(leaves, grads, strict=True):
        expected = official.grad_scale / weight * torch.from_numpy(arrays[f"grad_{name}"])
        floor = 1e-13 if wide else 2e-8 * temperature * rows * official.softmax
        assert (grad.cpu().double() - expected).abs().max() <= (1e-8 if wide else 2e-5) * expected.abs().max() + floor


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring(name):
    """The first line names the method, and its paper with authors, venue and year: help() and grep find either."""
    first = inspect.getdoc(getattr(kdfast, name)).splitlines()[0]
    assert re.match(r"[A-Z][\w -]* - \S.*\([A-Z][^()]+, ([A-Z][^()]+ )?(19|20)\d\d\).*\.$", first), first
    assert "Shapes:" in inspect.getdoc(getattr(kdfast, name))


@pytest.mark.parametrize("name", PUBLIC)
def test_repr_and_state(name):
    """A loss without weights has no state, and its repr says what it was made with."""
    module = WITH_STATE.get(name, getattr(kdfast, name))()
    assert bool(module.state_dict()) == (name in WITH_STATE)
    parameters = inspect.signature(type(module)).parameters.values()
    for name in [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD][:1]:
        assert f"{name}={getattr(module, name)!r}" in repr(module)


def test_readme_lists_the_public_losses():
    if not README.exists():
        pytest.skip("no README.md")
    section = re.split(r"^#+ .*Find your paper.*$", README.read_text(), flags=re.MULTILINE | re.IGNORECASE)
    assert len(section) == 2, "README.md needs one heading 'Find your paper'"
    table = re.split(r"^#+ ", section[1], flags=re.MULTILINE)[0]
    listed = re.findall(r"^\| *`([^`(]+)[^`]*`", table, flags=re.MULTILINE)
    assert sorted(listed) == sorted(PUBLIC)
