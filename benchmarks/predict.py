"""Predicts what the benchmarks' cases take on GPUs that nobody has measured them on, from counts of their work.

    python -m benchmarks.predict

writes benchmarks/results/predicted/DEVICE.json and .md from .ci/benchmark_counts.json, which tests/sass_benchmarks.py
records, and benchmarks/devices.py; docs/generate.py puts what they say into docs/cuda.md. Every number is predicted: no
GPU was used for any.

A kernel takes the longest of

- issue: its warp instructions over what the schedulers issue, or those of a class over what the pipe of the class does,
  or its accesses to shared memory and conflicts;
- L2: bytes of the sectors that its blocks ask of L2 (or that its warps ask of L1) over the rate;
- HBM: bytes over the rate of the memory. The bytes are those of the op's arguments and results. Where these fit into
  L2 together, only what no earlier op of the call has touched comes from HBM; where they do not, a kernel of the op
  that reads them once more reads them from HBM once more;
- latency: rounds of blocks, as many at once as fit. Each takes the round trips of a warp to the memory, to HBM where it
  asks for a sector that the launch has not read before and else to L2, its waits for other units, and the clocks that
  its instructions hold it back, as their encoding says.

An op takes the sum of its kernels, and a launch for each. An operation of PyTorch (benchmarks/work.py) is one kernel,
and takes the longest of HBM, L2 and, of a matrix product, its FLOPs over the rate of the unit that does them.
"""

import json
import math
import statistics
import textwrap
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from . import report
from .devices import BANK_CLOCKS, DEVICES, L1_SECTORS, PIPES, SCHEDULERS, SECTOR

ROOT = Path(__file__).resolve().parent.parent
COUNTS = ROOT / ".ci/benchmark_counts.json"
RESULTS = ROOT / "benchmarks/results/predicted"
WARPS = 8  # of a block; kernels of one warp are the exception
CLASSES = (*PIPES, "move", "global", "shared", "local", "constant", "control")
GATHERS = {"nce", "nce_log_sums"}  # read rows of a table, as often as they are drawn
FIGURE = report.FIGURE
OVER = ("eager", "eager TF32")
BOUNDS = ("launch", "issue", "L2", "HBM", "latency", "matmul")


def main():
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def files():
    """{path: text} of what is generated."""
    counts, found = json.loads(COUNTS.read_text()), {}
    for name, device in DEVICES.items():
        results = predict(counts, device)
        found[RESULTS / f"{name}.json"] = as_json(results)
        found[RESULTS / f"{name}.md"] = markdown(results)
    return found


# ---- one kernel, one op ----------------------------------------------------------------------------------------------
def kernel_seconds(counts, hbm_bytes, device):
    """{bound: seconds} of one kernel of an op; of several launches, all of them."""
    launches, warps = counts["launches"], counts["warps"]
    blocks = max(warps / WARPS, launches)  # of all launches
    used = min(device.multiprocessors, blocks / launches)  # multiprocessors
    instructions = sum(counts.get(name, 0) for name in CLASSES)
    loads, stores, banks = (counts.get(key, (0, 0, 0)) for key in ("loads", "stores", "banks"))
    clocks = max(
        instructions / (SCHEDULERS * device.issued),
        *(counts.get(name, 0) * pipe / SCHEDULERS for name, pipe in PIPES.items()),
        (banks[0] + banks[1]) * BANK_CLOCKS,
    )
    trips, most = counts.get("trips", (0, 0))
    rounds = blocks / launches / (device.multiprocessors * counts["at_once"])
    far = counts.get("far", 0) / max(trips, 1) if hbm_bytes else 0.0
    wait = far * device.hbm_clocks + (1 - far) * device.l2_clocks
    wave = (most if rounds <= 1 else trips / warps) * wait
    wave += (counts["clocks"] + counts.get("pauses", 0) * device.near_clocks) / warps
    l1 = (loads[1] + stores[1]) / (L1_SECTORS * used * device.clock)
    return {
        "issue": clocks / (used * device.clock),
        "L2": max(l1, SECTOR * (loads[2] + stores[1]) / device.l2_rate),
        "HBM": hbm_bytes / (device.reached * device.hbm),
        "latency": launches * max(rounds, 1) * wave / device.clock,
    }


