"""The formulas, naive: float64, one tensor operation per symbol, differentiated by autograd. No import of kdfast.

First the ops under the names and arguments of kdfast.ops, then `LOSSES`: each public loss from its paper, as a function
(inputs, parameters) -> value.
0 log 0 = 0, and a class of probability 0 adds nothing whatever the other side says.
"""

import itertools
import math

import torch
from torch.nn import functional as F

INF = math.inf


def _log_softmax(z, temperature=1.0):
    z = z.double()
    # Centred first: z / temperature may be so large that its rounding hides what is compared.
    z = (z - z.detach().amax(-1, keepdim=True)) / temperature
    return z - z.logsumexp(-1, keepdim=True)


def _log_softmax_or_nothing(z, temperature):
    """The same; a row that is -inf everywhere is no distribution: all its probabilities are 0, without a gradient."""
    empty = (z == -INF).all(-1, keepdim=True)
    return torch.where(empty, -INF, _log_softmax(torch.where(empty, 0.0, z), temperature))


def _expect(p, x):
    """sum_j p_j x_j per row, where p_j = 0 removes the term and its gradient, also if x_j is infinite."""
    present = p > 0
    return (p * torch.where(present, x, 0.0)).sum(-1)


def _kl(log_p, log_q):
    p = log_p.exp()
    # The difference itself may be (-inf) - (-inf), whose gradient is NaN even when masked afterwards.
    zero = torch.zeros_like(log_p)
    return _expect(p, torch.where(p > 0, log_p, zero) - torch.where(p > 0, log_q, zero))


def _reduce(rows, reduction):
    if reduction == "none":
        return rows
    return rows.sum() / (max(len(rows), 1) if reduction in ("mean", "batchmean") else 1)


def _weighted(rows, weight):
    return rows if weight is None else torch.where(weight == 0, 0.0, weight.double() * rows)


def _outcomes(student, teacher, temperature):
    """Of a top-k teacher (values, indices, rest): log-probabilities [rows, k + 1] of student and teacher.

    -> also the student's log-probabilities among the other classes [rows, cols], -inf at the kept ones.
    """
    values, indices, rest = (*teacher, None)[:3]
    kept = torch.zeros(student.shape, dtype=torch.bool, device=student.device).scatter(1, indices.long(), True)
    log_q = _log_softmax(student, temperature)
    if indices.shape[1] < student.shape[1]:
        log_others = log_q.masked_fill(kept, -INF).logsumexp(1, keepdim=True)
    else:
        log_others = torch.full_like(log_q[:, :1], -INF)
    rest = torch.full_like(values[:, 0].double(), -INF) if rest is None else rest.double()
    log_p = _log_softmax(torch.cat([values.double(), rest[:, None]], 1), temperature)
    among_others = torch.where(kept, -INF, log_q - log_others)
    return torch.cat([log_q.gather(1, indices.long()), log_others], 1), log_p, among_others


# ---- the ops ---------------------------------------------------------------------------------------------------------
def softmax_kl(student, teacher, temperature=1.0, *, beta=0.0, weight=None, reduction="batchmean"):
    if isinstance(teacher, tuple):
        log_q, log_p, _ = _outcomes(student, teacher, temperature)
    else:
        log_q, log_p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    if beta == 0:
        rows = _kl(log_p, log_q)
    elif beta == 1:
        rows = _kl(log_q, log_p)
    else:
        log_q, log_p = (_log_softmax_or_nothing(z, temperature) for z in (student, teacher))
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        rows = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return _reduce(_weighted(temperature**2 * rows, weight), reduction)


def channel_kl(student, teacher, temperature=1.0):
    return softmax_kl(
        *(x.flatten(2).flatten(0, 1) for x in (student.unsqueeze(-1), teacher.unsqueeze(-1))), temperature
    )


def _targets(labels, shape, ignore_index):
    """-> target probabilities [rows, cols], rows kept [rows]."""
    if labels.is_floating_point():
        return labels.detach().double(), torch.ones(shape[0], dtype=torch.bool, device=labels.device)
    kept = labels != ignore_index
    return F.one_hot(torch.where(kept, labels.long(), 0), shape[1]).double(), kept


def cross_entropy(
    student, labels, *, ce_weight=1.0, label_smoothing=0.0, ignore_index=-100, weight=None, reduction="batchmean"
):
    target, kept = _targets(labels, student.shape, ignore_index)
    target = (1 - label_smoothing) * target + label_smoothing / student.shape[1]
    rows = _weighted(ce_weight * torch.where(kept, -_expect(target, _log_softmax(student)), 0.0), weight)
    if reduction in ("mean", "batchmean"):
        return rows.sum() / max(int(kept.sum()), 1)
    return _reduce(rows, reduction)


def cross_entropy_kl(
    student,
    teacher,
    labels,
    temperature=1.0,
    *,
    kl_weight=1.0,
    ce_weight=1.0,
    reduction="batchmean",
    weight=None,
    **options,
):
    kl = kl_weight * softmax_kl(student, teacher, temperature, reduction=reduction, weight=weight)
    return kl + cross_entropy(student, labels, ce_weight=ce_weight, reduction=reduction, weight=weight, **options)


def _split(z, labels, temperature):
    """-> log of (p_y, 1 - p_y) [rows, 2], log-softmax among the other classes [rows, cols - 1]."""
    rows, cols = z.shape
    is_target = F.one_hot(labels.long(), cols).bool()
    log_p = _log_softmax(z, temperature)
    others = log_p[~is_target].view(rows, cols - 1)
    log_rest = others.logsumexp(1) if cols > 1 else torch.full_like(log_p[:, 0], -INF)
    return torch.stack([log_p[is_target], log_rest], 1), others - log_rest[:, None]


def dkd(student, teacher, labels, temperature=4.0, *, alpha=1.0, beta=8.0, weight=None, reduction="batchmean"):
    """Zhao et al. 2022, eq. 6 and 7."""
    target_s, rest_s = _split(student, labels, temperature)
    target_t, rest_t = _split(teacher, labels, temperature)
    rows = alpha * _kl(target_t, target_s) + beta * _kl(rest_t, rest_s)
    return _reduce(_weighted(temperature**2 * rows, weight), reduction)


def standardized(z):
    """(z - mean) / (1e-7 + std) of rows, Sun et al. 2024; zeros of a single class."""
    if z.shape[-1] == 1:
        return 0 * z
    return (z - z.mean(-1, keepdim=True)) / (1e-7 + z.std(-1, keepdim=True))


def _two(student, teacher, temperature=1.0, teacher_temperature=None, standardize=False):
    """-> log-probabilities of student and teacher."""
    student, teacher = student.double(), teacher.double()
    if standardize:
        student, teacher = standardized(student), standardized(teacher)
    of_teacher = temperature if teacher_temperature is None else teacher_temperature
    return _log_softmax(student, temperature), _log_softmax(teacher, of_teacher)


def _mixed(log_p, log_q, skew):
    """log(skew p + (1 - skew) q)"""
    skew = torch.as_tensor(skew, dtype=torch.float64, device=log_p.device)
    skew = skew[..., None] if skew.dim() else skew
    return torch.logaddexp(log_p + skew.log(), log_q + (1 - skew).log())


