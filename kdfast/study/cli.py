"""The arguments of `kdfast study`; its exit codes are those of `kdfast distill`."""

import argparse
import importlib

__all__ = ["add_arguments", "run"]

STUDIES = {
    "residual": "a plain student without shortcuts learns through a residual teacher",
    "wide": "how much data a soft label saves a wide network, and what a hard label mends",
    "explain": "which pixels a student keeps information of, with and without a teacher",
    "data-free": "images out of a detector and a classifier, and students that learn on them",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `kdfast study`; one that is not given is None, so that --resume can tell."""
    studies = "; ".join(f"{name}: {summary}" for name, summary in STUDIES.items())
    parser.add_argument("study", metavar="STUDY", nargs="?", help=studies)
    parser.add_argument("--epochs", metavar="N", help="epochs of each training")
    parser.add_argument("--seed", metavar="N", help="the first seed (default: 0)")
    parser.add_argument("--seeds", metavar="N", help="number of seeds, counted up from the first")
    parser.add_argument("--threads", metavar="N", help="CPU threads (default: 1; the networks are small)")
    parser.add_argument("--out", metavar="FOLDER", help="where results go (default: a new folder under runs)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the study in --out, or else its newest under runs, after the last step that was done; "
        "where there is none it starts one, if --epochs or the like is given",
    )


def run(options: argparse.Namespace) -> int:
    """Run the study and report; returns the exit code."""
    # Imported here: `kdfast --help` needs none of it.
    from kdfast.distill import pipeline
    from kdfast.distill.cli import answer
    from kdfast.study import run as runner

    if options.study not in STUDIES:
        command, known = "kdfast study", f"expected one of {', '.join(STUDIES)}"
        return answer(command, lambda: runner.refuse(f"STUDY: got {options.study or ''!r}, {known}"), None)
    study = importlib.import_module(f"kdfast.study.{options.study.replace('-', '_')}")
    command = f"kdfast study {options.study}"
    return answer(
        command,
        lambda: pipeline.output_folder(options, command, runner.files(study)),
        lambda folder: runner.run(study, options, folder),
    )
