"""Label Refinery: the labels of a round are the predictions of the network before."""

from collections.abc import Callable

import torch
from torch import nn

from kdfast.losses import LabelRefinery
from kdfast.ops import check, cross_entropy
from kdfast.procedures.generations import Train, frozen


def refine_labels(
    make: Callable[[int], nn.Module], train: Train, rounds: int, refinery: nn.Module | None = None
) -> list[nn.Module]:
    """Label Refinery - Improving ImageNet Classification through Label Progression (Bagherinezhad et al., 2018).

    -> the networks of all rounds, frozen. ``make(round)`` gives the network of a round, inputs -> logits (B, C); rounds
    may differ in size. Without a `refinery`, a network that is trained already, round 0 learns from the labels; every
    round after it learns from nothing but what the network before says about the very inputs of the batch, crops and
    other augmentation included: a crop that does not show the labelled object gets the label of what it shows.
    """
    check.count("rounds", rounds)
    networks: list[nn.Module] = []
    loss = LabelRefinery()
    for number in range(rounds):
        network = make(number)
        teacher = networks[-1] if networks else refinery and frozen(refinery)

        def objective(inputs, labels, network=network, teacher=teacher):
            if teacher is None:
                return cross_entropy(network(inputs), labels)
            with torch.no_grad():
                refined = teacher(inputs).softmax(1)
            return loss(network(inputs), refined)

        train(network, objective)
        networks.append(frozen(network))
    return networks
