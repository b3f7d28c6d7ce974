"""The numbers of the original implementations, tests/golden/*.npz: inputs, settings, losses and gradients."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def files(*names):
    """The files NAME__*.npz in any folder."""
    return sorted(path for name in names for path in GOLDEN.rglob(f"{name}__*.npz"))


def every_file(*names):
    """A test for each of these files, of which there are some."""
    found = files(*names)
    assert found
    return pytest.mark.parametrize("path", found, ids=lambda path: path.stem)


class Official:
    """One file: `self("s")` is the input of this name in the tested type, `self("s*")` the list of s0, s1 and so on.

    Inputs whose gradient the file has collect one, and are the `leaves`. `self["loss"]` is a result, in float64.
    """

    def __init__(self, path, dtype=torch.float64, device="cpu"):
        with np.load(path) as stored:
            self.arrays = dict(stored)
        self.name = path.name.split("__")[0]
        self.parameters = json.loads(str(self.arrays.pop("about")))["params"]
        self.dtype, self.device = dtype, device
        self.inputs, self.leaves = {}, {}

    def __call__(self, name):
        if name.endswith("*"):
            keys = sorted(key[3:] for key in self.arrays if re.fullmatch(f"in_{name[:-1]}[0-9]", key))
            return [self(key) for key in keys]
        if name not in self.inputs:
            x = torch.from_numpy(self.arrays[f"in_{name}"]).to(self.device)
            self.inputs[name] = x.to(self.dtype) if x.is_floating_point() else x
            if f"grad_{name}" in self.arrays:
                self.leaves[name] = self.inputs[name].requires_grad_()
        return self.inputs[name]

    def __getitem__(self, name):
        x = torch.from_numpy(self.arrays[name])
        return x.double() if x.is_floating_point() else x

    def results(self, prefix):
        """Names without `prefix` -> results whose names have it."""
        return {name.removeprefix(prefix): self[name] for name in self.arrays if name.startswith(prefix)}

    def gradients(self, value):
        """Of a number, in the leaves by their names."""
        return dict(zip(self.leaves, torch.autograd.grad(value, list(self.leaves.values())), strict=True))

    def of_type(self, float64, float32):
        """What is right for the tested type."""
        return float64 if self.dtype == torch.float64 else float32

    def assert_close(self, what, got, want, digits, floor=0.0):
        """Within `digits` of the largest entry of `want`, which may be a result's name."""
        want = self[want] if isinstance(want, str) else want
        got = got.detach().double().cpu()
        assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        error, allowed = (got - want).abs().max(), digits * want.abs().max() + floor
        assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"
