"""How alike the heads of an ensemble are: plain PyTorch, with the gradient written out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast._types import Networks
from kdfast.losses.base import Loss, made_of_settings, one_of, setting
from kdfast.ops import check
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.networks import matrices, network_list
from kdfast.ops.rows import log_softmax, row_stats
from kdfast.ops.saved import save, saved


def _rest(x):
    """At each head the sum of the other heads [M, B, C]; a total minus a head would cancel digits."""
    before, after = [torch.zeros_like(x[0])], [torch.zeros_like(x[0])]
    for i in range(len(x) - 1):
        before.append(before[-1] + x[i])
        after.append(after[-1] + x[-1 - i])
    return torch.stack(before) + torch.stack(after[::-1])


# A relation: probabilities p and their logarithms [M, B, C], and `others` [B, C], which is 0 at the label ->
# what is summed over ordered pairs of heads and classes, its slope in p, its slope in log p (or None).
# q = p others are the probabilities of the classes that are not the label's.
def _l2(p, log_p, others):
    gap = (p - p[0]) * others
    gap = gap - gap.mean(0)  # sum_ij |q_i - q_j|^2 = 2 M sum_i |q_i - mean q|^2, and 0 where the heads are equal
    return 2 * len(p) * gap * gap, 4 * len(p) * gap * others, None


def _cos(p, log_p, others):
    norm = (fixed_sum(p * p)[..., None] + 1e-8).sqrt()  # of all classes
    u = p * others / norm
    slope = 2 * _rest(u)
    along = fixed_sum(slope * u)[..., None]
    return slope * u / 2, (slope * others - along * p / norm) / norm, None


def _js(p, log_p, others):
    q = p * others
    rest = _rest((q + 1e-7).log())
    return -q * rest, -(rest + _rest(q) / (q + 1e-7)) * others, None


def _distil(p, log_p, others):
    target, slope = _rest(p), -_rest(log_p)
    # A class that a head excludes has no slope: nobody gives it a probability, or the loss is infinite.
    return -torch.where(target == 0, 0.0, target * log_p), torch.where(slope.isinf(), 0.0, slope), -target


RELATIONS: dict[str, Callable[..., Any]] = {"l2": _l2, "cos": _cos, "js": _js, "distil": _distil}


class _Diversity(torch.autograd.Function):
    # forward takes *args: where nothing needs a gradient, dynamo tells from their number whether there is a ctx.
    @staticmethod
    def forward(ctx, *args):
        labels, wrong, relation, temperature, sign, *heads = args
        save(ctx, labels, *heads)
        ctx.constants = (relation, temperature, sign)
        terms = _Diversity.evaluate(labels, relation, temperature, heads)[1]
        rows = torch.where(wrong, float("nan"), fixed_sum(terms.sum(0)))
        return fixed_sum(rows) * _Diversity.scale(heads, sign)

    @staticmethod
    def evaluate(labels, relation, temperature, heads):
        """-> p, and the relation's terms and slopes."""
        dtype = accumulator(*heads)
        log_p = torch.stack([log_softmax(x, *row_stats(x, temperature, dtype), temperature) for x in heads])
        p, is_label = log_p.exp(), torch.arange(heads[0].shape[1], device=labels.device) == labels[:, None]
        # The official code divides by the sum of all probabilities + 1e-8, the label's included.
        return p, *RELATIONS[relation](p, log_p, (~is_label).to(dtype) / (1 + 1e-8))

    @staticmethod
    def scale(heads, sign):
        """The mean over samples and ordered pairs of heads."""
        return sign / max(1, len(heads[0]) * len(heads) * (len(heads) - 1))

    @staticmethod
    def backward(ctx, grad):
        check.first_derivative_only("DiversityCooperation")
        labels, *heads = saved(ctx)
        relation, temperature, sign = ctx.constants
        p, _, slope, log_slope = _Diversity.evaluate(labels, relation, temperature, heads)
        logit = p * (slope - fixed_sum(p * slope)[..., None])
        if log_slope is not None:
            logit = logit + log_slope - p * fixed_sum(log_slope)[..., None]
        logit = logit * (grad * _Diversity.scale(heads, sign) / temperature)
        needs = ctx.needs_input_grad[5:]
        grads = [g.to(x.dtype) if need else None for g, x, need in zip(logit, heads, needs, strict=True)]
        return None, None, None, None, None, *grads


def _sign(name, value):
    if value not in (1, -1):
        raise ValueError(f"{name} must be 1 or -1, got {value!r}")


@made_of_settings
class DiversityCooperation(Loss):
    """Diversity with Cooperation - Ensemble Methods for Few-Shot Classification (Dvornik et al., ICCV 2019).

    The mean over pairs of heads i != j and over the batch of a relation between p = softmax(head / T), or between
    q = p without the label's class (not made to sum to 1 again), summed over the classes:

    - "l2": ``|q_i - q_j|^2``
    - "cos": ``q_i . q_j / (|p_i| |p_j|)``, each squared norm with + 1e-8: minimised, it makes the heads diverse
    - "js": ``-q_i . log(q_j + 1e-7)``, a cross-entropy in spite of its name: minimised, it makes them cooperate
    - "distil": ``-p_i . log p_j``

    `sign` -1 is the official "neg_". The official weights are 10 for "js" and 1 for "cos" at T=5, beside the heads' own
    cross-entropies. Shapes: logits a list of M heads (B, C) or one (M, B, C), labels (B,) integers; 0-d, and 0 for one
    head. Gradients flow to all heads, also through the targets. Plain PyTorch: no (B, C, M, M) tensor.

    Args:
        relation: one of the four.
        temperature: T, above 0.
        sign: 1 or -1.
    """

    relation: str = setting("js", one_of(*RELATIONS))
    temperature: float = setting(1.0, check.positive)
    sign: int = setting(1, _sign)

    def forward(self, logits: Networks, labels: Tensor) -> Tensor:
        heads = matrices(network_list("logits", logits))
        labels, wrong = check.known_classes(labels, heads[0])
        return _Diversity.apply(labels, wrong, self.relation, float(self.temperature), self.sign, *heads)
