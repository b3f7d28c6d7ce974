"""Many networks, heads or teachers at once: one read of M logit matrices per direction, and no softmax of them kept.

With q_i = softmax(z_i / T) of a batch of B rows, and CE_i the cross-entropy of network i with the labels:

    mixed_logits_kl  sum_i [KL_eps(t_i || z_i) + CE_i], where t_i = sum_m mix_im z_m mixes logits:
                     KL_eps(t || z) = T^2 sum_c p' (log p' - log q),  p' = softmax(t / T) + eps, not normalised again
    teachers_kl      kl             T^2 sum_m a_m KL(p_m || q)
                     cross_entropy  -T^2 sum_c r log q,  r = mean_m p_m
                     reverse_kl     T^2 KL(q || r)
    aekd             kl with the weights a that make the mean gradient of the student's logits shortest:
                     min a' G a,  sum a = 1,  0 <= a <= slack,  G_mn = v_m . v_n,  v_m = mean_b (q - p_m)

Mixed logits are centred network by network: a shift of a row changes no softmax, and large offsets cost no digits. A
network of weight 0 adds nothing, also where it is -inf. A class that is -inf in both the network and its target is no
class and gets no eps. An empty target (-inf everywhere) teaches nothing.
"""

import torch

from kdfast._kernels import define
from kdfast.ops import check
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.saved import save, saved
from kdfast.ops.softmax_kl import (
    INF,
    batch_size,
    kl_grad_p,
    kl_grad_q,
    kl_rows,
    kl_term,
    log_ratio_of,
    log_softmax,
    row_stats,
)
from kdfast.ops.temperature import temperature_argument, temperature_of

KINDS = ("kl", "cross_entropy", "reverse_kl")
MOST = 128  # networks in one call: the kernels take their addresses by value
LEAST_EPS = 1e-30  # above 0: a normal number in float32
RIDGE = 1e-13  # of the largest entry of G: decides between weights that are equally good
TOLERANCE = 1e-13  # of a slope that is scaled alike
STEPS = 60  # at most, of KDCL's linear rule; logits of 1e2 take 30


# ---- plain PyTorch: labels -------------------------------------------------------------------------------------------
def label_column(labels, classes):
    """-> labels clamped into range [rows, 1], which of them are no class (an error on CPU, NaN elsewhere)."""
    wrong = (labels < 0) | (labels >= classes)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and wrong.any():
        check.label_range(labels, classes)
    return labels.clamp(0, classes - 1)[:, None], wrong


def cross_entropy_stats(z, column, wrong, dtype):
    """-> sum_1 = sum_c exp(z_c - max), NaN where the label is no class; the row's cross-entropy."""
    top, sum_1 = row_stats(z, 1.0, dtype)
    sum_1 = torch.where(wrong, float("nan"), sum_1)
    return sum_1, -log_softmax(z, top, sum_1, 1.0).gather(1, column)[:, 0]


def cross_entropy_grad(z, top, sum_1, column):
    """d CE / dz [rows, cols]."""
    q = log_softmax(z, top, sum_1, 1.0).exp()
    return q - torch.zeros_like(q).scatter(1, column, 1.0)


def weighed(weight, x):
    """weight * x, and 0 of weight 0, whatever x is."""
    weight = torch.as_tensor(weight, dtype=x.dtype, device=x.device)
    return torch.where(weight == 0, 0.0, weight * x)


# ---- plain PyTorch: mixed_logits_kl ----------------------------------------------------------------------------------
def mixed(networks, tops, weights, dtype):
    """sum_m weights_m (z_m - top_m) [rows, cols]; weights [rows, networks]."""
    target = networks[0].new_zeros(networks[0].shape, dtype=dtype)
    for x, top, weight in zip(networks, tops, weights.to(dtype).unbind(1), strict=True):
        weight = weight[:, None]
        target = target + torch.where(weight == 0, 0.0, weight * (x.to(dtype) - top[:, None]))
    return target


def least(networks, tops, column, dtype):
    """min_m (z_m - z_m at the label) [rows, cols]; a network without the label's class is measured from its maximum."""
    target = None
    for x, top in zip(networks, tops, strict=True):
        at_label = x.gather(1, column)[:, 0].to(dtype)
        z = x.to(dtype) - torch.where(at_label == -INF, top, at_label)[:, None]
        target = z if target is None else torch.minimum(target, z)
    return target


def leads(mix, networks):
    """Whether the last network leads, for which `mix` has neither a target nor a weight."""
    return mix is not None and mix.shape[2] < len(networks)


def completed(mix, networks):
    """Weights (B, R, N) of all targets and networks: of a leader's target 1 / (N - 1), of the leader 0."""
    if not leads(mix, networks):
        return mix
    rows, targets, count = mix.shape
    weights = mix.new_zeros(rows, targets + 1, count + 1)
    weights[:, :targets, :count] = mix
    weights[:, targets, :count] = 1 / count
    return weights


