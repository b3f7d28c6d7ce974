"""Not run, but checked by pyright (.ci/check_types.py): what a user's editor knows of kdfast.

A mistake that it should find has a comment to ignore it; without the mistake the comment is an error.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

import torch
from torch import Tensor
from typing_extensions import assert_type

import kdfast
from kdfast import ops

logits = torch.zeros(2, 3)
labels = torch.zeros(2, dtype=torch.long)

assert_type(kdfast.KD(temperature=4.0, alpha=0.9)(logits, logits, labels), Tensor)
assert_type(kdfast.RKD()(logits, logits), Tensor)
assert_type(kdfast.AT()([logits], [logits]), Tensor)
assert_type(kdfast.AEKD()(logits, [logits, logits]), Tensor)
assert_type(ops.softmax_kl(logits, kdfast.TopK.of(logits, 2), 4.0, reduction="none"), Tensor)
assert_type(ops.rkd_angle(logits, logits), Tensor)
assert_type(kdfast.capture(torch.nn.ReLU(), ["0"])["0"], Tensor)

kdfast.KD(temperature="warm")  # pyright: ignore[reportArgumentType]
kdfast.DKD(gamma=1.0)  # pyright: ignore[reportCallIssue]
ops.softmax_kl(logits, logits, weight=0.5)  # pyright: ignore[reportArgumentType]
ops.rkd(logits, 3)  # pyright: ignore[reportArgumentType]
