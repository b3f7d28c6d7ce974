"""The losses, one nn.Module per paper."""

from kdfast.losses.attention import AT
from kdfast.losses.born_again import CWTM, DKPP
from kdfast.losses.composite import DIST
from kdfast.losses.detection import FGD, MGD
from kdfast.losses.dirichlet import EnDD, TemperatureAnnealing, ensemble_uncertainty
from kdfast.losses.divergence import AKL, CTKD, LSKD, NKD, TAID, TTM, TVD, WTTM, AlphaBeta, SkewKL
from kdfast.losses.diversity import DiversityCooperation
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
from kdfast.losses.gram import CCKD, FAKD, FSP, LKD, NST, PKT, SP, GramAnchoring
from kdfast.losses.inversion import adaptive_inversion, bn_statistics_loss, self_similarity, total_variation
from kdfast.losses.linear import LinearKD
from kdfast.losses.maps import CWD, PKD
from kdfast.losses.mixed_logits import (
    FFL,
    KDCL,
    ONE,
    CollaborativeLearning,
    FusionModule,
    OKDDip,
    OKDDipAttention,
    ONEGate,
    rescale_gradient,
)
from kdfast.losses.nce import CRD
from kdfast.losses.pairwise import IRG, RKD, HardDarkRank, IRGEdge, IRGTransformation, RKDAngle, RKDDistance
from kdfast.losses.residual import JointLoss, residual_margin_loss
from kdfast.losses.review import ReviewKD, SimKD
from kdfast.losses.similarity import PatchKL, QueueKL
from kdfast.losses.softmax_kl import DKD, JSD, KD, LabelRefinery, ReverseKD, TfKDReg, TfKDSelf
from kdfast.losses.teachers import AEKD, DML, Codistillation, EnD

# Layers that are trained beside a loss.
LAYERS = (FusionModule, HintRegressor, OFDConnector, OKDDipAttention, ONEGate, Paraphraser, Translator)
# In the order of the imports.
__all__ = ["AT", "CWTM", "DKPP", "DIST"]
__all__ += ["AKL", "CTKD", "LSKD", "NKD", "TAID", "TTM", "TVD", "WTTM", "AlphaBeta", "SkewKL"]
__all__ += ["EnDD", "TemperatureAnnealing", "ensemble_uncertainty", "DiversityCooperation"]
__all__ += ["AB", "FT", "HCL", "OFD", "VID", "FitNets", "HintRegressor", "JacobianMatching", "OFDConnector"]
__all__ += ["Paraphraser", "Translator", "ofd_margin", "CCKD", "FAKD", "FSP", "LKD", "NST", "PKT", "SP"]
__all__ += ["adaptive_inversion", "bn_statistics_loss", "self_similarity", "total_variation"]
__all__ += ["FFL", "KDCL", "ONE", "CollaborativeLearning", "FusionModule", "OKDDip", "OKDDipAttention", "ONEGate"]
__all__ += ["rescale_gradient", "CRD"]
__all__ += ["LinearKD", "CWD", "PKD", "PatchKL", "QueueKL", "GramAnchoring"]
__all__ += ["FGD", "MGD", "ReviewKD", "SimKD"]
__all__ += ["IRG", "RKD", "HardDarkRank", "IRGEdge", "IRGTransformation", "RKDAngle", "RKDDistance"]
__all__ += ["JointLoss", "residual_margin_loss"]
__all__ += ["DKD", "JSD", "KD", "LabelRefinery", "ReverseKD", "TfKDReg", "TfKDSelf"]
__all__ += ["AEKD", "DML", "Codistillation", "EnD"]