def hbm_bytes(op, device):
    """Of each kernel of an op, in turn."""
    touched = [SECTOR * sum(c.get(way, (0, 0, 0))[2] for way in ("loads", "stores")) for c in op["kernels"].values()]
    total = sum(touched)
    if op["op"] in GATHERS:
        bytes_ = total if op["bytes"] > device.l2 else min(op.get("fresh", 0), total)
    elif op["bytes"] <= device.l2:
        bytes_ = op.get("fresh", 0)
    else:
        bytes_ = max(op["bytes"], sum(min(t, op["bytes"]) for t in touched))
    return [bytes_ * t / max(total, 1) for t in touched]


def add(to, parts, launches, device, times=1):
    """Adds a kernel's time to {bound: seconds}: that of the longest of its parts, and its launches."""
    bound = max(parts, key=parts.get)
    to[bound] += times * parts[bound]
    to["launch"] += times * launches * device.launch


def torch_seconds(records, device, tf32=False):
    """-> {bound: seconds}, launches of operations of PyTorch."""
    total, launches = Counter(), 0
    for _, bytes_, fresh, flops, dtype, times in records:
        hbm = bytes_ if bytes_ > device.l2 else fresh
        parts = {"HBM": hbm / (device.reached * device.hbm), "L2": bytes_ / device.l2_rate}
        if flops:
            parts["matmul"] = flops / device.product_rate(dtype, tf32)
        add(total, parts, 1, device, times)
        launches += times
    return total, launches


def kdfast_seconds(case, device):
    """-> {bound: seconds}, launches of kdfast's ops and of what is beside them."""
    total, launches = torch_seconds(case["beside"], device)
    for op in case["ops"]:
        for counts, bytes_ in zip(op["kernels"].values(), hbm_bytes(op, device), strict=True):
            add(total, kernel_seconds(counts, bytes_, device), counts["launches"], device)
            launches += counts["launches"]
    return total, launches


# ---- all cases -------------------------------------------------------------------------------------------------------
def predict(counts, device):
    rows = []
    for case in counts["cases"].values():
        row = {key: case[key] for key in ("family", "loss", "shape", "dtype")} | {"phase": "both"}
        ours, launches = kdfast_seconds(case, device)
        row["kdfast"] = described(ours, launches)
        row["kdfast"]["allocations"] = sum(op["allocations"] for op in case["ops"])
        for name, tf32 in (("eager", False), ("eager TF32", True)):
            if case["eager"] is None:
                continue
            row[name] = described(*torch_seconds(case["eager"], device, tf32))
            row[f"x {name}"] = rounded(row[name]["seconds"] / row["kdfast"]["seconds"])
        rows.append(row)
    return {
        "predicted": "every number; no GPU was used",
        "device": asdict(device),
        "counted with": {key: counts[key] for key in ("nvcc", "torch", "blocks")},
        "rows": rows,
    }


def described(parts, launches):
    seconds = sum(parts.values())
    bound = max(BOUNDS, key=lambda name: parts[name])
    share = {name: rounded(parts[name]) for name in BOUNDS if parts[name]}
    return {"seconds": rounded(seconds), "bound": bound, "launches": launches, "parts": share}


def rounded(x, digits=4):
    """To so many digits, so that no last bit decides whether a file is up to date."""
    return float(f"{x:.{digits}g}")


def slower(results, over):
    """Rows that are predicted slower than eager PyTorch, the worst first."""
    return sorted((row for row in results["rows"] if row.get(f"x {over}", 1) < 1), key=lambda row: row[f"x {over}"])


