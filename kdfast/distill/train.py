"""Training one network with one loss, so that a stopped training continues bit for bit."""

import contextlib
import math
import operator
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kdfast.distill.ensembles import LAYOUTS, Together
from kdfast.distill.losses import LossRow
from kdfast.distill.models import STUDENT, TEACHER, ConvNet, Outputs

__all__ = ["Batch", "Objective", "Run", "Trainer", "derived_seed", "reproducible"]

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
    def file_name(self):
        """The name of its checkpoint."""
        return f"{self.name}-seed{self.seed}.pt"


@dataclass(frozen=True)
class Batch:
    """What a loss may read in one step; `samples` and `train_labels` are of the whole training set.

    `students` are all that learn together, `student` the first of them; `teachers` are several beside the `teacher`.
    """

    student: Outputs
    teacher: Outputs | None
    images: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    samples: int
    train_labels: torch.Tensor
    students: Together | tuple = ()
    teachers: Together | tuple = ()
    epoch: int = 0


class Objective(nn.Module):
    """A row's loss and the cross-entropy beside it."""

    def __init__(self, row, example):
        super().__init__()
        self.row = row
        self.loss = row.build(example)
        self._read = [operator.attrgetter(name) for name in row.reads]

    def distillation(self, batch):
        """The row's loss alone."""
        return self.loss(*[read(batch) for read in self._read])

    def forward(self, batch):
        """The weighted sum that a step minimises."""
        value = self.row.weight * self.distillation(batch)
        if self.row.cross_entropy:
            value = value + self.row.cross_entropy * F.cross_entropy(batch.student.logits, batch.labels)
        return value


@contextlib.contextmanager
def reproducible(threads):
    """Inside, the same inputs give the same bits: deterministic algorithms and a fixed number of threads."""
    # cuBLAS reads it when it starts; without it some of its sums depend on timing.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    deterministic = torch.utils.deterministic
    before_threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    before_fill = deterministic.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # a debugging aid that would be timed as part of each step
    try:
        yield
    finally:
        torch.set_num_threads(before_threads)
        torch.use_deterministic_algorithms(before)
        deterministic.fill_uninitialized_memory = before_fill


def derived_seed(*parts):
    """One seed from several numbers: seed 0, epoch 1 has nothing in common with seed 1, epoch 0."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class Trainer:
    """A run in progress: network, objective, optimizer, epochs done and their history.

    All runs of one seed start a student from the same weights and see the same batches, whatever the loss.
    """

    def __init__(self, run, data, epochs, batch_size, teacher, teachers=()):
        self.run, self.data, self.epochs = run, data, epochs
        self.device, self.samples = data.train_labels.device, len(data.train_labels)
        self.batch_size = min(batch_size, self.samples)
        self.teacher, self.teachers = teacher, teachers
        self.history = []  # (mean training loss, test accuracy) of each epoch
        widths = TEACHER if run.network == "teacher" else STUDENT
        torch.manual_seed(derived_seed(run.seed, *widths))
        self.network = self._students(lambda: ConvNet(data.train_images.shape[1], len(data.classes), widths))
        self.objective = Objective(run.row, self._example()).to(self.device)
        parameters = [*self.network.parameters(), *self.objective.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATES[run.network], fused=True)

    def _students(self, make):
        """The network of the run, or several that learn together."""
        row = self.run.row
        return (make() if row.students == 1 else LAYOUTS[row.layout](make, row.students)).to(self.device)

    def outputs(self, images):
        """What each student says about `images`, as Together."""
        outputs = self.network(images)
        return outputs if isinstance(outputs, Together) else Together([outputs])

    def _example(self):
        """The batch of outputs whose shapes a loss is built from; running it must not move the batch statistics."""
        self.network.eval()
        with torch.no_grad():
            return self.batch(torch.arange(min(2, self.samples), device=self.device))

    # ---- one step --------------------------------------------------------------------------------------------------
    def batch(self, index):
        """The training images at `index` (B,) and what the networks say about them."""
        images = self.data.train_images[index]
        with torch.no_grad():
            teacher = self.teacher(images) if self.teacher is not None else None
            teachers = Together(network(images) for network in self.teachers)
        labels, students = self.data.train_labels, self.outputs(images)
        several = {"students": students, "teachers": teachers, "epoch": len(self.history)}
        return Batch(students[0], teacher, images, labels[index], index, self.samples, labels, **several)

    def step(self, index):
        """One optimizer step on the training images at `index`; returns the detached loss."""
        value = self.objective(self.batch(index))
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        return value.detach()

    # ---- epochs ----------------------------------------------------------------------------------------------------
    def train_epoch(self):
        """Train one epoch, test, and append to the history."""
        epoch = len(self.history)
        rate = LEARNING_RATES[self.run.network] * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        losses = [self.step(index) for index in self._batches(epoch)]
        self.history.append((torch.stack(losses).mean().item(), self.accuracy()))

    def _batches(self, epoch):
        """Index tensors of the epoch's batches; a last one that is not full is left out, its statistics are noisy."""
        # A function of (seed, epoch) alone: a resumed epoch needs no state to see the same order.
        generator = torch.Generator().manual_seed(derived_seed(self.run.seed, epoch))
        order = torch.randperm(self.samples, generator=generator).to(self.device)
        full = self.samples - self.samples % self.batch_size
        return order[:full].split(self.batch_size)

    @torch.no_grad()
    def accuracy(self):
        """The share of test images that the (first) student classifies correctly, in percent."""
        self.network.eval()
        batches = self.data.test_images.split(EVALUATION_BATCH)
        answers = [self.outputs(images)[0].logits.argmax(dim=1) for images in batches]
        correct = (torch.cat(answers) == self.data.test_labels).sum()
        return 100.0 * correct.item() / len(self.data.test_labels)

    # ---- checkpoints -----------------------------------------------------------------------------------------------
    def state(self):
        """All that the rest of the training depends on."""
        return {
            "network": self.network.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            # For losses that draw random numbers; the order of the batches does not depend on it.
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load(self, state):
        """Continue from a `state`."""
        self.network.load_state_dict(state["network"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = [tuple(epoch) for epoch in state["history"]]
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
