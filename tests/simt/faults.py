"""Runs every kernel of faults.cu, each in a process of its own, for some may end it; prints what became of each.

Usage: faults.py LIBRARY SEED ...
Prints a line of JSON for each kernel, with and without its fault, and seed: name, fault, seed, outcome, text. The
outcome is "right", "wrong" (numbers), "raised" (an exception) or "died".
"""

import json
import os
import sys
import tempfile

import torch


def attempt(run, name, fault, x):
    try:
        y = run(name, fault, x)
    except RuntimeError as error:
        return "raised", str(error)
    return ("right" if torch.allclose(y, 2 * x) else "wrong"), str(y.tolist())


def in_child(*call):
    with tempfile.TemporaryFile("w+") as result, tempfile.TemporaryFile("w+") as stderr:
        child = os.fork()
        if child == 0:
            os.dup2(stderr.fileno(), 2)
            json.dump(attempt(*call), result)
            result.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        result.seek(0)
        stderr.seek(0)
        return json.load(result) if status == 0 else ("died", stderr.read())


def main(library, *seeds):
    torch.ops.load_library(library)
    ops = torch.ops.kdfast_faults
    for name in ops.names().split():
        x = torch.arange(1, ops.threads(name) + 1, dtype=torch.float32)
        for fault in (False, True):
            for seed in seeds:
                os.environ["KDFAST_SIMT_SEED"] = seed
                outcome, text = in_child(ops.run, name, fault, x)
                print(json.dumps(dict(name=name, fault=fault, seed=seed, outcome=outcome, text=text)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
