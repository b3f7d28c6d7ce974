"""Images out of a network: DeepInversion for classifiers, DIODE for detectors, without any data."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.losses import bn_statistics_loss, total_variation
from kdfast.ops import check

__all__ = ["Augment", "Change", "ImagePrior", "add_boxes", "box_overlap", "norm_inputs", "random_boxes", "synthesize"]


# ---- what the images are shown as ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Change:
    """One drawn augmentation of a batch of square images: flip, then shift, then contrast, brightness and erasing."""

    side: int
    flip: bool = False
    down: int = 0
    right: int = 0
    contrast: float = 1.0
    brightness: float = 0.0
    erased: tuple[int, int, int] | None = None  # row, column and side of a square

    def images(self, x: Tensor) -> Tensor:
        """Of (B, C, side, side); what is shifted out on one side comes in on the other."""
        x = x.flip(3) if self.flip else x
        x = x.roll((self.down, self.right), (2, 3)) * self.contrast + self.brightness
        if self.erased is None:
            return x
        row, column, size = self.erased
        keep = torch.ones(self.side, self.side, dtype=x.dtype, device=x.device)
        keep[row : row + size, column : column + size] = 0
        return x * keep

    def boxes(self, boxes: Tensor) -> Tensor:
        """Of (..., 4), left, top, right, bottom in pixels, cut off at the border."""
        left, top, right, bottom = boxes.unbind(-1)
        if self.flip:
            left, right = self.side - right, self.side - left
        moved = torch.stack([left + self.right, top + self.down, right + self.right, bottom + self.down], dim=-1)
        return moved.clamp(0, self.side)

    def restored(self, boxes: Tensor) -> Tensor:
        """The boxes of the unchanged images that were found at `boxes` in the changed ones."""
        left, top, right, bottom = boxes.unbind(-1)
        left, right = left - self.right, right - self.right
        if self.flip:
            left, right = self.side - right, self.side - left
        return torch.stack([left, top - self.down, right, bottom - self.down], dim=-1).clamp(0, self.side)


@dataclass(eq=False)
class Augment:
    """Draws a :class:`Change` of each step: images that the network likes only as they are, pixel by pixel, are noise.

    Args:
        flip: mirror half of the steps from left to right.
        jitter: largest shift in pixels, in either direction.
        contrast, brightness: the largest relative change, and the largest absolute one.
        erase: side of a square that is set to 0, in pixels; 0 for none.
        generator: of the draws, on the CPU.
    """

    flip: bool = True
    jitter: int = 2
    contrast: float = 0.1
    brightness: float = 0.1
    erase: int = 0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        for name in ("jitter", "contrast", "brightness", "erase"):
            check.number(name, getattr(self, name), 0)

    def draw(self, side: int) -> Change:
        """A change of images with `side` pixels."""

        def between(low, high):
            return torch.randint(low, high + 1, (), generator=self.generator).item()

        def around(size):
            return size * (2 * torch.rand((), generator=self.generator).item() - 1)

        shifts = between(-self.jitter, self.jitter), between(-self.jitter, self.jitter)
        tones = 1 + around(self.contrast), around(self.brightness)
        corner = between(0, side - self.erase), between(0, side - self.erase)
        return Change(
            side, self.flip and between(0, 1) == 1, *shifts, *tones, (*corner, self.erase) if self.erase else None
        )


# ---- which boxes a detector is to find -------------------------------------------------------------------------------
def random_boxes(
    count: int, classes: int, side: int, smallest: int, largest: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """-> boxes (count, 1, 4), left, top, right, bottom in pixels, inside of the image, and labels (count, 1).

    DIODE starts every image with one object, of a random class, place, and width and height from `smallest` to
    `largest`; :func:`add_boxes` adds to them.
    """
    for name, value in (("count", count), ("classes", classes)):
        check.count(name, value)
    if not 0 < smallest <= largest <= side:
        raise ValueError(f"smallest and largest must be sizes from 0 to side = {side}, got {smallest} and {largest}")
    sizes = smallest + (largest - smallest) * torch.rand(count, 2, generator=generator)
    corner = (side - sizes) * torch.rand(count, 2, generator=generator)
    labels = torch.randint(classes, (count, 1), generator=generator)
    return torch.cat([corner, corner + sizes], dim=1)[:, None], labels


def box_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (N, 4) and (M, 4), left, top, right, bottom: (N, M), 0 where both are empty."""
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    common = (high - low).clamp(min=0).prod(2)
    areas = [(x[:, 2:] - x[:, :2]).clamp(min=0).prod(1) for x in (a, b)]
    union = areas[0][:, None] + areas[1] - common
    return torch.where(union > 0, common / torch.where(union > 0, union, 1.0), 0.0)


