"""Results as a table on stdout, as CSV and as PNG."""

import csv
import io
import statistics
from typing import Any

from kdfast._extras import require
from kdfast._text import printable

__all__ = ["csv_bytes", "mean_and_spread", "png_bytes", "print_table"]


def print_table(
    titles: list[str], rows: list[list[str]], notes: list[Any], sections: list[Any] | tuple[Any, ...] = ()
) -> None:
    """Print rows of text, numbers to the right, and the lines `notes` below them, to stdout.

    A line is drawn below the rows whose first cell is in `sections`.
    """
    console = require("rich.console", extra="compare").Console(highlight=False)
    box = require("rich.box", extra="compare").SIMPLE_HEAD
    # Without edges, two numbers above 100 ms still fit into 80 columns.
    table = require("rich.table", extra="compare").Table(box=box, show_edge=False, pad_edge=False)
    table.add_column(titles[0], no_wrap=True)
    for title in titles[1:]:
        table.add_column(title, justify="right")
    for row in rows:
        cells = (cell.replace("±", "+-") if console.options.ascii_only else cell for cell in row)
        table.add_row(*cells, end_section=row[0] in sections)
    wide = console.options.update(width=1000)
    console.width = max(console.width, console.measure(table, options=wide).maximum)  # else a narrow terminal's is cut
    console.print(table)
    console.print()
    for note in notes:
        console.print(printable(note), markup=False, soft_wrap=True)


def mean_and_spread(values: list[float], digits: int = 2) -> str:
    """The mean of `values` and, of more than one, their standard deviation, as text."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def csv_bytes(header: list[str], rows: list[list[str]]) -> bytes:
    """A CSV file of these rows."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    return buffer.getvalue().encode()


def png_bytes(figure: Any) -> bytes:
    """A PNG file of this figure."""
    require("matplotlib.backends.backend_agg", extra="compare").FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
