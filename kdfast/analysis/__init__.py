"""What a network knows and what a soft label saves, as numbers: measurements, not losses."""

from kdfast.analysis.knowledge import NoiseSigma, pixel_entropy, quantify_knowledge
from kdfast.analysis.wide import data_inefficiency, effective_logit

__all__ = ["NoiseSigma", "data_inefficiency", "effective_logit", "pixel_entropy", "quantify_knowledge"]
