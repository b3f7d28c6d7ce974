"""torchdistill's mid-level losses on kdfast's kernels. Importing this registers them, as ``kdfast.KDLoss`` and so on.

A YAML configuration needs the import and the changed key; every argument stays:

.. code-block:: yaml

    dependencies:
      - name: 'kdfast.compat.torchdistill'
    ...
        key: 'kdfast.KDLoss'

Each takes ``(student_io_dict, teacher_io_dict, targets=None)`` and returns a 0-d loss, CRDLoss one of shape (1,).
Attributes have the originals' names and act when they are set later, and so do a subclass's own methods where the
originals have such ones. Reductions are "mean", "sum" and "batchmean", and "none" where the originals return terms:
KDLoss, FTLoss with p = 1, RKDLoss with one factor, HierarchicalContextLoss of one size; in plain PyTorch.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kdfast
from kdfast import ops
from kdfast._extras import require
from kdfast.compat._original import alias, attention_map, make_crd, mean, over_mean, pdist, replaced, wide
from kdfast.losses.feature import gaussian_error
from kdfast.ops import check, elementwise
from kdfast.ops.accumulate import accumulator, fixed_sum, total
from kdfast.ops.pool import average_pool, max_pool

__all__ = ["ATLoss", "AltActTransferLoss", "CCKDLoss", "CRDLoss", "DISTLoss", "FSPLoss", "FTLoss"]
__all__ += ["HierarchicalContextLoss", "KDLoss", "PKTLoss", "RKDLoss", "SPKDLoss", "VIDLoss"]
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

    def forward(
        self, student_io_dict: dict[str, Any], teacher_io_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        return self.of_outputs(*self.read(student_io_dict, teacher_io_dict))


class _OfOutputs(_OfTwoModules):
    """A loss on what one module of the student and one of the teacher put out."""

    def __init__(self, student_path, teacher_path):
        super().__init__(student_path, "output", teacher_path, "output")


class _OfPairs(nn.Module):
    """A weighted sum over pairs of modules, which a dict names: {pair: {"student": {"io", "path"}, ..., "weight"}}."""

    roles = ("student", "teacher")  # whose tensors `of_pair` takes

    def __init__(self, feature_pairs: dict[str, Any], **kwargs: Any) -> None:
        super().__init__()
        if not feature_pairs:
            raise ValueError(f"there must be at least one pair of modules, got {feature_pairs!r}")
        self.feature_pairs = feature_pairs

    def forward(
        self, student_io_dict: dict[str, Any], teacher_io_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        losses = []
        for pair in self.feature_pairs.values():
            sides = [student_io_dict if role.startswith("student") else teacher_io_dict for role in self.roles]
            maps = [side[pair[role]["path"]][pair[role]["io"]] for side, role in zip(sides, self.roles, strict=True)]
            losses.append(pair.get("weight", 1) * self.of_pair(*maps))
        return total(losses)


def _root(x, power=2):
    """The root of a sum of powers; no gradient where that is 0, as torch's norms have none."""
    some = x != 0  # NaN, too
    return torch.where(some, x, 1.0) ** (1 / power) * some


def _unit(x):
    """Rows of x over their lengths; a row of zeros stays, and has no gradient."""
    squares = fixed_sum(x.square())[:, None]
    some = squares != 0
    return x * some / torch.where(some, squares, 1.0).sqrt()


