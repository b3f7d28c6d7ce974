"""Training one network with one loss, so that a stopped training continues bit for bit."""

import dataclasses
import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.lab.experiments import LossRow
from kdfast.lab.networks import STUDENT, TEACHER, ConvNet, Observed, Outputs, Together
from kdfast.runs.determinism import derived_seed

if TYPE_CHECKING:
    from kdfast.lab.data import Data


__all__ = ["Batch", "Example", "Objective", "Run", "Trainer"]

# Adam's, with a cosine decay to 0; its steps do not grow with the scale of a loss.
LEARNING_RATES = {"teacher": 2e-3, "student": 1e-2}
EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Run:
    """One training: a network, "teacher" or "student", with the loss of `row`, from `seed`."""

    name: str
    network: str
    row: LossRow
    seed: int

    @property
    def file_name(self) -> str:
        """The name of its checkpoint."""
        return f"{self.name}-seed{self.seed}.pt"


@dataclass(frozen=True)
class Batch:
    """What a loss may read in one step. A network that the row does not read has not run."""

    students: Together  # all that learn together
    teacher: Outputs | None
    teachers: Together  # several beside that one
    images: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor  # positions in the training set
    epoch: int  # how many epochs the row has behind it, without its pre-stage's

    @property
    def student(self) -> "Outputs":
        """The first of the students: the only one, unless several learn together."""
        return self.students[0]


@dataclass(frozen=True)
class Example(Batch):
    """What a loss is built from: a batch without gradients, for which all networks of the row have run, and more."""

    samples: int  # of the training set
    train_labels: torch.Tensor
    teacher_network: ConvNet | None
    pre_stage: nn.Module | None = None  # the loss of the row's pre-stage


class Objective(nn.Module):
    """A row's loss and the cross-entropy beside it, and the objective of its pre-stage, if it has one."""

    def __init__(self, row: "LossRow", example: "Example") -> None:
        super().__init__()
        self.row = row
        self.pre_stage: Objective | None = None
        if row.pre_stage is not None:
            self.pre_stage = Objective(row.pre_stage, example)
            example = dataclasses.replace(example, pre_stage=self.pre_stage.loss)
        self.loss = row.build(example)
        self._read = [operator.attrgetter(name) for name in row.reads]

    def distillation(self, batch: "Batch | Example") -> Tensor:
        """The row's loss alone."""
        return self.loss(*[read(batch) for read in self._read])

    def forward(self, batch: "Batch | Example") -> Tensor:
        """The weighted sum that a step minimises."""
        value = self.row.weight * self.distillation(batch)
        if self.row.cross_entropy:
            value = value + self.row.cross_entropy * F.cross_entropy(batch.student.logits, batch.labels)
        return value