def targets_of(networks, tops, mix, labels, dtype):
    """-> the mixed logits [rows, cols] of each target."""
    if mix is None:
        return [least(networks, tops, labels.clamp(0, networks[0].shape[1] - 1)[:, None], dtype)]
    return [mixed(networks, tops, weights, dtype) for weights in mix.unbind(1)]


def with_eps(target, log_p, empty, z, eps):
    """-> p' and log p' [rows, cols], 0 for what is no class; the mass sum_c p' [rows]."""
    p = log_p.exp()
    if eps == 0:
        live = p > 0
        return p, torch.where(live, log_p, 0.0), (~empty).to(p.dtype)
    live = ((target > -INF) | (z > -INF)) & ~empty[:, None]
    mass = (~empty).to(p.dtype) + eps * live.sum(1, dtype=p.dtype)
    return torch.where(live, p + eps, 0.0), torch.where(live, (p + eps).log(), 0.0), mass


def mixed_logits_kl_forward_torch(
    networks, mix, labels, ramp, temperatures, learners, temperature, eps, kl_scale, ce_scale, divisor, target_ce
):
    """-> loss, stats: maxima of the networks; of the learners sums at T and at 1, masses of p', slopes

    sum_c p (log p' - log q); of the targets maxima, sums at T and at 1.
    """
    dtype, mix = accumulator(*networks, mix), completed(mix, networks)
    t = temperature_of(temperatures, temperature, dtype)
    tops = [row_stats(x, 1.0, dtype)[0] for x in networks]
    column, wrong = (None, None) if labels is None else label_column(labels, networks[0].shape[1])
    kl = ce = zero = torch.zeros_like(tops[0])

    targets, target_stats = [], []
    for logits in targets_of(networks, tops, mix, labels, dtype):
        top, total = row_stats(logits, t, dtype)
        sum_1 = zero
        if target_ce:
            sum_1, term = cross_entropy_stats(logits, column, wrong, dtype)
            ce = ce + term
        targets.append((logits, (top, total), log_softmax(logits, top, total, t)))
        target_stats.append((top, total, sum_1))

    learner_stats = []
    for index, z in enumerate(networks[:learners]):
        logits, side_t, log_p = targets[index % len(targets)]
        top, total = row_stats(z, t, dtype)
        log_q = log_softmax(z, top, total, t)
        plain = log_p.exp()
        own = kl_rows(plain, log_q.exp(), log_p - log_q, log_ratio_of(logits, z, side_t, (top, total), t, False))
        p, log_p_eps, mass = with_eps(logits, log_p, side_t[1] == 0, z, eps)
        if eps:  # what it adds
            own = own + fixed_sum(kl_term(plain, log_p_eps - log_p) + kl_term(p - plain, log_p_eps - log_q))
        ratio = torch.where(p == 0, 0.0, log_p_eps - log_q)
        kl = kl + own
        sum_1 = zero
        if labels is not None:
            sum_1, term = cross_entropy_stats(z, column, wrong, dtype)
            ce = ce + term
        learner_stats.append((total, sum_1, mass, fixed_sum(kl_term(plain, ratio))))

    scale = kl_scale / divisor * (t * t) * (1.0 if ramp is None else ramp.to(dtype))
    loss = fixed_sum(weighed(scale, kl) + weighed(ce_scale / divisor, ce))
    groups = [tops, *zip(*learner_stats, strict=True), *zip(*target_stats, strict=True)]
    return loss, torch.stack([x for group in groups for x in group])


