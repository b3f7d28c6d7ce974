"""Losses under other libraries' names: the originals' numbers, what they return, and the loops they are used in."""

import contextlib
import functools
import importlib
import inspect
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
from official import GOLDEN, Official, every_file, files
from torch import nn
from torch.nn import functional as F

import kdfast
from kdfast.compat import _original, mdistiller, repdistiller
from kdfast.compat._kdsvd import _RightSingularVectors
from kdfast.ops.pool import max_pool

# The kernels have tests of their own: here they are only called.
everywhere = pytest.mark.parametrize("implementation", ["fallback", "cpu", "cuda"], indirect=True)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=0)


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


@pytest.fixture
def loss_of(torchdistill):
    """ "repdistiller.PKT" -> the class or function."""
    modules = {"repdistiller": repdistiller, "mdistiller": mdistiller, "torchdistill": torchdistill}

    def get(name):
        module, name = name.split(".")
        return getattr(modules[module], name)

    return get


# ---- inputs ----------------------------------------------------------------------------------------------------------
def embeddings(seed, batch=5, width=6):
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps(seed, channels=(4, 6, 5), size=6):
    """Of one list of layers, at least 0."""
    numbers = torch.Generator().manual_seed(seed)
    shapes = [(3, c, size, size) for c in channels]
    return [torch.rand(shape, generator=numbers, dtype=torch.float64) for shape in shapes]


# ---- losses of torchdistill read what modules put out ----------------------------------------------------------------
PAIR = {"student": ("s", 0), "teacher": ("t", 0)}  # the roles of a pair: the network, and which of consecutive layers
FLOW = {f"{who}_{which}": (who[0], i) for who in ("student", "teacher") for i, which in enumerate(("first", "second"))}


def pairs_of(*weights, roles=PAIR):
    """Pairs of the modules s0, t0, of s1, t1 and so on, with these weights."""
    step = len(roles) // 2
    return {
        f"pair{i}": {
            **{role: {"io": "output", "path": f"{side}{step * i + j}"} for role, (side, j) in roles.items()},
            "weight": weight,
        }
        for i, weight in enumerate(weights)
    }


def named(student, teacher):
    """The outputs of modules s0, s1 and so on; "s" is the first of them and "other s" the last, and t of a teacher."""
    sides = []
    for side, x in (("s", student), ("t", teacher)):
        several = {f"{side}{i}": {"output": y} for i, y in enumerate(x)}
        sides.append({side: {"output": x[0]}, f"other {side}": {"output": x[-1]}, **several})
    return sides


def of_modules(loss, student, teacher, targets=None):
    """The loss of one output of each network."""
    return loss(*named([student], [teacher]), targets)


PATHS = {
    **{f"{who}_{what}_path": who[0] for who in ("student", "teacher") for what in ("module", "output", "linear")},
    "translator_path": "s",
    "paraphraser_path": "t",
}
KERNEL = {"type": "gaussian", "gamma": 0.1, "max_p": 2}
ARGUMENTS = {  # what an argument without a default gets
    **dict.fromkeys(("student_module_io", "teacher_module_io"), "output"),
    "at_pairs": pairs_of(1),
    "feature_pairs": pairs_of(1),
    "fsp_pairs": pairs_of(1, roles=FLOW),
    "kernel_config": KERNEL,
    "temperature": 4.0,
    "dist_factor": 1,
    "angle_factor": 2,
    "margin": 1.0,
    "reduction": "mean",
    "feat_num": 3,
    "s_shapes": [],
    "t_shapes": [],
}


def made(cls, **arguments):
    """A loss with these arguments, torchdistill's of the modules "s" and "t" unless it is told others."""
    if cls is repdistiller.CRDLoss:
        return crd_of_repdistiller(**arguments)
    taken = inspect.signature(cls.__init__).parameters.values()
    needed = {p.name: ARGUMENTS[p.name] for p in taken if p.default is p.empty and p.name in ARGUMENTS}
    return cls(**needed | {p.name: PATHS[p.name] for p in taken if p.name in PATHS} | arguments)


def crd_options(**changed):
    """RepDistiller's `opt`."""
    sizes = {"s_dim": 6, "t_dim": 6, "feat_dim": 5, "n_data": 12, "nce_k": 7, "nce_t": 0.07, "nce_m": 0.5}
    return types.SimpleNamespace(**sizes | changed)


def crd_of_repdistiller(temperature=0.07, momentum=0.5, negatives=7, **arguments):
    torch.manual_seed(0)
    return repdistiller.CRDLoss(crd_options(nce_k=negatives, nce_t=temperature, nce_m=momentum), **arguments)


def crd_of_torchdistill(torchdistill, **arguments):
    sizes = dict(input_size=5, output_size=12, num_negative_samples=7, num_samples=12)
    return torchdistill.CRDLoss("norm", "empty", "norm", **sizes | arguments)


# ---- the numbers of the originals ------------------------------------------------------------------------------------
def of_pairs(cls, students, teachers, weights, **arguments):
    pairs = next(p for p in inspect.signature(cls.__init__).parameters if p.endswith("_pairs"))
    roles = FLOW if pairs == "fsp_pairs" else PAIR
    return made(cls, **{pairs: pairs_of(*weights, roles=roles)}, **arguments)(*named(students, teachers))


def regressor_of(x):
    """VID's, of a file's weights."""
    return lambda maps: F.conv2d(F.conv2d(F.conv2d(maps, x("w1")).relu(), x("w2")).relu(), x("w3"))


def vid_loss(c, p, x):
    vid = c(x("s").shape[1], x("w1").shape[0], x("t").shape[1], eps=p["eps"])
    weights = {f"regressor.{layer}.weight": x(f"w{i}") for i, layer in enumerate((0, 2, 4), 1)}
    return torch.func.functional_call(vid, {**weights, "log_scale": x("log_scale")}, (x("s"), x("t")))


