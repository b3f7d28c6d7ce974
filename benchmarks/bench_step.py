"""What a loss costs at large batches, alone and in a training step of ImageNet's resnet34 to resnet18.

Alone at 256, 1024 and 4096 samples. Steps are of 256 images: on a GPU of 224 x 224 pixels and with CRD's banks of
ImageNet's size, on a CPU of 32 x 32 and with banks of CIFAR's. The baselines are those of the other files.

`kdfast bench` runs this file and makes tables of it; `pytest benchmarks/bench_step.py` shows the raw figures. A
`--shape` is BATCHxFEATURES, for the losses alone.
"""

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kdfast

from . import bench_attention, bench_gram, bench_nce, bench_pairwise, bench_softmax_kl, harness
from .harness import Case

FAMILY = "step"
BATCHES, QUICK = (256, 1024, 4096), (64,)
WIDTHS = {"KD": 1000, "RKD": 512, "SP": 2048, "AT": 512, "CRD": 2048}  # classes, features, channels of 7 x 7 positions
NEGATIVES = 16384
STEP_BATCH, CLASSES, STAGES = 256, 1000, (64, 128, 256, 512)
STEPS = {"cpu": (32, bench_nce.CIFAR), "cuda": (224, bench_nce.IMAGENET)}  # pixels a side, rows of CRD's banks


# ---- the losses alone ------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=1)
def contrast(width, rows, device):
    """CRD, whose embeddings and banks both implementations use."""
    torch.manual_seed(0)
    crd = kdfast.CRD(width, width, rows, bench_nce.DIM, NEGATIVES).to(device)
    for z in (crd.z_student, crd.z_teacher):
        z.fill_(bench_nce.Z)
    return crd


def eager_crd(crd, student, teacher, contrast_index):
    def unit(x):
        return x.div(x.pow(2).sum(1, keepdim=True).pow(0.5))

    anchors = unit(crd.embed_student(student)), unit(crd.embed_teacher(teacher))
    return bench_nce.eager_crd(*anchors, crd.bank_student, crd.bank_teacher, contrast_index)


def kdfast_crd(crd, student, teacher, contrast_index):
    return crd(student, teacher, contrast_index[:, 0].contiguous(), contrast_index)


def crd_case(batch, width, rows, device, module=contrast):
    """CRD on features of `width`, with its embeddings; bench_nce has it without."""

    def inputs(device):
        student, teacher = (torch.randn(batch, width, device=device) for _ in range(2))
        index = torch.randint(rows, (batch, NEGATIVES + 1), device=device)
        # The embeddings only so that their gradients, too, are dropped before each call.
        return student.requires_grad_(), teacher, index, *module(width, rows, student.device).parameters()

    def with_module(loss):
        def function(student, teacher, index, *_):
            return loss(module(width, rows, student.device), student, teacher, index)

        return function

    embedded = bench_nce.case(batch, NEGATIVES, rows, device=device)
    shape = f"{batch} x {width}, {bench_nce.name_of(rows)}"
    return replace(embedded, shape=shape, inputs=inputs, eager=with_module(eager_crd), kdfast=with_module(kdfast_crd))


def eager_at(student, teacher):
    return sum(bench_attention.eager_at(*maps) for maps in zip(student, teacher, strict=True))


def maps_case(stages, eager, ours, loss, shape):
    """A loss of the lists of both networks' maps; `stages` are the cases of a pair of maps."""

    def inputs(device):
        students, teachers = zip(*(stage.inputs(device) for stage in stages), strict=True)
        return *students, *teachers

    def of_lists(function):
        return lambda *maps: function(list(maps[: len(stages)]), list(maps[len(stages) :]))

    floor = {phase: sum(stage.floor[phase] for stage in stages) for phase in harness.PHASES}
    return Case(loss, shape, inputs, of_lists(eager), of_lists(ours), floor)


def alone(name, batch, width, device, rows=bench_nce.IMAGENET):
    """A loss on `batch` rows of `width`; AT on maps of so many channels."""
    make = {
        "KD": lambda: bench_softmax_kl.case("KD", batch, width),
        "RKD": lambda: bench_pairwise.case("RKD", batch, width, device),
        "SP": lambda: bench_gram.case("SP", batch, width, device=device),
        "AT": lambda: bench_attention.case(batch, width, 7, 7),
        "CRD": lambda: crd_case(batch, width, rows, device),
    }
    return harness.against_eager(make[name](), size=batch)


# ---- the networks ----------------------------------------------------------------------------------------------------
def convolution(channels, out, size, stride):
    layer = nn.Conv2d(channels, out, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out))


class Block(nn.Module):
    """Two convolutions, and what goes past them."""

    def __init__(self, channels, out, stride):
        super().__init__()
        self.first, self.second = convolution(channels, out, 3, stride), convolution(out, out, 3, 1)
        self.past = nn.Identity() if (channels, stride) == (out, 1) else convolution(channels, out, 1, stride)

    def forward(self, x):
        return F.relu(self.second(F.relu(self.first(x))) + self.past(x))


