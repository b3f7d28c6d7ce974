"""Losses with the layers that their papers train beside the student, and losses of several students.

Losses of maps take lists of maps (B, C, H, W), one for each stage, and the channels or shapes of these maps.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdfast

__all__ = ["Codistilled", "Connected", "Cooperation", "Factors", "Fusion", "Gated", "Graph", "Hints", "Information"]
__all__ += ["Leader", "Mutual", "Reconstruction"]

Channels = Sequence[int]


# ---- FT --------------------------------------------------------------------------------------------------------------
class Reconstruction(nn.Module):
    """FT's first stage: the paraphraser learns to rebuild the teacher's map, from half as many channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factors: int = max(1, channels // 2)
        self.paraphraser: kdfast.Paraphraser = kdfast.Paraphraser(channels, self.factors)

    def forward(self, teacher: Tensor) -> Tensor:
        """The mean squared error of the map."""
        return F.mse_loss(self.paraphraser.reconstruct(teacher), teacher)


class Factors(nn.Module):
    """FT with the paraphraser of its first stage, which stays as it is."""

    def __init__(self, student_channels: int, first: Reconstruction) -> None:
        super().__init__()
        self.paraphraser = first.paraphraser
        self.translator: kdfast.Translator = kdfast.Translator(student_channels, first.factors)
        self.loss: kdfast.FT = kdfast.FT()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of the maps' factors."""
        with torch.no_grad():
            factor = self.paraphraser(teacher)
        return self.loss(self.translator(student), factor)


# ---- every stage -----------------------------------------------------------------------------------------------------
class Hints(nn.Module):
    """FitNets' first stage: the student's maps, through regressors, come to the teacher's."""

    def __init__(self, student_shapes: Sequence[Sequence[int]], teacher_shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        shapes = zip(student_shapes, teacher_shapes, strict=True)
        self.regressors: nn.ModuleList = nn.ModuleList(kdfast.HintRegressor(*pair) for pair in shapes)
        self.loss: kdfast.FitNets = kdfast.FitNets()

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The sum over the stages."""
        return self.loss([layer(x) for layer, x in zip(self.regressors, student, strict=True)], teacher)


class Information(nn.Module):
    """VID with a regressor per stage, as wide as the teacher."""

    def __init__(self, student_channels: Channels, teacher_channels: Channels) -> None:
        super().__init__()
        widths = zip(student_channels, teacher_channels, strict=True)
        self.losses: nn.ModuleList = nn.ModuleList(kdfast.VID(student, teacher, teacher) for student, teacher in widths)

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The sum over the stages."""
        return sum(loss(s, t) for loss, s, t in zip(self.losses, student, teacher, strict=True))


class Connected(nn.Module):
    """A loss of maps, with connectors (1 x 1 convolution, batch norm) from the student's channels to the teacher's.

    For HCL and FSP, whose maps need equal channels, and on pre-activations for AB and OFD: `halved`, an earlier stage
    counts half, as in their official code; `norms`, the teacher's batch norms before them, give OFD's margins.
    """

    def __init__(
        self,
        loss: nn.Module,
        student_channels: Channels,
        teacher_channels: Channels,
        *,
        halved: bool = False,
        norms: Sequence[nn.BatchNorm2d] = (),
    ) -> None:
        super().__init__()
        widths = zip(student_channels, teacher_channels, strict=True)
        self.connectors: nn.ModuleList = nn.ModuleList(kdfast.OFDConnector(*pair) for pair in widths)
        self.loss = loss
        self.halved = halved
        for number, norm in enumerate(norms):
            self.register_buffer(f"margin{number}", kdfast.ofd_margin(norm.weight, norm.bias))

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The loss of the lists of maps."""
        student = [connector(x) for connector, x in zip(self.connectors, student, strict=True)]
        if not self.halved:
            return self.loss(student, teacher)
        margins = [[margin] for margin in self.buffers(recurse=False)] or [[]] * len(student)
        values = [self.loss(s, t, *margin) for s, t, margin in zip(student, teacher, margins, strict=True)]
        return sum(value / 2**distance for distance, value in enumerate(reversed(values)))


class Graph(nn.Module):
    """IRG: the batch's samples as a graph, in two maps, the embedding and the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.loss: kdfast.IRG = kdfast.IRG()

    def forward(
        self,
        student_maps: list[Tensor],
        student_embedding: Tensor,
        student_logits: Tensor,
        teacher_maps: list[Tensor],
        teacher_embedding: Tensor,
        teacher_logits: Tensor,
    ) -> Tensor:
        """The loss of the two networks."""
        student = [*student_maps, student_embedding, student_logits]
        return self.loss(student, [*teacher_maps, teacher_embedding, teacher_logits])


# ---- several students; the sums contain their cross-entropies --------------------------------------------------------
def _with_others(logits):
    """Each student's logits, and the list of all others'."""
    return [(own, logits[:i] + logits[i + 1 :]) for i, own in enumerate(logits)]


class Mutual(nn.Module):
    """DML of each student with all others, summed: all are updated in the same step."""

    def __init__(self) -> None:
        super().__init__()
        self.loss: kdfast.DML = kdfast.DML()

    def forward(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        """The sum over the students."""
        return sum(self.loss(own, others, labels) for own, others in _with_others(logits))


class Codistilled(nn.Module):
    """Each student's cross-entropy and :class:`kdfast.Codistillation` with all others, summed."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.loss: kdfast.Codistillation = kdfast.Codistillation(**arguments)

    def forward(self, logits: list[Tensor], labels: Tensor, epoch: int) -> Tensor:
        """The sum over the students."""
        return sum(F.cross_entropy(own, labels) + self.loss(own, others, epoch) for own, others in _with_others(logits))


class Gated(nn.Module):
    """ONE on branches, whose gate reads the last map that they share."""

    def __init__(self, channels: int, branches: int, **arguments: Any) -> None:
        super().__init__()
        self.loss: kdfast.ONE = kdfast.ONE(**arguments)
        self.gate: kdfast.ONEGate = kdfast.ONEGate(channels, branches)

    def forward(self, logits: list[Tensor], shared: Tensor, labels: Tensor, epoch: int) -> Tensor:
        """The loss of all branches and their ensemble."""
        return self.loss(logits, self.gate(shared.mean(dim=(2, 3))), labels, epoch)


class Leader(nn.Module):
    """OKDDip: the first student is the leader, which the others, the peers, teach."""

    def __init__(self, features: int, **arguments: Any) -> None:
        super().__init__()
        self.loss: kdfast.OKDDip = kdfast.OKDDip(**arguments)
        self.attention: kdfast.OKDDipAttention = kdfast.OKDDipAttention(features)

    def forward(self, logits: list[Tensor], embeddings: list[Tensor], labels: Tensor, epoch: int) -> Tensor:
        """The loss of leader and peers."""
        leader, *peers = logits
        return self.loss(peers, leader, self.attention(torch.stack(embeddings[1:], 1)), labels, epoch)


class Fusion(nn.Module):
    """FFL: two students and the classifier that fuses their last maps."""

    def __init__(self, channels: int, classes: int, side: int, **arguments: Any) -> None:
        super().__init__()
        self.loss: kdfast.FFL = kdfast.FFL(**arguments)
        self.fusion: kdfast.FusionModule = kdfast.FusionModule(channels, classes, side)

    def forward(self, logits: list[Tensor], maps: list[Tensor], labels: Tensor, epoch: int) -> Tensor:
        """The loss of both students and the fused classifier."""
        return self.loss(logits, self.fusion(maps), labels, epoch)


class Cooperation(nn.Module):
    """Diversity with Cooperation, `weight` times, beside the students' own cross-entropies."""

    def __init__(self, weight: float, **arguments: Any) -> None:
        super().__init__()
        self.weight, self.loss = weight, kdfast.DiversityCooperation(**arguments)

    def forward(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        """The sum over the students and their relations."""
        return sum(F.cross_entropy(z, labels) for z in logits) + self.weight * self.loss(logits, labels)
