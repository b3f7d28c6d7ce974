"""The fused primitives as functions. Every loss of kdfast is a few lines over one of these."""

from kdfast.ops.attention import attention_transfer
from kdfast.ops.feature import (
    activation_boundary,
    channel_squared_error,
    normalized_error,
    partial_squared_error,
    pyramid_error,
    squared_error,
)
from kdfast.ops.gram import affinity, gram_distance, inner_products, selectivity
from kdfast.ops.mixed_logits import mixed_logits_kl
from kdfast.ops.moments import channel_moments
from kdfast.ops.nce import alias_table, draw_negatives, nce, update_bank
from kdfast.ops.pairwise import pairwise_distance, rkd, rkd_angle, rkd_distance
from kdfast.ops.softmax_kl import TopK, cross_entropy, cross_entropy_kl, dkd, softmax_kl
from kdfast.ops.teachers import aekd, teachers_kl

__all__ = [
    "TopK",
    "activation_boundary",
    "aekd",
    "affinity",
    "alias_table",
    "attention_transfer",
    "channel_moments",
    "channel_squared_error",
    "cross_entropy",
    "cross_entropy_kl",
    "dkd",
    "draw_negatives",
    "gram_distance",
    "inner_products",
    "mixed_logits_kl",
    "nce",
    "normalized_error",
    "pairwise_distance",
    "partial_squared_error",
    "pyramid_error",
    "rkd",
    "rkd_angle",
    "rkd_distance",
    "selectivity",
    "softmax_kl",
    "squared_error",
    "teachers_kl",
    "update_bank",
]
