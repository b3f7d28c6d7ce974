"""The losses of `kdfast.compat` against the formulas of the libraries whose names they bear, at those libraries' sizes.

RepDistiller and mdistiller: CIFAR-100 in batches of 64, what resnet32x4 and resnet8x4 put out. torchdistill: ImageNet
in batches of 256, what resnet34 and resnet18 put out; its losses only where it is installed.

`kdfast bench` runs this file and makes tables of it; `pytest benchmarks/bench_compat.py` shows the raw figures. Of a
`--shape` only the batch counts.
"""

import functools
import math
import types
from dataclasses import replace

import torch
import torch.nn.functional as F

from kdfast.compat import mdistiller, repdistiller

from . import (
    bench_attention,
    bench_feature,
    bench_gram,
    bench_nce,
    bench_pairwise,
    bench_softmax_kl,
    bench_step,
    harness,
)

FAMILY = "compat"
BATCHES = {"RepDistiller": 64, "mdistiller": 64, "torchdistill": 256}
CIFAR_CLASSES, CIFAR_MAPS = 100, [(64, 32, 32), (128, 16, 16), (256, 8, 8)]
IMAGENET_CLASSES, IMAGENET_MAPS = 1000, [(256, 14, 14), (512, 7, 7)]


# ---- the baselines that no family has --------------------------------------------------------------------------------
def eager_hcl(students, teachers):
    return sum(bench_feature.eager_hcl(*maps) for maps in zip(students, teachers, strict=True))


def eager_feat(student, teacher, margin):
    return bench_feature.eager_ofd(student, teacher, margin) / len(student)


def eager_spkd(student, teacher):
    """Rows over the sum of their magnitudes, where the paper has their lengths."""

    def similarities(x):
        x = x.view(len(x), -1)
        return F.normalize(torch.mm(x, x.t()), 1)

    return (similarities(teacher) - similarities(student)).pow(2).sum() / len(student) ** 2


def eager_cckd(student, teacher, gamma=0.4, order=2):
    """The kernel row by row, of rows as they are, and the norm of the gap."""

    def kernel(x):
        out = torch.zeros(len(x), len(x), device=x.device)
        for i, row in enumerate(x):
            products = torch.mv(x, row)
            for p in range(order + 1):
                out[i] += math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * products.pow(p)
        return out

    return torch.norm(kernel(student) - kernel(teacher)) / len(student) ** 2


def eager_dist(student, teacher):
    def distance(a, b):
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - F.cosine_similarity(a, b, eps=1e-8).mean()

    student, teacher = student.softmax(1), teacher.softmax(1)
    return distance(student, teacher) + distance(student.t(), teacher.t())


# ---- the cases -------------------------------------------------------------------------------------------------------
def drop_in(case, ours, **changes):
    """A family's case with `ours` in place of kdfast's own loss."""
    return harness.against_eager(replace(case, kdfast=ours, size=None, **changes))


def of_maps(make, batch, maps, eager, ours):
    """A loss of lists of maps, of which make(batch, *map) is a pair's case."""
    pairs = [make(batch, *shape) for shape in maps]
    return harness.against_eager(bench_step.maps_case(pairs, eager, ours, "", f"{batch}, {len(maps)} maps"))


def summed(criterion):
    """What a training loop does with a criterion that returns one loss for each layer."""
    return lambda students, teachers: sum(criterion(students, teachers))


@functools.lru_cache(maxsize=1)
def contrast(width, rows, device):
    """RepDistiller's CRDLoss with the settings of its scripts."""
    torch.manual_seed(0)
    settings = dict(s_dim=width, t_dim=width, feat_dim=bench_nce.DIM, n_data=rows, nce_k=bench_step.NEGATIVES)
    settings |= dict(nce_t=bench_nce.TEMPERATURE, nce_m=bench_nce.MOMENTUM)
    crd = repdistiller.CRDLoss(types.SimpleNamespace(**settings)).to(device)
    for z in (crd.z_student, crd.z_teacher):
        z.fill_(bench_nce.Z)
    return crd


