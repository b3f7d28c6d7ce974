"""The machine code of the CUDA kernels, executed: its numbers against float64, and what it does for them against
.ci/sass_counts.json, where nvcc is the one that the table was recorded with.

KDFAST_SASS_RECORD=1 records instead of comparing; what is worse is committed with its reason.
KDFAST_TEST_REQUIRE_SASS=1: nvcc and cuobjdump must be there, else the tests are skipped where they are not.
"""

import os

import pytest
import registry
import sass_library
import sass_table
import simt_library
import torch
from behaviour import check_oracle

TABLE = sass_library.ROOT / ".ci/sass_counts.json"
OPS = {str(op): op for op in registry.every_op()}
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# Op, shape, dtype of the inputs. Rows of 1000 and 32768 and maps of 16x16 begin at multiples of 16 bytes.
POINTS = [
    *(("softmax_kl.kl", (8, 1000), dtype) for dtype in (F32, BF16, F16, F64)),
    *(("softmax_kl.kl", (2, 32768), dtype) for dtype in (F32, BF16)),
    *(("softmax_kl.kl", (8, 1001), dtype) for dtype in (F32, BF16)),
    ("softmax_kl.kl", (2, 5003), F32),
    ("softmax_kl.kl_weighted", (8, 1000), F32),
    *(("softmax_kl.jsd", (8, 1000), dtype) for dtype in (F32, BF16)),
    ("softmax_kl.jsd", (2, 32768), BF16),
    *(("softmax_kl.ce", (8, 1000), dtype) for dtype in (F32, BF16)),
    *(("softmax_kl.ce_kl", (8, 1000), dtype) for dtype in (F32, BF16)),
    ("softmax_kl.ce_kl", (2, 32768), BF16),
    ("softmax_kl.ce_kl_soft", (8, 1000), F32),
    *(("softmax_kl.dkd", (8, 1000), dtype) for dtype in (F32, BF16)),
    ("softmax_kl.dkd", (2, 32768), F32),
    *(("softmax_kl.topk", (8, 1000), dtype) for dtype in (F32, BF16)),
    ("softmax_kl.topk", (2, 32768), F32),
    *(("teachers.kl", (3, 8, 1000), dtype) for dtype in (F32, BF16)),
    ("teachers.cross_entropy", (3, 8, 1000), F32),
    ("teachers.reverse_kl", (3, 2, 32768), F32),
    *(("mixed_logits.one", (4, 8, 1000), dtype) for dtype in (F32, BF16)),
    ("mixed_logits.attention", (3, 8, 1000), F32),
    ("mixed_logits.constant", (3, 2, 32768), F32),
    *(("gram.rows", (96, 256), dtype) for dtype in (F32, BF16)),
    ("gram.rows_absolute", (96, 256), F32),
    ("gram.distribution", (96, 256), F32),
    ("gram.polynomial", (40, 128), F32),
    ("gram.absolute", (40, 128), F32),
    *(("gram.affinity", (2, 32, 8, 8), dtype) for dtype in (F32, BF16)),
    ("gram.products", (2, 64, 256), F32),
    ("gram.products", (1, 40, 64), F64),
    *(("pairwise.rkd", (64, 256), dtype) for dtype in (F32, BF16)),
    ("pairwise.rkd_distance", (34, 64), F64),
    ("pairwise.rkd_angle", (40, 64), F32),
    ("pairwise.between", (64, 256), F32),
    *(("attention.power2", (2, 64, 16, 16), dtype) for dtype in (F32, BF16)),
    ("attention.power3", (2, 64, 16, 16), F32),
    *(("feature.squared", (2, 32, 16, 16), dtype) for dtype in (F32, BF16, F64)),
    ("feature.squared", (2, 32, 14, 15), F32),
    ("feature.channels", (2, 32, 16, 16), F32),
    *(("feature.boundary", (2, 32, 16, 16), dtype) for dtype in (F32, BF16)),
    *(("feature.partial", (2, 32, 16, 16), dtype) for dtype in (F32, BF16)),
    ("feature.normalized_2", (2, 32, 16, 16), F32),
    ("feature.pyramid", (2, 32, 16, 16), F32),
    *(("moments.moments", (4, 32, 16, 16), dtype) for dtype in (F32, BF16)),
    *(("nce.nce", (4, 256, 128, 1000), dtype) for dtype in (F32, BF16)),
    ("nce.nce", (4, 100, 100, 500), F32),
]


def name_of(point):
    op, shape, dtype = point
    return f"{op} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"


@pytest.fixture(scope="module")
def folder(request):
    if not hasattr(request.config, "cache"):
        pytest.skip("libraries are kept in pytest's cache, which is off")
    folder = request.config.cache.mkdir("sass")
    try:
        sass_library.tools()
        simt_library.compiler()
    except simt_library.Unavailable as reason:
        if os.environ.get("KDFAST_TEST_REQUIRE_SASS") == "1":
            pytest.fail(f"{reason} (KDFAST_TEST_REQUIRE_SASS=1)")
        pytest.skip(str(reason))
    return folder


@pytest.fixture(scope="module")
def hold(folder, one_thread):
    """A function that holds what was found at a point against the table, or records it."""
    table, version = sass_table.load(TABLE), sass_library.tools()[2]
    recording = os.environ.get("KDFAST_SASS_RECORD") == "1"

    def check(name, found):
        if recording:
            table["points"][name] = found
        elif table["nvcc"] == version:
            worse, other = sass_table.compare(found, table["points"].get(name, {}))
            assert not worse, f"worse than {TABLE.name} says; if it has to be so, record it:\n" + "\n".join(worse)
            assert not other, f"{TABLE.name} is out of date; record it:\n" + "\n".join(other)

    yield check
    if recording:
        points = {name: found for name, found in table["points"].items() if name in map(name_of, POINTS)}
        sass_table.save(TABLE, version, points)


@pytest.mark.parametrize("point", POINTS, ids=name_of)
def test_point(folder, hold, point):
    name, shape, dtype = point
    op = OPS[name]
    x = op.group.inputs("cpu", shape, dtype)
    with sass_library.emulated(folder) as calls:
        check_oracle(op, x, op.upstream(x))
    hold(name_of(point), sass_table.by_op(calls))
