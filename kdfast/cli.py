"""The command line: `kdfast` and `python -m kdfast`."""

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

import kdfast
from kdfast._extras import MissingExtra

# Each module has add_arguments(parser) and run(options) -> exit status. Only the chosen one is imported.
COMMANDS = {
    "doctor": ("kdfast.doctor", "say what is built and which path each op takes here"),
    "list": ("kdfast.listing", "find a paper: the methods that there are, and what to call"),
    "compare": ("kdfast.lab.compare", "train a student with each of several losses on small data, and compare them"),
    "train": ("kdfast.training.command", "train a timm model from a timm teacher, on ImageNet or the like"),
    "study": ("kdfast.lab.study", "run a method that is more than a loss, to its result on small data"),
    "bench": ("kdfast.bench", "time the kernels against plain PyTorch"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, 2 where an optional dependency is missing."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # now: at the interpreter's end an error would be printed
    except BrokenPipeError:  # its reader has seen enough
        for stream in (sys.stdout, sys.stderr):
            _abandon(stream)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:  # before the command has begun
        print("\nkdfast: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _abandon(stream):
    try:
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(argv):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("kdfast", description="Knowledge-distillation losses on fused kernels.")
    parser.add_argument("--version", action="version", version=f"kdfast {kdfast.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    try:
        for name, (module, summary) in COMMANDS.items():
            command = subparsers.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
            if argv[:1] == [name]:
                chosen = importlib.import_module(module)
                chosen.add_arguments(command)
        options = parser.parse_args(argv)
        kdfast._load()
        return chosen.run(options)
    except MissingExtra as error:
        print(f"kdfast {argv[0]}: error: {error}", file=sys.stderr)
        return 2
