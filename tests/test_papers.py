"""Every public loss: against its oracle, against the numbers of the official code, and on the README's list."""

import inspect
import json
import re
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
]

# Parameters other than the defaults, and the inputs after (or, for TfKDReg, instead of) the teacher's logits.
CASES = [
    ("DIST", {}, "st"),
    ("DIST", {"beta": 2.0, "gamma": 0.5, "temperature": 4.0}, "st"),
    ("DKD", {}, "sty"),
    ("DKD", {"temperature": 1.0, "alpha": 0.5, "beta": 2.0}, "sty"),
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
    ("LabelRefinery", {}, "sP"),
    ("LabelRefinery", {"reduction": "sum"}, "sP"),
    ("LabelRefinery", {"reduction": "none"}, "sP"),
    ("ReverseKD", {}, "st"),
    ("ReverseKD", {"temperature": 5.0}, "st"),
    ("TfKDReg", {}, "sy"),
    ("TfKDReg", {"temperature": 1.0, "alpha": 0.5, "multiplier": 10.0}, "sy"),
    ("TfKDSelf", {}, "sty"),
    ("TfKDSelf", {"temperature": 6.0, "alpha": 0.5, "multiplier": 50.0}, "sty"),
]

# Golden method -> our module from its parameters, and which arrays are the inputs.
OFFICIAL = {
    "kd_distillkl": (lambda p: kdfast.KD(p["T"]), "st"),
    "kd_at_distillation": (lambda p: kdfast.KD(p["T"], alpha=p["alpha"]), "sty"),
    "codistill_rkl": (lambda p: kdfast.ReverseKD(), ("output", "peer")),
    "dkd": (lambda p: kdfast.DKD(p["temperature"], p["alpha"], p["beta"]), "sty"),
    "dist": (lambda p: kdfast.DIST(p["beta"], p["gamma"], p["tau"]), "st"),
    "dist_seg": (lambda p: kdfast.DIST(p["beta"], p["gamma"]), "st"),
    "tf_loss_kd": (lambda p: kdfast.TfKDSelf(p["temperature"], p["alpha"]), "sty"),
    "tf_loss_kd_self": (lambda p: kdfast.TfKDSelf(p["temperature"], p["alpha"], p["multiplier"]), "sty"),
    "tf_loss_kd_regularization": (
        lambda p: kdfast.TfKDReg(p["reg_temperature"], p["reg_alpha"], p["multiplier"]),
        "sy",
    ),
    "label_refinery": (
        lambda p: kdfast.LabelRefinery("mean" if p["size_average"] else "sum"),
        ("model_output", "refined_labels"),
    ),
}
FILES = sorted(GOLDEN.glob("*.npz"))


def inputs(kinds, device, rows=6, cols=11):
    x = {"s": torch.randn(rows, cols, dtype=torch.float64) * 3, "t": torch.randn(rows, cols, dtype=torch.float64) * 3}
    x["y"] = torch.randint(cols, (rows,))
    x["y"][:2] = 2  # what some cases ignore
    x["P"] = torch.softmax(torch.randn(rows, cols, dtype=torch.float64), 1)
    return [x[kind].to(device) for kind in kinds]


def with_leaves(kinds, tensors):
    return [x.detach().clone().requires_grad_(kind in "st") for kind, x in zip(kinds, tensors, strict=True)]


@pytest.mark.parametrize(("name", "parameters", "kinds"), CASES, ids=[f"{n}{i}" for i, (n, *_) in enumerate(CASES)])
def test_matches_oracle(implementation, name, parameters, kinds):
    """float64, also with the oracle's defaults, which are the paper's."""
    ours, theirs = (with_leaves(kinds, x) for x in [inputs(kinds, implementation.device)] * 2)
    loss = getattr(kdfast, name)(**parameters)(*ours)
    want = oracles.LOSSES[name](*theirs, **parameters)
    assert loss.shape == ((6,) if parameters.get("reduction") == "none" else ())
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-14)
    factors = torch.linspace(-1, 2, loss.numel(), dtype=torch.float64, device=loss.device).view(loss.shape)
    leaves = [[x for x in side if x.requires_grad] for side in (ours, theirs)]
    got, expected = (torch.autograd.grad(x, y, factors) for x, y in zip((loss, want), leaves, strict=True))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8 * b.abs().max().item())


