"""kdfast: knowledge-distillation losses for PyTorch, on fused CPU and CUDA kernels.

Papers are modules (``kdfast.KD()(student, teacher)``), kernels are functions (``kdfast.ops.softmax_kl``).
Student first, teacher second, logits unless an argument's name says otherwise; every loss is a 0-d tensor.
"""

from kdfast import _kernels

_kernels.load()

# The ops are defined after the kernels' libraries are known.
from kdfast import distributed, losses, ops, procedures  # noqa: E402
from kdfast._kernels import FallbackWarning, fallback  # noqa: E402
from kdfast.capture import capture  # noqa: E402
from kdfast.losses import *  # noqa: E402, F403
from kdfast.losses.nce import load_repdistiller_crd  # noqa: E402
from kdfast.ops.softmax_kl import TopK  # noqa: E402
from kdfast.procedures import NoiseSigma, data_inefficiency, effective_logit, quantify_knowledge  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "FallbackWarning",
    "NoiseSigma",
    "TopK",
    "capture",
    "data_inefficiency",
    "distributed",
    "effective_logit",
    "fallback",
    "load_repdistiller_crd",
    "ops",
    "procedures",
    "quantify_knowledge",
    *losses.__all__,
]