def mixed_logits_kl_backward_torch(
    grad,
    networks,
    mix,
    labels,
    ramp,
    temperatures,
    stats,
    learners,
    temperature,
    eps,
    kl_scale,
    ce_scale,
    divisor,
    target_ce,
    through_targets,
    need_mix,
):
    """-> gradients [n, rows, cols] of all networks, or of the learners if nothing flows through the targets; of mix."""
    dtype, count, given = stats.dtype, len(networks), mix
    mix = completed(mix, networks)
    grad, t = grad.to(dtype), temperature_of(temperatures, temperature, dtype)
    kl_grad = grad * (kl_scale / divisor * t * (1.0 if ramp is None else ramp.to(dtype)))
    ce_grad = grad * (ce_scale / divisor)
    tops, sums, sums_1, masses, slopes, *targets = stats.split([count, *[learners] * 4, *[_targets(mix, networks)] * 3])
    column = None if labels is None else labels.clamp(0, networks[0].shape[1] - 1)[:, None]
    flows = through_targets or target_ce
    grads = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (networks if flows else networks[:learners])]

    all_logits = targets_of(networks, tops, mix, labels, dtype)
    target_grads = [torch.zeros_like(x) for x in all_logits] if flows else []
    for index, z in enumerate(networks[:learners]):
        which = index % len(all_logits)
        logits, (top, total, _) = all_logits[which], (x[which] for x in targets)
        log_p = log_softmax(logits, top, total, t)
        log_q = log_softmax(z, tops[index], sums[index], t)
        p, log_p_eps, _ = with_eps(logits, log_p, total == 0, z, eps)
        grads[index] += weighed(kl_grad, masses[index][:, None] * log_q.exp() - p)
        if labels is not None:
            grads[index] += weighed(ce_grad, cross_entropy_grad(z, tops[index], sums_1[index], column))
        if through_targets:
            target_grads[which] += weighed(kl_grad, kl_grad_p(log_p.exp(), log_p_eps - log_q, slopes[index]))
    if target_ce:
        for which, logits in enumerate(all_logits):
            of_ce = cross_entropy_grad(logits, targets[0][which], targets[2][which], column)
            target_grads[which] += weighed(ce_grad, of_ce)

    mix_grad = torch.zeros(mix.shape, dtype=dtype, device=grad.device) if need_mix else grad.new_empty(0)
    for which, target_grad in enumerate(target_grads):
        for m, z in enumerate(networks):
            weight = mix[:, which, m].to(dtype)[:, None]
            grads[m] += torch.where((weight == 0) | (target_grad == 0), 0.0, weight * target_grad)
            if need_mix:
                c = z.to(dtype) - tops[m][:, None]
                mix_grad[:, which, m] = fixed_sum(torch.where((c == -INF) | (target_grad == 0), 0.0, target_grad * c))
    if need_mix:
        mix_grad = mix_grad[:, : given.shape[1], : given.shape[2]].to(mix.dtype).contiguous()
    return torch.stack(grads).to(networks[0].dtype), mix_grad


def _targets(mix, networks):
    return 1 if mix is None else mix.shape[1] + leads(mix, networks)


# ---- plain PyTorch: teachers_kl --------------------------------------------------------------------------------------
def teacher_rows(student, teachers, temperature, dtype):
    """-> max, sum of the student, the same of the teachers, log-softmax of the student and of each teacher."""
    sides = [row_stats(x, temperature, dtype) for x in (student, *teachers)]
    logs = [log_softmax(x, *side, temperature) for x, side in zip((student, *teachers), sides, strict=True)]
    return sides, logs


def divergence(log_p, log_q, kind, near=None):
    """sum_c p (log p - log q), or of -log q alone; `near` is log p - log q as it counts between near rows."""
    p, ratio = log_p.exp(), log_ratio(log_p, log_q, kind)
    return fixed_sum(kl_term(p, ratio)) if near is None else kl_rows(p, log_q.exp(), ratio, near)


def log_ratio(log_p, log_q, kind):
    """What p weighs in `divergence`: log p - log q, or -log q alone; [rows, cols]."""
    return -log_q if kind == "cross_entropy" else log_p - log_q


def mean_log(logs):
    """log mean_m p_m [rows, cols], finite where every p_m underflows."""
    top = logs[0]
    for log_p in logs[1:]:
        top = torch.maximum(top, log_p)
    safe = torch.where(top == -INF, 0.0, top)
    total = sum((log_p - safe).exp() for log_p in logs)
    count = torch.full((), len(logs), dtype=top.dtype, device=top.device)
    return torch.where(top == -INF, -INF, safe + (total.log() - count.log()))


def teacher_weights(weight, teachers, dtype, device):
    """One weight per teacher [M]; 1 each without any."""
    return torch.ones(len(teachers), dtype=dtype, device=device) if weight is None else weight.to(dtype)


def near_ratios(student, teachers, sides, temperature):
    """log p_m - log q of each teacher."""
    of_student, *others = sides
    return [log_ratio_of(x, student, side, of_student, temperature) for x, side in zip(teachers, others, strict=True)]


def teachers_kl_forward_torch(
    student, teachers, labels, weight, temperatures, kind, temperature, scale, divisor, ce_scale, ce_divisor
):
    """-> loss, stats: max, sum at T, sum at 1 of the student; maxima, sums, divergences of the teachers.

    Of the reverse kind the first divergence is that of the row, the others are 0.
    """
    dtype = accumulator(student, *teachers)
    column, wrong = (None, None) if labels is None else label_column(labels, student.shape[1])
    t = temperature_of(temperatures, temperature, dtype)
    sides, (log_q, *logs) = teacher_rows(student, teachers, t, dtype)
    zero = torch.zeros_like(sides[0][0])
    if kind == "reverse_kl":
        log_r = mean_log(logs)
        values = [divergence(log_q, log_r, kind, log_q - log_r), *[zero] * (len(teachers) - 1)]
        rows = values[0]
    else:
        nears = near_ratios(student, teachers, sides, t) if kind == "kl" else [None] * len(teachers)
        values = [divergence(log_p, log_q, kind, near) for log_p, near in zip(logs, nears, strict=True)]
        rows = sum(map(weighed, teacher_weights(weight, teachers, dtype, student.device).unbind(0), values))
    sum_1, ce = (zero, zero) if labels is None else cross_entropy_stats(student, column, wrong, dtype)
    loss = fixed_sum(weighed(scale / divisor * (t * t), rows) + weighed(ce_scale / ce_divisor, ce))
    (top, total), *others = sides
    return loss, torch.stack([top, total, sum_1, *(x for x, _ in others), *(x for _, x in others), *values])