def of_repdistiller(batch, device):
    kl, similarity = repdistiller.DistillKL(4), summed(repdistiller.Similarity())
    width, height, _ = CIFAR_MAPS[-1]
    return {
        "DistillKL": drop_in(
            bench_softmax_kl.case("KD", batch, CIFAR_CLASSES), lambda student, teacher, _: kl(student, teacher)
        ),
        "Attention": of_maps(
            bench_attention.case, batch, CIFAR_MAPS, bench_step.eager_at, summed(repdistiller.Attention())
        ),
        "Similarity": drop_in(
            bench_gram.case("SP", batch, width * height**2, device=device), lambda s, t: similarity([s], [t])
        ),
        "PKT": drop_in(bench_gram.case("PKT", batch, width, device=device), repdistiller.PKT()),
        "RKDLoss": drop_in(bench_pairwise.case("RKD", batch, width, device), repdistiller.RKDLoss()),
        "CRDLoss": harness.against_eager(bench_step.crd_case(batch, width, bench_nce.CIFAR, device, contrast)),
    }


def of_mdistiller(batch, device):
    feature = functools.partial(bench_feature.case, "HCL")
    return {
        "kd_loss": drop_in(
            bench_softmax_kl.case("KD", batch, CIFAR_CLASSES), lambda s, t, _: mdistiller.kd_loss(s, t, 4.0)
        ),
        "dkd_loss": drop_in(
            bench_softmax_kl.case("DKD", batch, CIFAR_CLASSES),
            lambda s, t, labels: mdistiller.dkd_loss(s, t, labels, 1.0, 8.0, 4.0),
        ),
        "rkd_loss": drop_in(bench_pairwise.case("RKD", batch, CIFAR_MAPS[-1][0], device), mdistiller.rkd_loss),
        "hcl_loss": of_maps(feature, batch, CIFAR_MAPS, eager_hcl, mdistiller.hcl_loss),
        "feat_loss": drop_in(
            bench_feature.case("OFD", batch, *CIFAR_MAPS[-1]),
            lambda s, t, margin: mdistiller.feat_loss(s, t, margin[None, :, None, None]),
            eager=eager_feat,
        ),
    }


def of_torchdistill(batch, device):
    from kdfast.compat import torchdistill

    def of_outputs(loss):
        return lambda student, teacher, *labels: loss({"m": {"output": student}}, {"m": {"output": teacher}}, *labels)

    def of_lists(loss):
        def function(*lists):
            return loss(*({f"m{i}": {"output": x} for i, x in enumerate(maps)} for maps in lists))

        return function

    path = "m", "output", "m", "output"
    pair = {f"pair{i}": {side: {"io": "output", "path": f"m{i}"} for side in ("student", "teacher")} for i in range(2)}
    kernel = {"type": "gaussian", "gamma": 0.4, "max_p": 2}
    width = IMAGENET_MAPS[-1][0]
    rows = functools.partial(bench_gram.case, "SP", batch, width, device=device)
    return {
        "KDLoss": drop_in(
            bench_softmax_kl.case("KD + CE", batch, IMAGENET_CLASSES),
            of_outputs(torchdistill.KDLoss(*path, 4.0, 0.1, 0.9)),
        ),
        "DISTLoss": drop_in(
            bench_softmax_kl.case("KD", batch, IMAGENET_CLASSES),
            of_outputs(torchdistill.DISTLoss(*path)),
            eager=lambda student, teacher, _: eager_dist(student, teacher),
        ),
        "ATLoss": of_maps(
            bench_attention.case, batch, IMAGENET_MAPS, bench_step.eager_at, of_lists(torchdistill.ATLoss(pair))
        ),
        "RKDLoss": drop_in(
            bench_pairwise.case("RKD", batch, width, device),
            of_outputs(torchdistill.RKDLoss("m", "m", 25.0, 50.0, "mean")),
        ),
        "SPKDLoss": drop_in(rows(), of_outputs(torchdistill.SPKDLoss("m", "m", "batchmean")), eager=eager_spkd),
        "CCKDLoss": drop_in(rows(), of_outputs(torchdistill.CCKDLoss("m", "m", kernel, "batchmean")), eager=eager_cckd),
    }


LIBRARIES = {"RepDistiller": of_repdistiller, "mdistiller": of_mdistiller, "torchdistill": of_torchdistill}


def cases(settings, shapes):
    """Every library's losses; with `shapes` in their batches. The name of a loss begins with that of its library."""
    found = []
    for library, losses in LIBRARIES.items():
        if library == "torchdistill" and not harness.importable("torchdistill.losses.registry"):
            continue
        for batch in [shape[0] for shape in shapes] or [BATCHES[library]]:
            named = losses(batch, settings.device).items()
            found += [replace(case, loss=f"{library} {name}") for name, case in named]
    return found


def host_cases():
    """None: the other files have them."""
    return []


# ---- the measurements ------------------------------------------------------------------------------------------------
test_ceiling, test_loss, test_host = harness.measure_ceiling, harness.measure_loss, harness.measure_host
