"""Recipes as data, and for models whose layers lay out their maps in other ways than (B, C, H, W)."""

import pytest
import torch
from torch import nn

import kdfast

timm = pytest.importorskip("timm", reason="the [train] extra is not installed")

from kdfast.objectives import RECIPES, AsMaps, Objective, Places, Term, recipe  # noqa: E402
from kdfast.training import settings  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, SIZE = 3, (3, 64, 64)


def test_the_table():
    """Every recipe says where its weights are from, and `kdfast train --help` lists them all."""
    assert tuple(RECIPES) == settings.RECIPES
    for name, row in RECIPES.items():
        assert row.source, name
        assert all(part.weight > 0 for part in row.parts)


class Small(nn.Module):
    """A network that says itself where its layers are."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(width)
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, 2 * width, 3), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.head = nn.Linear(2 * width, CLASSES)
        norms = [self.first[1], self.second[1]]
        self.places = Places(["first", "second"], "head:input", ["first.2:input", "second.2:input"], norms)

    def forward(self, images):
        return self.head(self.second(self.first(images)).mean((2, 3)))


@pytest.mark.parametrize("name", RECIPES)
def test_networks_of_your_own(name):
    student, teacher = Small(4), Small(6)
    images, labels = torch.randn(6, *SIZE), torch.arange(6) % CLASSES
    objective = recipe(name, student, teacher, n_data=6, labels=labels, image_size=SIZE).objective()
    with objective.observed("student", student) as ours, objective.observed("teacher", teacher) as theirs:
        loss = objective(ours(images), theirs(images), labels, index=torch.arange(6))
    assert list(objective.weights)[-1] == "cross_entropy"
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in (*student.parameters(), *objective.parameters()))


def swin(seed, width):
    torch.manual_seed(seed)
    sizes = {"embed_dim": width, "depths": (1, 1, 1), "num_heads": (1, 2, 4), "window_size": 4, "img_size": 64}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=CLASSES, **sizes).eval()


def resnet():
    torch.manual_seed(2)
    return timm.create_model("test_resnet", num_classes=CLASSES).eval()


def outputs_of(made, student, teacher, images):
    """The objective of the terms of `made`, and what the networks say that it reads."""
    objective = Objective(made.terms)
    with objective.observed("student", student) as ours, objective.observed("teacher", teacher) as theirs:
        return objective, ours(images), theirs(images)


@pytest.mark.parametrize("name", ["at", "nst", "fitnets", "vid"])
def test_channels_last(name):
    """Swin's stages are (B, H, W, C): the loss is that of their permuted maps."""
    student, teacher = swin(0, 8), swin(1, 16)
    made = recipe(name, student, teacher, image_size=SIZE)
    objective, *outputs = outputs_of(made, student, teacher, torch.randn(4, *SIZE))
    (term,) = made.terms
    maps = [
        [said[read.partition(".")[2]].permute(0, 3, 1, 2) for read in reads]
        for said, reads in zip(outputs, term.reads, strict=True)
    ]
    assert [x.shape[1] for x in maps[0]] == [x.shape[1] // 2 for x in maps[1]], "channels are not where they should be"
    assert (term.name, term.loss.student) == (name, ["NHWC"] * len(maps[0]))
    loss = objective.losses(*outputs)[name]
    assert torch.equal(loss, term.loss.loss(*maps))
    loss.backward()
    assert all(p.grad is not None for p in objective.parameters())


@pytest.mark.parametrize("name", ["at", "fitnets", "vid"])
def test_one_side_channels_last(name):
    student, teacher = swin(0, 8), resnet()
    made = recipe(name, student, teacher, image_size=SIZE)
    assert set(made.terms[0].loss.student) == {"NHWC"} and set(made.terms[0].loss.teacher) == {"NCHW"}
    objective, *outputs = outputs_of(made, student, teacher, torch.randn(2, *SIZE))
    objective(*outputs).backward()
    assert not isinstance(recipe(name, resnet(), resnet(), image_size=SIZE).terms[0].loss, AsMaps)


def test_equal_sides_and_channels():
    """A map with as many channels as rows: timm's output_fmt tells the layout."""
    student = swin(0, 16)  # its first stage is 16 x 16 x 16
    made = recipe("nst", student, swin(1, 16), image_size=SIZE)
    assert made.terms[0].loss.student == ["NHWC"] * 3


def test_tokens():
    """A ViT's tokens as a map of its patches, without the class token."""
    torch.manual_seed(0)
    tokens, maps = torch.randn(2, 1 + 12, 5), torch.randn(2, 6, 3, 4)
    expected = tokens[:, 1:].reshape(2, 3, 4, 5).permute(0, 3, 1, 2)
    assert torch.equal(AsMaps(kdfast.AT(), student=(3, 4))(tokens, maps), kdfast.AT()(expected, maps))
    focal, boxes = kdfast.FGD(expected.shape[1], maps.shape[1]), [torch.tensor([[0.0, 0, 5, 5]])] * len(maps)
    sizes = [(9, 12)] * len(maps)
    got = AsMaps(focal, student=(3, 4))(tokens, maps, boxes, sizes)  # what a loss takes beside maps
    assert torch.equal(got, focal(expected, maps, boxes, sizes))
    loss = AsMaps(kdfast.AT(), student=[(3, 4), "NCHW"])
    assert torch.equal(loss([tokens, maps], [maps, maps]), kdfast.AT()([expected, maps], [maps, maps]))
    term = Term(loss, 1.0, (["student.a", "student.b"], ["teacher.a", "teacher.b"]), "at")
    assert term.name == "at" and not term.gather


@pytest.mark.parametrize(
    ("layout", "x", "expected"),
    [
        ("CHW", (2, 3, 4, 4), "student must be NCHW, NHWC or the map's .* got 'CHW'"),
        ("NHWC", (2, 3, 4), r"must be \(B, H, W, C\), got shape \(2, 3, 4\)"),
        ((3, 4), (2, 11, 4), r"must be \(B, 12 or more, C\), got shape \(2, 11, 4\)"),
        (["NCHW"], [(2, 3, 4, 4)] * 2, "student must have 1 layers, as many as layouts, got 2"),
    ],
)
def test_wrong_layouts(layout, x, expected):
    x = [torch.zeros(shape) for shape in x] if isinstance(x, list) else torch.zeros(x)
    with pytest.raises(ValueError, match=expected):
        AsMaps(kdfast.AT(), student=layout)(x, x)
