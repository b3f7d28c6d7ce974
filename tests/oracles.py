"""The formulas, naive: float64, one tensor operation per symbol, differentiated by autograd. No import of kdfast.

First the ops under the names and arguments of kdfast.ops, with the sizes of their terms (conftest.py: tolerances),
then `LOSSES`: each public loss from its paper, as a function (inputs, parameters) -> value.
0 log 0 = 0, and a class of probability 0 adds nothing whatever the other side says.
"""

import math

import torch
from torch.nn import functional as F

INF = math.inf


def _log_softmax(z, temperature=1.0):
    z = z.double()
    # Centred first: z / temperature may be so large that its rounding hides what is compared.
    z = (z - z.detach().amax(-1, keepdim=True)) / temperature
    return z - z.logsumexp(-1, keepdim=True)


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


# ---- the ops ---------------------------------------------------------------------------------------------------------
def softmax_kl(student, teacher, temperature=1.0, *, beta=0.0, weight=None, reduction="batchmean"):
    log_q, log_p = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    if beta == 0:
        rows = _kl(log_p, log_q)
    elif beta == 1:
        rows = _kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        rows = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    rows = temperature**2 * rows
    if weight is not None:
        rows = torch.where(weight == 0, 0.0, weight.double() * rows)
    return _reduce(rows, reduction)


def _targets(labels, shape, ignore_index):
    """-> target probabilities [rows, cols], rows kept [rows]."""
    if labels.is_floating_point():
        return labels.detach().double(), torch.ones(shape[0], dtype=torch.bool, device=labels.device)
    kept = labels != ignore_index
    return F.one_hot(torch.where(kept, labels.long(), 0), shape[1]).double(), kept


def cross_entropy(student, labels, *, ce_weight=1.0, label_smoothing=0.0, ignore_index=-100, reduction="batchmean"):
    target, kept = _targets(labels, student.shape, ignore_index)
    target = (1 - label_smoothing) * target + label_smoothing / student.shape[1]
    rows = ce_weight * torch.where(kept, -_expect(target, _log_softmax(student)), 0.0)
    if reduction in ("mean", "batchmean"):
        return rows.sum() / max(int(kept.sum()), 1)
    return _reduce(rows, reduction)


def cross_entropy_kl(
    student, teacher, labels, temperature=1.0, *, kl_weight=1.0, ce_weight=1.0, reduction="batchmean", **options
):
    kl = kl_weight * softmax_kl(student, teacher, temperature, reduction=reduction)
    return kl + cross_entropy(student, labels, ce_weight=ce_weight, reduction=reduction, **options)


def _split(z, labels, temperature):
    """-> log of (p_y, 1 - p_y) [rows, 2], log-softmax among the other classes [rows, cols - 1]."""
    rows, cols = z.shape
    is_target = F.one_hot(labels.long(), cols).bool()
    log_p = _log_softmax(z, temperature)
    others = log_p[~is_target].view(rows, cols - 1)
    log_rest = others.logsumexp(1) if cols > 1 else torch.full_like(log_p[:, 0], -INF)
    return torch.stack([log_p[is_target], log_rest], 1), others - log_rest[:, None]


def dkd(student, teacher, labels, temperature=4.0, *, alpha=1.0, beta=8.0):
    target_s, rest_s = _split(student, labels, temperature)
    target_t, rest_t = _split(teacher, labels, temperature)
    rows = alpha * _kl(target_t, target_s) + beta * _kl(rest_t, rest_s)
    return temperature**2 * rows.sum() / max(len(rows), 1)


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
    if not len(student):
        return 0 * student.double().sum()
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher.detach()))


def rkd(student, teacher, distance_weight=25.0, angle_weight=50.0):
    return distance_weight * rkd_distance(student, teacher) + angle_weight * rkd_angle(student, teacher)


# ---- feature maps
def squared_error(student, teacher):
    return F.mse_loss(student.double(), teacher.double())


