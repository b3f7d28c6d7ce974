"""The fused primitives as functions. Every loss of kdfast is a few lines over one of these."""

from kdfast.ops.feature import (
    activation_boundary,
    channel_squared_error,
    normalized_error,
    partial_squared_error,
    pyramid_error,
    squared_error,
)
from kdfast.ops.pairwise import pairwise_distance, rkd, rkd_angle, rkd_distance
from kdfast.ops.softmax_kl import cross_entropy, cross_entropy_kl, dkd, softmax_kl

__all__ = [
    "activation_boundary",
    "channel_squared_error",
    "cross_entropy",
    "cross_entropy_kl",
    "dkd",
    "normalized_error",
    "pairwise_distance",
    "partial_squared_error",
    "pyramid_error",
    "rkd",
    "rkd_angle",
    "rkd_distance",
    "softmax_kl",
    "squared_error",
]
