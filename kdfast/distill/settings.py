"""What a run was asked for: checking the arguments, storing them, and comparing them on --resume."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdfast.distill import DistillError
from kdfast.distill.losses import ROWS

__all__ = ["DEFAULTS", "DIGITS", "Settings", "device", "differences", "read", "record", "resolve", "whole"]

DIGITS = "digits"  # the bundled data, where --data is not given
DEFAULTS: dict[str, Any] = {
    "data": DIGITS,
    "image_size": 32,
    "loss": "kd,dkd,at,ofd,sp,rkd,crd,one",  # one of each kind, so that a first look takes a minute or two
    "epochs": 25,
    "batch_size": 32,
    "seed": 0,
    "seeds": 3,
    "device": "cpu",
    # The networks are small: more threads gain little, and where a core is busy each step waits for the slowest.
    "threads": 1,
}


@dataclass(frozen=True)
class Settings:
    """The checked arguments that decide a run's results; `loss` is the comma-separated list."""

    data: str
    image_size: int
    loss: str
    epochs: int
    batch_size: int
    seed: int
    seeds: int
    device: str
    threads: int

    @property
    def losses(self) -> list[str]:
        """The chosen loss names, in order."""
        return self.loss.split(",")


def resolve(options: argparse.Namespace, stored: dict[str, Any] | None = None) -> "Settings":
    """Settings from the parsed `options`; what was not given comes from the `stored` run's, else from DEFAULTS."""
    defaults = DEFAULTS if stored is None else stored["settings"]
    if options.image_size is not None and options.data is None and defaults["data"] == DIGITS:
        raise DistillError("--image-size: the digits have a size of their own; expected only with --data")
    values = {}
    for name, default in defaults.items():
        given = getattr(options, name)
        values[name] = default if given is None else _CHECKS[name](f"--{name.replace('_', '-')}", given)
    return Settings(**values)


def whole(minimum: int, maximum: int | None = None) -> Callable[..., Any]:
    """-> check(argument, text) -> int, which refuses anything but a whole number from `minimum` to `maximum`."""
    expected = f"a whole number of at least {minimum}" + (f" and at most {maximum}" if maximum else "")

    def check(argument, text):
        try:
            value = int(str(text))
        except ValueError:
            value = None
        if value is None or value < minimum or (maximum and value > maximum):
            raise DistillError(f"{argument}: got {str(text)!r}, expected {expected}")
        return value

    return check


def _losses(argument, text):
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))  # each once, in the given order
    names = list(ROWS) if "all" in names else names
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise DistillError(
            f"{argument}: got {unknown[0]!r}, expected all, or names from {', '.join(ROWS)}, with commas"
        )
    return ",".join(names)


def _path(argument, text):
    if not text:
        raise DistillError(f"{argument}: got '', expected a folder of class folders of images")
    return str(Path(text).resolve())


def device(argument: str, text: str) -> str:
    """`text` as the name of a device that is there: cpu or cuda."""
    import torch

    expected = "expected cpu or cuda (or cuda:0, cuda:1, ...)"
    try:
        device = torch.device(text)
    except RuntimeError:
        raise DistillError(f"{argument}: got {text!r}, {expected}") from None
    if device.type not in ("cpu", "cuda"):
        raise DistillError(f"{argument}: got {text!r}, {expected}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices here"
        raise DistillError(f"{argument}: got {text!r}, but {found}; expected cpu, or a CUDA device that is there")
    return str(device)


_CHECKS = {
    "data": _path,
    # Three stages halve the side twice; 512 keeps a folder of images in memory.
    "image_size": whole(8, 512),
    "loss": _losses,
    "epochs": whole(1),
    "batch_size": whole(2),  # batch normalisation and relations within a batch need two images
    "seed": whole(0),
    "seeds": whole(1),
    "device": device,
    "threads": whole(1, 1024),
}


# ---- the stored run --------------------------------------------------------------------------------------------------
def record(settings: Any, fingerprint: str, environment: dict[str, str]) -> bytes:
    """The bytes of settings.json."""
    content = {"settings": asdict(settings), "data": fingerprint, "environment": environment}
    return (json.dumps(content, indent=2) + "\n").encode()


def read(path: Path, names: dict[str, Any] = DEFAULTS, checks: dict[str, Any] | None = None) -> dict[str, Any]:
    """The dict of a settings.json, whose settings have these `names`, and values that ``checks[name]`` leaves alone."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if set(content["settings"]) != set(names) or not {"data", "environment"} <= set(content):
            raise KeyError("settings")
        for name, check in (_CHECKS if checks is None else checks).items():
            value = content["settings"][name]
            if value is not None and check(f"{path}: {name}", value) != value:
                raise ValueError(name)
        return content
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DistillError(f"{path} is damaged; the run cannot be resumed, train anew with another --out") from error


def differences(stored: dict[str, Any], settings: Any, fingerprint: str, environment: dict[str, str]) -> list[Any]:
    """Sentences that name what differs between a stored run and this one; empty if nothing does."""
    found = [
        f"--{name.replace('_', '-')} was {stored['settings'][name]} and is {value}"
        for name, value in asdict(settings).items()
        if stored["settings"][name] != value
    ]
    if not found and stored["data"] != fingerprint:
        found.append(f"the images of --data {settings.data} have changed")
    for name, value in environment.items():
        was = stored["environment"].get(name)
        if was != value:
            found.append(f"{name} was {was} and is {value}")
    return found
