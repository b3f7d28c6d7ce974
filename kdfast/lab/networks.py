"""The convolutional teacher and student of the lab, several students that learn together, and what is seen of them."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

import kdfast
from kdfast.objectives import Places

__all__ = ["STUDENT", "TEACHER", "Apart", "Branches", "ConvNet", "Observed"]

# Channels of the three stages. On the digits: 24 thousand parameters against 2 thousand.
TEACHER = (16, 32, 64)
STUDENT = (4, 8, 16)


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

    @property
    def places(self) -> Places:
        """Where a recipe finds what it reads."""
        maps = [f"stages.{number}" for number in range(len(self.stages))]
        before = [f"{stage}.relu:input" for stage in maps]
        return Places(maps, "classifier:input", before, [stage.norm for stage in self.stages])


# ---- several students ------------------------------------------------------------------------------------------------
class Apart(nn.Module):
    """`count` students, each made by `make`, that share nothing: images -> a list of logits (B, classes).

    The first is the one that is tested: it is as large as any other row's, and starts from the same weights.
    """

    def __init__(self, make: Callable[[], ConvNet], count: int) -> None:
        super().__init__()
        self.networks: nn.ModuleList = nn.ModuleList(make() for _ in range(count))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, channels, H, W) -> the logits of each student."""
        return [network(images) for network in self.networks]


class Branches(Apart):
    """Students with common stages but for the last one and the classifier.

    With `rescale` the gradient that reaches the common stages is the mean of the branches', not their sum.
    """

    def __init__(self, make: Callable[[], ConvNet], count: int, rescale: bool = False) -> None:
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


class Observed:
    """Several networks as one `model`: images -> for each what its `layers` and its classifier ("logits") return.

    Until `remove()`.
    """

    def __init__(self, model: Apart, layers: Sequence[str]) -> None:
        self.model = model
        own = {"logits": "classifier", **{layer: layer for layer in layers}}
        self.names: list[dict[str, str]] = [
            {name: f"networks.{number}.{layer}" for name, layer in own.items()} for number in range(len(model.networks))
        ]
        self.features: kdfast.capture = kdfast.capture(model, [x for names in self.names for x in names.values()])
        self.remove: Callable[[], None] = self.features.remove

    def __call__(self, images: Tensor) -> list[dict[str, Tensor]]:
        self.model(images)
        return [{name: self.features[layer] for name, layer in names.items()} for names in self.names]
