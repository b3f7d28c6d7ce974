"""What the benchmarks' cases ask of a GPU, forward + backward, counted without one: .ci/benchmark_counts.json.

    python tests/sass_benchmarks.py [FAMILY ...]

records it anew, from the machine code of the kernels (sass_library.py) and from what eager PyTorch dispatches
(benchmarks/work.py); benchmarks/predict.py makes times of it. With the families' names, of these alone.

kdfast's part runs the host code and the kernels at the shapes of the benchmarks. Of each launch BLOCKS blocks run, one
of each of as many equal parts of the grid, and counts are as if all had done the same: so launches, grids and
allocations are exact, and what a block does is the mean of those that ran. The numbers that come out are none.
"""

import contextlib
import importlib
import json
import sys
import time
from pathlib import Path

import sass_library
import sass_table
import torch
from sass_library import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import devices, harness, work
from kdfast import _kernels

TABLE = ROOT / ".ci/benchmark_counts.json"
BLOCKS = 32
FAMILIES = (
    *("attention", "divergence", "feature", "gram", "mixed_logits", "moments", "nce", "ops", "pairwise"),
    *("softmax_kl", "teachers"),
)
# Eager formulas whose sizes depend on numbers: they run. Where that takes too long, a mask chooses everything.
REAL = {"NKD", "VID", "CRD + sampling", "AEKD"}
KEPT = (*sass_table.CLASSES, "launches", "warps", "loads", "stores", "banks", "trips", *sass_table.MODEL)


def cases(family):
    """Those of a GPU with the memory of an H100."""
    limit, harness.memory_limit = harness.memory_limit, lambda device: devices.H100.memory // 2
    try:
        return importlib.import_module(f"benchmarks.bench_{family}").cases(harness.Settings("cuda", False), [])
    finally:
        harness.memory_limit = limit


def eager(case):
    """[[op, bytes, fresh, FLOPs, dtype, how often], ...] of the eager formula; None where it is left out."""
    if "eager" in case.left_out:
        return None
    real = case.loss in REAL
    with contextlib.nullcontext() if real else FakeTensorMode():
        inputs = case.inputs("cpu")
        with work.Recorder(inputs, looks=False, all_of_masks=not real) as recorder:
            case.eager(*inputs).backward()
    return together(recorder.records)


def together(records):
    """The same records once, with how often."""
    counts = {}
    for r in records:
        key = (r["op"], r["bytes"], r.get("fresh", 0), r.get("flops", 0), r.get("dtype", ""))
        counts[key] = counts.get(key, 0) + 1
    return [[*key, count] for key, count in counts.items()]


def kdfast(case, folder, blocks=BLOCKS):
    """-> ops of kdfast with their kernels, and what is dispatched beside them as `eager` has it."""
    emulator, ops = sass_library.library(folder)
    counted = []

    def run(name):
        def call(*arguments):
            result, counts = emulator.counted(ops[name], *arguments)
            counted.append(counts)
            return result

        return call

    def known(arguments, result):
        counts = counted.pop() if counted else {"allocations": 0, "kernels": {}}
        kernels = {k: kept(c) | {"at_once": emulator.blocks_at_once[k]} for k, c in sorted(counts["kernels"].items())}
        return {"allocations": counts["allocations"], "kernels": kernels}

    torch.manual_seed(0)
    inputs = case.inputs("cpu")
    with _kernels.override({name: run(name) for name in ops}, ("CPU",)), emulator.sampled(blocks):
        with work.Recorder(inputs, known, looks=False) as recorder:
            case.kdfast(*inputs).backward()
    ours = [r for r in recorder.records if "kernels" in r]
    return ours, together([r for r in recorder.records if "kernels" not in r])


def kept(counts):
    return {key: counts[key] for key in KEPT if (any(counts[key]) if isinstance(counts[key], list) else counts[key])}


def found(case, folder):
    ops, beside = kdfast(case, folder)
    return {"ops": ops, "beside": beside, "eager": eager(case)}


# ---- the table
def load():
    return json.loads(TABLE.read_text()) if TABLE.exists() else {"nvcc": None, "torch": None, "cases": {}}


def save(cases_):
    """A line for each op and each kernel."""
    write, blocks = json.dumps, []
    for name, case in sorted(cases_.items()):
        lines = []
        for op in case["ops"]:
            kernels = ",\n".join(f"   {write(kernel)}: {write(counts)}" for kernel, counts in op["kernels"].items())
            head = write({key: value for key, value in op.items() if key != "kernels"})[:-1]
            lines.append(f'  {head}, "kernels": {{\n{kernels}}}}}')
        rest = {key: value for key, value in case.items() if key != "ops"}
        head = ",\n".join(f"  {write(key)}: {write(value)}" for key, value in rest.items())
        blocks.append(f' {write(name)}: {{\n{head},\n  "ops": [\n' + ",\n".join(lines) + "]}")
    version = sass_library.tools()[2]
    head = f'"nvcc": {write(version)}, "torch": {write(torch.__version__.split("+")[0])}, "blocks": {BLOCKS}'
    TABLE.write_text(f'{{{head}, "cases": {{\n' + ",\n".join(blocks) + "}}\n")


def name_of(family, case):
    return f"{family}: {case.loss}, {case.shape}, {case.dtype}"


def main(families):
    folder = ROOT / ".pytest_cache/d/simt"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for family in families or FAMILIES:
        table = load()["cases"]
        table = {name: case for name, case in table.items() if not name.startswith(f"{family}: ")}
        for case in cases(family):
            begin = time.monotonic()
            facts = {"family": family, "loss": case.loss, "shape": case.shape, "dtype": case.dtype}
            facts |= {"floor": case.floor["both"], "ceiling": case.ceiling}
            table[name_of(family, case)] = facts | found(case, folder)
            print(f"{name_of(family, case)}: {time.monotonic() - begin:.1f} s", flush=True)
        save(table)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1:])
