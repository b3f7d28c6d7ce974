"""Weights on the simplex: the quadratic programme of AE-KD, and KDCL's best mixture of networks.

    simplex_minimum   argmin_a a' G a / 2 + slope' a,  sum a = 1,  0 <= a <= cap
    best_mixture      argmin_a CE(sum_m a_m z_m, labels),  sum a = 1,  0 <= a

The programme is written twice: in PyTorch as the definition, and in C++ for the kernels, where it is one launch instead
of thousands of small operations.
"""

import torch
from torch import Tensor

from kdfast._kernels import op
from kdfast.ops import shapes
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.rows import INF, label_column, row_stats

RIDGE = 1e-13  # of the largest entry of G: decides between weights that are equally good
TOLERANCE = 1e-13  # of a slope that is scaled alike
STEPS = 60  # at most, of KDCL's linear rule; logits of 1e2 take 30


@op("teachers", lambda slope, **_: shapes.gradient(slope))
def simplex_minimum(gram: Tensor, slope: Tensor, cap: float) -> Tensor:
    """argmin_a a' G a / 2 + slope' a with sum a = 1, 0 <= a <= cap, for a small convex G (M, M) in float64.

    An active set, exact up to rounding. Every step solves for the free weights with the others at their bounds, goes
    there as far as the bounds allow and fixes the weight that stopped it; or, being there, frees the weight that pulls
    hardest. A fixed number of steps of the same few operations: the host never waits.
    """
    count, index = len(gram), torch.arange(len(gram), device=gram.device)
    a = gram.new_full((count,), 1 / count)
    if cap * count <= 1:
        return a
    largest = gram.diagonal().amax()
    ridge = RIDGE * torch.where(largest > 0, largest, 1.0)
    gram = gram + ridge * torch.eye(count, dtype=gram.dtype, device=gram.device)
    free, at_cap = torch.ones_like(a, dtype=torch.bool), torch.zeros_like(a, dtype=torch.bool)
    for _ in range(4 * count + 8):
        fixed = torch.where(free, 0.0, a)
        system = gram.new_zeros(count + 1, count + 1)
        system[:count, :count] = torch.where(free[:, None], torch.where(free, gram, 0.0), torch.diag(1.0 * ~free))
        system[:count, count] = system[count, :count] = 1.0 * free
        system[count, count] = 1.0 * ~free.any()
        right = torch.where(free, -(slope + (gram * fixed).sum(1)), a)
        solution, _ = torch.linalg.solve_ex(system, torch.cat([right, (1 - fixed.sum())[None]]))
        step = torch.where(free, solution[:count] - a, 0.0)
        room = torch.where(step > 0, (cap - a) / step, torch.where(step < 0, -a / step, INF))
        length, stopped = room.clamp(min=0).min(0)
        blocked = length < 1
        hit = blocked & (index == stopped)
        a = torch.where(hit, cap * (step > 0).to(a.dtype), a + length.clamp(max=1) * step)
        at_cap = (at_cap & ~free) | (hit & (step > 0))
        free = free & ~hit
        # Where every free weight has the same slope, those that are fixed may want to come back.
        g = slope + (gram * a).sum(1)
        common = torch.where(free, g, 0.0).sum() / free.sum()
        low, high = torch.where(~free & ~at_cap, g, INF), torch.where(~free & at_cap, g, -INF)
        rise, fall = common - low.min(), high.max() - common
        to_free = torch.where(rise >= fall, index == low.argmin(), index == high.argmax())
        alone = ~free.any()  # at a corner: a pair
        to_free = torch.where(alone, (index == low.argmin()) | (index == high.argmax()), to_free)
        gap = torch.where(alone, high.max() - low.min(), torch.maximum(rise, fall))
        free = free | (to_free & ~free & ~blocked & (gap > TOLERANCE * g.abs().amax()))
    return a


# An op without kernels of its own, so that a compiled graph does not unroll it.
@op("teachers", lambda networks, **_: networks[0].new_empty(len(networks), dtype=torch.float64), has_kernels=False)
def best_mixture(networks: list[Tensor], labels: Tensor) -> Tensor:
    """argmin_a CE(sum_m a_m z_m, labels) over a (M,) on the simplex, in float64.

    Damped Newton steps, each an exact quadratic programme; a step that does not help is undone and the next one damped
    more. A CPU stops when nothing is left to gain; elsewhere the host does not wait, and all steps are taken.
    """
    dtype = accumulator(*networks)
    column, *_ = label_column(labels, networks[0].shape[1])
    # Logits this far below the row's maximum weigh nothing in any mixture that matters.
    z = torch.stack([(x.to(dtype) - row_stats(x, 1.0, dtype)[0][:, None]).clamp(min=-1e4) for x in networks])
    at_label = z.gather(2, column.expand(len(z), -1, 1))[:, :, 0]
    rows = max(len(labels), 1)

    def mean(x):
        return fixed_sum(x.double()) / rows

    def expand(a):
        """-> value, gradient (M,), Hessian (M, M) at a."""
        a = a.to(dtype)
        mixture = (a[:, None, None] * z).sum(0)
        top, total = row_stats(mixture, 1.0, dtype)
        p = (mixture - top[:, None]).exp() / total[:, None]
        first = fixed_sum(p * z)
        second = [mean(fixed_sum((x - m[:, None]) * p * z)) for x, m in zip(z, first, strict=True)]
        return mean(total.log() + (top - (a[:, None] * at_label).sum(0))), mean(first - at_label), torch.stack(second)

    def gap(point, slope):
        """To the best corner: it bounds what any point could gain."""
        return (slope * point).sum() - slope.min()

    a = torch.full((len(z),), 1 / len(z), dtype=torch.float64, device=z.device)
    eye = torch.eye(len(z), dtype=torch.float64, device=z.device)
    now = expand(a)
    damping = 1e-3 * now[2].diagonal().sum()
    stops = z.device.type == "cpu"
    for _ in range(STEPS):
        if stops and gap(a, now[1]) <= 1e-13 * now[0]:
            break
        model = now[2] + damping * eye
        trial = simplex_minimum(model, now[1] - (model * a).sum(1), 1.0)
        trial = trial / trial.sum()  # the value rises with the sum: its last digit would hide what a step gains
        there = expand(trial)
        # Near the end the value changes by less than it is rounded; the slope still tells.
        same = (there[0] - now[0]).abs() <= 1e-14 * now[0].abs()
        better = torch.where(same, gap(trial, there[1]) < gap(a, now[1]), there[0] < now[0])
        a = torch.where(better, trial, a)
        now = [torch.where(better, x, y) for x, y in zip(there, now, strict=True)]
        damping = torch.where(better, damping / 8, damping * 8)
    return a
