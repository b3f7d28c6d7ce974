"""The same inputs give the same bits: seeds, deterministic algorithms, and what else the bits depend on."""

import contextlib
import os
from collections.abc import Iterator

import numpy as np
import torch

import kdfast
from kdfast import _kernels

__all__ = ["derived_seed", "environment", "reproducible"]


def derived_seed(*parts: int) -> int:
    """One seed from several numbers: seed 0, epoch 1 has nothing in common with seed 1, epoch 0."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@contextlib.contextmanager
def reproducible(threads: int, warn_only: bool = False) -> Iterator[None]:
    """Inside, the same inputs give the same bits: deterministic algorithms and a fixed number of threads.

    An operation that has no such algorithm on its device is an error, or with `warn_only` a warning.
    """
    # cuBLAS reads it when it starts; without it some of its sums depend on timing.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deterministic = torch.utils.deterministic
    before_threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    before_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    before_fill = deterministic.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    deterministic.fill_uninitialized_memory = False  # a debugging aid that would be timed as part of each step
    try:
        yield
    finally:
        torch.set_num_threads(before_threads)
        torch.use_deterministic_algorithms(before, warn_only=before_warn_only)
        deterministic.fill_uninitialized_memory = before_fill


def environment() -> dict[str, str]:
    """What decides the bits of the results besides the settings and the images."""
    loaded = [name for name, library in _kernels.status().items() if library.loaded]
    return {
        "kdfast": kdfast.__version__,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "kernels": " ".join(loaded) or "none",
    }
