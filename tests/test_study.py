"""`kdfast study`: what each study writes, that a stopped one continues to the same bits, that errors are one line."""

import importlib
import os
from pathlib import Path

import pytest
import torch
from commands import refused, rows

for extra in ("sklearn", "PIL", "matplotlib", "rich"):
    pytest.importorskip(extra, reason="the [compare] extra is not installed")


from PIL import Image  # noqa: E402

import kdfast  # noqa: E402
from kdfast import _kernels  # noqa: E402
from kdfast.analysis import effective_logit  # noqa: E402
from kdfast.cli import main  # noqa: E402
from kdfast.lab.studies import data_free, digits, explain, residual, runner, scenes, segmentation, wide  # noqa: E402
from kdfast.runs import checkpoints  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def private_state(monkeypatch, tmp_path):
    """Keep the families' "warned once" marks, and any run without --out, to the test."""
    monkeypatch.setattr(_kernels, "_warned", set())
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny(monkeypatch, request):
    """The studies' networks and samples, as few as show that the parts fit together."""
    monkeypatch.setattr(residual, "BLOCKS", 1)
    sizes = {"TRAINING": 64, "TEST": 8, "EPOCHS": 1, "STUDENT_STEPS": 2, "IMAGES": 32, "BATCHES": 1, "STEPS": 3}
    sizes |= {"DIGITS": 20, "DIGIT_EPOCHS": 1, "DIGIT_STEPS": 2, "DIGIT_STUDENT_STEPS": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(data_free, name, value)
    for cached in (data_free._training_scenes, data_free._test_scenes):
        cached.cache_clear()  # they were drawn, or will be, in another number
        request.addfinalizer(cached.cache_clear)
    monkeypatch.setattr(explain, "IMAGES", 3)
    monkeypatch.setattr(explain, "NOISE", {"noises": 4, "steps": 6})
    for name, value in {"TRAINING": 32, "TEST": 8, "SHOWN": 2}.items():
        monkeypatch.setattr(segmentation, name, value)
    monkeypatch.setattr(wide, "WIDTH", 64)
    monkeypatch.setattr(wide, "SIZES", (8, 16))
    monkeypatch.setattr(wide, "TEACHER_STEPS", {"teacher": 100, "stopped early": 10})
    monkeypatch.setattr(wide, "CHECK", {"width": 128, "samples": 8, "soft_ratio": 0.5, "steps": 20, "rate": 1.0})


TINY = {
    "residual": ["--epochs", "1", "--seeds", "1"],
    "wide": ["--seeds", "2"],
    "explain": ["--epochs", "3", "--seeds", "2"],
    "data-free": [],
    "segmentation": ["--epochs", "1", "--seeds", "1"],
}


@pytest.mark.parametrize("name", TINY)
def test_study_stopped_anywhere_ends_with_the_same_bits(name, tiny, tmp_path, monkeypatch, capsys):
    """Each third step is the last before a Ctrl-C; pictures, table and records are those of a run without any."""
    study = importlib.import_module(f"kdfast.lab.studies.{name.replace('-', '_')}")
    arguments = ["study", name, *TINY[name]]
    assert main([*arguments, "--out", "whole"]) == 0
    whole = capsys.readouterr()
    assert max(map(len, whole.out.splitlines()[:3])) <= 80
    for picture in study.PICTURES:
        with Image.open(tmp_path / "whole" / picture) as image:
            assert min(image.size) > 200
    save, done, stops = checkpoints.save, [], 0

    def save_or_stop(path, state):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(path.name)
        save(path, state)

    monkeypatch.setattr(checkpoints, "save", save_or_stop)
    arguments += ["--out", "pause"]
    while (code := main([*arguments, *(["--resume"] if stops else [])])) == 130:
        assert f"continue with: kdfast study {name} --resume --out pause" in capsys.readouterr().err
        stops += 1
        done.clear()
    assert code == 0 and stops
    for file in runner.files(study):
        assert (tmp_path / "pause" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert capsys.readouterr().out.replace("pause", "whole") == whole.out


def test_residual_rows(tiny):
    assert main(["study", "residual", "--epochs", "2", "--seeds", "1", "--seed", "3", "--out", "run"]) == 0
    found = rows("run/results.csv")
    assert [row["network"] for row in found] == list(residual.ROWS) and {row["seed"] for row in found} == {"3"}
    assert all(float(row["accuracy_percent"]) > 15 for row in found), "nothing has learnt"
    teacher = checkpoints.load(Path("run/checkpoints/teacher-seed-3.pt"))["network"]
    assert len(teacher) > len(checkpoints.load(Path("run/checkpoints/joint-seed-3.pt"))["network"]), "the shortcuts"


@pytest.mark.parametrize("soft_ratio", [0.1, 0.5, 1.0])
def test_wide_soft_ratio_loss_is_least_at_the_effective_logit(soft_ratio):
    teacher, labels = torch.randn(2, 32, dtype=torch.float64).unbind()
    labels = (labels > 0).double()
    student = effective_logit(3 * teacher, labels, soft_ratio, 2.0).requires_grad_()
    loss = wide.soft_ratio_loss(student, 3 * teacher, labels, soft_ratio, 2.0)
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-12
    assert wide.soft_ratio_loss(student + 0.1, 3 * teacher, labels, soft_ratio, 2.0) > loss


def test_wide_student_is_the_least_squares_solution():
    """The kernel is that of all gradients, and the fitted student the shortest step of the weights to its targets."""
    inputs, target = torch.randn(12, 64, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    weights = [w.requires_grad_() for w in wide._start(32, seed=0)]
    logits, _ = wide._student(inputs, *weights)
    gradients = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(z, weights, retain_graph=True)]) for z in logits]
    )
    with torch.no_grad():
        kernel, start = wide.kernel(inputs, *weights)
        torch.testing.assert_close(kernel, gradients @ gradients.T)
        index = torch.tensor([0, 5, 7])
        length, fitted = wide.fitted(kernel, start, target, index)
        step = torch.linalg.pinv(gradients[index]) @ (target - start)[index]
        torch.testing.assert_close(length, step.norm())
        torch.testing.assert_close(fitted, start + gradients @ step)
        torch.testing.assert_close(fitted[index], target[index])


