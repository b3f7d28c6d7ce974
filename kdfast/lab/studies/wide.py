"""Distillation in wide networks: how much data a soft label saves, and what a hard label beside it mends.

A wide network moves so little from its start that it is linear in its weights: the student that has fitted n samples is
a least-squares solution, ``|dw|^2 = r^T K^-1 r`` with K the kernel of its gradients (n, n), and r what its logits lack
to the effective logits, which are all that it learns of teacher, labels, soft ratio and temperature. The task is
whether a digit is odd; the teachers have been stopped at different times.
"""

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._extras import require
from kdfast.analysis import data_inefficiency, effective_logit
from kdfast.lab.studies import Findings, Step, digits
from kdfast.runs.determinism import derived_seed
from kdfast.runs.tables import mean_and_spread

if TYPE_CHECKING:
    from kdfast.lab.study import Settings


__all__ = ["DEFAULTS", "PICTURES", "findings", "soft_ratio_loss", "steps"]

DEFAULTS = {"seed": 0, "seeds": 10}
PICTURES = ("inefficiency.png", "accuracy.png")

WIDTH = 1024  # of the student's hidden layer
SIZES = (16, 32, 64, 128, 256, 512)  # of its training set
SOFT_RATIOS = (1.0, 0.99, 0.9, 0.5, 0.1, 0.01)
TEMPERATURE = 2.0
TEACHER_STEPS = {"teacher": 2000, "stopped early": 60, "stopped earlier": 20}
# The network that is trained in earnest, by gradient descent, to compare.
CHECK: dict[str, Any] = {"width": 4096, "samples": 64, "soft_ratio": 0.5, "steps": 4000, "rate": 4.0}


def soft_ratio_loss(student: Tensor, teacher: Tensor, labels: Tensor, soft_ratio: float, temperature: float) -> Tensor:
    """``rho H(sigma(t / T), sigma(s / T)) + (1 - rho) H(y, sigma(s))``, H the binary cross-entropy, meaned; rho =
    soft_ratio. Its derivative in s is 0 at the effective logit. Shapes: (B,) logits, labels 0 or 1; 0-d.
    """
    soft = F.binary_cross_entropy_with_logits(student / temperature, (teacher / temperature).sigmoid())
    hard = F.binary_cross_entropy_with_logits(student, labels.to(student.dtype))
    return soft_ratio * soft + (1 - soft_ratio) * hard


# ---- data and networks -----------------------------------------------------------------------------------------------
@functools.cache
def _samples():
    """-> inputs (1797, 64) of length 1 and labels, 1 for odd; the training half comes first. And its size."""
    data = digits.load()
    images = torch.cat([data.train_images, data.test_images]).flatten(1).double()
    odd = torch.cat([data.train_labels, data.test_labels]) % 2
    return images / images.norm(dim=1, keepdim=True), odd.double(), len(data.train_labels)


def _start(width, seed):
    """The weights of a student at its start: (width, 64) and (width,)."""
    generator = torch.Generator().manual_seed(derived_seed(seed, width))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((width, 64), (width,))]


def _student(inputs, hidden, last):
    """The logits of a student, and the activations (B, width)."""
    active = (inputs @ hidden.T).relu()
    return active @ last / math.sqrt(len(last)), active


def kernel(inputs: Tensor, hidden: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """-> the kernel of the student's gradients, of each pair of inputs (N, N), and its logits (N,)."""
    logits, active = _student(inputs, hidden, last)
    slopes = (active > 0) * last
    return (active @ active.T + slopes @ slopes.T * (inputs @ inputs.T)) / len(last), logits


def _teacher(count, seed, results, progress):
    inputs, labels, training = _samples()
    make = lambda: nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 1)).double()  # noqa: E731
    network = digits.seeded(make, seed, len(labels))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    inputs = 8 * inputs  # of size 1 a pixel
    for step in range(count):
        index = torch.randint(training, (64,))
        value = F.binary_cross_entropy_with_logits(network(inputs[index])[:, 0], labels[index])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        progress((step + 1) / count)
    with torch.no_grad():
        return {"logits": network(inputs)[:, 0]}


