"""A study in its folder: settings, the steps in their order, each stored when it is done, then table and pictures."""

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kdfast
from kdfast._extras import require
from kdfast.distill import DistillError, report, storage
from kdfast.distill import settings as checks
from kdfast.distill.pipeline import begin, environment
from kdfast.distill.train import reproducible
from kdfast.study import digits

__all__ = ["Settings", "files", "refuse", "resolve", "run"]

RESULTS = "results.csv"
CHECKS = {
    "epochs": checks.whole(1),
    "seed": checks.whole(0),
    "seeds": checks.whole(1),
    "threads": checks.whole(1, 1024),
}


@dataclass(frozen=True)
class Settings:
    """The checked arguments that decide a study's results; None for what this study does not have."""

    study: str
    epochs: int | None
    seed: int | None
    seeds: int | None
    threads: int

    @property
    def every_seed(self) -> Any:
        """The seeds in order."""
        return range(self.seed, self.seed + self.seeds)


def refuse(message: str) -> None:
    """Raise the error of a problem that the user can solve."""
    raise DistillError(message)


def files(study: Any) -> tuple[Any, ...]:
    """The names of what `study` writes beside its checkpoints."""
    return RESULTS, *study.PICTURES


def resolve(study: Any, options: argparse.Namespace, stored: dict[str, Any] | None = None) -> "Settings":
    """Settings from the parsed `options`; what was not given comes from the `stored` run, else from the study."""
    defaults = {"epochs": None, "seed": None, "seeds": None, "threads": 1, **study.DEFAULTS}
    values = {}
    for name, default in defaults.items():
        given = getattr(options, name)
        if given is not None and default is None:
            refuse(f"--{name}: got {given!r}, but kdfast study {options.study} has no {name}")
        kept = default if stored is None else stored["settings"][name]
        values[name] = kept if given is None else CHECKS[name](f"--{name}", given)
    return Settings(options.study, **values)


def run(study: Any, options: argparse.Namespace, folder: Path) -> None:
    """Do the steps of the module `study` that are not done yet in `folder`, and show what they found."""
    settings_file = folder / "settings.json"
    names = Settings.__dataclass_fields__
    stored = checks.read(settings_file, names, CHECKS) if options.resume and settings_file.exists() else None
    chosen = resolve(study, options, stored)
    for module in ("rich.console", "matplotlib.figure", "sklearn.datasets"):
        require(module, extra="distill")  # now, so that none is found missing after the work
    data, here = digits.load().fingerprint(), environment()
    with storage.locked(folder):
        if stored is None:
            begin(folder, checks.record(chosen, data, here))
        elif found := checks.differences(stored, chosen, data, here):
            refuse(f"cannot resume {folder}: {'; '.join(found)}; start anew with another --out")
        with reproducible(chosen.threads), warnings.catch_warnings():
            warnings.simplefilter("ignore", kdfast.FallbackWarning)  # `kdfast doctor` says it
            results = _do(study.steps(chosen), folder / "checkpoints")
            findings = study.findings(chosen, results)
        for name, figure in findings.pictures.items():
            storage.write_atomically(folder / name, report.png_bytes(figure))
        titles = list(findings.records[0])
        rows = [[repr(v) if isinstance(v, float) else v for v in record.values()] for record in findings.records]
        storage.write_atomically(folder / RESULTS, report.csv_bytes(titles, rows))
    written = f"written: {', '.join(str(folder / name) for name in files(study))}"
    report.print_table(findings.titles, findings.rows, [*findings.notes, written], findings.sections)


def _do(steps, folder):
    """-> name -> result of every step, from its checkpoint where there is one."""
    results = {}
    with report.Progress(len(steps), "steps") as progress:
        for number, step in enumerate(steps):
            path = folder / f"{step.name.replace(' ', '-')}.pt"
            if not path.exists():
                progress.at(number, step.name)
                storage.save_checkpoint(path, step.work(results, _Share(progress, number, step.name)))
                progress.line(f"[{number + 1}/{len(steps)}] {step.name}")
            # What was stored, in either case: a resumed study computes with nothing else.
            results[step.name] = storage.load_checkpoint(path)
    return results


class _Share:
    """``share(x)`` moves the bar to x of the step with this number."""

    def __init__(self, progress, number, name):
        self.progress = progress
        self.number = number
        self.name = name

    def __call__(self, share):
        self.progress.at(self.number + share, self.name)
