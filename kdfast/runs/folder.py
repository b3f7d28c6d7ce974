"""The folder of a run: which one it is, and its settings.json, which a resumed run has to agree with."""

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdfast._text import printable
from kdfast.runs.errors import RunError
from kdfast.runs.files import write_atomically
from kdfast.runs.options import declared, flag

__all__ = ["ROOT", "SETTINGS", "output_folder", "refuse_nothing", "settle", "stored_settings"]

ROOT = Path("runs")
SETTINGS = "settings.json"


def output_folder(options: argparse.Namespace, kind: type, command: str, files: Sequence[str]) -> Path:
    """The folder of a run of `command`, which writes `files`: a new one, or with --resume the one to continue."""
    stem = command.removeprefix("kdfast ").replace(" ", "-")
    if options.out is not None and not options.out:
        raise RunError("--out: got '', expected a folder")
    folder = Path(options.out) if options.out else (_newest(stem) if options.resume else None) or _unused(stem)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--out: {folder} is a file; expected a folder")
    if (folder / SETTINGS).exists():
        if not options.resume:
            raise _taken(folder)
    elif taken := [name for name in files if (folder / name).exists()]:
        raise RunError(f"--out: {folder} has a {taken[0]} that belongs to no run; take another --out")
    elif options.resume:
        refuse_nothing(options, kind)
        print(f"{command}: nothing to resume, starting in {printable(str(folder))}", file=sys.stderr)
    return folder


def refuse_nothing(options: argparse.Namespace, kind: type) -> None:
    """Raise a RunError if `options` do not say what to run: with nothing to resume, the folder's name is mistyped."""
    given = {field.name for field in declared(kind) if getattr(options, field.name) is not None}
    required = {field.name for field in declared(kind) if field.default is dataclasses.MISSING}
    if not given or required - given:
        start = "to start one, leave out --resume, or give options of the run"
        raise RunError(f"--resume: there is no run in {options.out or ROOT} to continue; {start}")


def _taken(folder):
    return RunError(f"--out: {folder} holds a run already; continue it with --resume, or take another --out")


def _newest(stem):
    runs = [path.parent for path in ROOT.glob(f"{stem}-*/{SETTINGS}")]
    return max(runs, key=_order, default=None)


def _unused(stem):
    """A new folder that comes after those there, also where the clock was set back, and is no other process's."""
    folder = ROOT / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    newest = max(ROOT.glob(f"{stem}-*"), key=_order, default=folder)
    return ROOT / f"{newest.name}-{os.getpid()}" if folder.exists() or _order(newest) > _order(folder) else folder


def _order(folder):
    """The numbers in its name: date, time, process."""
    return [int(number) for number in re.findall(r"\d+", folder.name)]


# ---- settings.json ---------------------------------------------------------------------------------------------------
def stored_settings(options: argparse.Namespace, kind: type, folder: Path) -> dict[str, Any] | None:
    """The dict of the settings.json in `folder`, of a run of these Settings; None where nothing is resumed."""
    path = folder / SETTINGS
    if not (options.resume and path.exists()):
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {field.name for field in dataclasses.fields(kind)}
        if set(content["settings"]) != names or not {"data", "environment"} <= set(content):
            raise KeyError("settings")
        for field in declared(kind):
            value = content["settings"][field.name]
            if value is not None and field.metadata["of_stored"]:
                if field.metadata["check"](f"{path}: {field.name}", value) != value:
                    raise ValueError(field.name)
        return content
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged; the run cannot be resumed, start anew with another --out") from error


def settle(
    folder: Path,
    chosen: Any,
    stored: dict[str, Any] | None,
    data: str,
    environment: dict[str, str],
    warn: Callable[[str], Any] | None = None,
) -> None:
    """Start a run in the locked `folder`: write down what it is; or raise a RunError if the `stored` one is another.

    `data` is the fingerprint of the images. ``warn(line)`` is told of another environment, without it that is an error.
    """
    if stored is None:
        if (folder / SETTINGS).exists():  # since the check of `output_folder`
            raise _taken(folder)
        folder.joinpath("checkpoints").mkdir(exist_ok=True)
        content = {"settings": asdict(chosen), "data": data, "environment": environment}
        return write_atomically(folder / SETTINGS, (json.dumps(content, indent=2) + "\n").encode())
    found = _differences(stored, chosen, data)
    was = stored["environment"]
    around = [f"{name} was {was.get(name)} and is {x}" for name, x in environment.items() if was.get(name) != x]
    if warn is None:
        found += around
    if found:
        raise RunError(f"cannot resume {folder}: {'; '.join(found)}; start anew with another --out")
    if around:
        warn(f"the weights may differ in their last bits: {'; '.join(around)}")


def _differences(stored, chosen, data):
    """Sentences that name what differs in settings and images."""
    values, was = asdict(chosen), stored["settings"]
    fixed = [field.name for field in dataclasses.fields(chosen) if not field.metadata.get("free")]
    found = [f"{flag(name)} was {was[name]} and is {values[name]}" for name in fixed if was[name] != values[name]]
    if not found and stored["data"] != data:
        where = f" of --data {chosen.data}" if hasattr(chosen, "data") else ""
        found.append(f"the images{where} have changed")
    return found
