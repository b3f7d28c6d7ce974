"""Whether the sanitizers of `make sanitize` see what the kernels do: each fault planted here has to end the process."""

import os
import subprocess
import sys

import pytest

FOLDER = os.environ.get("KDFAST_TEST_SANITIZED")
pytestmark = pytest.mark.skipif(not FOLDER, reason="the kernels are not built with sanitizers: make sanitize")

# The raw op trusts its caller with shapes and alignment; the public function would refuse these.
FAULTS = {
    "heap-buffer-overflow": "student, teacher = torch.randn(4, 40), torch.randn(4, 39)",
    "misaligned address": "student = torch.frombuffer(bytearray(644), dtype=torch.float32, count=160, offset=1)\n"
    "student = student.view(4, 40)\nteacher = torch.randn(4, 40)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_reported(fault):
    call = "torch.ops.kdfast.softmax_kl(student, teacher, None, None, 1., 0., 1, True)"
    code = f"import torch, kdfast\n{FAULTS[fault]}\n{call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode != 0 and fault in done.stderr, f"exit status {done.returncode}\n{done.stderr}"
    assert "csrc/" in done.stderr, done.stderr  # in the kernel, not in torch


def test_the_sanitized_kernels_are_the_ones_tested():
    from kdfast import _kernels

    assert _kernels.status()["_cpu"].path.startswith(FOLDER)
