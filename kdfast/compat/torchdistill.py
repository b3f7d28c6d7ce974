"""torchdistill's mid-level losses on kdfast's kernels. Importing this registers them, as ``kdfast.KDLoss`` and so on.

A YAML configuration needs the import and the changed key; every argument stays:

.. code-block:: yaml

    dependencies:
      - name: 'kdfast.compat.torchdistill'
    ...
        key: 'kdfast.KDLoss'

Each takes ``(student_io_dict, teacher_io_dict, targets=None)`` and returns a 0-d loss, CRDLoss one of shape (1,).
The reductions are those that give one number: "mean", "sum", "batchmean".
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

import kdfast
from kdfast import ops
from kdfast._extras import require
from kdfast.losses.feature import gaussian_error
from kdfast.ops import check
from kdfast.ops.accumulate import accumulator, fixed_sum, total
from kdfast.ops.pool import average_pool, max_pool

__all__ = [
    "ATLoss",
    "AltActTransferLoss",
    "CCKDLoss",
    "CRDLoss",
    "DISTLoss",
    "FSPLoss",
    "FTLoss",
    "HierarchicalContextLoss",
    "KDLoss",
    "PKTLoss",
    "RKDLoss",
    "SPKDLoss",
    "VIDLoss",
]
register = require("torchdistill.losses.registry", extra="torchdistill").register_mid_level_loss


class _OfTwoModules(nn.Module):
    """A loss on what one module of the student and one of the teacher take in or put out."""

    def __init__(self, student_module_path, student_module_io, teacher_module_path, teacher_module_io):
        super().__init__()
        self.student_module_path = student_module_path
        self.student_module_io = student_module_io
        self.teacher_module_path = teacher_module_path
        self.teacher_module_io = teacher_module_io

    def read(self, student_io_dict, teacher_io_dict):
        student = student_io_dict[self.student_module_path][self.student_module_io]
        return student, teacher_io_dict[self.teacher_module_path][self.teacher_module_io]


class _OfOutputs(_OfTwoModules):
    """A loss on what one module of the student and one of the teacher put out."""

    def __init__(self, student_path, teacher_path):
        super().__init__(student_path, "output", teacher_path, "output")


class _OfPairs(nn.Module):
    """A weighted sum over pairs of modules, which a dict names: {pair: {"student": {"io", "path"}, ..., "weight"}}."""

    def __init__(self, pairs):
        super().__init__()
        if not pairs:
            raise ValueError(f"there must be at least one pair of modules, got {pairs!r}")
        self.pairs = pairs

    def weighted_sum(self, loss, student_io_dict, teacher_io_dict, roles=("student", "teacher")):
        losses = []
        for pair in self.pairs.values():
            sides = [student_io_dict if role.startswith("student") else teacher_io_dict for role in roles]
            maps = [side[pair[role]["path"]][pair[role]["io"]] for side, role in zip(sides, roles, strict=True)]
            losses.append(pair.get("weight", 1) * loss(*maps))
        return total(losses)


def _root(x):
    """The square root of a sum of squares; no gradient where that is 0, as torch's norms have none."""
    return torch.where(x > 0, x, 1.0).sqrt() * (x > 0)


def _unit(x):
    """Rows of x over their lengths; a row of zeros stays, and has no gradient."""
    squares = fixed_sum(x.square())[:, None]
    return x * (squares > 0) / torch.where(squares > 0, squares, 1.0).sqrt()


