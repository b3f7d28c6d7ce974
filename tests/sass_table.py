"""Counts of the machine code: what is kept of them in .ci/sass_counts.json, and what is worse than there.

A point of the table has the ops that it calls, in turn. What is 0 is left out.

Of an op:
    launches, allocations
    per_element  instructions of a lane for each element of the largest argument
    requested    bytes of the sectors of each request, over those of its arguments and results
    traffic      the same with each sector counted once in a launch
Of a kernel:
    warps, barriers, and instructions of warps by class
    loads, stores of global memory: requests, their sectors, different sectors of a launch
    trips        waits for global memory: all, those of the warp with most
    in_flight    bytes of a lane that are on their way at such a wait
    banks        accesses to shared memory, wavefronts lost to conflicts
"""

import json
from pathlib import Path

import torch

TOLERANCE = 0.01  # of the number of instructions, some of which depend on the numbers
SECTOR = 32
MODEL = ("far", "pauses", "clocks")  # only a model of time asks for them
CLASSES = (
    *("fp32", "fp64", "int", "mufu", "convert", "move", "global", "shared", "local", "constant", "warp", "control"),
)


def sizes(values):
    """{address: bytes} of the tensors among arguments or results."""
    found = {}
    for value in values if isinstance(values, (tuple, list)) else [values]:
        if isinstance(value, (tuple, list)):
            found |= sizes(value)
        elif isinstance(value, torch.Tensor) and value.numel():
            found[value.data_ptr()] = min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
    return found


def elements(values):
    """Of the largest tensor."""
    return max((elements(v) if isinstance(v, (tuple, list)) else getattr(v, "numel", int)() for v in values), default=0)


def facts(counts, arguments, result):
    """What the table keeps of an op's call."""
    kernels = counts["kernels"]
    instructions = sum(kernel[name] for kernel in kernels.values() for name in CLASSES)
    asked, touched = (
        SECTOR * sum(kernel[way][i] for kernel in kernels.values() for way in ("loads", "stores")) for i in (1, 2)
    )
    compulsory = max(sum((sizes(arguments) | sizes(result)).values()), 1)
    return {
        "launches": sum(kernel["launches"] for kernel in kernels.values()),
        "allocations": counts["allocations"],
        "per_element": round(32 * instructions / max(elements(arguments), 1), 1),
        "requested": round(asked / compulsory, 3),
        "traffic": round(touched / compulsory, 3),
        "kernels": {
            name: {
                key: value
                for key, value in kernel.items()
                if value and value != [0, 0, 0] and value != [0, 0] and key not in MODEL
            }
            for name, kernel in sorted(kernels.items())
        },
    }


def by_op(calls):
    """{op: facts}; the second call of an op is "op 2"."""
    found = {}
    for name, counts, arguments, result in calls:
        number = sum(key.split()[0] == name for key in found) + 1
        found[f"{name} {number}" if number > 1 else name] = facts(counts, arguments, result)
    return found


# ---- the table
def load(path):
    return json.loads(Path(path).read_text()) if Path(path).exists() else {"nvcc": None, "points": {}}


def save(path, nvcc, points):
    """A line for each op and each kernel."""
    write, blocks = json.dumps, []
    for point, ops in sorted(points.items()):
        lines = []
        for op, found in ops.items():
            kernels = ",\n".join(f"   {write(name)}: {write(kernel)}" for name, kernel in found["kernels"].items())
            head = write({key: value for key, value in found.items() if key != "kernels"})[:-1]
            lines.append(f'  {write(op)}: {head}, "kernels": {{\n{kernels}}}}}')
        blocks.append(f" {write(point)}: {{\n" + ",\n".join(lines) + "}")
    Path(path).write_text(f'{{"nvcc": {write(nvcc)}, "points": {{\n' + ",\n".join(blocks) + "}}\n")


def numbers(tree, path=()):
    """-> {path: number} of nested dicts and lists."""
    if not isinstance(tree, (dict, list)):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {key: number for name, part in items for key, number in numbers(part, (*path, name)).items()}


def compare(found, recorded):
    """What of a point is worse than recorded, and what else is other than recorded."""
    worse, other = [], []
    now, before = numbers(found), numbers(recorded)
    for path in sorted(now.keys() | before.keys(), key=str):
        new, old = now.get(path, 0), before.get(path, 0)
        exact = path[-1] not in (*CLASSES, *MODEL, "per_element")
        if abs(new - old) > (0 if exact else TOLERANCE * old):
            grows = new > old
            better_more = path[-1] == "in_flight"
            text = f"{': '.join(map(str, path))}: {old} -> {new}"
            (worse if grows != better_more else other).append(text)
    return worse, other
