"""Losses on maps of detectors and segmenters that learn layers of their own: masked generation, boxes."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast.losses.base import SHARE, Loss, Settings, in_own_type
from kdfast.ops import check
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.feature import squared_error


class _Aligned(Loss):
    """A loss of two maps of one size, whose student is brought to the teacher's channels by `align`."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        check.count("student_channels", student_channels)
        check.count("teacher_channels", teacher_channels)
        self.student_channels: int = student_channels
        self.teacher_channels: int = teacher_channels
        same = student_channels == teacher_channels
        self.align: nn.Module = nn.Identity() if same else nn.Conv2d(student_channels, teacher_channels, 1)

    def _check(self, student, teacher):
        for name, x in (("student", student), ("teacher", teacher)):
            check.maps(name, x)
            channels = getattr(self, f"{name}_channels")
            if x.shape[1] != channels:
                raise ValueError(f"{name} must have {name}_channels={channels} channels, got shape {tuple(x.shape)}")
        check.two_maps(student, teacher)


def _recordable(x):
    """`x` for operations that autograd records: it saves no inference tensor."""
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x


class MGD(_Aligned):
    """MGD - Masked Generative Distillation (Yang et al., ECCV 2022).

    ``sum (g(m align(s)) - t)^2 / B``: `align` a 1x1 convolution, or nothing where the channels agree, m a mask, and g,
    `generation`, a 3x3 convolution, ReLU and another, in the teacher's channels. Both are trained with the student, and
    work in the type of their weights, whatever autocast says. Shapes: student (B, student_channels, H, W), teacher (B,
    teacher_channels, H, W); mask (B, 1, H, W) or (B, teacher_channels, 1, 1), bool or floating, True is kept. None
    draws one, other in every call, of positions that are kept with 1 - `mask_ratio`, in eval mode too. 0-d. Gradients
    flow to both.

    Args:
        student_channels, teacher_channels: of the maps.
        mask_ratio: the share that is masked; 0.65 for detection, 0.75 for segmentation. The official classification
            masks whole channels, with 0.15: pass that mask.

    The official weight 2e-5 (7e-5 in classification) is yours to give. ModelOpt's copy takes the mean.
    Op: ``squared_error``.
    """

    settings: ClassVar[Settings] = {"mask_ratio": SHARE}

    def __init__(self, student_channels: int, teacher_channels: int, mask_ratio: float = 0.65) -> None:
        super().__init__(student_channels, teacher_channels)
        self.mask_ratio: float = mask_ratio
        self.generation: nn.Sequential = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        self._check(student, teacher)
        batch, channels, height, width = teacher.shape
        if mask is None:
            mask = torch.rand((batch, 1, height, width), device=student.device) <= 1 - self.mask_ratio
        else:
            check.tensor("mask", mask)
            shapes = (batch, 1, height, width), (batch, channels, 1, 1)
            if tuple(mask.shape) not in shapes or not (mask.dtype == torch.bool or mask.is_floating_point()):
                raise ValueError(
                    f"mask must be bool or floating and {shapes[0]} or {shapes[1]}, got {mask.dtype} "
                    f"{tuple(mask.shape)}"
                )
            check.same_device("mask", mask, student)
            mask = _recordable(mask)
        x = in_own_type(self.align, student)
        generated = in_own_type(self.generation, x * mask.to(x.dtype))
        return squared_error(generated, teacher) * (channels * height * width)


