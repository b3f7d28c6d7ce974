"""The losses, one nn.Module per paper."""

from kdfast.losses.attention import AT
from kdfast.losses.composite import DIST
from kdfast.losses.gram import CCKD, FAKD, FSP, LKD, NST, PKT, SP
from kdfast.losses.nce import CRD
from kdfast.losses.pairwise import IRG, RKD, HardDarkRank, IRGEdge, IRGTransformation, RKDAngle, RKDDistance
from kdfast.losses.softmax_kl import DKD, JSD, KD, LabelRefinery, ReverseKD, TfKDReg, TfKDSelf

__all__ = [
    "AT",
    "CCKD",
    "CRD",
    "DIST",
    "DKD",
    "FAKD",
    "FSP",
    "HardDarkRank",
    "IRG",
    "IRGEdge",
    "IRGTransformation",
    "JSD",
    "KD",
    "LKD",
    "LabelRefinery",
    "NST",
    "PKT",
    "RKD",
    "RKDAngle",
    "RKDDistance",
    "ReverseKD",
    "SP",
    "TfKDReg",
    "TfKDSelf",
]
