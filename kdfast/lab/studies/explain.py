"""What a teacher changes in what a student knows: the pixels that its features keep, and when it learned to.

The student takes nothing from the teacher but its features, as in the paper: the mean squared error of the last maps
trains the stages, and the classifier learns from the labels without a gradient to the stages. Alone, the same network
learns all from the labels. The foreground is the ink of the digit.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdfast._extras import require
from kdfast.analysis import pixel_entropy, quantify_knowledge
from kdfast.lab.networks import ConvNet
from kdfast.lab.studies import Findings, Step, digits
from kdfast.ops import cross_entropy
from kdfast.procedures import learn_sigma
from kdfast.procedures.generations import frozen
from kdfast.runs.determinism import derived_seed
from kdfast.runs.tables import mean_and_spread

if TYPE_CHECKING:
    from kdfast.lab.study import Settings


__all__ = ["DEFAULTS", "PICTURES", "findings", "steps"]

DEFAULTS = {"epochs": 24, "seed": 0, "seeds": 3}
PICTURES = ("heatmaps.png", "concepts.png")

WIDTHS = {"teacher": (16, 32, 64), "alone": (4, 8, 64), "taught": (4, 8, 64)}
LABELS = {"teacher": "teacher", "alone": "student alone", "taught": "taught student"}
RATE = 1e-2
CHECKPOINTS = 6  # closer together where more is learned
IMAGES = 16  # of the test set, whose pixels are looked at
NOISE = {"noises": 32, "steps": 80}
THRESHOLD = 0.2  # nats below the background, from which a pixel is a concept


def steps(settings: "Settings") -> "list[Step]":
    """For each seed: teacher, student alone and student with teacher, each with its noise at the checkpoints."""
    return [
        Step(f"{name} seed {seed}", functools.partial(_train, settings, name, seed))
        for seed in settings.every_seed
        for name in WIDTHS
    ]


def checkpoints(epochs: int) -> list[int]:
    """The epochs, counted from 0, after which the network is looked at."""
    shares = torch.linspace(0, 1, CHECKPOINTS, dtype=torch.float64)
    return sorted({round(float(epochs**share)) - 1 for share in shares})


def pictured() -> tuple[Tensor, Tensor]:
    """-> the images, (IMAGES, 1, 8, 8), and where their ink is, (IMAGES, 8, 8)."""
    images = digits.load().test_images
    images = images[torch.linspace(0, len(images) - 1, IMAGES).long()]  # of every class: they lie in their order
    blank = images.amin()  # the same for all pixels: the digits are standardised as one channel
    return images, images[:, 0] > blank + 0.25 * (images.amax() - blank)


# ---- the trainings ---------------------------------------------------------------------------------------------------
def _train(settings, name, seed, results, progress):
    network = digits.seeded(lambda: ConvNet(1, 10, WIDTHS[name]), seed, *WIDTHS[name])
    objective = _from_labels(network)
    if name == "taught":
        teacher = ConvNet(1, 10, WIDTHS["teacher"])
        teacher.load_state_dict(results[f"teacher seed {seed}"]["network"])
        objective = _from_features(network, frozen(teacher))
    looks = checkpoints(settings.epochs)
    weights, distances, sigmas, accuracies = [_weights(network)], [], [], []

    def after(epoch):
        weights.append(_weights(network))
        distances.append((weights[-1] - weights[-2]).norm() / weights[0].norm())
        accuracies.append(digits.accuracy(network))
        if epoch in looks:
            sigmas.append(_look(network, derived_seed(seed, epoch)))
        progress((epoch + 1) / settings.epochs)

    digits.fit(network, objective, settings.epochs, RATE, seed, after)
    return {
        "network": network.state_dict(),
        "weight_distance": torch.stack(distances),
        "sigma": torch.stack(sigmas, dim=1),  # (images, checkpoints, 8, 8)
        "accuracies": accuracies,
    }


def _weights(network):
    """All weights of the stages, which make the features."""
    return torch.cat([p.detach().flatten() for p in network.stages.parameters()])


def _look(network, seed):
    requires = [p.requires_grad_(False) for p in network.eval().parameters()]
    generator = torch.Generator().manual_seed(seed)
    sigma = learn_sigma(network.stages, pictured()[0], 8, generator=generator, **NOISE)
    for p in requires:
        p.requires_grad_(True)
    return sigma


def _from_labels(network):
    return lambda images, labels, epoch: cross_entropy(network(images), labels)


def _from_features(network, teacher):
    def objective(images, labels, epoch):
        with torch.no_grad():
            target = teacher.stages(images)
        own = network.stages(images)
        logits = network.classify(own.detach())
        return (own - target).square().mean() + cross_entropy(logits, labels)

    return objective


# ---- what they show --------------------------------------------------------------------------------------------------
def concepts(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """-> which pixels are concepts, as `quantify_knowledge` has them, (images, checkpoints, 8, 8), and the ink."""
    ink = pictured()[1]
    entropy = pixel_entropy(sigma)
    background = torch.where(ink[:, None], 0.0, entropy).sum((2, 3)) / (~ink).sum((1, 2))[:, None]
    return background.mean(0)[:, None, None] - entropy > THRESHOLD, ink[:, None]


COLUMNS = {  # of the table: title -> key of `quantify_knowledge`
    "D_mean": "fore_max_mean",
    "D_std": "fore_max_std",
    "rho": "fore_percent",
}


def findings(settings: "Settings", results: dict[str, Any]) -> "Findings":
    """Knowledge of the three networks, over the seeds."""
    looks = checkpoints(settings.epochs)
    records, curves = [], {}
    for name in WIDTHS:
        for seed in settings.every_seed:
            result = results[f"{name} seed {seed}"]
            sigma = result["sigma"].double()
            found, ink = concepts(sigma)
            counts = [(found & side).sum((2, 3)).double().mean(0) for side in (ink, ~ink)]  # (checkpoints,) each
            curves.setdefault(name, []).append(torch.stack(counts))
            knowledge = quantify_knowledge(sigma, result["weight_distance"], looks, pictured()[1], THRESHOLD)
            values = {key: value.item() for key, value in knowledge.items() if not value.dim()}
            inside, outside = (count[-1].item() for count in counts)
            records.append(
                {
                    "network": name,
                    "seed": seed,
                    "accuracy_percent": result["accuracies"][-1],
                    "foreground_concepts": inside,
                    "background_concepts": outside,
                    **values,
                }
            )
    rows = []
    for name in WIDTHS:
        group = [record for record in records if record["network"] == name]
        keys = ("accuracy_percent", "foreground_concepts", "background_concepts")
        cells = [mean_and_spread([record[key] for record in group], 1) for key in keys]
        rows.append([LABELS[name], *cells, *(_mean(group, key) for key in COLUMNS.values())])
    ink = pictured()[1].double().mean()
    return Findings(
        titles=["network", "accuracy %", "in ink", "beside", *COLUMNS],
        rows=rows,
        records=records,
        notes=[
            f"digits, {settings.epochs} epochs, {settings.seeds} seeds; {IMAGES} test images of 64 pixels, of which "
            f"{64 * ink:.0f} are ink",
            "in ink, beside: visual concepts per image after the last epoch, on the digit and on its background",
            "D_mean, D_std: path of the weights until the concepts in the ink are most, over the images",
            "rho: share of all concepts in the ink that any checkpoint had, which the last one has",
        ],
        pictures={
            "heatmaps.png": _heatmaps(settings, results, looks),
            "concepts.png": _curves(curves, looks),
        },
    )


def _mean(group, key):
    return f"{sum(record[key] for record in group) / len(group):.2f}"


def _heatmaps(settings, results, looks):
    """Images, and the entropy of their pixels at the last checkpoint of each network of the first seed."""
    images, ink = pictured()
    shown = min(10, len(images))
    figure = require("matplotlib.figure", extra="compare").Figure(figsize=(9.6, 5), dpi=150, layout="constrained")
    panels = figure.subplots(1 + len(WIDTHS), shown, squeeze=False)
    maps = {name: pixel_entropy(results[f"{name} seed {settings.seed}"]["sigma"][:, -1]) for name in WIDTHS}
    low, high = (torch.stack(list(maps.values())).quantile(q).item() for q in (0.02, 0.98))
    for number in range(shown):
        panels[0, number].imshow(images[number, 0].numpy(), cmap="gray_r")
        for row, values in enumerate(maps.values(), start=1):
            drawn = panels[row, number].imshow(values[number].numpy(), cmap="inferno_r", vmin=low, vmax=high)
            panels[row, number].contour(ink[number].double().numpy(), levels=[0.5], colors="white", linewidths=0.6)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
    for panel, label in zip(panels[:, 0], ["digit", *LABELS.values()], strict=True):
        panel.set_ylabel(label, fontsize=8)
    figure.colorbar(drawn, ax=panels[1:, :], label="entropy (nats): light is kept")
    figure.suptitle(f"Information kept of each pixel after epoch {looks[-1] + 1}; white: edge of the ink", fontsize=10)
    return figure


def _curves(curves, looks):
    figure = require("matplotlib.figure", extra="compare").Figure(figsize=(8, 3.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    epochs = [epoch + 1 for epoch in looks]
    for name, counts in curves.items():
        for panel, lines in zip(panels, torch.stack(counts, dim=1), strict=True):
            (line,) = panel.plot(epochs, lines.mean(0), marker=".", label=LABELS[name])
            panel.fill_between(epochs, lines.amin(0), lines.amax(0), color=line.get_color(), alpha=0.15, linewidth=0)
    for panel, title in zip(panels, ("on the digit", "on its background"), strict=True):
        panel.set(title=title, xlabel="epoch", xscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("visual concepts per image")
    panels[1].legend(fontsize=8)
    return figure
