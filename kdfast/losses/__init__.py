"""The losses, one nn.Module per paper."""

from kdfast.losses.attention import AT
from kdfast.losses.composite import DIST
from kdfast.losses.gram import CCKD, FAKD, PKT, SP
from kdfast.losses.pairwise import IRG, RKD, HardDarkRank, IRGEdge, IRGTransformation, RKDAngle, RKDDistance
from kdfast.losses.softmax_kl import DKD, JSD, KD, LabelRefinery, ReverseKD, TfKDReg, TfKDSelf

__all__ = [
    "AT",
    "CCKD",
    "FAKD",
    "PKT",
    "SP",
    "DIST",
    "DKD",
    "HardDarkRank",
    "IRG",
    "IRGEdge",
    "IRGTransformation",
    "JSD",
    "KD",
    "LabelRefinery",
    "RKD",
    "RKDAngle",
    "RKDDistance",
    "ReverseKD",
    "TfKDReg",
    "TfKDSelf",
]