def test_explain_counts_the_concepts_of_quantify_knowledge(monkeypatch):
    """Of one checkpoint, rho is the share of images with a concept, and the slope over a distance of 1 their number."""
    monkeypatch.setattr(explain, "IMAGES", 4)
    _, ink = explain.pictured()
    sigma = torch.rand(4, 1, 8, 8, dtype=torch.float64) * 0.5 + 0.01
    sigma[0] = 0.9  # nothing is kept of this image
    found, _ = explain.concepts(sigma)
    knowledge = kdfast.quantify_knowledge(sigma, [0.5, 0.5], [1], ink)
    for side, key in ((ink[:, None], "fore"), (~ink[:, None], "back")):
        counts = (found & side).sum((1, 2, 3)).double()
        torch.testing.assert_close(knowledge[f"{key}_max_slope"], counts.mean())  # per distance, which is 1
        torch.testing.assert_close(knowledge[f"{key}_percent"], (counts > 0).double().mean())
    assert ink.flatten(1).any(1).all() and not ink.flatten(1).all(1).any()


def test_explain_teaches_the_stages_by_features_alone():
    network, teacher = explain.ConvNet(1, 10, (4, 8, 64)), explain.ConvNet(1, 10, (16, 32, 64))
    objective = explain._from_features(network, teacher.eval())
    images, labels = digits.load().train_images[:16], digits.load().train_labels[:16]
    gradients = [
        torch.autograd.grad(objective(images, y, 0), network.stages[0][0].weight)[0] for y in (labels, labels.flip(0))
    ]
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


# ---- scenes and their detector ---------------------------------------------------------------------------------------
def test_scenes_show_what_their_boxes_say():
    """Each box holds one colour that the slope behind it does not have, and another seed gives other scenes."""
    images, boxes, labels = scenes.scenes(20, 0)
    again, other = scenes.scenes(20, 0), scenes.scenes(20, 1)
    assert torch.equal(images, again[0]) and not torch.equal(images, other[0])
    assert (
        images.min() >= 0
        and images.max() <= 1
        and (labels >= 0).any(1).all()
        and set(labels.unique().tolist()) == {-1, 0, 1, 2}
    )
    for image, box, label in zip(images, boxes, labels, strict=True):
        for left, top, right, bottom in box[label >= 0].tolist():
            row, column = int((top + bottom) / 2), int((left + right) / 2)
            centre = image[:, row - 1 : row + 2, column - 1 : column + 2]
            assert centre.flatten(1).std(1).max() < 0.15, "the centre of every shape has its colour"
            assert 0 <= left < right <= scenes.SIDE and 0 <= top < bottom <= scenes.SIDE


