"""Implementations, the tolerance rule, and what the tests share.

Environment:
    KDFAST_TEST_REQUIRE_KERNELS=1  the CPU kernels must be there, and a compiler for the SIMT build of the CUDA kernels:
                                   tests of "cpu" and "simt" fail instead of being skipped;
                                   "cuda": the CPU kernels, and on a machine with a GPU the CUDA kernels
    KDFAST_TEST_LARGE=1            runs the tests that need more than 12 GiB of memory
"""

import gc
import os
import zlib
from dataclasses import dataclass

import pytest

# Tests side by side, and those with two threads, have fewer cores than threads: one that waits gives its core to the
# others. Read when torch is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import simt_library  # noqa: E402
import torch  # noqa: E402

import kdfast  # noqa: E402
from kdfast import _kernels  # noqa: E402

pytest.register_assert_rewrite("behaviour")  # its failed assertions show their values, too


def pytest_configure(config):
    """Processes that test side by side (pytest -n) share the processor's cores."""
    if hasattr(config, "workerinput"):
        share = max(1, torch.get_num_threads() // config.workerinput["workercount"])
        torch.set_num_threads(share)
        os.environ.setdefault("OMP_NUM_THREADS", str(share))  # of the processes that a test starts, too
        # Processes that a test starts are no workers: in one of those pytest-benchmark would not measure.
        os.environ.pop("PYTEST_XDIST_WORKER", None)


SLOWEST = (  # files, of which each takes a minute or more
    *("test_simt", "test_ops_torch", "test_contract", "test_ops_values", "test_train", "test_compare", "test_fuzz"),
    *("test_sass", "test_install", "test_ops_layouts", "test_distributed"),
)


def pytest_collection_modifyitems(items):
    """The files that take longest begin, so that processes that test side by side end together."""
    ranks = {name: rank for rank, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What 20,000 tests are made of lives until the end: the garbage collector need not look at it time and again."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


# ---- tolerances ------------------------------------------------------------------------------------------------------
# An oracle gets the inputs as they are after rounding to the tested dtype and works in float64. What then differs is
# rounding in the accumulation type (float32, or float64 if an input is float64): each term of a sum is off by a few eps
# of its own magnitude, and the errors of `cols` terms add up like a random walk. So
#
#     |got - want| <= K eps(accumulator) sqrt(cols) size  +  half a unit in the last place of the output's dtype
#
# with one K for all. `size` is the magnitude of the terms *before they cancel*, from the float64 inputs: the loss of
# nearly equal networks is the small difference of two cross-entropies, whose rounding it inherits, and the gradient
# q - p that of two probabilities. A size taken from the result would ask for digits that no order of summation has; one
# taken from the largest entry would let small entries be anything. The sizes are in tests/registry/, beside the ops.
# The largest error seen in these tests is at 0.7 (DIST; 0.5 in softmax-KL), in any implementation but a GPU.
K = 2


def allowance(want, size, cols, accumulator, dtype):
    out, acc = torch.finfo(dtype), torch.finfo(accumulator)
    rounding = 0.5 * out.eps * want.abs() + out.tiny * out.eps  # the last: spacing of subnormal numbers
    # exp2 in the accumulator may flush to 0 below its smallest normal number.
    return K * acc.eps * max(cols, 1) ** 0.5 * size + acc.tiny + rounding


def assert_close(got, want, size, cols, accumulator, what="value"):
    """`got` is `want` (float64) within the rule above; infinities must sit at the same places and nothing is NaN."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    wide, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert not wide.isnan().any(), f"{what} has NaN"
    assert torch.equal(wide.isinf(), want.isinf()), f"{what}: infinities differ"
    finite = want.isfinite()
    error = (wide - want).abs()[finite]
    allowed = allowance(want, torch.as_tensor(size).cpu().expand_as(want), cols, accumulator, got.dtype)[finite]
    if error.numel():
        worst = (error / allowed).argmax()
        assert error[worst] <= allowed[worst], (
            f"{what}: error {error[worst]:.3e} is {error[worst] / allowed[worst]:.2f} times the allowed "
            f"{allowed[worst]:.3e}, at {want[finite][worst]:.6e}"
        )


# ---- implementations -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Implementation:
    """Where the ops run in a test: "fallback", "cpu", "simt" (CUDA source on the CPU, thread by thread) or "cuda"."""

    name: str

    @property
    def device(self):
        return torch.device("cuda" if self.name == "cuda" else "cpu")

    @property
    def kernel(self):
        """The op runs compiled code."""
        return self.name != "fallback"

    @property
    def raises_on_labels(self):
        """A label that is no class is an error; device code cannot raise and gives NaN."""
        return self.name in ("fallback", "cpu")


def simt_folder(config):
    """Where SIMT libraries are kept."""
    if not hasattr(config, "cache"):
        missing("SIMT libraries are kept in pytest's cache, which is off", required=("1",))
    return config.cache.mkdir("simt")


def built_by_simt(build, *arguments):
    """What a function of simt_library.py gives."""
    try:
        return build(*arguments)
    except simt_library.Unavailable as reason:
        missing(f"the SIMT library cannot be built: {reason}", required=("1",))


def _simt_kernels(config):
    build = simt_library.kernels
    if os.environ.get("KDFAST_SIMT") == "sass":
        import sass_library

        build = sass_library.kernels
    kernels = built_by_simt(build, simt_folder(config))
    return {name: kernels.get(name, _no_kernel(name)) for name, op in _kernels.OPS.items() if op.has_kernels}


def _no_kernel(name):
    """In place of a kernel that csrc lacks: the op must not run elsewhere unnoticed."""
    return lambda *args: pytest.fail(f"{name} has no CUDA kernel")


def missing(reason, required):
    """Skips the test, or lets it fail where KDFAST_TEST_REQUIRE_KERNELS is one of `required`."""
    setting = os.environ.get("KDFAST_TEST_REQUIRE_KERNELS")
    if setting in required:
        pytest.fail(f"{reason} (KDFAST_TEST_REQUIRE_KERNELS={setting})")
    pytest.skip(reason)


def require_cpu_kernels():
    if _kernels.status()["_cpu"].loaded:
        return
    reason = f"the CPU kernels are not loaded: {_kernels.status()['_cpu'].reason}"
    missing(reason, required=("1", "cuda"))


def require_cuda_kernels():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if not _kernels.status()["_cuda"].loaded:
        missing(f"the CUDA kernels are not loaded: {_kernels.status()['_cuda'].reason}", required=("cuda",))


@pytest.fixture(params=["fallback", "cpu", "simt", "cuda"])
def implementation(request, monkeypatch):
    """Every op of the test runs in this implementation, or fails; tensors belong on `implementation.device`."""
    name = request.param
    if name == "fallback":
        with kdfast.fallback():
            yield Implementation(name)
    elif name == "simt":
        if "KDFAST_SIMT_SEED" not in os.environ:  # each test has another order of threads, and keeps it
            seed = zlib.crc32(request.node.nodeid.encode())
            monkeypatch.setenv("KDFAST_SIMT_SEED", str(seed))
        with _kernels.override(_simt_kernels(request.config), ("CPU",)):
            yield Implementation(name)
    else:
        require_cpu_kernels() if name == "cpu" else require_cuda_kernels()
        monkeypatch.setenv("KDFAST_REQUIRE_KERNELS", "1")
        yield Implementation(name)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets torch's number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """For tests that train small networks: more threads gain nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def same_bits(request, threads, monkeypatch):
    """Whether a function gives a list of equal tensors in every run: one thread or two, any order of CUDA's."""
    on_simt = "simt" in request.node.name

    def check(run):
        results = []
        for setting in (1, 1) if on_simt else (1, 2, 2):
            threads(setting)
            monkeypatch.setenv("KDFAST_SIMT_SEED", str(len(results)))
            results.append(run())
        pairs = [pair for other in results[1:] for pair in zip(results[0], other, strict=True)]
        return all(a is b or torch.equal(a, b) for a, b in pairs)

    return check


@pytest.fixture
def deterministic_algorithms():
    """torch refuses what has no fixed order; the old setting comes back."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def cuda():
    """Where there are CUDA kernels: the tests of what only they have."""
    require_cuda_kernels()
    return Implementation("cuda")


@pytest.fixture
def dtensor():
    """A function from tensors to DTensors of a process group of one."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        yield lambda x: distribute_tensor(x, mesh, [Replicate()])
    finally:
        dist.destroy_process_group()
