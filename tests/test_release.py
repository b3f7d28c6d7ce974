"""What a release is made with: workflows name only what exists and may do little, the changelog has the version."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import kdfast

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
if not WORKFLOWS:
    pytest.skip("needs the source tree", allow_module_level=True)

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def jobs(path):
    return yaml.safe_load(path.read_text())["jobs"].values()


def steps(path):
    return [step for job in jobs(path) for step in job.get("steps", [])]


def targets():
    """Those of the Makefile."""
    return {
        name
        for names in re.findall(r"^([\w./ -]+):(?!=)", (ROOT / "Makefile").read_text(), re.M)
        for name in names.split()
    }


@each_workflow
def test_workflow_may_do_little_and_ends(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"} and "concurrency" in workflow
    for job in jobs(path):
        assert "uses" in job or "timeout-minutes" in job
        # Who may write runs nothing of the repository.
        writes = "write" in job.get("permissions", {}).values()
        assert not (writes and any("actions/checkout" in step.get("uses", "") for step in job["steps"]))
    for step in steps(path):
        if "actions/checkout" in step.get("uses", ""):
            assert step["with"] == {"persist-credentials": False}


@each_workflow
def test_workflow_uses_fixed_versions(path):
    for uses in [job.get("uses") for job in jobs(path)] + [step.get("uses") for step in steps(path)]:
        if uses and uses.startswith("./"):
            assert (ROOT / uses).is_file()
        elif uses:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@(v\d+|release/v\d+)", uses)


def missing(script):
    """Files of this repository and targets of make that a script names and that do not exist."""
    words = [word for line in script.splitlines() for word in shlex.split(line)]
    files = [
        word for word in words if re.fullmatch(r"(\.ci|tests|docs|benchmarks)/[\w./-]+|[\w-]+\.(py|txt|toml)", word)
    ]
    goals = [word for line in script.splitlines() if line.startswith("make ") for word in shlex.split(line)[1:]]
    return [name for name in files if not (ROOT / name).exists()] + [goal for goal in goals if goal not in targets()]


@each_workflow
def test_workflow_runs_what_exists(path):
    assert missing("\n".join(step.get("run", "") for step in steps(path))) == []


def test_what_does_not_exist_is_found():
    assert missing("make lint publish\npython .ci/none.py --out x\npython setup.py none.txt") == [
        ".ci/none.py",
        "none.txt",
        "publish",
    ]


@pytest.fixture(scope="module")
def changelog():
    spec = importlib.util.spec_from_file_location("changelog", ROOT / ".ci/changelog.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TEXT = """# Changelog

## [0.2.0] - unreleased

### Added

- More.

## [0.1.0] - 2026-01-02

### Fixed

- A bug ([#1](https://example.org)).

[0.1.0]: https://example.org
"""


def test_changelog_section(changelog):
    assert changelog.section(TEXT, "0.1.0") == ("2026-01-02", "### Fixed\n\n- A bug ([#1](https://example.org)).")
    assert changelog.section(TEXT, "0.2.0") == ("unreleased", "### Added\n\n- More.")
    with pytest.raises(SystemExit, match="says nothing of 0.1"):
        changelog.section(TEXT, "0.1")


def test_changelog_of_a_release(changelog, monkeypatch, tmp_path, capsys):
    (tmp_path / "kdfast").mkdir()
    (tmp_path / "kdfast/__init__.py").write_text('__version__ = "0.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(TEXT)
    monkeypatch.setattr(changelog, "ROOT", tmp_path)
    changelog.main("0.1.0")
    assert capsys.readouterr().out.startswith("### Fixed\n")
    with pytest.raises(SystemExit, match="the tag is for 0.2.0, the package is 0.1.0"):
        changelog.main("0.2.0")
    (tmp_path / "kdfast/__init__.py").write_text('__version__ = "0.2.0"\n')
    with pytest.raises(SystemExit, match="0.2.0 has no date"):
        changelog.main("0.2.0")


def test_every_place_says_the_same_version(changelog):
    body = changelog.section((ROOT / "CHANGELOG.md").read_text(), kdfast.__version__)[1]
    sections = dict(re.findall(r"^### (.+)\n\n((?:[-\s].*\n?)+)", body, re.M))
    assert list(sections) == [name for name in ("Added", "Changed", "Removed", "Fixed") if name in sections]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == kdfast.__version__ and citation["cff-version"] == "1.2.0"


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem)
def test_issue_form(path):
    form = yaml.safe_load(path.read_text())
    if path.stem != "config":
        assert {"name", "description", "body"} <= form.keys()
        assert all(field["validations"]["required"] for field in form["body"])
