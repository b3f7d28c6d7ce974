"""RepDistiller's losses: ``from kdfast.compat.repdistiller import DistillKL`` in place of its distiller_zoo and crd.

Criteria on lists of layers return one loss for each, as there: sum them. The layers of its models.util (ConvReg,
Paraphraser, Translator, LinearEmbed) stay what they are.
"""

from torch import nn
from torch.nn import functional as F

import kdfast
from kdfast.compat._kdsvd import kdsvd
from kdfast.ops import attention_transfer, check, gram_distance, normalized_error
from kdfast.ops.accumulate import accumulator, fixed_sum
from kdfast.ops.pool import to_smaller_square

__all__ = [
    "ABLoss",
    "Attention",
    "CRDLoss",
    "Correlation",
    "DistillKL",
    "FSP",
    "FactorTransfer",
    "HintLoss",
    "KDSVD",
    "NSTLoss",
    "PKT",
    "RKDLoss",
    "Similarity",
    "VIDLoss",
]


def _of_each(loss, g_s, g_t):
    """[loss(s, t) for each layer]."""
    return [loss(s, t) for s, t in check.layers(g_s, g_t, check.embeddings)]


class DistillKL(kdfast.KD):
    """``DistillKL(T)(y_s, y_t)``: :class:`kdfast.KD` without labels. Logits (B, C); 0-d.

    Where the teacher's probability underflows, the original's gradient to the teacher is NaN and this one's is not.
    """

    def __init__(self, T):
        super().__init__(temperature=T)

    def forward(self, y_s, y_t):
        return super().forward(y_s, y_t)


class HintLoss(kdfast.FitNets):
    """``HintLoss()(f_s, f_t)``: :class:`kdfast.FitNets`, the mean squared error of two maps of one shape; 0-d."""

    def forward(self, f_s, f_t):
        return super().forward(f_s, f_t)


class Attention(kdfast.AT):
    """``Attention(p)(g_s, g_t)``: :class:`kdfast.AT` of each layer; lists of maps to a list of 0-d losses."""

    def forward(self, g_s, g_t):
        return _of_each(super().forward, g_s, g_t)


class Similarity(kdfast.SP):
    """``Similarity()(g_s, g_t)``: :class:`kdfast.SP` of each layer; lists of maps to a list of losses of shape (1,).

    Takes channels_last maps, too, at which the original raises.
    """

    def forward(self, g_s, g_t):
        return [loss.view(1) for loss in _of_each(super().forward, g_s, g_t)]


class Correlation(nn.Module):
    """``Correlation()(f_s, f_t)``: the mean over i of ``D_i . D_(i+1)``, ``D = |f_s - f_t|``, of embeddings (B, d).

    That is not the paper's congruence (:class:`kdfast.CCKD`): it depends on the order of the batch, and is 0 already
    where every second sample is matched. One sample has no successor: 0 (original: NaN). 0-d. Plain PyTorch.
    """

    def forward(self, f_s, f_t):
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

    def __init__(self, num_input_channels, num_mid_channel, num_target_channels, init_pred_var=5.0, eps=1e-5):
        super().__init__(num_input_channels, num_mid_channel, num_target_channels, init_pred_var, eps)

    def forward(self, input, target):
        return super().forward(input, target)


class RKDLoss(kdfast.RKD):
    """``RKDLoss(w_d, w_a)(f_s, f_t)``: :class:`kdfast.RKD` of embeddings (B, ...); 0-d. One sample gives 0, not NaN."""

    def __init__(self, w_d=25, w_a=50):
        super().__init__(w_d, w_a)

    def forward(self, f_s, f_t):
        return super().forward(f_s, f_t)


class PKT(kdfast.PKT):
    """``PKT()(f_s, f_t)``: :class:`kdfast.PKT` of embeddings (B, D); 0-d."""

    def __init__(self):
        super().__init__()

    def forward(self, f_s, f_t):
        return self.cosine_similarity_loss(f_s, f_t, self.eps)

    @staticmethod
    def cosine_similarity_loss(output_net, target_net, eps=1e-7):
        return gram_distance(output_net, target_net, "distribution", eps=eps)


class ABLoss(nn.Module):
    """``ABLoss(feat_num, margin)(g_s, g_t)``: :class:`kdfast.AB` of each layer, times 2^(i - feat_num + 1) 3 / 1000.

    Lists of `feat_num` pre-activations to a list of 0-d losses, each over B. The gradient stops at the teacher.
    """

    def __init__(self, feat_num, margin=1.0):
        super().__init__()
        check.count("feat_num", feat_num)
        self.w = [2 ** (i - feat_num + 1) for i in range(feat_num)]
        self.loss = kdfast.AB(margin, reduction="mean")

    def forward(self, g_s, g_t):
        losses = _of_each(self.loss, g_s, g_t)
        if len(losses) != len(self.w):
            raise ValueError(f"g_s and g_t must have feat_num={len(self.w)} layers, got {len(losses)}")
        return [weight * 3 / 1000 * loss for weight, loss in zip(self.w, losses, strict=True)]


