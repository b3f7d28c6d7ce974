"""Losses under other libraries' names: the originals' numbers, what they return, and the loops they are used in."""

import contextlib
import functools
import importlib
import inspect
import json
import math
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kdfast
from kdfast.compat import _original, mdistiller, repdistiller
from kdfast.compat._kdsvd import _RightSingularVectors
from kdfast.ops.pool import max_pool

GOLDEN = Path(__file__).parent / "golden"
# The kernels have tests of their own: here they are only called.
everywhere = pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)


def stub_of_torchdistill():
    """torchdistill.losses.registry as far as it registers mid-level losses, called as the real one is."""
    registry = types.ModuleType("torchdistill.losses.registry")
    registry.MIDDLE_LEVEL_LOSS_DICT = {}

    def register_mid_level_loss(arg=None, **kwargs):
        def register(cls):
            registry.MIDDLE_LEVEL_LOSS_DICT[kwargs.get("key") or cls.__name__] = cls
            return cls

        return register(arg) if callable(arg) else register

    registry.register_mid_level_loss = register_mid_level_loss
    names = "torchdistill", "torchdistill.losses"
    return {**{name: types.ModuleType(name) for name in names}, registry.__name__: registry}


@contextlib.contextmanager
def torchdistill_losses():
    """kdfast.compat.torchdistill, and the registry that it is in: the real one where torchdistill can be imported."""
    stub = {}
    try:
        registry = importlib.import_module("torchdistill.losses.registry")
    except ImportError:
        stub = stub_of_torchdistill()
        registry = stub["torchdistill.losses.registry"]
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stub.items():
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module("kdfast.compat.torchdistill"), registry
    if stub:
        del sys.modules["kdfast.compat.torchdistill"], kdfast.compat.torchdistill


@pytest.fixture(scope="module")
def torchdistill():
    with torchdistill_losses() as (losses, _):
        yield losses


# ---- the numbers of the originals ------------------------------------------------------------------------------------
def of_modules(loss, student, teacher, targets=None):
    """A torchdistill loss of what the modules "s" and "t" put out."""
    return loss({"s": {"output": student}}, {"t": {"output": teacher}}, targets)


def of_pairs(loss, students, teachers, weights, **roles):
    """A torchdistill loss of pairs: `roles` are the keys of a pair and, of consecutive maps, which they are."""
    roles = roles or {"student": ("s", 0), "teacher": ("t", 0)}
    step = len(roles) // 2
    pairs = {
        f"pair{i}": {
            **{role: {"io": "output", "path": f"{side}{step * i + j}"} for role, (side, j) in roles.items()},
            "weight": weight,
        }
        for i, weight in enumerate(weights)
    }
    sides = [{f"{side}{i}": {"output": x} for i, x in enumerate(xs)} for side, xs in (("s", students), ("t", teachers))]
    return loss(pairs)(*sides)


PATHS = ("s", "output", "t", "output")
FSP_ROLES = {
    f"{who}_{which}": (who[0], i) for who in ("student", "teacher") for i, which in enumerate(("first", "second"))
}


def vid_loss(parameters, x):
    vid = repdistiller.VIDLoss(x("s").shape[1], x("w1").shape[0], x("t").shape[1], eps=parameters["eps"])
    names = {
        "regressor.0.weight": "w1",
        "regressor.2.weight": "w2",
        "regressor.4.weight": "w3",
        "log_scale": "log_scale",
    }
    weights = {key: x(name) for key, name in names.items()}
    return torch.func.functional_call(vid, weights, (x("s"), x("t")))


def vid_function(parameters, x):
    def regressor(maps):
        return F.conv2d(F.conv2d(F.conv2d(maps, x("w1")).relu(), x("w2")).relu(), x("w3"))

    return mdistiller.vid_loss(regressor, x("log_scale"), x("s"), x("t"), parameters["eps"])


def vid_of_modules(parameters, x, torchdistill):
    s, t = (y.to(x.dtype) for y in oracles._to_smaller_square(x("s"), x("t")))
    mean = F.conv2d(F.conv2d(F.conv2d(s, x("w1")).relu(), x("w2")).relu(), x("w3"))
    variance = x("log_scale").exp().log1p().view(1, -1, 1, 1) + parameters["eps"]
    return of_pairs(torchdistill.VIDLoss, [(mean, variance)], [t], [1])


# Each of our names, the golden files, and the call: of the file's parameters p, its inputs x (x("s*"): all of s0, s1,
# ...) and, of torchdistill's, the module.
CASES = [
    ("repdistiller.DistillKL", "kd_distillkl", lambda p, x: repdistiller.DistillKL(p["T"])(x("s"), x("t"))),
    ("repdistiller.HintLoss", "hint", lambda p, x: repdistiller.HintLoss()(x("s"), x("t"))),
    ("repdistiller.Attention", "at_rep", lambda p, x: repdistiller.Attention(p["p"])(x("s*"), x("t*"))),
    ("repdistiller.Similarity", "sp_rep", lambda p, x: repdistiller.Similarity()(x("s*"), x("t*"))),
    ("repdistiller.Correlation", "cc_rep", lambda p, x: repdistiller.Correlation()(x("s"), x("t"))),
    ("repdistiller.VIDLoss", "vid_rep", vid_loss),
    (
        "repdistiller.RKDLoss",
        "rkd_repdistiller",
        lambda p, x: repdistiller.RKDLoss(p["w_d"], p["w_a"])(x("student"), x("teacher")),
    ),
    ("repdistiller.PKT", "pkt", lambda p, x: repdistiller.PKT.cosine_similarity_loss(x("s"), x("t"), p["eps"])),
    (
        "repdistiller.ABLoss",
        "ab_rep",
        lambda p, x: repdistiller.ABLoss(p["feat_num"], p["margin"])(x("s*"), x("t*")),
    ),
    (
        "repdistiller.FactorTransfer",
        "ft_rep",
        lambda p, x: repdistiller.FactorTransfer(p["p1"], p["p2"])(x("s"), x("t")),
    ),
    (
        "repdistiller.FSP",
        "fsp_rep",
        lambda p, x: repdistiller.FSP(*([y.shape for y in x(n)] for n in ("s*", "t*")))(x("s*"), x("t*")),
    ),
    ("repdistiller.NSTLoss", "nst_rep", lambda p, x: repdistiller.NSTLoss()(x("s*"), x("t*"))),
    ("mdistiller.kd_loss", "kd_distillkl", lambda p, x: mdistiller.kd_loss(x("s"), x("t"), p["T"])),
    (
        "mdistiller.dkd_loss",
        "dkd",
        lambda p, x: mdistiller.dkd_loss(x("s"), x("t"), x("y"), p["alpha"], p["beta"], p["temperature"]),
    ),
    ("mdistiller.at_loss", "at_rep", lambda p, x: mdistiller.at_loss(x("s*"), x("t*"), p["p"])),
    ("mdistiller.nst_loss", "nst_rep", lambda p, x: mdistiller.nst_loss(x("s*"), x("t*"))),
    ("mdistiller.pkt_loss", "pkt", lambda p, x: mdistiller.pkt_loss(x("s"), x("t"), p["eps"])),
    ("mdistiller.sp_loss", "sp_rep", lambda p, x: mdistiller.sp_loss(x("s*"), x("t*"))),
    ("mdistiller.rkd_loss", "rkd_mdistiller", lambda p, x: mdistiller.rkd_loss(x("student"), x("teacher"), **p)),
    ("mdistiller.vid_loss", "vid_rep", vid_function),
    ("mdistiller.hcl_loss", "hcl", lambda p, x: mdistiller.hcl_loss(x("s*"), x("t*"))),
    ("mdistiller.feat_loss", "ofd_mdistiller", lambda p, x: mdistiller.feat_loss(x("s"), x("t"), x("margin"))),
    (
        "torchdistill.KDLoss",
        "kd_torchdistill",
        lambda p, x, td: of_modules(
            td.KDLoss(*PATHS, p["temperature"], p["alpha"], p["beta"], p["reduction"]),
            *(x("s"), x("t"), x("y") if p["use_targets"] else None),
        ),
    ),
    (
        "torchdistill.FSPLoss",
        "fsp_torchdistill",
        lambda p, x, td: of_pairs(td.FSPLoss, x("s*"), x("t*"), p["weights"], **FSP_ROLES),
    ),
    (
        "torchdistill.ATLoss",
        "at_official",
        lambda p, x, td: of_pairs(td.ATLoss, x("s*"), x("t*"), [1] * len(x("s*"))),
    ),
    (
        "torchdistill.ATLoss",
        "at_torchdistill_paper",
        lambda p, x, td: of_pairs(lambda pairs: td.ATLoss(pairs, "paper"), x("s*"), x("t*"), p["weights"]),
    ),
    ("torchdistill.PKTLoss", "pkt", lambda p, x, td: of_modules(td.PKTLoss(*PATHS, p["eps"]), x("s"), x("t"))),
    (
        "torchdistill.FTLoss",
        "ft_torchdistill",
        lambda p, x, td: of_modules(td.FTLoss(**p, paraphraser_path="t", translator_path="s"), x("s"), x("t")),
    ),
    (
        "torchdistill.AltActTransferLoss",
        "ab_official",
        lambda p, x, td: of_pairs(
            lambda pairs: td.AltActTransferLoss(pairs, p["margin"], "sum"), [x("s")], [x("t")], [1]
        ),
    ),
    (
        "torchdistill.RKDLoss",
        "rkd_torchdistill",
        lambda p, x, td: of_modules(td.RKDLoss("s", "t", **p), x("student"), x("teacher")),
    ),
    ("torchdistill.VIDLoss", "vid_rep", vid_of_modules),
    *(
        (
            "torchdistill.CCKDLoss",
            f"cc_torchdistill_{kind}",
            lambda p, x, td: of_modules(td.CCKDLoss("s", "t", **p), x("s"), x("t")),
        )
        for kind in ("gaussian", "bilinear")
    ),
    (
        "torchdistill.SPKDLoss",
        "sp_torchdistill",
        lambda p, x, td: of_modules(td.SPKDLoss("s", "t", **p), x("s"), x("t")),
    ),
    (
        "torchdistill.HierarchicalContextLoss",
        "hcl",
        lambda p, x, td: sum(
            of_modules(td.HierarchicalContextLoss(*PATHS), (s, None), t) for s, t in zip(x("s*"), x("t*"), strict=True)
        ),
    ),
    (
        "torchdistill.DISTLoss",
        "dist_torchdistill",
        lambda p, x, td: of_modules(td.DISTLoss(*PATHS, **p), x("s"), x("t")),
    ),
]
FILES = [
    pytest.param(name, path, call, id=f"{name}-{path.stem}")
    for name, golden, call in CASES
    for path in sorted([*GOLDEN.glob(f"{golden}__*.npz"), *GOLDEN.glob(f"compat/{golden}__*.npz")])
]
SOFTMAX = re.compile("(kd|dkd|dist)_")  # see tests/test_papers.py
LISTS = ("at_rep", "sp_rep", "nst_rep", "fsp_rep", "ab_rep")  # of which repdistiller returns one loss for each layer