def channel_squared_error(student, teacher):
    return (student.double() - teacher.double()).square().transpose(0, 1).flatten(1).sum(1)


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


# ---- sizes: what is added before it cancels, per row [rows] for the loss and per entry [rows, cols] for the gradients
def _pair_sizes(log_p, log_q):
    p, q = log_p.exp(), log_q.exp()
    a, b = (torch.where(x.isinf(), 0.0, x.abs()) for x in (log_p, log_q))
    rows = 1 + (p * (a + b) + q * (a + b)).sum(-1)
    # exp(x) has |x| as many rounding errors as x.
    # A gradient is a probability times the difference of a log-ratio, up to a + b, and the row's value.
    return rows, (rows[:, None] + a + b) * (p * (1 + a) + q * (1 + b))


def sizes_kl(student, teacher, temperature=1.0):
    """Of temperature^2 times a divergence, each row counted with the factor 1."""
    rows, entries = _pair_sizes(
        _log_softmax(student.detach(), temperature), _log_softmax(teacher.detach(), temperature)
    )
    return temperature**2 * rows, temperature * entries


def sizes_ce(student, labels, ignore_index=-100):
    target, kept = _targets(labels, student.shape, ignore_index)
    log_q = _log_softmax(student.detach())
    size = torch.where(log_q.isinf(), 0.0, log_q.abs())
    # Smoothing adds the mean over the classes.
    rows = 1 + (target * size).sum(1) + size.mean(1)
    entries = log_q.exp() * (1 + size) * (1 + target.sum(1, keepdim=True)) + target + 1 / student.shape[1]
    return kept * rows, kept[:, None] * entries


def sizes_dkd(student, teacher, labels, temperature=4.0):
    target_s, rest_s = _split(student.detach(), labels, temperature)
    target_t, rest_t = _split(teacher.detach(), labels, temperature)
    rows_1, _ = _pair_sizes(target_t, target_s)
    rows_2, entries_2 = _pair_sizes(rest_t, rest_s)
    is_target = F.one_hot(labels.long(), student.shape[1]).bool()
    entries = torch.empty(student.shape, dtype=torch.float64, device=student.device)
    entries[~is_target] = (rows_1[:, None] * entries_2).flatten()
    entries[is_target] = rows_1
    return temperature**2 * (rows_1 + rows_2), temperature * entries


def _weighted_sizes(weights, x, y):
    """Of sum_j weights_ij (x_i - y_j) [n, D], weights without sign."""
    return (weights[..., None] * (x.detach().double()[:, None] - y.detach().double()).abs()).sum(1)


def sizes_distance(x, y, upstream, squared=False):
    """-> distances [n, m], entries of the gradients in x and, where y is another set, in y."""
    p = _squared_distances(x.detach(), (x if y is None else y).detach())
    weights = upstream.abs().double() * (2 if squared else torch.where(p > 0, p, INF).rsqrt())
    value = p if squared else p.sqrt()
    if y is None:
        return value, _weighted_sizes(weights + weights.t(), x, x)
    return value, _weighted_sizes(weights, x, y), _weighted_sizes(weights.t(), y, x)


SQUARED_ROUNDING = 1e-6  # of a term whose slope is 0: the square of a few roundings, over one of them, in float32


def sizes_rkd_distance(student, teacher):
    """A difference of distances is off by a rounding of both, and so is its slope."""
    student, rows = student.detach(), len(student)
    p = _squared_distances(student, student)
    r, t = _over_mean(student), _over_mean(teacher.detach())
    slope = (r - t).clamp(-1, 1)
    value = (slope.abs() * (r + t)).mean() + SQUARED_ROUNDING
    mean = _root(p, 1e-12).sum() / (rows * (rows - 1))
    per_pair = (r + t + (slope * r).abs().mean()) * torch.where(p > 1e-12, p, INF).rsqrt() / mean
    return value, _weighted_sizes(2 * per_pair / rows**2, student, student)