def vid_of_modules(c, p, x):
    s, t = (y.to(x.dtype) for y in oracles._to_smaller_square(x("s"), x("t")))
    variance = x("log_scale").exp().log1p().view(1, -1, 1, 1) + p["eps"]
    return of_pairs(c, [(regressor_of(x)(s), variance)], [t], [1])


def kd_of_modules(c, p, x):
    names = ("temperature", "alpha", "beta", "reduction")
    loss = made(c, **{name: p[name] for name in names})
    return of_modules(loss, x("s"), x("t"), x("y") if p["use_targets"] else None)


def context_of_modules(c, p, x):
    return sum(of_modules(made(c), (s, None), t) for s, t in zip(x("s*"), x("t*"), strict=True))


# Each of our names, the golden files, and the call: of the class or function c, the file's parameters p and inputs x.
CASES = [
    ("repdistiller.DistillKL", "kd_distillkl", lambda c, p, x: c(p["T"])(x("s"), x("t"))),
    ("repdistiller.HintLoss", "hint", lambda c, p, x: c()(x("s"), x("t"))),
    ("repdistiller.Attention", "at_rep", lambda c, p, x: c(p["p"])(x("s*"), x("t*"))),
    ("repdistiller.Similarity", "sp_rep", lambda c, p, x: c()(x("s*"), x("t*"))),
    ("repdistiller.Correlation", "cc_rep", lambda c, p, x: c()(x("s"), x("t"))),
    ("repdistiller.VIDLoss", "vid_rep", vid_loss),
    ("repdistiller.RKDLoss", "rkd_repdistiller", lambda c, p, x: c(p["w_d"], p["w_a"])(x("student"), x("teacher"))),
    ("repdistiller.PKT", "pkt", lambda c, p, x: c.cosine_similarity_loss(x("s"), x("t"), p["eps"])),
    ("repdistiller.ABLoss", "ab_rep", lambda c, p, x: c(p["feat_num"], p["margin"])(x("s*"), x("t*"))),
    ("repdistiller.FactorTransfer", "ft_rep", lambda c, p, x: c(p["p1"], p["p2"])(x("s"), x("t"))),
    ("repdistiller.FSP", "fsp_rep", lambda c, p, x: c(shapes(x("s*")), shapes(x("t*")))(x("s*"), x("t*"))),
    ("repdistiller.NSTLoss", "nst_rep", lambda c, p, x: c()(x("s*"), x("t*"))),
    ("mdistiller.kd_loss", "kd_distillkl", lambda c, p, x: c(x("s"), x("t"), p["T"])),
    ("mdistiller.dkd_loss", "dkd", lambda c, p, x: c(x("s"), x("t"), x("y"), p["alpha"], p["beta"], p["temperature"])),
    ("mdistiller.at_loss", "at_rep", lambda c, p, x: c(x("s*"), x("t*"), p["p"])),
    ("mdistiller.nst_loss", "nst_rep", lambda c, p, x: c(x("s*"), x("t*"))),
    ("mdistiller.pkt_loss", "pkt", lambda c, p, x: c(x("s"), x("t"), p["eps"])),
    ("mdistiller.sp_loss", "sp_rep", lambda c, p, x: c(x("s*"), x("t*"))),
    ("mdistiller.rkd_loss", "rkd_mdistiller", lambda c, p, x: c(x("student"), x("teacher"), **p)),
    ("mdistiller.vid_loss", "vid_rep", lambda c, p, x: c(regressor_of(x), x("log_scale"), x("s"), x("t"), p["eps"])),
    ("mdistiller.hcl_loss", "hcl", lambda c, p, x: c(x("s*"), x("t*"))),
    ("mdistiller.feat_loss", "ofd_mdistiller", lambda c, p, x: c(x("s"), x("t"), x("margin"))),
    ("torchdistill.KDLoss", "kd_torchdistill", kd_of_modules),
    ("torchdistill.FSPLoss", "fsp_torchdistill", lambda c, p, x: of_pairs(c, x("s*"), x("t*"), p["weights"])),
    ("torchdistill.ATLoss", "at_official", lambda c, p, x: of_pairs(c, x("s*"), x("t*"), [1] * len(x("s*")))),
    (
        "torchdistill.ATLoss",
        "at_torchdistill_paper",
        lambda c, p, x: of_pairs(c, x("s*"), x("t*"), p["weights"], mode="paper"),
    ),
    ("torchdistill.PKTLoss", "pkt", lambda c, p, x: of_modules(made(c, eps=p["eps"]), x("s"), x("t"))),
    ("torchdistill.FTLoss", "ft_torchdistill", lambda c, p, x: of_modules(made(c, **p), x("s"), x("t"))),
    (
        "torchdistill.AltActTransferLoss",
        "ab_official",
        lambda c, p, x: of_pairs(c, [x("s")], [x("t")], [1], margin=p["margin"], reduction="sum"),
    ),
    ("torchdistill.RKDLoss", "rkd_torchdistill", lambda c, p, x: of_modules(made(c, **p), x("student"), x("teacher"))),
    ("torchdistill.VIDLoss", "vid_rep", vid_of_modules),
    ("torchdistill.CCKDLoss", "cc_torchdistill_gaussian", lambda c, p, x: of_modules(made(c, **p), x("s"), x("t"))),
    ("torchdistill.CCKDLoss", "cc_torchdistill_bilinear", lambda c, p, x: of_modules(made(c, **p), x("s"), x("t"))),
    ("torchdistill.SPKDLoss", "sp_torchdistill", lambda c, p, x: of_modules(made(c, **p), x("s"), x("t"))),
    ("torchdistill.HierarchicalContextLoss", "hcl", context_of_modules),
    ("torchdistill.DISTLoss", "dist_torchdistill", lambda c, p, x: of_modules(made(c, **p), x("s"), x("t"))),
]
FILES = [
    pytest.param(name, path, call, id=f"{name}-{path.stem}") for name, golden, call in CASES for path in files(golden)
]
SOFTMAX = re.compile("(kd|dkd|dist)_")  # see tests/test_papers.py
LISTS = ("at_rep", "sp_rep", "nst_rep", "fsp_rep", "ab_rep")  # of which repdistiller returns one loss for each layer