class Numbers:
    """What one golden file holds: `self("s")` is the input of this name in the tested type, `self("s*")` a list."""

    def __init__(self, path, dtype, device="cpu"):
        with np.load(path) as stored:
            self.arrays = dict(stored)
        self.parameters = json.loads(str(self.arrays["about"]))["params"]
        self.dtype, self.device = dtype, device
        self.inputs, self.leaves = {}, {}

    def __call__(self, name):
        if name.endswith("*"):
            keys = sorted(key[3:] for key in self.arrays if re.fullmatch(f"in_{name[:-1]}[0-9]", key))
            return [self(key) for key in keys]
        if name not in self.inputs:
            x = torch.from_numpy(self.arrays[f"in_{name}"]).to(self.device)
            self.inputs[name] = x.to(self.dtype) if x.is_floating_point() else x
            if f"grad_{name}" in self.arrays:
                self.leaves[name] = self.inputs[name].requires_grad_()
        return self.inputs[name]

    def compare(self, what, got, want, digits=1e-9, floor=0.0):
        """Within 1e-9 of the largest entry in float64 (10 times that for gradients, see callers), 2e-5 in float32."""
        got, want = got.detach().double().cpu(), torch.as_tensor(want, dtype=torch.float64)
        assert got.shape == want.shape, what
        wide = self.dtype == torch.float64
        allowed = (digits if wide else 2e-5) * want.abs().max() + (1e-13 if wide else floor)
        assert (got - want).abs().max() <= allowed, what


@everywhere
@pytest.mark.parametrize(("name", "path", "call"), FILES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matches_the_original(implementation, name, path, call, dtype, request):
    numbers = Numbers(path, dtype, implementation.device)
    module, golden = name.split(".")[0], path.name.split("__")[0]
    libraries = [request.getfixturevalue("torchdistill")] if module == "torchdistill" else []
    losses = call(numbers.parameters, numbers, *libraries)
    want = numbers.arrays["loss"]
    if module == "repdistiller" and golden in LISTS:
        assert isinstance(losses, list) and len(losses) == len(want)
    else:
        losses, want = [losses], [want.sum()]
    temperature = max([1.0, *(v for k, v in numbers.parameters.items() if k in ("T", "temperature", "tau"))])
    floor = 2e-7 * temperature**2 if SOFTMAX.match(golden) else 0.0
    for loss, expected in zip(losses, want, strict=True):
        assert loss.shape == ((1,) if golden == "sp_rep" else ()) and loss.dtype == dtype
        numbers.compare("loss", loss.view(()), expected, floor=floor)
    grads = torch.autograd.grad(sum(losses).sum(), list(numbers.leaves.values()))
    for name, grad in zip(numbers.leaves, grads, strict=True):
        numbers.compare(name, grad, numbers.arrays[f"grad_{name}"], digits=1e-8, floor=floor / temperature / 10)


def test_every_loss_is_covered():
    names = {name for name, *_ in CASES}
    of_one_layer = {"single_stage_at_loss", "single_stage_nst_loss", "similarity_loss", "poly_kernel"}
    for module, others in (
        (repdistiller, {"KDSVD", "CRDLoss"}),
        (mdistiller, {"kdsvd_loss", *of_one_layer}),
    ):
        prefix = module.__name__.split(".")[-1]
        assert {n.split(".")[1] for n in names if n.startswith(prefix)} == set(module.__all__) - others
    with torchdistill_losses() as (losses, registry):
        assert {n.split(".")[1] for n in names if n.startswith("torchdistill")} == set(losses.__all__) - {"CRDLoss"}
        for name in losses.__all__:
            assert registry.MIDDLE_LEVEL_LOSS_DICT[f"kdfast.{name}"] is getattr(losses, name)
    golden = {path.name.split("__")[0] for path in GOLDEN.glob("compat/*.npz")}
    assert golden - {"kdsvd_rep"} <= {name for _, name, _ in CASES}


# ---- losses with a state ---------------------------------------------------------------------------------------------
@everywhere
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("crd_full__*.npz")), ids=lambda path: path.stem)
def test_crd_of_repdistiller(implementation, path):
    """Two modules of embeddings to train, a loss of shape (1,), and the banks after the step."""
    x = Numbers(path, torch.float64, implementation.device)
    p = x.parameters
    sizes = dict(s_dim=x("f_s").shape[1], t_dim=x("f_t").shape[1], feat_dim=p["feat_dim"], n_data=p["n_data"])
    loss = repdistiller.CRDLoss(types.SimpleNamespace(**sizes, nce_k=p["K"], nce_t=p["T"], nce_m=p["momentum"]))
    loss = loss.to(implementation.device, torch.float64)
    weights = {}
    for side, embed in (("s", loss.embed_s), ("t", loss.embed_t)):
        for name, parameter in (("w", embed.weight), ("b", embed.bias)):
            parameter.data.copy_(x(f"{name}_{side}"))
            weights[f"{name}_{side}"] = parameter
    loss.bank_student.copy_(x("memory_v1"))
    loss.bank_teacher.copy_(x("memory_v2"))
    value = loss(x("f_s"), x("f_t"), x("idx"), x("contrast_idx"))
    assert value.shape == (1,)
    x.compare("loss", value.view(()), x.arrays["loss"].sum())
    value.backward()
    for name, leaf in {"f_s": x("f_s"), "f_t": x("f_t"), **weights}.items():
        x.compare(name, leaf.grad, x.arrays[f"grad_{name}"], digits=1e-8)
    x.compare("bank", loss.bank_student, x.arrays["state_after_memory_v1"])
    x.compare("bank", loss.bank_teacher, x.arrays["state_after_memory_v2"])
    assert loss(x("f_s"), x("f_t"), x("idx")).shape == (1,)  # draws its own negatives


@everywhere
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("crd_memory__*.npz")), ids=lambda path: path.stem)
def test_crd_of_torchdistill(implementation, torchdistill, path):
    """Of embeddings that are ready made: RepDistiller's memory and contrast alone, two steps."""
    x = Numbers(path, torch.float64, implementation.device)
    p = x.parameters
    loss = torchdistill.CRDLoss(
        "norm", "empty", "norm", p["feat_dim"], p["n_data"], p["K"], p["n_data"], p["T"], p["momentum"]
    )
    loss = loss.double()  # on the CPU still
    assert not list(loss.parameters())
    loss.bank_student.copy_(x("memory_v1"))
    loss.bank_teacher.copy_(x("memory_v2"))
    supplement = {"pos_idx": x("idx").cpu(), "contrast_idx": x("contrast_idx").cpu()}
    student = {"norm": {"output": x("f_s")}, "empty": {"input": supplement}}
    teacher = {"norm": {"output": x("f_t")}}
    value = loss(student, teacher)
    assert value.shape == (1,)
    x.compare("loss", value.view(()), x.arrays["loss"])
    value.backward()
    for name in ("f_s", "f_t"):
        x.compare(name, x(name).grad, x.arrays[f"grad_{name}"], digits=1e-8)
    x.compare("bank", loss.bank_student, x.arrays["state_after_memory_v1"])
    step2 = loss(student, teacher)
    x.compare("step 2", step2, x.arrays["out_step2_loss_s"] + x.arrays["out_step2_loss_t"])
    x.compare("bank", loss.bank_teacher, x.arrays["state_after_step2_memory_v2"])
    del supplement["contrast_idx"]
    assert loss(student, teacher).isfinite().all()
    for wrong in ({"num_samples": 1}, {"eps": 1e-6}):
        sizes = dict(input_size=8, output_size=20, num_negative_samples=4, num_samples=20) | wrong
        with pytest.raises(ValueError, match=next(iter(wrong))):
            torchdistill.CRDLoss("norm", "empty", "norm", **sizes)


# ---- KDSVD, whose original has no definite signs ---------------------------------------------------------------------
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("compat/kdsvd_rep__*.npz")), ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_kdsvd_of_repdistiller(path, dtype):
    """The file has each sample's loss for every choice of signs of the teacher's vectors: ours is the rule's choice."""
    x = Numbers(path, dtype)
    students, teachers = x("s*"), x("t*")
    rows = len(students[0])
    signs = []  # of the file's vectors, to have the entry of largest magnitude positive [layer, sample, k]
    for layer in range(len(teachers)):
        v = torch.from_numpy(x.arrays[f"teacherV{layer}"])
        signs.append(v.gather(1, v.abs().argmax(1, keepdim=True))[:, 0].sign())
    patterns = torch.from_numpy(x.arrays["sign_patterns"])
    signs = torch.stack(signs, 1)  # [sample, layer, k]
    signs = signs * signs[:, :1]  # where a vector's sign changes in all layers the loss is the same
    chosen = [int((patterns == signs[b]).flatten(1).all(1).nonzero()) for b in range(rows)]
    students = [s.requires_grad_() for s in students]
    losses = repdistiller.KDSVD(x.parameters["k"])(students, teachers)
    want = sum(x.arrays["loss_signs"][c, b] for b, c in enumerate(chosen)) / rows
    assert isinstance(losses, list) and len(losses) == len(want)
    for loss, expected in zip(losses, want, strict=True):
        assert loss.shape == () and loss.dtype == dtype
        x.compare("loss", loss, expected)
    for layer, grad in enumerate(torch.autograd.grad(sum(losses), students)):
        expected = np.stack([x.arrays[f"gradsigns_s{layer}"][c, b] for b, c in enumerate(chosen)])
        got, expected = grad.double(), torch.from_numpy(expected)
        digits = 1e-7 if dtype == torch.float64 else 2e-3  # over gaps of squared singular values, which cancel
        assert (got - expected).abs().max() <= digits * expected.abs().max()


def test_kdsvd_is_the_same_for_all_signs_and_orders():
    """The loss does not know in which of its many forms the SVD came: -x has the vectors of x, and rows may move."""
    students, teachers = ([torch.randn(3, c, 5, 5).double() for c in (6, 8)] for _ in range(2))
    kdsvd = repdistiller.KDSVD(2)
    (want,) = kdsvd(students, teachers)
    others = [-students[0], students[1].flip(2)], [teachers[0].flip(3), -teachers[1]]
    torch.testing.assert_close(kdsvd(*others)[0], want, rtol=1e-9, atol=0)


