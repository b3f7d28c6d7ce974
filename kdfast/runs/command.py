"""How a program ends: 0, 2 for a problem the user can solve, 130 for Ctrl-C, 128 + n for another signal n."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdfast._extras import MissingExtra
from kdfast._text import printable
from kdfast.runs.errors import RunError
from kdfast.runs.folder import SETTINGS

__all__ = ["answer"]


def answer(
    command: str, folder: Callable[[], Path], work: Callable[[Path], Any], errors: tuple[type[Exception], ...] = ()
) -> int:
    """``work(folder())`` -> the exit code of `command`, with one line on stderr where it is not 0.

    `errors`: further exceptions whose message is a line for the user.
    """
    found = None
    try:
        found = folder()
        work(found)
        return 0
    except (RunError, MissingExtra, *errors) as error:
        return _fail(command, str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        return _fail(command, f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError as error:
        return _fail(command, f"out of memory{f': {error}' if str(error) else ''}")
    except KeyboardInterrupt as interrupt:
        started = found is not None and (found / SETTINGS).exists()
        hint = f"continue with: {command} --resume --out {found}" if started else "nothing was trained yet"
        print(f"\n{command}: interrupted; {printable(getattr(interrupt, 'hint', None) or hint)}", file=sys.stderr)
        return 128 + getattr(interrupt, "signal", signal.SIGINT)


def _fail(command, message):
    print(f"{command}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2
