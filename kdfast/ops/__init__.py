"""The fused primitives as functions. Every loss of kdfast is a few lines over one of these.

A family's functions are those of its module's `__all__`.
"""

# ruff: noqa: F403
import kdfast.ops.attention as _attention
import kdfast.ops.channel_kl as _channel_kl
import kdfast.ops.divergence as _divergence
import kdfast.ops.feature as _feature
import kdfast.ops.gram as _gram
import kdfast.ops.linear as _linear
import kdfast.ops.mixed_logits as _mixed_logits
import kdfast.ops.moments as _moments
import kdfast.ops.nce as _nce
import kdfast.ops.pairwise as _pairwise
import kdfast.ops.softmax_kl as _softmax_kl
import kdfast.ops.teachers as _teachers
from kdfast.ops.attention import *
from kdfast.ops.channel_kl import *
from kdfast.ops.divergence import *
from kdfast.ops.feature import *
from kdfast.ops.gram import *
from kdfast.ops.linear import *
from kdfast.ops.mixed_logits import *
from kdfast.ops.moments import *
from kdfast.ops.nce import *
from kdfast.ops.pairwise import *
from kdfast.ops.softmax_kl import *
from kdfast.ops.teachers import *

__all__: list[str] = []
__all__ += _attention.__all__
__all__ += _channel_kl.__all__
__all__ += _divergence.__all__
__all__ += _feature.__all__
__all__ += _gram.__all__
__all__ += _linear.__all__
__all__ += _mixed_logits.__all__
__all__ += _moments.__all__
__all__ += _nce.__all__
__all__ += _pairwise.__all__
__all__ += _softmax_kl.__all__
__all__ += _teachers.__all__
