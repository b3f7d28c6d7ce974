"""Distils under Accelerate, on scikit-learn's digits: KD of the logits, and RKD of the embeddings of all processes.

pip install kdfast accelerate scikit-learn
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import kdfast


def network(width):
    """(B, 64) -> (B, 10); its layer "2" takes in an embedding (B, width)."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def train(accelerator, model, data, loss_of, epochs):
    """-> `model`, frozen, after training it with loss_of(logits, digits, labels)."""
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True)
    wrapped, optimizer, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 1e-2), loader)
    for _ in range(epochs):
        for digits, labels in loader:
            loss = loss_of(wrapped(digits), digits, labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    return model.eval().requires_grad_(False)


def main(epochs=12):
    """-> the student's accuracy on the last 297 digits."""
    set_seed(0)
    accelerator = Accelerator()
    digits, labels = (torch.as_tensor(x) for x in load_digits(return_X_y=True))
    digits = digits.float() / 16
    data = torch.utils.data.TensorDataset(digits[:1500], labels[:1500])
    teacher = train(accelerator, network(256), data, lambda logits, _, labels: F.cross_entropy(logits, labels), epochs)
    student, kd, rkd = network(16), kdfast.KD(temperature=4.0, alpha=0.9), kdfast.RKD()
    with kdfast.capture(student, ["2:input"]) as ours, kdfast.capture(teacher, ["2:input"]) as theirs:

        def loss_of(logits, digits, labels):
            loss = kd(logits, teacher(digits), labels)  # the cross-entropy is in it
            embeddings = (kdfast.distributed.gather(features["2:input"]) for features in (ours, theirs))
            return loss + 0.1 * rkd(*embeddings)

        train(accelerator, student, data, loss_of, epochs)
    device = accelerator.device
    return (student(digits[1500:].to(device)).argmax(1) == labels[1500:].to(device)).float().mean().item()


if __name__ == "__main__":
    print(f"student: {main():.1%} of the test digits")
