"""Prints what CHANGELOG.md says of one version, for its release.

Usage: python .ci/changelog.py VERSION. It fails where there is no such section, where the section has no date yet, and
where the package says that it is another version.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def section(text, version):
    """-> the date of `version`'s section, or "unreleased", and what stands in it."""
    found = re.search(
        rf"^## \[{re.escape(version)}\] - (?P<date>\S+)\n(?P<body>.*?)(?=^## \[|^\[[^]]+\]: |\Z)", text, re.M | re.S
    )
    if not found or not found["body"].strip():
        raise SystemExit(f"changelog: CHANGELOG.md says nothing of {version}")
    return found["date"], found["body"].strip()


def main(version):
    package = re.search(r'^__version__ = "(.+)"$', (ROOT / "kdfast/__init__.py").read_text(), re.M)[1]
    if version != package:
        raise SystemExit(f"changelog: the tag is for {version}, the package is {package}")
    date, body = section((ROOT / "CHANGELOG.md").read_text(), version)
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        raise SystemExit(f"changelog: {version} has no date in CHANGELOG.md, but {date!r}")
    print(body)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
