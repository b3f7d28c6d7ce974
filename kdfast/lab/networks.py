"""The convolutional teacher and student that `kdfast distill` trains."""

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from kdfast.capture import capture

if TYPE_CHECKING:
    from kdfast.lab.students import Apart, Branches


__all__ = ["STUDENT", "TEACHER", "ConvNet", "Observed", "Outputs", "Together"]

# Channels of the three stages. On the digits: 24 thousand parameters against 2 thousand.
TEACHER = (16, 32, 64)
STUDENT = (4, 8, 16)


class Outputs(NamedTuple):
    """Everything that a distillation loss may read of a network; its logits alone if it is not `Observed`."""

    logits: torch.Tensor  # (B, classes)
    embedding: torch.Tensor | None = None  # (B, channels of the last stage)
    maps: list[torch.Tensor] | None = None  # one (B, channels, H, W) per stage
    preactivations: list[torch.Tensor] | None = None  # the same before each stage's ReLU

    @property
    def probabilities(self) -> Tensor:
        """softmax(logits), (B, classes)."""
        return self.logits.softmax(dim=1)


class Together(list[Any]):
    """The Outputs of several networks; `logits` and the like are lists, one entry per network."""

    @property
    def logits(self) -> list[Tensor]:
        """One (B, classes) per network."""
        return [outputs.logits for outputs in self]

    @property
    def embedding(self) -> list[Tensor]:
        """One (B, channels of the last stage) per network."""
        return [outputs.embedding for outputs in self]

    @property
    def maps(self) -> list[list[Tensor]]:
        """One list of maps per network."""
        return [outputs.maps for outputs in self]


class ConvNet(nn.Module):
    """One convolution per stage, each after the first halving the side, then average pooling and a linear layer.

    Example::

        network = ConvNet(channels=1, classes=10, widths=STUDENT)
        network(torch.rand(2, 1, 8, 8)).shape  # (2, 10)
    """

    def __init__(self, channels: int, classes: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.stages: nn.Sequential = nn.Sequential()
        for number, width in enumerate(widths):
            convolution = nn.Conv2d(channels, width, 3, stride=2 if number else 1, padding=1, bias=False)
            layers = {"convolution": convolution, "norm": nn.BatchNorm2d(width), "relu": nn.ReLU()}
            self.stages.append(nn.Sequential(OrderedDict(layers)))
            channels = width
        self.classifier: nn.Linear = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, channels, H, W) -> logits (B, classes)."""
        return self.classify(self.stages(images))

    def classify(self, maps: Tensor) -> Tensor:
        """Maps of the last stage -> logits (B, classes)."""
        # The mean, not AdaptiveAvgPool2d: the latter has no deterministic backward on CUDA.
        return self.classifier(maps.mean(dim=(2, 3)))


class Observed:
    """A model with one ConvNet or several, whose layers are looked at: images (B, channels, H, W) -> Together.

    Until `remove()`.
    """

    def __init__(self, model: "Apart | Branches | ConvNet") -> None:
        self.model = model
        self.networks: list[tuple[list[str], list[str], list[str]]] = [
            self._layers(name, part) for name, part in model.named_modules() if isinstance(part, ConvNet)
        ]
        names = [name for network in self.networks for group in network for name in group]
        self.features: capture = capture(model, names)
        self.remove: Callable[..., Any] = self.features.remove

    @staticmethod
    def _layers(name, network):
        """The names of the layers: the classifier's output and input, maps, pre-activations."""
        prefix = f"{name}." if name else ""
        maps = [f"{prefix}stages.{number}" for number in range(len(network.stages))]
        return [f"{prefix}classifier", f"{prefix}classifier:input"], maps, [f"{stage}.relu:input" for stage in maps]

    def __call__(self, images: Tensor) -> "Together":
        self.model(images)
        read = [[[self.features[name] for name in group] for group in network] for network in self.networks]
        return Together(Outputs(*ends, maps, preactivations) for ends, maps, preactivations in read)
