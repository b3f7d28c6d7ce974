"""Distils under Accelerate, on scikit-learn's digits: KD of the logits, and RKD of the embeddings of all processes.

pip install '.[compare]' accelerate  # in a clone
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdfast
from kdfast.lab.studies import digits

torch.manual_seed(0)
accelerator = Accelerator()
data = TensorDataset(digits.load().train_images, digits.load().train_labels)

# The teacher: any trained network. It has nothing to learn, so it goes to the device and not through `prepare`.
teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
digits.fit(teacher, lambda x, y, _: nn.functional.cross_entropy(teacher(x), y), epochs=10, rate=0.01, seed=0)
teacher.eval().requires_grad_(False).to(accelerator.device)

student = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
loader = DataLoader(data, batch_size=64, shuffle=True)
model, optimizer, loader = accelerator.prepare(student, torch.optim.Adam(student.parameters(), lr=0.01), loader)
kd, rkd, layer = kdfast.KD(temperature=4.0, alpha=0.9), kdfast.RKD(), "3:input"
with kdfast.capture(student, [layer]) as ours, kdfast.capture(teacher, [layer]) as theirs:
    for _ in range(10):
        for images, labels in loader:
            loss = kd(model(images), teacher(images), labels)  # the cross-entropy is in it
            embeddings = [kdfast.distributed.gather(features[layer]) for features in (ours, theirs)]
            optimizer.zero_grad()
            accelerator.backward(loss + 0.1 * rkd(*embeddings))
            optimizer.step()

print(f"student: {digits.accuracy(student.cpu()):.1f}% of the test digits")

# The process group ends its threads once nothing holds it: they must not outlive Python.
model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
accelerator.end_training()
