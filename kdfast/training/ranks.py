"""The processes of a run: one, or those that torchrun has started, and how they stop together."""

import gc
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from kdfast import distributed
from kdfast.runs.errors import RunError

__all__ = ["OtherRankFailed", "Ranks", "Stop", "Stopped", "by_torchrun", "end_with_parent", "join", "leave"]


class OtherRankFailed(Exception):
    """Another process says what is wrong; this one ends silently, with the exit code `code`."""

    def __init__(self, code: Any = 2) -> None:
        super().__init__(code)
        self.code = code


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and its checkpoint is written; `hint` says how it goes on, where --resume does not."""

    def __init__(self, number: int, hint: str | None = None) -> None:
        super().__init__(f"signal {number}")
        self.signal = number
        self.hint = hint


@dataclass(frozen=True)
class Ranks:
    """This process among `size`; `device` is the one it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def together(self, work: Callable[..., Any]) -> Any:
        """``work()``, if no process fails in it; else the first that does raises its error, and the others another."""
        error = result = None
        try:
            result = work()
        except Exception as caught:  # whatever it is, the other ranks must not wait for this one
            error = caught
        failed = [rank for rank, failed in enumerate(self.gather(error is not None)) if failed]
        try:
            if failed and failed[0] == self.rank:
                raise error
            if failed:
                raise OtherRankFailed
            return result
        finally:
            del error  # its traceback has this frame: a cycle, which would keep what all frames hold

    def on_first(self, work: Callable[..., Any]) -> Any:
        """``work()`` of rank 0, for every rank."""
        result = [self.together(lambda: work() if self.first else None)]
        if self.size > 1:
            dist.broadcast_object_list(result, 0, device=torch.device("cpu"))
        return result[0]

    def gather(self, value: bool | set[Any] | set[str]) -> list[Any]:
        """The `value` of every rank, in order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


def join(device: str) -> "Ranks":
    """-> the `Ranks` of this process on the device named `device`; under torchrun in a process group, until `leave`."""
    if not by_torchrun():
        return Ranks(0, 1, _device(device, 0))
    local = int(os.environ["LOCAL_RANK"])
    own = _device(device, local)
    # Of its own after each restart: torchrun's store may still have the addresses of the processes that are gone.
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # Whole numbers and names travel on the CPU in either case, without a wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return Ranks(rank, size, own)


def leave() -> None:
    """End the process group of `join`, after everything that used it.

    A group that something still holds keeps its threads, and one that outlives the interpreter may abort the process.
    """
    if by_torchrun() and dist.is_initialized():
        gc.collect()  # DDP is part of reference cycles
        dist.destroy_process_group()


def by_torchrun() -> bool:
    """Whether torchrun, or what does the same, has started this process: one variable alone may be left of a shell."""
    return {"LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def _device(name, local):
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if device.index is not None and by_torchrun():
        raise RunError(f"--device: got {name}, expected cuda: torchrun numbers the processes, and each has its own")
    if device.index is None:
        device = torch.device("cuda", local)
    if device.index >= torch.cuda.device_count():
        raise RunError(f"--device: process {local} of this machine finds {torch.cuda.device_count()} CUDA devices")
    torch.cuda.set_device(device)
    return device


# ---- stopping --------------------------------------------------------------------------------------------------------
def end_with_parent(_worker: Any) -> Any:
    """For the processes that load images: they ignore signals, and die when the process that trains dies.

    An orphan would keep its parent's sockets and pipes open, and the other ranks would wait for one that is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # as torch's own `spawn` asks for it; Linux only
    sys.excepthook = _unless_cut_off


def _unless_cut_off(kind, error, trace):
    """In a process that loads images: no traceback of the thread that gives them away when the parent hangs up."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


class Stop:
    """Within it, a SIGTERM or SIGINT is noted; a second Ctrl-C ends the process at once, but not under torchrun.

    Torchrun passes on a signal that the processes have got already, and ends those that take more than 30 seconds.
    """

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if number == self.signal == signal.SIGINT and not by_torchrun():
            raise KeyboardInterrupt
        self.signal: int = self.signal or number

    def agreed(self) -> int:
        """The number of a signal that some rank has got, or 0; the same on every rank, which all have to call it."""
        if distributed.world_size() == 1:
            return self.signal
        return max(number for (number,) in distributed.exchange([self.signal]))