def test_singular_vectors_gradient():
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, 5, dtype=torch.float64)
    for shape in ((2, 7, 5), (2, 4, 5)):  # the second with a null space

        def loss(x, shape=shape):
            v = _RightSingularVectors.apply(x, 2)
            return (v[:, :, None] * v[:, None]).mul(weights[..., None]).sum((1, 2))[:, 1]  # of no sign

        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(loss, x)
    flat = torch.ones(1, 4, 1, dtype=torch.float64) @ torch.randn(1, 1, 5, dtype=torch.float64)
    flat.requires_grad_()  # of rank 1: where torch's own gradient is NaN
    _RightSingularVectors.apply(flat, 3).mul(weights[:1, :, :3]).sum().backward()
    assert flat.grad.isfinite().all() and flat.grad.any()


def test_kdsvd_of_mdistiller():
    """Vectors over the columns of a map, see its docstring; one layer more is one loss more in the sum."""
    students, teachers = ([torch.randn(3, c, 4, 6).double() for c in channels] for channels in ((5, 7, 4), (6, 3, 2)))

    def naive(students, teachers, k):
        sides = []
        for s, t in zip(students, teachers, strict=True):
            s, t = (torch.linalg.svd(x.flatten(1, 2), full_matrices=False) for x in (s, t))
            v = t.Vh[:, :k].mT
            v = v * v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
            cosines = s.Vh[:, : k + 3] @ v
            best = cosines.abs().argmax(1)
            own = torch.stack([s.Vh[b, best[b]].mT * cosines[b].gather(0, best[b][None]).sign() for b in range(len(v))])
            share = t.S[:, None, :k] / t.S[:, :k].norm(dim=1)[:, None, None]
            sides.append((own * share, v * share))
        loss = 0
        for (s0, t0), (s1, t1) in zip(sides, sides[1:], strict=False):
            rbf = [torch.exp(-((b[:, :, None] - a[:, None]) ** 2) / 8) for a, b in ((s0, s1), (t0, t1))]
            loss = loss + ((rbf[0] - rbf[1]) ** 2).sum() / len(s0)
        return loss

    for k in (1, 2):
        got = mdistiller.kdsvd_loss(students, teachers, k)
        assert got.shape == ()
        torch.testing.assert_close(got, naive(students, teachers, k), rtol=1e-9, atol=0)


# ---- edges -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "loss",
    [repdistiller.Correlation(), repdistiller.RKDLoss(), mdistiller.rkd_loss, lambda *x: mdistiller.rkd_loss(*x, True)],
)
def test_one_sample(loss):
    """Nothing to compare it with: 0, and a gradient of 0."""
    student = torch.randn(1, 4, requires_grad=True)
    value = loss(student, torch.randn(1, 4))
    (grad,) = torch.autograd.grad(value, student)
    assert value.item() == 0 and not grad.any()


def test_rkd_with_equal_samples_and_other_eps():
    """Equal samples are eps apart, as in the original."""
    student, teacher = torch.randn(5, 3).double(), torch.randn(5, 4).double()
    student[1] = student[0]

    def naive(x, squared, eps):
        d = (x[:, None] - x).square().sum(2).clamp(min=eps)
        d = (d if squared else d.sqrt()) * (1 - torch.eye(len(x)))
        return d / d[d > 0].mean()

    for squared in (False, True):
        for eps in (1e-12, 1e-3):
            want = 2 * F.smooth_l1_loss(naive(student, squared, eps), naive(teacher, squared, eps))
            got = mdistiller.rkd_loss(student, teacher, squared, eps, 2, 0)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("p2", [1, 2, 3])
