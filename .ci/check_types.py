"""Types as a user's checker sees them: the share of kdfast's public names that have one, and a file that uses them."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEAST = 0.95


def pyright(*arguments):
    # It takes the packages of the first python on the PATH.
    paths = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pyright", *arguments, "--outputjson"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, env={**os.environ, **paths}).stdout)


def main():
    found = pyright("--verifytypes", "kdfast", "--ignoreexternal")["typeCompleteness"]
    share = found["completenessScore"]
    if share < LEAST:
        print(*(x["name"] for x in found["symbols"] if x["isExported"] and not x["isTypeKnown"]), sep="\n")
    wrong = pyright(str(ROOT / "tests/typed_use.py"))["generalDiagnostics"]
    for x in wrong:
        print(f"{x['file']}:{x['range']['start']['line'] + 1}: {x['message']}")
    print(f"{share:.1%} of the public names have a type, expected {LEAST:.0%}")
    return 1 if wrong or share < LEAST else 0


if __name__ == "__main__":
    sys.exit(main())