class FGD(_Aligned):
    """FGD - Focal and Global Knowledge Distillation for Detectors (Yang et al., CVPR 2022).

    With s the aligned student, S(x) the softmax of the mean |x| over channels / T, times H W, over positions, A(x) that
    of the mean over positions, times C, over channels:

        fg   = 1/B sum (s - t)^2 S(t) A(t) M,   M of a box 1 / its cells, of several the largest, else 0
        bg   = 1/B sum (s - t)^2 S(t) A(t) N,   N of a cell outside all boxes 1 / how many there are
        att  = 1/B (sum |A(s) - A(t)| + sum |S(s) - S(t)|)
        rel  = 1/B sum (R(s) - R(t))^2,   R(x) = x + block(sum over positions of x softmax(conv(x)))

    and the loss is `foreground` fg + `background` bg + `attention` att + `relation` rel. A box x1 y1 x2 y2 covers the
    cells floor(x1 W / width) to ceil(x2 W / width), both of them, and rows alike; its cells are counted before it is
    cut at the map's border. Shapes: student (B, student_channels, H, W), teacher (B, teacher_channels, H, W); boxes a
    (n, 4) tensor for each image, in pixels, n may be 0; image_sizes (height, width) for each image; 0-d. Gradients flow
    to both, also through S(t) and A(t). `align`, and the convolutions and blocks of both sides, are trained with the
    student; the last layer of a block is 0 at the start.

    Args:
        student_channels, teacher_channels: of the maps.
        temperature: T.
        foreground, background, attention, relation: weights of the terms, at least 0. Configurations differ.

    All is summed in float32, or float64, whatever autocast says. The official code multiplies roots of S, A and M: its
    gradient is NaN where S underflows, and its sums overflow in float16. It divides by an image's size before padding
    and multiplies by the padded map's: pass the padded size for boxes in their place. A corner below 0 there loses the
    box, here it is cut. A row of inf is no box: pad with them for torch.compile, where an image's 0, 1 and more boxes
    are graphs of their own.
    The layers have the official names. Op: none, plain PyTorch.
    """

    settings: ClassVar[Settings] = {
        "temperature": check.positive,
        **dict.fromkeys(("foreground", "background", "attention", "relation"), lambda n, x: check.number(n, x, low=0)),
    }

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        temperature: float = 0.5,
        foreground: float = 1e-3,
        background: float = 5e-4,
        attention: float = 1e-3,
        relation: float = 5e-6,
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        check.count("teacher_channels", teacher_channels, least=2)
        self.temperature: float = temperature
        self.foreground: float = foreground
        self.background: float = background
        self.attention: float = attention
        self.relation: float = relation
        self.conv_mask_s: nn.Conv2d = nn.Conv2d(teacher_channels, 1, 1)
        self.conv_mask_t: nn.Conv2d = nn.Conv2d(teacher_channels, 1, 1)
        self.channel_add_conv_s: nn.Sequential = _context_block(teacher_channels)
        self.channel_add_conv_t: nn.Sequential = _context_block(teacher_channels)
        for mask in (self.conv_mask_s, self.conv_mask_t):
            nn.init.kaiming_normal_(mask.weight, nonlinearity="relu")
            nn.init.zeros_(mask.bias)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        boxes: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]] | Tensor,
    ) -> Tensor:
        self._check(student, teacher)
        _check_boxes(boxes, image_sizes, student)
        student = in_own_type(self.align, student)
        teacher = _recordable(teacher)
        with torch.autocast(student.device.type, enabled=False):
            dtype = accumulator(student, teacher)
            return self._sums(student.to(dtype), teacher.to(dtype), boxes, image_sizes) / max(len(student), 1)

    def _sums(self, student, teacher, boxes, image_sizes):
        inside, outside = box_masks(boxes, image_sizes, student)
        places_s, places_t = (_shares(x, 1, self.temperature) for x in (student, teacher))
        channels_s, channels_t = (_shares(x, (2, 3), self.temperature) for x in (student, teacher))
        gap = student - teacher
        weights = self.foreground * inside + self.background * outside
        errors = fixed_sum((gap.square() * channels_t[:, :, None, None]).movedim(1, -1)) * places_t
        loss = _total(errors * weights)
        difference = _total((channels_s - channels_t).abs()) + _total((places_s - places_t).abs())
        loss = loss + self.attention * difference
        if not self.relation:
            return loss
        contexts = [
            _context(x, mask, block)
            for x, mask, block in (
                (student, self.conv_mask_s, self.channel_add_conv_s),
                (teacher, self.conv_mask_t, self.channel_add_conv_t),
            )
        ]
        return loss + self.relation * _total((gap + torch.sub(*contexts)[:, :, None, None]).square())


def _context_block(channels):
    inner = channels // 2
    block = nn.Sequential(
        nn.Conv2d(channels, inner, 1), nn.LayerNorm([inner, 1, 1]), nn.ReLU(), nn.Conv2d(inner, channels, 1)
    )
    nn.init.zeros_(block[-1].weight)
    nn.init.zeros_(block[-1].bias)
    return block


def _total(x):
    return fixed_sum(x.reshape(-1))


def _shares(x, over, temperature):
    """Softmax of the mean |x| / temperature over the dimensions `over`, times its length: (B, H, W) or (B, C)."""
    x = x.abs()
    x = fixed_sum(x.movedim(1, -1)) / x.shape[1] if over == 1 else fixed_sum(x.flatten(2)) / (x.shape[2] * x.shape[3])
    rows = x.flatten(1)
    return (rows.shape[1] * torch.softmax(rows / temperature, 1)).view(x.shape)


