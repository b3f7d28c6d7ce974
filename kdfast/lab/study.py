"""The options of `kdfast study`: methods that are more than a loss, each run to its result on small data."""

import argparse
import importlib
from dataclasses import dataclass
from typing import Any

from kdfast.runs.errors import RunError
from kdfast.runs.options import add_arguments as declare
from kdfast.runs.options import add_folder, declared, option, resolve, whole

__all__ = ["STUDIES", "Settings", "add_arguments", "run", "settings_of"]

STUDIES = {
    "residual": "a plain student without shortcuts learns from a residual teacher",
    "wide": "how much data soft labels save, and what hard ones mend",
    "explain": "which pixels a student knows, with and without a teacher",
    "data-free": "images out of a network, and students that learn on them",
    "segmentation": "small segmenters and detectors with losses on the teacher's maps",
}


@dataclass(frozen=True)
class Settings:
    """The checked options that decide a study's results; None for what this study does not have."""

    study: str
    epochs: int | None = option("N", "epochs of each training", whole(1), None)
    seed: int | None = option("N", "the first seed (default: 0)", whole(0), None)
    seeds: int | None = option("N", "number of seeds, counted up from the first", whole(1), None)
    threads: int = option("N", "CPU threads; the networks are small", whole(1, 1024), 1)

    @property
    def every_seed(self) -> range:
        """The seeds in order."""
        return range(self.seed, self.seed + self.seeds)


def settings_of(options: argparse.Namespace, defaults: dict[str, Any], stored: dict[str, Any] | None) -> Settings:
    """The Settings of the parsed `options` of a study with these `defaults`."""
    for field in declared(Settings):
        if field.default is None and field.name not in defaults and getattr(options, field.name) is not None:
            given = getattr(options, field.name)
            raise RunError(f"--{field.name}: got {given!r}, but kdfast study {options.study} has no {field.name}")
    return resolve(Settings, options, stored, study=options.study, **defaults)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `kdfast study`."""
    parser.add_argument("study", metavar="STUDY", nargs="?", help="one of these below")
    declare(parser, Settings)
    add_folder(parser, "where results go (default: a new folder in runs)", " or the study's newest in runs")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(["studies:", *(f"  {name:12} {summary}" for name, summary in STUDIES.items())])


def run(options: argparse.Namespace) -> int:
    """Run the study and report; returns the exit code."""
    from kdfast.lab.studies import runner  # here: --help needs no torch
    from kdfast.runs.command import answer
    from kdfast.runs.folder import output_folder

    name, study = options.study or "", None

    def folder():
        nonlocal study
        if name not in STUDIES:
            raise RunError(f"STUDY: got {name!r}, expected one of {', '.join(STUDIES)}")
        study = importlib.import_module(f"kdfast.lab.studies.{name.replace('-', '_')}")
        return output_folder(options, Settings, f"kdfast study {name}", runner.files(study))

    command = f"kdfast study {name}" if name in STUDIES else "kdfast study"
    return answer(command, folder, lambda found: runner.carry_out(study, options, found))