@register(key="kdfast.KDLoss")
class KDLoss(_OfTwoModules):
    """:class:`kdfast.KD`: ``alpha CE + beta T^2 KL`` of logits (B, C) or (B, C, ...), beta being 1 - alpha if absent.

    Without alpha or targets the KL alone, and that without T^2 and beta, as in the original. "batchmean" divides the KL
    by B and "mean" by all entries. `kwargs` are those of nn.CrossEntropyLoss; with class weights (``weight``)
    the cross-entropy is torch's own. Without alpha and beta the original raises TypeError, this is the KL.
    """

    def __init__(
        self,
        student_module_path,
        student_module_io,
        teacher_module_path,
        teacher_module_io,
        temperature,
        alpha=None,
        beta=None,
        reduction="batchmean",
        **kwargs,
    ):
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        check.positive("temperature", temperature)
        check.one_of("reduction", reduction, ("batchmean", "mean", "sum"))
        self.temperature = temperature
        self.alpha = alpha
        self.beta = 1 - alpha if beta is None and alpha is not None else beta
        self.reduction = reduction
        self.cross_entropy_loss = nn.CrossEntropyLoss(reduction="sum" if reduction == "sum" else "mean", **kwargs)

    def forward(self, student_io_dict, teacher_io_dict, targets=None, *args, **kwargs):
        student, teacher = self.read(student_io_dict, teacher_io_dict)
        check.embeddings("student", student)
        check.same_shape("teacher", teacher, student)
        batch, entries = student.shape[0], student.numel()
        divisor = {"batchmean": batch, "mean": entries, "sum": 1}[self.reduction]
        hard = self.cross_entropy_loss
        if not self.alpha or targets is None or hard.weight is not None:
            soft = ops.softmax_kl(_rows(student), _rows(teacher), self.temperature, reduction="sum") / max(divisor, 1)
            if not self.alpha or targets is None:
                return soft / self.temperature**2
            return self.alpha * hard(student, targets) + self.beta * soft
        rows = entries // student.shape[1] if self.reduction != "sum" else 1
        return ops.cross_entropy_kl(
            _rows(student),
            _rows(teacher),
            _rows(targets) if targets.is_floating_point() else targets.flatten(),
            self.temperature,
            kl_weight=self.beta * rows / max(divisor, 1),
            ce_weight=self.alpha,
            label_smoothing=hard.label_smoothing,
            ignore_index=hard.ignore_index,
            reduction=hard.reduction,
        )


def _rows(logits):
    """(B, C, ...) as rows of classes."""
    return logits if logits.dim() == 2 else logits.movedim(1, -1).flatten(0, -2)


@register(key="kdfast.FSPLoss")
class FSPLoss(_OfPairs):
    """``1 / B sum_bj |(G - G')_b.j|``, ``G = first second' / N`` of the channels of two maps: other than kdfast.FSP.

    The norm is that of a column, over the channels of the first map, and not squared; of two sizes the lesser height
    and width, to which maxima are pooled. Op: ``inner_products``.
    """

    def __init__(self, fsp_pairs, **kwargs):
        super().__init__(fsp_pairs)

    def forward(self, student_io_dict, teacher_io_dict, *args, **kwargs):
        roles = ("student_first", "student_second", "teacher_first", "teacher_second")
        return self.weighted_sum(self.of_pair, student_io_dict, teacher_io_dict, roles)

    def of_pair(self, student_first, student_second, teacher_first, teacher_second):
        gap = self.flow(student_first, student_second) - self.flow(teacher_first, teacher_second)
        norms = _root(fixed_sum(gap.square().mT))
        return fixed_sum(fixed_sum(norms)) / max(len(gap), 1)

    @staticmethod
    def flow(first, second):
        ((first, second),) = check.layers([first], [second], check.maps)
        height, width = (min(sizes) for sizes in zip(first.shape[2:], second.shape[2:], strict=True))
        first, second = (max_pool(x, height, width).flatten(2) for x in (first, second))
        return ops.inner_products(first, second) / (height * width)


@register(key="kdfast.ATLoss")
class ATLoss(_OfPairs):
    """:class:`kdfast.AT` with mode "code"; with "paper" ``1 / B sum_b |q_b - q'_b|``, the norm, in plain PyTorch.

    Maps of one size (with "code" those of unlike heights are pooled as by kdfast.AT, where the original raises).
    """

    def __init__(self, at_pairs, mode="code", **kwargs):
        super().__init__(at_pairs)
        check.one_of("mode", mode, ("code", "paper"))
        self.mode = mode
        self.code = kdfast.AT()

    def forward(self, student_io_dict, teacher_io_dict, *args, **kwargs):
        loss = self.code if self.mode == "code" else self.paper
        return self.weighted_sum(loss, student_io_dict, teacher_io_dict)

    @staticmethod
    def paper(student, teacher):
        pairs = check.layers([student], [teacher], check.maps)
        dtype = accumulator(student, teacher)
        q_s, q_t = (F.normalize(x.to(dtype).square().sum(1).flatten(1)) for x in pairs[0])
        return fixed_sum(_root(fixed_sum((q_s - q_t).square()))) / max(len(q_s), 1)


