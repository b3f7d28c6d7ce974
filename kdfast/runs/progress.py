"""How far a program is: a bar on a terminal, lines elsewhere."""

from typing import Any

from kdfast._extras import require
from kdfast._text import printable

__all__ = ["Progress"]


class Progress:
    """A bar on a terminal, and lines where the output is a file or a pipe: `done` of `total` `unit` so far.

    It goes to stderr, so that stdout holds the table alone.
    """

    def __init__(self, total: int, unit: str, done: int = 0) -> None:
        self.total = total
        self.done = done
        self.console: Any = require("rich.console", extra="compare").Console(stderr=True, highlight=False)
        self.bar: Any = None
        if self.console.is_terminal:
            progress = require("rich.progress", extra="compare")
            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=None),
                progress.TextColumn("{task.fields[done]}/{task.total} " + unit),
                progress.TimeRemainingColumn(),
            )
            self.bar = progress.Progress(*columns, console=self.console, transient=True)

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
            self.task: Any = self.bar.add_task("starting", total=self.total, completed=self.done, done=self.done)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.bar:
            self.bar.stop()

    def at(self, completed: float, description: str) -> None:
        """Move the bar."""
        if self.bar:
            self.bar.update(self.task, completed=completed, done=int(completed), description=description)

    def line(self, text: str) -> None:
        """What stands in place of a bar."""
        if not self.bar:
            self.say(text)

    def say(self, text: str) -> None:
        """A line above the bar, if there is one."""
        self.console.print(printable(text), markup=False, soft_wrap=True)