def teachers_kl_backward_torch(
    grad,
    student,
    teachers,
    labels,
    weight,
    temperatures,
    stats,
    kind,
    temperature,
    scale,
    divisor,
    ce_scale,
    ce_divisor,
    need_student,
    need_teachers,
):
    """-> gradients of the student and, [teachers, rows, cols], of the teachers; empty where not needed."""
    dtype, count = stats.dtype, len(teachers)
    t = temperature_of(temperatures, temperature, dtype)
    (top, total, sum_1), tops, totals, values = stats.split([3, count, count, count])
    log_q = log_softmax(student, top, total, t)
    logs = [log_softmax(*x, t) for x in zip(teachers, tops, totals, strict=True)]
    grad = grad.to(dtype)
    row = grad * (scale / divisor * t)
    weights = teacher_weights(weight, teachers, dtype, grad.device)
    student_grad = teacher_grads = grad.new_empty(0)
    if need_student:
        if kind == "reverse_kl":
            student_grad = weighed(row, kl_grad_p(log_q.exp(), log_q - mean_log(logs), values[0]))
        else:
            student_grad = sum(
                weighed(row * a, kl_grad_q(log_p.exp(), log_q.exp(), p_sum))
                for a, log_p, p_sum in zip(weights, logs, totals, strict=True)
            )
        if labels is not None:
            column = labels.clamp(0, student.shape[1] - 1)[:, None]
            of_ce = cross_entropy_grad(student, top, sum_1, column)
            student_grad = student_grad + weighed(grad * (ce_scale / ce_divisor), of_ce)
        student_grad = student_grad.to(student.dtype)
    if need_teachers:
        teacher_grads = torch.stack(
            [
                weighed(row * a, kl_grad_p(log_p.exp(), log_ratio(log_p, log_q, kind), value))
                for a, log_p, value in zip(weights, logs, values, strict=True)
            ]
        ).to(teachers[0].dtype)
    return student_grad, teacher_grads


# ---- plain PyTorch: weights on a capped simplex ----------------------------------------------------------------------
def simplex_minimum_torch(gram, slope, cap):
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
        pull = torch.where(alone, high.max() - low.min(), torch.maximum(rise, fall))
        free = free | (to_free & ~free & ~blocked & (pull > TOLERANCE * g.abs().amax()))
    return a


def aekd_weights(gram, slack, normalize):
    """AE-KD's weights (M,) from G (M, M) of any magnitude, in float64."""
    gram = gram.double()
    largest = gram.diagonal().amax()
    scaled = torch.where(largest > 0, gram / largest, 0.0)
    if not normalize:
        return simplex_minimum_torch(scaled, torch.zeros_like(gram[0]), slack)
    norm = scaled.diagonal().sqrt().clamp(min=1e-12)  # of a teacher whose mean gradient is 0: all weight is its
    a = simplex_minimum_torch(scaled / norm[:, None] / norm, torch.zeros_like(norm), slack) / norm
    return a / a.sum()


def aekd_forward_torch(student, teachers, temperatures, temperature, scale, divisor, slack, normalize):
    """-> loss, stats as of teachers_kl, weights (M,)."""
    dtype = accumulator(student, *teachers)
    t = temperature_of(temperatures, temperature, dtype)
    sides, (log_q, *logs) = teacher_rows(student, teachers, t, dtype)
    q = log_q.exp()
    mean_gradients = torch.stack([fixed_sum((q - log_p.exp()).double().T) for log_p in logs])
    gram = fixed_sum(mean_gradients[:, None] * mean_gradients)
    weights = aekd_weights(gram, slack, normalize).to(dtype)
    nears = near_ratios(student, teachers, sides, t)
    values = [divergence(log_p, log_q, "kl", near) for log_p, near in zip(logs, nears, strict=True)]
    rows = sum(map(weighed, weights.unbind(0), values))
    (top, total), *others = sides
    stats = [top, total, torch.zeros_like(top), *(x for x, _ in others), *(x for _, x in others), *values]
    return fixed_sum(weighed(scale / divisor * (t * t), rows)), torch.stack(stats), weights


# ---- the ops ---------------------------------------------------------------------------------------------------------
def _mixed_logits_kl_fake(networks, mix, labels, ramp, temperatures, learners, *args):
    dtype = accumulator(*networks, mix)
    stats = len(networks) + 4 * learners + 3 * _targets(mix, networks)
    return networks[0].new_empty((), dtype=dtype), networks[0].new_empty((stats, networks[0].shape[0]), dtype=dtype)


