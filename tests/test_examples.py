"""The scripts in `examples/` run as they are and their students learn."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
if not (ROOT / "examples").exists():
    pytest.skip("needs the source tree", allow_module_level=True)


def run(example, *launcher):
    """What the script prints, one accuracy in percent for each process."""
    needed = re.findall(r"^(?:import|from) (\w+)", example.read_text(), flags=re.MULTILINE)
    for package in needed:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, *launcher, str(example)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return [float(accuracy) for accuracy in re.findall(r"student: ([\d.]+)%", result.stdout)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example):
    (accuracy,) = run(example)
    assert accuracy > 85  # chance is 10; of digits that other people wrote


def test_accelerate_in_two_processes():
    """Relations of the rows of both: the same student in each."""
    accuracies = run(ROOT / "examples/accelerate_distill.py", "-m", "torch.distributed.run", "--nproc-per-node=2")
    assert len(accuracies) == 2 and accuracies[0] == accuracies[1] > 85
