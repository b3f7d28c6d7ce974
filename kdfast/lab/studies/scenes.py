"""Generated scenes of shapes; for them a small segmenter, and a one-stage detector with its loss and precision."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.procedures import box_overlap
from kdfast.runs.determinism import derived_seed

__all__ = ["CLASSES", "SIDE", "Detector", "Segmenter", "class_maps", "decode", "detection_loss"]
__all__ += ["mean_average_precision", "mean_overlap", "scenes"]

SIDE = 32  # pixels
CLASSES = ("disc", "square", "cross")
SIZES = (9, 15)  # of a shape, in pixels
MOST = 3  # shapes in a scene
CELL = 4  # pixels of a cell along a side; an object belongs to the cell of its centre


# ---- scenes ----------------------------------------------------------------------------------------------------------
def scenes(count: int, *seed: Any) -> tuple[Tensor, Tensor, Tensor]:
    """-> images (count, 3, SIDE, SIDE) in 0..1, boxes (count, MOST, 4) in pixels, labels (count, MOST), -1 for none.

    One to three shapes that do not overlap, each of one bright colour, on a dark slope of a colour with noise.
    """
    generator = torch.Generator().manual_seed(derived_seed(*seed))

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    across = torch.linspace(0, 1, SIDE)
    slope = uniform(-0.2, 0.2, count, 3, 1, 1) * across + uniform(-0.2, 0.2, count, 3, 1, 1) * across[:, None]
    images = uniform(0.1, 0.4, count, 3, 1, 1) + slope
    boxes, labels = torch.zeros(count, MOST, 4), torch.full((count, MOST), -1)
    for i in range(count):
        for number in range(int(torch.randint(1, MOST + 1, (), generator=generator))):
            size = uniform(*SIZES, 1)
            corner = uniform(0, 1, 2) * (SIDE - size)
            box = torch.cat([corner, corner + size])
            if (box_overlap(box[None], boxes[i]) > 0).any():
                continue
            label = int(torch.randint(len(CLASSES), (), generator=generator))
            images[i][:, _inside(label, box)] = uniform(0.4, 1.0, 3, 1)
            boxes[i, number], labels[i, number] = box, label
    images = images + 0.05 * torch.randn(images.shape, generator=generator)
    return images.clamp(0, 1), boxes, labels


def _inside(label, box):
    """Which pixels a shape has."""
    rows, columns = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    left, top, right, bottom = box
    x, y = (columns - left) / (right - left) * 2 - 1, (rows - top) / (bottom - top) * 2 - 1  # -1..1 within the box
    return _SHAPES[CLASSES[label]](x, y)


def class_maps(boxes: Tensor, labels: Tensor) -> Tensor:
    """Of scenes: 0 for the background, 1 and more for the shapes, (count, SIDE, SIDE)."""
    maps = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.long)
    for i, number in (labels >= 0).nonzero().tolist():
        label = int(labels[i, number])
        maps[i][_inside(label, boxes[i, number])] = 1 + label
    return maps


def _within(x, y):
    return torch.maximum(x.abs(), y.abs()) <= 1


_SHAPES = {
    "disc": lambda x, y: x.square() + y.square() <= 1,
    "square": _within,
    "cross": lambda x, y: _within(x, y) & (torch.minimum(x.abs(), y.abs()) <= 0.4),
}


# ---- the segmenter ---------------------------------------------------------------------------------------------------
class Segmenter(nn.Module):
    """Images (B, 3, n, n) -> logits (B, 1 + classes, n / 2, n / 2): four convolutions and a classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers, channels = [], 3
        for out, stride in ((width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 1)):
            layers += [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.body: nn.Sequential = nn.Sequential(*layers)
        self.head: nn.Conv2d = nn.Conv2d(channels, 1 + len(CLASSES), 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def mean_overlap(found: Tensor, maps: Tensor) -> float:
    """Intersection over union of two class maps, meaned over background and shapes, in percent."""
    ratios = []
    for name in range(1 + len(CLASSES)):
        a, b = found == name, maps == name
        ratios.append((a & b).sum().double() / (a | b).sum().clamp(min=1))
    return 100 * torch.stack(ratios).mean().item()


# ---- the detector ----------------------------------------------------------------------------------------------------
class Detector(nn.Module):
    """Images (B, 3, n, n) -> raw outputs (B, 5 + classes, n / CELL, n / CELL).

    Of each cell: logit of an object whose centre lies in it; logits of the centre's place in the cell, across and down;
    logarithms of width and height in cells; logits of the classes.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        layers, channels = [], 3
        for out, stride in ((width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 2), (4 * width, 1), (4 * width, 1)):
            convolution = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.body: nn.Sequential = nn.Sequential(*layers)
        self.head: nn.Conv2d = nn.Conv2d(channels, 5 + len(CLASSES), 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    @property
    def norms(self) -> list[nn.Module]:
        """The batch norms in the order of their use."""
        return [layer for layer in self.body if isinstance(layer, nn.BatchNorm2d)]


def detection_loss(raw: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of objects and classes and mean distance of places and sizes, as in YOLO's first version."""
    image, number = (labels >= 0).nonzero(as_tuple=True)
    box, label = boxes[image, number], labels[image, number]
    centre, size = (box[:, :2] + box[:, 2:]) / 2 / CELL, ((box[:, 2:] - box[:, :2]) / CELL).clamp(min=0.1)
    cell = centre.floor().clamp(0, raw.shape[3] - 1)
    column, row = cell.long().unbind(1)
    objects = torch.zeros_like(raw[:, 0])
    objects[image, row, column] = 1.0
    own = raw[image, :, row, column]
    place = F.binary_cross_entropy_with_logits(own[:, 1:3], (centre - cell).clamp(0, 1))
    of_objects = F.binary_cross_entropy_with_logits(raw[:, 0], objects, reduction="sum") / max(len(image), 1)
    return of_objects + place + F.l1_loss(own[:, 3:5], size.log()) + F.cross_entropy(own[:, 5:], label)


@torch.no_grad()
def decode(raw: Tensor, threshold: float = 0.05, overlap: float = 0.4) -> list[tuple[Tensor, Tensor, Tensor]]:
    """-> of each image (boxes (K, 4), labels (K,), scores (K,)), best first, without those that overlap a better one
    of their class."""
    found = []
    rows, columns = torch.meshgrid(torch.arange(raw.shape[2]), torch.arange(raw.shape[3]), indexing="ij")
    cells = torch.stack([columns, rows])
    for one in raw:
        chances, classes = one[5:].softmax(0).max(0)
        scores = (one[0].sigmoid() * chances).flatten()
        centre, half = (cells + one[1:3].sigmoid()) * CELL, one[3:5].clamp(-2, 2).exp() * CELL / 2
        boxes = torch.cat([centre - half, centre + half]).flatten(1).T
        order = scores.argsort(descending=True, stable=True)
        order = order[scores[order] > threshold]
        boxes, labels, scores = boxes[order], classes.flatten()[order], scores[order]
        rival = (box_overlap(boxes, boxes) > overlap) & (labels[:, None] == labels)
        kept = []
        for k in range(len(boxes)):
            if not rival[k, kept].any():
                kept.append(k)
        found.append((boxes[kept], labels[kept], scores[kept]))
    return found


def mean_average_precision(
    found: list[tuple[Tensor, Tensor, Tensor]], boxes: Tensor, labels: Tensor, overlap: float = 0.5
) -> float:
    """Of detections as :func:`decode` gives them, in percent: the area below precision over recall, meaned over
    the classes.

    A detection is right if it overlaps an object of its class, that no better one has found, by at least `overlap`.
    """
    averages = []
    for name in range(len(CLASSES)):
        scores, right = [], []
        for i, (seen, names, chances) in enumerate(found):
            there = boxes[i, labels[i] == name]
            free = torch.ones(len(there), dtype=torch.bool)
            for box, chance in zip(seen[names == name], chances[names == name], strict=True):
                overlaps = torch.where(free, box_overlap(box[None], there)[0], -1.0)
                hit = len(there) > 0 and overlaps.max() >= overlap
                if hit:
                    free[overlaps.argmax()] = False
                scores.append(float(chance))
                right.append(bool(hit))
        order = torch.tensor(scores).argsort(descending=True, stable=True)
        hits = torch.tensor(right, dtype=torch.float64)[order]
        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
        best = precision.flip(0).cummax(0).values.flip(0) if len(hits) else precision
        averages.append((best * hits).sum() / max(int((labels == name).sum()), 1))
    return 100 * torch.stack(averages).mean().item()