def skew_kl(student, teacher, skew=0.1, *, reverse=False, temperature=1.0, weight=None, reduction="batchmean"):
    """Ko et al. 2024: KL(p || skew p + (1 - skew) q), or of the student likewise."""
    own, other = _two(student, teacher, temperature)[:: 1 if reverse else -1]
    return _reduce(_weighted(temperature**2 * _kl(own, _mixed(own, other, skew)), weight), reduction)


def total_variation_distance(student, teacher, *, temperature=1.0, weight=None, reduction="batchmean"):
    log_q, log_p = _two(student, teacher, temperature)
    rows = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    return _reduce(_weighted(temperature**2 * rows, weight), reduction)


def alpha_beta(student, teacher, alpha, beta, *, temperature=1.0, weight=None, reduction="batchmean"):
    """Wang et al. 2025, and the limits of that formula."""
    a, b, (log_q, log_p) = alpha, beta, _two(student, teacher, temperature)
    if a and b and a + b:
        powers = (a * log_p + b * log_q).exp(), ((a + b) * log_p).exp(), ((a + b) * log_q).exp()
        terms = -(powers[0] - a / (a + b) * powers[1] - b / (a + b) * powers[2]) / (a * b)
    elif a + b == 0:
        d = log_p - log_q
        terms = d**2 / 2 if a == 0 else ((a * d).exp() - 1 - a * d) / a**2
    else:
        c, log_p, log_q = (a, log_p, log_q) if a else (b, log_q, log_p)
        p, q = (c * log_p).exp(), (c * log_q).exp()
        terms = (c * p * (log_p - log_q) - p + q) / c**2
    return _reduce(_weighted(temperature**2 * terms.sum(-1), weight), reduction)


def non_target_cross_entropy(student, teacher, labels, *, temperature=1.0, weight=None, reduction="batchmean"):
    """The second term of Yang et al. 2023, without its factor."""
    _, log_q = _split(student, labels, temperature)
    _, log_p = _split(teacher, labels, temperature)
    return _reduce(_weighted(-(temperature**2) * _expect(log_p.exp(), log_q), weight), reduction)


def divergence_kl(
    student, teacher, temperature=1.0, *, beta=0.0, teacher_temperature=None, standardize=False, **options
):
    """:func:`softmax_kl` of two temperatures, or of standardised rows."""
    log_q, log_p = _two(student, teacher, temperature, teacher_temperature, standardize)
    if 0 < beta < 1:
        log_m = _mixed(log_p, log_q, beta)
        rows = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    else:
        rows = _kl(log_q, log_p) if beta else _kl(log_p, log_q)
    return _reduce(_weighted(temperature**2 * rows, options.get("weight")), options.get("reduction", "batchmean"))


def _squared_distances(x, y):
    return (x.double()[:, None] - y.double()).pow(2).sum(2)


def _root(p, least=0.0):
    """sqrt(max(p, least)), without gradient where p <= least."""
    return torch.where(p > least, torch.where(p > least, p, 1.0).sqrt(), least**0.5)


def pairwise_distance(x, y=None, *, squared=False):
    p = _squared_distances(x, x if y is None else y)
    return p if squared else _root(p)


def _over_mean(x):
    """Distances over their mean off the diagonal [B, B], as RKD's official code has them."""
    diagonal = torch.eye(len(x), dtype=torch.bool, device=x.device)
    d = _root(_squared_distances(x, x), 1e-12).masked_fill(diagonal, 0.0)
    return d / d[~diagonal].mean()


def rkd_distance(student, teacher):
    """Park et al. 2019, eq. 3 to 5."""
    if len(student) < 2:
        return 0 * student.double().sum()
    return F.smooth_l1_loss(_over_mean(student), _over_mean(teacher.detach()))


def _cosines(x):
    """cos_ijk [B, B, B] from unit vectors; a pair of equal rows has none."""
    difference = x.double() - x.double()[:, None]
    p = difference.pow(2).sum(2, keepdim=True)
    unit = torch.where(p > 0, difference / torch.where(p > 0, p, 1.0).sqrt(), 0.0)
    return unit @ unit.transpose(1, 2)


def rkd_angle(student, teacher):
    """Park et al. 2019, eq. 6 and 7."""
    if not len(student):
        return 0 * student.double().sum()
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher.detach()))


def rkd(student, teacher, distance_weight=25.0, angle_weight=50.0):
    return distance_weight * rkd_distance(student, teacher) + angle_weight * rkd_angle(student, teacher)


def _nce_scores(anchors, bank, index, temperature):
    return torch.einsum("bd,bkd->bk", anchors.double(), bank.double()[index]) / temperature


def _nce_terms(anchors, bank, index, z, temperature):
    """-log of both posteriors [B, K + 1] as the official code has them, with eps 1e-7."""
    p = _nce_scores(anchors, bank, index, temperature).exp() / z
    noise = (index.shape[1] - 1) / len(bank)
    # log1p(x) for log(1 + x): without negatives the noise is 1e-7 of p, or less.
    return torch.cat([((noise + 1e-7) / p[:, :1]).log1p(), ((p[:, 1:] + 1e-7) / noise).log1p()], 1)


def nce(student, teacher, bank_student, bank_teacher, contrast_index, z_student, z_teacher, temperature=0.07):
    terms = _nce_terms(student, bank_teacher, contrast_index, z_student, temperature)
    return (terms + _nce_terms(teacher, bank_student, contrast_index, z_teacher, temperature)).sum() / max(
        1, len(terms)
    )


def nce_constant(anchors, bank, index, temperature=0.07):
    """Z of a first batch: the mean over positives and negatives times the number of samples."""
    return _nce_scores(anchors, bank, index, temperature).exp().mean() * len(bank)


def update_bank(bank, rows, index, momentum=0.5):
    """-> the new bank; one row of the batch after the other, all from the old bank."""
    new = bank.double().clone()
    for row, at in zip(rows.double(), index.tolist(), strict=True):
        moved = momentum * bank[at].double() + (1 - momentum) * row
        new[at] = moved / moved.norm()
    return new


def _unit_map(x, power):
    """-> the map of each sample [B, N], normalised."""
    return F.normalize(x.double().pow(power).mean(1).flatten(1))


def attention_transfer(student, teacher, power=2):
    gap = _unit_map(student, power) - _unit_map(teacher, power)
    return gap.pow(2).sum() / max(gap.numel(), 1)


def _cosines_of_rows(x, eps):
    norm = _root(x.pow(2).sum(-1, keepdim=True))
    return (unit := x / torch.where(norm > 0, norm + eps, 1.0)) @ unit.transpose(-1, -2)


def _normal_rows(x):
    """Rows of the Gram matrix, normalised."""
    return F.normalize(x @ x.transpose(-1, -2), dim=-1)


def _power_series(c, coefficients):
    return sum(a * c**k for k, a in enumerate(coefficients))