class ResNet(nn.Module):
    """ImageNet's resnet, by how many blocks its stages have; -> logits, embedding, the maps of the stages."""

    def __init__(self, blocks):
        super().__init__()
        channels = STAGES[0]
        self.stem = nn.Sequential(convolution(3, channels, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.stages = nn.ModuleList()
        for count, width in zip(blocks, STAGES, strict=True):
            first = Block(channels, width, 2 if self.stages else 1)
            self.stages.append(nn.Sequential(first, *(Block(width, width, 1) for _ in range(count - 1))))
            channels = width
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, images):
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        embedding = x.mean((2, 3))
        return self.head(embedding), embedding, maps


STUDENT, TEACHER = (2, 2, 2, 2), (3, 4, 6, 3)  # resnet18, resnet34


@functools.lru_cache(maxsize=1)
def operations(batch, pixels):
    """Additions and multiplications in a step's networks: the student's three times, for its backward."""
    counts = []
    for blocks in (STUDENT, TEACHER):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            ResNet(blocks)(torch.empty(batch, 3, pixels, pixels))
        counts.append(counter.get_total_flops())
    return 3 * counts[0] + counts[1]


# ---- whole steps -----------------------------------------------------------------------------------------------------
LOSSES = {  # name -> what it compares of (logits, embedding, maps); eager, kdfast, CRD's with the module and its index
    "KD": (lambda outputs: outputs[0], lambda s, t: bench_softmax_kl.eager_kd(s, t, None), kdfast.KD()),
    "RKD": (lambda outputs: outputs[1], bench_pairwise.eager_rkd, kdfast.RKD()),
    "SP": (lambda outputs: outputs[2][-1], bench_gram.eager_sp, kdfast.SP()),
    "AT": (lambda outputs: outputs[2], eager_at, kdfast.AT()),
    "CRD": (lambda outputs: outputs[1], eager_crd, kdfast_crd),
}


class Training:
    """What a step has beside its batch. The weights are random: the cost of a step does not depend on them."""

    def __init__(self, name, rows, device):
        torch.manual_seed(0)
        self.features = LOSSES[name][0]
        self.student, self.teacher = ResNet(STUDENT).to(device), ResNet(TEACHER).to(device).eval()
        self.crd = contrast(STAGES[-1], rows, device) if name == "CRD" else None
        trained = nn.ModuleList([self.student, *([self.crd] if self.crd else [])])
        self.optimizer = torch.optim.SGD(trained.parameters(), lr=1e-4, momentum=0.9)

    def begin(self, loss, images, labels, index):
        with torch.no_grad():
            teacher = self.teacher(images)
        student = self.student(images)
        compared = [self.features(outputs) for outputs in (student, teacher)]
        distance = loss(self.crd, *compared, index) if self.crd else loss(*compared)
        return Unfinished(F.cross_entropy(student[0], labels) + distance, self.optimizer)


training = functools.lru_cache(maxsize=1)(Training)


class Unfinished:
    """A step up to its loss; `backward` is the rest of it."""

    def __init__(self, loss, optimizer):
        self.loss, self.optimizer = loss, optimizer

    def backward(self):
        self.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def part_of_step(name, batch, pixels, rows, device):
    """The loss alone, of the shapes that it has in a step."""
    if name == "AT":
        stages = [bench_attention.case(batch, width, *[pixels // (4 << k)] * 2) for k, width in enumerate(STAGES)]
        shape = f"{batch}, maps of all stages at {pixels} px"
        return harness.against_eager(maps_case(stages, eager_at, kdfast.AT(), "AT", shape))
    positions = (pixels // 32) ** 2 if name == "SP" else 1
    width = CLASSES if name == "KD" else STAGES[-1] * positions
    return replace(alone(name, batch, width, device, rows), size=None)


def step_case(name, part, batch, pixels, rows):
    """A whole step with the loss `name`, which alone is `part`."""

    def inputs(device):
        images, labels = torch.randn(batch, 3, pixels, pixels, device=device), torch.randint(CLASSES, (batch,))
        columns = NEGATIVES + 1 if name == "CRD" else 1  # the others do not read it
        return images, labels.to(device), torch.randint(rows, (batch, columns), device=device)

    def with_networks(loss):
        return lambda images, *others: training(name, rows, images.device).begin(loss, images, *others)

    eager, ours = map(with_networks, LOSSES[name][1:])
    floor = dict.fromkeys(harness.PHASES, operations(batch, pixels))
    shape = f"{batch} x 3 x {pixels} x {pixels}"
    whole = Case(name, shape, inputs, eager, ours, floor, "matmul", left_out=part.left_out)
    return harness.against_eager(whole, part=(part.loss, part.shape))


def cases(settings, shapes):
    """The losses at all batches, and what they are in a step before that step; `shapes`, if any, replaces them all."""
    device = settings.device
    if shapes:
        return [alone(name, *shape, device) for name in WIDTHS for shape in shapes]
    quick, pixels, rows = settings.quick, *STEPS[device]
    batches, batch, names = (QUICK, QUICK[0], ("KD",)) if quick else (BATCHES, STEP_BATCH, tuple(LOSSES))
    bank = bench_nce.CIFAR if quick else bench_nce.IMAGENET
    found = [alone(name, count, width, device, bank) for name, width in WIDTHS.items() for count in batches]
    for name in names:
        part = part_of_step(name, batch, pixels, rows, device)
        known = any((case.loss, case.shape) == (part.loss, part.shape) for case in found)
        found += [*([] if known else [part]), step_case(name, part, batch, pixels, rows)]
    return found


def host_cases():
    """None: the other files have them."""
    return []


# ---- the measurements ------------------------------------------------------------------------------------------------
test_ceiling, test_loss, test_host = harness.measure_ceiling, harness.measure_loss, harness.measure_host
