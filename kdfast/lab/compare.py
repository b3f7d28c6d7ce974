"""The options of `kdfast compare`: a teacher, a student alone, and a student with each chosen loss, side by side."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from kdfast.papers import PAPERS
from kdfast.runs.errors import RunError
from kdfast.runs.options import add_arguments as declare
from kdfast.runs.options import add_folder, device, option, whole

__all__ = ["COMMAND", "DIGITS", "LOSSES", "Settings", "add_arguments", "run"]

COMMAND = "kdfast compare"
DIGITS = "digits"  # the bundled data, where --data is not given

# Name -> what the table's row is, in the order of "all".
LOSSES = {name: summary for paper in PAPERS for name, summary in paper.compare.items()}


def _losses(argument, text):
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))  # each once, in the given order
    names = list(LOSSES) if "all" in names else names
    if unknown := [name for name in names if name not in LOSSES]:
        raise RunError(f"{argument}: got {unknown[0]!r}, expected all, or names from {', '.join(LOSSES)}, with commas")
    return ",".join(names)


def _path(argument, text):
    if not text:
        raise RunError(f"{argument}: got '', expected a folder of class folders of images")
    return str(Path(text).resolve())


@dataclass(frozen=True)
class Settings:
    """The checked options that decide a comparison's results; `loss` is the comma-separated list."""

    data: str = option(
        "PATH", "class folders of images, or train/ and test/ (or val/) of them (default: the digits)", _path, DIGITS
    )
    # Three stages halve the side twice; 512 keeps a folder of images in memory.
    image_size: int = option("N", "side to which the images of --data are resized", whole(8, 512), 32)
    # One of each kind, so that a first look takes a minute or two.
    loss: str = option("A,B,...", "losses, see below, or all", _losses, "kd,dkd,at,ofd,sp,rkd,crd,one")
    epochs: int = option("N", "epochs of each training", whole(1), 25)
    # Batch normalisation and relations within a batch need two images.
    batch_size: int = option("N", "images a step", whole(2), 32)
    seed: int = option("N", "the first seed", whole(0), 0)
    seeds: int = option("N", "number of seeds, counted up from the first", whole(1), 3)
    device: str = option("NAME", "cpu or cuda", device, "cpu")
    # More threads gain little, and where a core is busy each step waits for the slowest.
    threads: int = option("N", "CPU threads; the networks are small", whole(1, 1024), 1)

    @property
    def losses(self) -> list[str]:
        """The chosen loss names, in order."""
        return self.loss.split(",")

    @property
    def every_seed(self) -> range:
        """The seeds in order."""
        return range(self.seed, self.seed + self.seeds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `kdfast compare`."""
    declare(parser, Settings)
    add_folder(parser, "where results and checkpoints go (default: new, in runs)", " or the newest in runs")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    rows = [f"  {name:15} {summary}" for name, summary in LOSSES.items()]
    parser.epilog = "\n".join(["losses (`kdfast list NAME` has the paper):", *rows])


def run(options: argparse.Namespace) -> int:
    """Train, compare and report as `options` say; returns the exit code."""
    from kdfast.lab import comparison, report  # here: --help needs no torch
    from kdfast.runs.command import answer
    from kdfast.runs.folder import output_folder

    return answer(
        COMMAND,
        lambda: output_folder(options, Settings, COMMAND, report.FILES),
        lambda folder: comparison.compare(options, folder),
    )