def add_boxes(
    boxes: Tensor, labels: Tensor, found: list[tuple[Tensor, Tensor]], most: int = 3, overlap: float = 0.2
) -> tuple[Tensor, Tensor]:
    """DIODE's false-positive sampler: what the detector sees beside the asked objects becomes an object asked for.

    -> boxes (B, N + 1, 4) and labels (B, N + 1): of each image the first detection that overlaps none of its boxes by
    more than `overlap` (intersection over union), where it has fewer than `most`; the label -1 where there is none.
    Shapes: boxes (B, N, 4), labels (B, N), -1 for no object; found a list with (boxes (K, 4), labels (K,)) for each
    image, best first.
    """
    more_boxes, more_labels = torch.zeros_like(boxes[:, :1]), torch.full_like(labels[:, :1], -1)
    for i, (seen, names) in enumerate(found):
        there = boxes[i, labels[i] >= 0]
        if len(there) >= most or not len(seen):
            continue
        free = (box_overlap(seen, there) <= overlap).all(1).nonzero()[:, 0]
        if len(free):
            more_boxes[i, 0], more_labels[i, 0] = seen[free[0]], names[free[0]]
    return torch.cat([boxes, more_boxes], dim=1), torch.cat([labels, more_labels], dim=1)


# ---- the images ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ImagePrior:
    """Weights of what makes images natural: ``statistics sum_l f_l R_l + variation_l1, _l2 (TV) + norm mean_b |x_b|``.

    R_l is :func:`kdfast.bn_statistics_loss` with this `p` of the inputs of batch norm l, f_l = 1 but for the first
    layer, which sees the images' colours: f_0 = first. TV is :func:`kdfast.total_variation`, |x_b| the length of an
    image. The defaults are DIODE's; DeepInversion's ImageNet script takes p = 2, statistics 0.01 and first 10.
    """

    statistics: float = 0.05
    first: float = 2.0
    p: int = 1
    variation_l1: float = 0.0
    variation_l2: float = 1e-3
    norm: float = 0.0

    def __call__(self, images: Tensor, norms: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Tensor:
        value = 0.0
        if self.statistics:
            for i, (layer, x) in enumerate(zip(norms, inputs, strict=True)):
                gap = bn_statistics_loss(x, layer.running_mean, layer.running_var, self.p)
                value = value + self.statistics * (self.first if i == 0 else 1.0) * gap
        if self.variation_l1 or self.variation_l2:
            l1, l2 = total_variation(images)
            value = value + self.variation_l1 * l1 + self.variation_l2 * l2
        if self.norm:
            value = value + self.norm * images.flatten(1).norm(dim=1).mean()
        return value


@contextlib.contextmanager
def norm_inputs(norms: Sequence[nn.Module]) -> Iterator[Any]:
    """-> a list that after each forward holds the inputs of these batch norms, in their order."""
    inputs: list[Any] = [None] * len(norms)

    def keep(number, arguments):
        inputs[number] = arguments[0]

    handles = [
        norm.register_forward_pre_hook(lambda module, arguments, number=number: keep(number, arguments))
        for number, norm in enumerate(norms)
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def synthesize(
    model: nn.Module,
    norms: Sequence[nn.Module],
    loss: Callable[[Any, Tensor, Change, int], Tensor],
    images: Tensor,
    steps: int,
    prior: ImagePrior | None = None,
    rate: float = 0.05,
    augment: Augment | None = None,
    limits: tuple[float, float] | None = None,
) -> Tensor:
    """DIODE - Data-free Knowledge Distillation for Object Detection (Chawla et al., WACV 2021), and DeepInversion -
    Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion (Yin et al., CVPR 2020): -> images like those
    that `model` was trained on, made from nothing but its weights.

    Of each batch ``loss(outputs, shown, change, step) + prior`` is minimised in the pixels by Adam, whose rate falls
    along a cosine to 0. ``shown`` are the images after the step's `change`, which moves what a detector has to find as
    well, ``outputs = model(shown)``; any model fits whose batch norms are listed. A classifier's loss is the
    cross-entropy with the wanted labels, beside :func:`kdfast.adaptive_inversion` for the adaptive images::

        def loss(outputs, shown, change, step):
            return detection_loss(outputs, change.boxes(boxes), labels)

        images = synthesize(detector.eval(), norms, loss, torch.rand(64, 3, 32, 32), 200, augment=Augment())

    The official DIODE takes ever fewer of the layers into the prior; here it is all of them in each step.

    Args:
        model: in evaluation mode; its weights and statistics stay as they are.
        norms: its batch norms, in the order of their use, with running statistics.
        loss: as above, 0-d.
        images: (B, C, n, n), the start; it is not changed.
        steps, rate: of Adam.
        prior: by default DIODE's, :class:`ImagePrior`.
        augment: none by default.
        limits: the smallest and the largest value of a pixel, if there are any.
    """
    check.maps("images", images)
    check.count("steps", steps)
    check.positive("rate", rate)
    norms = list(norms)
    for number, norm in enumerate(norms):
        if norm.training:
            raise ValueError(f"model must be in evaluation mode, but norms[{number}] is training")
        if getattr(norm, "running_mean", None) is None:
            raise ValueError(f"norms must have running statistics, norms[{number}] is {norm}")
    prior = ImagePrior() if prior is None else prior
    images = images.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([images], lr=rate)
    with norm_inputs(norms) as inputs:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            change = Change(images.shape[3]) if augment is None else augment.draw(images.shape[3])
            shown = change.images(images)
            outputs = model(shown)
            if any(x is None for x in inputs):
                unused = [number for number, x in enumerate(inputs) if x is None]
                raise ValueError(f"norms must all be used by model, numbers {unused} are not")
            value = loss(outputs, shown, change, step) + prior(images, norms, inputs)
            (images.grad,) = torch.autograd.grad(value, images)
            optimizer.step()
            if limits is not None:
                with torch.no_grad():
                    images.clamp_(*limits)
    return images.detach()