def test_factor_transfer_powers(p2):
    student, teacher = torch.randn(3, 4, 6, 6).double(), torch.randn(3, 5, 4, 4).double()
    maps = [F.normalize(x.pow(3).mean(1).flatten(1)) for x in (F.adaptive_avg_pool2d(student, 4), teacher)]
    gap = maps[0] - maps[1]
    want = gap.abs().mean() if p2 == 1 else gap.pow(p2).mean()
    torch.testing.assert_close(repdistiller.FactorTransfer(3, p2)(student, teacher), want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_similarity_of_any_memory(memory_format):
    student, teacher = (torch.randn(3, c, 4, 4).to(memory_format=memory_format) for c in (5, 6))
    (loss,) = repdistiller.Similarity()([student], [teacher])
    torch.testing.assert_close(loss, kdfast.SP()(student, teacher).view(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("sizes", "pooled"), [((6, 6), (3, 3)), ((7, 5), (3, 2)), ((5, 6), (4, 6)), ((5, 4), (1, 3))])
def test_max_pool(sizes, pooled):
    """Windows that overlap by a row or column, too; torch's own gradient is the same on the CPU, in some order."""
    x = torch.randint(5, (2, 3, *sizes)).double().requires_grad_()  # with equal entries
    grad = torch.randn(2, 3, *pooled).double()
    got, want = max_pool(x, *pooled), F.adaptive_max_pool2d(x, pooled)
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(y, x, grad)[0] for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-15)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3, 4)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1, "ignore_index": 1}, {"weight": torch.linspace(0.1, 1, 5)}],
    ids=["plain", "smooth", "weighted"],
)
def test_kd_of_torchdistill(torchdistill, reduction, shape, options):
    """Logits of any dimensions, classes second, and the arguments of nn.CrossEntropyLoss."""
    student, teacher = (torch.randn(shape).double() for _ in range(2))
    targets = torch.randint(5, (shape[0], *shape[2:]))
    options = {k: v.double() if k == "weight" else v for k, v in options.items()}
    divisor = {"batchmean": shape[0], "mean": student.numel(), "sum": 1}[reduction]
    soft = F.kl_div((student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="sum") / divisor
    hard = F.cross_entropy(student, targets, reduction="sum" if reduction == "sum" else "mean", **options)
    loss = torchdistill.KDLoss(*PATHS, 3.0, 0.3, 0.5, reduction, **options)
    torch.testing.assert_close(
        of_modules(loss, student, teacher, targets), 0.3 * hard + 0.5 * 9 * soft, rtol=1e-9, atol=0
    )
    torch.testing.assert_close(of_modules(loss, student, teacher), soft, rtol=1e-9, atol=0)
    loss = torchdistill.KDLoss(*PATHS, 3.0, reduction=reduction)
    torch.testing.assert_close(of_modules(loss, student, teacher, targets), soft, rtol=1e-9, atol=0)


def test_other_settings_of_torchdistill(torchdistill):
    """Those that no file has: p-norms, levels and sums, and a factor that is left out."""
    student, teacher = (torch.randn(4, 3, 6, 6).double() for _ in range(2))
    units = [F.normalize(x.flatten(1)) for x in (student, teacher)]
    norms = torch.linalg.vector_norm(units[0] - units[1], 3, dim=1)
    for reduction, want in (("mean", norms.mean()), ("sum", norms.sum())):
        loss = torchdistill.FTLoss(3, reduction, paraphraser_path="t", translator_path="s")
        torch.testing.assert_close(of_modules(loss, student, teacher), want, rtol=1e-9, atol=0)
    for reduction in ("mean", "sum"):
        pairs = [[F.adaptive_avg_pool2d(x, n) for x in (student, teacher)] for n in (6, 5, 3)]
        errors = [F.mse_loss(*pair, reduction=reduction) for pair in pairs]
        loss = torchdistill.HierarchicalContextLoss(*PATHS, reduction, [5, 7, 3])
        want = (errors[0] + errors[1] / 2 + errors[2] / 4) / 1.75
        torch.testing.assert_close(of_modules(loss, (student, None), teacher), want, rtol=1e-9, atol=0)
    loss = torchdistill.RKDLoss("s", "t", None, 2.0, "mean")
    torch.testing.assert_close(of_modules(loss, student, teacher), 2 * kdfast.RKDAngle()(student, teacher))
    pairs = {"pair": {side: {"io": "output", "path": side[0]} for side in ("student", "teacher")}}
    loss = torchdistill.AltActTransferLoss(pairs, 1.0, "mean")
    torch.testing.assert_close(of_modules(loss, student, teacher), kdfast.AB(1.0, "mean")(student, teacher))


@pytest.mark.parametrize("name", ["FTLoss-1", "FTLoss-2", "FTLoss-3", "CCKDLoss", "SPKDLoss", "ATLoss", "FSPLoss"])
def test_equal_networks_have_a_finite_gradient(torchdistill, name):
    """Norms are taken of zeros, and of a sample that is all zeros."""
    x = torch.randn(3, 4, 5, 5)
    x[0] = 0
    student, teacher = x.clone().requires_grad_(), x
    maps = ("FTLoss", "ATLoss", "FSPLoss")
    if name.startswith("FTLoss"):
        loss = torchdistill.FTLoss(int(name[-1]), paraphraser_path="t", translator_path="s")
    elif name == "CCKDLoss":
        loss = torchdistill.CCKDLoss("s", "t", {"type": "gaussian", "gamma": 0.4, "max_p": 2}, "batchmean")
    elif name == "SPKDLoss":
        loss = torchdistill.SPKDLoss("s", "t", "batchmean")
    elif name == "ATLoss":
        pairs = {"pair": {side: {"io": "output", "path": side[0]} for side in ("student", "teacher")}}
        loss = torchdistill.ATLoss(pairs, "paper")
    else:
        roles = {role: {"io": "output", "path": side} for role, (side, _) in FSP_ROLES.items()}
        loss = torchdistill.FSPLoss({"pair": roles})
    if not name.startswith(maps):
        student, teacher = student.flatten(1), teacher.flatten(1)
    value = of_modules(loss, student, teacher)
    assert value.item() == 0
    (grad,) = torch.autograd.grad(value, student)
    assert grad.isfinite().all() and grad.abs().max() <= 1


@pytest.mark.parametrize(
    "name",
    [
        "FTLoss-2",
        "FTLoss-3",
        "CCKDLoss",
        "SPKDLoss",
        "ATLoss",
        "FSPLoss",
        "DISTLoss",
        "HierarchicalContextLoss",
        "RKDLoss",
    ],
)
def test_nan_stays_in_plain_pytorch(torchdistill, name):
    """A sample that is NaN makes the loss NaN, and its gradient."""
    name, _, p = name.partition("-")
    arguments = {
        "FTLoss": dict(p=int(p or 1)),
        "CCKDLoss": dict(kernel_config=KERNEL, reduction="batchmean"),
        "SPKDLoss": dict(reduction="batchmean"),
        "ATLoss": dict(at_pairs=pairs_of(1), mode="paper"),
        "FSPLoss": dict(fsp_pairs=flows_of(1)),
        "HierarchicalContextLoss": dict(reduction="sum"),
        "RKDLoss": dict(dist_factor=1, angle_factor=0, reduction="none"),
    }.get(name, {})
    student, teacher = maps(0, (4, 4)), maps(1, (4, 4))
    if name in ("CCKDLoss", "SPKDLoss", "DISTLoss", "RKDLoss"):
        student, teacher = ([embeddings(seed), embeddings(seed + 1)] for seed in (0, 2))
    student[0][0] = float("nan")
    student[0].requires_grad_()
    sides = named(student, teacher)
    if name == "HierarchicalContextLoss":
        sides[0]["s"]["output"] = (student[0], None)
    value = of_torchdistill(getattr(torchdistill, name), **arguments)(*sides).sum()
    assert value.isnan()
    value.backward()
    assert student[0].grad[0].isnan().any()


# What is refused, and what the message says.
MAPS = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)]
REFUSED = [
    (lambda: repdistiller.Attention()([], []), ValueError, "as many layers.*got 0 and 0"),
    (lambda: repdistiller.Attention("2"), TypeError, "p must be a number, got str"),
    (lambda: repdistiller.Attention(0), ValueError, "p must be finite and above 0, got 0"),
    (lambda: mdistiller.at_loss(MAPS, MAPS, -1.5), ValueError, "p must be finite and above 0, got -1.5"),
    (lambda: repdistiller.ABLoss("2"), TypeError, "feat_num"),
    (
        lambda: repdistiller.FSP([x.shape for x in MAPS], [x.shape for x in MAPS[::-1]]),
        ValueError,
        r"\[3, 5\].*\[5, 3\]",
    ),
    (lambda: repdistiller.KDSVD()(MAPS, MAPS[::-1]), ValueError, r"teacher\[0\].*3 entries, got 5"),
    (lambda: repdistiller.KDSVD(0), ValueError, "k must be at least 1"),
    (lambda: repdistiller.FactorTransfer(2, 1.5), ValueError, "p2 must be a whole number.*got 1.5"),
    (lambda: repdistiller.Correlation()(torch.ones(2, 3), torch.ones(2, 4)), ValueError, "f_t.*f_s"),
    (lambda: mdistiller.kdsvd_loss(MAPS[:1], MAPS[:1], 1), ValueError, "at least two layers"),
    (lambda: mdistiller.rkd_loss(torch.ones(2, 3), torch.ones(2, 3), eps=0.0), ValueError, "eps"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_torchdistill_refuses(torchdistill):
    for call, message in (
        (lambda: torchdistill.KDLoss(*PATHS, 4.0, 0.5, reduction="other"), "reduction"),
        (lambda: torchdistill.ATLoss({"pair": {}}, mode="other"), "mode"),
        (lambda: torchdistill.ATLoss({}), "at least one pair"),
        (lambda: torchdistill.CCKDLoss("s", "t", {"type": "cubic"}, "batchmean"), "kernel_config"),
        (lambda: of_pairs(torchdistill.VIDLoss, [(MAPS[0], torch.ones(4))], [MAPS[0]], [1]), "variance"),
        (lambda: torchdistill.RKDLoss("s", "t", 1, 2, "other"), "reduction"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_torchdistill_is_needed_by_its_module_alone():
    """Where it cannot be imported the other modules can, and the error of this one says how to install it."""
    code = """
import sys
sys.modules["torchdistill"] = None
import kdfast.compat.repdistiller, kdfast.compat.mdistiller
try:
    import kdfast.compat.torchdistill
except ImportError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "torchdistill" in said and "pip install" in said and "kdfast[" not in said


# ---- attributes and methods of the originals -------------------------------------------------------------------------
def embeddings(seed, batch=5, width=6):
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps(seed, channels=(4, 6, 5), size=6):
    """Of one list of layers, at least 0."""
    numbers = torch.Generator().manual_seed(seed)
    shapes = [(3, c, size, size) for c in channels]
    return [torch.rand(shape, generator=numbers, dtype=torch.float64) for shape in shapes]


def of_lists(loss):
    return sum(loss([x - 0.5 for x in maps(0)], [x - 0.5 for x in maps(1)]))


def of_rows(loss):
    return loss(embeddings(0), embeddings(1))


def of_maps(loss):
    return loss(maps(0)[0], maps(1)[1])


def cubes(student, teacher):
    """A loss to set in the place of another."""
    return (student - teacher).abs().pow(3).mean()


class Cubes(nn.Module):
    def forward(self, student, teacher):
        return cubes(student, teacher)


def crd_of_repdistiller(nce_t=0.07, nce_m=0.5, nce_k=7, **arguments):
    sizes = dict(s_dim=6, t_dim=6, feat_dim=5, n_data=12)
    torch.manual_seed(0)
    opt = types.SimpleNamespace(**sizes, nce_k=nce_k, nce_t=nce_t, nce_m=nce_m)
    return repdistiller.CRDLoss(opt, **arguments)


def of_two_steps(loss):
    """CRD's second loss, of the banks that the first has moved; the negatives are drawn."""
    x, y, index = embeddings(0).float(), embeddings(1).float(), torch.arange(5)
    return loss(x, y, index) + loss(y, x, index)


def first_layers(loss):
    (value,) = loss([maps(0)[0] - 0.5], [maps(1)[0] - 0.5])
    return value


# A loss of an attribute's value, the attribute, its first and its second value, and a call.
ATTRIBUTES = [
    (repdistiller.DistillKL, "T", 4.0, 1.0, of_rows),
    (repdistiller.Attention, "p", 2, 3, of_lists),
    (lambda value: repdistiller.RKDLoss(w_d=value), "w_d", 25, 3.0, of_rows),
    (lambda value: repdistiller.RKDLoss(w_a=value), "w_a", 50, 3.0, of_rows),
    (lambda value: repdistiller.ABLoss(1, value), "margin", 1.0, 2.0, first_layers),
    (lambda value: repdistiller.FactorTransfer(p1=value), "p1", 2, 1.5, of_maps),
    (lambda value: repdistiller.FactorTransfer(p2=value), "p2", 1, 2, of_maps),
    (repdistiller.KDSVD, "k", 1, 2, lambda loss: sum(loss(maps(0), maps(1)))),
    (lambda value: crd_of_repdistiller(nce_t=value), "temperature", 0.07, 0.5, of_two_steps),
    (lambda value: crd_of_repdistiller(nce_m=value), "momentum", 0.5, 0.9, of_two_steps),
    (lambda value: crd_of_repdistiller(nce_k=value), "negatives", 7, 3, of_two_steps),
]


def check_attribute(make, name, first, second, call):
    """Set later, it is what it would have been from the start; and what is read is what was set."""
    loss = make(first)
    before, want = call(make(first)), call(make(second))
    assert (before - want).abs() > 1e-6 * want.abs()
    setattr(loss, name, second)
    assert getattr(loss, name) is second
    torch.testing.assert_close(call(loss), want, rtol=0, atol=0)


@pytest.mark.parametrize(("make", "name", "first", "second", "call"), ATTRIBUTES)
def test_attributes_act_when_they_are_set_later(make, name, first, second, call):
    check_attribute(make, name, first, second, call)


def test_modules_and_parameters_act_when_they_are_set_later():
    loss = repdistiller.HintLoss()
    torch.testing.assert_close(of_rows(loss), F.mse_loss(embeddings(0), embeddings(1)))
    loss.crit = Cubes()
    torch.testing.assert_close(of_rows(loss), cubes(embeddings(0), embeddings(1)))
    loss = repdistiller.ABLoss(1)
    loss.w = [4]
    torch.testing.assert_close(first_layers(loss), 4 * first_layers(repdistiller.ABLoss(1)))
    torch.manual_seed(0)
    vid = repdistiller.VIDLoss(4, 5, 6).double()

    def call():
        return vid(maps(0)[0], maps(1)[1])

    values = [call()]
    vid.eps = 1.0
    values.append(call())
    vid.regressor = nn.Conv2d(4, 6, 1).double()
    values.append(call())
    vid.log_scale = nn.Parameter(torch.ones(6, dtype=torch.float64))
    values.append(call())
    assert len({value.item() for value in values}) == 4
    variance = torch.ones(6, 1, 1, dtype=torch.float64).exp().log1p() + 1
    want = ((vid.regressor(maps(0)[0]) - maps(1)[1]).square() / variance + variance.log()).mean() / 2
    torch.testing.assert_close(values[3], want)


def test_modules_of_crd():
    """Embeddings can be set; what has no module of its own here cannot."""
    loss = crd_of_repdistiller()
    before, own = of_two_steps(crd_of_repdistiller()), nn.Linear(6, 5)
    loss.embed_s = own
    assert loss.embed_s is own and own.weight in set(loss.parameters()) and len(list(loss.parameters())) == 4
    assert of_two_steps(loss) != before
    with pytest.raises(TypeError, match="embed_teacher must be a linear layer, got Sequential"):
        loss.embed_t = nn.Sequential()
    for name in ("contrast", "criterion_s", "criterion_t"):
        with pytest.raises(AttributeError, match=f"{name} is no module here"):
            setattr(loss, name, nn.Identity())


def squares(x):
    """Of a tensor, or of each of several."""
    return x.square() if isinstance(x, torch.Tensor) else type(x)(y.square() for y in x)


def unit_map(self, f):
    return F.normalize(f.pow(2).mean(1).flatten(1))


def own_pdist(e, squared=False, eps=1e-12):
    return (e[:, None] - e).square().sum(2).clamp(min=eps).sqrt() * (1 - torch.eye(len(e), dtype=e.dtype))


def own_flow(g):
    return [
        torch.einsum("bthw,bchw->btc", top, bottom) / top[0, 0].numel() for bottom, top in zip(g, g[1:], strict=False)
    ]


def own_boundary(self, s, t):
    return torch.where(t > 0, (self.margin - s).clamp(min=0), (s + self.margin).clamp(min=0)).square().sum()


def rows_of_gram(x):
    return F.normalize(x.flatten(1) @ x.flatten(1).mT)


def own_svd(self, feat, n=1):
    """With the rule of signs that kdfast's loss has."""
    u, s, v = repdistiller.KDSVD.svd(self, feat, n)
    return u, s, v * v.gather(1, v.abs().argmax(1, keepdim=True)).sign()


def of_like_lists(loss):
    """As `of_lists`, with as many channels in both networks."""
    return sum(loss(maps(0), [x - 0.5 for x in maps(2)]))


# A class, its arguments, a method and its formula, and a call.
METHODS = [
    (repdistiller.Attention, (), "at", unit_map, of_lists),
    (
        repdistiller.Attention,
        (),
        "at_loss",
        lambda self, s, t: (unit_map(self, s) - unit_map(self, t)).square().mean(),
        of_lists,
    ),
    (repdistiller.FactorTransfer, (), "factor", unit_map, of_maps),
    (repdistiller.FactorTransfer, (2, 2), "factor", unit_map, of_maps),
    (
        repdistiller.FactorTransfer,
        (),
        "factor_loss",
        lambda self, s, t: (unit_map(self, s) - unit_map(self, t)).abs().mean(),
        of_maps,
    ),
    (
        repdistiller.Similarity,
        (),
        "similarity_loss",
        lambda self, s, t: (rows_of_gram(s) - rows_of_gram(t)).square().sum().view(1) / 9,
        of_lists,
    ),
    (repdistiller.RKDLoss, (), "pdist", staticmethod(own_pdist), of_rows),
    (repdistiller.ABLoss, (3,), "criterion_alternative_l2", own_boundary, of_like_lists),
    (repdistiller.FSP, ([], []), "compute_fsp", staticmethod(own_flow), of_like_lists),
    (repdistiller.FSP, ([], []), "compute_loss", staticmethod(F.mse_loss), of_like_lists),
    (
        repdistiller.NSTLoss,
        (),
        "poly_kernel",
        lambda self, a, b: (a[:, None] * b[:, :, None]).sum(3).square(),
        of_lists,
    ),
    (repdistiller.PKT, (), "cosine_similarity_loss", staticmethod(lambda a, b: kdfast.PKT()(a, b)), of_rows),
    (repdistiller.KDSVD, (2,), "svd", own_svd, of_like_lists),
]


def check_method(cls, arguments, name, formula, call):
    """Of a subclass or of one module: with the original's formula the loss is the same, with another it is another."""
    static = isinstance(formula, staticmethod)
    function = formula.__func__ if static else formula

    def other(*x, **y):
        return squares(function(*x, **y))

    want = call(cls(*arguments))
    kinds = [type("Own", (cls,), {name: staticmethod(method) if static else method}) for method in (function, other)]
    same, another = (call(kind(*arguments)) for kind in kinds)
    torch.testing.assert_close(same, want, rtol=1e-9, atol=1e-12)
    assert (another - want).abs() > 1e-6 * want.abs()
    one = cls(*arguments)
    setattr(one, name, other if static else functools.partial(other, one))
    torch.testing.assert_close(call(one), another, rtol=0, atol=0)


@pytest.mark.parametrize(("cls", "arguments", "name", "formula", "call"), METHODS)
def test_methods_of_the_originals_can_be_replaced(cls, arguments, name, formula, call):
    check_method(cls, arguments, name, formula, call)


def pairs_of(*weights):
    """Two layers of each network, with these weights."""
    sides = (("student", "s"), ("teacher", "t"))
    return {
        f"pair{i}": {**{name: {"io": "output", "path": f"{side}{i}"} for name, side in sides}, "weight": weight}
        for i, weight in enumerate(weights)
    }


def flows_of(weight):
    roles = {role: {"io": "output", "path": f"{side}{i}"} for role, (side, i) in FSP_ROLES.items()}
    return {"pair": {**roles, "weight": weight}}


def named(student, teacher):
    """What modules named s, s0, s1 and t, t0, t1 put out."""
    sides = []
    for side, x in (("s", student), ("t", teacher)):
        several = {f"{side}{i}": {"output": y} for i, y in enumerate(x)}
        sides.append({side: {"output": x[0]}, f"other {side}": {"output": x[-1]}, **several})
    return sides


def of_named_maps(loss):
    return loss(*named(maps(0), [x - 0.5 for x in maps(2)]))


def of_named_rows(loss):
    return loss(*named([embeddings(0), embeddings(2)], [embeddings(1), embeddings(3)]), torch.arange(5))


def of_named_pair(loss):
    return loss({"s": {"output": (maps(0)[0], None)}}, {"t": {"output": maps(2)[0]}})


KERNEL = {"type": "gaussian", "gamma": 0.1, "max_p": 2}
ATTRIBUTES_OF_TORCHDISTILL = [
    # A class, its arguments with the first value, the attribute (of an argument of another name), the second value.
    ("KDLoss", dict(temperature=4.0, alpha=0.3), "temperature", 1.0, of_named_rows),
    ("KDLoss", dict(temperature=4.0, alpha=0.3, beta=0.7), "alpha", 0.9, of_named_rows),
    ("KDLoss", dict(temperature=4.0, alpha=0.3, beta=0.7), "beta", 0.1, of_named_rows),
    ("KDLoss", dict(temperature=4.0, reduction="batchmean"), "reduction", "sum", of_named_rows),
    ("FSPLoss", dict(fsp_pairs=flows_of(1)), "fsp_pairs", flows_of(2), of_named_maps),
    ("ATLoss", dict(at_pairs=pairs_of(1, 2)), "at_pairs", pairs_of(3, 1), of_named_maps),
    ("ATLoss", dict(at_pairs=pairs_of(1, 2), mode="code"), "mode", "paper", of_named_maps),
    ("PKTLoss", dict(eps=1e-7), "eps", 1e-2, of_named_rows),
    ("FTLoss", dict(p=1), "norm_p", 3, of_named_maps),
    ("FTLoss", dict(p=2, reduction="mean"), "reduction", "sum", of_named_maps),
    ("FTLoss", {}, "translator_path", "other s", of_named_rows),
    ("FTLoss", {}, "paraphraser_path", "other t", of_named_rows),
    ("AltActTransferLoss", dict(feature_pairs=pairs_of(1), margin=1.0, reduction="mean"), "margin", 2.0, of_named_maps),
    (
        "AltActTransferLoss",
        dict(feature_pairs=pairs_of(1), margin=1.0, reduction="mean"),
        "reduction",
        "sum",
        of_named_maps,
    ),
    (
        "AltActTransferLoss",
        dict(feature_pairs=pairs_of(1), margin=1.0, reduction="mean"),
        "feature_pairs",
        pairs_of(2),
        of_named_maps,
    ),
    ("RKDLoss", dict(dist_factor=1, angle_factor=2, reduction="mean"), "dist_factor", 3, of_named_rows),
    ("RKDLoss", dict(dist_factor=1, angle_factor=2, reduction="mean"), "angle_factor", 3, of_named_rows),
    ("RKDLoss", dict(dist_factor=1, angle_factor=2, reduction="mean"), "student_output_path", "other s", of_named_rows),
    ("RKDLoss", dict(dist_factor=1, angle_factor=2, reduction="mean"), "teacher_output_path", "other t", of_named_rows),
    ("CCKDLoss", dict(kernel_config=KERNEL, reduction="batchmean"), "gamma", 0.2, of_named_rows),
    ("CCKDLoss", dict(kernel_config=KERNEL, reduction="batchmean"), "max_p", 3, of_named_rows),
    ("CCKDLoss", dict(kernel_config=KERNEL, reduction="batchmean"), "kernel_type", "bilinear", of_named_rows),
    ("CCKDLoss", dict(kernel_config=KERNEL, reduction="batchmean"), "reduction", "sum", of_named_rows),
    ("CCKDLoss", dict(kernel_config=KERNEL, reduction="batchmean"), "student_linear_path", "other s", of_named_rows),
    ("CCKDLoss", dict(kernel_config=KERNEL, reduction="batchmean"), "teacher_linear_path", "other t", of_named_rows),
    ("SPKDLoss", dict(reduction="batchmean"), "reduction", "sum", of_named_rows),
    ("SPKDLoss", dict(reduction="batchmean"), "student_output_path", "other s", of_named_rows),
    ("SPKDLoss", dict(reduction="batchmean"), "teacher_output_path", "other t", of_named_rows),
    ("HierarchicalContextLoss", dict(output_sizes=[4, 2, 1]), "output_sizes", [5, 3], of_named_pair),
    ("DISTLoss", dict(beta=1.0), "beta", 2.0, of_named_rows),
    ("DISTLoss", dict(gamma=1.0), "gamma", 2.0, of_named_rows),
    ("DISTLoss", dict(tau=1.0), "tau", 2.0, of_named_rows),
    ("DISTLoss", dict(eps=1e-8), "eps", 1.0, of_named_rows),
]
PATH_ARGUMENTS = {
    "student_module_path": "s",
    "student_module_io": "output",
    "teacher_module_path": "t",
    "teacher_module_io": "output",
    "student_output_path": "s",
    "teacher_output_path": "t",
    "student_linear_path": "s",
    "teacher_linear_path": "t",
    "translator_path": "s",
    "paraphraser_path": "t",
}


def of_torchdistill(cls, **arguments):
    """The loss of modules named s and t, unless it is told others."""
    taken = inspect.signature(cls.__init__).parameters
    return cls(**{name: x for name, x in PATH_ARGUMENTS.items() if name in taken} | arguments)


@pytest.mark.parametrize(("name", "arguments", "attribute", "second", "call"), ATTRIBUTES_OF_TORCHDISTILL)
def test_attributes_of_torchdistill(torchdistill, name, arguments, attribute, second, call):
    argument = {"norm_p": "p"}.get(attribute, attribute)

    def make(value):
        if attribute in ("gamma", "max_p", "kernel_type") and name == "CCKDLoss":
            key = attribute.removeprefix("kernel_")
            return of_torchdistill(getattr(torchdistill, name), **arguments | {"kernel_config": KERNEL | {key: value}})
        return of_torchdistill(getattr(torchdistill, name), **arguments | {argument: value})

    first = getattr(of_torchdistill(getattr(torchdistill, name), **arguments), attribute)
    check_attribute(make, attribute, first, second, call)


def test_modules_of_torchdistill(torchdistill):
    """Losses inside of a loss, of another kind or with other settings."""
    student, teacher = embeddings(0), embeddings(1)
    labels = torch.arange(5)
    soft = F.kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean")
    loss = of_torchdistill(torchdistill.KDLoss, temperature=4.0, alpha=0.3)
    for hard in (nn.CrossEntropyLoss(label_smoothing=0.2), nn.CrossEntropyLoss(reduction="sum"), nn.MultiMarginLoss()):
        loss.cross_entropy_loss = hard
        want = 0.3 * hard(student, labels) + 0.7 * 16 * soft
        torch.testing.assert_close(of_named_rows(loss), want, rtol=1e-9, atol=0)
    loss = of_torchdistill(torchdistill.KDLoss, temperature=4.0)
    loss.alpha = 0.3
    torch.testing.assert_close(of_named_rows(loss), 0.3 * F.cross_entropy(student, labels) + 0.7 * 16 * soft)

    angles = []
    for x in (student, teacher):
        directions = F.normalize(x[None] - x[:, None], dim=2)
        angles.append((directions @ directions.mT).flatten())
    distances = [own_pdist(x) / own_pdist(x)[own_pdist(x) > 0].mean() for x in (student, teacher)]
    loss = of_torchdistill(torchdistill.RKDLoss, dist_factor=1, angle_factor=2, reduction="mean")
    for huber in (nn.SmoothL1Loss(beta=0.1), nn.SmoothL1Loss(reduction="sum"), nn.L1Loss()):
        loss.smooth_l1_loss = huber
        want = huber(*distances) + 2 * huber(*angles)
        torch.testing.assert_close(of_named_rows(loss), want, rtol=1e-9, atol=0)

    levels = [[F.adaptive_avg_pool2d(x, n) for x in (maps(0)[0], maps(2)[0])] for n in (6, 4, 2, 1)]
    loss = of_torchdistill(torchdistill.HierarchicalContextLoss)
    for criteria in (nn.MSELoss(reduction="sum"), nn.L1Loss()):
        loss.criteria = criteria
        want = sum(0.5**k * criteria(*level) for k, level in enumerate(levels)) / 1.875
        torch.testing.assert_close(of_named_pair(loss), want, rtol=1e-9, atol=0)


def test_reduction_none_of_torchdistill(torchdistill):
    """The terms, where the original returns them."""
    student, teacher = embeddings(0, width=5), embeddings(1, width=5)
    terms = F.kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="none")
    labels = torch.arange(5)
    hard = F.cross_entropy(student, labels, reduction="none")
    for alpha, want in ((None, terms), (0.3, 0.3 * hard + 0.7 * 16 * terms)):
        loss = torchdistill.KDLoss(*PATHS, 4.0, alpha, reduction="none")
        torch.testing.assert_close(of_modules(loss, student, teacher, labels), want, rtol=1e-9, atol=0)
    distances = [own_pdist(x) / own_pdist(x)[own_pdist(x) > 0].mean() for x in (student, teacher)]
    loss = torchdistill.RKDLoss("s", "t", 2.0, None, "none")
    want = 2 * F.smooth_l1_loss(*distances, reduction="none")
    torch.testing.assert_close(of_modules(loss, student, teacher), want, rtol=1e-9, atol=1e-15)
    loss = torchdistill.FTLoss(1, "none", paraphraser_path="t", translator_path="s")
    want = (F.normalize(student) - F.normalize(teacher)).abs()
    torch.testing.assert_close(of_modules(loss, student, teacher), want, rtol=1e-9, atol=1e-15)
    loss = torchdistill.HierarchicalContextLoss(*PATHS, "none", [6])
    x, y = maps(0)[0], maps(2)[0]
    torch.testing.assert_close(of_modules(loss, (x, None), y), (x - y).square())


def own_products(self, z):
    return F.normalize(z.flatten(1) @ z.flatten(1).mT, 1)


METHODS_OF_TORCHDISTILL = [
    (
        "FSPLoss",
        dict(fsp_pairs=flows_of(1)),
        "compute_fsp_matrix",
        staticmethod(lambda a, b: own_flow([b, a])[0]),
        of_named_maps,
    ),
    (
        "ATLoss",
        dict(at_pairs=pairs_of(1)),
        "attention_transfer",
        staticmethod(functools.partial(unit_map, None)),
        of_named_maps,
    ),
    (
        "ATLoss",
        dict(at_pairs=pairs_of(1), mode="paper"),
        "attention_transfer_paper",
        staticmethod(functools.partial(unit_map, None)),
        of_named_maps,
    ),
    (
        "ATLoss",
        dict(at_pairs=pairs_of(1)),
        "compute_at_loss",
        lambda self, s, t: (unit_map(0, s) - unit_map(0, t)).square().mean(),
        of_named_maps,
    ),
    (
        "ATLoss",
        dict(at_pairs=pairs_of(1), mode="paper"),
        "compute_at_loss_paper",
        lambda self, s, t: (unit_map(0, s) - unit_map(0, t)).norm(dim=1).sum(),
        of_named_maps,
    ),
    ("PKTLoss", {}, "cosine_similarity_loss", lambda self, a, b: kdfast.PKT()(a, b), of_named_rows),
    (
        "AltActTransferLoss",
        dict(feature_pairs=pairs_of(1), margin=1.0, reduction="mean"),
        "compute_alt_act_transfer_loss",
        staticmethod(lambda s, t, margin: kdfast.AB(margin)(s, t)),
        of_named_maps,
    ),
    ("RKDLoss", dict(dist_factor=1, angle_factor=2, reduction="mean"), "pdist", staticmethod(own_pdist), of_named_rows),
    (
        "RKDLoss",
        dict(dist_factor=1, angle_factor=2, reduction="mean"),
        "compute_rkd_distance_loss",
        lambda self, t, s: kdfast.RKDDistance()(s, t),
        of_named_rows,
    ),
    (
        "RKDLoss",
        dict(dist_factor=1, angle_factor=2, reduction="mean"),
        "compute_rkd_angle_loss",
        lambda self, t, s: kdfast.RKDAngle()(s, t),
        of_named_rows,
    ),
    (
        "CCKDLoss",
        dict(kernel_config={"type": "bilinear"}, reduction="sum"),
        "compute_cc_mat_by_bilinear_pool",
        staticmethod(lambda x: x @ x.t()),
        of_named_rows,
    ),
    (
        "CCKDLoss",
        dict(kernel_config=KERNEL, reduction="sum"),
        "compute_cc_mat_by_gaussian_rbf",
        lambda self, x: (
            sum((2 * self.gamma) ** p / math.factorial(p) * (x @ x.t()) ** p for p in range(self.max_p + 1))
            * math.exp(-2 * self.gamma)
        ),
        of_named_rows,
    ),
    ("SPKDLoss", dict(reduction="batchmean"), "matmul_and_normalize", own_products, of_named_rows),
    (
        "SPKDLoss",
        dict(reduction="batchmean"),
        "compute_spkd_loss",
        lambda self, t, s: (own_products(0, t) - own_products(0, s)).norm() ** 2,
        of_named_rows,
    ),
    (
        "DISTLoss",
        {},
        "pearson_correlation",
        staticmethod(lambda a, b, eps: F.cosine_similarity(a - a.mean(1, True), b - b.mean(1, True), eps=eps)),
        of_named_rows,
    ),
    (
        "DISTLoss",
        {},
        "inter_class_relation",
        lambda self, a, b: 1 - self.pearson_correlation(a, b, self.eps).mean(),
        of_named_rows,
    ),
    ("DISTLoss", {}, "intra_class_relation", lambda self, a, b: self.inter_class_relation(a.t(), b.t()), of_named_rows),
]


@pytest.mark.parametrize(("name", "arguments", "method", "formula", "call"), METHODS_OF_TORCHDISTILL)
def test_methods_of_torchdistill_can_be_replaced(torchdistill, name, arguments, method, formula, call):
    class Made(getattr(torchdistill, name)):
        def __init__(self):
            taken = inspect.signature(super().__init__).parameters
            super().__init__(**{name: x for name, x in PATH_ARGUMENTS.items() if name in taken} | arguments)

    check_method(Made, (), method, formula, call)


def test_crd_of_torchdistill_has_no_parts(torchdistill):
    """What is part of a kernel cannot be set or replaced; what has another name in kdfast can."""
    loss = torchdistill.CRDLoss("norm", "empty", "norm", 5, 12, 7, 12)
    loss.num_negative_samples = 3
    loss.memory_v1 = torch.ones(12, 5)
    assert loss.negatives == 3 and torch.equal(loss.bank_student, torch.ones(12, 5)) and loss.num_samples == 12
    assert loss.memory_v2 is loss.bank_teacher and len(loss.state_dict()) == len(list(loss.buffers()))
    for name in ("eps", "num_samples", "params", "unigrams", "probs", "alias"):
        with pytest.raises(AttributeError, match=f"{name} cannot be set"):
            setattr(loss, name, 1)
    with pytest.raises(TypeError, match="Own.contrast_memory would never be called"):
        type("Own", (torchdistill.CRDLoss,), {"contrast_memory": lambda self, *x: x})


def test_methods_alone():
    """What the thin versions return, in the originals' shapes."""
    f, g = maps(0)[:2]
    torch.testing.assert_close(repdistiller.Attention(3).at(f), F.normalize(f.pow(3).mean(1).flatten(1)))
    torch.testing.assert_close(repdistiller.FactorTransfer(3).factor(f), F.normalize(f.pow(3).mean(1).flatten(1)))
    e = embeddings(0)
    for squared in (False, True):
        d = (e[:, None] - e).square().sum(2)
        want = (d if squared else d.sqrt()) * (1 - torch.eye(5, dtype=torch.float64))
        torch.testing.assert_close(repdistiller.RKDLoss.pdist(e, squared), want)
    torch.testing.assert_close(repdistiller.FSP.compute_fsp([f, g])[0], own_flow([f, g])[0])
    torch.testing.assert_close(repdistiller.FSP.compute_loss(e, 2 * e), e.square().mean())
    a, b = f.flatten(2), g.flatten(2)
    want = (a[:, None] * b[:, :, None]).sum(3).square()
    for kernel in (repdistiller.NSTLoss().poly_kernel, mdistiller.poly_kernel):
        torch.testing.assert_close(kernel(a, b), want)
    for name in ("removenan", "align_rsv"):
        zeros = {"removenan": torch.zeros_like, "align_rsv": lambda a, b: (0 * b, 0 * b)}[name]
        assert of_like_lists(type("Own", (repdistiller.KDSVD,), {name: staticmethod(zeros)})()) == 0
    assert repdistiller.KDSVD.removenan(torch.tensor([1.0, float("nan"), float("inf")])).tolist() == [1, 0, 0]
    u, s, v = repdistiller.KDSVD().svd(f, 2)
    assert u.shape == (3, 36, 2) and s.shape == (3, 2) and v.shape == (3, 4, 2)
    torch.testing.assert_close(v.square().sum(1), torch.ones(3, 2, dtype=torch.float64))
    torch.testing.assert_close(s.square().sum(1), torch.ones(3, dtype=torch.float64))
    u, s, v = repdistiller.KDSVD().svd(f, 0)
    torch.testing.assert_close((u * s[:, None]) @ v.mT, f.flatten(2).mT)
    aligned, same = repdistiller.KDSVD.align_rsv(-v.flip(2), v[..., :2])
    torch.testing.assert_close(aligned, v[..., :2])
    assert torch.equal(same, v[..., :2])
    torch.testing.assert_close(mdistiller.single_stage_at_loss(f, g, 2), mdistiller.at_loss([f], [g], 2))
    torch.testing.assert_close(mdistiller.single_stage_nst_loss(f, g), mdistiller.nst_loss([f], [g]))
    torch.testing.assert_close(mdistiller.similarity_loss(f, g), mdistiller.sp_loss([f], [g]))


@pytest.mark.parametrize("p", [0.5, 1.5, 2.0, 2.5, 3.0])
def test_powers_that_are_not_whole(p):
    """x^p, as the originals have it: of a whole number also of negative entries, in float64 1e-9 and its gradient."""
    sign = 0.5 if p in (2.0, 3.0) else 0.0
    student, teacher = ([(x - sign).requires_grad_() for x in maps(seed)] for seed in (0, 1))
    want = [
        (F.normalize(s.pow(p).mean(1).flatten(1)) - F.normalize(t.pow(p).mean(1).flatten(1))).square().mean()
        for s, t in zip(student, teacher, strict=True)
    ]
    grads = torch.autograd.grad(sum(want), [*student, *teacher])
    for losses in (repdistiller.Attention(p)(student, teacher), [mdistiller.at_loss(student, teacher, p)]):
        torch.testing.assert_close(sum(losses), sum(want), rtol=1e-9, atol=0)
        for got, grad in zip(torch.autograd.grad(sum(losses), [*student, *teacher]), grads, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-8, atol=1e-15)
    f_s, f_t = student[0], teacher[0]
    gap = F.normalize(f_s.pow(p).mean(1).flatten(1)) - F.normalize(f_t.pow(p).mean(1).flatten(1))
    for p2, value in ((1.0, gap.abs().mean()), (2.0, gap.square().mean()), (3, gap.pow(3).mean())):
        torch.testing.assert_close(repdistiller.FactorTransfer(p, p2)(f_s, f_t), value, rtol=1e-9, atol=1e-18)
    half = [x.detach().bfloat16() for x in student]
    assert repdistiller.Attention(p)(half, half)[0].dtype == torch.float32


LISTS_OF_LAYERS = {
    "Attention": repdistiller.Attention(),
    "Similarity": repdistiller.Similarity(),
    "ABLoss": repdistiller.ABLoss(2),
    "NSTLoss": repdistiller.NSTLoss(),
    "KDSVD": repdistiller.KDSVD(),
    "FSP": repdistiller.FSP([], []),
    "at_loss": lambda s, t: [mdistiller.at_loss(s, t, 2)],
    "nst_loss": lambda s, t: [mdistiller.nst_loss(s, t)],
    "sp_loss": lambda s, t: [mdistiller.sp_loss(s, t)],
    "kdsvd_loss": lambda s, t: [mdistiller.kdsvd_loss(s, t, 1)],
    "hcl_loss": lambda s, t: [mdistiller.hcl_loss(s, t)],
}


@pytest.mark.parametrize("name", LISTS_OF_LAYERS)
@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_lists_of_unequal_length(name, longer):
    """The last layers of the longer one are left out, as zip does it, with one warning for all steps."""
    _original._warn.cache_clear()
    loss, both = LISTS_OF_LAYERS[name], ([x - 0.5 for x in maps(seed)] for seed in (0, 1))
    student, teacher = both
    want = loss(student[:2], teacher[:2])
    lists = (student, teacher[:2]) if longer == "student" else (student[:2], teacher)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = loss(*lists)
        assert all(torch.equal(a, b) for a, b in zip(got, loss(*lists), strict=True))
    (warning,) = caught
    counts = "3 and 2" if longer == "student" else "2 and 3"
    assert str(warning.message).startswith(f"lists of {counts} layers: the last of the longer one are left out")
    assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_weights_of_abloss_and_layers_of_unequal_number():
    _original._warn.cache_clear()
    lists = [[x - 0.5 for x in maps(seed)] for seed in (0, 1)]
    with pytest.warns(UserWarning, match="lists of 3 and 2 layers"):
        few = repdistiller.ABLoss(2)(*lists)
    with pytest.warns(UserWarning, match="lists of 3 and 4 layers"):
        many = repdistiller.ABLoss(4)(*lists)
    all_three = repdistiller.ABLoss(3)(*lists)
    assert [x / y for x, y in zip(few, all_three, strict=False)] == [2, 2] and len(many) == 3
    assert [x / y for x, y in zip(many, all_three, strict=True)] == [0.5] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_draws_of_crd(dtype, torchdistill):
    """Embeddings, banks and whatever is drawn next are the original's of the same seed, in torch's default type."""
    torch.set_default_dtype(dtype)
    try:
        for embedded in (True, False):
            torch.manual_seed(5)
            linears = [nn.Linear(6, 5), nn.Linear(6, 5)] if embedded else []
            bound = 1.0 / np.sqrt(5 / 3)
            banks = [torch.rand(12, 5).mul_(2 * bound).add_(-bound) for _ in range(2)]
            after = torch.rand(3)
            torch.manual_seed(5)
            if embedded:
                opt = types.SimpleNamespace(s_dim=6, t_dim=6, feat_dim=5, n_data=12, nce_k=7, nce_t=0.07, nce_m=0.5)
                loss = repdistiller.CRDLoss(opt)
                for linear, own in zip(linears, (loss.embed_s, loss.embed_t), strict=True):
                    assert torch.equal(own.weight, linear.weight) and torch.equal(own.bias, linear.bias)
            else:
                loss = torchdistill.CRDLoss("norm", "empty", "norm", 5, 12, 7, 12)
            assert torch.equal(torch.rand(3), after)
            for own, bank in zip((loss.bank_student, loss.bank_teacher), banks, strict=True):
                assert own.dtype == dtype and torch.equal(own, bank)
    finally:
        torch.set_default_dtype(torch.float32)


def test_banks_of_another_type(torchdistill):
    """The same draws, rounded."""
    wide, narrow = (crd_of_repdistiller(bank_dtype=dtype) for dtype in (None, torch.bfloat16))
    assert wide.bank_student.dtype == torch.float32
    assert torch.equal(narrow.bank_student, wide.bank_student.bfloat16())
    assert torch.equal(narrow.embed_s.weight, wide.embed_s.weight)
    loss = torchdistill.CRDLoss("norm", "empty", "norm", 5, 12, 7, 12, bank_dtype=torch.float16)
    assert loss.bank_teacher.dtype == torch.float16
    with pytest.raises(TypeError, match="bank_dtype"):
        crd_of_repdistiller(bank_dtype="float16")
    with torch.device("meta"):
        assert crd_of_repdistiller().bank_student.device.type == "meta"


# ---- the loops they are used in --------------------------------------------------------------------------------------
class Network(nn.Module):
    """As RepDistiller's models: with is_feat, and preact, the maps of all stages come with the logits."""

    def __init__(self, *channels, classes=10):
        super().__init__()
        sizes = zip((3, *channels), channels, strict=False)
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, 1 + (i > 0), padding=1) for i, (a, b) in enumerate(sizes))
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x, is_feat=False, preact=False):
        maps = []
        for stage in self.stages:
            before = stage(x)
            x = before.relu()
            maps.append(before if preact else x)
        feature = x.mean((2, 3))
        maps.append(feature)
        return (maps, self.head(feature)) if is_feat else self.head(feature)