def _mixed_logits_kl_backward_fake(grad, networks, mix, labels, ramp, temperatures, stats, learners, *args):
    target_ce, through_targets, need_mix = args[-3:]
    count = len(networks) if target_ce or through_targets else learners
    mix_grad = mix.new_empty(mix.shape) if need_mix else grad.new_empty(0)
    return networks[0].new_empty((count, *networks[0].shape)), mix_grad


def _teachers_fake(student, teachers, *args):
    dtype = accumulator(student, *teachers)
    stats = student.new_empty((3 + 3 * len(teachers), student.shape[0]), dtype=dtype)
    return student.new_empty((), dtype=dtype), stats


def _aekd_fake(student, teachers, *args):
    loss, stats = _teachers_fake(student, teachers)
    return loss, stats, stats.new_empty(len(teachers))


def _teachers_kl_backward_fake(grad, student, teachers, *args):
    need_student, need_teachers = args[-2:]
    student_grad = student.new_empty(student.shape) if need_student else grad.new_empty(0)
    teacher_grads = teachers[0].new_empty((len(teachers), *student.shape)) if need_teachers else grad.new_empty(0)
    return student_grad, teacher_grads


_mixed_logits_kl = define(
    "ensemble",
    "mixed_logits_kl(Tensor[] networks, Tensor? mix, Tensor? labels, Tensor? ramp, Tensor? temperatures, "
    "int learners, float temperature, float eps, float kl_scale, float ce_scale, SymInt divisor, bool target_ce) "
    "-> (Tensor, Tensor)",
    mixed_logits_kl_forward_torch,
    _mixed_logits_kl_fake,
)
_mixed_logits_kl_backward = define(
    "ensemble",
    "mixed_logits_kl_backward(Tensor grad, Tensor[] networks, Tensor? mix, Tensor? labels, Tensor? ramp, "
    "Tensor? temperatures, Tensor stats, int learners, float temperature, float eps, float kl_scale, float ce_scale, "
    "SymInt divisor, bool target_ce, bool through_targets, bool need_mix) -> (Tensor, Tensor)",
    mixed_logits_kl_backward_torch,
    _mixed_logits_kl_backward_fake,
)
_teachers_kl = define(
    "ensemble",
    "teachers_kl(Tensor student, Tensor[] teachers, Tensor? labels, Tensor? weight, Tensor? temperatures, str kind, "
    "float temperature, float scale, SymInt divisor, float ce_scale, SymInt ce_divisor) -> (Tensor, Tensor)",
    teachers_kl_forward_torch,
    _teachers_fake,
)
_teachers_kl_backward = define(
    "ensemble",
    "teachers_kl_backward(Tensor grad, Tensor student, Tensor[] teachers, Tensor? labels, Tensor? weight, "
    "Tensor? temperatures, Tensor stats, str kind, float temperature, float scale, SymInt divisor, float ce_scale, "
    "SymInt ce_divisor, bool need_student, bool need_teachers) -> (Tensor, Tensor)",
    teachers_kl_backward_torch,
    _teachers_kl_backward_fake,
)
_aekd = define(
    "ensemble",
    "aekd(Tensor student, Tensor[] teachers, Tensor? temperatures, float temperature, float scale, SymInt divisor, "
    "float slack, bool normalize) -> (Tensor, Tensor, Tensor)",
    aekd_forward_torch,
    _aekd_fake,
)
simplex_minimum = define(
    "ensemble",
    "simplex_minimum(Tensor gram, Tensor slope, float cap) -> Tensor",
    simplex_minimum_torch,
    lambda gram, slope, cap: torch.empty_like(slope),
)


# ---- KDCL's linear rule: an op without kernels of its own, so that compiled graphs do not unroll it
def best_mixture_torch(networks, labels):
    """argmin_a CE(sum_m a_m z_m, labels) over a (M,) on the simplex, in float64.

    Damped Newton steps, each an exact quadratic programme; a step that does not help is undone and the next one damped
    more. A CPU stops when nothing is left to gain; elsewhere the host does not wait, and all steps are taken.
    """
    dtype = accumulator(*networks)
    column, _ = label_column(labels, networks[0].shape[1])
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

    a = torch.full((len(z),), 1 / len(z), dtype=torch.float64, device=z.device)
    eye = torch.eye(len(z), dtype=torch.float64, device=z.device)
    now = expand(a)
    damping = 1e-3 * now[2].diagonal().sum()
    stops = z.device.type == "cpu"
    for _ in range(STEPS):
        # The gap to the best corner bounds what any point could gain.
        if stops and (now[1] * a).sum() - now[1].min() <= 1e-13 * now[0]:
            break
        model = now[2] + damping * eye
        trial = simplex_minimum(model, now[1] - (model * a).sum(1), 1.0)
        there = expand(trial)
        better = there[0] <= now[0]
        a = torch.where(better, trial, a)
        now = [torch.where(better, x, y) for x, y in zip(there, now, strict=True)]
        damping = torch.where(better, damping / 8, damping * 8)
    return a


