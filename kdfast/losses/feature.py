"""Losses on feature maps, element by element: they run on the feature kernels. And the layers that come with them."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast._types import Tensors
from kdfast.losses.base import REDUCTION, Loss, made_of_settings, setting
from kdfast.ops import check
from kdfast.ops.accumulate import accumulator, fixed_sum, total
from kdfast.ops.feature import (
    activation_boundary,
    channel_squared_error,
    normalized_error,
    partial_squared_error,
    pyramid_error,
    squared_error,
)
from kdfast.ops.pool import to_smaller_square


class FitNets(Loss):
    """FitNets - Hints for Thin Deep Nets (Romero et al., ICLR 2015).

    ``mean (s - t)^2`` of a student's map, brought to the teacher's shape by a :class:`HintRegressor`, and the hint.
    Shapes: student, teacher of one shape (B, C, H, W) or (B, ...), or equally long lists, whose losses are added; 0-d.
    Gradients flow to both. The mean over all elements is that of RepDistiller; the official Theano code sums over the
    channels and halves. Op: ``squared_error``.
    Usual weight: 100 (RepDistiller).
    """

    def forward(self, student: Tensors, teacher: Tensors) -> Tensor:
        return total(squared_error(s, t) for s, t in check.layers(student, teacher, check.embeddings, check.same_shape))


def _shape(name, shape):
    shape = tuple(shape)
    if len(shape) != 4 or any(n < 1 for n in shape[1:]):
        raise ValueError(f"{name} must be (batch, channels, height, width), got {shape}")
    return shape[1:]


class HintRegressor(nn.Sequential):
    """A convolution from the student's shape to the teacher's, batch norm and ReLU: what FitNets trains beside it.

    Shapes: student_shape, teacher_shape (B, C, H, W) as ``tensor.shape`` gives them, B is ignored. The convolution is
    that of RepDistiller: 3 x 3 with stride 2 from twice the size, 4 x 4 transposed with stride 2 from half of it, else
    a kernel of the difference in size, plus 1. A student's map that is otherwise smaller is a ValueError. RepDistiller
    looks at heights alone, and leaves other widths to fail later.
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        channels, height, width = _shape("student_shape", student_shape)
        teacher_channels, teacher_height, teacher_width = _shape("teacher_shape", teacher_shape)
        if (height, width) == (2 * teacher_height, 2 * teacher_width):
            convolution = nn.Conv2d(channels, teacher_channels, 3, stride=2, padding=1)
        elif (2 * height, 2 * width) == (teacher_height, teacher_width):
            convolution = nn.ConvTranspose2d(channels, teacher_channels, 4, stride=2, padding=1)
        elif height >= teacher_height and width >= teacher_width:
            kernel = (1 + height - teacher_height, 1 + width - teacher_width)
            convolution = nn.Conv2d(channels, teacher_channels, kernel)
        else:
            raise ValueError(
                f"student_shape must be as large as teacher_shape, or half or twice its size, got {height} x {width} "
                f"for {teacher_height} x {teacher_width}"
            )
        super().__init__(convolution, nn.BatchNorm2d(teacher_channels), nn.ReLU())


class FT(Loss):
    """FT - Paraphrasing Complex Network: Network Compression via Factor Transfer (Kim, Park and Kwak, NeurIPS 2018).

    ``mean |s / |s| - t / |t||``, |s| the norm of a sample's whole factor: the student's :class:`Translator` against the
    teacher's :class:`Paraphraser`. Shapes: student_factor, teacher_factor of one shape (B, M, H, W) or (B, ...), or
    equally long lists, whose losses are added; 0-d. Gradients flow to both; detach the teacher's, whose paraphraser was
    trained before. A factor of zeros gets no gradient (official: one of 1e12). RepDistiller's FactorTransfer compares
    attention maps instead. Op: ``normalized_error``.
    """

    def forward(self, student_factor: Tensors, teacher_factor: Tensors) -> Tensor:
        names = ("student_factor", "teacher_factor")
        pairs = check.layers(student_factor, teacher_factor, check.embeddings, check.same_shape, names)
        return total(normalized_error(s, t) for s, t in pairs)