def gram_distance(student, teacher, kind="rows", *, eps=0.0, coefficients=()):
    s, t = student.double(), teacher.double()
    if kind in ("rows", "rows_absolute"):
        gap = _normal_rows(s) - _normal_rows(t)
        terms = gap.pow(2) if kind == "rows" else gap.abs()
    elif kind == "distribution":
        p, q = ((1 + _cosines_of_rows(x, eps)) / 2 for x in (s, t))
        p, q = (x / x.sum(-1, keepdim=True) for x in (p, q))
        terms = q * ((q + eps) / (p + eps)).log()
    else:
        c, d = (_cosines_of_rows(x, eps) for x in (s, t))
        terms = (
            (_power_series(c, coefficients) - _power_series(d, coefficients)).pow(2) if coefficients else (c - d).abs()
        )
    return terms.sum() / max(terms.numel(), 1)


# ---- feature maps
def squared_error(student, teacher):
    return F.mse_loss(student.double(), teacher.double())


def activation_boundary(student, teacher, margin=1.0, *, reduction="sum"):
    s, active = student.double(), teacher > 0
    values = active * F.relu(margin - s).square() + ~active * F.relu(s + margin).square()
    return _reduce(values.flatten(1).sum(1), reduction)


def partial_squared_error(student, teacher, margin, *, reduction="sum"):
    s = student.double()
    m = margin.detach().double().flatten().view(-1, *[1] * (s.dim() - 2))
    target = torch.maximum(teacher.double(), m.expand_as(s))
    values = (s - target).square() * ((s > target) | (target > 0))
    return _reduce(values.flatten(1).sum(1), reduction)


def _units(student, teacher):
    return [F.normalize(x.double().flatten(1), dim=1) for x in (student, teacher)]


def normalized_error(student, teacher, power=1):
    s, t = _units(student, teacher)
    return (s - t).abs().pow(power).mean()


def pyramid_error(student, teacher):
    s, t = student.double(), teacher.double()
    parts, weights = [F.mse_loss(s, t)], [1.0]
    for bins in (4, 2, 1):
        if bins < s.shape[2]:
            parts.append(F.mse_loss(*(F.adaptive_avg_pool2d(x, bins) for x in (s, t))))
            weights.append(weights[-1] / 2)
    return sum(w * part for w, part in zip(weights, parts, strict=True)) / sum(weights)


# ---- several networks
def _eps_kl(log_p, log_q, eps):
    """KL with p' = p + eps, not normalised, of each row."""
    if eps == 0:
        return _kl(log_p, log_q)
    p = log_p.exp() + eps
    return (p * (p.log() - log_q)).sum(-1)


def _mixtures(networks, mix, labels):
    """-> mixed logits [targets, rows, cols] of networks [N, rows, cols], each centred; the least logits without mix."""
    if mix is None:
        at_label = labels.long()[None, :, None].expand(len(networks), -1, 1)
        return (networks - networks.gather(2, at_label)).amin(0, keepdim=True)
    return torch.einsum("brm,mbc->rbc", mix.double(), networks - networks.detach().amax(2, keepdim=True))


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
    z = torch.stack([x.double() for x in networks])
    targets = _mixtures(z, mix, labels)
    kl_targets = targets if through_targets else targets.detach()
    value = 0.0
    for i, x in enumerate(z[:learners]):
        log_p, log_q = _log_softmax(kl_targets[i % len(targets)], temperature), _log_softmax(x, temperature)
        value = value + kl_weight * ramp * temperature**2 * _eps_kl(log_p, log_q, eps).sum()
    if labels is not None:
        for x in [*z[:learners], *(targets if target_ce else [])]:
            value = value + ce_weight * F.cross_entropy(x, labels.long(), reduction="sum")
    return value / max(1, z.shape[1])


def teachers_kl(
    student, teachers, labels=None, temperature=1.0, *, kind="kl", weight=None, kl_weight=1.0, ce_weight=1.0
):
    log_q = _log_softmax(student, temperature)
    logs = [_log_softmax(x, temperature) for x in teachers]
    if kind == "kl":
        factors = [1.0] * len(logs) if weight is None else weight.double()
        rows = sum(a * _kl(log_p, log_q) for a, log_p in zip(factors, logs, strict=True))
    elif kind == "cross_entropy":
        rows = -_expect(torch.stack(logs).exp().mean(0), log_q)
    else:
        rows = _kl(log_q, torch.stack(logs).logsumexp(0) - math.log(len(logs)))
    value = kl_weight * temperature**2 * rows.sum()
    if labels is not None:
        value = value + ce_weight * F.cross_entropy(student.double(), labels.long(), reduction="sum")
    return value / max(1, len(student))


def capped_simplex_minimum(gram, cap):
    """argmin a' G a with sum a = 1, 0 <= a <= cap: of every choice of weights at their bounds the best allowed one."""
    count, best, least = len(gram), None, INF
    gram = gram / gram.abs().max().clamp(min=1e-300)
    for place in itertools.product((0.0, None, max(cap, 1 / count)), repeat=count):
        free = [i for i, x in enumerate(place) if x is None]
        a = torch.tensor([0.0 if x is None else x for x in place], dtype=torch.float64)
        if free:
            n = len(free)
            system = torch.ones(n + 1, n + 1, dtype=torch.float64)
            system[:n, :n], system[n, n] = gram[free][:, free], 0.0
            right = torch.cat([-(gram @ a)[free], (1 - a.sum())[None]])
            a[free] = (torch.linalg.pinv(system) @ right)[:n]
        allowed = a.min() > -1e-9 and a.max() < max(cap, 1 / count) + 1e-9 and abs(a.sum() - 1) < 1e-9
        if allowed and a @ gram @ a < least:
            best, least = a, a @ gram @ a
    return best


def aekd_gram(student, teachers, temperature=4.0):
    """G of the mean gradients, up to a factor."""
    q = _log_softmax(student, temperature).exp()
    v = torch.stack([(q - _log_softmax(x, temperature).exp()).mean(0) for x in teachers])
    return v @ v.T


def aekd_weights(student, teachers, temperature=4.0, slack=0.6, normalize=False):
    gram = aekd_gram(student.detach(), [x.detach() for x in teachers], temperature).cpu()
    norm = gram.diagonal().sqrt() if normalize else torch.ones(len(gram), dtype=torch.float64)
    a = capped_simplex_minimum(gram / norm / norm[:, None], slack) / norm
    return (a / a.sum()).to(student.device)


def channel_moments(x):
    """Means and biased variances of the channels, [2, C]."""
    channels = x.double().transpose(0, 1).flatten(1)
    mean = channels.sum(1) / max(channels.shape[1], 1)
    return torch.stack([mean, (channels - mean[:, None]).square().sum(1) / max(channels.shape[1], 1)])


def per_channel(x, f):
    """f(C, n) -> (C,) of a map's channels, beside the map."""
    return f(x.transpose(0, 1).flatten(1)).view(-1, *[1] * (x.dim() - 2))


def standardized_map(x, epsilon=1e-6):
    """Channels over samples and positions: (x - mean) / (std + epsilon)."""
    return (x - per_channel(x, lambda rows: rows.mean(1))) / (per_channel(x, lambda rows: rows.std(1)) + epsilon)


