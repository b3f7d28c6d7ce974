"""Terms of images that are made from a network, without data: DeepInversion, and DIODE for detectors."""

import functools

import torch
from torch import Tensor

from kdfast.ops import check
from kdfast.ops.accumulate import accumulator, fixed_sum, weighted_sum
from kdfast.ops.moments import channel_moments


def _norm(x):
    """Euclidean length of all of x, summed in a fixed order, with the gradient 0 at 0."""
    squares = fixed_sum(x.square().flatten())
    zero = squares == 0  # a NaN stays one
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())


def bn_statistics_loss(
    x: Tensor, running_mean: Tensor, running_var: Tensor, p: int = 2, alpha_mean: float = 1.0, alpha_var: float = 1.0
) -> Tensor:
    """Distance of a batch from what a batch norm saw in training (Yin et al., CVPR 2020; Chawla et al., WACV 2021).

    ``alpha_mean |running_mean - mean(x)|_p + alpha_var |running_var - var(x)|_p``, mean and biased variance of each
    channel over samples and positions: x is the input of the batch norm. DeepInversion takes p = 2, DIODE p = 1 or 2;
    both add the terms of all batch norms, the first one's times a factor of its own.
    Shapes: x (B, C, ...), running_mean, running_var (C,), constants; 0-d. At an exact match the gradient is 0.
    Op: ``channel_moments``, which reads x once; the official hooks copy it and read it several times.
    """
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p!r}")
    check.number("alpha_mean", alpha_mean)
    check.number("alpha_var", alpha_var)
    check.embeddings("x", x)
    for name, values in (("running_mean", running_mean), ("running_var", running_var)):
        check.shaped(name, values, x.shape[1:2], x, of="x", meaning=", one number per channel")
    moments = channel_moments(x)
    gaps = torch.stack([running_mean, running_var]).detach().to(moments.dtype) - moments

    def distance(gap):
        return fixed_sum(gap.abs()) if p == 1 else _norm(gap)

    of_mean, of_var = (functools.partial(distance, gap) for gap in gaps)
    return weighted_sum(x, (alpha_mean, of_mean), (alpha_var, of_var))


def total_variation(x: Tensor) -> Tensor:
    """-> l1, l2: how rough images are, over neighbours in four directions (Yin et al., CVPR 2020).

    With d the differences of neighbours across, down and on both diagonals: l1 is the sum of the four means of |d|, l2
    that of the four Euclidean lengths of d over the whole batch, as in the official code (not one for each image).
    Shapes: x (B, C, H, W); both 0-d. A direction without neighbours (H or W of 1) adds 0; at a length of 0 the gradient
    is 0.
    """
    check.maps("x", x)
    x = x.to(accumulator(x))
    directions = (
        x[..., :-1] - x[..., 1:],
        x[..., :-1, :] - x[..., 1:, :],
        x[..., 1:, :-1] - x[..., :-1, 1:],
        x[..., :-1, :-1] - x[..., 1:, 1:],
    )
    l1 = sum(fixed_sum(d.abs().flatten()) / max(d.numel(), 1) for d in directions)
    return l1, sum(_norm(d) for d in directions)


def self_similarity(x: Tensor, threshold: float) -> Tensor:
    """How much the images of a batch resemble each other: DIODE's diversity term (Chawla et al., WACV 2021).

    ``|S|`` without the diagonal, Euclidean over the matrix, S the cosines of the samples' features, averaged over the
    positions, where they reach `threshold`; smaller ones count as 0. Shapes: x (B, C, H, W) or (B, C); 0-d.
    The official code subtracts the identity instead of leaving the diagonal out, and so returns a rounding where
    nothing reaches the threshold; here that is exactly 0, with the gradient 0. A sample of zeros resembles nothing.
    """
    check.embeddings("x", x)
    check.number("threshold", threshold)
    features = x.to(accumulator(x)).unsqueeze(2) if x.dim() == 2 else x.to(accumulator(x)).flatten(2)
    features = fixed_sum(features) / features.shape[2]
    largest = features.detach().abs().amax(1, keepdim=True)  # cosines do not depend on it, but squares may overflow
    features = features / torch.where(largest > 0, largest, 1.0)
    squares = fixed_sum(features.square())[:, None]
    units = features * torch.where(squares > 0, squares, 1.0).rsqrt()
    # A product of each pair, summed in a fixed order: batches of images to be made are small.
    cosines = fixed_sum(units[:, None] * units[None])
    others = ~torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
    return _norm(torch.where(others & ~(cosines < threshold), cosines, 0.0))


def adaptive_inversion(student: Tensor, teacher: Tensor, temperature: float = 3.0) -> Tensor:
    """The competition term of adaptive DeepInversion: small where the networks disagree (Yin et al., CVPR 2020).

    ``1 - clamp(KL(M || P) / 2 + KL(M || Q) / 2, 0, 1)`` averaged over the batch, P and Q the softmax of student and
    teacher at `temperature`, M = (P + Q) / 2, all three clamped to [0.01, 0.99] first. That is the official formula,
    not the Jensen-Shannon divergence, whose KL goes the other way round. Where the clamp holds the gradient is 0.
    Shapes: student, teacher (B, C) logits; 0-d. Gradients flow to both, and through both to the images.
    """
    check.pair(student, teacher)
    check.positive("temperature", temperature)
    dtype = accumulator(student, teacher)
    p, q = ((x.to(dtype) / temperature).softmax(1) for x in (student, teacher))
    p, q, m = (x.clamp(0.01, 0.99) for x in (p, q, (p + q) / 2))
    rows = fixed_sum(m * (m.log() - (p.log() + q.log()) / 2))
    return 1 - (fixed_sum(rows) / max(student.shape[0], 1)).clamp(0, 1)
