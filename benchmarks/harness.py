"""Measures one loss in several implementations, which take turns, on pytest-benchmark.

A bench file lists its cases (a loss at a shape, with baselines) and hands each job to this module. What counts as
the time of a call:

- The gradient of the previous call is dropped before the clock starts, so allocating a gradient belongs to the call.
- On a GPU the clock is a pair of CUDA events, and the stream sleeps until the host has queued the whole call: the
  figure is device time. What the host spends is measured on its own, on inputs so small that nothing else matters.
- On a GPU the inputs rotate through more memory than the L2 cache holds; on a CPU they stay the same, as logits that
  have just been computed do. A backward alone comes right after its forward, as in training, and may find in a cache
  what that has read.
"""

import contextlib
import gc
import importlib.metadata
import itertools
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import pytest
import torch

import kdfast

PHASES = ("both", "forward", "backward")
WARM_UP_CALLS = 3
ROUNDS = (8, 300)  # fewest and most, whatever the budget
TURNS = 4  # in which the implementations are measured on a CPU, whose speed wanders within seconds
SLOW, SLOW_ROUNDS = 1.0, 3  # a call of so many seconds is warm after two, and measured with so few
VERY_SLOW = 5.0  # one of so many is warm after itself


# ---- what is measured ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Case:
    """A loss at a shape. `eager`, `kdfast` and `liger` are called with the tensors that `inputs(device)` makes."""

    loss: str
    shape: str
    inputs: Callable
    eager: Callable
    kdfast: Callable
    floor: dict  # phase -> the work that no implementation can avoid, in the unit of `ceiling`
    ceiling: str = "copy"  # what bounds that work: "copy" and "gather" count bytes, "matmul" operations
    dtype: str = "float32"
    liger: Callable | None = None
    phases: tuple = PHASES
    size: int | None = None  # what the loss grows with: its chart then shows the growth
    left_out: dict = field(default_factory=dict)  # implementation -> what the table says in place of a figure
    part: tuple | None = None  # of a whole training step: loss and shape of the case that is its loss alone

    def __str__(self):
        return f"{self.loss}-{self.shape}-{self.dtype}".replace(" ", "")


def of_shapes(case, losses, shapes, host_shape):
    """-> `cases` and `host_cases` of a bench file: every loss at all shapes, and so small that the host is left.

    `case(name, *shape)` makes one. A --shape, if any, replaces the shapes.
    """

    def cases(settings, chosen):
        chosen = chosen or (shapes[:1] if settings.quick else shapes)
        return [case(name, *shape) for name in losses for shape in chosen]

    def host_cases():
        return [case(name, *host_shape) for name in losses]

    return cases, host_cases


def against_eager(case, **changes):
    """`case` in forward + backward and against its baseline alone; its family's file has the rest."""
    return replace(case, phases=PHASES[:1], left_out=case.left_out | {"compile": "-", "fallback": "-"}, **changes)


@dataclass(frozen=True, eq=False)
class Job:
    """One figure, or its share of one turn: a case in one implementation and one phase."""

    case: Case
    implementation: str
    phase: str
    turn: int = 0
    turns: int = 1

    def __str__(self):
        return f"{self.case}-{self.phase}-{self.implementation}" + (f"-{self.turn + 1}" if self.turns > 1 else "")


@dataclass(frozen=True)
class Settings:
    """How to measure: on which device, and how many seconds to spend on one figure."""

    device: str
    quick: bool

    def budget(self, phase):
        """Seconds for the rounds of one figure: most for forward + backward, which is compared; few on a steady GPU."""
        seconds = 0.1 if self.quick else 1.0 if phase == "both" else 0.4
        return seconds if self.device == "cpu" else 0.3 * seconds

    def turns(self, phase):
        """In how many turns, one of each implementation after another, a case is measured."""
        return TURNS if phase == "both" and self.device == "cpu" and not self.quick else 1


def jobs(cases, settings, family):
    """Every job, ordered so that the implementations of one case and phase run one after another, in turns."""
    names = implementations(settings.device, family)
    phases = PHASES[:1] if settings.quick else PHASES
    found = []
    for case, phase in itertools.product(cases, phases):
        measured = [name for name in names if name not in case.left_out and (name != "liger" or case.liger is not None)]
        turns = settings.turns(phase) if len(measured) > 1 else 1
        if phase in case.phases:
            found += [Job(case, name, phase, turn, turns) for turn in range(turns) for name in measured]
    return found


def implementations(device, family):
    """The implementations that exist here: without compiled kernels for `device` there is no figure for kdfast."""
    names = ["eager", "compile", "fallback"]
    if has_kernels(device, family):
        names.append("kdfast")
    if device == "cuda" and importable("liger_kernel"):
        names.append("liger")
    return names


def has_kernels(device, family):
    """Whether any op of `family` has a compiled kernel on `device`; one without ops of its own uses those of all."""
    ops, paths = kdfast._kernels.OPS, kdfast._kernels.paths()
    own = [name for name in paths if ops[name].family == family]
    return any(paths[name][device] == "kernel" for name in own or paths)


