"""The smallest program on `kdfast.runs`: a sum of random numbers, one checkpoint a step, and a file of results."""

import argparse
from dataclasses import dataclass

import torch

from kdfast.runs import checkpoints
from kdfast.runs.command import answer
from kdfast.runs.determinism import derived_seed, environment, reproducible
from kdfast.runs.files import locked, write_atomically
from kdfast.runs.folder import output_folder, settle, stored_settings
from kdfast.runs.options import add_arguments, add_folder, number, option, resolve, whole

COMMAND = "kdfast tiny"
FILES = ("sum.txt",)
SIZE = 1000  # so that most of a checkpoint are numbers


@dataclass(frozen=True)
class Settings:
    """The checked options."""

    steps: int = option("N", "steps", whole(1, 9), 4)
    rate: float = option("X", "weight of a number", number(zero=False), 0.5)
    workers: int = option("N", "processes", whole(0), 0, group="speed", free=True)
    fast: bool = option(None, "no wait", default=False, group="speed")


def parser():
    """With the options of the program."""
    made = argparse.ArgumentParser(COMMAND)
    add_arguments(made, Settings)
    add_folder(made, "where results go", " or the newest in runs")
    return made


def main(argv, data="images", computed=lambda number: None, warn=None):
    """Run it; ``computed(number)`` is called after each step, before its checkpoint."""
    options = parser().parse_args(argv)

    def work(folder):
        stored = stored_settings(options, Settings, folder)
        chosen = resolve(Settings, options, stored)
        with locked(folder):
            settle(folder, chosen, stored, data, environment(), warn)
            path, state = folder / "checkpoints/state.pt", {"done": 0, "sum": torch.zeros(SIZE)}
            if path.exists():
                state = checkpoints.load(path)
            with reproducible(threads=1):
                while state["done"] < chosen.steps:
                    torch.manual_seed(derived_seed(0, state["done"]))
                    state = {"done": state["done"] + 1, "sum": state["sum"] + chosen.rate * torch.rand(SIZE)}
                    computed(state["done"])
                    checkpoints.save(path, state)
            write_atomically(folder / FILES[0], repr(state["sum"].tolist()).encode())

    return answer(COMMAND, lambda: output_folder(options, Settings, COMMAND, FILES), work)
