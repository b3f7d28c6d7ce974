"""RepDistiller's losses: ``from kdfast.compat.repdistiller import DistillKL`` in place of its distiller_zoo and crd.

Criteria on lists of layers return one loss for each, as there: sum them. The layers of its models.util (ConvReg,
Paraphraser, Translator, LinearEmbed) stay what they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kdfast
from kdfast import ops
from kdfast.compat import _kdsvd
from kdfast.compat._original import (
    alias,
    attention_error,
    attention_map,
    distance_error,
    layers,
    make_crd,
    maps_of_one_size,
    mean,
    of_each,
    pdist,
    poly_kernel,
    power,
    replaced,
    shortened,
    wide,
)
from kdfast.ops import check, elementwise, gram_distance, normalized_error
from kdfast.ops.accumulate import accumulator, fixed_sum

__all__ = ["ABLoss", "Attention", "CRDLoss", "Correlation", "DistillKL", "FSP", "FactorTransfer"]
__all__ += ["HintLoss", "KDSVD", "NSTLoss", "PKT", "RKDLoss", "Similarity", "VIDLoss"]


class DistillKL(kdfast.KD):
    """``DistillKL(T)(y_s, y_t)``: :class:`kdfast.KD` without labels. Logits (B, C); 0-d.

    Where the teacher's probability underflows, the original's gradient to the teacher is NaN and this one's is not.
    """

    T = alias("temperature")

    def __init__(self, T: float) -> None:
        super().__init__(temperature=T)

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        return super().forward(y_s, y_t)


class HintLoss(nn.Module):
    """``HintLoss()(f_s, f_t)``: :class:`kdfast.FitNets`, the mean squared error of two maps of one shape; 0-d.

    It is the module ``crit``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.crit: kdfast.FitNets = kdfast.FitNets()

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return self.crit(f_s, f_t)


