"""A plain student without shortcuts on the digits: alone, with KD, and through the paths of a residual teacher.

Plain networks of this depth are hard to train, which is what the paper starts from: without shortcuts the gradient
hardly reaches the first stages. Student and teacher are equal but for the shortcuts.
"""

import functools
import statistics
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdfast._extras import require
from kdfast.lab.studies import Findings, Step, digits
from kdfast.losses import KD, JointLoss, OFDConnector, residual_margin_loss
from kdfast.ops import cross_entropy
from kdfast.procedures import JointPaths
from kdfast.procedures.generations import frozen
from kdfast.runs.tables import mean_and_spread

if TYPE_CHECKING:
    from kdfast.lab.study import Settings
    from kdfast.losses.residual import JointLoss


__all__ = ["DEFAULTS", "PICTURES", "findings", "steps"]

DEFAULTS = {"epochs": 10, "seed": 0, "seeds": 4}
PICTURES = ("curves.png",)

WIDTHS = (8, 16, 16)  # channels of the blocks; the first of each width after the first halves the side
BLOCKS = 4  # of each width
RATE = 1e-2

ROWS = {  # name -> how it reads in the table
    "teacher": "residual teacher",
    "alone": "plain student alone",
    "kd": "with KD",
    "joint": 'residual distillation, stage "joint"',
    "ta": 'the same, stage "ta"',
}


# ---- the networks ----------------------------------------------------------------------------------------------------
def _norm_conv(channels, width, side, stride=1):
    convolution = nn.Conv2d(channels, width, side, stride, padding=side // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width))


class Block(nn.Module):
    """ReLU, convolution, ReLU, convolution, and the shortcut if there is one: maps before their ReLU, in and out."""

    def __init__(self, channels: int, width: int, stride: int, shortcut: bool) -> None:
        super().__init__()
        self.first: nn.Sequential = _norm_conv(channels, width, 3, stride)
        self.second: nn.Sequential = _norm_conv(width, width, 3)
        self.shortcut: nn.Module | None = None
        if shortcut:
            self.shortcut = (
                nn.Identity() if (channels, stride) == (width, 1) else _norm_conv(channels, width, 1, stride)
            )

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        y = self.second(self.first(x).relu())
        return y if self.shortcut is None else y + self.shortcut(x)


class Head(nn.Module):
    """Maps before their ReLU -> logits."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.classifier: nn.Linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x.relu().mean((2, 3)))


def stages(shortcut: bool) -> list[nn.Module]:
    """The network as a list: a convolution, the blocks, the head."""
    listed, channels = [_norm_conv(1, WIDTHS[0], 3)], WIDTHS[0]
    for number, width in enumerate(WIDTHS):
        for block in range(BLOCKS):
            stride = 2 if number and not block else 1
            listed.append(Block(channels, width, stride, shortcut))
            channels = width
    return [*listed, Head(channels, classes=10)]


def cuts() -> list[int]:
    """After each width's last block: one joint path from there into the teacher."""
    return [1 + BLOCKS * (number + 1) for number in range(len(WIDTHS))]


# ---- the trainings ---------------------------------------------------------------------------------------------------
def steps(settings: "Settings") -> "list[Step]":
    """One training for each row and seed; the teacher of a seed comes before its students."""
    return [
        Step(f"{name} seed {seed}", functools.partial(_train, settings, name, seed))
        for seed in settings.every_seed
        for name in ROWS
    ]


def _train(settings, name, seed, results, progress):
    network = nn.Sequential(*digits.seeded(lambda: stages(shortcut=name == "teacher"), seed, name == "teacher"))
    module, objective = network, _from_labels(network)
    if name != "teacher":
        teacher = stages(shortcut=True)
        nn.Sequential(*teacher).load_state_dict(results[f"teacher seed {seed}"]["network"])
        if name == "kd":
            objective = _from_logits(network, frozen(nn.Sequential(*teacher)))
        elif name in ("joint", "ta"):
            module = digits.seeded(
                lambda: Residual(network, teacher, JointLoss(decay_epochs=settings.epochs, stage=name)), seed, 2
            )
            objective = module.objective
    history = []

    def after(epoch):
        history.append(digits.accuracy(network))
        progress((epoch + 1) / settings.epochs)

    digits.fit(module, objective, settings.epochs, RATE, seed, after)
    return {"network": network.state_dict(), "history": history}


def _from_labels(network):
    return lambda images, labels, epoch: cross_entropy(network(images), labels)


def _from_logits(network, teacher):
    loss = KD(temperature=4.0, alpha=0.9)

    def objective(images, labels, epoch):
        with torch.no_grad():
            target = teacher(images)
        return loss(network(images), target, labels)

    return objective


class Residual(nn.Module):
    """All that learns in residual distillation: the student, and for each path a connector to the teacher's maps."""

    def __init__(self, student: nn.Module, teacher: list[nn.Module], loss: "JointLoss") -> None:
        super().__init__()
        self.paths: JointPaths = JointPaths(list(student), teacher, cuts())
        self.connectors: nn.ModuleList = nn.ModuleList(
            OFDConnector(WIDTHS[-1], WIDTHS[-1]) for _ in range(len(cuts()) + 1)
        )
        self.loss = loss
        self.norm: nn.BatchNorm2d = [
            module for module in self.paths.teacher.modules() if isinstance(module, nn.BatchNorm2d)
        ][-1]

    def objective(self, images: Tensor, labels: Tensor, epoch: int) -> Tensor:
        """The loss of a batch."""
        logits, features = self.paths(images)
        (target,) = self.paths.targets(images).features
        distances = [
            residual_margin_loss(connector(own), target, self.norm.weight, self.norm.bias)
            for connector, own in zip(self.connectors, features, strict=True)
        ]
        return self.loss(logits, labels, distances, epoch)


# ---- what they show --------------------------------------------------------------------------------------------------
def findings(settings: "Settings", results: dict[str, Any]) -> "Findings":
    """Accuracies by row, and their curves."""
    histories = {name: [results[f"{name} seed {seed}"]["history"] for seed in settings.every_seed] for name in ROWS}
    last = {name: [history[-1] for history in group] for name, group in histories.items()}
    records = [
        {"network": name, "seed": seed, "accuracy_percent": value}
        for name, values in last.items()
        for seed, value in zip(settings.every_seed, values, strict=True)
    ]
    depth = 2 * BLOCKS * len(WIDTHS) + 1
    return Findings(
        titles=["network", "accuracy %", "worst seed"],
        rows=[[ROWS[name], mean_and_spread(values), f"{min(values):.2f}"] for name, values in last.items()],
        records=records,
        notes=[
            f"digits, {depth} convolutions in a row, {settings.epochs} epochs; test set, last epoch, "
            f"{settings.seeds} seeds, mean and standard deviation",
            'stage "ta" is what the public script trains: it leaves the joint paths out, and keeps the feature loss',
        ],
        pictures={"curves.png": _curves(histories, settings.epochs)},
    )


def _curves(histories, epochs):
    figure = require("matplotlib.figure", extra="compare").Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    panel = figure.subplots()
    for name, group in histories.items():
        columns = list(zip(*group, strict=True))
        (line,) = panel.plot(range(1, epochs + 1), [statistics.mean(c) for c in columns], marker=".", label=ROWS[name])
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        panel.fill_between(range(1, epochs + 1), low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    panel.set(xlabel="epoch", ylabel="test accuracy (%)", title="Digits: mean and range of the seeds")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return figure