@register(key="kdfast.KDLoss")
class KDLoss(_OfTwoModules):
    """:class:`kdfast.KD`: ``alpha CE + beta T^2 KL`` of logits (B, C) or (B, C, ...), beta being 1 - alpha if absent.

    Without alpha or targets the KL alone, and that without T^2 and beta, as in the original. "batchmean" divides the KL
    by B, "mean" by all entries, and "none" returns its terms, in plain PyTorch. `kwargs` are those of
    nn.CrossEntropyLoss; with class weights (``weight``), or another ``cross_entropy_loss`` set later, the cross-entropy
    is torch's own. Without alpha and beta the original raises TypeError, this is the KL.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        check.positive("temperature", temperature)
        check.one_of("reduction", reduction, ("batchmean", "mean", "sum", "none"))
        self.temperature = temperature
        self.alpha = alpha
        self.beta = 1 - alpha if beta is None and alpha is not None else beta
        self.reduction = reduction
        self.cross_entropy_loss = nn.CrossEntropyLoss(
            reduction="mean" if reduction == "batchmean" else reduction, **kwargs
        )

    def forward(
        self,
        student_io_dict: dict[str, Any],
        teacher_io_dict: dict[str, Any],
        targets: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        student, teacher = self.read(student_io_dict, teacher_io_dict)
        check.two_embeddings(student, teacher, check.same_shape)
        check.one_of("reduction", self.reduction, ("batchmean", "mean", "sum", "none"))
        if not self.alpha or targets is None:
            return self._divergence(student, teacher)
        hard = self.cross_entropy_loss
        beta = 1 - self.alpha if self.beta is None else self.beta
        one_kernel = type(hard) is nn.CrossEntropyLoss and hard.weight is None
        if not one_kernel or "none" in (self.reduction, hard.reduction):
            soft = self._divergence(student, teacher)
            return self.alpha * hard(student, targets) + beta * self.temperature**2 * soft
        rows = student.numel() // student.shape[1] if hard.reduction == "mean" else 1
        return ops.cross_entropy_kl(
            _rows(student),
            _rows(teacher),
            _rows(targets) if targets.is_floating_point() else targets.flatten(),
            self.temperature,
            kl_weight=beta * rows / self._divisor(student),
            ce_weight=self.alpha,
            label_smoothing=hard.label_smoothing,
            ignore_index=hard.ignore_index,
            reduction=hard.reduction,
        )

    def _divisor(self, student):
        return {"batchmean": max(len(student), 1), "mean": max(student.numel(), 1), "sum": 1}[self.reduction]

    def _divergence(self, student, teacher):
        """The KL divergence without T^2."""
        if self.reduction != "none":
            divisor = self._divisor(student) * self.temperature**2
            return ops.softmax_kl(_rows(student), _rows(teacher), self.temperature, reduction="sum") / divisor
        student, teacher = (x / self.temperature for x in wide(student, teacher))
        return F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none")


def _rows(logits):
    """(B, C, ...) as rows of classes."""
    return logits if logits.dim() == 2 else logits.movedim(1, -1).flatten(0, -2)


@register(key="kdfast.FSPLoss")
class FSPLoss(_OfPairs):
    """``1 / B sum_bj |(G - G')_b.j|``, ``G = first second' / N`` of the channels of two maps: other than kdfast.FSP.

    The norm is that of a column, over the channels of the first map, and not squared; of two sizes the lesser height
    and width, to which maxima are pooled. Op: ``inner_products``.
    """

    fsp_pairs = alias("feature_pairs")
    roles = ("student_first", "student_second", "teacher_first", "teacher_second")

    def __init__(self, fsp_pairs: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(fsp_pairs)

    def of_pair(
        self, student_first: Tensor, student_second: Tensor, teacher_first: Tensor, teacher_second: Tensor
    ) -> Tensor:
        """The loss of one pair."""
        flow = self.compute_fsp_matrix
        gap = flow(student_first, student_second) - flow(teacher_first, teacher_second)
        norms = _root(fixed_sum(gap.square().mT))
        return fixed_sum(fixed_sum(norms)) / max(len(gap), 1)

    @staticmethod
    def compute_fsp_matrix(first_feature_map: Tensor, second_feature_map: Tensor) -> Tensor:
        """Products of the channels of two maps over their positions [B, C, C'], averaged."""
        ((first, second),) = check.layers([first_feature_map], [second_feature_map], check.maps)
        height, width = (min(sizes) for sizes in zip(first.shape[2:], second.shape[2:], strict=True))
        first, second = (max_pool(x, height, width).flatten(2) for x in (first, second))
        return ops.inner_products(first, second) / (height * width)


@register(key="kdfast.ATLoss")
class ATLoss(_OfPairs):
    """:class:`kdfast.AT` with mode "code"; with "paper" ``1 / B sum_b |q_b - q'_b|``, the norm, in plain PyTorch.

    Maps of one size (with "code" those of unlike heights are pooled as by kdfast.AT, where the original raises).
    """

    at_pairs = alias("feature_pairs")

    def __init__(self, at_pairs: dict[str, Any], mode: str = "code", **kwargs: Any) -> None:
        super().__init__(at_pairs)
        check.one_of("mode", mode, ("code", "paper"))
        self.mode = mode

    def of_pair(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one pair."""
        check.one_of("mode", self.mode, ("code", "paper"))
        if self.mode == "code":
            return self.compute_at_loss(student, teacher)
        return self.compute_at_loss_paper(student, teacher) / max(len(student), 1)

    def compute_at_loss(self, student_feature_map: Tensor, teacher_feature_map: Tensor) -> Tensor:
        """Mode "code" of one pair."""
        if not replaced(self, ATLoss, "attention_transfer"):
            return kdfast.AT()(student_feature_map, teacher_feature_map)
        q_s, q_t = (self.attention_transfer(x) for x in (student_feature_map, teacher_feature_map))
        return mean((q_s - q_t).square())

    def compute_at_loss_paper(self, student_feature_map: Tensor, teacher_feature_map: Tensor) -> Tensor:
        """Mode "paper" of one pair, times B."""
        check.layers([student_feature_map], [teacher_feature_map], check.maps)
        q_s, q_t = (self.attention_transfer_paper(x) for x in (student_feature_map, teacher_feature_map))
        return fixed_sum(_root(fixed_sum((q_s - q_t).square())))

    @staticmethod
    def attention_transfer(feature_map: Any) -> Any:
        """``m / |m|`` [B, N] with ``m = mean_c x^2``."""
        return attention_map(feature_map, 2)

    @staticmethod
    def attention_transfer_paper(feature_map: Tensor) -> Tensor:
        """``m / |m|`` [B, N] with ``m = sum_c x^2``."""
        check.maps("feature_map", feature_map)
        return F.normalize(feature_map.to(accumulator(feature_map)).square().sum(1).flatten(1))


@register(key="kdfast.PKTLoss")
class PKTLoss(_OfTwoModules):
    """:class:`kdfast.PKT` of embeddings (B, D)."""

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        eps: float = 1e-7,
    ) -> None:
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        check.positive("eps", eps)
        self.eps = eps

    def of_outputs(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of what the two modules put out."""
        return self.cosine_similarity_loss(student, teacher)

    def cosine_similarity_loss(self, student_outputs: Tensor, teacher_outputs: Tensor) -> Tensor:
        """The loss."""
        return kdfast.PKT(self.eps)(student_outputs, teacher_outputs)


@register(key="kdfast.FTLoss")
class FTLoss(_OfOutputs):
    """:class:`kdfast.FT` with p = 1, its mean or its sum over all entries; else ``|s / |s| - t / |t||_p`` of a sample.

    Of these norms the mean, or with another reduction the sum over the batch, in plain PyTorch. A factor of zeros has
    no gradient (original: NaN). "none" is, with p = 1, all entries.
    """

    translator_path = alias("student_module_path")
    paraphraser_path = alias("teacher_module_path")

    def __init__(
        self,
        p: int = 1,
        reduction: str = "mean",
        paraphraser_path: str = "paraphraser",
        translator_path: str = "translator",
        **kwargs: Any,
    ) -> None:
        super().__init__(translator_path, paraphraser_path)
        check.number("p", p, low=1)
        check.one_of("reduction", reduction, ("mean", "sum", "none"))
        self.norm_p = p
        self.reduction = reduction

    def of_outputs(self, student: Tensor, teacher: Tensor) -> Tensor:
        check.number("norm_p", self.norm_p, low=1)
        check.one_of("reduction", self.reduction, ("mean", "sum", "none"))
        check.two_embeddings(student, teacher, check.same_shape)
        if self.norm_p == 1 and self.reduction != "none":
            return ops.normalized_error(student, teacher) * (student.numel() if self.reduction == "sum" else 1)
        s, t = (_unit(x.flatten(1)) for x in wide(student, teacher))
        if self.norm_p == 1:
            return (s - t).abs()
        norms = _root(fixed_sum(elementwise.power((s - t).abs(), self.norm_p)), self.norm_p)
        return fixed_sum(norms) / (max(len(norms), 1) if self.reduction == "mean" else 1)


@register(key="kdfast.AltActTransferLoss")
class AltActTransferLoss(_OfPairs):
    """:class:`kdfast.AB`; "mean" divides the sum by B, any other reduction does not. No gradient to the teacher."""

    def __init__(self, feature_pairs: dict[str, Any], margin: float, reduction: str, **kwargs: Any) -> None:
        super().__init__(feature_pairs)
        check.number("margin", margin)
        self.margin = margin
        self.reduction = reduction

    def of_pair(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of one pair."""
        loss = self.compute_alt_act_transfer_loss(student, teacher, self.margin)
        return loss / max(len(student), 1) if self.reduction == "mean" else loss

    @staticmethod
    def compute_alt_act_transfer_loss(source: Tensor, target: Tensor, margin: float) -> Tensor:
        """The sum of one pair."""
        return ops.activation_boundary(source, target, margin)


@register(key="kdfast.RKDLoss")
class RKDLoss(_OfOutputs):
    """:class:`kdfast.RKD`; "sum" adds the B^2 and the B^3 terms. A factor None is 0 (the original raises TypeError).

    With "none", another ``smooth_l1_loss`` set later or a method of a subclass's own it is the original's formula of
    them, in plain PyTorch, with B^3 cosines. "none" returns the terms of the one whose factor is not 0.
    """

    student_output_path = alias("student_module_path")
    teacher_output_path = alias("teacher_module_path")

    def __init__(
        self,
        student_output_path: str,
        teacher_output_path: str,
        dist_factor: float | None,
        angle_factor: float | None,
        reduction: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(student_output_path, teacher_output_path)
        check.one_of("reduction", reduction, ("mean", "sum", "none"))
        self.dist_factor = dist_factor
        self.angle_factor = angle_factor
        self.smooth_l1_loss = nn.SmoothL1Loss(reduction=reduction)

    def of_outputs(self, student: Tensor, teacher: Tensor) -> Tensor:
        check.two_embeddings(student, teacher)
        dist_factor, angle_factor = self.dist_factor or 0, self.angle_factor or 0
        huber = self.smooth_l1_loss
        usual = type(huber) is nn.SmoothL1Loss and huber.beta == 1 and huber.reduction in ("mean", "sum")
        methods = ("pdist", "compute_rkd_distance_loss", "compute_rkd_angle_loss")
        if usual and not replaced(self, RKDLoss, *methods):
            rows = len(student) if huber.reduction == "sum" else 1
            return ops.rkd(student, teacher, dist_factor * rows**2, angle_factor * rows**3)
        flat = [x.flatten(1).to(accumulator(student, teacher)) for x in (teacher, student)]
        return dist_factor * self.compute_rkd_distance_loss(*flat) + angle_factor * self.compute_rkd_angle_loss(*flat)

    @staticmethod
    def pdist(e: Tensor, squared: bool = False, eps: float = 1e-12) -> Tensor:
        """Distances among the rows of e [B, B], whose squares are at least eps, and 0 on the diagonal."""
        return pdist(e, squared, eps)

    def compute_rkd_distance_loss(self, teacher_flat_outputs: Tensor, student_flat_outputs: Tensor) -> Tensor:
        """The distance term, without its factor; 0 where that is 0."""
        if not self.dist_factor:
            return 0
        d_t, d_s = (over_mean(self.pdist(x)) for x in (teacher_flat_outputs.detach(), student_flat_outputs))
        return self.smooth_l1_loss(d_s, d_t)

    def compute_rkd_angle_loss(self, teacher_flat_outputs: Tensor, student_flat_outputs: Tensor) -> Tensor | int:
        """The angle term, without its factor; 0 where that is 0."""
        if not self.angle_factor:
            return 0
        cosines = []
        for x in (teacher_flat_outputs.detach(), student_flat_outputs):
            directions = F.normalize(x[None] - x[:, None], dim=2)
            cosines.append((directions @ directions.mT).flatten())
        return self.smooth_l1_loss(cosines[1], cosines[0])


@register(key="kdfast.VIDLoss")
class VIDLoss(_OfPairs):
    """The formula of :class:`kdfast.VID`; the student's module puts out (mean, variance), the variance per channel."""

    @staticmethod
    def of_pair(student: tuple[Tensor, Tensor], teacher: Tensor) -> Tensor:
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

    student_linear_path = alias("student_module_path")
    teacher_linear_path = alias("teacher_module_path")

    def __init__(
        self,
        student_linear_path: str,
        teacher_linear_path: str,
        kernel_config: dict[str, str],
        reduction: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(student_linear_path, teacher_linear_path)
        self.kernel_type = kernel_config["type"]
        check.one_of("kernel_config['type']", self.kernel_type, ("bilinear", "gaussian"))
        if self.kernel_type == "gaussian":
            self.gamma, self.max_p = kernel_config["gamma"], kernel_config["max_p"]
            check.number("kernel_config['gamma']", self.gamma)
            check.count("kernel_config['max_p']", self.max_p)
        self.reduction = reduction

    def of_outputs(self, student: Tensor, teacher: Tensor) -> Tensor:
        check.two_embeddings(student, teacher)
        check.one_of("kernel_type", self.kernel_type, ("bilinear", "gaussian"))
        gaussian = self.kernel_type == "gaussian"
        kernel = self.compute_cc_mat_by_gaussian_rbf if gaussian else self.compute_cc_mat_by_bilinear_pool
        gap = kernel(student) - kernel(teacher)
        norm = _root(fixed_sum(fixed_sum(gap.square())))
        return norm / (max(len(gap), 1) ** 2 if self.reduction == "batchmean" else 1)

    @staticmethod
    def compute_cc_mat_by_bilinear_pool(linear_outputs: Tensor) -> Tensor:
        """K [B, B], bilinear."""
        return _products(linear_outputs)

    def compute_cc_mat_by_gaussian_rbf(self, linear_outputs: Tensor) -> Tensor:
        """K [B, B], gaussian."""
        g = 2 * self.gamma
        products = _products(linear_outputs)
        value = torch.zeros_like(products)
        for p in reversed(range(self.max_p + 1)):
            value = value * products + math.exp(-g) * g**p / math.factorial(p)
        return value


def _products(x):
    """The inner products of the rows of x [B, B], flattened."""
    return ops.inner_products(x.flatten(1)[None])[0]


@register(key="kdfast.SPKDLoss")
class SPKDLoss(_OfOutputs):
    """``1 / B^2 sum_ij (q_ij - q'_ij)^2`` with ``q_i = G_i / |G_i|_1``: kdfast.SP has the Euclidean norm of the rows.

    The original hands F.normalize its 1 as the norm's order. Any reduction but "batchmean" leaves out the B^2. Op:
    ``inner_products``.
    """

    student_output_path = alias("student_module_path")
    teacher_output_path = alias("teacher_module_path")

    def __init__(self, student_output_path: str, teacher_output_path: str, reduction: str, **kwargs: Any) -> None:
        super().__init__(student_output_path, teacher_output_path)
        self.reduction = reduction

    def of_outputs(self, student: Tensor, teacher: Tensor) -> Tensor:
        check.two_embeddings(student, teacher)
        loss = self.compute_spkd_loss(teacher, student)
        return loss / (max(len(student), 1) ** 2 if self.reduction == "batchmean" else 1)

    def matmul_and_normalize(self, z: Tensor) -> Tensor:
        """q [B, B]."""
        return F.normalize(_products(z), p=1)

    def compute_spkd_loss(self, teacher_outputs: Tensor, student_outputs: Tensor) -> Tensor:
        """The loss, without the B^2."""
        gap = self.matmul_and_normalize(student_outputs) - self.matmul_and_normalize(teacher_outputs)
        return fixed_sum(fixed_sum(gap.square()))


@register(key="kdfast.CRDLoss")
class CRDLoss(kdfast.CRD):
    """:class:`kdfast.CRD` of rows that are embedded already (Linear4CRD); of shape (1,).

    The student's empty module takes in {"pos_idx", "contrast_idx"}. Without contrast_idx negatives are drawn on the
    device (the original raises AttributeError). On the first call the banks move to the student's device. One size of
    data set: num_samples is output_size; and eps is 1e-7. `bank_dtype`: of the banks, by default torch's default type,
    as there; made on the CPU they are the original's of the same seed. There is no ``params``: ``temperature``,
    ``momentum`` and ``num_negative_samples`` act. The original's methods are kernels here: a subclass cannot have them.
    """

    num_negative_samples = alias("negatives")
    memory_v1 = alias("bank_student")
    memory_v2 = alias("bank_teacher")

    def __init__(
        self,
        student_norm_module_path: str,
        student_empty_module_path: str,
        teacher_norm_module_path: str,
        input_size: int,
        output_size: int,
        num_negative_samples: int,
        num_samples: int,
        temperature: float = 0.07,
        momentum: float = 0.5,
        eps: float = 1e-7,
        bank_dtype: torch.dtype | None = None,
    ) -> None:
        if num_samples != output_size:
            raise ValueError(f"num_samples must be output_size={output_size}, got {num_samples}")
        if eps != 1e-7:
            raise ValueError(f"eps must be 1e-7, got {eps}")
        sizes = input_size, input_size, output_size, input_size, num_negative_samples, temperature, momentum
        make_crd(self, *sizes, embeddings=False, bank_dtype=bank_dtype)
        del self.embed_student, self.embed_teacher
        self.student_norm_module_path = student_norm_module_path
        self.student_empty_module_path = student_empty_module_path
        self.teacher_norm_module_path = teacher_norm_module_path

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("contrast_memory", "compute_contrast_loss", "draw", "init_prob_alias"):
            if hasattr(cls, name):
                raise TypeError(f"{cls.__name__}.{name} would never be called: it is part of a kernel here")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("eps", "num_samples", "params", "unigrams", "probs", "alias"):
            raise AttributeError(
                f"{name} cannot be set, for it would change nothing; temperature, momentum, num_negative_samples, "
                "memory_v1 and memory_v2 can"
            )
        super().__setattr__(name, value)

    @property
    def num_samples(self) -> int:
        """The number of samples of the data set."""
        return self.n_data

    def forward(
        self, student_io_dict: dict[str, Any], teacher_io_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
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
    """:class:`kdfast.HCL`; the student's module puts out (map, residual).

    Other sizes and reductions, and other ``criteria`` set later: plain PyTorch. "none" is for sizes that are no smaller
    than the map, as there, or that torch can add to it.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        reduction: str = "mean",
        output_sizes: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        check.one_of("reduction", reduction, ("mean", "sum", "none"))
        self.criteria = nn.MSELoss(reduction=reduction)
        self.output_sizes = [4, 2, 1] if output_sizes is None else list(output_sizes)

    def of_outputs(self, student: tuple[Tensor, Tensor], teacher: Tensor) -> Tensor:
        student, _ = student
        usual = type(self.criteria) is nn.MSELoss and self.criteria.reduction == "mean"
        if usual and list(self.output_sizes) == [4, 2, 1]:
            return ops.pyramid_error(student, teacher)
        ((s, t),) = check.layers([student], [teacher], check.maps, check.same_shape)
        s, t = wide(s, t)
        sizes = [size for size in self.output_sizes if size < s.shape[2]]
        levels = [(s, t), *([average_pool(x, size, size) for x in (s, t)] for size in sizes)]
        weights = [0.5**k for k in range(len(levels))]
        return total(w * self.error(*maps) for w, maps in zip(weights, levels, strict=True)) / sum(weights)

    def error(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The error of one level."""
        if type(self.criteria) is not nn.MSELoss or self.criteria.reduction not in ("mean", "sum"):
            return self.criteria(student, teacher)
        squares = fixed_sum((student - teacher).square().flatten())
        return squares / max(student.numel(), 1) if self.criteria.reduction == "mean" else squares


@register(key="kdfast.DISTLoss")
class DISTLoss(_OfTwoModules):
    """:class:`kdfast.DIST` but for the denominator of a correlation, in plain PyTorch, of logits (B, C).

    Each norm is at least eps, where DIST adds 1e-8 to their product: they differ for norms near 1e-8.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        beta: float = 1.0,
        gamma: float = 1.0,
        tau: float = 1.0,
        eps: float = 1e-8,
        **kwargs: Any,
    ) -> None:
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        check.positive("tau", tau)
        self.beta = beta
        self.gamma = gamma
        self.tau = tau
        self.eps = eps

    def of_outputs(self, student: Tensor, teacher: Tensor) -> Tensor:
        check.pair(student, teacher)
        check.positive("tau", self.tau)
        dtype = accumulator(student, teacher)
        p_s, p_t = (torch.softmax(x.to(dtype) / self.tau, 1) for x in (student, teacher))
        inter, intra = self.inter_class_relation(p_s, p_t), self.intra_class_relation(p_s, p_t)
        return self.tau**2 * (self.beta * inter + self.gamma * intra)

    @staticmethod
    def pearson_correlation(y_s: Tensor, y_t: Tensor, eps: float) -> Tensor:
        """The correlation of each row (B,)."""
        return F.cosine_similarity(*(x - x.mean(1, keepdim=True) for x in (y_s, y_t)), eps=eps)

    def inter_class_relation(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        """1 less the mean correlation of the rows."""
        correlations = self.pearson_correlation(y_s, y_t, self.eps)
        return 1 - fixed_sum(correlations) / max(len(correlations), 1)

    def intra_class_relation(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        """1 less the mean correlation of the columns."""
        return self.inter_class_relation(y_s.t(), y_t.t())