best_mixture = define(
    "ensemble",
    "best_mixture(Tensor[] networks, Tensor labels) -> Tensor",
    best_mixture_torch,
    lambda networks, labels: networks[0].new_empty(len(networks), dtype=torch.float64),
    has_kernels=False,
)


# ---- lists of networks: each tensor is (B, C), or (M, B, C) and stands for M -----------------------------------------
def matrices(tensors):
    """All networks [(B, C), ...]."""
    return [z for x in tensors for z in (x.unbind(0) if x.dim() == 3 else (x,))]


def network_count(tensors):
    """How many networks a list of (B, C) and (M, B, C) tensors has."""
    return sum(x.shape[0] if x.dim() == 3 else 1 for x in tensors)


def _regroup(grads, tensors, needed):
    """The gradients [n, B, C] of `matrices(tensors)` in the form of `tensors`; None where not needed or beyond n."""
    out, begin = [], 0
    each = grads.unbind(0)
    for x, need in zip(tensors, needed, strict=True):
        count = x.shape[0] if x.dim() == 3 else 1
        if not need or begin + count > len(each):
            out.append(None)
        else:
            out.append(grads[begin : begin + count] if x.dim() == 3 else each[begin])
        begin += count
    return out


# forward takes *args: without gradients, dynamo tells from the number of parameters whether there is a ctx.
class _MixedLogitsKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        mix, labels, ramp, temperatures, settings, through_targets, *tensors = args
        ctx.flat = mix is not None and mix.dim() == 2
        weights = mix[:, None] if ctx.flat else mix
        loss, stats = _mixed_logits_kl(matrices(tensors), weights, labels, ramp, temperatures, *settings)
        save(ctx, weights, labels, ramp, temperatures, stats, *tensors)
        ctx.constants = (settings, through_targets)
        return loss

    @staticmethod
    def backward(ctx, grad):
        check.first_derivative_only("mixed_logits_kl")
        mix, labels, ramp, temperatures, stats, *tensors = saved(ctx)
        settings, through_targets = ctx.constants
        need_mix = ctx.needs_input_grad[0] and (through_targets or settings[-1])
        networks = matrices(tensors)
        grads, mix_grad = _mixed_logits_kl_backward(
            grad, networks, mix, labels, ramp, temperatures, stats, *settings, through_targets, need_mix
        )
        if not need_mix:
            mix_grad = None
        elif ctx.flat:
            mix_grad = mix_grad[:, 0]
        return mix_grad, *(None,) * 5, *_regroup(grads, tensors, ctx.needs_input_grad[6:])


class _TeachersKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        student, labels, weight, temperatures, settings, *tensors = args
        loss, stats = _teachers_kl(student, matrices(tensors), labels, weight, temperatures, *settings)
        save(ctx, student, labels, weight, temperatures, stats, *tensors)
        ctx.settings = settings
        return loss

    @staticmethod
    def backward(ctx, grad):
        check.first_derivative_only("teachers_kl")
        student, labels, weight, temperatures, stats, *tensors = saved(ctx)
        need_student, needed = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        networks = matrices(tensors)
        student_grad, grads = _teachers_kl_backward(
            grad, student, networks, labels, weight, temperatures, stats, *ctx.settings, need_student, any(needed)
        )
        return student_grad if need_student else None, *(None,) * 4, *_regroup(grads, tensors, needed)


class _AEKD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        student, temperatures, temperature, divisor, slack, normalize, *tensors = args
        loss, stats, weights = _aekd(
            student, matrices(tensors), temperatures, temperature, 1.0, divisor, slack, normalize
        )
        save(ctx, student, weights, temperatures, stats, *tensors)
        ctx.constants = ("kl", temperature, 1.0, divisor, 0.0, 1)
        ctx.mark_non_differentiable(weights)
        return loss, weights

    @staticmethod
    def backward(ctx, grad, _):
        check.first_derivative_only("aekd")
        student, weights, temperatures, stats, *tensors = saved(ctx)
        student_grad, _ = _teachers_kl_backward(
            grad, student, matrices(tensors), None, weights, temperatures, stats, *ctx.constants, True, False
        )
        return student_grad, *(None,) * 5, *(None for _ in tensors)