def standardized_error(student, teacher, epsilon=1e-6):
    """Half the mean squared difference of standardised maps."""
    gap = standardized_map(student, epsilon) - standardized_map(teacher, epsilon)
    return gap.square().sum() / (2 * max(gap.numel(), 1))


# ---- the losses ------------------------------------------------------------------------------------------------------
def KD(
    student,
    teacher,
    labels=None,
    temperature=4.0,
    alpha=None,
    label_smoothing=0.0,
    ignore_index=-100,
    reduction="batchmean",
    **more,
):
    """Hinton et al. 2014, eq. 1 and section 2: softened targets with T^2 for the gradient's size, and true labels."""
    kl = (divergence_kl if more else softmax_kl)(student, teacher, temperature, reduction=reduction, **more)
    if alpha is None:
        return kl
    ce = cross_entropy(student, labels, label_smoothing=label_smoothing, ignore_index=ignore_index, reduction=reduction)
    return alpha * kl + (1 - alpha) * ce


def ReverseKD(student, teacher, temperature=1.0):
    p, q = (F.softmax(z.double() / temperature, 1) for z in (teacher, student))
    return temperature**2 * (q * (q.log() - p.log())).sum() / len(q)


def JSD(student, teacher, beta=0.5, temperature=1.0):
    """Agarwal et al. 2024, eq. 1, with the ends as limits."""
    p, q = (F.softmax(z.double() / temperature, 1) for z in (teacher, student))
    if beta in (0, 1):
        total = (p * (p / q).log()).sum() if beta == 0 else (q * (q / p).log()).sum()
    else:
        m = beta * p + (1 - beta) * q
        total = beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
    return temperature**2 * total / len(p)


def _pearson(a, b):
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)


def DIST(student, teacher, beta=1.0, gamma=1.0, temperature=1.0):
    """Huang et al. 2022, eq. 8 to 10: rows correlated, then columns."""
    if student.dim() == 4:
        student, teacher = (z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]) for z in (student, teacher))
    q, p = (F.softmax(z.double() / temperature, 1) for z in (student, teacher))
    inter, intra = 1 - _pearson(q, p).mean(), 1 - _pearson(q.t(), p.t()).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def TfKDSelf(student, teacher, labels, temperature=20.0, alpha=0.9, multiplier=1.0):
    """Yuan et al. 2020, with the mean over B * C of the published code."""
    kl = softmax_kl(student, teacher, temperature, reduction="sum") / student.numel()
    return (1 - alpha) * cross_entropy(student, labels) + alpha * multiplier * kl


def TfKDReg(student, labels, temperature=20.0, alpha=0.1, multiplier=50.0):
    """Yuan et al. 2020: the virtual teacher, 0.99 at the label, softened by a softmax over those probabilities."""
    rows, cols = student.shape
    is_target = F.one_hot(labels.long(), cols).bool()
    virtual = torch.full((rows, cols), 0.01 / max(cols - 1, 1), dtype=torch.float64, device=student.device)
    log_p = _log_softmax(virtual.masked_fill(is_target, 0.99), temperature)
    kl = _kl(log_p, _log_softmax(student)).sum() / (rows * cols)
    return (1 - alpha) * cross_entropy(student, labels) + alpha * multiplier * kl


def LabelRefinery(student, teacher_probabilities, reduction="mean"):
    rows = -(teacher_probabilities.detach().double() * _log_softmax(student)).sum(1)
    return _reduce(rows, reduction)


def HardDarkRank(student, teacher, alpha=3.0, beta=3.0, permute_len=4):
    """Chen et al. 2018, eq. 6, of the nearest rows only, as RKD's official code has it."""
    scores = -alpha * pairwise_distance(student) ** beta
    loss = 0.0
    for b, distances in enumerate(pairwise_distance(teacher.detach()).tolist()):
        others = sorted((d, j) for j, d in enumerate(distances) if j != b)[:permute_len]
        kept = scores[b, [j for _, j in others]]
        loss = loss - sum(kept[k] - kept[k:].logsumexp(0) for k in range(len(kept)))
    return loss / len(scores)


def _edges(x):
    p = pairwise_distance(x.flatten(1), squared=True)
    return p / p.max()


def IRGEdge(student, teacher):
    """Liu et al. 2019, eq. 5, as the Caffe layers compute it; the maximum is a constant."""
    p = pairwise_distance(student, squared=True)
    return (p / p.max().detach() - _edges(teacher).detach()).pow(2).sum() / (2 * len(p))


def IRGTransformation(student_late, student_early, teacher_late, teacher_early):
    """Liu et al. 2019, eq. 6, a sum over the samples."""
    v, v_teacher = (
        (late.double() - early.double()).pow(2).sum(1)
        for late, early in ((student_late, student_early), (teacher_late.detach(), teacher_early.detach()))
    )
    return (v / v.max().detach() - v_teacher / v_teacher.max()).pow(2).sum() / 2


def IRG(student, teacher, vertex_weight=0.1, edge_weight=5.0, transformation_weight=5.0):
    """Liu et al. 2019, eq. 8, with edges of three layers and the transformation between the first two."""

    def moved(early, late):
        early = F.adaptive_avg_pool2d(early.double(), late.shape[2:])
        late = late.double() if early.shape[1] == late.shape[1] else (late[:, 0::2] + late[:, 1::2]).double() / 2
        v = (early - late).pow(2).flatten(1).sum(1)
        return v / v.max()

    edges = sum(F.mse_loss(_edges(s), _edges(t)) for s, t in zip(student[:3], teacher[:3], strict=True))
    transformation = F.mse_loss(moved(*student[:2]), moved(*teacher[:2]))
    vertex = F.mse_loss(student[3].double(), teacher[3].double())
    return vertex_weight * vertex + edge_weight / 3 * edges + transformation_weight * transformation


def _to_smaller_square(a, b):
    """RepDistiller: the map of greater height is pooled to a square of the smaller height."""
    height = min(a.shape[2], b.shape[2])
    return (
        x.double()
        if a.shape[2] == b.shape[2] or x.shape[2] == height
        else F.adaptive_avg_pool2d(x.double(), (height, height))
        for x in (a, b)
    )


def _each(loss, *arguments):
    """The sum over layers of a loss of one."""
    if isinstance(arguments[0], torch.Tensor):
        return loss(*arguments)
    return sum(loss(*layer) for layer in zip(*arguments, strict=True))


def AT(student, teacher, p=2):
    """Zagoruyko and Komodakis 2017, as their code has it: the mean of squares in place of the norm in eq. 2."""
    return _each(lambda s, t: attention_transfer(*_to_smaller_square(s, t), p), student, teacher)


def SP(student, teacher):
    """Tung and Mori 2019, eq. 1 to 4."""
    return _each(lambda s, t: gram_distance(s.flatten(1), t.flatten(1)), student, teacher)


def PKT(student, teacher, eps=1e-7):
    """Passalis and Tefas 2018, eq. 4 to 8 with the cosine kernel, as their code has it."""
    return gram_distance(student, teacher, "distribution", eps=eps)


