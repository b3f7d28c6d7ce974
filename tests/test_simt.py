"""The harness that runs CUDA kernels on the CPU: what it computes, the faults it finds, and all kernels under it."""

import functools
import json
import operator
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import registry
import simt_library
import torch
from conftest import built_by_simt, simt_folder

SEEDS = ("0", "1", "2")
RACE = (
    r"race: thread \d+ (reads|writes) byte \d+ of shared `tile`\n  at .*{name}.*"
    r"after thread \d+ (read|wrote) it\n  at .*{name}.*\n  with no barrier in between"
)
UNINITIALISED = r"reads byte \d+ of shared `tile`, which nothing has written\n  at .*{name}"

# The SIMT tests that touch memory in ways of their own, not those that repeat the calls of others.
REPEATED = (
    *("gradcheck", "opcheck", "compile", "settings_change_nothing", "deterministic", "transforms", "double_backward"),
    *("upstream_gradients", "gradient_paths", "inplace_change", "nan_is_seen", "equal_networks"),
)
CONTRACT = [str(path) for path in sorted((simt_library.ROOT / "tests").glob("test_ops_*.py"))]

# Kernel of faults.cu -> variant -> what it says of the fault, at every seed. `{name}` is the kernel's.
CAUGHT = {
    # ---- memory
    "reads_global_out_of_bounds": {"address": "heap-buffer-overflow.*READ of size 4.*{name}"},
    "writes_global_out_of_bounds": {"address": "heap-buffer-overflow.*WRITE of size 4.*{name}"},
    "reads_shared_out_of_bounds": {"address": "heap-buffer-overflow.*READ of size 4.*{name}"},
    "writes_dynamic_shared_out_of_bounds": {"address": "heap-buffer-overflow.*WRITE of size 4.*{name}"},
    "misaligned_vector": {"address": "misaligned address .* for type 'const struct float2'.*{name}"},
    "uninitialised_shared": {
        "races": "thread 0 .*" + UNINITIALISED,
        "plain": r"^\[nan, 4.0, ",
    },
    "unwritten_output": {variant: r"126.0, nan\]$" for variant in simt_library.VARIANTS},
    # ---- races
    "missing_barrier": {"races": RACE + "|" + UNINITIALISED, "plain": "nan"},
    "missing_barrier_before_reuse": {"races": RACE, "plain": r"^\["},
    "missing_barrier_around_structs": {"races": RACE, "plain": r"^\["},
    "missing_syncwarp": {"races": RACE + "|" + UNINITIALISED, "plain": "nan"},
    "missing_atomic": {"races": "race: thread .* of shared `count`"},
    "blocks_overlap": {"races": "race: thread (.*) writes global memory.*after thread .* of another block wrote it"},
    # ---- barriers and collectives
    "different_barriers": {
        "plain": "the block waits at different barriers:\n  threads 0 to 31 .*\n  threads 32 to 63 "
    },
    "mask_names_absent_lanes": {"plain": "names lanes that are not there, in a warp of 8:.*of lanes 0xffffffff"},
    "mask_leaves_caller_out": {"plain": "mask leaves it out:.*__shfl_xor_sync of lanes 0xfffffffe"},
    "masks_differ": {"plain": "lanes that name each other call different collectives:.*of lanes 0xff,"},
    "collectives_differ": {"plain": "lanes that name each other call different collectives:.*__ballot_sync"},
    "named_lane_does_something_else": {"plain": "no thread can go on:.*__syncthreads.*__syncwarp of lanes 0xffffffff"},
    "reads_exited_lane": {"plain": r"__shfl_sync reads lane \d+, which takes no part in it"},
}


@pytest.fixture(scope="module")
def folder(request):
    return simt_folder(request.config)


def build(folder, name, sources, variant):
    sources = [simt_library.ROOT / "tests/simt" / source for source in sources]
    return built_by_simt(simt_library.build, folder, name, sources, variant)


def environment(variant, **extra):
    env = simt_library.sanitized() if variant == "address" else {**os.environ, "KDFAST_SIMT": variant}
    return {**env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **extra}


@functools.lru_cache
def outcomes(folder, variant):
    """(kernel, fault) -> what became of faults.cu's kernel, seed by seed."""
    library = build(folder, "faults", ["faults.cu"], variant)
    seeds = SEEDS[:1] if variant == "address" else SEEDS  # a death takes a second, and needs no luck
    command = [sys.executable, str(simt_library.ROOT / "tests/simt/faults.py"), str(library), *seeds]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(variant))
    assert done.returncode == 0, done.stderr
    found = {}
    for line in map(json.loads, done.stdout.splitlines()):
        found.setdefault((line["name"], line["fault"]), []).append((line["outcome"], line["text"]))
    return found


# ---- faults ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("variant", "name"),
    [(variant, name) for variant in simt_library.VARIANTS for name in CAUGHT if variant in CAUGHT[name]],
)
def test_fault_is_caught(folder, variant, name):
    for outcome, text in outcomes(folder, variant)[name, True]:
        assert outcome != "right", "it was not noticed"
        assert re.search(CAUGHT[name][variant].format(name=name), text, re.DOTALL), f"{outcome}: {text}"
        if outcome == "raised":
            assert re.search(rf"in block \d+ with seed \d+ of .*{name}", text), text


@pytest.mark.parametrize("variant", simt_library.VARIANTS)
def test_no_fault_no_alarm(folder, variant):
    found = outcomes(folder, variant)
    assert {name for name, _ in found} == CAUGHT.keys()
    for (name, fault), results in found.items():
        assert fault or all(outcome == "right" for outcome, _ in results), (name, results)


