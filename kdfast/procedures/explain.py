"""The noise that images bear before a network's features change, learnt for each image."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.analysis.knowledge import LARGEST, SMALLEST, NoiseSigma
from kdfast.ops import check

__all__ = ["learn_sigma"]


def learn_sigma(
    features: Callable[..., Any] | nn.Module,
    images: Tensor,
    size: int,
    penalty: float = -2.8,
    noises: int = 32,
    steps: int = 80,
    rate: float = 3e-3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The noise that each image bears before a network's features change: a :class:`NoiseSigma` trained for each.

    Of each image ``E (f(noisy) - f(image))^2 / s - weight penalty(sigma)`` is minimised, s the same mean square under
    noise of 0.01, by Adam with a rate that falls along a cosine to 0. ``weight`` follows the penalty, so that every
    image, network and checkpoint ends at the same entropy, `penalty` nats a pixel, and only where it lies differs. (The
    official code has a fixed weight, 7 or 6, which it raises once by half, and keeps the step nearest to -2.8.)

    Args:
        features: images (B, C, n, n) -> (B, ...), in evaluation mode: the samples of a batch must not mix.
        images: (images, C, n, n).
        size: s, the number of values along a side of sigma.
        penalty: the entropy to be reached, in nats; -2.8 is a sigma of 0.015 in the geometric mean.
        noises: noisy copies of each image a step.
        steps, rate: of Adam.
        generator: of the noise, on the images' device.

    Returns: (images, s, s), for :func:`kdfast.quantify_knowledge`.
    """
    check.maps("images", images)
    check.number("penalty", penalty)
    for name, value in (("size", size), ("noises", noises), ("steps", steps)):
        check.count(name, value)
    check.positive("rate", rate)
    count, channels, side, _ = images.shape

    def draw(number):
        shape = (number, noises, channels, side, side)
        return torch.randn(shape, generator=generator, dtype=images.dtype, device=images.device)

    def change(noisy):
        """Mean square of what noisy images (images x noises, C, n, n) change, of each image."""
        return (features(noisy).unflatten(0, (count, noises)) - clean).square().flatten(1).mean(1)

    start = torch.full((1, 1, size, size), 0.01, dtype=images.dtype, device=images.device)
    sigmas = nn.ModuleList(NoiseSigma(start, side) for _ in range(count))
    with torch.no_grad():
        clean = features(images)[:, None]
        scale = change((images[:, None] + 0.01 * draw(count)).flatten(0, 1)).clamp(min=torch.finfo(images.dtype).tiny)
    log_weight = torch.full((count,), 1.0, dtype=images.dtype, device=images.device)
    optimizer = torch.optim.Adam(sigmas.parameters(), lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        noisy, penalties = zip(*map(_with_noise, sigmas, images, draw(count)), strict=True)
        penalties = torch.stack(penalties)
        # Near the optimum the change grows with sigma^2: the penalty rises by half of what log_weight rises by.
        log_weight = log_weight + 0.2 * (penalty - penalties.detach())
        value = (change(torch.cat(noisy)) / scale - log_weight.exp() * penalties).sum()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return torch.cat([noise.sigma.detach().clamp(SMALLEST, LARGEST) for noise in sigmas])[:, 0]


def _with_noise(sigma, image, unit_noise):
    return sigma(image[None], unit_noise)
