"""`kdfast study`: what each study writes, that a stopped one continues to the same bits, that errors are one line."""

import csv
import importlib
import os
from pathlib import Path

import pytest
import torch

for extra in ("sklearn", "PIL", "matplotlib", "rich"):
    pytest.importorskip(extra, reason="the [distill] extra is not installed")

from PIL import Image  # noqa: E402

import kdfast  # noqa: E402
from kdfast import _kernels  # noqa: E402
from kdfast.cli import main  # noqa: E402
from kdfast.distill import storage  # noqa: E402
from kdfast.procedures import effective_logit  # noqa: E402
from kdfast.study import digits, explain, residual, run, wide  # noqa: E402


@pytest.fixture(autouse=True)
def private_state(monkeypatch, tmp_path):
    """Keep the families' "warned once" marks, and any run without --out, to the test."""
    monkeypatch.setattr(_kernels, "_warned", set())
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny(monkeypatch):
    """The studies' networks and samples, as few as show that the parts fit together."""
    monkeypatch.setattr(residual, "BLOCKS", 1)
    monkeypatch.setattr(explain, "IMAGES", 3)
    monkeypatch.setattr(explain, "NOISE", {"noises": 4, "steps": 6})
    monkeypatch.setattr(wide, "WIDTH", 64)
    monkeypatch.setattr(wide, "SIZES", (8, 16))
    monkeypatch.setattr(wide, "TEACHER_STEPS", {"teacher": 100, "stopped early": 10})
    monkeypatch.setattr(wide, "CHECK", {"width": 128, "samples": 8, "soft_ratio": 0.5, "steps": 20, "rate": 1.0})


TINY = {
    "residual": ["--epochs", "1", "--seeds", "1"],
    "wide": ["--seeds", "2"],
    "explain": ["--epochs", "3", "--seeds", "2"],
}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def error_line(capsys):
    """The one line that the command has printed to stderr."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]  # "[1/3]" is progress
    assert len(lines) == 1, lines
    assert lines[0].startswith("kdfast study") and ": error: " in lines[0]
    return lines[0]


@pytest.mark.parametrize("name", TINY)
def test_study_stopped_anywhere_ends_with_the_same_bits(name, tiny, tmp_path, monkeypatch, capsys):
    """Each third step is the last before a Ctrl-C; pictures, table and records are those of a run without any."""
    study = importlib.import_module(f"kdfast.study.{name.replace('-', '_')}")
    arguments = ["study", name, *TINY[name]]
    assert main([*arguments, "--out", "whole"]) == 0
    whole = capsys.readouterr()
    assert max(map(len, whole.out.splitlines()[:3])) <= 80
    for picture in study.PICTURES:
        with Image.open(tmp_path / "whole" / picture) as image:
            assert min(image.size) > 200
    save, done, stops = storage.save_checkpoint, [], 0

    def save_or_stop(path, state):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(path.name)
        save(path, state)

    monkeypatch.setattr(storage, "save_checkpoint", save_or_stop)
    arguments += ["--out", "pause"]
    while (code := main([*arguments, *(["--resume"] if stops else [])])) == 130:
        assert f"continue with: kdfast study {name} --resume --out pause" in capsys.readouterr().err
        stops += 1
        done.clear()
    assert code == 0 and stops
    for file in run.files(study):
        assert (tmp_path / "pause" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert capsys.readouterr().out.replace("pause", "whole") == whole.out


def test_residual_rows(tiny):
    assert main(["study", "residual", "--epochs", "2", "--seeds", "1", "--seed", "3", "--out", "run"]) == 0
    found = rows("run/results.csv")
    assert [row["network"] for row in found] == list(residual.ROWS) and {row["seed"] for row in found} == {"3"}
    assert all(float(row["accuracy_percent"]) > 15 for row in found), "nothing has learnt"
    teacher = storage.load_checkpoint(Path("run/checkpoints/teacher-seed-3.pt"))["network"]
    assert len(teacher) > len(storage.load_checkpoint(Path("run/checkpoints/joint-seed-3.pt"))["network"]), (
        "the shortcuts"
    )


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
    """Of one checkpoint rho is the share of the images with a concept, and the slope over a distance of 1 their number."""
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


# ---- wrong arguments -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "STUDY: got '', expected one of residual, wide, explain"),
        (["residuals"], "STUDY: got 'residuals', expected one of residual, wide, explain"),
        (["residual", "--epochs", "0"], "--epochs: got '0', expected a whole number of at least 1"),
        (["residual", "--seed", "-1"], "--seed: got '-1', expected"),
        (["residual", "--seeds", "two"], "--seeds: got 'two', expected"),
        (["residual", "--threads", "0"], "--threads: got '0', expected"),
        (["wide", "--epochs", "1"], "--epochs: got '1', but kdfast study wide has no epochs"),
        (["residual", "--out", "file"], "file is a file"),
        (["residual", "--out", "other"], "has a results.csv that belongs to no run"),
    ],
)
def test_wrong_arguments(options, named, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/results.csv").write_text("of something else")
    assert main(["study", *options]) == 2
    assert named in error_line(capsys)
    assert sorted(os.listdir(tmp_path)) == ["file", "other"], "a refused study leaves files"


def test_resume_refuses_other_settings_and_damaged_files(tiny, tmp_path, capsys):
    arguments = ["study", "residual", "--epochs", "1", "--seeds", "1", "--out", "run"]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(arguments) == 2
    assert "holds a run already; continue it with --resume" in error_line(capsys)
    assert main([*arguments, "--resume", "--epochs", "2"]) == 2
    assert "--epochs was 1 and is 2" in error_line(capsys)
    checkpoint = tmp_path / "run/checkpoints/kd-seed-0.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    assert main(["study", "residual", "--out", "run", "--resume"]) == 2
    assert f"{checkpoint.relative_to(tmp_path)} is damaged" in error_line(capsys)
    (tmp_path / "run/settings.json").write_text("{}")
    assert main(["study", "residual", "--out", "run", "--resume"]) == 2
    assert "settings.json is damaged" in error_line(capsys)


def test_resume_without_out_takes_the_newest_of_the_study(tiny, tmp_path):
    assert main(["study", "residual", "--epochs", "1", "--seeds", "1"]) == 0
    assert main(["study", "residual", "--resume"]) == 0
    assert len(list(tmp_path.glob("runs/study-residual-*"))) == 1


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the command."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