def _convolutions(kind, *channels):
    layers = []
    for before, after in zip(channels, channels[1:], strict=False):
        layers += [kind(before, after, 3, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


class Paraphraser(nn.Module):
    """The autoencoder of FT on the teacher's map: ``paraphraser(map)`` is the factor.

    Before the student, train it to copy: ``F.mse_loss(paraphraser.reconstruct(map), map)``. Three 3 x 3 convolutions
    (channels to `factors` in the second), each with LeakyReLU(0.1), and three transposed ones back, without batch norm
    as in the official code. Shapes: map (B, channels, H, W), factor (B, factors, H, W).
    """

    def __init__(self, channels: int, factors: int) -> None:
        super().__init__()
        check.count("channels", channels)
        check.count("factors", factors)
        self.encoder: nn.Sequential = _convolutions(nn.Conv2d, channels, channels, factors, factors)
        self.decoder: nn.Sequential = _convolutions(nn.ConvTranspose2d, factors, factors, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def reconstruct(self, x: Tensor) -> Tensor:
        """The map as far as its factor knows it, (B, channels, H, W)."""
        return self.decoder(self.encoder(x))


class Translator(nn.Module):
    """FT's layers on the student's map, trained with the student: ``translator(map)`` is its factor.

    Three 3 x 3 convolutions (channels to `factors` in the second), each with LeakyReLU(0.1). Shapes: map
    (B, channels, H, W), factor (B, factors, H, W); `factors` is the paraphraser's.
    """

    def __init__(self, channels: int, factors: int) -> None:
        super().__init__()
        check.count("channels", channels)
        check.count("factors", factors)
        self.encoder: nn.Sequential = _convolutions(nn.Conv2d, channels, channels, factors, factors)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


@made_of_settings
class AB(Loss):
    """AB - Knowledge Transfer via Distillation of Activation Boundaries (Heo, Lee, Yun and Choi, AAAI 2019).

    ``max(0, margin - s)^2`` where the teacher's neuron is active (t > 0), ``max(0, s + margin)^2`` where it is not:
    the student comes to the same side of 0. Shapes: pre-activations student, teacher of one shape (B, C, H, W) or
    (B, ...), or equally long lists, whose losses are added; 0-d (``reduction="none"``: (B,)). "sum" is the official
    code's and "mean" divides it by B; weights 1 / 2^k of the layers are the caller's. The gradient goes to the student
    and stops at the teacher. Op: ``activation_boundary``.

    Args:
        margin: how far from 0 a neuron has to be.
        reduction: "sum", "mean" or "none", as above.
    """

    margin: float = setting(1.0, check.number)
    reduction: str = setting("sum", REDUCTION)

    def forward(self, student: Tensors, teacher: Tensors) -> Tensor:
        pairs = check.layers(student, teacher, check.embeddings, check.same_shape)
        return total(activation_boundary(s, t, self.margin, reduction=self.reduction) for s, t in pairs)


@made_of_settings
class OFD(Loss):
    """OFD - A Comprehensive Overhaul of Feature Distillation (Heo et al., ICCV 2019).

    ``(s - u)^2`` with ``u = max(t, margin)``, but 0 where ``s <= u <= 0``: a student below a target that is not active
    is left alone. Shapes: student (through an :class:`OFDConnector`) and teacher pre-activations (B, C, H, W), margin
    (C,) from :func:`ofd_margin` or (1, C, 1, 1), or equally long lists of all three, whose losses are added; 0-d
    (``reduction="none"``: (B,)). "sum" is the official code's and "mean" divides it by B; weights 1 / 2^k of the layers
    are the caller's. Gradients flow to both (to the teacher half of it where t = margin) and stop at the margin.
    Op: ``partial_squared_error``.
    Usual weight: 1e-4, an earlier layer half (the authors' code for ImageNet).

    Args:
        reduction: "sum", "mean" or "none", as above.
    """

    reduction: str = setting("sum", REDUCTION)

    def forward(self, student: Tensors, teacher: Tensors, margin: Tensors) -> Tensor:
        layers = check.layers(student, teacher, check.embeddings, check.same_shape, margin=margin)
        return total(partial_squared_error(*layer, reduction=self.reduction) for layer in layers)


@torch.no_grad()
def ofd_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """OFD's margin per channel (C,): the mean of a batch norm's output where it is negative.

    Of the normal distribution with mean `bias` and standard deviation ``|weight|``, both (C,) as the batch norm before
    the teacher's ReLU has them; ``-3 |weight|`` where less than 0.1 % is negative. In float64, returned in the type of
    `weight`, at least float32. A weight of 0 gives ``min(bias, 0)`` (official: ZeroDivisionError).
    """
    for name, x in (("weight", weight), ("bias", bias)):
        check.floating(name, x)
        if x.dim() != 1 or x.shape != weight.shape:
            expected = "(channels,)" if name == "weight" else f"weight's shape {tuple(weight.shape)}"
            raise ValueError(f"{name} must have {expected}, got shape {tuple(x.shape)}")
    check.same_device("bias", bias, weight, of="weight")
    spread, mean = weight.double().abs(), bias.double()
    z = mean / spread.clamp(min=torch.finfo(torch.float64).tiny)
    negative = torch.special.ndtr(-z)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    # Compared so that a NaN stays one.
    margin = torch.where(negative <= 0.001, -3 * spread, mean - spread * density / negative)
    return torch.where(spread == 0, mean.clamp(max=0), margin).to(accumulator(weight, bias))


class OFDConnector(nn.Module):
    """OFD's layer from the student's channels to the teacher's: a 1 x 1 convolution without bias, and batch norm.

    Shapes: (B, student_channels, H, W) to (B, teacher_channels, H, W), before a ReLU. Initialised as the official one.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        check.count("student_channels", student_channels)
        check.count("teacher_channels", teacher_channels)
        self.convolution: nn.Conv2d = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
        self.norm: nn.BatchNorm2d = nn.BatchNorm2d(teacher_channels)
        nn.init.normal_(self.convolution.weight, std=math.sqrt(2 / teacher_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolution(x))


def variance_of(log_scale: Tensor, eps: float) -> Tensor:
    """``softplus(log_scale) + eps``. torch's own softplus is x itself above a threshold, which is off by 2e-9."""
    return torch.logaddexp(log_scale, log_scale.new_zeros(())) + eps


def gaussian_error(mean: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """``mean 1/2 [(mean - target)^2 / v + log v]`` of two maps (B, C, H, W), v one variance per channel (C,)."""
    errors = channel_squared_error(mean, target)
    variance, channels = variance.to(errors.dtype), variance.numel()
    # Of each channel its mean square over its variance, and the variance's logarithm.
    terms = torch.addcdiv(variance.log(), errors, variance, value=channels / max(target.numel(), 1))
    return fixed_sum(terms) * (0.5 / channels)


class VID(Loss):
    """VID - Variational Information Distillation for Knowledge Transfer (Ahn et al., CVPR 2019).

    ``mean 1/2 [(r(s) - t)^2 / v + log v]``, r three 1 x 1 convolutions with ReLU between and v = softplus(log_scale) +
    eps one variance per channel of the teacher, all trained with the student. Shapes: student
    (B, student_channels, H, W), teacher (B, teacher_channels, H', W'), or equally long lists of layers with these
    channels, whose losses are added; 0-d. The map of the larger height is average-pooled to a square of the smaller
    height. Gradients flow to both. RepDistiller's log(1 + exp(x)) loses digits below x = -8 and overflows at 89; this
    softplus does neither. The regressor works in the type of its weights, whatever autocast says.
    Op: ``channel_squared_error``.
    Usual weight: 1 (torchdistill).

    Args:
        student_channels, teacher_channels: of the maps.
        mid_channels: between the convolutions of r.
        init_variance: v at the start.
        eps: the least v.
    """

    def __init__(
        self,
        student_channels: int,
        mid_channels: int,
        teacher_channels: int,
        init_variance: float = 5.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        channels = dict(student_channels=student_channels, mid_channels=mid_channels, teacher_channels=teacher_channels)
        for name, value in channels.items():
            check.count(name, value)
        check.positive("eps", eps)
        check.positive("init_variance", init_variance)
        if init_variance <= eps:
            raise ValueError(f"init_variance must be above eps={eps}, got {init_variance}")
        self.student_channels = student_channels
        self.mid_channels = mid_channels
        self.teacher_channels = teacher_channels
        self.init_variance = init_variance
        self.eps = eps
        self.regressor: nn.Sequential = nn.Sequential(
            nn.Conv2d(student_channels, mid_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(mid_channels, mid_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(mid_channels, teacher_channels, 1, bias=False),
        )
        # softplus(log_scale) = init_variance - eps
        start = init_variance - eps
        self.log_scale: nn.Parameter = nn.Parameter(
            torch.full((teacher_channels,), start + math.log(-math.expm1(-start)))
        )

    def forward(self, student: Tensors, teacher: Tensors) -> Tensor:
        return total(self.of_layer(s, t) for s, t in check.layers(student, teacher, self.check_maps))

    def check_maps(self, name: str, x: Tensor) -> None:
        check.maps(name, x)
        side = "student_channels" if name.startswith("student") else "teacher_channels"
        if x.shape[1] != getattr(self, side):
            raise ValueError(f"{name} must have {side}={getattr(self, side)} channels, got shape {tuple(x.shape)}")

    def of_layer(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = to_smaller_square(student, teacher)
        with torch.autocast(student.device.type, enabled=False):
            mean = self.regressor(student.to(self.log_scale.dtype))
        return gaussian_error(mean, teacher, variance_of(self.log_scale.to(accumulator(mean, teacher)), self.eps))


@functools.cache
def _leave_uncompiled():
    # Not a decorator: it loads torch._dynamo, which takes longer than the rest of kdfast.
    reason = "JacobianMatching needs second derivatives, which compiled graphs do not have"
    JacobianMatching.forward = torch.compiler.disable(JacobianMatching.forward, reason=reason)


class JacobianMatching(Loss):
    """JacobianMatching - Knowledge Transfer with Jacobian Matching (Srinivas and Fleuret, ICML 2018).

    ``mean (J_s / |J_s| - J_t / |J_t|)^2`` over samples and pixels, J the gradient of the labelled class's logit in the
    image. Shapes: student, teacher (B, C) logits with their graphs, images (B, ...) that required a gradient before
    both networks ran, labels (B,) integers; 0-d. The gradient goes through the student's double backward, to its
    weights and the images, and stops at the teacher. The normalised form is that of AberHu's code; no official one is
    known. A Jacobian of zeros gets no gradient. torch.compile leaves this loss uncompiled (an error with
    ``fullgraph=True``), because compiled graphs have no second derivative. Op: ``normalized_error``.
    """

    def __new__(cls, *arguments: Any, **more: Any) -> "JacobianMatching":  # copies and unpickled ones pass here, too
        _leave_uncompiled()
        return super().__new__(cls)

    def forward(self, student: Tensor, teacher: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        check.pair(student, teacher)
        labels = check.class_indices(labels, student)
        check.same_batch("images", images, student)
        if not images.requires_grad:
            raise ValueError("images must require a gradient before both networks run: images.requires_grad_()")
        classes = student.shape[1]
        if labels.device.type == "cpu":
            check.label_range(labels, classes)
        chosen = labels[:, None] == torch.arange(classes, device=labels.device)
        teacher_jacobian = _jacobian("teacher", teacher, images, chosen, create_graph=False)
        return normalized_error(_jacobian("student", student, images, chosen, create_graph=True), teacher_jacobian, 2)


def _jacobian(name, logits, images, chosen, create_graph):
    """d (each row's chosen logit) / d images, of the images' shape."""
    message = f"{name} must be logits with their graph from images (no torch.no_grad, no detach in between)"
    if not logits.requires_grad:
        raise ValueError(message)
    with torch.enable_grad():
        (jacobian,) = torch.autograd.grad(
            logits, images, chosen.to(logits.dtype), retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    if jacobian is None:
        raise ValueError(message)
    return jacobian


class HCL(Loss):
    """HCL - Distilling Knowledge via Knowledge Review, hierarchical context loss (Chen, Liu, Zhao and Jia, CVPR 2021).

    Per layer ``[mse(s, t) + sum_k 2^-k mse(pool_k(s), pool_k(t))] / (1 + sum_k 2^-k)`` with average pooling to 4 x 4,
    2 x 2 and 1 x 1, of which those count that are smaller than the map's height; k numbers these. Shapes: student,
    teacher maps of one shape (B, C, H, W), or equally long lists, whose losses are added; 0-d. Gradients flow to both.
    Pooling is linear, so only the difference is pooled, in one read of both maps. Op: ``pyramid_error``.
    """

    def forward(self, student: Tensors, teacher: Tensors) -> Tensor:
        pairs = check.layers(student, teacher, check.maps, check.same_shape)
        return total(pyramid_error(s, t) for s, t in pairs)
