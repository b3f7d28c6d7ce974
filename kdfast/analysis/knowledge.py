"""What a network knows about its input: the information that it keeps of each pixel, and when it learned to."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.ops import check

__all__ = ["NoiseSigma", "pixel_entropy", "quantify_knowledge"]

SMALLEST, LARGEST = 1e-3, 1.0  # of sigma


class NoiseSigma(nn.Module):
    """The noise that an image bears: Explaining Knowledge Distillation by Quantifying the Knowledge (Cheng et al., CVPR
    2020).

    ``noisy = image + up(sigma) unit_noise``, `up` repeating each of the s x s values over its part of the image, and
    ``penalty = mean(log sigma) + log(2 pi) / 2 + 1/2``, the mean entropy of a pixel in nats. Trained to lose as little
    as possible of a network's features while the penalty grows, ``.sigma`` is small where the network looks.
    Shapes: sigma (1, 1, s, s), positive; image (1, C, n, n) and unit_noise (B, C, n, n) -> noisy (B, C, n, n), penalty
    0-d. As in the official code each forward first clamps the parameter itself to [0.001, 1].
    """

    def __init__(self, sigma: Tensor | Sequence[float], image_size: float) -> None:
        super().__init__()
        check.floating("sigma", sigma)
        check.count("image_size", image_size)
        if sigma.dim() != 4 or sigma.shape[:2] != (1, 1) or sigma.shape[2] != sigma.shape[3] or not sigma.numel():
            raise ValueError(f"sigma must be (1, 1, size, size), got shape {tuple(sigma.shape)}")
        self.sigma: nn.Parameter = nn.Parameter(sigma.detach().clone())
        self.image_size = image_size

    def forward(self, image: Tensor, unit_noise: Tensor) -> tuple[Tensor, Tensor]:
        for name, x in (("image", image), ("unit_noise", unit_noise)):
            check.maps(name, x)
            if x.shape[2:] != (self.image_size, self.image_size):
                size = self.image_size
                raise ValueError(f"{name} must have {size} x {size} pixels, got shape {tuple(x.shape)}")
        with torch.no_grad():
            self.sigma.clamp_(SMALLEST, LARGEST)
        sigma = self.sigma.clone()  # of its own, so that another forward may clamp before this one's backward
        noise = F.interpolate(sigma, size=unit_noise.shape[2:], mode="nearest") * unit_noise
        return image + noise, sigma.log().mean() + math.log(2 * math.pi) / 2 + 0.5

    def extra_repr(self) -> str:
        return f"size={self.sigma.shape[2]}, image_size={self.image_size}"


def pixel_entropy(sigma: Tensor) -> Tensor:
    """``log sigma + log(2 pi e) / 2``: the entropy in nats of what a pixel may be without the network noticing."""
    return sigma.log() + (math.log(2 * math.pi) + 1) / 2


def quantify_knowledge(
    sigma: Tensor,
    weight_distance: Tensor | Sequence[float],
    checkpoints: Tensor | Sequence[Any],
    foreground: Tensor | Sequence[Sequence[bool]] | None = None,
    threshold: float = 0.2,
) -> dict[str, Tensor]:
    """Visual concepts of a network, and how it came to them (Cheng et al., CVPR 2020).

    A pixel is a concept where its entropy is more than `threshold` nats below the mean over the background. An image's
    knowledge is complete at the checkpoint with the most concepts (the first of those); how far the weights had moved
    by then says how quickly the network learned it. A measurement, not a loss: on CUDA it waits for the device.

    Args:
        sigma: (images, checkpoints, s, s), of :class:`NoiseSigma` at each checkpoint.
        weight_distance: (epochs,), ``|w_k - w_{k-1}| / |w_0|`` of each epoch.
        checkpoints: the epoch of each checkpoint, a list or a tensor of integers.
        foreground: (s, s) or (images, s, s) booleans; by default the rows and columns from s/6 to 5s/6 inclusive.

    Returns: a dict of tensors: ``background_mean`` (checkpoints,), the entropy that concepts are measured against;
    with the prefix ``fore_`` and ``back_`` of the concepts on either side of the foreground's edge ``max_mean`` (the
    paper's D_mean: mean over the images of the weights' distance where their knowledge is complete), ``max_std`` (the
    paper's D_std), ``max_var`` (its square, which the official code prints in its place), ``max_slope`` (mean of
    concepts per distance), ``percent`` (the paper's rho: the share of all concepts of any checkpoint that the last one
    has, 0 for an image without any); and ``total_percent``. Deviations are those of the whole set, without Bessel's
    correction. The official code forgets to shift checkpoints back where it has skipped the first (its resnet case).
    """
    check.floating("sigma", sigma)
    if sigma.dim() != 4 or sigma.shape[2] != sigma.shape[3] or not sigma.numel():
        raise ValueError(f"sigma must be (images, checkpoints, size, size), got shape {tuple(sigma.shape)}")
    images, count, size, _ = sigma.shape
    check.number("threshold", threshold)
    distance = torch.as_tensor(weight_distance, dtype=sigma.dtype, device=sigma.device)
    epochs = torch.as_tensor(checkpoints, device=sigma.device)
    if distance.dim() != 1:
        raise ValueError(f"weight_distance must be (epochs,), got shape {tuple(distance.shape)}")
    if epochs.shape != (count,) or epochs.is_floating_point():
        raise ValueError(f"checkpoints must be {count} epochs, one for each checkpoint of sigma, got {checkpoints}")
    if not all(0 <= epoch < len(distance) for epoch in epochs.tolist()):
        raise ValueError(f"checkpoints must be epochs from 0 to {len(distance) - 1}, got {checkpoints}")
    if foreground is None:
        inside = torch.zeros(size, dtype=torch.bool, device=sigma.device)
        inside[size // 6 : 5 * size // 6 + 1] = True
        foreground = inside[:, None] & inside
    check.tensor("foreground", foreground)
    if foreground.dtype != torch.bool or foreground.shape not in ((size, size), (images, size, size)):
        raise ValueError(
            f"foreground must be booleans ({size}, {size}) or ({images}, {size}, {size}), "
            f"got {foreground.dtype} of shape {tuple(foreground.shape)}"
        )
    foreground = foreground.to(sigma.device).expand(images, size, size)
    background = (~foreground).flatten(1)
    if not background.any(1).all():
        raise ValueError("foreground must leave background in every image: that is what concepts are measured against")

    entropy = pixel_entropy(sigma.detach()).flatten(2)
    outside = torch.where(background[:, None], entropy, 0.0).sum(2) / background.sum(1, keepdim=True)
    background_mean = outside.mean(0)
    concepts = background_mean[:, None] - entropy > threshold

    result = {"background_mean": background_mean, "total_percent": _share_kept(concepts, sigma.dtype)}
    travelled = distance.cumsum(0)[epochs.long()]
    for name, side in (("fore", ~background), ("back", background)):
        of_side = concepts & side[:, None]
        most, at = _first_maximum(of_side.sum(2))
        reached = travelled[at]
        result[f"{name}_max_mean"] = reached.mean()
        result[f"{name}_max_var"] = reached.var(correction=0)
        result[f"{name}_max_std"] = reached.std(correction=0)
        result[f"{name}_max_slope"] = (most / reached).mean()
        result[f"{name}_percent"] = _share_kept(of_side, sigma.dtype)
    return result


def _first_maximum(counts):
    """-> the largest of each row, and the first place where it is (argmax may name any)."""
    most = counts.amax(1)
    places = torch.arange(counts.shape[1], device=counts.device)
    return most, torch.where(counts == most[:, None], places, counts.shape[1]).amin(1)


def _share_kept(concepts, dtype):
    """Of (images, checkpoints, pixels): the last checkpoint's share of what any has, averaged over the images."""
    ever = concepts.any(1).sum(1)
    return (concepts[:, -1].sum(1).to(dtype) / ever.clamp(min=1)).mean()
