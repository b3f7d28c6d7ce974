"""Training one network with one loss, so that a stopped training continues bit for bit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import kdfast
from kdfast.lab import networks
from kdfast.lab.experiments import Experiment
from kdfast.lab.networks import STUDENT, TEACHER, ConvNet
from kdfast.objectives import Objective, Observed
from kdfast.objectives.recipes import Pair
from kdfast.runs.determinism import derived_seed

if TYPE_CHECKING:
    from kdfast.lab.data import Data


__all__ = ["Training", "Trainer"]

# Adam's, with a cosine decay to 0; its steps do not grow with the scale of a loss.
LEARNING_RATES = {"teacher": 2e-3, "student": 1e-2}
EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Training:
    """One training: a network, "teacher" or "student", with the loss of `row`, from `seed`."""

    name: str
    network: str
    row: Experiment
    seed: int

    @property
    def file_name(self) -> str:
        """The name of its checkpoint."""
        return f"{self.name}-seed{self.seed}.pt"


class Trainer:
    """A training in progress: networks, objectives, optimizer, epochs done and their history.

    All trainings of one seed start a (first) student from the same weights and see the same batches, whatever the loss.
    The layers that the objectives read are watched until the ``with`` block around the trainer ends.
    """

    def __init__(
        self, training: "Training", data: "Data", epochs: int, batch_size: int, teachers: Sequence["ConvNet"] = ()
    ) -> None:
        self.training = training
        self.data = data
        self.epochs = epochs
        self.pre_stage_epochs: int = training.row.pre_stage_epochs(epochs)
        self.device: torch.device = data.train_labels.device
        self.samples: int = len(data.train_labels)
        self.batch_size: int = min(batch_size, self.samples)
        self.pre_stage_losses = []  # mean training loss of each epoch of the pre-stage
        self.history = []  # (mean training loss, test accuracy) of each epoch
        widths = TEACHER if training.network == "teacher" else STUDENT
        torch.manual_seed(derived_seed(training.seed, *widths))
        self.network = training.row.layout(
            lambda: ConvNet(data.train_images.shape[1], len(data.classes), widths), training.row.students
        ).to(self.device)
        self.objectives: nn.ModuleList = self._objectives(teachers).to(self.device)
        layers = {side: [x for stage in self.objectives for x in stage.layers(side)] for side in ("student", "teacher")}
        self.observed = networks.Observed(self.network, layers["student"])
        self.teachers: list[Observed] = [Observed(teacher, dict.fromkeys(layers["teacher"])) for teacher in teachers]
        self.optimizer = self._new_optimizer()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *exception: Any) -> None:
        for observed in (self.observed, *self.teachers):
            observed.remove()

    @property
    def student(self) -> "ConvNet":
        """The network that is tested and may teach others: the first, if several learn together."""
        return self.network.networks[0]

    @property
    def objective(self) -> Objective:
        """That of the row itself, after its pre-stage's."""
        return self.objectives[-1]

    def _objectives(self, teachers):
        """Of the pre-stage, if there is one, and of the row."""
        data, built = self.data, nn.ModuleList()
        teacher = teachers[0] if teachers else self.student
        pair = Pair(self.student, teacher, self.samples, data.train_labels, tuple(data.train_images.shape[1:]))
        for stage in self.training.row.stages:
            built.append(stage.made(pair, built[0].terms[0].loss if built else None).objective())
        return built

    def _new_optimizer(self):
        parameters = [*self.network.parameters(), *self.objectives.parameters()]
        return torch.optim.Adam(parameters, lr=LEARNING_RATES[self.training.network], fused=True)

    # ---- one step --------------------------------------------------------------------------------------------------
    def batch(self, index: Tensor, objective: Objective) -> dict[str, Any]:
        """The arguments of `objective` for the training images at `index` (B,): what it does not read has not run."""
        differentiated = bool(objective.readers("images"))  # of Jacobians: the teacher then has a graph, too
        images = self.data.train_images[index].requires_grad_(differentiated)
        with torch.set_grad_enabled(differentiated):
            teacher = [observed(images) for observed in self.teachers] if objective.reads("teacher") else None
        student = self.observed(images) if objective.reads("student") else None
        said = {"student": student, "teacher": teacher, "images": images, "epoch": len(self.history)}
        return said | {"labels": self.data.train_labels[index], "index": index}

    def step(self, index: Tensor, objective: Objective, number: int = 0, steps: int = 1) -> Tensor:
        """One optimizer step of `objective` on the training images at `index`; returns the detached loss.

        number, steps: which one it is, from 0, and of how many: TAID's target moves with them, by its own loss.
        """
        losses = objective.losses(**self.batch(index, objective))
        value = objective.total(losses)
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        for term in objective.terms:
            if isinstance(term.loss, kdfast.TAID):
                term.loss.update(losses[term.name].detach(), number, steps)
        return value.detach()

    # ---- epochs ----------------------------------------------------------------------------------------------------
    @property
    def epochs_done(self) -> int:
        """Epochs behind it, with those of the pre-stage."""
        return len(self.pre_stage_losses) + len(self.history)

    @property
    def all_epochs(self) -> int:
        """Epochs of the whole training, with those of the pre-stage."""
        return self.pre_stage_epochs + self.epochs

    def train_epoch(self) -> None:
        """Train the next epoch, of the pre-stage or, with a test at its end, of the row itself."""
        if len(self.pre_stage_losses) < self.pre_stage_epochs:
            done = len(self.pre_stage_losses)
            # Its batches are in orders that the row's own epochs do not have.
            loss = self._train(self.objectives[0], done, self.pre_stage_epochs, order=self.epochs + done)
            self.pre_stage_losses.append(loss)
            if len(self.pre_stage_losses) == self.pre_stage_epochs:
                self.optimizer: torch.optim.Optimizer = self._new_optimizer()
        else:
            done = len(self.history)
            loss = self._train(self.objective, done, self.epochs, order=done)
            self.history.append((loss, self.accuracy()))

    def _train(self, objective, done, epochs, order):
        """One epoch after `done` of `epochs`; returns the mean loss."""
        rate = LEARNING_RATES[self.training.network] * 0.5 * (1 + math.cos(math.pi * done / epochs))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        batches = self._batches(order)
        begin, steps = done * len(batches), epochs * len(batches)
        losses = [self.step(index, objective, begin + i, steps) for i, index in enumerate(batches)]
        return torch.stack(losses).mean().item()

    def _batches(self, order):
        """Index tensors of an epoch's batches, in the order of that number.

        A last batch that is not full is left out, because its statistics are noisy.
        """
        # A function of (seed, number) alone: a resumed epoch needs no state to see the same order.
        generator = torch.Generator().manual_seed(derived_seed(self.training.seed, order))
        samples = torch.randperm(self.samples, generator=generator).to(self.device)
        full = self.samples - self.samples % self.batch_size
        return samples[:full].split(self.batch_size)

    @torch.no_grad()
    def accuracy(self) -> float:
        """The share of test images that the (first) student classifies correctly, in percent."""
        self.network.eval()
        batches = self.data.test_images.split(EVALUATION_BATCH)
        answers = [self.student(images).argmax(dim=1) for images in batches]
        correct = (torch.cat(answers) == self.data.test_labels).sum()
        return 100.0 * correct.item() / len(self.data.test_labels)

    # ---- checkpoints -----------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """All that the rest of the training depends on."""
        return {
            "network": self.network.state_dict(),
            "objectives": self.objectives.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pre_stage_losses": self.pre_stage_losses,
            "history": self.history,
            # For losses that draw random numbers; the order of the batches does not depend on it.
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""
        self.network.load_state_dict(state["network"])
        self.objectives.load_state_dict(state["objectives"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.pre_stage_losses: list[Any] = list(state["pre_stage_losses"])
        self.history: list[tuple[Any, ...]] = [tuple(epoch) for epoch in state["history"]]
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