def shapes(maps):
    return [x.shape for x in maps]


@everywhere
@pytest.mark.parametrize(("name", "path", "call"), FILES)
@every_dtype
def test_matches_the_original(implementation, name, path, call, dtype, loss_of):
    x = Official(path, dtype, implementation.device)
    losses = call(loss_of(name), x.parameters, x)
    want = x["loss"]
    if name.startswith("repdistiller") and x.name in LISTS:
        assert isinstance(losses, list) and len(losses) == len(want)
    else:
        losses, want = [losses], [want.sum()]
    temperature = max([1.0, *(v for k, v in x.parameters.items() if k in ("T", "temperature", "tau"))])
    floor = 2e-7 * temperature**2 if SOFTMAX.match(x.name) else 0.0
    for loss, expected in zip(losses, want, strict=True):
        assert loss.shape == ((1,) if x.name == "sp_rep" else ()) and loss.dtype == dtype
        x.assert_close("loss", loss.view(()), expected, x.of_type(1e-9, 2e-5), x.of_type(1e-13, floor))
    for name, grad in x.gradients(sum(losses).sum()).items():
        floor_of_grad = x.of_type(1e-13, floor / temperature / 10)
        x.assert_close(name, grad, f"grad_{name}", x.of_type(1e-8, 2e-5), floor_of_grad)


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
@every_file("crd_full")
def test_crd_of_repdistiller(implementation, path):
    """Two modules of embeddings to train, a loss of shape (1,), and the banks after the step."""
    x = Official(path, device=implementation.device)
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
    x.assert_close("loss", value.view(()), x["loss"].sum(), 1e-9, 1e-13)
    value.backward()
    for name, leaf in {"f_s": x("f_s"), "f_t": x("f_t"), **weights}.items():
        x.assert_close(name, leaf.grad, f"grad_{name}", 1e-8, 1e-13)
    x.assert_close("bank", loss.bank_student, "state_after_memory_v1", 1e-9, 1e-13)
    x.assert_close("bank", loss.bank_teacher, "state_after_memory_v2", 1e-9, 1e-13)
    assert loss(x("f_s"), x("f_t"), x("idx")).shape == (1,)  # draws its own negatives


@everywhere
@every_file("crd_memory")
def test_crd_of_torchdistill(implementation, torchdistill, path):
    """Of embeddings that are ready made: RepDistiller's memory and contrast alone, two steps."""
    x = Official(path, device=implementation.device)
    p = x.parameters
    sizes = dict(input_size=p["feat_dim"], output_size=p["n_data"], num_samples=p["n_data"])
    settings = dict(num_negative_samples=p["K"], temperature=p["T"], momentum=p["momentum"])
    loss = crd_of_torchdistill(torchdistill, **sizes, **settings).double()  # on the CPU still
    assert not list(loss.parameters())
    loss.bank_student.copy_(x("memory_v1"))
    loss.bank_teacher.copy_(x("memory_v2"))
    supplement = {"pos_idx": x("idx").cpu(), "contrast_idx": x("contrast_idx").cpu()}
    student = {"norm": {"output": x("f_s")}, "empty": {"input": supplement}}
    teacher = {"norm": {"output": x("f_t")}}
    value = loss(student, teacher)
    assert value.shape == (1,)
    x.assert_close("loss", value.view(()), "loss", 1e-9, 1e-13)
    value.backward()
    for name in ("f_s", "f_t"):
        x.assert_close(name, x(name).grad, f"grad_{name}", 1e-8, 1e-13)
    x.assert_close("bank", loss.bank_student, "state_after_memory_v1", 1e-9, 1e-13)
    step2 = loss(student, teacher)
    x.assert_close("step 2", step2, x["out_step2_loss_s"] + x["out_step2_loss_t"], 1e-9, 1e-13)
    x.assert_close("bank", loss.bank_teacher, "state_after_step2_memory_v2", 1e-9, 1e-13)
    del supplement["contrast_idx"]
    assert loss(student, teacher).isfinite().all()


# ---- KDSVD, whose original has no definite signs ---------------------------------------------------------------------
@every_file("kdsvd_rep")
@every_dtype
def test_kdsvd_of_repdistiller(path, dtype):
    """The file has each sample's loss for every choice of signs of the teacher's vectors: ours is the rule's choice."""
    x = Official(path, dtype)
    students, teachers = x("s*"), x("t*")
    rows = len(students[0])
    signs = []  # of the file's vectors, to have the entry of largest magnitude positive [layer, sample, k]
    for layer in range(len(teachers)):
        v = x[f"teacherV{layer}"]
        signs.append(v.gather(1, v.abs().argmax(1, keepdim=True))[:, 0].sign())
    patterns = x["sign_patterns"]
    signs = torch.stack(signs, 1)  # [sample, layer, k]
    signs = signs * signs[:, :1]  # where a vector's sign changes in all layers the loss is the same
    chosen = [int((patterns == signs[b]).flatten(1).all(1).nonzero()) for b in range(rows)]
    students = [s.requires_grad_() for s in students]
    losses = repdistiller.KDSVD(x.parameters["k"])(students, teachers)
    want = sum(x["loss_signs"][c, b] for b, c in enumerate(chosen)) / rows
    assert isinstance(losses, list) and len(losses) == len(want)
    for loss, expected in zip(losses, want, strict=True):
        assert loss.shape == () and loss.dtype == dtype
        x.assert_close("loss", loss, expected, x.of_type(1e-9, 2e-5), x.of_type(1e-13, 0.0))
    for layer, grad in enumerate(torch.autograd.grad(sum(losses), students)):
        expected = torch.stack([x[f"gradsigns_s{layer}"][c, b] for b, c in enumerate(chosen)])
        # Over gaps of squared singular values, which cancel.
        x.assert_close(f"gradient {layer}", grad, expected, x.of_type(1e-7, 2e-3))