def factor_oracle(student, teacher):
    maps = [F.normalize(x.pow(2).mean(1).flatten(1)) for x in (student, teacher)]
    return (maps[0] - maps[1]).abs().mean()


def correlation_oracle(student, teacher):
    gap = (student - teacher).abs()
    return (gap[:-1] * gap[1:]).sum(1).mean()


def boundary_oracle(student, teacher):
    layers = list(zip(student, teacher, strict=True))
    weights = [2.0 ** (i - len(layers) + 1) * 3 / 1000 for i in range(len(layers))]
    return sum(w * oracles.AB(s, t, reduction="mean") for w, (s, t) in zip(weights, layers, strict=True))


# How the script has each criterion: what it is of (see `features`), whether lists are summed, and the formula. Weights
# are those of its scripts.
LOOPS = {
    "hint": (lambda s, t: repdistiller.HintLoss(), "regressed", oracles.FitNets, 100),
    "attention": (lambda s, t: repdistiller.Attention(), "middle", oracles.AT, 1000),
    "similarity": (lambda s, t: repdistiller.Similarity(), "last map", oracles.SP, 3000),
    "correlation": (lambda s, t: repdistiller.Correlation(), "embedded", correlation_oracle, 0.02),
    "rkd": (lambda s, t: repdistiller.RKDLoss(), "last", oracles.RKD, 1),
    "pkt": (lambda s, t: repdistiller.PKT(), "last", oracles.PKT, 30000),
    "nst": (lambda s, t: repdistiller.NSTLoss(), "middle", oracles.NST, 50),
    "factor": (lambda s, t: repdistiller.FactorTransfer(), "map before last", factor_oracle, 200),
    "abound": (lambda s, t: repdistiller.ABLoss(len(s[1:-1])), "regressed middle", boundary_oracle, 1),
    "fsp": (
        lambda s, t: repdistiller.FSP(shapes(s[:-1], True), shapes(s[:-1], True)),
        "regressed all",
        oracles.FSP,
        50,
    ),
}


