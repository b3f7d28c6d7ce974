"""Several networks, as the tests of mixed_logits and of teachers make them."""

import pytest
import registry
import torch
from registry.teachers import taught

from kdfast import ops

(MIXED,), (TAUGHT,) = (registry.family(name).GROUPS for name in ("mixed_logits", "teachers"))
SMALL = MIXED.small


def make(implementation, count, rows, classes, dtype=torch.float64):
    """Logits of N networks [B, C], weights of their mixtures [B, N, N], labels."""
    return MIXED.inputs(implementation, (count, rows, classes), dtype)


def given(op, d):
    """The inputs of the op: the first network is a student, the others are its teachers."""
    return d if op.group is MIXED else taught(d)


def gradients(op, value, x):
    """In all leaves; None where the op has none."""
    return torch.autograd.grad(value, registry.tensors(x, op.leaves), allow_unused=True)


def run(op, d):
    """-> value, gradients."""
    x = op.collecting(given(op, d))
    value = op(ops, x)
    return value, gradients(op, value, x)


def for_simt(implementation, condition):
    """Under SIMT a thread is a fiber: what another case covers as well is left to the other implementations."""
    if implementation.name == "simt" and not condition:
        pytest.skip("left to the other implementations")


def taught_by(implementation, count, rows=8, classes=20, dtype=torch.float64, spread=1.0):
    """A student, and teachers that agree with it but for `spread`."""
    student = torch.randn(rows, classes, dtype=torch.float64) * 2
    teachers = [student + spread * torch.randn(rows, classes, dtype=torch.float64) for _ in range(count)]
    return [x.to(implementation.device, dtype) for x in (student, *teachers)]
