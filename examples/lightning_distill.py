"""Distils under Lightning, on scikit-learn's digits: KD of the logits and AT of a map, with kdfast.capture.

pip install '.[compare]' lightning  # in a clone
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdfast
from kdfast.lab.networks import STUDENT, TEACHER, ConvNet
from kdfast.lab.studies import digits


class Distillation(lightning.LightningModule):
    """Trains `student` on the labels, the teacher's logits and the teacher's map of one layer."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)
        self.kd, self.at = kdfast.KD(temperature=4.0, alpha=0.9), kdfast.AT()
        self.features = [kdfast.capture(network, ["stages.1"]) for network in (student, teacher)]

    def training_step(self, batch):
        images, labels = batch
        loss = self.kd(self.student(images), self.teacher(images), labels)  # the cross-entropy is in it
        return loss + 100 * self.at(*(features["stages.1"] for features in self.features))

    def configure_optimizers(self):
        return torch.optim.Adam(self.student.parameters(), lr=0.01)


lightning.seed_everything(0)
teacher, student = ConvNet(1, 10, TEACHER), ConvNet(1, 10, STUDENT)  # of 1 channel and 10 classes
# The teacher: any trained network.
digits.fit(teacher, lambda x, y, _: nn.functional.cross_entropy(teacher(x), y), epochs=10, rate=0.01, seed=0)
data = TensorDataset(digits.load().train_images, digits.load().train_labels)
trainer = lightning.Trainer(max_epochs=10, logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(Distillation(student, teacher), DataLoader(data, batch_size=64, shuffle=True))
print(f"student: {digits.accuracy(student.cpu()):.1f}% of the test digits")