def CCKD(student, teacher, kernel="gaussian", gamma=0.4, order=2):
    """Peng et al. 2019, eq. 5 to 9, on unit rows."""
    series = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)]
    coefficients = series if kernel == "gaussian" else [0.0, 1.0]
    return gram_distance(student, teacher, "polynomial", coefficients=coefficients)


def FAKD(student, teacher, affinity="spatial"):
    """He et al. 2020, eq. 3 and 4, with the code's other affinities."""

    def of(x):
        x = x.double().flatten(2)
        if affinity == "instance":
            return _normal_rows(x.flatten(1))
        return _cosines_of_rows(x if affinity == "channel" else x.transpose(1, 2), 1e-8)

    return _each(lambda s, t: (of(s) - of(t)).abs().mean(), student, teacher)


def FSP(student, teacher):
    """Yim et al. 2017, eq. 1 and 2, as a mean."""

    def flow(bottom, top):
        bottom, top = _to_smaller_square(bottom, top)
        return torch.einsum("bihw,bjhw->bij", top, bottom) / top[0, 0].numel()

    flows = [[flow(a, b) for a, b in zip(x, x[1:], strict=False)] for x in (student, teacher)]
    return sum(F.mse_loss(s, t) for s, t in zip(*flows, strict=True))


def NST(student, teacher):
    """Huang and Wang 2017, eq. 4 with the polynomial kernel of degree 2; k(t, t) is a constant."""

    def layer(s, t):
        s, t = (F.normalize(x.flatten(2), dim=2) for x in _to_smaller_square(s, t))
        k_tt, k_ss, k_st = ((a @ b.transpose(1, 2)).pow(2).mean() for a, b in ((t, t), (s, s), (s, t)))
        return k_tt.detach() + k_ss - 2 * k_st

    return _each(layer, student, teacher)


