"""Several students that learn together, and what their losses need beside their logits.

The first student is the one that is tested: it is as large as any other row's, and starts from the same weights.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdfast

if TYPE_CHECKING:
    from kdfast.lab.trainer import Example


__all__ = ["Apart", "Branches", "Codistillation", "Cooperation", "Fusion", "Leader", "Mutual", "One"]


# ---- the networks ----------------------------------------------------------------------------------------------------
class Apart(nn.Module):
    """`count` students, each made by `make`, that share nothing: images -> a list of logits (B, classes)."""

    def __init__(self, make: Callable[..., Any], count: int) -> None:
        super().__init__()
        self.networks: nn.ModuleList = nn.ModuleList(make() for _ in range(count))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, channels, H, W) -> the logits of each student."""
        return [network(images) for network in self.networks]


class Branches(Apart):
    """Students with common stages but for the last one and the classifier.

    With `rescale` the gradient that reaches the common stages is the mean of the branches', not their sum.
    """

    def __init__(self, make: Callable[..., Any], count: int, rescale: bool = False) -> None:
        super().__init__(make, count)
        self.rescale = rescale
        for network in self.networks[1:]:
            for number, stage in enumerate(self.networks[0].stages[:-1]):
                network.stages[number] = stage

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, channels, H, W) -> the logits of each student."""
        for stage in self.networks[0].stages[:-1]:
            images = stage(images)
        if self.rescale:
            images = kdfast.rescale_gradient(images, len(self.networks))
        return [network.classify(network.stages[-1](images)) for network in self.networks]


# ---- the losses; each is built from a `train.Example` ----------------------------------------------------------------
def _with_others(logits):
    """Each student's logits, and the list of all others'."""
    return [(own, logits[:i] + logits[i + 1 :]) for i, own in enumerate(logits)]


class Mutual(nn.Module):
    """DML of each student with all others, summed: all are updated in the same step."""

    def __init__(self, example: "Example") -> None:
        super().__init__()
        self.loss: kdfast.DML = kdfast.DML()

    def forward(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        """The sum over the students; it contains their cross-entropies."""
        return sum(self.loss(own, others, labels) for own, others in _with_others(logits))


class Codistillation(nn.Module):
    """Each student's cross-entropy and codistillation with all others, summed."""

    def __init__(self, example: "Example", **arguments: Any) -> None:
        super().__init__()
        self.loss: Codistillation = kdfast.Codistillation(**arguments)

    def forward(self, logits: list[Tensor], labels: Tensor, epoch: int) -> Tensor:
        """The sum over the students."""
        return sum(F.cross_entropy(own, labels) + self.loss(own, others, epoch) for own, others in _with_others(logits))


class One(nn.Module):
    """ONE on branches, whose gate reads the last common map."""

    def __init__(self, example: "Example", **arguments: Any) -> None:
        super().__init__()
        self.loss: kdfast.ONE = kdfast.ONE(**arguments)
        self.gate: kdfast.ONEGate = kdfast.ONEGate(example.student.maps[-2].shape[1], len(example.students))

    def forward(self, logits: list[Tensor], maps: list[Tensor], labels: Tensor, epoch: int) -> Tensor:
        """The loss of all branches and their ensemble."""
        return self.loss(logits, self.gate(maps[-2].mean(dim=(2, 3))), labels, epoch)


class Leader(nn.Module):
    """OKDDip: the first student is the leader, which the others, the peers, teach."""

    def __init__(self, example: "Example", **arguments: Any) -> None:
        super().__init__()
        self.loss: kdfast.OKDDip = kdfast.OKDDip(**arguments)
        self.attention: kdfast.OKDDipAttention = kdfast.OKDDipAttention(example.student.embedding.shape[1])

    def forward(self, logits: list[Tensor], embeddings: list[Tensor], labels: Tensor, epoch: int) -> Tensor:
        """The loss of leader and peers."""
        leader, *peers = logits
        return self.loss(peers, leader, self.attention(torch.stack(embeddings[1:], 1)), labels, epoch)


class Fusion(nn.Module):
    """FFL: two students and the classifier that fuses their last maps."""

    def __init__(self, example: "Example", **arguments: Any) -> None:
        super().__init__()
        self.loss: kdfast.FFL = kdfast.FFL(**arguments)
        channels, _, side = example.student.maps[-1].shape[1:]
        self.fusion: kdfast.FusionModule = kdfast.FusionModule(channels, example.student.logits.shape[1], side)

    def forward(self, logits: list[Tensor], maps: list[list[Tensor]], labels: Tensor, epoch: int) -> Tensor:
        """The loss of both students and the fused classifier."""
        return self.loss(logits, self.fusion([each[-1] for each in maps]), labels, epoch)


class Cooperation(nn.Module):
    """Diversity with Cooperation, `weight` times, beside the students' own cross-entropies."""

    def __init__(self, example: "Example", weight: float, **arguments: Any) -> None:
        super().__init__()
        self.weight, self.loss = weight, kdfast.DiversityCooperation(**arguments)

    def forward(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        """The sum over the students and their relations."""
        return sum(F.cross_entropy(z, labels) for z in logits) + self.weight * self.loss(logits, labels)