class Trainer:
    """A run in progress: networks, objective, optimizer, epochs done and their history.

    All runs of one seed start a (first) student from the same weights and see the same batches, whatever the loss. The
    networks are `Observed` until the ``with`` block around the trainer ends; the teacher only where a loss reads more
    than its logits.
    """

    def __init__(
        self,
        run: "Run",
        data: "Data",
        epochs: int,
        batch_size: int,
        teacher: "ConvNet | None",
        teachers: list[Any] | tuple[Any, ...] = (),
    ) -> None:
        self.run = run
        self.data = data
        self.epochs = epochs
        self.pre_stage_epochs: int = run.row.pre_stage_epochs(epochs)
        self.device: torch.device = data.train_labels.device
        self.samples: int = len(data.train_labels)
        self.batch_size: int = min(batch_size, self.samples)
        self.pre_stage_losses = []  # mean training loss of each epoch of the pre-stage
        self.history = []  # (mean training loss, test accuracy) of each epoch
        widths = TEACHER if run.network == "teacher" else STUDENT
        torch.manual_seed(derived_seed(run.seed, *widths))
        self.network = run.row.layout(
            lambda: ConvNet(data.train_images.shape[1], len(data.classes), widths), run.row.students
        ).to(self.device)
        self.teacher = teacher
        self.teachers = teachers
        self.observed: Observed = Observed(self.network)
        self.observed_teacher: Observed | None = Observed(teacher) if run.row.observes_teacher else None
        self.objective: Objective = Objective(run.row, self._example()).to(self.device)
        self.optimizer = self._new_optimizer()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.observed.remove()
        if self.observed_teacher is not None:
            self.observed_teacher.remove()

    @property
    def student(self) -> "ConvNet":
        """The network that is tested and may teach others: the first, if several learn together."""
        return self.network.networks[0]

    def _example(self):
        """The outputs whose shapes a loss is built from; making them must not move the batch statistics."""
        self.network.eval()
        index, labels = torch.arange(min(2, self.samples), device=self.device), self.data.train_labels
        images = self.data.train_images[index]
        with torch.no_grad():
            outputs = self.observed(images), *self._taught(images, self.run.row.taught, self.run.row.teachers)
        return Example(*outputs, images, labels[index], index, 0, self.samples, labels, self.teacher)

    def _new_optimizer(self):
        parameters = [*self.network.parameters(), *self.objective.parameters()]
        return torch.optim.Adam(parameters, lr=LEARNING_RATES[self.run.network], fused=True)

    # ---- one step --------------------------------------------------------------------------------------------------
    def _taught(self, images, teacher, teachers):
        """What the teacher says about `images`, if it has to, and the first so many of the teachers beside it."""
        several = Together(Outputs(network(images)) for network in self.teachers[:teachers])
        if not teacher:
            return None, several
        return self.observed_teacher(images)[0] if self.observed_teacher else Outputs(self.teacher(images)), several

    def batch(self, index: Tensor, row: "LossRow") -> "Batch":
        """The training images at `index` (B,) and what the networks that `row` reads say about them."""
        images = self.data.train_images[index].requires_grad_(row.jacobians)
        with torch.set_grad_enabled(row.jacobians):
            teacher, teachers = self._taught(images, row.reads_teacher, row.teachers)
        students = self.observed(images) if row.reads_student else Together()
        labels = self.data.train_labels[index]
        return Batch(students, teacher, teachers, images, labels, index, len(self.history))

    def step(self, index: Tensor, objective: "Objective") -> Tensor:
        """One optimizer step of `objective` on the training images at `index`; returns the detached loss."""
        value = objective(self.batch(index, objective.row))
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        return value.detach()

    # ---- epochs ----------------------------------------------------------------------------------------------------
    @property
    def epochs_done(self) -> int:
        """Epochs behind it, with those of the pre-stage."""
        return len(self.pre_stage_losses) + len(self.history)

    @property
    def all_epochs(self) -> int:
        """Epochs of the whole run, with those of the pre-stage."""
        return self.pre_stage_epochs + self.epochs

    def train_epoch(self) -> None:
        """Train the next epoch, of the pre-stage or, with a test at its end, of the row itself."""
        if len(self.pre_stage_losses) < self.pre_stage_epochs:
            done = len(self.pre_stage_losses)
            # Its batches are in orders that the row's own epochs do not have.
            loss = self._train(self.objective.pre_stage, done, self.pre_stage_epochs, order=self.epochs + done)
            self.pre_stage_losses.append(loss)
            if len(self.pre_stage_losses) == self.pre_stage_epochs:
                self.optimizer: torch.optim.Optimizer = self._new_optimizer()
        else:
            done = len(self.history)
            loss = self._train(self.objective, done, self.epochs, order=done)
            self.history.append((loss, self.accuracy()))

    def _train(self, objective, done, epochs, order):
        """One epoch after `done` of `epochs`; returns the mean loss."""
        rate = LEARNING_RATES[self.run.network] * 0.5 * (1 + math.cos(math.pi * done / epochs))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        return torch.stack([self.step(index, objective) for index in self._batches(order)]).mean().item()

    def _batches(self, order):
        """Index tensors of an epoch's batches, in the order of that number.

        A last batch that is not full is left out, because its statistics are noisy.
        """
        # A function of (seed, number) alone: a resumed epoch needs no state to see the same order.
        generator = torch.Generator().manual_seed(derived_seed(self.run.seed, order))
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
            "objective": self.objective.state_dict(),
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
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.pre_stage_losses: list[Any] = list(state["pre_stage_losses"])
        self.history: list[tuple[Any, ...]] = [tuple(epoch) for epoch in state["history"]]
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
