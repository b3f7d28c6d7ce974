"""The arguments of `kdfast distill`, and its exit codes: 0, 2 for a problem the user can solve, 130 for Ctrl-C.

With ``--student`` the run is that of `kdfast.imagenet`, which also stops on a SIGTERM, with 143.
"""

import argparse
import signal
import sys
from collections.abc import Callable
from typing import Any

from kdfast._extras import MissingExtra
from kdfast._text import printable
from kdfast.distill import DistillError
from kdfast.distill.losses import ROWS
from kdfast.distill.settings import DEFAULTS
from kdfast.imagenet import settings as imagenet

__all__ = ["add_arguments", "answer", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `kdfast distill`; one that is not given is None, so that --resume can tell."""
    losses = "; ".join(f"{row.name}: {row.summary}" for row in ROWS.values())

    def default(name):
        of_timm = imagenet.DEFAULTS[name] or {"image_size": "the model's", "device": "cuda if there is one"}[name]
        return f"default: {DEFAULTS[name]}; of timm models: {of_timm}"

    def add(name, metavar, text):
        parser.add_argument(name, metavar=metavar, help=text)

    add("--data", "PATH", "class folders of images, or train/ and test/ (or val/) of them (default: the digits)")
    add("--image-size", "N", f"side to which the images of --data are resized ({default('image_size')})")
    add("--loss", "A,B,...", f"losses to compare, or all (default: {DEFAULTS['loss']}). {losses}")
    add("--epochs", "N", f"epochs of each training ({default('epochs')})")
    add("--batch-size", "N", f"images a step ({default('batch_size')})")
    add("--seed", "N", f"the first seed (default: {DEFAULTS['seed']})")
    add("--seeds", "N", f"number of seeds, counted up from the first (default: {DEFAULTS['seeds']})")
    add("--device", "NAME", f"cpu or cuda ({default('device')})")
    add("--threads", "N", f"CPU threads (default: {DEFAULTS['threads']}; the networks are small)")
    add("--out", "FOLDER", "where results and checkpoints go (default: a new folder under runs)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out, or without --out the newest under runs, from its last epoch; options that are "
        "not given are those of the run; where there is none it starts one, if options of it are given",
    )
    imagenet.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Train, compare and report as `options` say; returns the exit code."""
    # Imported here: `kdfast --help` needs none of it.
    from kdfast.distill import pipeline

    if imagenet.asked_for(options):
        from kdfast.imagenet import command

        return command.run(options)

    def folder():
        folder = pipeline.output_folder(options)
        imagenet.refuse(options, imagenet.OWN, "is for timm models; expected with --student and --teacher")
        return folder

    return answer(pipeline.COMMAND, folder, lambda folder: pipeline.distill(options, folder))


def answer(command: str, output_folder: Callable[..., Any], work: Callable[..., Any] | None) -> int:
    """``work(output_folder())`` -> the exit code of `command`, with one line on stderr where it is not 0."""
    folder = None
    try:
        folder = output_folder()
        work(folder)
        return 0
    except (DistillError, MissingExtra) as error:
        return _fail(command, str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        return _fail(command, f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError as error:
        return _fail(command, f"out of memory{f': {error}' if str(error) else ''}")
    except KeyboardInterrupt as interrupt:
        started = folder is not None and (folder / "settings.json").exists()
        hint = f"continue with: {command} --resume --out {folder}" if started else "nothing was trained yet"
        print(f"\n{command}: interrupted; {printable(getattr(interrupt, 'hint', None) or hint)}", file=sys.stderr)
        return 128 + getattr(interrupt, "signal", signal.SIGINT)


def _fail(command, message):
    print(f"{command}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2