def LKD(student, teacher, patches=4, intra_weight=1.0, inter_weight=1.0, cross_weight=1.0):
    """The relations of Li et al. 2020 as kdfast chooses them: pair by pair."""

    def vectors(x):
        height, width = (size // patches * patches for size in x.shape[2:])
        x = F.adaptive_avg_pool2d(x, (height, width))
        rows = [band.chunk(patches, 3) for band in x.chunk(patches, 2)]
        return torch.stack([p.flatten(1) for band in rows for p in band], 1)

    def layer(s, t):
        s, t = (vectors(x.double()) for x in (s, t))
        (c, d), (batch, places) = (_cosines_of_rows(v.flatten(0, 1), 0.0) for v in (s, t)), s.shape[:2]
        error = (c - d).pow(2)
        sample, place = torch.arange(batch * places, device=c.device) // places, torch.arange(batch * places) % places
        one_sample, one_place = sample[:, None] == sample, (place[:, None] == place).to(c.device)
        intra, inter = error[one_sample].mean(), error[one_place].mean()
        return intra_weight * intra + inter_weight * inter + cross_weight * error[~one_sample & ~one_place].mean()

    return _each(layer, student, teacher)


def FitNets(student, teacher):
    """Romero et al. 2015, eq. 3, with the mean over all elements of RepDistiller."""
    return _each(squared_error, student, teacher)


def FT(student_factor, teacher_factor):
    """Kim et al. 2018, eq. 2 with p = 1."""
    return _each(normalized_error, student_factor, teacher_factor)


def AB(student, teacher, margin=1.0, reduction="sum"):
    """Heo et al. 2019, eq. 5."""
    return _each(lambda s, t: activation_boundary(s, t, margin, reduction=reduction), student, teacher)


def OFD(student, teacher, margin, reduction="sum"):
    """Heo et al. 2019 (overhaul), eq. 2 and 4."""
    return _each(lambda s, t, m: partial_squared_error(s, t, m, reduction=reduction), student, teacher, margin)


def VID(student, teacher, *, weights, eps=1e-5, **_):
    """Ahn et al. 2019, eq. 5 and 6; the map of the larger height is pooled."""

    def layer(student, teacher):
        s, t = _to_smaller_square(student.double(), teacher.double())
        for index in (0, 2, 4):
            s = F.conv2d(F.relu(s) if index else s, weights[f"regressor.{index}.weight"].double())
        variance = (weights["log_scale"].double().exp() + 1).log()[:, None, None] + eps
        return ((s - t).square() / variance + variance.log()).mean() / 2

    return _each(layer, student, teacher)


def JacobianMatching(student, teacher, images, labels):
    """Srinivas and Fleuret 2018, section 4, normalised; one backward for each sample."""
    units = []
    for logits in (student, teacher):
        rows = [
            torch.autograd.grad(logits[b, label], images, create_graph=True)[0][b]
            for b, label in enumerate(labels.tolist())
        ]
        units.append(F.normalize(torch.stack(rows).double().flatten(1), dim=1))
    return (units[0] - units[1].detach()).square().mean()


def HCL(student, teacher):
    """Chen et al. 2021, section 3.3, as the official code weighs it."""
    return _each(pyramid_error, student, teacher)


def CWTM(student, teacher, labels):
    """Furlanello et al. 2018, section 3.1, the weights normalised over the batch."""
    confidence = _log_softmax(teacher.detach()).exp().amax(1)
    target = F.one_hot(labels.long(), student.shape[1]).bool()
    return -(confidence / confidence.sum() * _log_softmax(student)[target]).sum()


def permuted(teacher, kept, permutation):
    """-> the teacher's logits with all classes but `kept` moved, entry by entry."""
    rows = []
    for z, k, q in zip(teacher, kept.tolist(), permutation.tolist(), strict=True):
        at = q.index(k)
        q[at], q[k] = q[k], q[at]
        rows.append(torch.stack([z[j] for j in q]))
    return torch.stack(rows)


def DKPP(student, teacher, labels, permutation, temperature=1.0, keep="label"):
    """Furlanello et al. 2018, section 3.2."""
    kept = labels if keep == "label" else teacher.argmax(1)
    return softmax_kl(student, permuted(teacher, kept, permutation), temperature)


def _stacked(networks):
    return torch.stack(list(networks)).double()


def DiversityCooperation(logits, labels, relation="js", temperature=1.0, sign=1):
    """Dvornik et al. 2019, section 3.2, as the code has it: all pairs at once."""
    z = _stacked(logits)
    heads, rows, cols = z.shape
    log_p = _log_softmax(z, temperature)
    p = log_p.exp()
    q = p * ~F.one_hot(labels.long(), cols).bool() / (p.sum(2, keepdim=True) + 1e-8)
    a, b = q[:, None], q[None]  # [M, M, B, C]
    if relation == "l2":
        terms = (a - b).square()
    elif relation == "cos":
        norm = (p.square().sum(2, keepdim=True) + 1e-8).sqrt()
        terms = a / norm[:, None] * (b / norm[None])
    elif relation == "js":
        terms = -a * (b + 1e-7).log()
    else:
        terms = -torch.where(p[:, None] > 0, p[:, None] * log_p[None], 0.0)
    different = ~torch.eye(heads, dtype=torch.bool, device=z.device)
    return sign * terms[different].sum() / (rows * heads * (heads - 1)) if heads > 1 and rows else 0 * p.sum()


def EnDD(student, teachers, temperature=1.0, smoothing=1e-8, teacher_smoothing=1e-3, variant="dirichlet"):
    """Malinin et al. 2020, eq. 6, with the temperatures of the code's four classes."""
    t_student = {"ensemble_temperature": 1, "reverse": 1 / temperature}.get(variant, temperature)
    t_teacher = 1 if variant == "dirichlet_temperature" else temperature
    factor = {"ensemble_temperature": 1, "reverse": temperature**-2}.get(variant, temperature**2)
    a = (student.double() / t_student).exp()
    p = _log_softmax(_stacked(teachers), t_teacher).exp()
    p = (1 - teacher_smoothing) * p + teacher_smoothing / p.shape[2]
    log_mean = (p + smoothing).log().mean(0)
    rows = (torch.lgamma(a + smoothing) - (a - 1) * log_mean).sum(1) - torch.lgamma(a.sum(1) + smoothing)
    return factor * rows.mean()


def ensemble_uncertainty(teachers):
    """Malinin et al. 2020, section 2, and the code's sum over all pairs."""
    p = _log_softmax(_stacked(teachers)).exp()
    log_p, mean = (p + 1e-10).log(), p.mean(0)
    total, data = -(mean * (mean + 1e-10).log()).sum(1), -(p * log_p).sum(2).mean(0)
    return {
        "confidence": mean.amax(1),
        "entropy_of_expected": total,
        "expected_entropy": data,
        "mutual_information": total - data,
        "epkl": (p[:, None] * (log_p[:, None] - log_p[None])).sum((0, 1, 3)),
    }


# ---- several networks: inputs are lists
def _ramp(epoch, length):
    return 1.0 if not length else math.exp(-5 * (1 - min(max(float(epoch), 0), length) / length) ** 2)


def DML(student, peers, labels=None, temperature=1.0):
    """Zhang et al. 2018, eq. 7 and 8 without the division."""
    value = sum(softmax_kl(student, x.detach(), temperature) for x in peers)
    return value if labels is None else value + F.cross_entropy(student.double(), labels)


def ONE(logits, gate, labels, epoch, temperature=3.0, rampup_epochs=80, eps=1e-7):
    """Lan et al. 2018, eq. 4 to 8."""
    options = {"eps": eps, "ramp": _ramp(epoch, rampup_epochs), "target_ce": True}
    return mixed_logits_kl(logits, gate[:, None], labels, temperature, **options)


def OKDDip(logits, leader, attention, labels, epoch, temperature=3.0, alpha=1.0, rampup_epochs=80, eps=1e-7):
    """Chen et al. 2020, eq. 5 to 9, on logits."""
    z = torch.stack([x.double() for x in logits])
    targets = torch.einsum("bij,jbc->ibc", attention.double(), z)
    value = sum(F.cross_entropy(x, labels) for x in [*z, leader.double()])
    for target, x in [*zip(targets, z, strict=True), (z.mean(0), leader)]:
        kl = _eps_kl(_log_softmax(target, temperature), _log_softmax(x, temperature), eps).mean()
        value = value + alpha * _ramp(epoch, rampup_epochs) * temperature**2 * kl
    return value


def FFL(logits, fused, labels, epoch, temperature=3.0, rampup_epochs=80, eps=1e-7):
    """Kim et al. 2019, eq. 3 to 6."""
    z = torch.stack([x.double() for x in logits])
    value = sum(F.cross_entropy(x, labels) for x in [*z, fused.double()])
    for target, x in [*((fused, x) for x in z), (z.mean(0), fused)]:
        kl = _eps_kl(_log_softmax(target.detach(), temperature), _log_softmax(x, temperature), eps).mean()
        value = value + _ramp(epoch, rampup_epochs) * temperature**2 * kl
    return value


def CollaborativeLearning(logits, labels, epoch=None, temperature=3.0, alpha=1.0, rampup_epochs=None, eps=1e-7):
    """Song and Chai 2018, eq. 4 and 5, as the OKDDip repository weighs them."""
    z = torch.stack([x.double() for x in logits])
    value = sum(F.cross_entropy(x, labels) for x in z)
    for x in z:
        target = (z.sum(0) - x) / (len(z) - 1)
        kl = _eps_kl(_log_softmax(target, temperature), _log_softmax(x, temperature), eps).mean()
        value = value + alpha * _ramp(epoch, rampup_epochs) * temperature**2 * kl
    return value


def kdcl_target(logits, labels, rule):
    z = torch.stack([x.detach().double() for x in logits])
    rows = torch.arange(len(labels), device=labels.device)
    if rule == "mean":
        return z.mean(0)
    if rule == "minlogit":
        return (z - z[:, rows, labels][:, :, None]).amin(0)
    if rule == "naive":
        return z[torch.stack([F.cross_entropy(x, labels, reduction="none") for x in z]).argmin(0), rows]
    p = z.softmax(2)
    errors = p - F.one_hot(labels, z.shape[2])
    c = torch.einsum("ibc,jbc->ij", errors, errors) / len(labels)
    a = torch.linalg.solve(c, torch.ones_like(c[0]))
    return (a[:, None, None] / a.sum() * p).sum(0).clamp(min=1e-30).log()


def KDCL(logits, labels, temperature=2.0, rule="minlogit", weight=1.0):
    """Guo et al. 2020, section 3.2. The linear rule's optimum is certified in tests/test_mixed_logits.py."""
    target = kdcl_target(logits, labels, rule)
    return sum(F.cross_entropy(x.double(), labels) + weight * softmax_kl(x, target, temperature) for x in logits)


def Codistillation(student, peers, epoch=None, mode="cross_entropy", burn_in=0):
    """Anil et al. 2018, algorithm 2."""
    value = teachers_kl(student, [x.detach() for x in peers], kind=mode)
    return value if epoch is None or epoch >= burn_in else 0 * value


def AEKD(student, teachers, temperature=4.0, slack=0.6, normalize=False):
    """Du et al. 2020, eq. 6 and 7."""
    teachers = [x.detach() for x in teachers]
    weights = aekd_weights(student.detach(), teachers, temperature, slack, normalize)
    return teachers_kl(student, teachers, temperature=temperature, weight=weights)


def EnD(student, teachers, temperature=1.0):
    """Malinin et al. 2020, eq. 4, with the mean over all elements of the official code."""
    return teachers_kl(student, teachers, None, temperature, kind="cross_entropy") / student.shape[1]


def JointLoss(
    logits, labels, feature_losses, epoch, feature_weight=1e-3, decay_floor=0.5, decay_epochs=60, stage="joint"
):
    """Li et al. 2020 (residual), algorithm 1, as the code weighs it: the plain student is the last path."""
    paths = [cross_entropy(z, labels) + feature_weight * d for z, d in zip(logits, feature_losses, strict=True)]
    if stage == "ta":
        return paths[-1]
    decay = decay_floor + (1 - decay_floor) * (1 + math.cos(math.pi * min(epoch / decay_epochs, 1))) / 2
    return (decay * sum(paths[:-1]) + paths[-1]) / len(paths)


def residual_margin_loss(student, teacher, margin):
    """Li et al. 2020 (residual), as the code has it: three cases, of which the teacher's own is no gradient."""
    s, t, m = student.double(), teacher.detach().double(), margin.view(1, -1, 1, 1)
    low, middle, high = t <= m, (t > m) & (t <= 0), t > 0
    terms = (s - m) ** 2 * ((s > m) & low) + (s - t) ** 2 * ((s > t) & middle) + (s - t) ** 2 * high
    return terms.sum() / (len(s) + 1e-8)


# ---- terms of synthetic images, and of wide networks -----------------------------------------------------------------
def bn_statistics_loss(x, running_mean, running_var, p=2, alpha_mean=1.0, alpha_var=1.0):
    """Yin et al. 2020, eq. 4; Chawla et al. 2021, eq. 5."""
    mean, variance = channel_moments(x)
    gaps = running_mean.double() - mean, running_var.double() - variance
    if p == 1:
        lengths = [gap.abs().sum() for gap in gaps]
    else:
        lengths = [_root(gap.square().sum()) for gap in gaps]
    return alpha_mean * lengths[0] + alpha_var * lengths[1]


def total_variation(x):
    """Yin et al. 2020: neighbours across, down, and on both diagonals, pixel by pixel."""
    x = x.double()
    height, width = x.shape[2:]
    l1 = l2 = 0 * x.sum()
    for dy, dx in ((0, 1), (1, 0), (1, -1), (1, 1)):
        pairs = [
            x[..., i, j] - x[..., i + dy, j + dx]
            for i in range(height - dy)
            for j in range(width)
            if 0 <= j + dx < width
        ]
        if pairs:
            differences = torch.stack(pairs)
            l1, l2 = l1 + differences.abs().mean(), l2 + _root(differences.square().sum())
    return l1, l2


def self_similarity(x, threshold):
    """Chawla et al. 2021, pair by pair."""
    features = x.double().flatten(2).mean(2) if x.dim() > 2 else x.double()
    total = 0 * features.sum()
    for i, j in itertools.permutations(range(len(x)), 2):
        cosine = F.cosine_similarity(features[i], features[j], dim=0, eps=1e-300)
        total = total + torch.where(cosine >= threshold, cosine, 0.0) ** 2
    return _root(total)


def adaptive_inversion(student, teacher, temperature=3.0):
    """Yin et al. 2020, eq. 8 and 9, as the code has them: the KL the other way, everything clamped."""
    p, q = (_log_softmax(x, temperature).exp() for x in (student, teacher))
    m = ((p + q) / 2).clamp(0.01, 0.99)
    p, q = p.clamp(0.01, 0.99), q.clamp(0.01, 0.99)
    divergence = (m * (m / p).log() / 2 + m * (m / q).log() / 2).sum() / len(student)
    return 1 - divergence.clamp(0, 1)


# ---- maps of dense prediction ----------------------------------------------------------------------------------------
def CWD(student, teacher, temperature=4.0):
    """Shu et al. 2021, eq. 4 and 5: a channel is a distribution over positions."""
    return _each(lambda s, t: channel_kl(s, t, temperature), student, teacher)


def PKD(student, teacher):
    """Cao et al. 2022, eq. 4, on the teacher's height."""

    def of_layer(s, t):
        if s.shape[2] != t.shape[2]:
            s = torch.nn.functional.interpolate(s, t.shape[2:], mode="bilinear", align_corners=False)
        return standardized_error(s, t)

    return _each(of_layer, student, teacher)


def _unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def similarity_kl(student, queue_of_student, teacher, queue_of_teacher, temperature, teacher_temperature=None):
    """KL of the softmaxes of cosines to two queues of unit rows, per row."""
    log_q = _log_softmax(_unit(student) @ queue_of_student.transpose(-1, -2), temperature)
    log_p = _log_softmax(_unit(teacher) @ queue_of_teacher.transpose(-1, -2), teacher_temperature or temperature)
    return _kl(log_p, log_q)


def GramAnchoring(student, teacher, positive=True):
    """Simeoni et al. 2025, eq. of the Gram loss, with the clamp of their code."""

    def of_layer(s, t):
        s, t = (x @ x.transpose(1, 2) for x in (_unit(x.flatten(2).transpose(1, 2)) for x in (s, t)))
        return F.mse_loss(s.clamp(min=0), t.clamp(min=0)) if positive else F.mse_loss(s, t)

    return _each(of_layer, student, teacher)


def PatchKL(student, teacher, temperature=0.07):
    """The local loss of lightly-train's distillation v3, written out."""

    def of_layer(s, t):
        s, t = (_unit(x.flatten(2).transpose(1, 2)) for x in (s, t))
        return similarity_kl(s, s, t, t, temperature).mean()

    return _each(of_layer, student, teacher)


def _convolution(x, weights, name):
    """1x1 or 3x3, if there is one of this name."""
    if f"{name}.weight" not in weights:
        return x
    weight = weights[f"{name}.weight"]
    return F.conv2d(x, weight, weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2)


def MGD(student, teacher, mask, *, weights, **_):
    """Yang et al. 2022, eq. 4 to 6."""
    x = _convolution(student, weights, "align") * mask
    x = _convolution(F.relu(_convolution(x, weights, "generation.0")), weights, "generation.2")
    return (x - teacher).square().sum() / len(teacher)


def box_masks(boxes, sizes, height, width):
    """Of one image: the weights of foreground and background, box by box and cell by cell."""
    inside = torch.zeros(height, width, dtype=torch.float64)
    image_height, image_width = (float(n) for n in sizes)
    for x1, y1, x2, y2 in boxes.tolist():
        left, right = math.floor(x1 / image_width * width), math.ceil(x2 / image_width * width)
        top, bottom = math.floor(y1 / image_height * height), math.ceil(y2 / image_height * height)
        for row in range(max(top, 0), min(bottom, height - 1) + 1):
            for column in range(max(left, 0), min(right, width - 1) + 1):
                weight = 1 / ((bottom + 1 - top) * (right + 1 - left))
                inside[row, column] = max(weight, float(inside[row, column]))
    outside = (inside == 0).double()
    return inside, outside / max(float(outside.sum()), 1.0)


def FGD(
    student,
    teacher,
    boxes,
    image_sizes,
    *,
    weights,
    temperature=0.5,
    foreground=1e-3,
    background=5e-4,
    attention=1e-3,
    relation=5e-6,
    **_,
):
    """Yang et al. 2022, eq. 2 to 12, image by image."""
    total = 0.0
    for s, t, of_image, size in zip(_convolution(student, weights, "align"), teacher, boxes, image_sizes, strict=True):
        channels, height, width = t.shape
        masks = [m.to(t.device) for m in box_masks(of_image, size, height, width)]
        places = [
            height * width * (x.abs().mean(0).flatten() / temperature).softmax(0).view(height, width) for x in (s, t)
        ]
        of_channels = [channels * (x.abs().mean((1, 2)) / temperature).softmax(0) for x in (s, t)]
        error = (s - t).square() * places[1] * of_channels[1][:, None, None]
        total = total + foreground * (error * masks[0]).sum() + background * (error * masks[1]).sum()
        total = total + attention * sum((x - y).abs().sum() for x, y in (places, of_channels))
        added = []
        for x, side in ((s, "s"), (t, "t")):
            shares = _convolution(x[None], weights, f"conv_mask_{side}").flatten().softmax(0)
            context = (x.flatten(1) * shares).sum(1).view(1, channels, 1, 1)
            inner = _convolution(context, weights, f"channel_add_conv_{side}.0")
            norm = [weights[f"channel_add_conv_{side}.1.{part}"] for part in ("weight", "bias")]
            inner = F.relu(F.layer_norm(inner, inner.shape[1:], *norm))
            added.append(x + _convolution(inner, weights, f"channel_add_conv_{side}.3")[0])
        total = total + relation * (added[0] - added[1]).square().sum()
    return total / len(teacher)


def _normed(x, weights, name):
    """A convolution and a batch norm in training."""
    x = _convolution(x, weights, f"{name}.0")
    return F.batch_norm(x, None, None, weights[f"{name}.1.weight"], weights[f"{name}.1.bias"], training=True)


def ReviewKD(student, teacher, *, weights, **_):
    """Chen et al. 2021, figure 3, and their HCL."""
    fused, deeper = [], None
    for k, (x, t) in enumerate(zip(reversed(student), reversed(teacher), strict=True)):
        x = _normed(x, weights, f"abfs.{k}.conv1")
        if deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:])
            maps = torch.sigmoid(_convolution(torch.cat([x, deeper], 1), weights, f"abfs.{k}.att_conv.0"))
            x = x * maps[:, :1] + deeper * maps[:, 1:]
        deeper = F.interpolate(x, t.shape[2:])
        fused.insert(0, _normed(deeper, weights, f"abfs.{k}.conv2"))
    return HCL(fused, teacher)


