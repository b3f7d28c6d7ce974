"""What a run shows and leaves behind: progress, the table, two CSV files and the PNG of the curves.

``results.csv`` has one row per (loss, seed): ``accuracy_percent`` after the last epoch, the times of `timing.measure`
in milliseconds, and ``path``. ``history.csv`` has one row per (loss, seed, epoch): ``training_loss`` (mean over the
epoch's steps; the losses' scales differ) and ``accuracy_percent`` on the test set. The losses ``teacher`` and
``student`` are the teacher and the student trained alone.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdfast._extras import require
from kdfast._text import printable
from kdfast.runs.files import write_atomically
from kdfast.runs.progress import Progress
from kdfast.runs.tables import csv_bytes, mean_and_spread, png_bytes, print_table

if TYPE_CHECKING:
    from kdfast.lab.trainer import Training


__all__ = ["FILES", "LABELS", "Result", "TrainingProgress", "write_files", "write_table"]

FILES = ("results.csv", "history.csv", "curves.png")
TIMES = ("step_ms", "objective_ms", "loss_ms", "fallback_ms")
LABELS = {"student": "student alone"}  # how a training's name reads in the table and the plot, where it differs


@dataclass(frozen=True)
class Result:
    """One finished training: its name, seed, history of (training loss, accuracy) and `timing.measure`'s times."""

    name: str
    seed: int
    history: list[tuple[Any, ...]]
    times: dict[str, Any]

    @property
    def accuracy(self) -> float:
        """Test accuracy in percent after the last epoch; never the best one, which would be chosen on the test set."""
        return self.history[-1][1]


def by_name(results: "list[Result]") -> dict[str, Any]:
    """Name -> its results over the seeds, in the order of training."""
    groups = {}
    for result in results:
        groups.setdefault(result.name, []).append(result)
    return groups


# ---- progress --------------------------------------------------------------------------------------------------------
class TrainingProgress(Progress):
    """Of `trainings`, of `epochs` together."""

    def __init__(self, trainings: int, epochs: int) -> None:
        super().__init__(epochs, "epochs")
        self.trainings = trainings
        self.finished = self.behind = 0  # trainings, and their epochs

    def epoch(self, training: "Training", done: int) -> None:
        """`training` has `done` epochs behind it."""
        self.at(self.behind + done, f"{LABELS.get(training.name, training.name)}, seed {training.seed}")

    def finish(self, result: "Result", epochs: int) -> None:
        """One training, of so many epochs, is finished."""
        self.finished += 1
        self.behind += epochs
        label = LABELS.get(result.name, result.name)
        self.line(f"[{self.finished}/{self.trainings}] {label}, seed {result.seed}: {result.accuracy:.2f} %")


# ---- the table -------------------------------------------------------------------------------------------------------
def write_table(results: "list[Result]", notes: list[Any]) -> None:
    """Print the table, one row per loss, and the lines `notes` below it, to stdout."""
    rows = [[LABELS.get(name, name), *_cells(group)] for name, group in by_name(results).items()]
    titles = ["loss", "accuracy %", "ms a step", "in the loss", "fused : fallback ms"]
    print_table(titles, rows, notes, sections=[LABELS["student"]])


def _cells(group):
    step, objective, loss, fallback = (_median(group, key) for key in TIMES)
    path = group[0].times["path"]
    fused = f"{loss:.2f} : {fallback:.2f} ({fallback / loss:.1f}x)" if path == "kernel" else _NOT_FUSED[path]
    accuracy = mean_and_spread([result.accuracy for result in group])
    return accuracy, f"{step:.2f}", f"{100 * objective / step:.0f} %", fused


_NOT_FUSED = {"fallback": "fallback", "torch": "-"}


def _median(group, key):
    values = [result.times[key] for result in group if result.times[key] is not None]
    return statistics.median(values) if values else None


# ---- files -----------------------------------------------------------------------------------------------------------
def write_files(folder: Path, results: "list[Result]", title: str) -> None:
    """Write `FILES` into `folder`."""
    write_atomically(folder / "results.csv", _results_csv(results))
    write_atomically(folder / "history.csv", _history_csv(results))
    write_atomically(folder / "curves.png", _curves_png(results, title))


def _results_csv(results):
    rows = []
    for result in results:
        measured = ["" if result.times[key] is None else f"{result.times[key]:.4f}" for key in TIMES]
        rows.append([result.name, result.seed, repr(result.accuracy), *measured, result.times["path"]])
    return csv_bytes(["loss", "seed", "accuracy_percent", *TIMES, "path"], rows)


def _history_csv(results):
    rows = [
        [result.name, result.seed, epoch, repr(training_loss), repr(accuracy)]
        for result in results
        for epoch, (training_loss, accuracy) in enumerate(result.history, start=1)
    ]
    return csv_bytes(["loss", "seed", "epoch", "training_loss", "accuracy_percent"], rows)


# ---- curves ----------------------------------------------------------------------------------------------------------
COLOURS = {"teacher": "#555555", "student": "#d95f02"}
HIGHLIGHT = "#1f77b4"


def _curves_png(results, title):
    """Test accuracy by epoch: one panel per loss, each beside the teacher and the student alone.

    Ten lines in one panel would cover each other: the losses end within one percent.
    """
    figure_class = require("matplotlib.figure", extra="compare").Figure
    groups = by_name(results)
    names = [name for name in groups if name not in COLOURS]
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    figure = figure_class(figsize=(max(3.1 * columns, 5.0), 2.6 * rows + 0.9), dpi=150, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel, name in zip(panels.flat, names, strict=False):
        for shown, colour in (*COLOURS.items(), (name, HIGHLIGHT)):
            _draw(panel, groups[shown], colour)
        panel.set_title(name, fontsize=11)
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    panels[0, 0].set_ylim(*_limits(results))
    panels[0, 0].xaxis.get_major_locator().set_params(integer=True)
    for panel in panels[-1]:
        panel.set_xlabel("epoch")
    figure.supylabel("test accuracy (%)")
    seeds = len(groups["student"])
    band = f", mean and range of {seeds} seeds" if seeds > 1 else ""
    figure.suptitle(printable(f"{title}{band}"))
    lines = panels[0, 0].get_lines()
    figure.legend(lines[:3], ["teacher", "student alone", "student with the loss"], loc="outside lower center", ncols=3)
    return png_bytes(figure)


def _draw(panel, group, colour):
    curves = [[accuracy for _, accuracy in result.history] for result in group]
    epochs = range(1, len(curves[0]) + 1)
    columns = list(zip(*curves, strict=True))
    marker = "o" if len(columns) == 1 else None  # a line of one point is invisible
    panel.plot(epochs, [statistics.mean(column) for column in columns], color=colour, linewidth=1.6, marker=marker)
    low, high = [min(column) for column in columns], [max(column) for column in columns]
    panel.fill_between(epochs, low, high, color=colour, alpha=0.18, linewidth=0)


def _limits(results):
    """The accuracies from a quarter of the training on; the first epochs would press the rest together."""
    late = [accuracy for result in results for _, accuracy in result.history[len(result.history) // 4 :]]
    low, high = min(late), max(late)
    margin = max(0.05 * (high - low), 0.5)
    return low - margin, min(high + margin, 100 + margin)
