"""The data of most studies, scikit-learn's handwritten digits, and the training loop that they share."""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kdfast.lab import data
from kdfast.lab.compare import DIGITS
from kdfast.runs.determinism import derived_seed

if TYPE_CHECKING:
    from kdfast.lab.data import Data


__all__ = ["accuracy", "fit", "load", "seeded"]

BATCH = 64


@functools.cache
def load() -> "Data":
    """The digits, :class:`kdfast.lab.data.Data`: 8 x 8 pixels, half of them for testing."""
    return data.load(DIGITS, image_size=None)


def seeded(make: Callable[..., Any], *parts: Any) -> Any:
    """``make()`` after seeding torch with these numbers: what one training draws does not depend on the others."""
    torch.manual_seed(derived_seed(*parts))
    return make()


def fit(
    network: Any,
    objective: Callable[..., Any],
    epochs: int,
    rate: float,
    seed: int,
    after: Callable[..., Any] | None = None,
    samples: tuple[Any, ...] | None = None,
    batch: int = BATCH,
) -> None:
    """Train the parameters of `network` that need gradients with ``objective(*samples of a batch, epoch)``.

    `samples` are equally long tensors, by default images and labels of the training set. Adam, from `rate` along a
    cosine to 0, in batches whose order depends on `seed` alone; ``after(epoch)`` is called after each epoch.
    """
    samples = (load().train_images, load().train_labels) if samples is None else samples
    count = len(samples[0])
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=rate)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * epoch / epochs)) / 2
        order = torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(seed, epoch)))
        network.train()
        for index in order[: count - count % batch].split(batch):
            value = objective(*(x[index] for x in samples), epoch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        if after is not None:
            after(epoch)


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    """The share of test images that `network`, images -> logits, classifies correctly, in percent."""
    network.eval()
    answers = network(load().test_images).argmax(1)
    return 100 * (answers == load().test_labels).double().mean().item()
