"""What a run leaves behind and shows while it trains: two CSV files, TensorBoard's, and a bar or lines.

``train.csv`` has a row for every --log-every steps: ``images_per_second`` of all processes, ``learning_rate``, and the
means of ``loss`` and its parts since the row before. ``epochs.csv`` has a row for every epoch: top-1 and top-5 on the
validation images in percent, and the cross-entropy, of the student and of its moving average.
"""

import contextlib
import csv
import math
import time
from pathlib import Path
from typing import Any

from kdfast._extras import require
from kdfast.runs.errors import RunError
from kdfast.runs.files import write_atomically
from kdfast.runs.progress import Progress
from kdfast.runs.tables import csv_bytes

__all__ = ["FILES", "Log", "Silent"]

FILES = ("train.csv", "epochs.csv")
DIGITS = 6  # of a number in a CSV file, but for the losses


class Log:
    """The log in `folder` of a training of `total` steps, of which `start` are done: later rows are removed."""

    def __init__(self, folder: Path, start: int, total: int, an_epoch: int) -> None:
        self.start = start
        self.total = total
        self.an_epoch = an_epoch
        self.train, self.epochs = (_Rows(folder / name, start) for name in FILES)
        writer = require("torch.utils.tensorboard", extra="train").SummaryWriter
        self.board: Any = writer(str(folder / "tensorboard"), purge_step=start)
        self.progress = Progress(total, "steps", done=start)
        self.clock = time.perf_counter(), start

    def __enter__(self) -> "Log":
        self.progress.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.__exit__(*exception)
        self.board.close()

    def restart_clock(self, step: int) -> None:
        """What comes next is training: a validation or a checkpoint does not count as time of images."""
        self.clock: tuple[float, int] = time.perf_counter(), step

    def steps(self, step: int, batch_size: int, learning_rate: float, losses: dict[str, float]) -> None:
        """`losses`: name -> mean of the steps since the last call, of which `step` is the last."""
        seconds = max(time.perf_counter() - self.clock[0], 1e-9)
        a_step = seconds / (step - self.clock[1])
        self.restart_clock(step)
        speed = batch_size / a_step
        row = {"step": step, "epoch": self._epoch(step), "images_per_second": f"{speed:.{DIGITS}g}"}
        row |= {"learning_rate": repr(learning_rate), **{name: repr(value) for name, value in losses.items()}}
        self.train.write(row)
        for name, value in {"images_per_second": speed, "learning_rate": learning_rate, **losses}.items():
            self.board.add_scalar(f"train/{name}", value, step)
        text = f"epoch {self._epoch(step)}/{self.total // self.an_epoch}, loss {losses['loss']:.4f}"
        self.progress.at(step, f"{text}, {speed:.0f} images/s")
        left = _clock((self.total - step) * a_step)
        self.progress.line(f"{text}, step {step}/{self.total}, {speed:.0f} images/s, {left} to go")

    def epoch(self, step: int, results: dict[str, float]) -> None:
        """`results`: name -> value on the validation images after the epoch that `step` ends."""
        self.epochs.write({"epoch": self._epoch(step), "step": step, **{n: repr(v) for n, v in results.items()}})
        for name, value in results.items():
            self.board.add_scalar(f"validation/{name}", value, step)
        self.board.flush()
        shown = ", ".join(f"{name} {results[name]:.2f} %" for name in results if "top" in name)
        self.progress.say(f"epoch {self._epoch(step)}/{self.total // self.an_epoch}: {shown}")

    def evaluated(self, step: int) -> bool:
        """Whether the epoch that `step` ends has its row."""
        return any(row["step"] == str(step) for row in self.epochs.rows)

    def _epoch(self, step):
        return math.ceil(step / self.an_epoch)


class Silent(contextlib.nullcontext[None]):
    """The log of a process that writes none."""

    def __enter__(self) -> "Silent":
        return self

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


class _Rows:
    """A CSV file that grows by a row at a time; rows of steps after `start` are removed when it is opened."""

    def __init__(self, path, start):
        self.path, self.rows = path, []
        if path.exists():
            with open(path, newline="", errors="replace") as file:
                # A process that was killed may leave a part of a row, or a file system its garbage.
                rows = [row for row in csv.DictReader(line.replace("\0", "?") for line in file) if _is_whole(row)]
            self.rows = [row for row in rows if int(row["step"]) <= start]
            lines = [list(row.values()) for row in self.rows]
            write_atomically(path, csv_bytes(list(self.rows[0]), lines) if self.rows else b"")

    def write(self, row):
        try:
            with open(self.path, "a", newline="") as file:
                rows = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    rows.writerow(row)
                rows.writerow(row.values())
        except OSError as error:
            intact = "the checkpoints are intact, and --resume continues"
            raise RunError(f"cannot write {self.path}: {error.strerror or error}; {intact}") from error
        self.rows.append({name: str(value) for name, value in row.items()})


def _is_whole(row):
    try:
        int(row["step"])
        return all(math.isfinite(float(value)) for value in row.values())
    except (KeyError, TypeError, ValueError):
        return False


def _clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