def SimKD(student, teacher, *, weights, **_):
    """Chen et al. 2022, eq. 4."""
    student, teacher = _to_smaller_square(student, teacher)
    for first in (0, 3, 6):
        student = _convolution(student, weights, f"transfer.{first}")
        norm = [weights[f"transfer.{first + 1}.{part}"] for part in ("weight", "bias")]
        student = F.relu(F.batch_norm(student, None, None, *norm, training=True))
    return F.mse_loss(student, teacher)


# ---- logits, since 2022 ----------------------------------------------------------------------------------------------
def LSKD(student, teacher, temperature=2.0):
    """Sun et al. 2024, with the std of C - 1 of the code."""
    return divergence_kl(student, teacher, temperature, standardize=True)


def NKD(student, teacher, labels, temperature=1.0, gamma=1.5):
    """Yang et al. 2023, eq. 9."""
    log_q, log_p = (_log_softmax(z).gather(1, labels[:, None])[:, 0] for z in (student, teacher))
    target = -(log_p.detach().exp() * log_q).mean()
    return target + gamma * non_target_cross_entropy(student, teacher, labels, temperature=temperature)


def TTM(student, teacher, temperature=4.0):
    """Zheng and Yang 2024, eq. 13."""
    return _kl(_log_softmax(teacher, temperature), _log_softmax(student)).mean()