# ---- device functions ------------------------------------------------------------------------------------------------
def test_intrinsics(folder):
    """Against their definitions in the CUDA C++ Programming Guide."""
    torch.ops.load_library(str(build(folder, "intrinsics", ["intrinsics.cu"], "races")))
    x = torch.randint(-50, 50, (32,), dtype=torch.int32)
    counters = torch.tensor([0, 0, 0, 99, 0, 0, -1, 0, 0, 0], dtype=torch.int32)
    y, _ = torch.ops.kdfast_intrinsics.run(x, counters)
    v, lanes = x.tolist(), range(32)

    def take(source, width=32):
        """The value of lane source(i) where that is among its `width` neighbours or before them, else lane i's own."""
        return [v[source(i)] if 0 <= source(i) < (i // width + 1) * width else v[i] for i in lanes]

    def up(delta, width):
        return [v[i - delta] if i % width >= delta else v[i] for i in lanes]

    unsigned = [value % 2**32 for value in v]
    want = [
        [v[5]] * 32,
        [v[i // 8 * 8 + 1] for i in lanes],
        [v[(i + 1) % 32] for i in lanes],
        up(3, 32),
        up(3, 8),
        take(lambda i: i + 3),
        take(lambda i: i + 3, 8),
        take(lambda i: i ^ 16),
        take(lambda i: i ^ 8, 8),
        [sum((v[i] > 0) << i for i in lanes)] * 32,
        [2 * any(value > 0 for value in v)] * 32,
        [2 + all(value > 0 for value in v)] * 32,
        [sum(v)] * 32,
        [min(v)] * 32,
        [max(v)] * 32,
        [functools.reduce(operator.and_, unsigned)] * 32,
        [functools.reduce(operator.or_, unsigned)] * 32,
        [functools.reduce(operator.xor, unsigned)] * 32,
        [sum(v[:16])] * 16 + [sum(v[16:])] * 16,
        [value.bit_count() for value in unsigned],
        [(value & -value).bit_length() for value in unsigned],
        [32 - value.bit_length() for value in unsigned],
        [0.25 + 0.5 + 3 + 0.5 + 0.25] * 32,
        [1 + 0 + 3 + 32 + 0 + 1] * 32,
        [10 + 0 + 0.25 + 1] * 32,
        [1.5 + 2.5] * 32,
        [0] * 32,
        [min(value, 3) + max(value, 3) for value in v],
        [6 + value for value in v],
        [16.0] * 32,
    ]
    for row, (got, expected) in enumerate(zip(y.tolist(), want, strict=True)):
        assert got == expected, f"row {row} of intrinsics_kernel"
    # Two blocks of 32 threads; 3 << lane twice over is nothing, and 64 steps of a counter that wraps after 5 end at 4.
    assert counters.tolist() == [64, -64, 31, 7, 64 % 6, -1, 0, 0, 132, 2]


# ---- the kernels of this package -------------------------------------------------------------------------------------
def run_tests(folder, name, variant, *arguments, **extra):
    """pytest on SIMT tests in a process of its own; it shows a test's name before the sanitizer can end it."""
    command = [sys.executable, "-m", "pytest", "-v", "--capture=no", "-o", f"cache_dir={folder / name}", *arguments]
    env = environment(variant, **extra)
    return subprocess.run(command, capture_output=True, text=True, cwd=simt_library.ROOT, env=env)


@pytest.fixture(scope="module")
def sanitized_runs(request, folder):
    """family -> its SIMT tests under the sanitizers, a future: as many at a time as there are processors."""
    here = [item for item in request.session.items if "sanitized_runs" in item.fixturenames]
    pool = ThreadPoolExecutor(os.cpu_count())

    def run(family):
        # A process each, so one thread each: waiting threads of one would slow the other.
        tests = (*CONTRACT, f"tests/test_{family}.py", "-k", f"simt and not ({' or '.join(REPEATED)})")
        return run_tests(folder, "address", "address", *tests, OMP_NUM_THREADS="1", KDFAST_TEST_FAMILIES=family)

    yield {family: pool.submit(run, family) for family in (item.callspec.params["family"] for item in here)}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_family_in_bounds(sanitized_runs, family):
    """The SIMT tests of the family once more, under the address and undefined-behaviour sanitizers."""
    done = built_by_simt(sanitized_runs[family].result)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:10000]
    assert re.search(r"\d+ passed", done.stdout)


@pytest.mark.parametrize("variant", ["plain", "races"])
@pytest.mark.parametrize("barrier", [0, 1])
def test_removed_barrier_is_noticed(folder, variant, barrier):
    """The attention tests fail without either barrier of group_reduce, by a race and, where none is looked for, by
    a wrong result in this order of threads."""
    csrc = folder / f"without-barrier-{barrier}" / "csrc"
    for part in ("common", "attention"):
        shutil.copytree(simt_library.ROOT / "csrc" / part, csrc / part, dirs_exist_ok=True)
    group = csrc / "common/group.cuh"
    parts = group.read_text().split("__syncthreads();")
    assert len(parts) == 3
    group.write_text("__syncthreads();".join(parts[: barrier + 1]) + "__syncthreads();".join(parts[barrier + 1 :]))
    tests = ("tests/test_ops_values.py", "-x", "-k", "test_matches_oracle and simt and float32 and 17")
    settings = {"KDFAST_SIMT_CSRC": str(csrc), "KDFAST_TEST_FAMILIES": "attention"}
    done = run_tests(folder, csrc.parent.name, variant, *tests, **settings)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"[1-9]\d* failed", done.stdout), done.stdout
    if variant == "races":
        assert re.search(r"race: thread|uninitialised: thread", done.stdout), done.stdout