class Attention(nn.Module):
    """``Attention(p)(g_s, g_t)``: :class:`kdfast.AT` of each layer; lists of maps to a list of 0-d losses.

    p is any number above 0; of maps with entries below 0 a p that is not whole makes NaN, as there. Such a p, and an
    ``at`` of a subclass, run in plain PyTorch.
    """

    def __init__(self, p: float = 2) -> None:
        super().__init__()
        power("p", p)
        self.p = p

    def forward(self, g_s: Sequence[Any], g_t: Sequence[Any]) -> list[Tensor]:
        return of_each(self.at_loss, g_s, g_t)

    def at_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """Of one layer."""
        if not replaced(self, Attention, "at"):
            return attention_error(f_s, f_t, self.p)
        q_s, q_t = (self.at(x) for x in wide(*maps_of_one_size(f_s, f_t)))
        return mean((q_s - q_t).square())

    def at(self, f: Tensor) -> Tensor:
        """The attention map of a unit length [B, N]."""
        return attention_map(f, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Similarity(kdfast.SP):
    """``Similarity()(g_s, g_t)``: :class:`kdfast.SP` of each layer; lists of maps to a list of losses of shape (1,).

    Takes channels_last maps, too, at which the original raises.
    """

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        return of_each(self.similarity_loss, g_s, g_t)

    def similarity_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """Of one layer."""
        return super().forward(f_s, f_t).view(1)


class Correlation(nn.Module):
    """``Correlation()(f_s, f_t)``: the mean over i of ``D_i . D_(i+1)``, ``D = |f_s - f_t|``, of embeddings (B, d).

    That is not the paper's congruence (:class:`kdfast.CCKD`): it depends on the order of the batch, and is 0 already
    where every second sample is matched. One sample has no successor: 0 (original: NaN). 0-d. Plain PyTorch.
    """

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        check.embeddings("f_s", f_s)
        check.same_shape("f_t", f_t, f_s, of="f_s")
        dtype = accumulator(f_s, f_t)
        gap = (f_s.to(dtype) - f_t.to(dtype)).abs()
        products = gap[:-1] * gap[1:]
        return fixed_sum(fixed_sum(products.flatten(1))) / max(products.numel() // gap.shape[1], 1)


class VIDLoss(kdfast.VID):
    """``VIDLoss(num_input_channels, num_mid_channel, num_target_channels)(input, target)``: :class:`kdfast.VID`; 0-d.

    Parameters, their start and their names in a state_dict are the original's, whose softplus overflows at 89.
    """

    def __init__(
        self,
        num_input_channels: int,
        num_mid_channel: int,
        num_target_channels: int,
        init_pred_var: float = 5.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(num_input_channels, num_mid_channel, num_target_channels, init_pred_var, eps)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target)


class RKDLoss(kdfast.RKD):
    """``RKDLoss(w_d, w_a)(f_s, f_t)``: :class:`kdfast.RKD` of embeddings (B, ...); 0-d. One sample gives 0, not NaN.

    The ``pdist`` of a subclass makes the distances, in plain PyTorch; the angles stay.
    """

    w_d = alias("distance_weight")
    w_a = alias("angle_weight")

    def __init__(self, w_d: float = 25, w_a: float = 50) -> None:
        super().__init__(w_d, w_a)

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        if not replaced(self, RKDLoss, "pdist"):
            return super().forward(f_s, f_t)
        check.embeddings("f_s", f_s)
        check.same_batch("f_t", f_t, f_s, of="f_s")
        distances = (self.pdist(x.flatten(1), squared=False) for x in (f_s, f_t.detach()))
        return self.w_d * distance_error(*distances) + ops.rkd(f_s, f_t, 0.0, self.w_a)

    @staticmethod
    def pdist(e: Tensor, squared: bool = False, eps: float = 1e-12) -> Tensor:
        """Distances among the rows of e [B, B], whose squares are at least eps, and 0 on the diagonal."""
        return pdist(e, squared, eps)


class PKT(kdfast.PKT):
    """``PKT()(f_s, f_t)``: :class:`kdfast.PKT` of embeddings (B, D); 0-d."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        if replaced(self, PKT, "cosine_similarity_loss"):
            return self.cosine_similarity_loss(f_s, f_t)
        return self.cosine_similarity_loss(f_s, f_t, self.eps)

    @staticmethod
    def cosine_similarity_loss(output_net: Tensor, target_net: Tensor, eps: float = 1e-7) -> Tensor:
        """The loss, with another eps."""
        return gram_distance(output_net, target_net, "distribution", eps=eps)


class ABLoss(nn.Module):
    """``ABLoss(feat_num, margin)(g_s, g_t)``: :class:`kdfast.AB` of each layer, times 2^(i - feat_num + 1) 3 / 1000.

    Lists of `feat_num` pre-activations to a list of 0-d losses, each over B. The gradient stops at the teacher. ``w``
    are the layers' powers of 2; layers beyond them are left out.
    """

    def __init__(self, feat_num: int | str, margin: float = 1.0) -> None:
        super().__init__()
        check.count("feat_num", feat_num)
        check.number("margin", margin)
        self.w: list[float] = [2 ** (i - feat_num + 1) for i in range(feat_num)]
        self.margin = margin

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        losses = of_each(self.criterion_alternative_l2, g_s, g_t)
        losses, weights = shortened(losses, self.w)
        return [w * loss / max(len(g_s[0]), 1) / 1000 * 3 for w, loss in zip(weights, losses, strict=True)]

    def criterion_alternative_l2(self, source: Tensor, target: Tensor) -> Tensor:
        """The sum over one layer."""
        return ops.activation_boundary(source, target, self.margin)

    def extra_repr(self) -> str:
        return f"w={self.w}, margin={self.margin}"


class FactorTransfer(nn.Module):
    """``FactorTransfer(p1, p2)(f_s, f_t)``: ``mean |q_s - q_t|^p2`` of attention maps; 0-d.

    ``q = m / |m|`` with ``m = mean_c f^p1`` of a sample, so not the paper's factors, which :class:`kdfast.FT` compares.
    p1 is any number above 0, as in :class:`Attention`. The power p2 is of the difference itself, its sign included, but
    for p2 = 1: a whole number (original, of another: NaN). Maps (B, C, H, W); the map of the larger height is
    average-pooled to a square of the smaller one.
    """

    def __init__(self, p1: float = 2, p2: float = 1) -> None:
        super().__init__()
        power("p1", p1)
        self._whole(p2)
        self.p1 = p1
        self.p2 = p2

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return self.factor_loss(f_s, f_t)

    def factor_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss."""
        p2 = self._whole(self.p2)
        own = replaced(self, FactorTransfer, "factor")
        if p2 == 2 and not own:
            return attention_error(f_s, f_t, self.p1)
        s, t = wide(*maps_of_one_size(f_s, f_t))
        if p2 == 1 and not own:
            return normalized_error(*(elementwise.power(x, power("p1", self.p1)).mean(1) for x in (s, t)))
        gap = self.factor(s) - self.factor(t)
        return mean(gap.abs() if p2 == 1 else elementwise.power(gap, p2))

    def factor(self, f: Tensor) -> Tensor:
        """The attention map of a unit length [B, N]."""
        return attention_map(f, self.p1)

    @staticmethod
    def _whole(p2):
        if not isinstance(power("p2", p2), int):
            raise ValueError(f"p2 must be a whole number, for differences have signs, got {p2}")
        return int(p2)

    def extra_repr(self) -> str:
        return f"p1={self.p1}, p2={self.p2}"


class KDSVD(nn.Module):
    """``KDSVD(k)(g_s, g_t)``: relations between the first k singular vectors of consecutive layers' maps.

    Lists of maps (B, C, H, W), the same C in both networks at each layer, to a list of 0-d losses, one less than
    layers. Of each map its positions are the samples and its channels the features. The signs of singular vectors are
    undetermined, and the original's loss changes with them, from float64 to float32 already; here the entry of largest
    magnitude of each of the teacher's vectors is positive. Each map is its own, where the original mixes samples if
    H != W. Student's vectors of equal singular values have no gradient between them (original: NaN); none goes to
    the teacher (original: one through its singular values, for k > 1). With a method of a subclass's own it is the
    original's formula of these methods. Plain PyTorch.
    """

    def __init__(self, k: int = 1) -> None:
        super().__init__()
        check.count("k", k)
        self.k = k

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        pairs = layers(g_s, g_t, check.maps)
        if replaced(self, KDSVD, "svd", "removenan", "align_rsv"):
            return _kdsvd.relation_errors([self._vectors(s, t.detach()) for s, t in pairs])
        return _kdsvd.kdsvd(*([x.flatten(2).mT for x in maps] for maps in zip(*pairs, strict=True)), self.k)

    def _vectors(self, s, t):
        _, shares, v_t = self.svd(t, self.k)
        v_s, v_t = self.align_rsv(self.svd(s, self.k + 3)[2], v_t)
        return v_s * shares[:, None], v_t * shares[:, None]

    def svd(self, feat: Tensor, n: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """u [B, N, n], s [B, n], v [B, C, n] of maps (B, C, H, W), each of unit length; of n = 0 all, as they are."""
        u, s, vh = torch.linalg.svd(feat.flatten(2).mT, full_matrices=False)
        u, s, v = (self.removenan(x) for x in (u, s, vh.mT))
        return tuple(F.normalize(x[..., :n], dim=1) for x in (u, s, v)) if n > 0 else (u, s, v)

    @staticmethod
    def removenan(x: Tensor) -> Tensor:
        """x with 0 for what is not finite."""
        return torch.where(x.isfinite(), x, 0.0)

    @staticmethod
    def align_rsv(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """For each vector of b that of a which is nearest to it, of its sign; and b."""
        return _kdsvd.aligned(a, b), b

    def extra_repr(self) -> str:
        return f"k={self.k}"


class FSP(kdfast.FSP):
    """``FSP(s_shapes, t_shapes)(g_s, g_t)``: :class:`kdfast.FSP` of each layer and the next; a list of 0-d losses.

    The shapes of the layers, as ``[f.shape for f in feats]``, are only checked: as many channels in both networks.
    """

    def __init__(self, s_shapes: Sequence[Any], t_shapes: Sequence[Any]) -> None:
        super().__init__()
        channels = [[shape[1] for shape in shapes] for shapes in (s_shapes, t_shapes)]
        if channels[0] != channels[1]:
            raise ValueError(f"t_shapes must have the channels of s_shapes, {channels[0]}, got {channels[1]}")

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        loss, pairs = super().forward, layers(g_s, g_t, check.maps)
        if replaced(self, FSP, "compute_fsp", "compute_loss"):
            flows = (self.compute_fsp(list(maps)) for maps in zip(*pairs, strict=True))
            return [self.compute_loss(s, t) for s, t in zip(*flows, strict=True)]
        return [loss(*map(list, zip(*two, strict=True))) for two in zip(pairs, pairs[1:], strict=False)]

    @staticmethod
    def compute_fsp(g: Sequence[Tensor]) -> list[Tensor]:
        """The flow from each layer to the next, [B, C_next, C]."""
        return [kdfast.FSP.flow(bottom, top) for bottom, top in zip(g, g[1:], strict=False)]

    @staticmethod
    def compute_loss(s: Tensor, t: Tensor) -> Tensor:
        """The mean squared difference of two flows."""
        return mean((s - t).square())


class NSTLoss(kdfast.NST):
    """``NSTLoss()(g_s, g_t)``: :class:`kdfast.NST` of each layer; lists of maps to a list of 0-d losses.

    With a ``poly_kernel`` of a subclass's own it is the original's formula of it, in plain PyTorch.
    """

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        return of_each(self.nst_loss, g_s, g_t)

    def nst_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """Of one layer."""
        if not replaced(self, NSTLoss, "poly_kernel"):
            return super().forward(f_s, f_t)
        s, t = (F.normalize(x.flatten(2), dim=2) for x in wide(*maps_of_one_size(f_s, f_t)))
        return mean(self.poly_kernel(t, t)).detach() + mean(self.poly_kernel(s, s)) - 2 * mean(self.poly_kernel(s, t))

    def poly_kernel(self, a: Tensor, b: Tensor) -> Tensor:
        """Squared products of channels (B, C, N) and (B, C', N): [B, C', C]."""
        return poly_kernel(a, b)


class CRDLoss(kdfast.CRD):
    """``CRDLoss(opt)(f_s, f_t, idx, contrast_idx=None)``: :class:`kdfast.CRD`, its loss of shape (1,).

    `opt` has s_dim, t_dim, feat_dim, n_data, nce_k, nce_t and nce_m. `bank_dtype`: of the banks, by default torch's
    default type, as there. Train ``embed_s`` and ``embed_t``, linear layers, with the student, as there.

    Made on the CPU, embeddings and banks are the original's of the same seed, and so is what is drawn after them.
    Without contrast_idx the negatives are drawn on the device from a seed of the module's, which spares the data loader
    them: other ones than the original's, which come from torch's generator. The original's ``contrast``,
    ``criterion_s`` and ``criterion_t`` are no modules here: ``bank_student``, ``bank_teacher``, ``temperature``,
    ``momentum`` and ``negatives`` act. The original rounds nce_t to float32, and a checkpoint of it is read with
    ``kdfast.load_repdistiller_crd``.
    """

    def __init__(self, opt: Any, bank_dtype: str | torch.dtype | None = None) -> None:
        sizes = opt.s_dim, opt.t_dim, opt.n_data, opt.feat_dim, opt.nce_k, opt.nce_t, opt.nce_m
        make_crd(self, *sizes, embeddings=True, bank_dtype=bank_dtype)

    embed_s = alias("embed_student")
    embed_t = alias("embed_teacher")

    def __setattr__(self, name: str, value: Any) -> None:
        name = {"embed_s": "embed_student", "embed_t": "embed_teacher"}.get(name, name)
        if name in ("contrast", "criterion_s", "criterion_t"):
            raise AttributeError(
                f"{name} is no module here, so that setting it would change nothing: set bank_student, bank_teacher, "
                "temperature, momentum or negatives of the loss"
            )
        if name in ("embed_student", "embed_teacher") and not hasattr(value, "weight"):
            raise TypeError(f"{name} must be a linear layer, got {type(value).__name__}")
        super().__setattr__(name, value)

    def forward(self, f_s: Tensor, f_t: Tensor, idx: Tensor, contrast_idx: Tensor | None = None) -> Tensor:
        return super().forward(f_s, f_t, idx, contrast_idx).view(1)
