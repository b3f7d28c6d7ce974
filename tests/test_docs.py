"""README and the pages: their code runs, what is generated is up to date, links lead somewhere, the site builds."""

import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import kdfast

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", *PAGES] if PAGES else []
if not PAGES:
    pytest.skip("needs the source tree", allow_module_level=True)

sys.path.insert(0, str(ROOT / "docs"))
import generate  # noqa: E402

OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md")
# What a block of code imports -> the package without which it cannot run.
NEEDED = {
    "transformers": "transformers",
    "timm": "timm",
    "kdfast.integrations.timm": "timm",
    "kdfast.teacher_store": "safetensors",
}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def text_of(page):
    return (ROOT / page).read_text()


# ---- code ------------------------------------------------------------------------------------------------------------
def logits(classes=10):
    return torch.randn(4, classes, requires_grad=True)


def loading(saved):
    """torch, whose files hold `saved`."""
    return types.SimpleNamespace(**{**vars(torch), "load": lambda path: saved})


def crd_state():
    """What RepDistiller saves of its CRDLoss."""
    layers = {f"embed_{s}.linear": nn.Linear(10, 5).state_dict() for s in "st"}
    weights = {f"{layer}.{name}": x for layer, state in layers.items() for name, x in state.items()}
    banks = {f"contrast.memory_v{i}": torch.randn(12, 5) for i in (1, 2)}
    return {**weights, **banks, "contrast.params": torch.tensor([7, 0.1, 30.0, 40.0, 0.5])}


def of_repdistiller():
    """RepDistiller's modules, and the tensors of its training loop."""
    from kdfast.compat import repdistiller

    modules = {name: types.ModuleType(name) for name in ("distiller_zoo", "crd", "crd.criterion")}
    for name in repdistiller.__all__:
        setattr(modules["crd.criterion" if name == "CRDLoss" else "distiller_zoo"], name, getattr(repdistiller, name))
    names = dict(feat_s=[logits(), logits()], feat_t=[torch.randn(4, 10), torch.randn(4, 10)])
    names |= dict(logit_s=logits(), logit_t=torch.randn(4, 10), target=torch.arange(4))
    crd = dict(s_dim=10, t_dim=10, feat_dim=5, n_data=12, nce_k=7, nce_t=0.1, nce_m=0.5)
    names |= dict(opt=types.SimpleNamespace(**crd), index=torch.arange(4), torch=loading(crd_state()))
    return modules, names | dict(gamma=1, alpha=1, beta=1, criterion_cls=nn.CrossEntropyLoss())


def of_mdistiller():
    """mdistiller's modules as far as its page names them, the tensors of its loop, and what it has saved."""
    from kdfast.compat.mdistiller import dkd_loss

    modules = {f"mdistiller{x}": types.ModuleType(f"mdistiller{x}") for x in ("", ".distillers")}
    modules |= {f"mdistiller.distillers.{x}": types.ModuleType(x) for x in ("CRD", "DKD")}
    modules["mdistiller.distillers"].distiller_dict = {}
    modules["mdistiller.distillers.CRD"].CRD = nn.Module
    distiller = nn.Module()
    distiller.crd = kdfast.CRD(10, 10, 12, 5, 7)
    saved = {"model": {f"module.{name}": x for name, x in crd_state().items()}}
    names = dict(dkd_loss=dkd_loss, epoch=3, warmup=20, alpha=1.0, beta=8.0, temperature=4.0, distiller=distiller)
    names |= dict(logits_student=logits(), logits_teacher=torch.randn(4, 10), target=torch.arange(4))
    return modules, names | {"torch": loading(saved)}


# What a page leaves to its reader: other libraries' modules, and names.
GIVEN = {
    "docs/migrating-from-repdistiller.md": of_repdistiller,
    "docs/migrating-from-mdistiller.md": of_mdistiller,
}


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(text_of(page))])
def test_code_runs(page, monkeypatch):
    """The blocks of a page one after the other, in one namespace; the rest is skipped where a package is missing."""
    torch.manual_seed(0)
    modules, names = GIVEN.get(page, lambda: ({}, {}))()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    names["__name__"] = "__page__"
    for match in BLOCK.finditer(text_of(page)):
        imported = re.findall(r"^(?:import|from) ([\w.]+)", match[1], flags=re.MULTILINE)
        for package in filter(None, map(NEEDED.get, imported)):
            pytest.importorskip(package, reason=f"{package} is not installed: the rest of {page} was not run")
        line = text_of(page)[: match.start()].count("\n") + 1
        exec(compile("\n" * line + match[1], page, "exec"), names)
    losses = [x for name, x in names.items() if name in ("loss", "plain") and isinstance(x, torch.Tensor)]
    assert all(loss.isfinite().all() for loss in losses)


# ---- what is generated -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", generate.PARTS)
def test_generated_parts_are_up_to_date(page):
    assert generate.generated(page) == text_of(page), "run: python docs/generate.py"


def test_the_chart_is_up_to_date():
    assert generate.CHART.read_text() == generate.chart(), "run: python docs/generate.py"


def test_readme_is_short_and_has_its_commands():
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 120 and "```python" in lines[:15]
    assert {"make demo", "make test"} <= {line.split("  ")[0] for line in lines}


def test_readme_lists_every_loss():
    """By the names that one writes, with a link to its section."""
    listed = re.findall(r"\[`(\w+)`\]\(docs/losses/", text_of("README.md"))
    classes = [paper.name for paper in generate.PAPERS if generate.is_class(paper)]
    assert sorted(listed) == sorted(classes)


# ---- links -----------------------------------------------------------------------------------------------------------
def anchors(page):
    """Of the headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE])
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, part = target.partition("#")
        if ":" in path:
            continue
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), target
        if part:
            assert part in anchors(found.resolve().relative_to(ROOT).as_posix()), target


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"([\w/-]+\.md)", text_of("mkdocs.yml"))
    assert {f"docs/{name}" for name in listed} - {"docs/contributing.md", "docs/changelog.md"} == {*PAGES} - {
        "README.md"
    }


def test_traps_name_tests_that_exist():
    """Each line names a test, and the official numbers or the loss that it is given."""
    golden = {path.name.split("__")[0] for path in (ROOT / "tests/golden").rglob("*.npz")}
    rows = [line for line in text_of("docs/traps.md").splitlines() if line.startswith("| ") and "test" in line]
    rows = [row for row in rows if not row.endswith("| test |")]
    assert len(rows) > 30
    for row in rows:
        where = row.rsplit("|", 2)[1]
        file = re.search(r"`(test_\w+\.py)::", where)[1]
        tests = re.findall(r"\b(test_\w+)\b(?!\.py)", where)
        assert tests and all(f"def {test}(" in text_of(f"tests/{file}") for test in tests), row
        given = re.search(r"\(([^)]*)\)", where)
        for name in re.findall(r"`(\w+)`", given[1]) if given else ():
            assert name in golden or hasattr(kdfast, name), row


# ---- the site --------------------------------------------------------------------------------------------------------
def test_the_site_builds_without_a_warning(tmp_path):
    """And without a word from another server in it."""
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    for path in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(r"<(?:script|link|img)[^>]*?(?:src|href)=[\"']?(https?:[^\"' >]*)", path.read_text())
        assert not fetched, path