def _context(x, mask, block):
    """What the context block adds to each position: (B, C). Products of float32 are those of float64 (no TF32)."""
    scores = fixed_sum((x * mask.weight.to(x.dtype).view(1, -1, 1, 1)).movedim(1, -1)) + mask.bias.to(x.dtype)
    weights = torch.softmax(scores.flatten(1), 1)
    context = fixed_sum(x.flatten(2) * weights[:, None])
    first, norm, _, last = block

    def linear(x, layer):
        return F.linear(x.double(), layer.weight.flatten(1).double(), layer.bias.double())

    inner = linear(context, first)
    inner = F.layer_norm(inner, inner.shape[1:], norm.weight.flatten().double(), norm.bias.flatten().double(), norm.eps)
    return linear(inner.relu(), last).to(x.dtype)


def _check_boxes(boxes, image_sizes, student):
    for name, given in (("boxes", boxes), ("image_sizes", image_sizes)):
        if not isinstance(given, (list, tuple, Tensor)) or len(given) != len(student):
            got = len(given) if isinstance(given, (list, tuple, Tensor)) else type(given).__name__
            raise ValueError(f"{name} must have one entry for each of the {len(student)} images, got {got}")
    for i, of_image in enumerate(boxes):
        check.tensor(f"boxes[{i}]", of_image)
        if of_image.dim() != 2 or of_image.shape[1] != 4:
            raise ValueError(f"boxes[{i}] must be (n, 4), got shape {tuple(of_image.shape)}")
        if of_image.dtype not in (*check.FLOATS, *check.INTEGERS):
            raise TypeError(f"boxes[{i}] must be floating or integers, got {of_image.dtype}")
        check.same_device(f"boxes[{i}]", of_image, student)
    if isinstance(image_sizes, Tensor):
        if tuple(image_sizes.shape) != (len(student), 2):
            raise ValueError(f"image_sizes must be ({len(student)}, 2), got shape {tuple(image_sizes.shape)}")
        return
    for i, size in enumerate(image_sizes):
        if not isinstance(size, (list, tuple)) or len(size) != 2:
            raise ValueError(f"image_sizes[{i}] must be (height, width), got {size!r}")
        for j, length in enumerate(size):
            check.positive(f"image_sizes[{i}][{j}]", length)


@torch.no_grad()
def box_masks(
    boxes: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]] | Tensor, maps: Tensor
) -> tuple[Tensor, Tensor]:
    """-> (B, H, W) twice, of one image: the weight of the smallest box over a cell or 0; an even share of the rest."""
    (batch, _, height, width), device = maps.shape, maps.device
    if not isinstance(image_sizes, Tensor):
        image_sizes = torch.tensor(image_sizes, dtype=torch.float64, device="cpu")
    sizes = image_sizes.double().reshape(batch, 2).to(device, non_blocking=True)
    if not batch or not any(len(x) for x in boxes):
        inside = maps.new_zeros(batch, height, width)
    else:
        # Places without a box are infinite, which is nowhere; a NaN is everywhere.
        corners = nn.utils.rnn.pad_sequence([x.double() for x in boxes], batch_first=True, padding_value=float("inf"))
        spans = []  # of columns and rows; exact for whole corners, which the quotient first is not
        for i, cells in ((0, width), (1, height)):
            places = corners[..., i::2] * cells / sizes[:, 1 - i, None, None]
            spans.append((places[..., 0].floor(), places[..., 1].ceil()))
        weight = 1 / torch.stack([last + 1 - first for first, last in spans]).prod(0)
        covered = [
            (cells >= first[..., None]) & (cells <= last[..., None])
            for (first, last), cells in zip(
                spans, (torch.arange(n, device=device) for n in (width, height)), strict=True
            )
        ]
        over = covered[1][..., :, None] & covered[0][..., None, :] | corners.isnan().any(-1)[..., None, None]
        weight = torch.where(corners.isnan().any(-1), float("nan"), weight).to(maps.dtype)
        inside = torch.where(over, weight[..., None, None], 0.0).amax(1)
    outside = (inside == 0).to(maps.dtype)
    return inside, outside / fixed_sum(outside.flatten(1)).clamp(min=1)[:, None, None]