def shapes(maps, wide=False):
    return [(x.shape[0], 2 * x.shape[1] if wide else x.shape[1], *x.shape[2:]) for x in maps]


def features(of, maps_s, maps_t, connect):
    """The student's and the teacher's maps that a criterion compares; `connect` brings the former to the latter."""
    if of == "middle":
        return maps_s[1:-1], maps_t[1:-1]
    if of == "last map":
        return [maps_s[-2]], [maps_t[-2]]
    if of == "map before last":
        return maps_s[-2], maps_t[-2]
    if of == "last":
        return maps_s[-1], maps_t[-1]
    if of == "embedded":
        return connect[-1](maps_s[-1]), maps_t[-1]
    if of == "regressed":
        return connect[2](maps_s[2]), maps_t[2]
    chosen = slice(1, -1) if of == "regressed middle" else slice(0, -1)
    return [layer(x) for layer, x in zip(connect[chosen], maps_s[chosen], strict=True)], maps_t[chosen]


@pytest.mark.parametrize("distill", LOOPS)
def test_student_loop_of_repdistiller(distill):
    """Its script with other imports trains like one of naive formulas: all losses of three steps to 1e-6."""
    build, of, formula, beta = LOOPS[distill]
    torch.manual_seed(1)
    images = torch.randn(3, 6, 3, 8, 8, dtype=torch.float64)
    labels = torch.randint(10, (3, 6))

    def train(ours):
        torch.manual_seed(2)
        student, teacher = Network(4, 6, 8).double(), Network(8, 12, 16).double().eval()
        maps_s, _ = student(images[0], is_feat=True)
        maps_t, _ = teacher(images[0], is_feat=True)
        connect = nn.ModuleList([*(nn.Conv2d(c, 2 * c, 1) for c in (4, 6, 8)), nn.Linear(8, 16)]).double()
        module_list = nn.ModuleList([student, connect])
        if ours:
            criterion_list = nn.ModuleList([nn.CrossEntropyLoss(), repdistiller.DistillKL(4), build(maps_s, maps_t)])
            criterion_cls, criterion_div, criterion_kd = criterion_list
        else:
            criterion_cls, criterion_kd = F.cross_entropy, formula

            def criterion_div(y_s, y_t):
                return oracles.KD(y_s, y_t, temperature=4.0)

        optimizer = torch.optim.SGD(module_list.parameters(), lr=0.01, momentum=0.9)
        history = []
        for x, y in zip(images, labels, strict=True):
            preact = distill == "abound"
            feat_s, logit_s = student(x, is_feat=True, preact=preact)
            with torch.no_grad():
                feat_t, logit_t = teacher(x, is_feat=True, preact=preact)
            loss_kd = criterion_kd(*features(of, feat_s, feat_t, connect))
            if isinstance(loss_kd, list):
                loss_kd = sum(loss_kd)
            loss = 0.1 * criterion_cls(logit_s, y) + 0.9 * criterion_div(logit_s, logit_t) + beta * loss_kd
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module_list.parameters(), 1.0)
            optimizer.step()
            history.append([loss.item(), loss_kd.item()])
        return torch.tensor(history, dtype=torch.float64)

    ours, theirs = train(True), train(False)
    assert theirs.isfinite().all() and theirs[0, 0] != theirs[-1, 0]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def vid_formula(criteria):
    """The regressors and variances of `criteria`, in the paper's formula."""

    def loss(students, teachers):
        layers = zip(criteria, students, teachers, strict=True)
        return sum(oracles.VID(s, t, weights=dict(criterion.named_parameters())) for criterion, s, t in layers)

    return loss


