"""Several students that learn together, and what their losses need beside their logits.

The first student is the one that is tested: it is as large as any other row's, and starts from the same weights.
"""

import torch
import torch.nn.functional as F
from torch import nn

import kdfast
from kdfast.distill.models import Outputs

__all__ = ["LAYOUTS", "Branches", "Together"]


class Together(list):
    """The Outputs of several networks; `logits` and the like are lists, one tensor per network."""

    @property
    def logits(self):
        """One (B, classes) per network."""
        return [outputs.logits for outputs in self]

    @property
    def embedding(self):
        """One (B, channels of the last stage) per network."""
        return [outputs.embedding for outputs in self]

    @property
    def maps(self):
        """One list of maps per network."""
        return [outputs.maps for outputs in self]


# ---- the networks ----------------------------------------------------------------------------------------------------
class Apart(nn.Module):
    """Students that share nothing: images -> Together."""

    def __init__(self, make, count):
        super().__init__()
        self.networks = nn.ModuleList(make() for _ in range(count))

    def forward(self, images):
        return Together(network(images) for network in self.networks)


class Branches(nn.Module):
    """Students with common stages but for the last one and the classifier: images -> Together.

    With `rescale` the gradient that reaches the common stages is the mean of the branches', not their sum.
    """

    def __init__(self, make, count, rescale=False):
        super().__init__()
        first, *others = (make() for _ in range(count))
        self.trunk = first.stages[:-1]
        self.last = nn.ModuleList(network.stages[-1] for network in (first, *others))
        self.classifiers = nn.ModuleList(network.classifier for network in (first, *others))
        self.rescale = rescale

    def forward(self, images):
        maps = []
        for stage in self.trunk:
            images = stage(images)
            maps.append(images)
        if self.rescale:
            images = kdfast.rescale_gradient(images, len(self.last))
        return Together(self._branch(images, maps, *parts) for parts in zip(self.last, self.classifiers, strict=True))

    @staticmethod
    def _branch(images, maps, last, classifier):
        top = last(images)
        embedding = top.mean(dim=(2, 3))
        return Outputs(classifier(embedding), embedding, [*maps, top])


LAYOUTS = {
    "apart": Apart,
    "branches": Branches,
    "rescaled branches": lambda make, count: Branches(make, count, rescale=True),
}


# ---- the losses ------------------------------------------------------------------------------------------------------
def _cross_entropies(logits, labels):
    return sum(F.cross_entropy(z, labels) for z in logits)


class Peers(nn.Module):
    """Each student against all others, summed: ``sum_i loss(z_i, others, ...)``; all are updated in the same step."""

    def __init__(self, loss, with_labels):
        super().__init__()
        self.loss, self.with_labels = loss, with_labels

    def forward(self, logits, labels, epoch):
        total = 0.0 if self.with_labels else _cross_entropies(logits, labels)
        for i, own in enumerate(logits):
            peers = [z for j, z in enumerate(logits) if j != i]
            total = total + (self.loss(own, peers, labels) if self.with_labels else self.loss(own, peers, epoch))
        return total


class One(nn.Module):
    """ONE on branches, whose gate reads the last common map."""

    def __init__(self, example, **arguments):
        super().__init__()
        self.loss = kdfast.ONE(**arguments)
        self.gate = kdfast.ONEGate(example.student.maps[-2].shape[1], len(example.students))

    def forward(self, logits, maps, labels, epoch):
        return self.loss(logits, self.gate(maps[-2].mean(dim=(2, 3))), labels, epoch)


class Okddip(nn.Module):
    """OKDDip: the first student is the leader, which the others, the peers, teach."""

    def __init__(self, example, **arguments):
        super().__init__()
        self.loss = kdfast.OKDDip(**arguments)
        self.attention = kdfast.OKDDipAttention(example.student.embedding.shape[1])

    def forward(self, logits, embeddings, labels, epoch):
        leader, *peers = logits
        return self.loss(peers, leader, self.attention(torch.stack(embeddings[1:], 1)), labels, epoch)


class Ffl(nn.Module):
    """FFL: two students and the classifier that fuses their last maps."""

    def __init__(self, example, **arguments):
        super().__init__()
        self.loss = kdfast.FFL(**arguments)
        channels, _, side = example.student.maps[-1].shape[1:]
        self.fusion = kdfast.FusionModule(channels, example.student.logits.shape[1], side)

    def forward(self, logits, maps, labels, epoch):
        return self.loss(logits, self.fusion([each[-1] for each in maps]), labels, epoch)


class Cooperation(nn.Module):
    """Diversity with Cooperation beside the students' own cross-entropies."""

    def __init__(self, weight, **arguments):
        super().__init__()
        self.weight, self.loss = weight, kdfast.DiversityCooperation(**arguments)

    def forward(self, logits, labels):
        return _cross_entropies(logits, labels) + self.weight * self.loss(logits, labels)


def build(name, example, arguments):
    """The loss of one of the rows whose students learn together."""
    if name == "dml":
        return Peers(kdfast.DML(**arguments), with_labels=True)
    if name == "codistillation":
        return Peers(kdfast.Codistillation(**arguments), with_labels=False)
    if name == "divcoop":
        return Cooperation(**arguments)
    return {"one": One, "okddip": Okddip, "ffl": Ffl}[name](example, **arguments)
