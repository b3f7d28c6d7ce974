"""Jobs that run in several processes of gloo at once, and a process that holds a folder."""

import contextlib
import gc
import multiprocessing
import time

import torch
import torch.distributed as dist

from kdfast.runs.files import LOCK, locked

HAVE_GLOO = dist.is_available() and dist.is_gloo_available()
NO_GLOO = "this torch has no gloo"


def in_processes(count, folder, job, *arguments):
    """-> what ``job(rank, *arguments)`` gave on each of `count` ranks; `folder` carries it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # it outlives every rank
    torch.multiprocessing.spawn(_run, (count, store.port, str(folder), job, arguments), nprocs=count)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(count)]


def _run(rank, count, port, folder, job, arguments):
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    try:
        torch.save(job(rank, *arguments), f"{folder}/{rank}.pt")
        dist.barrier()  # a rank that leaves while another still listens would abort that one
        gc.collect()  # DDP, in reference cycles, holds the group: its threads could abort the process at its end
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def held(folder):
    """Inside, another process writes into `folder`; it is killed at the end, and leaves lock and part of a file."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(folder, ready))
    process.start()
    try:
        assert ready.wait(30)
        yield
    finally:
        process.kill()
        process.join()
    assert (folder / LOCK).exists()
    assert list(folder.glob(".*.tmp"))


def _hold(folder, ready):
    with locked(folder):
        (folder / ".part.0.tmp").touch()
        ready.set()
        time.sleep(60)
