"""`kdfast train`: its options, its exit codes, and one line for what goes wrong, from whichever process."""

import argparse
import os
from pathlib import Path

from kdfast._extras import MissingExtra, require
from kdfast.runs.errors import RunError
from kdfast.runs.options import add_arguments as declare
from kdfast.runs.options import add_folder
from kdfast.training.settings import Settings, settings_of

__all__ = ["COMMAND", "add_arguments", "run"]

COMMAND = "kdfast train"
NEEDED = ("timm", "timm.task", "torchvision", "tensorboard", "rich.console")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `kdfast train`."""
    declare(parser, Settings)
    add_folder(parser, "where weights, logs and checkpoints go", "")
    parser.usage = "%(prog)s --data PATH --student NAME --teacher NAME --out FOLDER [...]"
    parser.description += " It runs under torchrun, too."


def run(options: argparse.Namespace) -> int:
    """Train and report as `options` say; returns the exit code."""
    from kdfast.runs.command import answer  # here: --help needs no torch
    from kdfast.teacher_store import StoreError
    from kdfast.training.ranks import OtherRankFailed, leave

    try:
        return answer(COMMAND, lambda: _folder(options), lambda folder: _work(options, folder), (StoreError,))
    except OtherRankFailed as silent:
        return silent.code
    finally:  # here, where what was raised is gone, and with its frames the networks
        leave()


def _folder(options):
    if options.store_teacher:
        return Path(options.store_teacher)
    if not options.out and _speaks():
        raise RunError("--out: is missing; expected the folder of this run, where --resume finds it again")
    return Path(options.out or "")


def _work(options, folder):
    from kdfast.training.ranks import OtherRankFailed, Stopped, join

    try:
        settings, stored = _settings(options, folder)
    except (RunError, MissingExtra) as error:  # the same in every process
        if _speaks():
            raise
        raise OtherRankFailed from error
    from kdfast.training import run

    ranks = join(settings.device)
    try:
        if settings.store_teacher:
            run.store_teacher(settings, ranks, folder)
        else:
            run.train(settings, ranks, folder, stored, options)
    except Stopped as stopped:
        if ranks.first:
            raise
        raise OtherRankFailed(128 + stopped.signal) from stopped


def _settings(options, folder):
    """-> the Settings, and the stored ones of the run that is resumed."""
    from kdfast.runs.folder import refuse_nothing, stored_settings

    for module in NEEDED:
        require(module, extra="train")
    stored = stored_settings(options, Settings, folder)
    if options.resume and stored is None:
        refuse_nothing(options, Settings)
    return settings_of(options, stored), stored


def _speaks():
    from kdfast.training.ranks import by_torchrun

    return not by_torchrun() or os.environ["RANK"] == "0"