def test_kdsvd_is_the_same_for_all_signs_and_orders():
    """The loss does not know in which of its many forms the SVD came: -x has the vectors of x, and rows may move."""
    students, teachers = ([torch.randn(3, c, 5, 5).double() for c in (6, 8)] for _ in range(2))
    kdsvd = repdistiller.KDSVD(2)
    (want,) = kdsvd(students, teachers)
    others = [-students[0], students[1].flip(2)], [teachers[0].flip(3), -teachers[1]]
    assert_close(kdsvd(*others)[0], want)


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
        assert_close(got, naive(students, teachers, k))


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
            assert_close(got, want)


@pytest.mark.parametrize("p2", [1, 2, 3])
def test_factor_transfer_powers(p2):
    student, teacher = torch.randn(3, 4, 6, 6).double(), torch.randn(3, 5, 4, 4).double()
    maps = [F.normalize(x.pow(3).mean(1).flatten(1)) for x in (F.adaptive_avg_pool2d(student, 4), teacher)]
    gap = maps[0] - maps[1]
    want = gap.abs().mean() if p2 == 1 else gap.pow(p2).mean()
    assert_close(repdistiller.FactorTransfer(3, p2)(student, teacher), want)


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
    loss = made(torchdistill.KDLoss, temperature=3.0, alpha=0.3, beta=0.5, reduction=reduction, **options)
    assert_close(of_modules(loss, student, teacher, targets), 0.3 * hard + 0.5 * 9 * soft)
    assert_close(of_modules(loss, student, teacher), soft)
    loss = made(torchdistill.KDLoss, temperature=3.0, reduction=reduction)
    assert_close(of_modules(loss, student, teacher, targets), soft)


def test_other_settings_of_torchdistill(torchdistill):
    """Those that no file has: p-norms, levels and sums, and a factor that is left out."""
    student, teacher = (torch.randn(4, 3, 6, 6).double() for _ in range(2))
    units = [F.normalize(x.flatten(1)) for x in (student, teacher)]
    norms = torch.linalg.vector_norm(units[0] - units[1], 3, dim=1)
    for reduction, want in (("mean", norms.mean()), ("sum", norms.sum())):
        loss = made(torchdistill.FTLoss, p=3, reduction=reduction)
        assert_close(of_modules(loss, student, teacher), want)
    for reduction in ("mean", "sum"):
        pairs = [[F.adaptive_avg_pool2d(x, n) for x in (student, teacher)] for n in (6, 5, 3)]
        errors = [F.mse_loss(*pair, reduction=reduction) for pair in pairs]
        loss = made(torchdistill.HierarchicalContextLoss, reduction=reduction, output_sizes=[5, 7, 3])
        want = (errors[0] + errors[1] / 2 + errors[2] / 4) / 1.75
        assert_close(of_modules(loss, (student, None), teacher), want)
    loss = made(torchdistill.RKDLoss, dist_factor=None, angle_factor=2.0)
    torch.testing.assert_close(of_modules(loss, student, teacher), 2 * kdfast.RKDAngle()(student, teacher))
    loss = made(torchdistill.AltActTransferLoss)
    torch.testing.assert_close(of_modules(loss, student, teacher), kdfast.AB(1.0, "mean")(student, teacher))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *(("FTLoss", {"p": p}) for p in (1, 2, 3)),
        ("CCKDLoss", {"kernel_config": KERNEL | {"gamma": 0.4}, "reduction": "batchmean"}),
        ("SPKDLoss", {"reduction": "batchmean"}),
        ("ATLoss", {"mode": "paper"}),
        ("FSPLoss", {}),
    ],
)
def test_equal_networks_have_a_finite_gradient(torchdistill, name, arguments):
    """Norms are taken of zeros, and of a sample that is all zeros."""
    x = torch.randn(3, 4, 5, 5)
    x[0] = 0
    if name in ("CCKDLoss", "SPKDLoss"):
        x = x.flatten(1)
    student = x.clone().requires_grad_()
    value = made(getattr(torchdistill, name), **arguments)(*named([student, student], [x, x]))
    assert value.item() == 0
    (grad,) = torch.autograd.grad(value, student)
    assert grad.isfinite().all() and grad.abs().max() <= 1


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *(("FTLoss", {"p": p}) for p in (2, 3)),
        ("CCKDLoss", {"reduction": "batchmean"}),
        ("SPKDLoss", {"reduction": "batchmean"}),
        ("ATLoss", {"mode": "paper"}),
        ("FSPLoss", {}),
        ("DISTLoss", {}),
        ("HierarchicalContextLoss", {"reduction": "sum"}),
        ("RKDLoss", {"angle_factor": 0, "reduction": "none"}),
    ],
)
def test_nan_stays_in_plain_pytorch(torchdistill, name, arguments):
    """A sample that is NaN makes the loss NaN, and its gradient."""
    student, teacher = maps(0, (4, 4)), maps(1, (4, 4))
    if name in ("CCKDLoss", "SPKDLoss", "DISTLoss", "RKDLoss"):
        student, teacher = ([embeddings(seed), embeddings(seed + 1)] for seed in (0, 2))
    student[0][0] = float("nan")
    student[0].requires_grad_()
    sides = named(student, teacher)
    if name == "HierarchicalContextLoss":
        sides[0]["s"]["output"] = (student[0], None)
    value = made(getattr(torchdistill, name), **arguments)(*sides).sum()
    assert value.isnan()
    value.backward()
    assert student[0].grad[0].isnan().any()


