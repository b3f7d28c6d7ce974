"""Options of the benchmarks, and the jobs that they make of each bench file's cases."""

import time

import pytest
import torch

from . import harness

SETTINGS = pytest.StashKey[harness.Settings]()
END = pytest.StashKey[float]()
NO_TIME = "no time left"


def pytest_addoption(parser):
    group = parser.getgroup("kdfast bench")
    group.addoption("--bench-device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    group.addoption("--bench-threads", type=int, help="CPU threads (default: torch's)")
    group.addoption("--bench-quick", action="store_true", help="the first shape of each loss, few rounds")
    group.addoption("--bench-seconds", type=float, default=float("inf"), help="begin no figure after so many seconds")
    group.addoption("--bench-shape", action="append", default=[], metavar="ROWSxCOLS", help="this shape instead")


def pytest_configure(config):
    if threads := config.getoption("bench_threads"):
        torch.set_num_threads(threads)
    config.stash[END] = time.monotonic() + config.getoption("bench_seconds")
    config.stash[SETTINGS] = harness.Settings(config.getoption("bench_device"), config.getoption("bench_quick"))


def pytest_generate_tests(metafunc):
    settings, module = metafunc.config.stash[SETTINGS], metafunc.module
    if "job" in metafunc.fixturenames:
        shapes = [tuple(map(int, shape.split("x"))) for shape in metafunc.config.getoption("bench_shape")]
        try:
            cases = module.cases(settings, shapes)
        except (TypeError, ValueError) as error:
            raise pytest.UsageError(f"--shape does not fit {module.FAMILY}: {error}") from error if shapes else error
        metafunc.parametrize("job", harness.jobs(cases, settings, module.FAMILY), ids=str)
    if "host_job" in metafunc.fixturenames:
        metafunc.parametrize("host_job", harness.host_jobs(module.host_cases(), settings, module.FAMILY), ids=str)
    if "ceiling" in metafunc.fixturenames:
        metafunc.parametrize("ceiling", harness.CEILINGS)


def pytest_collection_modifyitems(config, items):
    """The losses come last: they are what may be left out. All but the host's overhead is timed on the GPU's clock."""
    items.sort(key=lambda item: "job" in getattr(item, "fixturenames", ()))
    if config.stash[SETTINGS].device == "cuda":
        for item in items:
            if "host_job" not in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.benchmark(timer=harness.device_clock))


def pytest_runtest_setup(item):
    if time.monotonic() > item.config.stash[END]:
        pytest.skip(NO_TIME)


def pytest_terminal_summary(terminalreporter):
    left_out = [report for report in terminalreporter.getreports("skipped") if NO_TIME in str(report.longrepr)]
    if left_out:
        terminalreporter.write_line(f"{len(left_out)} figures were left out: {NO_TIME}")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["kdfast"] = harness.machine(config.stash[SETTINGS])


@pytest.fixture
def settings(request):
    """How this run measures."""
    return request.config.stash[SETTINGS]