def WTTM(student, teacher, temperature=4.0):
    """Zheng and Yang 2024, eq. 17."""
    log_p = _log_softmax(teacher)
    weight = (log_p / temperature).exp().sum(1)
    return (weight * _kl(_log_softmax(teacher, temperature), _log_softmax(student))).mean()


def CTKD(student, teacher, epoch, weights, minimum=1.0, maximum=21.0, ramp_epochs=10):
    """Li et al. 2023: the temperature maximises the loss, by a cosine of the epoch."""
    strength = (1 - math.cos(math.pi * min(float(epoch) / ramp_epochs, 1))) / 2
    raw = weights["raw"].detach() - strength * (weights["raw"] - weights["raw"].detach())
    temperature = minimum + (maximum - minimum) / (1 + torch.exp(-raw))
    return temperature**2 * _kl(*(torch.log_softmax(z / temperature, 1) for z in (teacher, student))).mean()


def SkewKL(student, teacher, skew=0.1, reverse=False):
    return skew_kl(student, teacher, skew, reverse=reverse)


def TVD(student, teacher):
    """Wen et al. 2023, eq. 6."""
    return total_variation_distance(student, teacher)


def AKL(student, teacher, head=0.5):
    """Wu et al. 2025, class by class."""
    log_q, log_p = _two(student, teacher)
    p, q, shares = log_p.exp().detach(), log_q.exp().detach(), []
    for of_p, of_q in zip(p.tolist(), q.tolist(), strict=True):
        largest = sorted(range(len(of_p)), key=lambda c: (-of_p[c], c))
        kept = [c for i, c in enumerate(largest) if i == 0 or sum(of_p[j] for j in largest[: i + 1]) <= head]
        gaps = [abs(x - y) for x, y in zip(of_p, of_q, strict=True)]
        shares.append(sum(gaps[c] for c in kept) / sum(gaps))
    share = torch.tensor(shares, dtype=torch.float64, device=p.device)
    return (share * _kl(log_p, log_q) + (1 - share) * _kl(log_q, log_p)).mean()


def TAID(student, teacher, start=0.4, end=1.0, alpha=5e-4, beta=0.99):
    """Shing et al. 2025, eq. 3, at the start, which is float32 as in the code."""
    start = float(torch.tensor(start))
    mixed = (1 - start) * student.detach() + start * teacher
    return _kl(_log_softmax(mixed), _log_softmax(student)).mean()


def LinearKD(student_hidden, student_weight, teacher_hidden, teacher_weight, labels=None, alpha=None, **options):
    """D_beta and CE of the logits, written out; T^2 is not in it."""
    student, teacher = student_hidden.double() @ student_weight.t(), teacher_hidden.double() @ teacher_weight.t()
    temperature = options.pop("temperature", 1.0)
    kl = softmax_kl(student, teacher, temperature, **options) / temperature**2
    return kl if alpha is None else alpha * kl + (1 - alpha) * cross_entropy(student, labels, reduction="mean")


def AlphaBeta(student, teacher, alpha=0.2, beta=0.7):
    return alpha_beta(student, teacher, alpha, beta)


LOSSES = {
    f.__name__: f
    for f in (
        *(CWTM, DKPP, DiversityCooperation, EnDD),
        *(DIST, JSD, KD, LabelRefinery, ReverseKD, TfKDReg, TfKDSelf),
        *(AT, CCKD, FAKD, FSP, LKD, NST, PKT, SP),
        *(AB, FT, HCL, OFD, VID, FitNets, JacobianMatching),
        *(AEKD, DML, FFL, KDCL, ONE, Codistillation, CollaborativeLearning, EnD, OKDDip),
        JointLoss,
        *(HardDarkRank, IRG, IRGEdge, IRGTransformation),
        *(CWD, PKD, PatchKL, GramAnchoring, FGD, MGD, ReviewKD, SimKD),
        *(LSKD, NKD, TTM, WTTM, CTKD, SkewKL, TVD, AKL, TAID, AlphaBeta, LinearKD),
    )
} | {"DKD": dkd, "RKD": rkd, "RKDAngle": rkd_angle, "RKDDistance": rkd_distance}
