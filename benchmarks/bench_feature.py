"""Losses on feature maps, element by element, against their official code's maths, eager and through torch.compile.

`kdfast bench` runs this file and makes tables of it; `pytest benchmarks/bench_feature.py` shows the raw figures.
"""

import functools

import torch
import torch.nn.functional as F

import kdfast

from . import harness
from .harness import Case

FAMILY = "feature"
SHAPES = [(64, 256, 14, 14), (64, 256, 56, 56)]
SEGMENTATION = (8, 19, 128, 128)  # logits of Cityscapes' classes
HOST_SHAPE = (2, 4, 2, 2)


# ---- the baselines ---------------------------------------------------------------------------------------------------
def eager_ab(student, teacher, margin=1.0):
    inactive = (student + margin) ** 2 * ((student > -margin) & (teacher <= 0)).float()
    active = (student - margin) ** 2 * ((student <= margin) & (teacher > 0)).float()
    return torch.abs(inactive + active).sum()


def eager_ofd(student, teacher, margin):
    target = torch.max(teacher, margin[None, :, None, None])
    error = F.mse_loss(student, target, reduction="none")
    return (error * ((student > target) | (target > 0)).float()).sum()


def eager_fitnets(student, teacher):
    return F.mse_loss(student, teacher)


def eager_ft(student, teacher):
    return F.l1_loss(*(F.normalize(x.view(x.size(0), -1)) for x in (student, teacher)))


def eager_vid(student, teacher, log_scale):
    variance = (torch.log(1 + torch.exp(log_scale)) + 1e-5).view(1, -1, 1, 1)
    return (0.5 * ((student - teacher) ** 2 / variance + torch.log(variance))).mean()


def eager_cwd(student, teacher, temperature=4.0):
    batch, channels, height, width = student.shape
    student, teacher = (x.reshape(-1, height * width) / temperature for x in (student, teacher))
    p, log_q, log_p = F.softmax(teacher, 1), F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    return temperature**2 * (p * (log_p - log_q)).sum() / (batch * channels)


def standardize(x):
    batch, channels, height, width = x.shape
    rows = x.permute(1, 0, 2, 3).reshape(channels, -1)
    rows = (rows - rows.mean(-1, keepdim=True)) / (rows.std(-1, keepdim=True) + 1e-6)
    return rows.reshape(channels, batch, height, width).permute(1, 0, 2, 3)


def eager_pkd(student, teacher):
    return F.mse_loss(standardize(student), standardize(teacher)) / 2


def eager_hcl(student, teacher):
    loss, weight, total = F.mse_loss(student, teacher), 1.0, 1.0
    for bins in (4, 2, 1):
        if bins < student.shape[2]:
            weight /= 2
            loss = loss + weight * F.mse_loss(*(F.adaptive_avg_pool2d(x, (bins, bins)) for x in (student, teacher)))
            total += weight
    return loss / total


# ---- kdfast ----------------------------------------------------------------------------------------------------------
@functools.lru_cache
def likelihood(channels, device):
    """VID without its regressor, whose convolutions cost either side the same, and more than what is compared."""
    vid = kdfast.VID(channels, 1, channels).to(device)
    vid.regressor = torch.nn.Identity()
    return vid


def ours_vid(student, teacher, log_scale):
    return likelihood(student.shape[1], student.device)(student, teacher)


# ---- the cases -------------------------------------------------------------------------------------------------------
LOSSES = {  # name -> eager, kdfast
    "AB": (eager_ab, kdfast.AB()),
    "OFD": (eager_ofd, kdfast.OFD()),
    "FitNets": (eager_fitnets, kdfast.FitNets()),
    "FT": (eager_ft, kdfast.FT()),
    "VID": (eager_vid, ours_vid),
    "HCL": (eager_hcl, kdfast.HCL()),
    "CWD": (eager_cwd, kdfast.CWD()),
    "CWD, channels_last": (eager_cwd, kdfast.CWD()),
    "PKD": (eager_pkd, kdfast.PKD()),
}
OF_SEGMENTATION = ("CWD", "CWD, channels_last", "PKD")
OF_CHANNELS = {  # name -> what the loss takes beside the maps, made from the number of channels and the device
    "OFD": lambda channels, device: -torch.rand(channels, device=device),
    "VID": lambda channels, device: likelihood(channels, device).log_scale,
}


def case(name, *shape):
    """`name` of LOSSES on maps of `shape`; fewer dimensions are (batch, channels)."""
    eager, ours = LOSSES[name]
    shape = (*shape, 1, 1)[:4]

    def inputs(device):
        memory_format = torch.channels_last if name.endswith("channels_last") else torch.contiguous_format
        maps = (torch.randn(shape, device=device) for _ in range(2))
        student, teacher = (x.contiguous(memory_format=memory_format) for x in maps)
        more = [OF_CHANNELS[name](shape[1], student.device)] if name in OF_CHANNELS else []
        return student.requires_grad_(), teacher, *more

    # Each direction reads both maps; backward writes the student's gradient.
    maps = 4 * torch.Size(shape).numel()
    floor = {"forward": 2 * maps, "backward": 3 * maps, "both": 5 * maps}
    return Case(name, " x ".join(map(str, shape)), inputs, eager, ours, floor)


all_cases, host_cases = harness.of_shapes(case, LOSSES, SHAPES, HOST_SHAPE)


def cases(settings, chosen):
    """Those of every loss, and logits of segmentation for the losses that are made for them."""
    return all_cases(settings, chosen) + [case(name, *SEGMENTATION) for name in OF_SEGMENTATION if not chosen]


# ---- the measurements ------------------------------------------------------------------------------------------------
test_ceiling, test_loss, test_host = harness.measure_ceiling, harness.measure_loss, harness.measure_host
