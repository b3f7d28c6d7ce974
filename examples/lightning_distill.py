"""Distils under Lightning, on scikit-learn's digits: KD of the logits and AT of a map, as one objective.

pip install '.[compare]' lightning  # in a clone
"""

import digits
import lightning
import torch
from torch import nn

import kdfast
from kdfast.objectives import LOGITS, Objective, Term


class Distillation(lightning.LightningModule):
    """Trains `student` on the labels, and on what the teacher says."""

    def __init__(self, student, teacher, terms):
        super().__init__()
        self.student, self.teacher, self.objective = student, teacher, Objective(terms)
        self.ours, self.theirs = (self.objective.observed(*x) for x in (("student", student), ("teacher", teacher)))

    def training_step(self, batch):
        images, labels = batch
        return self.objective(self.ours(images), self.theirs(images), labels)

    def configure_optimizers(self):
        return torch.optim.Adam([*self.student.parameters(), *self.objective.parameters()], lr=0.01)


def network(width):
    convolutions = nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3, stride=2), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(4 * width, 10))


lightning.seed_everything(0)
teacher, student = digits.trained(network(32)), network(8)  # the teacher: any trained network
kd = Term(kdfast.KD(temperature=4.0, alpha=0.9), 1.0, (*LOGITS, "labels"))  # the cross-entropy is in it
terms = [kd, Term(kdfast.AT(), 100.0, ("student.3", "teacher.3"))]
trainer = lightning.Trainer(max_epochs=10, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(Distillation(student, teacher, terms), digits.loader)
print(f"student: {digits.accuracy(student.cpu()):.1f}% of the test digits")