def test_every_public_loss_is_covered():
    assert PUBLIC and set(PUBLIC) == set(oracles.LOSSES) == {name for name, *_ in CASES}
    assert {path.name.split("__")[0] for path in FILES} == set(OFFICIAL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matches_official_code(implementation, path, dtype):
    """float64: 1e-9 of the loss, 1e-8 of the largest gradient. float32: 2e-5, and for softmax-KL an absolute floor.

    A log-probability in float32 is off by 1e-7, so a KL of 1e-8 between nearly equal networks has no digits to compare.
    """
    build, names = OFFICIAL[path.name.split("__")[0]]
    with np.load(path) as stored:
        arrays = dict(stored)
    parameters = json.loads(str(arrays["about"]))["params"]
    tensors = {name: torch.from_numpy(arrays[f"in_{name}"]).to(implementation.device) for name in names}
    graded = [name for name in names if f"grad_{name}" in arrays]
    for name in names:
        if tensors[name].is_floating_point():
            tensors[name] = tensors[name].to(dtype).requires_grad_(name in graded)
    loss = build(parameters)(*tensors.values())
    assert loss.shape == () and loss.dtype == dtype
    wide = dtype == torch.float64
    temperature = max([1.0, *(v for k, v in parameters.items() if k in ("T", "temperature", "tau", "reg_temperature"))])
    rows = len(tensors[names[0]]) if parameters.get("size_average") is False else 1
    want = float(arrays["loss"])
    floor = 1e-14 if wide else 2e-7 * temperature**2 * rows
    assert abs(loss.item() - want) <= (1e-9 if wide else 2e-5) * abs(want) + floor
    grads = torch.autograd.grad(loss, [tensors[name] for name in graded])
    for name, grad in zip(graded, grads, strict=True):
        expected = torch.from_numpy(arrays[f"grad_{name}"])
        allowed = (1e-8 if wide else 2e-5) * expected.abs().max() + (1e-13 if wide else 2e-8 * temperature * rows)
        assert (grad.cpu().double() - expected).abs().max() <= allowed


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring(name):
    """The first line names the method, and its paper with authors, venue and year: help() and grep find either."""
    first = inspect.getdoc(getattr(kdfast, name)).splitlines()[0]
    assert re.match(r"[A-Z][\w -]* - \S.*\([A-Z][^()]+, ([A-Z][^()]+ )?(19|20)\d\d\).*\.$", first), first
    assert "Shapes:" in inspect.getdoc(getattr(kdfast, name))


@pytest.mark.parametrize("name", PUBLIC)
def test_repr_and_state(name):
    """A loss without weights has no state, and its repr says what it was made with."""
    module = getattr(kdfast, name)()
    assert not module.state_dict()
    for parameter in list(inspect.signature(module.__init__).parameters)[:1]:
        assert f"{parameter}={getattr(module, parameter)!r}" in repr(module)


def test_readme_lists_the_public_losses():
    if not README.exists():
        pytest.skip("no README.md")
    section = re.split(r"^#+ .*Find your paper.*$", README.read_text(), flags=re.MULTILINE | re.IGNORECASE)
    assert len(section) == 2, "README.md needs one heading 'Find your paper'"
    table = re.split(r"^#+ ", section[1], flags=re.MULTILINE)[0]
    listed = re.findall(r"^\| *`([^`(]+)[^`]*`", table, flags=re.MULTILINE)
    assert sorted(listed) == sorted(PUBLIC)
