"""Which part of the package may import which: lower ones only, so there is no circle."""

import ast
from pathlib import Path

import kdfast

PACKAGE = Path(kdfast.__file__).parent

# Part -> the parts it may import, which all stand above it here: the library first, then what is built on it. "kdfast"
# is the package's face, whose names are the library's.
GROUND = ("_build_record", "_extras", "_files", "_processor", "_text", "_types", "papers")
OPS = (*GROUND, "_kernels", "ops", "distributed", "capture")
LIBRARY = (*OPS, "losses", "analysis", "procedures", "teacher_store", "_api", "kdfast")
MAY_IMPORT = {
    **dict.fromkeys(GROUND, ()),
    "_kernels": GROUND,
    "ops": (*GROUND, "_kernels"),
    "distributed": (*GROUND, "_kernels", "ops"),
    "capture": GROUND,
    "losses": OPS,
    "analysis": OPS,
    "procedures": (*OPS, "losses", "analysis"),
    "teacher_store": OPS,
    "_api": (*OPS, "losses", "analysis", "procedures"),
    "kdfast": ("_api",),
    "compat": LIBRARY,
    "objectives": LIBRARY,
    "integrations": (*LIBRARY, "objectives"),
    "runs": LIBRARY,
    # The programs know nothing of each other.
    "lab": (*LIBRARY, "objectives", "runs"),
    "training": (*LIBRARY, "objectives", "integrations", "runs"),
    "bench": (*LIBRARY, "runs"),
    "doctor": LIBRARY,
    "listing": LIBRARY,
    "cli": LIBRARY,
    "__main__": ("cli",),
}


def part(name):
    """kdfast.ops.pairwise -> ops; kdfast itself and its own names -> kdfast."""
    own = name.split(".")[1:2]
    exists = own and ((PACKAGE / own[0]).is_dir() or (PACKAGE / f"{own[0]}.py").exists())
    return own[0] if exists else "kdfast"


def imports(path):
    """The parts that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (part(alias.name) for alias in node.names if alias.name.split(".")[0] == "kdfast")
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "kdfast":
            yield from (part(f"{node.module}.{alias.name}") for alias in node.names)


def test_every_part_imports_lower_ones_alone():
    order = list(MAY_IMPORT)
    assert all(order.index(lower) < order.index(name) for name, allowed in MAY_IMPORT.items() for lower in allowed)
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        inside = path.relative_to(PACKAGE)
        if inside.parts[0] == "benchmarks":  # of an installed package
            continue
        name = inside.parts[0].removesuffix(".py").replace("__init__", "kdfast")
        wrong += [f"{inside} imports {other}" for other in {*imports(path)} - {name, *MAY_IMPORT[name]}]
    assert not wrong


def test_a_program_is_found_out(tmp_path):
    """The library cannot import a program, wherever in a function the import stands."""
    path = tmp_path / "kd.py"
    path.write_text(
        "def f():\n    from kdfast.lab import report\n    import kdfast.runs.files\n    from kdfast import KD\n"
    )
    assert {*imports(path)} == {"lab", "runs", "kdfast"}
    assert not {"lab", "runs", "kdfast"} & {*MAY_IMPORT["losses"]}