# ---- public functions ------------------------------------------------------------------------------------------------
def network_list(name, x, like=None, of="the student"):
    """A list of (B, C) tensors, or one (M, B, C) tensor, as a list of tensors, with `like`'s shape where given.

    The list may mix both forms; what has another dtype than the first is converted to the type of sums.
    """
    tensors = [x] if isinstance(x, torch.Tensor) else x
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{name} must be a list of (B, C) tensors or one (M, B, C) tensor, got {type(x).__name__}")
    if isinstance(x, torch.Tensor) and x.dim() == 2:
        raise ValueError(f"{name} must be a list of (B, C) tensors or one (M, B, C) tensor, got shape {tuple(x.shape)}")

    def named(i):
        return name if isinstance(x, torch.Tensor) else f"{name}[{i}]"

    if like is None:
        other = check.unlike_first(tensors) if tensors else []
    else:
        other = [i - 1 for i in check.unlike_first([like, *tensors])[1:]]
    for i in other:
        check.tensor(named(i), tensors[i])
        check.floating(named(i), tensors[i])
        if tensors[i].dim() not in (2, 3):
            raise ValueError(
                f"{named(i)} must be (B, C), or (M, B, C) for M of them, got shape {tuple(tensors[i].shape)}"
            )
    count = network_count(tensors)
    if not 1 <= count <= MOST:
        raise ValueError(f"{name} must have from 1 to {MOST} networks, got {count}")
    first, of = (tensors[0], named(0)) if like is None else (like, of)
    shape = first.shape[-2:]
    if shape[1] == 0:
        raise ValueError(f"{named(0)} must have at least one class, got shape {tuple(first.shape)}")
    for i in other:
        if tensors[i].shape[-2:] != shape:
            raise ValueError(
                f"{named(i)} must have {of}'s batch and classes {tuple(shape)}, got shape {tuple(tensors[i].shape)}"
            )
        check.same_device(named(i), tensors[i], first, of)
    if len(other) > (like is None) and len({x.dtype for x in tensors}) > 1:
        tensors = [x.to(accumulator(*tensors)) for x in tensors]
    return list(tensors)


def class_labels(labels, like):
    """Labels for the kernels, or None."""
    return None if labels is None else check.class_indices(labels, like)


def mixed_logits_kl(
    networks,
    mix,
    labels=None,
    temperature=1.0,
    *,
    eps=0.0,
    kl_weight=1.0,
    ce_weight=1.0,
    ramp=1.0,
    learners=None,
    target_ce=False,
    through_targets=False,
):
    """``1/B sum_b sum_i [kl_weight ramp KL_eps(t_i || z_i) + ce_weight CE(z_i, labels)]``, t_i mixed of all networks.

    KL_eps is in the module's docstring. One read of the networks for all targets, divergences and cross-entropies.

    Args:
        networks: N of them, a list of (B, C) logits, one (N, B, C), or a list of both. The first `learners` learn (all
            by default), the others are mixed only.
        mix: (B, R, N) weights of any floating type and strides, R = 1 target for all or one for each learner; (B, N)
            for one. None: the least logits, ``t = min_m (z_m - z_m[label])`` of each class.
        labels: (B,) integer classes for the cross-entropies (none without). A label that is no class is an error on
            CPU; on CUDA it makes the loss NaN, unless KDFAST_CHECK=1, which checks first.
        ramp: multiplies the divergences: a number, or a 0-d tensor, for which no graph is compiled anew.
        target_ce: adds ``ce_weight CE(t, labels)`` of every target, whose gradient reaches networks and mix.
        through_targets: the divergences' gradients reach networks and mix through the targets, too; else they stop.

    Returns: 0-d, in nats, with gradients to the networks and, as said, to mix. Raises TypeError, ValueError.
    """
    return mixed_loss(
        network_list("networks", networks),
        mix,
        labels,
        temperature,
        eps=eps,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        ramp=ramp,
        learners=learners,
        target_ce=target_ce,
        through_targets=through_targets,
    )


def mixed_loss(
    tensors,
    mix,
    labels,
    temperature,
    *,
    eps=0.0,
    kl_weight=1.0,
    ce_weight=1.0,
    ramp=1.0,
    learners=None,
    target_ce=False,
    through_targets=False,
    leader=False,
    mix_name="mix",
):
    """:func:`mixed_logits_kl` of networks that `network_list` has checked; messages call the weights `mix_name`.

    leader: the last network leads. No target has it, and its own is the mean of the others: `mix`, (B, N - 1, N - 1),
    has neither a row nor a column for it.
    """
    first = tensors[0][0].detach() if tensors[0].dim() == 3 else tensors[0]
    rows, count = first.shape[0], network_count(tensors)
    learners = count if learners is None else learners
    check.count("learners", learners)
    if learners > count:
        raise ValueError(f"learners must be at most the {count} networks, got {learners}")
    labels = class_labels(labels, first)
    if mix is None:
        if through_targets or target_ce:
            raise ValueError("mix must be given with target_ce or through_targets: the least logits are constants")
        if labels is None:
            raise ValueError("labels must be given without mix: the least logits are measured from the label's")
    else:
        check.tensor(mix_name, mix)
        check.floating(mix_name, mix)
        if leader:
            shapes = [(rows, learners - 1, count - 1)]
        else:
            shapes = [(rows, count), (rows, 1, count), (rows, learners, count)]
        if mix.shape not in shapes:
            raise ValueError(f"{mix_name} must have the shape {' or '.join(map(str, shapes))}, got {tuple(mix.shape)}")
        check.same_device(mix_name, mix, first, "the first network")
    if target_ce and labels is None:
        raise ValueError("labels must be given with target_ce")
    check.positive("temperature", temperature)
    check.number("eps", eps, 0, 1)
    if 0 < eps < LEAST_EPS:
        raise ValueError(f"eps must be 0 or from {LEAST_EPS} to 1, got {eps}")
    check.number("kl_weight", kl_weight)
    if isinstance(ramp, torch.Tensor):
        check.floating("ramp", ramp)
        if ramp.dim() != 0:
            raise ValueError(f"ramp must be a number or a 0-d tensor, got shape {tuple(ramp.shape)}")
        check.same_device("ramp", ramp, first, "the first network")
    else:
        check.number("ramp", ramp)
        kl_weight, ramp = kl_weight * ramp, None
    check.number("ce_weight", ce_weight)
    temperatures, temperature = temperature_argument(temperature, first)
    ce_scale = 0.0 if labels is None else float(ce_weight)
    settings = (learners, temperature, float(eps), float(kl_weight), ce_scale, batch_size(first), target_ce)
    return _MixedLogitsKL.apply(mix, labels, ramp, temperatures, settings, through_targets, *tensors)


