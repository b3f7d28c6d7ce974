"""Losses with the layers that their papers train beside the student. Each is built from a `train.Example`."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdfast

if TYPE_CHECKING:
    from kdfast.lab.trainer import Example


__all__ = ["Boundaries", "Factors", "Flow", "Graph", "Hierarchy", "Hints", "Information", "Overhaul", "Reconstruction"]


def _channels(maps):
    return [x.shape[1] for x in maps]


def _halved(values):
    """The last stage's value, half of the one before it, and so on."""
    values = list(values)
    return sum(value / 2**distance for distance, value in enumerate(reversed(values)))


# ---- one stage -------------------------------------------------------------------------------------------------------
class Hints(nn.Module):
    """FitNets' first stage: the student's middle map, through a regressor, comes to the teacher's."""

    def __init__(self, example: Any) -> None:
        super().__init__()
        self.stage: int = len(example.teacher.maps) // 2
        shapes = [outputs.maps[self.stage].shape for outputs in (example.student, example.teacher)]
        self.regressor: kdfast.HintRegressor = kdfast.HintRegressor(*shapes)
        self.loss: kdfast.FitNets = kdfast.FitNets()

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The loss of the maps of all stages."""
        return self.loss(self.regressor(student[self.stage]), teacher[self.stage])


class Reconstruction(nn.Module):
    """FT's first stage: the paraphraser learns to rebuild the teacher's last map, from half as many channels."""

    def __init__(self, example: "Example") -> None:
        super().__init__()
        channels = example.teacher.maps[-1].shape[1]
        self.factors: int | Any = max(1, channels // 2)
        self.paraphraser: kdfast.Paraphraser = kdfast.Paraphraser(channels, self.factors)

    def forward(self, teacher: list[Tensor]) -> Tensor:
        """The mean squared error of the last map."""
        return F.mse_loss(self.paraphraser.reconstruct(teacher[-1]), teacher[-1])


class Factors(nn.Module):
    """FT with the paraphraser of its first stage, which stays as it is."""

    def __init__(self, example: "Example") -> None:
        super().__init__()
        self.paraphraser = example.pre_stage.paraphraser
        self.translator: kdfast.Translator = kdfast.Translator(
            example.student.maps[-1].shape[1], example.pre_stage.factors
        )
        self.loss: kdfast.FT = kdfast.FT()

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The loss of the last maps' factors."""
        with torch.no_grad():
            factor = self.paraphraser(teacher[-1])
        return self.loss(self.translator(student[-1]), factor)


# ---- every stage -----------------------------------------------------------------------------------------------------
class Information(nn.Module):
    """VID with a regressor per stage, as wide as the teacher."""

    def __init__(self, example: Any) -> None:
        super().__init__()
        widths = zip(_channels(example.student.maps), _channels(example.teacher.maps), strict=True)
        self.losses: nn.ModuleList = nn.ModuleList(kdfast.VID(student, teacher, teacher) for student, teacher in widths)

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The sum over the stages."""
        return sum(loss(s, t) for loss, s, t in zip(self.losses, student, teacher, strict=True))


class _Connected(nn.Module):
    """A loss of maps, with connectors (1 x 1 convolution, batch norm) from the student's channels to the teacher's."""

    def __init__(self, example, loss):
        super().__init__()
        widths = zip(_channels(example.student.maps), _channels(example.teacher.maps), strict=True)
        self.connectors = nn.ModuleList(kdfast.OFDConnector(student, teacher) for student, teacher in widths)
        self.loss = loss

    def connect(self, student):
        """The student's maps in the teacher's channels."""
        return [connector(x) for connector, x in zip(self.connectors, student, strict=True)]


class Hierarchy(_Connected):
    """HCL of every stage."""

    def __init__(self, example: "Example") -> None:
        super().__init__(example, kdfast.HCL())

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The sum over the stages."""
        return self.loss(self.connect(student), teacher)


class Flow(_Connected):
    """FSP, whose matrices of student and teacher have one shape only with connectors."""

    def __init__(self, example: "Example") -> None:
        super().__init__(example, kdfast.FSP())

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The sum over the pairs of consecutive stages."""
        return self.loss(self.connect(student), teacher)


class Boundaries(_Connected):
    """AB's first stage on pre-activations; as in the official code an earlier stage counts half."""

    def __init__(self, example: "Example") -> None:
        super().__init__(example, kdfast.AB(reduction="mean"))

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The weighted sum over the stages."""
        return _halved(self.loss(s, t) for s, t in zip(self.connect(student), teacher, strict=True))


class Overhaul(_Connected):
    """OFD on pre-activations, with margins from the teacher's batch norms; an earlier stage counts half, as in AB."""

    def __init__(self, example: Any) -> None:
        super().__init__(example, kdfast.OFD(reduction="mean"))
        for number, stage in enumerate(example.teacher_network.stages):
            self.register_buffer(f"margin{number}", kdfast.ofd_margin(stage.norm.weight, stage.norm.bias))

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The weighted sum over the stages."""
        margins = self.buffers(recurse=False)
        parts = zip(self.connect(student), teacher, margins, strict=True)
        return _halved(self.loss(*part) for part in parts)


class Graph(nn.Module):
    """IRG: the batch's samples as a graph, in the last two maps, the embedding and the logits."""

    def __init__(self, example: "Example") -> None:
        super().__init__()
        self.loss: kdfast.IRG = kdfast.IRG()

    def forward(self, *read: Any) -> Tensor:
        """The loss of (maps, embedding, logits) of the student, then of the teacher."""
        student, teacher = ([*maps[-2:], *ends] for maps, *ends in (read[:3], read[3:]))
        return self.loss(student, teacher)