@register(key="kdfast.PKTLoss")
class PKTLoss(_OfTwoModules):
    """:class:`kdfast.PKT` of embeddings (B, D)."""

    def __init__(self, student_module_path, student_module_io, teacher_module_path, teacher_module_io, eps=1e-7):
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        self.loss = kdfast.PKT(eps)

    def forward(self, student_io_dict, teacher_io_dict, *args, **kwargs):
        return self.loss(*self.read(student_io_dict, teacher_io_dict))


@register(key="kdfast.FTLoss")
class FTLoss(_OfOutputs):
    """:class:`kdfast.FT` with p = 1, its mean or its sum over all entries; else ``|s / |s| - t / |t||_p`` of a sample.

    Of these norms the mean or the sum over the batch, in plain PyTorch. A factor of zeros has no gradient (original:
    NaN).
    """

    def __init__(self, p=1, reduction="mean", paraphraser_path="paraphraser", translator_path="translator", **kwargs):
        super().__init__(translator_path, paraphraser_path)
        check.number("p", p, low=1)
        check.one_of("reduction", reduction, ("mean", "sum"))
        self.norm_p = p
        self.reduction = reduction

    def forward(self, student_io_dict, teacher_io_dict, *args, **kwargs):
        student, teacher = self.read(student_io_dict, teacher_io_dict)
        check.embeddings("student", student)
        check.same_shape("teacher", teacher, student)
        if self.norm_p == 1:
            return ops.normalized_error(student, teacher) * (student.numel() if self.reduction == "sum" else 1)
        dtype = accumulator(student, teacher)
        s, t = (_unit(x.flatten(1).to(dtype)) for x in (student, teacher))
        powers = fixed_sum((s - t).abs() ** self.norm_p)
        norms = torch.where(powers > 0, powers, 1.0) ** (1 / self.norm_p) * (powers > 0)
        return fixed_sum(norms) / (max(len(norms), 1) if self.reduction == "mean" else 1)


@register(key="kdfast.AltActTransferLoss")
class AltActTransferLoss(_OfPairs):
    """:class:`kdfast.AB`; "mean" divides the sum by B, any other reduction does not. No gradient to the teacher."""

    def __init__(self, feature_pairs, margin, reduction, **kwargs):
        super().__init__(feature_pairs)
        self.loss = kdfast.AB(margin, "mean" if reduction == "mean" else "sum")

    def forward(self, student_io_dict, teacher_io_dict, *args, **kwargs):
        return self.weighted_sum(self.loss, student_io_dict, teacher_io_dict)


@register(key="kdfast.RKDLoss")
class RKDLoss(_OfOutputs):
    """:class:`kdfast.RKD`; "sum" adds the B^2 and the B^3 terms. A factor None is 0 (the original raises TypeError)."""

    def __init__(self, student_output_path, teacher_output_path, dist_factor, angle_factor, reduction, **kwargs):
        super().__init__(student_output_path, teacher_output_path)
        check.one_of("reduction", reduction, ("mean", "sum"))
        self.dist_factor = dist_factor
        self.angle_factor = angle_factor
        self.reduction = reduction

    def forward(self, student_io_dict, teacher_io_dict, *args, **kwargs):
        student, teacher = self.read(student_io_dict, teacher_io_dict)
        rows = len(student) if self.reduction == "sum" else 1
        return ops.rkd(student, teacher, (self.dist_factor or 0) * rows**2, (self.angle_factor or 0) * rows**3)