def teachers_kl(
    student,
    teachers,
    labels=None,
    temperature=1.0,
    *,
    kind="kl",
    weight=None,
    kl_weight=1.0,
    ce_weight=1.0,
    over_classes=False,
):
    """``1/B sum_b [kl_weight D + ce_weight CE(student, labels)]`` with D of the kinds in the module's docstring.

    Args:
        student: logits (B, C). teachers: a list of (B, C) logits, one (M, B, C), or a list of both.
        labels: (B,) integer classes for the cross-entropy (none without); see :func:`mixed_logits_kl`.
        kind: "kl", with `weight` a_m (M,) or the plain sum; "cross_entropy" and "reverse_kl" to the mean probability.
        over_classes: divide the divergence by the number of classes, too.

    Returns: 0-d, in nats. Gradients flow to student and teachers; not to weight, which must not ask for one, nor to
    the teachers of "reverse_kl", which must not either.
    """
    check.logits("student", student)
    tensors = network_list("teachers", teachers, student)
    return teachers_loss(
        student,
        tensors,
        labels,
        temperature,
        kind=kind,
        weight=weight,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        over_classes=over_classes,
    )


def teachers_loss(
    student,
    tensors,
    labels,
    temperature,
    *,
    kind="kl",
    weight=None,
    kl_weight=1.0,
    ce_weight=1.0,
    over_classes=False,
):
    """:func:`teachers_kl` of a student and teachers that were checked."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    count = network_count(tensors)
    if weight is not None:
        if kind != "kl":
            raise ValueError(f"weight belongs to kind 'kl', got one with kind {kind!r}")
        check.tensor("weight", weight)
        check.floating("weight", weight)
        if weight.shape != (count,):
            raise ValueError(f"weight must have shape ({count},), one for each teacher, got {tuple(weight.shape)}")
        check.same_device("weight", weight, student)
        if weight.requires_grad:
            raise ValueError("weight must not require a gradient: detach it")
    if kind == "reverse_kl" and any(x.requires_grad for x in tensors):
        raise ValueError("teachers must not require a gradient with kind 'reverse_kl': detach them")
    labels = class_labels(labels, student)
    check.positive("temperature", temperature)
    check.number("kl_weight", kl_weight)
    check.number("ce_weight", ce_weight)
    rows = batch_size(student)
    divisor = rows * (count if kind == "cross_entropy" else 1) * (student.shape[1] if over_classes else 1)
    ce_scale = 0.0 if labels is None else float(ce_weight)
    temperatures, temperature = temperature_argument(temperature, student)
    settings = (kind, temperature, float(kl_weight), divisor, ce_scale, rows)
    return _TeachersKL.apply(student, labels, weight, temperatures, settings, *tensors)


def aekd(student, teachers, temperature=4.0, *, slack=0.6, normalize=False):
    """``T^2 / B sum_b sum_m a_m KL(p_m || q)`` with AE-KD's weights a, the exact optimum of the module's docstring.

    Args:
        student: logits (B, C). teachers: a list of (B, C) logits, one (M, B, C), or a list of both.
        slack: the most that a weight may be; up to 1 / M it leaves the plain average.
        normalize: solve with v_m of length 1, then divide by the lengths and make the sum 1 again.

    Returns: the loss, 0-d, with a gradient to the student alone, and the weights (M,). The host does not wait.
    """
    check.logits("student", student)
    tensors = network_list("teachers", teachers, student)
    check.positive("temperature", temperature)
    check.number("slack", slack, 0, 1)
    constants = (*temperature_argument(temperature, student), batch_size(student), float(slack), bool(normalize))
    return _AEKD.apply(student, *constants, *(x.detach() if x.requires_grad else x for x in tensors))
