"""The scripts in `examples/` are short and run as they are, and their students learn."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(ROOT.glob("examples/*_distill.py"))
if not (ROOT / "examples").exists():
    pytest.skip("needs the source tree", allow_module_level=True)


def run(example, *launcher):
    """What the script prints, one accuracy in percent for each process."""
    for package in imported(example) - {"digits"}:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, *launcher, str(example)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return [float(accuracy) for accuracy in re.findall(r"student: ([\d.]+)%", result.stdout)]


def imported(path):
    """The packages that a script imports."""
    return set(re.findall(r"^(?:import|from) (\w+)", path.read_text(), flags=re.MULTILINE))


def lines_of_code(path):
    """How many lines of the script are neither blank, comment nor docstring."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in layout | {tokenize.ENCODING}]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_lines_of_code_are_counted(tmp_path):
    path = tmp_path / "script.py"
    path.write_text('"""A\ndocstring."""\n\n# comment\nx = [\n    1,\n]  # comment\n\n\ndef f():\n    """One."""\n')
    assert lines_of_code(path) == 4


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_thirty_lines(example):
    assert lines_of_code(example) <= 30
    assert ";" not in example.read_text()


PUBLIC = {"kdfast", "kdfast.objectives", "kdfast.teacher_store", "kdfast.integrations.transformers"}


def test_public_names_alone():
    """Examples import the library and objectives, and no program."""
    for path in ROOT.glob("examples/*.py"):
        modules = set(re.findall(r"^(?:import|from) (kdfast[\w.]*)", path.read_text(), flags=re.MULTILINE))
        assert modules <= PUBLIC, path


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example):
    (accuracy,) = run(example)
    assert accuracy > 85  # chance is 10; of digits that other people wrote


def test_accelerate_in_two_processes():
    """Relations of the rows of both: the same student in each."""
    accuracies = run(ROOT / "examples/accelerate_distill.py", "-m", "torch.distributed.run", "--nproc-per-node=2")
    assert len(accuracies) == 2 and accuracies[0] == accuracies[1] > 85
