"""What tests of commands share: a process of one's own, the line of an error, tables, a disk that is full."""

import contextlib
import csv
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import kdfast
from kdfast.cli import main

# A child runs the package that is tested here, be it installed or a source tree.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(kdfast.__file__).parents[1]),
    "COLUMNS": "80",
    "OMP_NUM_THREADS": "1",
}


def as_command(*arguments, **options):
    """The output of `kdfast ARGUMENTS` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "kdfast", *arguments], env=ENVIRONMENT, capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stderr
    return done


def rows(path):
    """Of a CSV file, each by the names of its columns."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def refused(capsys, argv):
    """The one line that the refused command prints to stderr beside its progress."""
    capsys.readouterr()
    code, printed = main(argv), capsys.readouterr()
    assert code == 2, printed
    lines = [line for line in printed.err.splitlines() if not line.startswith("[")]  # "[1/3]" is progress
    assert len(lines) == 1, lines
    assert re.match(r"kdfast (compare|study[ \w-]*): error: ", lines[0]), lines
    return lines[0]


@contextlib.contextmanager
def disk_that_is_full(monkeypatch, allowed):
    """Inside, the disk has room for so many files."""
    replace, remaining = os.replace, iter(range(allowed))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *names: (full_disk if next(remaining, None) is None else replace)(*names))
        yield


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