class FactorTransfer(nn.Module):
    """``FactorTransfer(p1, p2)(f_s, f_t)``: ``mean |q_s - q_t|^p2`` of attention maps; 0-d.

    ``q = m / |m|`` with ``m = mean_c f^p1`` of a sample, so not the paper's factors, which :class:`kdfast.FT` compares.
    The power p2 is of the difference itself, its sign included, but for p2 = 1. Maps (B, C, H, W); the map of the
    larger height is average-pooled to a square of the smaller one.
    """

    def __init__(self, p1=2, p2=1):
        super().__init__()
        check.count("p1", p1)
        check.count("p2", p2)
        self.p1 = p1
        self.p2 = p2

    def forward(self, f_s, f_t):
        ((s, t),) = check.layers([f_s], [f_t], check.maps)
        s, t = to_smaller_square(s, t)
        if self.p2 == 2:
            return attention_transfer(s, t, self.p1)
        dtype = accumulator(s, t)
        s, t = (x.to(dtype).pow(self.p1).mean(1) for x in (s, t))
        if self.p2 == 1:
            return normalized_error(s, t)
        gap = (F.normalize(s.flatten(1)) - F.normalize(t.flatten(1))).pow(self.p2)
        return fixed_sum(fixed_sum(gap)) / max(gap.numel(), 1)

    def extra_repr(self):
        return f"p1={self.p1}, p2={self.p2}"


class KDSVD(nn.Module):
    """``KDSVD(k)(g_s, g_t)``: relations between the first k singular vectors of consecutive layers' maps.

    Lists of maps (B, C, H, W), the same C in both networks at each layer, to a list of 0-d losses, one less than
    layers. Of each map its positions are the samples and its channels the features. The signs of singular vectors are
    undetermined, and the original's loss changes with them, from float64 to float32 already; here the entry of largest
    magnitude of each of the teacher's vectors is positive. Each map is its own, where the original mixes samples if
    H != W. Student's vectors of equal singular values have no gradient between them (original: NaN); none goes to
    the teacher (original: one through its singular values, for k > 1). Plain PyTorch.
    """

    def __init__(self, k=1):
        super().__init__()
        check.count("k", k)
        self.k = k

    def forward(self, g_s, g_t):
        pairs = check.layers(g_s, g_t, check.maps)
        return kdsvd(*([x.flatten(2).mT for x in maps] for maps in zip(*pairs, strict=True)), self.k)

    def extra_repr(self):
        return f"k={self.k}"


class FSP(kdfast.FSP):
    """``FSP(s_shapes, t_shapes)(g_s, g_t)``: :class:`kdfast.FSP` of each layer and the next; a list of 0-d losses.

    The shapes of the layers, as ``[f.shape for f in feats]``, are only checked: as many channels in both networks.
    """

    def __init__(self, s_shapes, t_shapes):
        super().__init__()
        channels = [[shape[1] for shape in shapes] for shapes in (s_shapes, t_shapes)]
        if channels[0] != channels[1]:
            raise ValueError(f"t_shapes must have the channels of s_shapes, {channels[0]}, got {channels[1]}")

    def forward(self, g_s, g_t):
        loss, pairs = super().forward, check.layers(g_s, g_t, check.maps)
        return [loss(*map(list, zip(*layers, strict=True))) for layers in zip(pairs, pairs[1:], strict=False)]


class NSTLoss(kdfast.NST):
    """``NSTLoss()(g_s, g_t)``: :class:`kdfast.NST` of each layer; lists of maps to a list of 0-d losses."""

    def forward(self, g_s, g_t):
        return _of_each(super().forward, g_s, g_t)


class CRDLoss(kdfast.CRD):
    """``CRDLoss(opt)(f_s, f_t, idx, contrast_idx=None)``: :class:`kdfast.CRD`, its loss of shape (1,).

    `opt` has s_dim, t_dim, feat_dim, n_data, nce_k, nce_t and nce_m. Train ``embed_s`` and ``embed_t`` with the
    student, as there. Without contrast_idx the negatives are drawn on the device, which spares the data loader them.
    The original rounds nce_t to float32, and a checkpoint of it is read with ``kdfast.load_repdistiller_crd``.
    """

    def __init__(self, opt):
        super().__init__(opt.s_dim, opt.t_dim, opt.n_data, opt.feat_dim, opt.nce_k, opt.nce_t, opt.nce_m)

    @property
    def embed_s(self):
        return self.embed_student

    @property
    def embed_t(self):
        return self.embed_teacher

    def forward(self, f_s, f_t, idx, contrast_idx=None):
        return super().forward(f_s, f_t, idx, contrast_idx).view(1)
