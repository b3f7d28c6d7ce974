"""Deep mutual learning: networks that teach each other in every step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.losses import DML


class MutualLearning:
    """DML - Deep Mutual Learning (Zhang et al., CVPR 2018): one step of N networks on one batch.

    The networks, inputs -> logits (B, C), are updated one after the other: each by its own optimizer with
    ``loss(its logits, list of the others' logits, labels)``, where those that had their turn answer with their new
    weights, as in the paper's algorithm and the official code. `loss` is by default :class:`kdfast.DML`::

        mutual = MutualLearning(networks, [torch.optim.Adam(n.parameters()) for n in networks])
        for inputs, labels in batches:
            losses = mutual.step(inputs, labels)

    A step has 2 N - 1 forward passes. The second one of a network, without gradients, moves the running statistics of
    its batch norms once more.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        loss: Callable[[Tensor, list[Tensor], Tensor], Tensor] | None = None,
    ) -> None:
        if len(networks) < 2:
            raise ValueError(f"networks must be at least 2, got {len(networks)}")
        if len(optimizers) != len(networks):
            raise ValueError(f"optimizers must be one per network, {len(networks)}, got {len(optimizers)}")
        self.networks = list(networks)
        self.optimizers: list[torch.optim.Optimizer] = list(optimizers)
        self.loss: Callable[..., Any] = DML() if loss is None else loss

    def step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Update every network once on a batch; -> their losses (N,), each before its own update."""
        logits = [network(inputs) for network in self.networks]
        losses = []
        for i, (network, optimizer) in enumerate(zip(self.networks, self.optimizers, strict=True)):
            peers = [other.detach() for j, other in enumerate(logits) if j != i]
            value = self.loss(logits[i], peers, labels)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.detach())
            if i + 1 < len(self.networks):
                with torch.no_grad():
                    logits[i] = network(inputs)
        return torch.stack(losses)
