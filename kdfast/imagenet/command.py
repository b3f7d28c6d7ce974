"""`kdfast distill --student`: exit codes, and one line for what goes wrong, from whichever process."""

import argparse
import os
from pathlib import Path

from kdfast._extras import MissingExtra, require
from kdfast.distill import DistillError
from kdfast.distill.cli import answer
from kdfast.imagenet import settings
from kdfast.imagenet.ranks import OtherRankFailed, Stopped, by_torchrun, join, leave

__all__ = ["run"]

COMMAND = "kdfast distill"
NEEDED = ("timm", "timm.task", "torchvision", "tensorboard", "rich.console")


def run(options: argparse.Namespace) -> int:
    """Train and report as `options` say; returns the exit code."""
    try:
        return answer(COMMAND, lambda: _folder(options), lambda folder: _run(options, folder))
    except OtherRankFailed as silent:
        return silent.code
    finally:  # here, where what was raised is gone, and with its frames the networks
        leave()


def _folder(options):
    if options.store_teacher:
        return Path(options.store_teacher)
    if not options.out and _speaks():
        raise DistillError("--out: is missing; expected the folder of this run, where --resume finds it again")
    return Path(options.out or "")


def _run(options, folder):
    try:
        chosen = _chosen(options, folder)
    except (DistillError, MissingExtra) as error:  # the same in every process
        if _speaks():
            raise
        raise OtherRankFailed from error
    from kdfast.imagenet.run import train

    here = join(chosen.device)
    try:
        train(chosen, options, folder, here)
    except Stopped as stopped:
        if here.first:
            raise
        raise OtherRankFailed(128 + stopped.signal) from stopped


def _chosen(options, folder):
    for module in NEEDED:
        require(module, extra="imagenet")
    path = folder / "settings.json"
    stored = settings.read(path) if options.resume and path.exists() else None
    return settings.resolve(options, stored)


def _speaks():
    return not by_torchrun() or os.environ["RANK"] == "0"
