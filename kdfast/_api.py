"""The names of `kdfast`."""

from kdfast import _kernels

_kernels.load()

# The ops are defined after the kernels' libraries are known.
from kdfast import analysis, distributed, losses, ops, procedures  # noqa: E402
from kdfast._kernels import FallbackWarning, fallback  # noqa: E402
from kdfast.analysis import NoiseSigma, data_inefficiency, effective_logit, quantify_knowledge  # noqa: E402
from kdfast.capture import capture  # noqa: E402
from kdfast.losses import *  # noqa: E402, F403
from kdfast.losses.nce import load_repdistiller_crd  # noqa: E402
from kdfast.ops.softmax_kl import TopK  # noqa: E402

__all__ = ["FallbackWarning", "NoiseSigma", "TopK", "analysis", "capture", "data_inefficiency", "distributed"]
__all__ += ["effective_logit", "fallback", "load_repdistiller_crd", "ops", "procedures", "quantify_knowledge"]
__all__ += losses.__all__
