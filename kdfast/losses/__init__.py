"""The losses, one nn.Module per paper."""

from kdfast.losses.composite import DIST
from kdfast.losses.softmax_kl import DKD, JSD, KD, LabelRefinery, ReverseKD, TfKDReg, TfKDSelf

__all__ = ["DIST", "DKD", "JSD", "KD", "LabelRefinery", "ReverseKD", "TfKDReg", "TfKDSelf"]