@register(key="kdfast.VIDLoss")
class VIDLoss(_OfPairs):
    """The formula of :class:`kdfast.VID`; the student's module puts out (mean, variance), the variance per channel."""

    def __init__(self, feature_pairs, **kwargs):
        super().__init__(feature_pairs)

    def forward(self, student_io_dict, teacher_io_dict, *args, **kwargs):
        return self.weighted_sum(self.of_pair, student_io_dict, teacher_io_dict)

    @staticmethod
    def of_pair(student, teacher):
        mean, variance = student
        check.same_shape("teacher", teacher, mean, of="the predicted mean")
        check.channel_values("variance", variance, teacher)
        return gaussian_error(mean, teacher, variance.flatten())


@register(key="kdfast.CCKDLoss")
class CCKDLoss(_OfOutputs):
    """``|K - K'|_F / B^2``, K a kernel on rows as they are: kdfast.CCKD has unit rows and the mean of squares.

    "bilinear": ``K_ij = x_i . x_j``; "gaussian": ``exp(-2 gamma) sum_p<=max_p (2 gamma)^p / p! (x_i . x_j)^p``. Any
    reduction but "batchmean" leaves out the B^2. Op: ``inner_products``.
    """

    def __init__(self, student_linear_path, teacher_linear_path, kernel_config, reduction, **kwargs):
        super().__init__(student_linear_path, teacher_linear_path)
        self.kernel_type = kernel_config["type"]
        check.one_of("kernel_config['type']", self.kernel_type, ("bilinear", "gaussian"))
        self.series = [0.0, 1.0]
        if self.kernel_type == "gaussian":
            gamma, max_p = kernel_config["gamma"], kernel_config["max_p"]
            check.number("kernel_config['gamma']", gamma)
            check.count("kernel_config['max_p']", max_p)
            self.series = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(max_p + 1)]
        self.reduction = reduction

    def forward(self, student_io_dict, teacher_io_dict, *args, **kwargs):
        student, teacher = self.read(student_io_dict, teacher_io_dict)
        check.embeddings("student", student)
        check.same_batch("teacher", teacher, student)
        gap = self.kernel(student) - self.kernel(teacher)
        norm = _root(fixed_sum(fixed_sum(gap.square())))
        return norm / (max(len(gap), 1) ** 2 if self.reduction == "batchmean" else 1)

    def kernel(self, x):
        products = ops.inner_products(x.flatten(1)[None])[0]
        value = torch.zeros_like(products)
        for coefficient in reversed(self.series):
            value = value * products + coefficient
        return value


@register(key="kdfast.SPKDLoss")
class SPKDLoss(_OfOutputs):
    """``1 / B^2 sum_ij (q_ij - q'_ij)^2`` with ``q_i = G_i / |G_i|_1``: kdfast.SP has the Euclidean norm of the rows.

    The original hands F.normalize its 1 as the norm's order. Any reduction but "batchmean" leaves out the B^2. Op:
    ``inner_products``.
    """

    def __init__(self, student_output_path, teacher_output_path, reduction, **kwargs):
        super().__init__(student_output_path, teacher_output_path)
        self.reduction = reduction

    def forward(self, student_io_dict, teacher_io_dict, *args, **kwargs):
        student, teacher = self.read(student_io_dict, teacher_io_dict)
        check.embeddings("student", student)
        check.same_batch("teacher", teacher, student)
        q_s, q_t = (F.normalize(ops.inner_products(x.flatten(1)[None])[0], p=1) for x in (student, teacher))
        loss = fixed_sum(fixed_sum((q_s - q_t).square()))
        return loss / (max(len(q_s), 1) ** 2 if self.reduction == "batchmean" else 1)


