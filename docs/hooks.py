"""What mkdocs does beside its own work: equations become MathML, and links out of docs/ lead to pages of the site.

Equations are LaTeX between two lines of `$$`, which GitHub shows as they are. A link such as ../CONTRIBUTING.md works
on GitHub; here the file is a page, too.
"""

import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# In the repository -> in the site.
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "benchmarks/results/": "results/"}
PAGES |= {"examples/": "examples/"}


def in_site(path):
    """Where a file of the repository is in the site, or None."""
    for there, here in {"docs/": "", **PAGES}.items():
        if path == there or (there.endswith("/") and path.startswith(there)):
            return here + path.removeprefix(there)
    return None


def in_repository(uri):
    """Where a page of the site is in the repository."""
    return next(
        (there + uri.removeprefix(here) for there, here in PAGES.items() if uri.startswith(here)), f"docs/{uri}"
    )


def on_files(files, config):
    """Adds the pages that lie outside docs/, and the plots and examples that they show."""
    patterns = (*(name for name in PAGES if not name.endswith("/")), "benchmarks/results/*/*.[mp]*", "examples/*.py")
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            uri = in_site(path.relative_to(ROOT).as_posix())
            content = path.read_bytes()
            plot = path.with_suffix(".png")
            if path.suffix == ".md" and plot.exists():
                content = b"---\nsearch:\n  exclude: true\n---\n" + content  # tables that all have the same words
                content += f"\n\n![{path.stem}, measured]({plot.name})\n".encode()
            files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    folder = posixpath.dirname(in_repository(uri))

    def followed(match):
        target, mark, part = match[1].partition("#")
        found = target and in_site(posixpath.normpath(posixpath.join(folder, target)))
        return f"]({posixpath.relpath(found, posixpath.dirname(uri) or '.')}{mark}{part})" if found else match[0]

    markdown = re.sub(r"\]\(([^)\s:]+)\)", followed, markdown)
    return re.sub(r"^\$\$\n(.*?)\n\$\$$", _equation, markdown, flags=re.DOTALL | re.MULTILINE)


def _equation(match):
    """Its parts between wide spaces, which take a line each where the page is narrow."""
    parts = re.split(r"\s*\\quad\s*", match[1])
    return f'<div class="equation">{"".join(convert(part, display="block") for part in parts)}</div>'
