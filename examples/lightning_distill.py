"""Distils under Lightning, on scikit-learn's digits: KD of the logits and AT of a map, with kdfast.capture.

pip install kdfast lightning scikit-learn
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import kdfast


def network(width):
    """(B, 1, 8, 8) -> (B, 10); its layer "3" gives a map (B, width, 8, 8)."""
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * width, 10))


class Training(lightning.LightningModule):
    """Trains `model` on labels, and on what `teacher` says where there is one."""

    def __init__(self, model, teacher=None):
        super().__init__()
        self.model, self.kd, self.at = model, kdfast.KD(temperature=4.0, alpha=0.9), kdfast.AT()
        self.teacher = teacher and teacher.eval().requires_grad_(False)

    def on_fit_start(self):
        self.captured = [kdfast.capture(net, ["3"]) for net in (self.model, self.teacher) if net]

    def on_fit_end(self):
        for features in self.captured:
            features.remove()

    def training_step(self, batch):
        images, labels = batch
        logits = self.model(images)
        if self.teacher is None:
            return F.cross_entropy(logits, labels)
        loss = self.kd(logits, self.teacher(images), labels)  # the cross-entropy is in it
        return loss + 100 * self.at(*(features["3"] for features in self.captured))

    def configure_optimizers(self):
        return torch.optim.Adam(self.model.parameters(), 1e-2)


def main(epochs=8):
    """-> the student's accuracy on the last 297 digits."""
    lightning.seed_everything(0)
    images, labels = (torch.as_tensor(x) for x in load_digits(return_X_y=True))
    images = images.view(-1, 1, 8, 8).float() / 16
    data = torch.utils.data.TensorDataset(images[:1500], labels[:1500])
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True)
    teacher, student = network(32), network(8)
    for networks in ([teacher], [student, teacher]):
        options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
        lightning.Trainer(max_epochs=epochs, **options).fit(Training(*networks), loader)
    return (student(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()


if __name__ == "__main__":
    print(f"student: {main():.1%} of the test digits")
