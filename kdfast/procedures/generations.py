"""Born-Again Networks: each generation learns from the one before."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kdfast.losses import KD
from kdfast.ops import check, cross_entropy

Objective = Callable[[Tensor, Tensor], Tensor]  # inputs and labels (B,) of a batch -> 0-d loss
Train = Callable[[nn.Module, Objective], None]


def frozen(network: nn.Module) -> nn.Module:
    """The same network, as a teacher: in evaluation mode and without gradients."""
    return network.eval().requires_grad_(False)


def born_again(
    make: Callable[[], nn.Module],
    train: Train,
    generations: int,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> list[nn.Module]:
    """BAN - Born-Again Neural Networks (Furlanello et al., ICML 2018): -> the networks of all generations, frozen.

    ``make()`` gives a new network, inputs -> logits (B, C). Generation 0 learns from the labels; each of the
    `generations` after it minimises ``loss(logits, logits of the generation before, labels)``, both in one batch of
    inputs. `loss` is by default ``KD(temperature=1.0, alpha=0.5)``; :class:`kdfast.CWTM` and :class:`kdfast.DKPP` fit,
    too. The paper's best result is the :class:`Ensemble` of all generations::

        networks = born_again(make, train, generations=3)
        accuracy(Ensemble(networks))
    """
    check.count("generations", generations)
    loss = KD(temperature=1.0, alpha=0.5) if loss is None else loss
    networks: list[nn.Module] = []
    for _ in range(generations + 1):
        network = make()
        train(network, _objective(network, networks[-1] if networks else None, loss))
        networks.append(frozen(network))
    return networks


def _objective(network, teacher, loss) -> Objective:
    def from_labels(inputs, labels):
        return cross_entropy(network(inputs), labels)

    def from_teacher(inputs, labels):
        with torch.no_grad():
            target = teacher(inputs)
        return loss(network(inputs), target, labels)

    return from_labels if teacher is None else from_teacher


class Ensemble(nn.Module):
    """The mean of the networks' probabilities: inputs -> its logarithms (B, C), which are logits as any others."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        if not networks:
            raise ValueError("networks must have at least one network, got none")
        self.networks: nn.ModuleList = nn.ModuleList(networks)

    def forward(self, inputs: Tensor) -> Tensor:
        log_p = torch.stack([network(inputs).log_softmax(1) for network in self.networks])
        return log_p.logsumexp(0) - math.log(len(self.networks))
