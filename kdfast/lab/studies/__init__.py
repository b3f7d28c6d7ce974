"""`kdfast study`: methods that are more than a loss, each run to its result on small data.

``cli`` (arguments), ``run`` (the steps of a study in a folder, each done once), ``digits`` (what the studies train on),
and one module per study, which has

- ``DEFAULTS``: the options it has, of ``epochs``, ``seed`` and ``seeds``, and ``PICTURES``, the files it draws;
- ``steps(settings)``: what is computed, as :class:`Step` in their order;
- ``findings(settings, results)``: the table and the pictures, from the results of all steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["Findings", "Step"]


class Step(NamedTuple):
    """``work(results, progress)`` gives a dict for a checkpoint; it is called once in a run, however often stopped.

    `results` has those of the steps before, by name; ``progress(share)`` says how much of the work is done.
    """

    name: str
    work: Callable[[dict, Callable[[float], None]], dict]


@dataclass(frozen=True)
class Findings:
    """What a study shows: a table of text, lines below it, the rows of results.csv, and figures by file name.

    A line is drawn below the rows whose first cell is in `sections`.
    """

    titles: list[str]
    rows: list[list[str]]
    records: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    pictures: dict[str, Any] = field(default_factory=dict)
    sections: list[str] = field(default_factory=list)