# What is refused, and what the message says: of torchdistill's losses td.
MAPS = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)]
REFUSED = [
    (lambda td: repdistiller.Attention()([], []), ValueError, "as many layers.*got 0 and 0"),
    (lambda td: repdistiller.Attention("2"), TypeError, "p must be a number, got str"),
    (lambda td: repdistiller.Attention(0), ValueError, "p must be finite and above 0, got 0"),
    (lambda td: mdistiller.at_loss(MAPS, MAPS, -1.5), ValueError, "p must be finite and above 0, got -1.5"),
    (lambda td: repdistiller.ABLoss("2"), TypeError, "feat_num"),
    (lambda td: repdistiller.FSP(shapes(MAPS), shapes(MAPS[::-1])), ValueError, r"\[3, 5\].*\[5, 3\]"),
    (lambda td: repdistiller.KDSVD()(MAPS, MAPS[::-1]), ValueError, r"teacher\[0\].*3 entries, got 5"),
    (lambda td: repdistiller.KDSVD(0), ValueError, "k must be at least 1"),
    (lambda td: repdistiller.FactorTransfer(2, 1.5), ValueError, "p2 must be a whole number.*got 1.5"),
    (lambda td: repdistiller.Correlation()(torch.ones(2, 3), torch.ones(2, 4)), ValueError, "f_t.*f_s"),
    (lambda td: mdistiller.kdsvd_loss(MAPS[:1], MAPS[:1], 1), ValueError, "at least two layers"),
    (lambda td: mdistiller.rkd_loss(torch.ones(2, 3), torch.ones(2, 3), eps=0.0), ValueError, "eps"),
    (lambda td: made(td.KDLoss, alpha=0.5, reduction="other"), ValueError, "reduction"),
    (lambda td: made(td.ATLoss, mode="other"), ValueError, "mode"),
    (lambda td: made(td.ATLoss, at_pairs={}), ValueError, "at least one pair"),
    (lambda td: made(td.CCKDLoss, kernel_config={"type": "cubic"}), ValueError, "kernel_config"),
    (lambda td: of_pairs(td.VIDLoss, [(MAPS[0], torch.ones(4))], [MAPS[0]], [1]), ValueError, "variance"),
    (lambda td: made(td.RKDLoss, reduction="other"), ValueError, "reduction"),
    (lambda td: crd_of_torchdistill(td, num_samples=1), ValueError, "num_samples"),
    (lambda td: crd_of_torchdistill(td, eps=1e-6), ValueError, "eps"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refuses(torchdistill, call, error, message):
    with pytest.raises(error, match=message):
        call(torchdistill)


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
def of_lists(loss):
    return sum(loss([x - 0.5 for x in maps(0)], [x - 0.5 for x in maps(1)]))


def of_like_lists(loss):
    """As `of_lists`, with as many channels in both networks."""
    return sum(loss(maps(0), [x - 0.5 for x in maps(2)]))


def of_positive_lists(loss):
    return sum(loss(maps(0), maps(1)))


def of_first_layers(loss):
    (value,) = loss([maps(0)[0] - 0.5], [maps(1)[0] - 0.5])
    return value


def of_rows(loss):
    return loss(embeddings(0), embeddings(1))


def of_maps(loss):
    return loss(maps(0)[0], maps(1)[1])


def of_two_steps(loss):
    """CRD's second loss, of the banks that the first has moved; the negatives are drawn."""
    x, y, index = embeddings(0).float(), embeddings(1).float(), torch.arange(5)
    return loss(x, y, index) + loss(y, x, index)


def of_named_maps(loss):
    return loss(*named(maps(0), [x - 0.5 for x in maps(2)]))


def of_named_rows(loss):
    return loss(*named([embeddings(0), embeddings(2)], [embeddings(1), embeddings(3)]), torch.arange(5))


def of_named_pair(loss):
    return of_modules(loss, (maps(0)[0], None), maps(2)[0])


def of_others(kind):
    """Paths of other modules."""
    return {f"student_{kind}_path": "other s", f"teacher_{kind}_path": "other t"}


def one_by_one(table):
    """The parameters of rows (loss, arguments, call, {name: value}), a name at a time."""
    return [
        pytest.param(loss, arguments, call, name, value, id=f"{loss}-{name}")
        for loss, arguments, call, values in table
        for name, value in values.items()
    ]


# A loss, its arguments, a call, and the second values of attributes.
ATTRIBUTES = [
    ("repdistiller.DistillKL", {"T": 4.0}, of_rows, {"T": 1.0}),
    ("repdistiller.Attention", {}, of_lists, {"p": 3}),
    ("repdistiller.RKDLoss", {}, of_rows, {"w_d": 3.0, "w_a": 3.0}),
    ("repdistiller.ABLoss", {"feat_num": 1}, of_first_layers, {"margin": 2.0}),
    ("repdistiller.FactorTransfer", {}, of_maps, {"p1": 1.5, "p2": 2}),
    ("repdistiller.KDSVD", {}, of_positive_lists, {"k": 2}),
    ("repdistiller.CRDLoss", {}, of_two_steps, {"temperature": 0.5, "momentum": 0.9, "negatives": 3}),
    ("torchdistill.KDLoss", {"alpha": 0.3}, of_named_rows, {"temperature": 1.0}),
    ("torchdistill.KDLoss", {"alpha": 0.3, "beta": 0.7}, of_named_rows, {"alpha": 0.9, "beta": 0.1}),
    ("torchdistill.KDLoss", {}, of_named_rows, {"reduction": "sum"}),
    ("torchdistill.FSPLoss", {}, of_named_maps, {"fsp_pairs": pairs_of(2, roles=FLOW)}),
    ("torchdistill.ATLoss", {"at_pairs": pairs_of(1, 2)}, of_named_maps, {"at_pairs": pairs_of(3, 1), "mode": "paper"}),
    ("torchdistill.PKTLoss", {}, of_named_rows, {"eps": 1e-2}),
    ("torchdistill.FTLoss", {}, of_named_maps, {"norm_p": 3}),
    ("torchdistill.FTLoss", {"p": 2}, of_named_maps, {"reduction": "sum"}),
    ("torchdistill.FTLoss", {}, of_named_rows, {"translator_path": "other s", "paraphraser_path": "other t"}),
    (
        "torchdistill.AltActTransferLoss",
        {},
        of_named_maps,
        {"margin": 2.0, "reduction": "sum", "feature_pairs": pairs_of(2)},
    ),
    ("torchdistill.RKDLoss", {}, of_named_rows, {"dist_factor": 3, "angle_factor": 3, **of_others("output")}),
    (
        "torchdistill.CCKDLoss",
        {"reduction": "batchmean"},
        of_named_rows,
        {"gamma": 0.2, "max_p": 3, "kernel_type": "bilinear", "reduction": "sum", **of_others("linear")},
    ),
    ("torchdistill.SPKDLoss", {"reduction": "batchmean"}, of_named_rows, {"reduction": "sum", **of_others("output")}),
    ("torchdistill.HierarchicalContextLoss", {"output_sizes": [4, 2, 1]}, of_named_pair, {"output_sizes": [5, 3]}),
    ("torchdistill.DISTLoss", {}, of_named_rows, {"beta": 2.0, "gamma": 2.0, "tau": 2.0, "eps": 1.0}),
]
EACH_ATTRIBUTE = one_by_one(ATTRIBUTES)


@pytest.mark.parametrize(("name", "arguments", "call", "attribute", "second"), EACH_ATTRIBUTE)
def test_attributes_act_when_they_are_set_later(loss_of, name, arguments, call, attribute, second):
    """Set later, it is what it would have been from the start; and what is read is what was set."""
    cls = loss_of(name)
    argument = {attribute.replace("norm_p", "p"): second}
    if name == "torchdistill.CCKDLoss" and attribute in ("gamma", "max_p", "kernel_type"):
        argument = {"kernel_config": KERNEL | {attribute.removeprefix("kernel_"): second}}
    loss = made(cls, **arguments)
    before, want = call(made(cls, **arguments)), call(made(cls, **arguments | argument))
    assert (before - want).abs() > 1e-6 * want.abs()
    setattr(loss, attribute, second)
    assert getattr(loss, attribute) is second
    torch.testing.assert_close(call(loss), want, rtol=0, atol=0)


def cubes(student, teacher):
    """A loss to set in the place of another."""
    return (student - teacher).abs().pow(3).mean()


class Cubes(nn.Module):
    def forward(self, student, teacher):
        return cubes(student, teacher)


def test_modules_and_parameters_act_when_they_are_set_later():
    loss = repdistiller.HintLoss()
    torch.testing.assert_close(of_rows(loss), F.mse_loss(embeddings(0), embeddings(1)))
    loss.crit = Cubes()
    torch.testing.assert_close(of_rows(loss), cubes(embeddings(0), embeddings(1)))
    loss = repdistiller.ABLoss(1)
    loss.w = [4]
    torch.testing.assert_close(of_first_layers(loss), 4 * of_first_layers(repdistiller.ABLoss(1)))
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


def own_products(self, z):
    return F.normalize(z.flatten(1) @ z.flatten(1).mT, 1)


def own_gaussian(self, x):
    powers = ((2 * self.gamma) ** p / math.factorial(p) * (x @ x.t()) ** p for p in range(self.max_p + 1))
    return sum(powers) * math.exp(-2 * self.gamma)


def own_pearson(a, b, eps):
    return F.cosine_similarity(a - a.mean(1, True), b - b.mean(1, True), eps=eps)


def gap_of_maps(self, s, t):
    return unit_map(self, s) - unit_map(self, t)


own_attention = staticmethod(functools.partial(unit_map, None))
BILINEAR = {"kernel_config": {"type": "bilinear"}, "reduction": "sum"}
# A class, its arguments, a call, and methods with their formulas.
METHODS = [
    (
        "repdistiller.Attention",
        {},
        of_lists,
        {"at": unit_map, "at_loss": lambda self, s, t: gap_of_maps(self, s, t).square().mean()},
    ),
    (
        "repdistiller.FactorTransfer",
        {},
        of_maps,
        {"factor": unit_map, "factor_loss": lambda self, s, t: gap_of_maps(self, s, t).abs().mean()},
    ),
    ("repdistiller.FactorTransfer", {"p1": 2, "p2": 2}, of_maps, {"factor": unit_map}),
    (
        "repdistiller.Similarity",
        {},
        of_lists,
        {"similarity_loss": lambda self, s, t: (rows_of_gram(s) - rows_of_gram(t)).square().sum().view(1) / 9},
    ),
    ("repdistiller.RKDLoss", {}, of_rows, {"pdist": staticmethod(own_pdist)}),
    ("repdistiller.ABLoss", {}, of_like_lists, {"criterion_alternative_l2": own_boundary}),
    (
        "repdistiller.FSP",
        {},
        of_like_lists,
        {"compute_fsp": staticmethod(own_flow), "compute_loss": staticmethod(F.mse_loss)},
    ),
    (
        "repdistiller.NSTLoss",
        {},
        of_lists,
        {"poly_kernel": lambda self, a, b: (a[:, None] * b[:, :, None]).sum(3).square()},
    ),
    ("repdistiller.PKT", {}, of_rows, {"cosine_similarity_loss": staticmethod(lambda a, b: kdfast.PKT()(a, b))}),
    ("repdistiller.KDSVD", {"k": 2}, of_like_lists, {"svd": own_svd}),
    ("torchdistill.FSPLoss", {}, of_named_maps, {"compute_fsp_matrix": staticmethod(lambda a, b: own_flow([b, a])[0])}),
    (
        "torchdistill.ATLoss",
        {},
        of_named_maps,
        {
            "attention_transfer": own_attention,
            "compute_at_loss": lambda self, s, t: gap_of_maps(self, s, t).square().mean(),
        },
    ),
    (
        "torchdistill.ATLoss",
        {"mode": "paper"},
        of_named_maps,
        {
            "attention_transfer_paper": own_attention,
            "compute_at_loss_paper": lambda self, s, t: gap_of_maps(self, s, t).norm(dim=1).sum(),
        },
    ),
    ("torchdistill.PKTLoss", {}, of_named_rows, {"cosine_similarity_loss": lambda self, a, b: kdfast.PKT()(a, b)}),
    (
        "torchdistill.AltActTransferLoss",
        {},
        of_named_maps,
        {"compute_alt_act_transfer_loss": staticmethod(lambda s, t, margin: kdfast.AB(margin)(s, t))},
    ),
    (
        "torchdistill.RKDLoss",
        {},
        of_named_rows,
        {
            "pdist": staticmethod(own_pdist),
            "compute_rkd_distance_loss": lambda self, t, s: kdfast.RKDDistance()(s, t),
            "compute_rkd_angle_loss": lambda self, t, s: kdfast.RKDAngle()(s, t),
        },
    ),
    (
        "torchdistill.CCKDLoss",
        BILINEAR,
        of_named_rows,
        {"compute_cc_mat_by_bilinear_pool": staticmethod(lambda x: x @ x.t())},
    ),
    ("torchdistill.CCKDLoss", {"reduction": "sum"}, of_named_rows, {"compute_cc_mat_by_gaussian_rbf": own_gaussian}),
    (
        "torchdistill.SPKDLoss",
        {"reduction": "batchmean"},
        of_named_rows,
        {
            "matmul_and_normalize": own_products,
            "compute_spkd_loss": lambda self, t, s: (own_products(0, t) - own_products(0, s)).norm() ** 2,
        },
    ),
    (
        "torchdistill.DISTLoss",
        {},
        of_named_rows,
        {
            "pearson_correlation": staticmethod(own_pearson),
            "inter_class_relation": lambda self, a, b: 1 - self.pearson_correlation(a, b, self.eps).mean(),
            "intra_class_relation": lambda self, a, b: self.inter_class_relation(a.t(), b.t()),
        },
    ),
]
EACH_METHOD = one_by_one(METHODS)


@pytest.mark.parametrize(("name", "arguments", "call", "method", "formula"), EACH_METHOD)
def test_methods_of_the_originals_can_be_replaced(loss_of, name, arguments, call, method, formula):
    """Of a subclass or of one module: with the original's formula the loss is the same, with another it is another."""
    cls = loss_of(name)
    static = isinstance(formula, staticmethod)
    function = formula.__func__ if static else formula

    def other(*x, **y):
        return squares(function(*x, **y))

    want = call(made(cls, **arguments))
    kinds = [type("Own", (cls,), {method: staticmethod(f) if static else f}) for f in (function, other)]
    same, another = (call(made(kind, **arguments)) for kind in kinds)
    torch.testing.assert_close(same, want, rtol=1e-9, atol=1e-12)
    assert (another - want).abs() > 1e-6 * want.abs()
    one = made(cls, **arguments)
    setattr(one, method, other if static else functools.partial(other, one))
    torch.testing.assert_close(call(one), another, rtol=0, atol=0)


def test_modules_of_torchdistill(torchdistill):
    """Losses inside of a loss, of another kind or with other settings."""
    student, teacher = embeddings(0), embeddings(1)
    labels = torch.arange(5)
    soft = F.kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean")
    loss = made(torchdistill.KDLoss, alpha=0.3)
    for hard in (nn.CrossEntropyLoss(label_smoothing=0.2), nn.CrossEntropyLoss(reduction="sum"), nn.MultiMarginLoss()):
        loss.cross_entropy_loss = hard
        want = 0.3 * hard(student, labels) + 0.7 * 16 * soft
        assert_close(of_named_rows(loss), want)
    loss = made(torchdistill.KDLoss)
    loss.alpha = 0.3
    torch.testing.assert_close(of_named_rows(loss), 0.3 * F.cross_entropy(student, labels) + 0.7 * 16 * soft)

    angles = []
    for x in (student, teacher):
        directions = F.normalize(x[None] - x[:, None], dim=2)
        angles.append((directions @ directions.mT).flatten())
    distances = [own_pdist(x) / own_pdist(x)[own_pdist(x) > 0].mean() for x in (student, teacher)]
    loss = made(torchdistill.RKDLoss)
    for huber in (nn.SmoothL1Loss(beta=0.1), nn.SmoothL1Loss(reduction="sum"), nn.L1Loss()):
        loss.smooth_l1_loss = huber
        want = huber(*distances) + 2 * huber(*angles)
        assert_close(of_named_rows(loss), want)

    levels = [[F.adaptive_avg_pool2d(x, n) for x in (maps(0)[0], maps(2)[0])] for n in (6, 4, 2, 1)]
    loss = made(torchdistill.HierarchicalContextLoss)
    for criteria in (nn.MSELoss(reduction="sum"), nn.L1Loss()):
        loss.criteria = criteria
        want = sum(0.5**k * criteria(*level) for k, level in enumerate(levels)) / 1.875
        assert_close(of_named_pair(loss), want)


def test_reduction_none_of_torchdistill(torchdistill):
    """The terms, where the original returns them."""
    student, teacher = embeddings(0, width=5), embeddings(1, width=5)
    terms = F.kl_div((student / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="none")
    labels = torch.arange(5)
    hard = F.cross_entropy(student, labels, reduction="none")
    for alpha, want in ((None, terms), (0.3, 0.3 * hard + 0.7 * 16 * terms)):
        loss = made(torchdistill.KDLoss, alpha=alpha, reduction="none")
        assert_close(of_modules(loss, student, teacher, labels), want)
    distances = [own_pdist(x) / own_pdist(x)[own_pdist(x) > 0].mean() for x in (student, teacher)]
    loss = made(torchdistill.RKDLoss, dist_factor=2.0, angle_factor=None, reduction="none")
    want = 2 * F.smooth_l1_loss(*distances, reduction="none")
    torch.testing.assert_close(of_modules(loss, student, teacher), want, rtol=1e-9, atol=1e-15)
    loss = made(torchdistill.FTLoss, reduction="none")
    want = (F.normalize(student) - F.normalize(teacher)).abs()
    torch.testing.assert_close(of_modules(loss, student, teacher), want, rtol=1e-9, atol=1e-15)
    loss = made(torchdistill.HierarchicalContextLoss, reduction="none", output_sizes=[6])
    x, y = maps(0)[0], maps(2)[0]
    torch.testing.assert_close(of_modules(loss, (x, None), y), (x - y).square())


def test_crd_of_torchdistill_has_no_parts(torchdistill):
    """What is part of a kernel cannot be set or replaced; what has another name in kdfast can."""
    loss = crd_of_torchdistill(torchdistill)
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
        assert_close(sum(losses), sum(want))
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


@every_dtype
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
                loss = repdistiller.CRDLoss(crd_options())
                for linear, own in zip(linears, (loss.embed_s, loss.embed_t), strict=True):
                    assert torch.equal(own.weight, linear.weight) and torch.equal(own.bias, linear.bias)
            else:
                loss = crd_of_torchdistill(torchdistill)
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
    loss = crd_of_torchdistill(torchdistill, bank_dtype=torch.float16)
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


# What each criterion of the script is of (see `features`), its weight in the scripts, and how it is built of the shapes
# of a first batch's maps.
LOOPS = {
    "hint": ("regressed", 100, lambda s, t: repdistiller.HintLoss()),
    "attention": ("middle", 1000, lambda s, t: repdistiller.Attention()),
    "similarity": ("last map", 3000, lambda s, t: repdistiller.Similarity()),
    "correlation": ("embedded", 0.02, lambda s, t: repdistiller.Correlation()),
    "rkd": ("last", 1, lambda s, t: repdistiller.RKDLoss()),
    "pkt": ("last", 30000, lambda s, t: repdistiller.PKT()),
    "nst": ("middle", 50, lambda s, t: repdistiller.NSTLoss()),
    "factor": ("map before last", 200, lambda s, t: repdistiller.FactorTransfer()),
    "abound": ("regressed middle", 1, lambda s, t: repdistiller.ABLoss(len(s[1:-1]))),
    "fsp": ("regressed all", 50, lambda s, t: repdistiller.FSP(t[:-1], t[:-1])),
    "vid": ("middle", 1, lambda s, t: nn.ModuleList(repdistiller.VIDLoss(c, 2 * c, 2 * c) for c in (6, 8))),
    "crd": ("last", 0.8, lambda s, t: repdistiller.CRDLoss(crd_options(s_dim=8, t_dim=16))),
}


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
    """Its script with other imports: three steps, each with a gradient for all that the script trains."""
    of, beta, build = LOOPS[distill]
    images, labels = torch.randn(3, 6, 3, 8, 8), torch.randint(10, (3, 6))
    student, teacher = Network(4, 6, 8), Network(8, 12, 16).eval()
    connect = nn.ModuleList([*(nn.Conv2d(c, 2 * c, 1) for c in (4, 6, 8)), nn.Linear(8, 16)])
    maps_s, maps_t = (shapes(net(images[0], is_feat=True)[0]) for net in (student, teacher))
    criterion_list = nn.ModuleList([nn.CrossEntropyLoss(), repdistiller.DistillKL(4), build(maps_s, maps_t)])
    criterion_cls, criterion_div, criterion_kd = criterion_list
    optimizer = torch.optim.SGD([*student.parameters(), *connect.parameters(), *criterion_kd.parameters()], lr=0.01)
    seen = []
    for x, y in zip(images, labels, strict=True):
        preact = distill == "abound"
        feat_s, logit_s = student(x, is_feat=True, preact=preact)
        with torch.no_grad():
            feat_t, logit_t = teacher(x, is_feat=True, preact=preact)
        f_s, f_t = features(of, feat_s, feat_t, connect)
        if distill == "vid":
            loss_kd = [c(s, t) for s, t, c in zip(f_s, f_t, criterion_kd, strict=True)]
        elif distill == "crd":
            loss_kd = criterion_kd(f_s, f_t, torch.arange(6))
        else:
            loss_kd = criterion_kd(f_s, f_t)
        if isinstance(loss_kd, list):
            loss_kd = sum(loss_kd)
        loss = 0.1 * criterion_cls(logit_s, y) + 0.9 * criterion_div(logit_s, logit_t) + beta * loss_kd
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite() and loss_kd.isfinite()
        assert all(p.grad.isfinite().all() for p in (*student.parameters(), *criterion_kd.parameters()))
        optimizer.step()
        seen.append(loss_kd.item())
    assert len(set(seen)) == 3


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
def test_page_names_every_loss(library, torchdistill):
    page = Path(__file__).parent.parent / f"docs/migrating-from-{library}.md"
    if not page.exists():
        pytest.skip("needs the source tree")
    module = importlib.import_module(f"kdfast.compat.{library}")
    assert not set(module.__all__) - set(re.findall(r"\w+", page.read_text()))


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