# ---- the measurement -------------------------------------------------------------------------------------------------
def steps(settings: "Settings") -> "list[Step]":
    """The teachers, a linearised student from each seed, and one student that is trained in earnest."""
    teachers = [Step(name, functools.partial(_teacher, count, settings.seed)) for name, count in TEACHER_STEPS.items()]
    students = [Step(f"student seed {seed}", functools.partial(_measure, seed)) for seed in settings.every_seed]
    return [*teachers, *students, Step("trained student", functools.partial(_train, settings.seed))]


def fitted(kernel: Tensor, start: Tensor, target: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The linearised student that has learnt `target` on the samples `index`: -> |dw|, logits of all samples (N,)."""
    lacking = (target - start)[index, None]
    share = torch.cholesky_solve(lacking, torch.linalg.cholesky(kernel[index][:, index]))
    return (lacking * share).sum().sqrt(), start + (kernel[:, index] @ share)[:, 0]


def _measure(seed, results, progress):
    """Lengths |dw| and test accuracies, each (teachers, soft ratios, sizes), on nested training sets of one draw."""
    inputs, labels, training = _samples()
    matrix, start = kernel(inputs, *_start(WIDTH, seed))
    order = torch.randperm(training, generator=torch.Generator().manual_seed(derived_seed(seed, training)))
    lengths, accuracies = torch.zeros(2, len(TEACHER_STEPS), len(SOFT_RATIOS), len(SIZES), dtype=torch.float64)
    for i, name in enumerate(TEACHER_STEPS):
        for j, soft_ratio in enumerate(SOFT_RATIOS):
            target = effective_logit(results[name]["logits"], labels, soft_ratio, TEMPERATURE)
            for k, size in enumerate(SIZES):
                lengths[i, j, k], logits = fitted(matrix, start, target, order[:size])
                accuracies[i, j, k] = 100 * _share_right(logits, labels, training)
        progress((i + 1) / len(TEACHER_STEPS))
    return {"lengths": lengths, "accuracies": accuracies}


def _share_right(logits, labels, training):
    """Of the test half."""
    return ((logits > 0) == (labels > 0))[training:].double().mean()


def _train(seed, results, progress):
    """A network itself, all its weights, by gradient descent on the soft-ratio loss; beside it the closed form."""
    inputs, labels, training = _samples()
    teacher, index = results["stopped early"]["logits"], torch.arange(CHECK["samples"])
    weights = [w.requires_grad_() for w in _start(CHECK["width"], seed)]
    before = [w.detach().clone() for w in weights]
    optimizer = torch.optim.SGD(weights, lr=CHECK["rate"], momentum=0.9)
    for step in range(CHECK["steps"]):
        logits, _ = _student(inputs[index], *weights)
        value = soft_ratio_loss(logits, teacher[index], labels[index], CHECK["soft_ratio"], TEMPERATURE)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        progress((step + 1) / CHECK["steps"])
    with torch.no_grad():
        moved = torch.cat([(w - b).flatten() for w, b in zip(weights, before, strict=True)]).norm()
        target = effective_logit(teacher, labels, CHECK["soft_ratio"], TEMPERATURE)
        predicted, linear = fitted(*kernel(inputs, *before), target, index)
        logits, _ = _student(inputs, *weights)
    far = (logits - target)[index].abs().max()
    answers = ((logits > 0) == (linear > 0))[training:].double().mean()
    return {name: x.item() for name, x in (("moved", moved), ("predicted", predicted), ("far", far), ("same", answers))}


# ---- what they show --------------------------------------------------------------------------------------------------
def findings(settings: "Settings", results: dict[str, Any]) -> "Findings":
    """Data inefficiency and accuracy by teacher and soft ratio."""
    students = [results[f"student seed {seed}"] for seed in settings.every_seed]
    lengths, accuracies = (torch.stack([s[key] for s in students]) for key in ("lengths", "accuracies"))
    inputs, labels, training = _samples()
    names = {
        name: f"{name}, {100 * _share_right(results[name]['logits'], labels, training):.1f} %" for name in TEACHER_STEPS
    }
    inefficiency = [
        [data_inefficiency(SIZES, lengths[:, i, j]) for j in range(len(SOFT_RATIOS))] for i in range(len(names))
    ]
    rows, records = [], []
    for i, name in enumerate(names):
        for j, soft_ratio in enumerate(SOFT_RATIOS):
            steepness, right = inefficiency[i][j], accuracies[:, i, j]
            rows.append(
                [
                    f"{names[name]}, {soft_ratio:g}",
                    f"{steepness.mean():.3f}",
                    *(mean_and_spread(right[:, k].tolist(), 1) for k in (0, -1)),
                ]
            )
            for k, size in enumerate(SIZES):
                records.append(
                    {
                        "teacher": name,
                        "soft_ratio": soft_ratio,
                        "samples": size,
                        "weight_change": lengths[:, i, j, k].mean().item(),
                        "data_inefficiency_to_next": steepness[k].item() if k + 1 < len(SIZES) else "",
                        "accuracy_percent": right[:, k].mean().item(),
                    }
                )
    return Findings(
        titles=["teacher, soft ratio", "inefficiency", f"% at n = {SIZES[0]}", f"% at n = {SIZES[-1]}"],
        rows=rows,
        records=records,
        notes=[*_notes(settings, results, names, inefficiency, accuracies.mean(0))],
        pictures={
            "inefficiency.png": _picture(
                names, SIZES[:-1], inefficiency, "samples n", "d ln |dw| / d ln n", SOFT_RATIOS, "soft ratio"
            ),
            "accuracy.png": _picture(
                names,
                SOFT_RATIOS,
                accuracies.mean(0).transpose(1, 2).tolist(),
                "soft ratio",
                "test accuracy (%)",
                SIZES,
                "samples",
            ),
        },
        sections=[rows[(i + 1) * len(SOFT_RATIOS) - 1][0] for i in range(len(names) - 1)],
    )


def _notes(settings, results, names, inefficiency, accuracies):
    yield f"odd or even digit, test set, T = {TEMPERATURE:g}, draws of samples and start: {settings.seeds}"
    yield f"inefficiency: d ln |dw| / d ln n, mean over n from {SIZES[0]} to {SIZES[-1]}; teachers with their accuracy"
    for i, name in enumerate(names):
        least = SOFT_RATIOS[int(torch.stack(inefficiency[i]).mean(1).argmin())]
        few, many = (SOFT_RATIOS[int(accuracies[i, :, k].argmax())] for k in (0, -1))
        yield (
            f"{name}: least data needed at soft ratio {least:g}; best at n = {SIZES[0]} with {few:g}, "
            f"at n = {SIZES[-1]} with {many:g}"
        )
    check = results["trained student"]
    yield (
        f"a network of width {CHECK['width']}, trained on {CHECK['samples']} samples: |dw| {check['moved']:.2f}, "
        f"in closed form {check['predicted']:.2f}; logits within {check['far']:.2g} of the effective "
        f"ones; the same answer on {100 * check['same']:.1f} % of the test set"
    )


def _picture(names, across, curves, xlabel, ylabel, legend, title):
    """One panel per teacher; ``curves[teacher][line]`` over `across`."""
    figure = require("matplotlib.figure", extra="compare").Figure(figsize=(9.6, 3.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True)
    for panel, name, lines in zip(panels, names.values(), curves, strict=True):
        for number, (label, line) in enumerate(zip(legend, lines, strict=True)):
            shade = (0.1 + 0.8 * number / len(legend), 0.35, 0.85 - 0.7 * number / len(legend))
            panel.plot(across, line, marker=".", color=shade, label=f"{label:g}")
        panel.set(title=name, xlabel=xlabel, xscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(ylabel)
    figure.legend(*panels[0].get_legend_handles_labels(), title=title, loc="outside right center", fontsize=8)
    return figure