@register(key="kdfast.CRDLoss")
class CRDLoss(kdfast.CRD):
    """:class:`kdfast.CRD` of rows that are embedded already (Linear4CRD); of shape (1,).

    The student's empty module takes in {"pos_idx", "contrast_idx"}. Without contrast_idx negatives are drawn on the
    device (the original raises AttributeError). On the first call the banks move to the student's device. One size of
    data set: num_samples is output_size; and eps is 1e-7.
    """

    def __init__(
        self,
        student_norm_module_path,
        student_empty_module_path,
        teacher_norm_module_path,
        input_size,
        output_size,
        num_negative_samples,
        num_samples,
        temperature=0.07,
        momentum=0.5,
        eps=1e-7,
    ):
        if num_samples != output_size:
            raise ValueError(f"num_samples must be output_size={output_size}, got {num_samples}")
        if eps != 1e-7:
            raise ValueError(f"eps must be 1e-7, got {eps}")
        super().__init__(input_size, input_size, output_size, input_size, num_negative_samples, temperature, momentum)
        del self.embed_student, self.embed_teacher
        self.student_norm_module_path = student_norm_module_path
        self.student_empty_module_path = student_empty_module_path
        self.teacher_norm_module_path = teacher_norm_module_path

    def forward(self, student_io_dict, teacher_io_dict, *args, **kwargs):
        student = student_io_dict[self.student_norm_module_path]["output"]
        teacher = teacher_io_dict[self.teacher_norm_module_path]["output"]
        supplement = student_io_dict[self.student_empty_module_path]["input"]
        if self.bank_student.device != student.device:
            self.to(student.device)
        rows = [supplement.get(name) for name in ("pos_idx", "contrast_idx")]
        return super().forward(student, teacher, *(x if x is None else x.to(student.device) for x in rows)).view(1)

    def _anchors(self, student, teacher):
        return tuple(x.flatten(1).to(accumulator(x)) for x in (student, teacher))


@register(key="kdfast.HierarchicalContextLoss")
class HierarchicalContextLoss(_OfTwoModules):
    """:class:`kdfast.HCL`; the student's module puts out (map, residual). Other sizes and "sum": plain PyTorch."""

    def __init__(
        self,
        student_module_path,
        student_module_io,
        teacher_module_path,
        teacher_module_io,
        reduction="mean",
        output_sizes=None,
        **kwargs,
    ):
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        check.one_of("reduction", reduction, ("mean", "sum"))
        self.reduction = reduction
        self.output_sizes = [4, 2, 1] if output_sizes is None else list(output_sizes)

    def forward(self, student_io_dict, teacher_io_dict, *args, **kwargs):
        (student, _), teacher = self.read(student_io_dict, teacher_io_dict)
        if self.reduction == "mean" and self.output_sizes == [4, 2, 1]:
            return ops.pyramid_error(student, teacher)
        ((s, t),) = check.layers([student], [teacher], check.maps, check.same_shape)
        dtype = accumulator(s, t)
        gap = s.to(dtype) - t.to(dtype)
        levels = [gap, *(average_pool(gap, size, size) for size in self.output_sizes if size < gap.shape[2])]
        weights = [0.5**k for k in range(len(levels))]
        return total(w * self.error(x) for w, x in zip(weights, levels, strict=True)) / sum(weights)

    def error(self, gap):
        squares = fixed_sum(gap.square().flatten())
        return squares / max(gap.numel(), 1) if self.reduction == "mean" else squares


@register(key="kdfast.DISTLoss")
class DISTLoss(_OfTwoModules):
    """:class:`kdfast.DIST` but for the denominator of a correlation, in plain PyTorch, of logits (B, C).

    Each norm is at least eps, where DIST adds 1e-8 to their product: they differ for norms near 1e-8.
    """

    def __init__(
        self,
        student_module_path,
        student_module_io,
        teacher_module_path,
        teacher_module_io,
        beta=1.0,
        gamma=1.0,
        tau=1.0,
        eps=1e-8,
        **kwargs,
    ):
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        check.positive("tau", tau)
        self.beta = beta
        self.gamma = gamma
        self.tau = tau
        self.eps = eps

    def forward(self, student_io_dict, teacher_io_dict, *args, **kwargs):
        student, teacher = self.read(student_io_dict, teacher_io_dict)
        check.pair(student, teacher)
        dtype = accumulator(student, teacher)
        p_s, p_t = (torch.softmax(x.to(dtype) / self.tau, 1) for x in (student, teacher))
        inter, intra = self.dissimilarity(p_s, p_t), self.dissimilarity(p_s.t(), p_t.t())
        return self.tau**2 * (self.beta * inter + self.gamma * intra)

    def dissimilarity(self, a, b):
        """1 less the mean correlation of the rows."""
        a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
        cosines = F.cosine_similarity(a, b, eps=self.eps)
        return 1 - fixed_sum(cosines) / max(len(cosines), 1)
