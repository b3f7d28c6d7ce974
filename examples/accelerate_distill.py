"""Distils under Accelerate, on scikit-learn's digits: KD of the logits, and RKD of the embeddings of all processes.

pip install '.[compare]' accelerate  # in a clone
"""

import digits
import torch
from accelerate import Accelerator
from torch import nn

import kdfast
from kdfast.objectives import LOGITS, Objective, Term


def network(width):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


torch.manual_seed(0)
accelerator = Accelerator()
# The teacher: any trained network. It has nothing to learn, so it goes to the device and not through `prepare`.
teacher, student = digits.trained(network(256)).to(accelerator.device), network(16)
optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
model, optimizer, loader = accelerator.prepare(student, optimizer, digits.loader)
kd = Term(kdfast.KD(temperature=4.0, alpha=0.9), 1.0, (*LOGITS, "labels"))  # the cross-entropy is in it
objective = Objective([kd, Term(kdfast.RKD(), 0.1, ("student.3:input", "teacher.3:input"))])
with objective.observed("student", model) as ours, objective.observed("teacher", teacher) as theirs:
    for _ in range(10):
        for images, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(objective(ours(images), theirs(images), labels))
            optimizer.step()

print(f"student: {digits.accuracy(student.cpu()):.1f}% of the test digits")

# The process group ends its threads once nothing holds it: they must not outlive Python.
model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
accelerator.end_training()