# ---- texts -----------------------------------------------------------------------------------------------------------
def as_json(results):
    rows = ",\n".join(f"  {json.dumps(row)}" for row in results["rows"])
    head = json.dumps({key: value for key, value in results.items() if key != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def shape_of(row):
    return row["shape"] + report.SHORT_DTYPES.get(row["dtype"], f" {row['dtype']}")


def microseconds(figure):
    return report.significant(figure["seconds"] * 1e6) if figure else "-"


def table(rows):
    lines = [["loss", "shape", "kdfast, us", "bound", "launches", "eager, us", "launches", "x eager", "x eager TF32"]]
    for row in rows:
        eager = row.get("eager")
        ratios = [report.number(row.get(key), "{:.2f}") for key in ("x eager", "x eager TF32")]
        ours = row["kdfast"]
        cells = [microseconds(ours), ours["bound"], str(ours["launches"]), microseconds(eager)]
        lines.append([row["loss"], shape_of(row), *cells, str(eager["launches"]) if eager else "-", *ratios])
    return report.markdown_table(lines, 2)


WORDS = """\
**Predicted**, every number: no GPU was used for any. Forward + backward on {name}, float32 unless the shape says
otherwise: microseconds of kdfast's kernels, what bounds most of that time, and launches; the same of eager PyTorch; how
many times less kdfast takes than eager PyTorch with products in float32, and in TF32. `benchmarks/predict.py` says what
the model is, `benchmarks/devices.py` what it takes the device for. It is good for orders of magnitude: where it says
1/2 to 2, either may be faster. What the host does, and `torch.compile`, are not in it."""


def markdown(results):
    name = results["device"]["name"]
    parts = [f"# Predicted for {name}", WORDS.format(name=name)]
    for over, words in (("eager", "float32"), ("eager TF32", "TF32")):
        rows = slower(results, over)
        parts += [f"## Predicted slower than eager PyTorch with products in {words}"]
        parts += [table(rows) if rows else "None of those below."]
    families = list(dict.fromkeys(row["family"] for row in results["rows"]))
    for family in families:
        parts += [f"## {family}, predicted", table([row for row in results["rows"] if row["family"] == family])]
    return "\n\n".join(parts) + "\n"


def summary():
    """The part of docs/cuda.md: how many cases, and all that are predicted slower than eager PyTorch on any device."""
    predicted = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in DEVICES}
    lines, ratios, heading = [], {}, ["predicted slower", "shape"]
    for name, results in predicted.items():
        device, known = results["device"]["name"], sorted(r["x eager"] for r in results["rows"] if "x eager" in r)
        words = (
            f"- [{device}](../benchmarks/results/predicted/{name}.md), predicted: eager PyTorch takes {known[0]:.2f} "
            f"to {known[-1]:.0f} times as long as kdfast in {len(known)} cases, median {statistics.median(known):.1f}. "
            f"{len(slower(results, 'eager'))} are predicted slower than eager PyTorch, "
            f"{len(slower(results, 'eager TF32'))} where its products are in TF32."
        )
        lines.append(textwrap.fill(words, 118, subsequent_indent="  ", break_on_hyphens=False))
        for over in OVER:
            heading.append(f"x {over}, {device}")
            for row in results["rows"]:
                ratios.setdefault((row["loss"], shape_of(row)), []).append(row.get(f"x {over}", math.inf))
    worst = sorted((key for key in ratios if min(ratios[key]) < 1), key=lambda key: min(ratios[key]))
    rows = [[*key, *(f"{x:.2f}" for x in ratios[key])] for key in worst]
    return "\n".join(lines) + "\n\n" + report.markdown_table([heading, *rows], 2)


# ---- beside what was measured ----------------------------------------------------------------------------------------
def of_device(name):
    """{what FIGURE tells: predicted seconds} on the device that a name means; {} where it is none of them."""
    key = "h200" if "H200" in name else "h100-sxm" if "H100" in name and "PCIe" not in name else None
    path = RESULTS / f"{key}.json"
    if key is None or not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {
        tuple({**row, "implementation": name}[key] for key in FIGURE): row[name]["seconds"]
        for row in rows
        for name in ("kdfast", "eager")
        if name in row
    }


def compared(results):
    """Measured figures of a family's results beside predicted ones, with the logarithm of their ratio."""
    known, found = of_device(results["machine"]["device"]), []
    for figure in results["figures"]:
        key = tuple(figure[name] for name in FIGURE)
        if key in known:
            what = dict(zip(FIGURE, key, strict=True))
            error = rounded(math.log(figure["median"] / known[key]))
            found.append({**what, "measured": figure["median"], "predicted": known[key], "log_ratio": error})
    return found


def compared_rows(errors):
    """As a table: measured over predicted."""
    rows = [["loss", "shape", "", "measured, us", "predicted, us", "measured / predicted"]]
    for e in errors:
        cells = [report.significant(e[key] * 1e6) for key in ("measured", "predicted")]
        rows.append([e["loss"], shape_of(e), e["implementation"], *cells, f"{math.exp(e['log_ratio']):.2f}"])
    return rows


if __name__ == "__main__":
    main()