def crd_formula(criterion):
    """The embeddings of `criterion`, and from its banks on banks and Z of one's own."""
    banks, constants = [criterion.bank_student.clone(), criterion.bank_teacher.clone()], []

    def loss(f_s, f_t, index, contrast_index):
        anchors = F.normalize(criterion.embed_s(f_s)), F.normalize(criterion.embed_t(f_t))
        if not constants:
            pairs = zip(anchors, reversed(banks), strict=True)
            constants.extend(oracles.nce_constant(a.detach(), bank, contrast_index) for a, bank in pairs)
        value = oracles.nce(*anchors, *banks, contrast_index, *constants)
        banks[:] = [oracles.update_bank(bank, a.detach(), index) for bank, a in zip(banks, anchors, strict=True)]
        return value

    return loss


@pytest.mark.parametrize(("distill", "beta"), [("vid", 1), ("crd", 0.8)])
def test_student_loop_of_repdistiller_trains_the_criterion(distill, beta):
    """Criteria with parameters, which the script trains with the student's: all losses of four steps to 1e-6."""
    torch.manual_seed(1)
    images = torch.randn(4, 6, 3, 8, 8, dtype=torch.float64)
    labels, index = torch.randint(10, (4, 6)), torch.arange(24).view(4, 6) % 12  # the data set twice
    contrast_index = torch.cat([index[:, :, None], torch.randint(12, (4, 6, 7))], 2)
    opt = types.SimpleNamespace(s_dim=8, t_dim=16, feat_dim=5, n_data=12, nce_k=7, nce_t=0.07, nce_m=0.5)

    def train(ours):
        torch.manual_seed(2)
        student, teacher = Network(4, 6, 8).double(), Network(8, 12, 16).double().eval()
        if distill == "vid":
            criterion_kd = nn.ModuleList(repdistiller.VIDLoss(c, 2 * c, 2 * c) for c in (6, 8)).double()
            trainable = [student, criterion_kd]
        else:
            criterion_kd = repdistiller.CRDLoss(opt).double()
            trainable = [student, criterion_kd.embed_s, criterion_kd.embed_t]
        formula = None if ours else {"vid": vid_formula, "crd": crd_formula}[distill](criterion_kd)
        optimizer = torch.optim.SGD(nn.ModuleList(trainable).parameters(), lr=0.05, momentum=0.9)
        history = []
        for x, y, *indices in zip(images, labels, index, contrast_index, strict=True):
            feat_s, logit_s = student(x, is_feat=True)
            with torch.no_grad():
                feat_t, logit_t = teacher(x, is_feat=True)
            if distill == "crd":
                loss_kd = (formula or criterion_kd)(feat_s[-1], feat_t[-1], *indices)
            elif ours:
                loss_kd = sum(c(s, t) for s, t, c in zip(feat_s[1:-1], feat_t[1:-1], criterion_kd, strict=True))
            else:
                loss_kd = formula(feat_s[1:-1], feat_t[1:-1])
            loss = F.cross_entropy(logit_s, y) + repdistiller.DistillKL(4)(logit_s, logit_t) + beta * loss_kd
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append([loss.item(), loss_kd.item()])
        return torch.tensor(history, dtype=torch.float64)

    ours, theirs = train(True), train(False)
    assert theirs.isfinite().all() and theirs[0, 1] != theirs[-1, 1]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


