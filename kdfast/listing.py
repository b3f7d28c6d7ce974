"""`kdfast list`: the methods that kdfast has, and the paper of each."""

import argparse
import shutil
import textwrap

from kdfast.papers import KINDS, PAPERS, find

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `kdfast list`."""
    parser.add_argument(
        "word", metavar="WORD", nargs="?", help="part of a name, title, author, venue, kind, input or op"
    )


def run(options: argparse.Namespace) -> int:
    """Print one line for each method, or all of those that have the word; returns the exit code."""
    if options.word is None:
        print("\n\n".join(_kind(kind) for kind in KINDS))
        print("\nkdfast list WORD: title, call, inputs, official code of the methods that have the word.")
        return 0
    found = find(options.word)
    print(
        "\n\n".join(map(_entry, found)) if found else f"No method has {options.word!r}; kdfast list shows all of them."
    )
    return 0 if found else 1


def _kind(kind):
    papers = [paper for paper in PAPERS if paper.kind == kind]
    lines = [f"  {paper.name:22}{paper.label:28}{paper.source}" for paper in papers]
    return "\n".join([f"{kind}: {KINDS[kind]}", *lines])


def _entry(paper):
    licence = {"": "", "none": " (no licence)"}.get(paper.licence, f" ({paper.licence})")
    rows = {
        "title": paper.title,
        "by": paper.source,
        "kind": paper.kind,
        "call": f"kdfast.{paper.call}",
        "inputs": paper.inputs,
        "ops": ", ".join(paper.ops) or "plain PyTorch",
        "also": ", ".join(f"kdfast.{name}" for name in paper.also),
        "code": paper.code and f"https://github.com/{paper.code}{licence}",
        "differs": paper.differs,
        "try": ", ".join(
            [f"kdfast compare --loss {name}" for name in paper.compare]
            + [f"kdfast study {paper.study}"] * bool(paper.study)
        ),
    }
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    wrap = {"width": width, "subsequent_indent": " " * 11, "break_long_words": False, "break_on_hyphens": False}
    lines = [textwrap.fill(f"  {name:9}{text}", **wrap) for name, text in rows.items() if text]
    return "\n".join([paper.name if paper.label == paper.name else f"{paper.name} ({paper.label})", *lines])