def sizes_rkd_angle(student, teacher):
    """A cosine is off by a rounding of 1."""
    student, rows = student.detach(), len(student)
    inverse = torch.where((p := _squared_distances(student, student)) > 0, p, INF).rsqrt()
    slope = (_cosines(student) - _cosines(teacher.detach())).clamp(-1, 1)
    # d cos_ijk / d p_jk is 1/2 of the product of both inverse lengths; in p_ij the two terms before they cancel.
    at_vertex = inverse * inverse.sum(1, keepdim=True) + rows * inverse**2
    weights = at_vertex + at_vertex.t() + inverse.t() @ inverse
    return 2 * slope.abs().mean() + SQUARED_ROUNDING, _weighted_sizes(2 * weights / rows**3, student, student)


def sizes_normalized(student, teacher, power=1):
    """-> value, entries of both gradients; a unit vector's entry is off by a rounding of itself."""
    s, t = _units(student.detach(), teacher.detach())
    both, elements = s.abs() + t.abs(), s.numel()
    if power == 1:
        value, slope = both.mean(), torch.ones_like(s)
    else:
        value, slope = (2 * (s - t).abs() * both + both.square() * SQUARED_ROUNDING).mean(), 2 * both
    entries = [
        (slope + unit.abs() * (slope * unit.abs()).sum(1, keepdim=True))
        / (x.double().flatten(1).norm(dim=1, keepdim=True) * elements)
        for unit, x in ((s, student.detach()), (t, teacher.detach()))
    ]
    return value, *(e.view(x.shape) for e, x in zip(entries, (student, teacher), strict=True))


def sizes_pyramid(student, teacher):
    """Averages of differences without sign, as the value and its gradient take them."""
    leaf = (student.detach().double() - teacher.detach().double()).abs().requires_grad_()
    value = pyramid_error(leaf, torch.zeros_like(leaf))
    (entries,) = torch.autograd.grad(value, leaf)
    return value.detach(), entries, entries


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
):
    """Hinton et al. 2014, eq. 1 and section 2: softened targets with T^2 for the gradient's size, and true labels."""
    kl = softmax_kl(student, teacher, temperature, reduction=reduction)
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


def DKD(student, teacher, labels, temperature=4.0, alpha=1.0, beta=8.0):
    """Zhao et al. 2022, eq. 6 and 7."""
    return dkd(student, teacher, labels, temperature, alpha=alpha, beta=beta)


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


def RKDDistance(student, teacher):
    """Park et al. 2019, eq. 3 to 5."""
    return rkd_distance(student, teacher)


def RKDAngle(student, teacher):
    """Park et al. 2019, eq. 6 and 7."""
    return rkd_angle(student, teacher)


def RKD(student, teacher, distance_weight=25.0, angle_weight=50.0):
    return rkd(student, teacher, distance_weight, angle_weight)


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


def _each(loss, *arguments):
    """The sum over layers of a loss of one."""
    if isinstance(arguments[0], torch.Tensor):
        return loss(*arguments)
    return sum(loss(*layer) for layer in zip(*arguments, strict=True))


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
    s, t = student.double(), teacher.double()
    if s.shape[2] > t.shape[2]:
        s = F.adaptive_avg_pool2d(s, t.shape[2])
    elif t.shape[2] > s.shape[2]:
        t = F.adaptive_avg_pool2d(t, s.shape[2])
    for index in (0, 2, 4):
        s = F.conv2d(F.relu(s) if index else s, weights[f"regressor.{index}.weight"].double())
    variance = (weights["log_scale"].double().exp() + 1).log()[:, None, None] + eps
    return ((s - t).square() / variance + variance.log()).mean() / 2


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


LOSSES = {
    f.__name__: f
    for f in (
        *(DIST, DKD, JSD, KD, LabelRefinery, ReverseKD, TfKDReg, TfKDSelf),
        *(AB, FT, HCL, OFD, VID, FitNets, JacobianMatching),
        *(HardDarkRank, IRG, IRGEdge, IRGTransformation, RKD, RKDAngle, RKDDistance),
    )
}