# ---- the pages about it ----------------------------------------------------------------------------------------------
def test_crd_of_mdistillers_page():
    """Its class in the place of mdistiller's, and what mdistiller has saved."""
    page = Path(__file__).parent.parent / "docs/migrating-from-mdistiller.md"
    if not page.exists():
        pytest.skip("needs the source tree")
    (code,) = [x for x in re.findall("```python\n(.*?)```", page.read_text(), re.DOTALL) if "class FastCRD" in x]

    class Distiller(nn.Module):
        def get_learnable_parameters(self):
            return list(self.student.parameters())

    class CRD(Distiller):  # as far as the page's class is concerned
        def __init__(self, student):
            super().__init__()
            self.student = student
            self.init_crd_modules(6, 4, 5, 12, 7, 0.5, 0.1)

    modules = {
        name: types.ModuleType(name) for name in ("mdistiller", "mdistiller.distillers", "mdistiller.distillers.CRD")
    }
    modules["mdistiller.distillers"].distiller_dict = {"CRD": CRD}
    modules["mdistiller.distillers.CRD"].CRD = CRD
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        exec(code, {})
    distiller = modules["mdistiller.distillers"].distiller_dict["CRD"](nn.Linear(3, 6))
    x, y, index = torch.randn(4, 6, requires_grad=True), torch.randn(4, 4), torch.arange(4)
    contrast_index = torch.cat([index[:, None], torch.randint(12, (4, 7))], 1)
    distiller.crd_loss(x, y, index, contrast_index).backward()
    parameters = distiller.get_learnable_parameters()
    assert len(parameters) == 6 and all(p.grad is not None for p in parameters[2:])
    assert distiller.get_extra_parameters() == 5 * 7 + 5 * 5 + 2 * 12 * 5
    crd = distiller.crd
    assert (crd.negatives, crd.momentum, crd.temperature, crd.n_data, crd.feature_dim) == (7, 0.5, 0.1, 12, 5)
    layers = {
        f"embed_{s}.linear.{part}": torch.randn_like(getattr(layer, part))
        for s, layer in (("s", crd.embed_student), ("t", crd.embed_teacher))
        for part in ("weight", "bias")
    }
    banks = {f"contrast.memory_v{i}": torch.randn(12, 5) for i in (1, 2)}
    params = {"contrast.params": torch.tensor([7, 0.1, 30.0, 40.0, 0.5])}
    kdfast.load_repdistiller_crd(crd, {"student.weight": torch.ones(6, 3), **layers, **banks, **params})
    assert torch.equal(crd.bank_teacher, banks["contrast.memory_v2"]) and crd.z_teacher == 40
    assert torch.equal(crd.embed_student.bias, layers["embed_s.linear.bias"])


@pytest.mark.parametrize("library", ["repdistiller", "mdistiller", "torchdistill"])
def test_page_names_every_loss(library, request):
    page = Path(__file__).parent.parent / f"docs/migrating-from-{library}.md"
    if not page.exists():
        pytest.skip("needs the source tree")
    names = set(re.findall(r"\w+", page.read_text()))
    module = (
        importlib.import_module(f"kdfast.compat.{library}")
        if library != "torchdistill"
        else request.getfixturevalue(library)
    )
    assert not set(module.__all__) - names


YAML = Path(__file__).with_name("torchdistill.yaml")
TERMS = re.findall(r"^ {8}(\w+):$", YAML.read_text(), flags=re.MULTILINE)


@pytest.fixture
def float64():
    """Whatever is made without a type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("term", TERMS)
def test_yaml_of_torchdistill(term, tmp_path):
    """The real torchdistill trains with our keys as with its own: the losses of three steps, one term at a time."""
    pytest.importorskip("torchdistill.core.distillation", reason="torchdistill is not installed", exc_type=ImportError)
    import torchdistill.losses.mid_level  # noqa: F401  registers the originals
    import torchdistill.models.wrapper  # noqa: F401
    from torchdistill.common.main_util import import_dependencies
    from torchdistill.common.yaml_util import load_yaml_file
    from torchdistill.core.distillation import get_distillation_box

    class Toy(torch.utils.data.Dataset):
        classes = range(4)
        targets = [i % 4 for i in range(24)]
        images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))

        def __len__(self):
            return 24

        def __getitem__(self, index):
            return self.images[index], self.targets[index]

    def network():
        layers = dict(
            layer1=nn.Conv2d(3, 6, 3, padding=1),
            relu=nn.ReLU(),
            layer2=nn.Conv2d(6, 12, 3, 2, padding=1),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(12, 4),
        )
        model = nn.Sequential()
        for name, layer in layers.items():
            model.add_module(name, layer)
        return model

    def train(text):
        torch.manual_seed(3)
        np.random.seed(3)
        file = tmp_path / "config.yaml"
        file.write_text(text)
        config = load_yaml_file(str(file))
        import_dependencies(config.get("dependencies"))
        terms = config["train"]["criterion"]["kwargs"]["sub_terms"]
        config["train"]["criterion"]["kwargs"]["sub_terms"] = {term: terms[term]}
        networks = network().eval(), network()
        box = get_distillation_box(
            *networks, {"toy/train": Toy()}, config["train"], torch.device("cpu"), None, False, 1.0
        )
        criterion = box.criterion.term_dict[term][0].double()
        if term == "crd":  # each draws its own
            ours = isinstance(criterion, kdfast.CRD)
            for side, name in ((0, "bank_student"), (1, "bank_teacher")):
                rows = getattr(criterion, name if ours else f"memory_v{side + 1}")
                rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(side)))
        history = []
        for images, targets, supplement in box.train_data_loader:
            loss = box.forward_process(images, targets, supplement)
            box.post_forward_process(loss=loss)
            history.append(loss.item())
        return type(criterion).__module__, torch.tensor(history, dtype=torch.float64)

    text = YAML.read_text()
    before = re.sub("dependencies:\n.*\n", "", text).replace("'kdfast.", "'")
    (module, ours), (original, theirs) = train(text), train(before)
    assert module.startswith("kdfast.") and original.startswith("torchdistill.")
    assert len(ours) == 3 and theirs.isfinite().all() and theirs[0] != theirs[2]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
