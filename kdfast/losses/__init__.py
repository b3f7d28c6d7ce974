"""The losses, one nn.Module per paper."""

from kdfast.losses.composite import DIST
from kdfast.losses.feature import (
    AB,
    FT,
    HCL,
    OFD,
    VID,
    FitNets,
    HintRegressor,
    JacobianMatching,
    OFDConnector,
    Paraphraser,
    Translator,
    ofd_margin,
)
from kdfast.losses.pairwise import IRG, RKD, HardDarkRank, IRGEdge, IRGTransformation, RKDAngle, RKDDistance
from kdfast.losses.softmax_kl import DKD, JSD, KD, LabelRefinery, ReverseKD, TfKDReg, TfKDSelf

# Layers that are trained beside a loss.
LAYERS = (HintRegressor, OFDConnector, Paraphraser, Translator)
__all__ = [
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
    "AB",
    "FT",
    "HCL",
    "OFD",
    "VID",
    "FitNets",
    "JacobianMatching",
    "ofd_margin",
    "HintRegressor",
    "OFDConnector",
    "Paraphraser",
    "Translator",
]