def importable(name):
    """Whether the package can be imported; a package that is there and broken counts as absent."""
    with contextlib.suppress(Exception):
        __import__(name)
        return True
    return False


# ---- one implementation, ready to be called --------------------------------------------------------------------------
@lru_cache(maxsize=1)
def input_sets(case, device):
    """The inputs of `case`: one set on a CPU, on a GPU so many that the others fill the L2 cache twice."""
    torch.manual_seed(0)
    first = case.inputs(device)
    count = 1
    if device == "cuda":
        # The gradient that each set leaves behind fills the cache as well.
        size = sum(x.nbytes * (2 if x.requires_grad else 1) for x in first)
        filling = -(-2 * torch.cuda.get_device_properties(0).L2_cache_size // size)
        count = 1 + min(filling, ROUNDS[1])  # no more than there are rounds
    return [first, *(case.inputs(device) for _ in range(count - 1))]


@lru_cache(maxsize=1)
def compiled(case):
    """torch.compile of the eager formula. Reset first: otherwise dynamo gives up after a few shapes of one function.

    Where the formula needs several graphs (a boolean mask), it has them.
    """
    torch._dynamo.reset()
    return torch.compile(case.eager, dynamic=False)


def function_of(case, implementation):
    """The function that computes the loss of `case` in `implementation`."""
    if implementation == "compile":
        return compiled(case)
    return getattr(case, {"fallback": "kdfast"}.get(implementation, implementation))


@contextlib.contextmanager
def path_of(implementation):
    """Run kdfast on the path that `implementation` names, and nowhere else."""
    if implementation == "fallback":
        with kdfast.fallback():
            yield
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KDFAST_REQUIRE_KERNELS", "1")
            yield


class Call:
    """One phase of one implementation as a (setup, run) pair; `run(*setup()[0])` is what the clock sees."""

    def __init__(self, function, sets, phase, device):
        self.function, self.phase, self.device = function, phase, device
        self.sets = itertools.cycle(sets)
        self.warm_up_calls = max(WARM_UP_CALLS, len(sets))  # each set's gradient needs its memory once
        self.host_seconds = 0.0

    def setup(self):
        """Fresh inputs without gradients; for the backward phase the finished forward."""
        inputs = next(self.sets)
        for x in inputs:
            x.grad = None
        argument = self.function(*inputs) if self.phase == "backward" else inputs
        if self.device == "cuda":
            self.hold_stream()
        return (argument,), {}

    def run(self, argument):
        """The phase itself; nothing is returned, so freeing what it made belongs to its time."""
        if self.phase == "backward":
            argument.backward()
        elif self.phase == "forward":
            self.function(*argument)
        else:
            self.function(*argument).backward()

    def hold_stream(self):
        """Keep the GPU busy until the host has queued the call: twice what that took before, at up to 2 GHz."""
        torch.cuda.synchronize()
        torch.cuda._sleep(int((2 * self.host_seconds + 2e-4) * 2e9))

    def warm_up(self):
        """Call a few times, compiling where that is due; returns the seconds a round takes."""
        for index in range(self.warm_up_calls):
            arguments, _ = self.setup()
            synchronize(self.device)
            start = time.perf_counter()
            self.run(*arguments)
            queued = time.perf_counter() - start
            synchronize(self.device)
            finished = time.perf_counter() - start
            if finished > (SLOW if index else VERY_SLOW):
                break
        self.host_seconds = queued  # of the last call, not of one that compiled
        return finished + (2 * queued if self.device == "cuda" else 0)

    def peak_bytes(self):
        """The most memory above its inputs that one call needs at any time."""
        (argument,), _ = self.setup()
        return peak_cuda(self.run, argument) if self.device == "cuda" else peak_cpu(self.run, argument)


# ---- clocks and memory -----------------------------------------------------------------------------------------------
def synchronize(device):
    """Wait for the GPU, if that is where the work is."""
    if device == "cuda":
        torch.cuda.synchronize()


class Tick:
    """A moment on the GPU's own clock; the difference of two is in seconds."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier):
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def device_clock():
    """The timer that pytest-benchmark uses for device time."""
    return Tick()


def memory_limit(device):
    """Bytes that a baseline may need here: half of the device's memory, whatever is free at the moment."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory // 2
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def peak_cuda(function, *args):
    """Peak of the caching allocator during the call, above what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(*args)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_cpu(function, *args):
    """Peak of the CPU allocator during the call, from the profiler's allocation events.

    They come from the allocator itself, so tensors that C++ code makes count too; a plain malloc does not.
    """
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(*args)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    deltas = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(itertools.accumulate(deltas, initial=0))


# ---- the three kinds of measurement: a bench file names them test_* --------------------------------------------------
def measure_loss(benchmark, job, settings):
    """Time one job, and for forward + backward also its peak memory."""
    case, phase = job.case, job.phase
    benchmark.group = f"{case}-{phase}"
    with path_of(job.implementation):
        sets = input_sets(case, settings.device)
        call = Call(function_of(case, job.implementation), sets, phase, settings.device)
        try:
            seconds = call.warm_up()
        except Exception as error:
            if job.implementation != "compile":
                raise
            # Whatever torch.compile lacks here (a C++ compiler, mostly), the other figures do not depend on it.
            pytest.skip(f"torch.compile does not work here: {error}")
        rounds = rounds_within(settings.budget(phase), seconds, job.turns)
        benchmark.pedantic(call.run, setup=call.setup, rounds=rounds)
        peak = call.peak_bytes() if phase == "both" and job.turn == 0 else None
    benchmark.extra_info.update(
        kind="loss",
        loss=case.loss,
        shape=case.shape,
        dtype=case.dtype,
        implementation=job.implementation,
        phase=phase,
        floor=case.floor[phase],
        ceiling=case.ceiling,
        size=case.size,
        left_out=case.left_out,
        part=case.part,
        peak_bytes=peak,
    )


def rounds_within(budget, seconds, turns=1):
    """How many rounds of `seconds`, a turn of as many, fit the budget, within ROUNDS; few of slow ones."""
    fewest, most = ROUNDS
    fewest = SLOW_ROUNDS if seconds > SLOW else fewest
    return max(-(-fewest // turns), min(most, int(budget / max(seconds, 1e-9))) // turns)


def measure_host(benchmark, host_job, settings):
    """Time the host's share of a call: tiny inputs, one thread, many calls in a row, the host's own clock."""
    job, case = host_job, host_job.case
    inputs = case.inputs(settings.device)
    function = function_of(case, job.implementation)
    call = Call(function, [inputs], job.phase, "cpu")

    def run():
        arguments, _ = call.setup()
        call.run(*arguments)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    benchmark.group = f"host-{case}-{job.phase}"
    try:
        with path_of(job.implementation):
            benchmark.pedantic(run, rounds=5 if settings.quick else 25, iterations=100, warmup_rounds=2)
    finally:
        torch.set_num_threads(threads)
    synchronize(settings.device)
    benchmark.extra_info.update(kind="host", loss=case.loss, implementation=job.implementation, phase=job.phase)


def host_jobs(cases, settings, family):
    """Host jobs of each case: eager against kdfast, forward alone and with backward."""
    names = [name for name in implementations(settings.device, family) if name in ("eager", "kdfast")]
    return [Job(case, name, phase) for case, phase, name in itertools.product(cases, ("both", "forward"), names)]


CEILINGS = ("copy", "matmul", "gather")


def measure_ceiling(benchmark, ceiling, settings):
    """Time a copy far larger than any cache, a matrix product in float32 (torch's default: without TF32), or a read.

    The read is of rows of 512 bytes at random places of a table far larger than any cache.
    """
    cuda = settings.device == "cuda"
    if ceiling == "copy":
        source = torch.rand(2**30 if cuda else 2**26, device=settings.device)
        target = torch.empty_like(source)
        work, unit = 2 * source.nbytes, "B/s"

        def run():
            target.copy_(source)
    elif ceiling == "gather":
        rows = 2**21 if cuda else 2**19
        table = torch.rand(rows, 128, device=settings.device)
        bags = torch.randint(rows, (rows // 128, 128), device=settings.device)
        work, unit = bags.numel() * 512, "B/s"

        def run():
            torch.nn.functional.embedding_bag(bags, table, mode="sum")
    else:
        size = 8192 if cuda else 2048
        a, b = (torch.randn(size, size, device=settings.device) for _ in range(2))
        work, unit = 2 * size**3, "FLOP/s"

        def run():
            torch.mm(a, b)

    benchmark.group = "ceilings"
    benchmark.pedantic(run, setup=lambda: synchronize(settings.device), rounds=20, warmup_rounds=3)
    benchmark.extra_info.update(kind="ceiling", name=ceiling, work=work, unit=unit)


# ---- the machine -----------------------------------------------------------------------------------------------------
def machine(settings):
    """What the figures were measured on, as the results file records it."""
    cuda = settings.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "kind": settings.device,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": os.environ.get("KDFAST_ISA") or None,  # one chosen by hand
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver() if cuda else None,
        "liger": version("liger_kernel") if cuda else None,
        "python": platform.python_version(),
        "kdfast": kdfast.__version__,
        "commit": commit(),
    }


def driver():
    """The version of NVIDIA's driver, as far as the system tells."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.check_output(query, stderr=subprocess.DEVNULL, text=True).split()[0]
    with contextlib.suppress(OSError), open("/proc/driver/nvidia/version") as lines:
        return re.search(r"\d+\.\d+(\.\d+)?", lines.read())[0]


def version(package):
    """The installed version of a package; None where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def commit():
    """The commit that is measured, "-dirty" with uncommitted changes; None where nothing tells.

    A copy without git's own files is told by KDFAST_COMMIT.
    """
    if os.environ.get("KDFAST_COMMIT"):
        return os.environ["KDFAST_COMMIT"]
    folder = os.path.dirname(os.path.abspath(__file__))

    def git(*command):
        # Also where the checkout belongs to another user than the one who measures.
        command = ["git", "-c", f"safe.directory={os.path.dirname(folder)}", "-C", folder, *command]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git("ls-files", "--error-unmatch", os.path.basename(__file__))
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def cpu_name():
    """The CPU's model name, as far as the system tells."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
