"""The convolutional teacher and student that `kdfast distill` trains."""

from typing import NamedTuple

import torch
from torch import nn

__all__ = ["STUDENT", "TEACHER", "ConvNet", "Outputs"]

# Channels of the three stages. On the digits: 24 thousand parameters against 2 thousand.
TEACHER = (16, 32, 64)
STUDENT = (4, 8, 16)


class Outputs(NamedTuple):
    """What a network returns: everything a distillation loss may read."""

    logits: torch.Tensor  # (B, classes)
    embedding: torch.Tensor  # (B, channels of the last stage)
    maps: list[torch.Tensor]  # one (B, channels, H, W) per stage

    @property
    def probabilities(self):
        """softmax(logits), (B, classes)."""
        return self.logits.softmax(dim=1)


class ConvNet(nn.Module):
    """One convolution per stage, each after the first halving the side, then average pooling and a linear layer.

    Example::

        network = ConvNet(channels=1, classes=10, widths=STUDENT)
        network(torch.rand(2, 1, 8, 8)).logits.shape  # (2, 10)
    """

    def __init__(self, channels, classes, widths):
        super().__init__()
        stages = []
        for number, width in enumerate(widths):
            convolution = nn.Conv2d(channels, width, 3, stride=2 if number else 1, padding=1, bias=False)
            stages.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU()))
            channels = width
        self.stages = nn.ModuleList(stages)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, images):
        """Images (B, channels, H, W) -> Outputs."""
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        # The mean, not AdaptiveAvgPool2d: the latter has no deterministic backward on CUDA.
        embedding = images.mean(dim=(2, 3))
        return Outputs(self.classifier(embedding), embedding, maps)
