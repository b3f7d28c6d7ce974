"""What setup.py decided when this copy was installed; setup.py writes it beside this file as _build.json."""

import json
from pathlib import Path

PATH = Path(__file__).with_name("_build.json")


def read() -> dict:
    """Keys: situation ("python", "cpu" or "cuda"), reason, torch, torch_target, cuda, archs, compiler.

    Empty in a source tree that was never installed.
    """
    return json.loads(PATH.read_text()) if PATH.exists() else {}
