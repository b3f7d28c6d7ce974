"""Functions whose bits do not depend on the number of threads."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

import kdfast
from kdfast.ops import elementwise

SIZES = (90300, 90301, 77777)  # parts of two threads that end within a vector
POWERS = (1, 2, 3, 4, 7, 2.5, 0.3)
FUNCTIONS = {
    "sigmoid": (elementwise.sigmoid, torch.sigmoid),
    **{f"power {p}": (partial(elementwise.power, exponent=p), partial(torch.pow, exponent=p)) for p in POWERS},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_bits_for_any_number_of_threads(name, dtype, same_bits):
    ours, usual = FUNCTIONS[name]
    inputs = [(4 * torch.rand(n, dtype=torch.float64) + 1e-3).to(dtype).requires_grad_() for n in SIZES]

    def run():
        values = [ours(x) for x in inputs]
        return [*values, *torch.autograd.grad([v.sum() for v in values], inputs)]

    assert same_bits(run)
    for x in inputs:
        torch.testing.assert_close(ours(x), usual(x))


def test_power_0():
    assert torch.equal(elementwise.power(torch.tensor([0.0, 2.0, torch.inf]), 0), torch.ones(3))


def test_sigmoid_at_its_ends():
    x = torch.tensor([-torch.inf, -1e4, -100.0, 0.0, 100.0, 1e4, torch.inf, torch.nan], dtype=torch.float64)
    torch.testing.assert_close(elementwise.sigmoid(x), x.sigmoid(), rtol=1e-14, atol=0, equal_nan=True)


def test_no_op_and_no_loss_uses_others():
    """torch rounds the last elements of a thread's part of these in another way: see kdfast/ops/elementwise.py."""
    folder = Path(kdfast.__file__).parent
    found = [
        f"{path.relative_to(folder)}:{number}: {line.strip()}"
        for part in ("ops", "losses", "compat")
        for path in sorted((folder / part).glob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if path.name != "elementwise.py" and re.search(r"\.(pow|exp2|sigmoid|softplus|gelu)\(", line)
    ]
    assert not found
