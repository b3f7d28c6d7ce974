"""A study in its folder: settings, the steps in their order, each stored when it is done, then table and pictures."""

import argparse
import warnings
from pathlib import Path
from typing import Any

import kdfast
from kdfast._extras import require
from kdfast.lab.studies import digits
from kdfast.lab.study import Settings, settings_of
from kdfast.runs import checkpoints
from kdfast.runs.determinism import environment, reproducible
from kdfast.runs.files import locked, write_atomically
from kdfast.runs.folder import settle, stored_settings
from kdfast.runs.progress import Progress
from kdfast.runs.tables import csv_bytes, png_bytes, print_table

__all__ = ["carry_out", "files"]

RESULTS = "results.csv"


def files(study: Any) -> tuple[str, ...]:
    """The names of what the module `study` writes beside its checkpoints."""
    return RESULTS, *study.PICTURES


def carry_out(study: Any, options: argparse.Namespace, folder: Path) -> None:
    """Do the steps of the module `study` that are not done yet in `folder`, and show what they found."""
    stored = stored_settings(options, Settings, folder)
    settings = settings_of(options, study.DEFAULTS, stored)
    for module in ("rich.console", "matplotlib.figure", "sklearn.datasets"):
        require(module, extra="compare")  # now, so that none is found missing after the work
    data = digits.load().fingerprint()
    with locked(folder):
        settle(folder, settings, stored, data, environment())
        with reproducible(settings.threads), warnings.catch_warnings():
            warnings.simplefilter("ignore", kdfast.FallbackWarning)  # `kdfast doctor` says it
            results = _do(study.steps(settings), folder / "checkpoints")
            findings = study.findings(settings, results)
        for name, figure in findings.pictures.items():
            write_atomically(folder / name, png_bytes(figure))
        titles = list(findings.records[0])
        rows = [[repr(v) if isinstance(v, float) else v for v in record.values()] for record in findings.records]
        write_atomically(folder / RESULTS, csv_bytes(titles, rows))
    written = f"written: {', '.join(str(folder / name) for name in files(study))}"
    print_table(findings.titles, findings.rows, [*findings.notes, written], findings.sections)


def _do(steps, folder):
    """-> name -> result of every step, from its checkpoint where there is one."""
    results = {}
    with Progress(len(steps), "steps") as progress:
        for number, step in enumerate(steps):
            path = folder / f"{step.name.replace(' ', '-')}.pt"
            if not path.exists():
                progress.at(number, step.name)

                def share(x, number=number, name=step.name):
                    progress.at(number + x, name)

                checkpoints.save(path, step.work(results, share))
                progress.line(f"[{number + 1}/{len(steps)}] {step.name}")
            # What was stored, in either case: a resumed study computes with nothing else.
            results[step.name] = checkpoints.load(path)
    return results
