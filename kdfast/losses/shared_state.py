"""Losses with memory: buffers that every step moves, the same on all ranks."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from kdfast import distributed
from kdfast.losses.base import Loss


class SharedState(Loss):
    """A loss whose buffers `state` move with each step; with `sync` they are rank 0's on all ranks, which all call it.

    DDP, which would send the buffers from rank 0 in each step, leaves them alone.
    """

    state: ClassVar[tuple[str, ...]] = ()
    sync: bool

    def __init__(self) -> None:
        super().__init__()
        self._ddp_params_and_buffers_to_ignore = [*self.state]
        self._shared = False  # whether all ranks are known to have rank 0's state

    def agree(self, describe: Callable[[], list[int]], count: int) -> list[list[int]] | None:
        """-> `count` numbers of each rank from `describe`, which checks the arguments; None if this is the only rank.

        If `describe` raises on one rank, every rank raises.
        """
        self._refuse_recomputation()
        if not self.sync or distributed.world_size() == 1:
            describe()
            return None
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{type(self).__name__} exchanges rows with the other ranks, which no graph can do: compile the "
                "networks and call the loss outside (torch.compiler.disable), or pass sync=False for states that differ"
            )
        error, mine = None, [0] * count
        try:
            mine = describe()
        except Exception as caught:  # whatever it is, the other ranks must not wait for this one
            error = caught
        headers = distributed.exchange([error is not None, self._shared, *mine])
        if error is not None:
            raise error
        for rank, (failed, *_) in enumerate(headers):
            if failed:
                raise RuntimeError(f"rank {rank} could not score its batch: its own error says why")
        if not all(shared for _, shared, *_ in headers):
            for name in self.state:
                torch.distributed.broadcast(distributed.as_bytes(getattr(self, name)), 0)
            self._shared = True
        return [numbers for _, _, *numbers in headers]

    def _refuse_recomputation(self):
        """A step in a backward would move the state a second time."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            name = type(self).__name__
            raise RuntimeError(
                f"{name} is being recomputed in a backward, as torch.utils.checkpoint does: each step moves its state, "
                f"so a second one is another loss. Call {name} outside of the checkpoint"
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: Any, *others: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *others)
        self._shared = False
