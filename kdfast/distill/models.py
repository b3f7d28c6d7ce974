"""The convolutional teacher and student that `kdfast distill` trains."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import nn

from kdfast.capture import capture

__all__ = ["STUDENT", "TEACHER", "ConvNet", "Observed", "Outputs"]

# Channels of the three stages. On the digits: 24 thousand parameters against 2 thousand.
TEACHER = (16, 32, 64)
STUDENT = (4, 8, 16)


class Outputs(NamedTuple):
    """What an `Observed` network returns: everything a distillation loss may read."""

    logits: torch.Tensor  # (B, classes)
    embedding: torch.Tensor  # (B, channels of the last stage)
    maps: list[torch.Tensor]  # one (B, channels, H, W) per stage
    preactivations: list[torch.Tensor]  # the same before each stage's ReLU

    @property
    def probabilities(self):
        """softmax(logits), (B, classes)."""
        return self.logits.softmax(dim=1)


class ConvNet(nn.Module):
    """One convolution per stage, each after the first halving the side, then average pooling and a linear layer.

    Example::

        network = ConvNet(channels=1, classes=10, widths=STUDENT)
        network(torch.rand(2, 1, 8, 8)).shape  # (2, 10)
    """

    def __init__(self, channels, classes, widths):
        super().__init__()
        self.stages = nn.Sequential()
        for number, width in enumerate(widths):
            convolution = nn.Conv2d(channels, width, 3, stride=2 if number else 1, padding=1, bias=False)
            layers = {"convolution": convolution, "norm": nn.BatchNorm2d(width), "relu": nn.ReLU()}
            self.stages.append(nn.Sequential(OrderedDict(layers)))
            channels = width
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images):
        """Images (B, channels, H, W) -> logits (B, classes)."""
        # The mean, not AdaptiveAvgPool2d: the latter has no deterministic backward on CUDA.
        return self.classifier(self.stages(images).mean(dim=(2, 3)))


class Observed:
    """A ConvNet whose layers are looked at: images (B, channels, H, W) -> `Outputs`."""

    def __init__(self, network):
        self.network = network
        self.maps = [f"stages.{number}" for number in range(len(network.stages))]
        self.preactivations = [f"{name}.relu:input" for name in self.maps]
        self.features = capture(network, [*self.maps, *self.preactivations, "classifier:input"])

    def __call__(self, images):
        logits = self.network(images)
        maps, preactivations = ([self.features[name] for name in names] for names in (self.maps, self.preactivations))
        return Outputs(logits, self.features["classifier:input"], maps, preactivations)
