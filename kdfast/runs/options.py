"""Options of a program, declared once: each is a field of its Settings, with its default, its check and its help.

Example::

    @dataclass(frozen=True)
    class Settings:
        epochs: int = option("N", "epochs of each training", whole(1), 25)

    add_arguments(parser, Settings)
    chosen = resolve(Settings, parser.parse_args())

A check is a function of (argument, text): it returns the value, or raises a RunError that names the argument.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

from kdfast.runs.errors import RunError

__all__ = ["add_arguments", "add_folder", "declared", "device", "flag", "number", "option", "resolve", "whole"]

T = TypeVar("T")


def option(
    metavar: str | None,
    text: str,
    check: Callable[[str, Any], Any] = lambda argument, text: text,
    default: Any = dataclasses.MISSING,
    *,
    group: str | None = None,
    free: bool = False,
    of_stored: bool = True,
) -> Any:
    """A field of a Settings: an option with a value called `metavar`, or a switch (None), with `text` as its help.

    Without a `default` it has to be given. `free`: it may change when a run is resumed. `of_stored`: its check also
    holds for the settings of a stored run.
    """
    metadata = {"metavar": metavar, "text": text, "check": check, "group": group, "free": free, "of_stored": of_stored}
    return dataclasses.field(default=default, metadata=metadata)


def declared(kind: type) -> list[dataclasses.Field[Any]]:
    """The fields of a Settings that are options."""
    return [field for field in dataclasses.fields(kind) if "check" in field.metadata]


def flag(name: str) -> str:
    """ "batch_size" -> "--batch-size"."""
    return f"--{name.replace('_', '-')}"


def add_arguments(parser: argparse.ArgumentParser, kind: type) -> None:
    """Declare the options of `kind` by their groups; one that is not given is None, so that --resume can tell."""
    groups = {None: parser}
    for field in declared(kind):
        about = field.metadata
        if about["group"] not in groups:
            groups[about["group"]] = parser.add_argument_group(about["group"])
        group, text = groups[about["group"]], about["text"]
        if about["metavar"] is None:
            group.add_argument(flag(field.name), action="store_const", const=True, help=text)
            continue
        if isinstance(field.default, (int, float, str)) and "default: " not in text:
            text = f"{text} (default: {field.default})"
        group.add_argument(flag(field.name), metavar=about["metavar"], help=text)


def add_folder(parser: argparse.ArgumentParser, out: str, default: str) -> None:
    """Declare --out, with the help `out`, and --resume, which without --out takes what `default` says."""
    parser.add_argument("--out", metavar="FOLDER", help=out)
    parser.add_argument(
        "--resume",
        action="store_true",
        help=f"continue the run in --out{default}, with its options; without one, start it if options of it are given",
    )


def resolve(kind: type[T], options: argparse.Namespace, stored: dict[str, Any] | None = None, **known: Any) -> T:
    """The Settings `kind` of the parsed `options`; what was not given comes from the `stored` run, else is `known`.

    `known` has the fields that are no options, and defaults in place of those that are declared.
    """
    values, options_of = dict(known), declared(kind)
    for field in options_of:
        given, default = getattr(options, field.name), known.get(field.name, field.default)
        if given is not None:
            values[field.name] = field.metadata["check"](flag(field.name), given)
        elif stored is not None:
            values[field.name] = stored["settings"][field.name]
        elif default is dataclasses.MISSING:
            needed = ", ".join(flag(f.name) for f in options_of if f.default is dataclasses.MISSING)
            raise RunError(f"{flag(field.name)}: is missing; expected {needed}")
        else:
            values[field.name] = default
    return kind(**values)


# ---- checks ----------------------------------------------------------------------------------------------------------
def whole(minimum: int, maximum: int | None = None) -> Callable[[str, Any], int]:
    """-> check(argument, text) -> int, which refuses anything but a whole number from `minimum` to `maximum`."""
    expected = f"a whole number of at least {minimum}" + (f" and at most {maximum}" if maximum else "")

    def check(argument, text):
        try:
            value = int(str(text))
        except ValueError:
            value = None
        if value is None or value < minimum or (maximum and value > maximum):
            raise RunError(f"{argument}: got {str(text)!r}, expected {expected}")
        return value

    return check


def number(below: float = math.inf, zero: bool = True) -> Callable[[str, Any], float]:
    """-> check(argument, text) -> float, which refuses anything but a number from 0, or above it, to below `below`."""
    expected = f"a number {'of at least' if zero else 'greater than'} 0" + (f" and below {below}" * (below < math.inf))

    def check(argument, text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < below or (value == 0 and not zero):
            raise RunError(f"{argument}: got {text!r}, expected {expected}")
        return value

    return check


def device(argument: str, text: str) -> str:
    """`text` as the name of a device that is there: cpu or cuda."""
    import torch  # here: no help text needs it

    expected = "expected cpu or cuda (or cuda:0, cuda:1, ...)"
    try:
        found = torch.device(text)
    except RuntimeError:
        raise RunError(f"{argument}: got {text!r}, {expected}") from None
    if found.type not in ("cpu", "cuda"):
        raise RunError(f"{argument}: got {text!r}, {expected}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = f"torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices here"
        raise RunError(f"{argument}: got {text!r}, but {count}; expected cpu, or a CUDA device that is there")
    return str(found)