def test_detector_loss_rises_away_from_what_decodes_to_the_boxes():
    _, boxes, labels = scenes.scenes(20, 0)
    raw = torch.zeros(20, 8, 8, 8)
    raw[:, 0] = -5
    for i, j in (labels >= 0).nonzero().tolist():
        left, top, right, bottom = (boxes[i, j] / scenes.CELL).tolist()
        x, y = (left + right) / 2, (top + bottom) / 2
        own = raw[i, :, int(y), int(x)]
        own[0] = 5
        own[1:3] = torch.tensor([x % 1, y % 1]).logit()
        own[3:5] = torch.tensor([right - left, bottom - top]).log()
        own[5 + labels[i, j]] = 20
    found = scenes.decode(raw)
    assert scenes.mean_average_precision(found, boxes, labels) == pytest.approx(100)
    for i, (seen, names, scores) in enumerate(found):
        want = boxes[i, labels[i] >= 0]
        overlaps = scenes.box_overlap(seen, want)
        assert len(seen) == len(want) and overlaps.amax(1).min() > 0.999 and (scores > 0.99).all()
        assert torch.equal(names, labels[i, labels[i] >= 0][overlaps.argmax(1)])
    least = scenes.detection_loss(raw, boxes, labels)
    for channel in range(5):
        changed = raw.clone()
        changed[:, channel] += 1.0
        assert scenes.detection_loss(changed, boxes, labels) > least, channel


def test_mean_average_precision():
    """By hand: two discs and one square; a second hit of a disc is wrong, and a class without objects counts 0."""
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 30, 30], [0, 20, 10, 30]]])
    labels = torch.tensor([[0, 0, 1]])
    seen = torch.stack([boxes[0, 0], boxes[0, 0] + 1, boxes[0, 1], boxes[0, 2]])
    found = [(seen, torch.tensor([0, 0, 0, 1]), torch.tensor([0.9, 0.8, 0.7, 0.6]))]
    # Discs: precision 1 at recall 1/2, then 2/3 at recall 1; squares 1; crosses 0.
    assert scenes.mean_average_precision(found, boxes, labels) == pytest.approx(100 * (5 / 6 + 1 + 0) / 3)
    nothing = [(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0))]
    assert scenes.mean_average_precision(nothing, boxes, labels) == 0


def test_class_maps_are_the_pixels_of_the_shapes():
    """Each shape's pixels have one colour but for the noise, and lie in its box."""
    images, boxes, labels = scenes.scenes(20, 0)
    maps = scenes.class_maps(boxes, labels)
    for image, of_image, box, label in zip(images, maps, boxes, labels, strict=True):
        assert set(of_image.unique().tolist()) == {0, *(label[label >= 0] + 1).tolist()}
        for (left, top, right, bottom), name in zip(box[label >= 0].tolist(), label[label >= 0].tolist(), strict=True):
            inside = torch.zeros_like(of_image, dtype=torch.bool)
            inside[round(top) : round(bottom) + 1, round(left) : round(right) + 1] = True
            assert image[:, inside & (of_image == 1 + name)].std(1).max() < 0.1
    assert scenes.mean_overlap(maps, maps) == 100
    half = torch.where(torch.arange(20)[:, None, None] < 10, maps, 0)
    assert scenes.mean_overlap(half, maps) < 80


def test_segmentation_rows(tiny):
    assert main(["study", "segmentation", "--epochs", "1", "--seeds", "2", "--out", "run"]) == 0
    found = [(row["kind"], row["network"], row["seed"]) for row in rows("run/results.csv")]
    want = [(kind, name, seed) for kind in segmentation.LOSSES for name in segmentation.names(kind) for seed in "01"]
    assert found == want


# ---- wrong arguments -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "STUDY: got '', expected one of residual, wide, explain, data-free, segmentation"),
        (["residuals"], "STUDY: got 'residuals', expected one of residual, wide, explain, data-free, segmentation"),
        (["residual", "--epochs", "0"], "--epochs: got '0', expected a whole number of at least 1"),
        (["wide", "--epochs", "1"], "--epochs: got '1', but kdfast study wide has no epochs"),
        (["data-free", "--seeds", "2"], "--seeds: got '2', but kdfast study data-free has no seeds"),
        (["residual", "--out", "other"], "has a results.csv that belongs to no run"),
        (["residual", "--resume"], "--resume: there is no run in runs to continue"),
    ],
)
def test_wrong_arguments(options, named, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/results.csv").write_text("of something else")
    assert named in refused(capsys, ["study", *options])
    assert os.listdir(tmp_path) == ["other"], "a refused study leaves files"


def test_resume_refuses_other_settings_and_damaged_files(tiny, tmp_path, capsys):
    assert main(["study", "residual", "--epochs", "1", "--seeds", "1"]) == 0
    again = ["study", "residual", "--resume"]  # the newest in runs
    assert "--epochs was 1 and is 2" in refused(capsys, [*again, "--epochs", "2"])
    (out,) = tmp_path.glob("runs/study-residual-*")
    assert "--study was residual and is wide" in refused(capsys, ["study", "wide", "--resume", "--out", str(out)])
    checkpoint = out / "checkpoints/kd-seed-0.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    assert f"{checkpoint.relative_to(tmp_path)} is damaged" in refused(capsys, again)
