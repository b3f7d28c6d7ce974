"""`kdfast compare`: what it writes, that a stopped run continues bit for bit, and that each error is one clear line."""

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from commands import ENVIRONMENT, disk_that_is_full, refused, rows
from torch import nn

for extra in ("sklearn", "PIL", "matplotlib", "rich"):
    pytest.importorskip(extra, reason="the [compare] extra is not installed")

from PIL import Image  # noqa: E402

import kdfast  # noqa: E402
from kdfast import _extras, _kernels  # noqa: E402
from kdfast.cli import main  # noqa: E402
from kdfast.lab import compare, comparison, data, experiments, networks, report, timing, trainer  # noqa: E402
from kdfast.objectives import Part, Recipe, connected  # noqa: E402
from kdfast.runs import checkpoints  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def private_state(monkeypatch, tmp_path):
    """Keep the families' "warned once" marks, and any run without --out, to the test."""
    monkeypatch.setattr(_kernels, "_warned", set())
    monkeypatch.chdir(tmp_path)


def write_images(folder, count, side=8, colour=False, start=0):
    """`count` noise images whose brightness depends on `start`, so that classes can be told apart."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(start)
    for number in range(count):
        pixels = generator.integers(start, start + 128, (side, side, 3) if colour else (side, side))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of two class folders of gray images."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "dark", 12)
    write_images(root / "light", 12, start=64)
    return root


@pytest.fixture(scope="module")
def loaded(images):
    return data.load(str(images), 8)


def arguments(images, out, *more):
    """A run of two epochs with one seed and one loss."""
    names = {"--data": images, "--image-size": 8, "--loss": "kd", "--epochs": 2, "--batch-size": 8, "--seeds": 1}
    return ["compare", *(str(part) for pair in names.items() for part in pair), "--out", str(out), *more]


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    """The folder of a run that nothing has stopped."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert main(arguments(images, out)) == 0
    return out


def assert_same_results(out, expected):
    """Equal accuracies, losses and weights, bit for bit; times differ."""
    columns = ("loss", "seed", "accuracy_percent")
    ours, theirs = ([[row[name] for name in columns] for row in rows(f / "results.csv")] for f in (out, expected))
    assert ours == theirs
    assert (out / "history.csv").read_bytes() == (expected / "history.csv").read_bytes()
    for path in sorted((expected / "checkpoints").iterdir()):
        weights, others = (checkpoints.load(p)["network"] for p in (path, out / "checkpoints" / path.name))
        assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.fixture
def few_repeats(monkeypatch):
    """Times are measured in a moment: what is written and when does not depend on them."""
    monkeypatch.setattr(timing, "SECONDS", 0)


# `python -m kdfast` with times that are measured in a moment.
QUICK = """
import runpy
from kdfast.lab import compare, comparison, data, experiments, networks, report, timing, trainer  # noqa: E402
timing.SECONDS = 0
runpy.run_module("kdfast", run_name="__main__", alter_sys=True)
"""


# ---- results ---------------------------------------------------------------------------------------------------------
def test_digits_end_to_end(tmp_path):
    """All losses on the bundled digits, as a command in a process of its own."""
    command = [sys.executable, "-c", QUICK, "compare", "--loss=all", "--epochs=1", "--seeds=1", "--seed=5", "--out=run"]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ["teacher", "student", *compare.LOSSES]
    for name in names:
        assert any(line.split()[: len(name.split())] == name.split() for line in done.stdout.splitlines()), name
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stderr, "control codes in a pipe"
    results, history = rows(tmp_path / "run/results.csv"), rows(tmp_path / "run/history.csv")
    assert [row["loss"] for row in results] == [row["loss"] for row in history] == names
    assert [row["accuracy_percent"] for row in results] == [row["accuracy_percent"] for row in history]
    assert all(row["seed"] == "5" and float(row["step_ms"]) > 0 and float(row["objective_ms"]) > 0 for row in results)
    assert float(results[0]["accuracy_percent"]) > 50, "the teacher has not learnt"
    with Image.open(tmp_path / "run/curves.png") as image:
        assert min(image.size) > 300


def test_accuracy_is_of_the_test_set(loaded):
    """A network that always answers class 1 is right on the test images of class 1 alone."""
    trainer = trainer_of(experiments.ALONE, loaded, 1)
    with torch.no_grad():
        trainer.student.classifier.weight.zero_()
        trainer.student.classifier.bias.copy_(torch.tensor([0.0, 1.0]))
    assert trainer.accuracy() == 100 * (loaded.test_labels == 1).float().mean().item()


def results_of(*accuracies, **changed):
    """A training with each of these accuracies."""
    times = {"step_ms": 2.0, "objective_ms": 0.5, "loss_ms": 0.1, "fallback_ms": 0.3, "path": "kernel"} | changed
    return [report.Result("kd", seed, [(0.0, accuracy)], times) for seed, accuracy in enumerate(accuracies)]


def test_table_mean_and_spread(capsys):
    results = results_of(90.0, 92.0)
    for result in results:
        result.history.insert(0, (0.0, 50.0))
    report.write_table(results, ["a note"])
    output = capsys.readouterr().out
    for expected in ("91.00 ± 1.41", "2.00", "25 %", "0.10 : 0.30 (3.0x)", "a note"):
        assert expected in output


def test_spread_of_one_seed_is_left_out(capsys):
    report.write_table(results_of(90.0, fallback_ms=None, path="fallback"), [])
    output = capsys.readouterr().out
    assert "90.00" in output and "±" not in output and output.split().count("fallback") == 2  # the column and the cell


# ---- stopping and continuing -----------------------------------------------------------------------------------------
KILLED = """
import os, signal, sys
from kdfast.cli import main
calls, replace = 0, os.replace
def replace_and_die(source, target):
    global calls
    calls += 1
    if calls < int(sys.argv[1]):
        return replace(source, target)
    if sys.argv[2] == "after":
        replace(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_and_die
main(sys.argv[3:])
"""


def test_kill_and_resume(images, uninterrupted, tmp_path):
    """SIGKILL in the middle of a checkpoint, then SIGKILL between two, then to the end."""
    out = tmp_path / "run"
    # The first kill leaves the student's first checkpoint half made; the second comes after one of kd's.
    for moment, when, more in (("5", "before", []), ("5", "after", ["--resume"])):
        command = [sys.executable, "-c", KILLED, moment, when, *arguments(images, out, *more)]
        killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (out / "results.csv").exists()
    assert checkpoints.load(out / "checkpoints/kd-seed0.pt")["history"], "kd was not reached"
    assert main(["compare", "--resume", "--out", str(out)]) == 0
    assert_same_results(out, uninterrupted)


@pytest.mark.usefixtures("few_repeats")
@pytest.mark.parametrize("allowed", [0, 3, 9, 12], ids=["settings", "times", "results", "curves"])
def test_full_disk(allowed, images, uninterrupted, tmp_path, monkeypatch, capsys):
    """One line, and --resume ends with the same bits without training again what is trained."""
    out = tmp_path / "run"
    with disk_that_is_full(monkeypatch, allowed):
        line = refused(capsys, arguments(images, out))
    assert "No space left on device" in line and line.endswith("--resume continues")
    before = {path: path.read_bytes() for path in out.rglob("*.pt")}
    assert main(arguments(images, out, "--resume")) == 0
    assert_same_results(out, uninterrupted)
    finished = {path: content for path, content in before.items() if b"times" in content}
    assert all(path.read_bytes() == content for path, content in finished.items()), "a finished training ran again"


def test_resume_refuses(images, uninterrupted, tmp_path, monkeypatch, capsys):
    """Other losses, other images, a damaged checkpoint, tampered settings; and Ctrl-C says how to go on."""
    again = arguments(images, uninterrupted, "--resume")
    assert "--loss was kd and is kd,dkd" in refused(capsys, [*again, "--loss", "kd,dkd"])
    with monkeypatch.context() as patch:
        patch.setattr(data.Data, "fingerprint", lambda self: "other")
        assert f"the images of --data {images} have changed" in refused(capsys, again)
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    checkpoint = out / "checkpoints/teacher-seed0.pt"
    for state in (b"cut", checkpoints_of_another(checkpoint)):
        checkpoint.write_bytes(state)
        assert f"{checkpoint} is damaged" in refused(capsys, ["compare", "--resume", "--out", str(out)])
    settings = (out / "settings.json").read_text()
    (out / "settings.json").write_text(settings.replace('"kd"', '"kd,nothing"'))
    assert "settings.json: loss: got 'nothing'" in refused(capsys, ["compare", "--resume", "--out", str(out)])
    monkeypatch.setattr(trainer.Trainer, "train_epoch", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(arguments(images, tmp_path / "new")) == 130
    assert f"kdfast compare --resume --out {tmp_path / 'new'}" in capsys.readouterr().err


def checkpoints_of_another(path):
    """The bytes of a checkpoint that is whole, but of a network of other widths."""
    state = checkpoints.load(path)
    state["network"] = {name: x[:1] for name, x in state["network"].items() if x.dim()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_resume_without_out_takes_the_newest(images, tmp_path):
    assert main(arguments(images, "x")[:-2]) == 0
    assert main(["compare", "--resume"]) == 0
    assert len(list(tmp_path.glob("runs/compare-*"))) == 1


def test_timing_does_not_change_results(images, uninterrupted, tmp_path, monkeypatch):
    times = {"step_ms": 1.0, "objective_ms": 1.0, "loss_ms": 1.0, "fallback_ms": None, "path": "torch"}
    monkeypatch.setattr(timing, "measure", lambda trainer: times)
    assert main(arguments(images, tmp_path / "run")) == 0
    assert_same_results(tmp_path / "run", uninterrupted)


def test_resume_of_a_finished_run_trains_nothing(uninterrupted, monkeypatch, capsys):
    table = (uninterrupted / "results.csv").read_bytes()
    monkeypatch.setattr(trainer.Trainer, "train_epoch", lambda self: pytest.fail("trained again"))
    assert main(["compare", "--resume", "--out", str(uninterrupted)]) == 0
    assert "student alone" in capsys.readouterr().out
    assert (uninterrupted / "results.csv").read_bytes() == table


# ---- wrong arguments and data ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--epochs", "0"], "--epochs: got '0', expected a whole number of at least 1"),
        (["--batch-size", "1"], "--batch-size: got '1', expected a whole number of at least 2"),
        (["--loss", "kd,hinton"], "--loss: got 'hinton', expected all, or names from kd, reverse-kd"),
        (["--loss", ""], "--loss: got '', expected"),
        (["--device", "cuda:99"], "--device: got 'cuda:99'"),
        (["--image-size", "16"], "--image-size: the digits have a size of their own"),
        (["--data", "nowhere"], "nowhere is not a folder"),
        (["--out", "other"], "has a results.csv that belongs to no run"),
    ],
)
def test_wrong_arguments(options, named, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/results.csv").write_text("of something else")
    assert named in refused(capsys, ["compare", *options])
    assert os.listdir(tmp_path) == ["other"], "a refused run leaves files"


def test_unreadable_image(tmp_path, capsys):
    for name, content in (("garbage.png", b"no image"), ("cut.png", None)):
        root = tmp_path / name.replace(".", "-")
        write_images(root / "a", 2)
        write_images(root / "b", 2)
        (root / "b" / name).write_bytes(content or (root / "a/0.png").read_bytes()[:60])
        assert str(root / "b" / name) in refused(capsys, arguments(root, tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def test_class_folders(tmp_path, capsys):
    """An empty class folder, a single class, a single image, and a training folder without a test folder."""
    counts = {"empty/a": 2, "single/a": 2, "few/a": 2, "few/b": 1, "untested/train/a": 2}
    counts |= dict.fromkeys(("differ/train/a", "differ/train/b", "differ/test/a", "differ/test/c"), 1)
    for name, count in counts.items():
        write_images(tmp_path / name, count)
    (tmp_path / "empty/b").mkdir()
    (tmp_path / "empty/b/notes.txt").write_text("no image")
    for name, named in (
        ("empty", f"{tmp_path / 'empty'} has no images in 'b'; expected some in every class folder"),
        ("single", "only the class folder a"),
        ("few", f"class folder {tmp_path / 'few/b'} has 1 image"),
        ("untested", "no test or val"),
        ("differ", f"{tmp_path / 'differ/test'} has no 'b' and {tmp_path / 'differ/train'} has no 'c'; expected"),
    ):
        assert named in refused(capsys, arguments(tmp_path / name, tmp_path / "run"))


def test_train_and_test_folders(tmp_path):
    """The folders' own split, one colour image making all colour, another size, and 16 bits a pixel."""
    for part in ("train", "val"):
        write_images(tmp_path / part / "a", 3, side=20)
        write_images(tmp_path / part / "b", 2)
    write_images(tmp_path / "val/b/deeper", 1, colour=True)
    Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16)).save(tmp_path / "train/b/white.png")
    loaded = data.load(str(tmp_path), 10)
    assert loaded.classes == ["a", "b"]
    assert loaded.train_images.shape == (6, 3, 10, 10) and loaded.test_images.shape == (6, 3, 10, 10)
    assert loaded.train_labels.tolist() == loaded.test_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert loaded.train_images[5].std() < 1e-6 and loaded.train_images[5].min() == loaded.train_images.max()
    torch.testing.assert_close(loaded.train_images.mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)


def test_every_broken_image_is_named(tmp_path, capsys):
    write_images(tmp_path / "images/a", 3)
    write_images(tmp_path / "images/b", 3)
    broken = [tmp_path / "images" / name for name in ("a/1.png", "b/0.png")]
    for path in broken:
        path.write_text("no image")
    line = refused(capsys, arguments(tmp_path / "images", tmp_path / "run"))
    assert "cannot read 2 images, such as " in line and all(f"{path}: " in line for path in broken)


def test_files_that_are_no_images_are_counted(tmp_path, capsys):
    write_images(tmp_path / "a", 3)
    write_images(tmp_path / "b", 3)
    for name in ("a/notes.txt", "b/photo.heic", "b/.hidden"):
        (tmp_path / name).write_text("no image")
    assert len(data.load(str(tmp_path), 8).train_labels) == 4
    assert "left out 2 files in class folders whose suffixes are not those of images" in capsys.readouterr().err


@pytest.mark.parametrize("name", [b"\xff\xfe", b"\x1b[31mred"], ids=["not UTF-8", "escape sequence"])
def test_names_that_are_no_text(name, tmp_path, capsys):
    """They train, and are shown as escapes."""
    root = tmp_path / os.fsdecode(name)
    write_images(root / os.fsdecode(name), 6)
    write_images(root / "other", 6)
    assert main(arguments(root, tmp_path / "run", "--epochs", "1", "--batch-size", "4")) == 0
    (root / "other/0.png").write_text("no image")
    assert main(arguments(root, tmp_path / "another")) == 2
    printed = capsys.readouterr()
    assert "cannot read the image" in printed.err and "\x1b" not in printed.err + printed.out
    printed.err.encode(), printed.out.encode()


def test_memory_of_the_images(tmp_path, monkeypatch, capsys):
    """Beside what is read, 8-bit and as float32, there are no further copies of all pixels."""
    for name in ("a", "b"):
        write_images(tmp_path / name, 10, side=128, colour=True)
    monkeypatch.setattr(data, "CHUNK", 4)  # few of these images, as 1024 are few of many
    tracemalloc.start()
    loaded = data.load(str(tmp_path), 128)
    loaded.fingerprint()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    pixels = 20 * 3 * 128 * 128
    assert peak < 12 * pixels
    monkeypatch.setattr(data, "_read", lambda *arguments: (_ for _ in ()).throw(MemoryError))
    assert "do not fit into the memory; expected fewer images, or less than the 8 of --image-size" in refused(
        capsys, arguments(tmp_path, tmp_path / "run")
    )


def test_split_is_stratified_and_fixed(images):
    first, second = data.load("digits", 8), data.load("digits", 8)
    assert first.fingerprint() == second.fingerprint() != data.load(str(images), 8).fingerprint()
    counts = [torch.bincount(labels) for labels in (first.train_labels, first.test_labels)]
    assert (counts[0] - counts[1]).abs().max() <= 1 and sum(counts).sum() == 1797


@pytest.mark.parametrize(
    ("module", "package"),
    [("rich", "rich"), ("matplotlib", "matplotlib"), ("sklearn", "scikit-learn"), ("PIL", "pillow")],
)
def test_missing_extra(module, package, images, tmp_path, monkeypatch, capsys):
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == module:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Blocker(), *sys.meta_path])
    importlib.invalidate_caches()
    options = ["--out", "run"] if module == "sklearn" else arguments(images, tmp_path / "run")[1:]
    line = refused(capsys, ["compare", *options])
    assert (
        f"{package} is not installed; install it with: pip install " in line and package in line.split("pip install")[1]
    )
    assert "kdfast[" not in line, "the registry's kdfast may be another package"
    assert not (tmp_path / "run").exists()


def test_require_names_what_is_broken(tmp_path, monkeypatch):
    (tmp_path / "broken_extra.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    listed = ["torch>=2.11", "rich; extra == 'bench'", 'timm>=1.0.27; extra == "bench"', "pillow; extra == 'compare'"]
    monkeypatch.setattr(_extras.importlib.metadata, "requires", lambda name: listed)
    expected = r"broken_extra cannot be imported .*not_there_at_all.*: pip install rich 'timm>=1.0.27'$"
    with pytest.raises(_extras.MissingExtra, match=expected):
        _extras.require("broken_extra", extra="bench")
    assert _extras.require("json", extra="bench") is json


# ---- losses and times ------------------------------------------------------------------------------------------------
def convnet(widths):
    return networks.ConvNet(1, 3, widths)


@pytest.fixture(scope="module")
def noise():
    """Six images of three classes."""
    images, labels = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    return data.Data("noise", ["a", "b", "c"], images, labels, images, labels)


def trainer_of(row, given, epochs=2, teachers=None, seed=0):
    """A trainer of this row, with teachers that are made here, if no others are given."""
    torch.manual_seed(7)
    made = [networks.ConvNet(1, len(given.classes), networks.TEACHER).eval().requires_grad_(False) for _ in range(3)]
    teachers = made[: row.teachers] if teachers is None else teachers
    return trainer.Trainer(trainer.Training("row", "student", row, seed), given, epochs, 8, teachers)


def test_the_target_of_taid_moves_with_each_step(loaded):
    """By the paper's rule from TAID's own loss, also over a stop between two epochs."""
    epochs, alpha, beta, seen = 3, 5e-4, 0.99, []

    def one():
        made = trainer_of(experiments.ROWS["taid"], loaded, epochs)
        loss = made.objective.terms[0].loss
        assert isinstance(loss, kdfast.TAID)
        loss.register_forward_hook(lambda module, args, out: seen.append((out.item(), module.t.item())))
        return made

    with one() as made:
        for _ in range(epochs):
            made.train_epoch()
        whole = made.state()
    steps = len(seen)
    assert steps == epochs * (len(loaded.train_labels) // 8)
    t, momentum = 0.4, 0.0
    for number, (value, moved) in enumerate(seen):
        if number > 1:  # the first call only keeps the loss
            before, last = seen[number - 2][0], seen[number - 1][0]
            momentum = beta * momentum + (1 - beta) * (before - last) / (before + 1e-15)
            grown = t + alpha * (1 - t) / (1 + np.exp(-momentum))
            t = min(1.0, max(0.4 + 0.6 * (number - 1) / steps, grown))
        assert moved == pytest.approx(t, abs=1e-5), number
        assert value >= 0
    assert 0.4 < whole["objectives"]["0.taid.t"].item() <= 1.0
    with one() as made:
        made.train_epoch()
        half = made.state()
    with one() as made:
        made.load(half)
        for _ in range(epochs - 1):
            made.train_epoch()
        for name, x in made.state()["objectives"].items():
            assert torch.equal(x, whole["objectives"][name]), name
        for name, x in made.state()["network"].items():
            assert torch.equal(x, whole["network"][name]), name


@pytest.mark.filterwarnings("ignore::kdfast.FallbackWarning")
@pytest.mark.parametrize("row", [experiments.ALONE, *experiments.ROWS.values()], ids=["alone", *experiments.ROWS])
def test_loss_rows(row, noise):
    """Each row builds, reads what a batch has, and gives a finite value with a gradient for all that it reads."""
    assert row.teacher in ("teacher", "student", *experiments.ROWS)
    with trainer_of(row, noise) as made:
        for objective in made.objectives:
            batch = made.batch(torch.arange(6), objective)
            value = objective(**batch)
            said = batch["student"] or []
            assert len(said) in (0, row.students)
            # A pre-stage may leave the logits alone, or even the student: FT's is of the paraphraser.
            names = ["logits"] if objective is made.objective else objective.layers("student")
            read = [outputs[name] for outputs in said for name in names] or list(objective.parameters())
            for grad in torch.autograd.grad(value, read):
                assert value.shape == () and value.isfinite() and grad.isfinite().all() and grad.abs().sum() > 0


def test_rows_cover_the_losses_of_logits(noise):
    features = {*(f"student.{place}" for place in ("embedding", "map", "maps", "preactivations")), "images"}
    built = {type(trainer_of(experiments.ROWS["one"], noise).objective.terms[0].loss.loss)}
    for row in experiments.ROWS.values():
        if not features & {read for part in row.recipe.parts for read in part.reads} and not row.pre_stage:
            loss = trainer_of(row, noise).objective.terms[0].loss
            built.add(type(getattr(loss, "loss", loss)))
    since_2022 = ("LSKD", "NKD", "TTM", "WTTM", "CTKD", "SkewKL", "TVD", "AKL", "TAID", "AlphaBeta")
    names = (
        *since_2022,
        "KD",
        "ReverseKD",
        "JSD",
        "DKD",
        "DIST",
        "TfKDSelf",
        "TfKDReg",
        "LabelRefinery",
        "CWTM",
        "DKPP",
    )
    several = ("AEKD", "EnD", "EnDD", "DML", "ONE", "OKDDip", "KDCL", "FFL", "Codistillation")
    names = (*names, *several, "CollaborativeLearning", "DiversityCooperation")
    assert built == {getattr(kdfast, name) for name in names}
    assert set(experiments.ROWS) == set(compare.LOSSES), "kdfast/papers.py has the names of every row"


LAYERS = [f"stages.{number}" for number in range(3)] + [f"stages.{number}.relu:input" for number in range(3)]


@pytest.mark.parametrize("layout", [networks.Apart, networks.Branches])
def test_observed_students(layout):
    """What is observed of each of several students is what that network, run alone, computes."""
    model, pictures = layout(lambda: convnet(networks.STUDENT), 3).eval(), torch.rand(4, 1, 8, 8)
    observed = networks.Observed(model, [*LAYERS, "classifier:input"])
    together = observed(pictures)
    for network, outputs, logits in zip(model.networks, together, model(pictures), strict=True):
        x = pictures
        for number, stage in enumerate(network.stages):
            x = stage.norm(stage.convolution(x))
            torch.testing.assert_close(outputs[f"stages.{number}.relu:input"], x)
            x = x.relu()
            torch.testing.assert_close(outputs[f"stages.{number}"], x)
        torch.testing.assert_close(outputs["classifier:input"], x.mean((2, 3)))
        torch.testing.assert_close(outputs["logits"], logits)
    same = together[0]["stages.0"] is together[1]["stages.0"]
    assert same == (layout is networks.Branches), "common stages run once"
    observed.remove()
    with pytest.raises(RuntimeError, match="has ended"):
        observed(pictures)


def test_layers_of_the_losses():
    """What the losses with layers compute, from the public classes and the stages' weights of the official code."""
    torch.manual_seed(0)
    widths = networks.STUDENT, networks.TEACHER
    student, teacher = ([torch.randn(6, c, 8, 8) for c in channels] for channels in widths)
    norms = [stage.norm for stage in convnet(networks.TEACHER).stages]
    for built, loss in (
        (connected.Connected(kdfast.AB(reduction="mean"), *widths, halved=True), kdfast.AB()),
        (connected.Connected(kdfast.OFD(reduction="mean"), *widths, halved=True, norms=norms), kdfast.OFD()),
    ):
        maps = [connector(x) for connector, x in zip(built.connectors, student, strict=True)]
        margins = [[kdfast.ofd_margin(n.weight, n.bias)] for n in norms]
        more = margins if isinstance(loss, kdfast.OFD) else [[]] * 3
        parts = [loss(s, t, *rest) / 6 for s, t, rest in zip(maps, teacher, more, strict=True)]
        torch.testing.assert_close(built(student, teacher), parts[0] / 4 + parts[1] / 2 + parts[2])
    hints = connected.Hints([x.shape for x in student], [x.shape for x in teacher])
    assert [layer(x).shape for layer, x in zip(hints.regressors, student, strict=True)] == [x.shape for x in teacher]
    first = connected.Reconstruction(networks.TEACHER[-1])
    factors = connected.Factors(networks.STUDENT[-1], first)
    assert factors.paraphraser is first.paraphraser and first.factors == networks.TEACHER[-1] // 2


def test_runs_of_a_seed_are_paired(loaded):
    """Equal first weights and equal batches for each loss of a seed; others for another seed."""
    rows = ((experiments.ALONE, 0), (experiments.ROWS["tfkd-reg"], 0), (experiments.ALONE, 1))
    weights, batches = [], []
    for number, (row, seed) in enumerate(rows):
        made = trainer_of(row, loaded, seed=seed)
        torch.rand(number)  # a loss that draws random numbers must not change the order
        weights.append(made.student.classifier.weight)
        batches.append(torch.cat(made._batches(1)).tolist())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert batches[0] == batches[1] != batches[2]


@pytest.mark.filterwarnings("ignore::kdfast.FallbackWarning")
def test_students_that_learn_together(loaded):
    """The first starts as the student alone does, the others do not; branches have the same first stages."""
    alone = trainer_of(experiments.ALONE, loaded, 2)
    for name in ("dml", "one"):
        row = experiments.ROWS[name]
        made = trainer_of(row, loaded)
        one, several = [t.network.eval()(loaded.test_images) for t in (alone, made)]
        assert len(several) == row.students
        assert torch.equal(one[0], several[0]) and not torch.equal(*several[:2])
        stages = [network.stages[0] for network in made.network.networks]
        assert (stages[0] is stages[1]) == (row.layout is networks.Branches)
        made.train_epoch()
        # Tested is the first student, which the other ones have moved.
        answers = made.network(loaded.test_images)[0].argmax(1)
        assert made.history[0][1] == 100 * (answers == loaded.test_labels).float().mean().item()


@pytest.mark.filterwarnings("ignore::kdfast.FallbackWarning")
def test_objectives_of_students_that_learn_together(noise):
    """Written out: every student has its cross-entropy and what the others say; each its own gradient."""

    def value(name, epoch):
        made = trainer_of(experiments.ROWS[name], noise)
        batch = made.batch(torch.arange(6), made.objective) | {"epoch": epoch}
        a, b = (said["logits"].log_softmax(1) for said in batch["student"])
        ce = nn.functional.nll_loss(a, batch["labels"]) + nn.functional.nll_loss(b, batch["labels"])
        soft = -(b.exp() * a + a.exp() * b).sum(1).mean()
        entropies = -(a.exp() * a + b.exp() * b).sum(1).mean()
        return made.objective(**batch), ce, soft, entropies

    loss, ce, soft, entropies = value("dml", 0)
    torch.testing.assert_close(loss, ce + soft - entropies)
    loss, ce, *_ = value("codistillation", 4)
    torch.testing.assert_close(loss, ce)
    loss, ce, soft, _ = value("codistillation", 5)
    torch.testing.assert_close(loss, ce + soft)


def test_rescaled_branches():
    """The stages in common get the mean of the branches' gradients."""
    torch.manual_seed(0)
    pictures = torch.rand(4, 1, 8, 8)
    grads = []
    for rescale in (False, True):
        torch.manual_seed(1)
        model = networks.Branches(lambda: convnet(networks.STUDENT), 3, rescale)
        sum(z.square().sum() for z in model(pictures)).backward()
        common, own = next(model.networks[0].parameters()), model.networks[1].classifier.weight
        grads.append([common.grad, own.grad])
    torch.testing.assert_close(grads[0][0], 3 * grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


@pytest.fixture(scope="module")
def taught(images, tmp_path_factory):
    """A run of losses that need other trainings: its folder, its table, and (name, seed) -> student, teachers."""
    seen, table, out = {}, io.StringIO(), tmp_path_factory.mktemp("taught") / "run"

    class Spy(trainer.Trainer):
        def __init__(self, training, data, epochs, batch_size, teachers):
            super().__init__(training, data, epochs, batch_size, teachers)
            seen[training.name, training.seed] = self.student, teachers

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(table):
        patch.setattr(comparison, "Trainer", Spy)
        options = ("--loss", "ban-2,aekd,endd,kd,ab,ft", "--epochs", "1", "--seed", "3")
        assert main(arguments(images, out, *options)) == 0
    return out, table.getvalue(), seen


def test_earlier_students_and_other_teachers_are_trained_first(taught):
    """A second generation needs the first, which the table shows; an ensemble needs teachers that it does not show."""
    out, *_ = taught
    names = ["teacher", "student", "ban", "ban-2", "aekd", "endd", "kd", "ab", "ft"]
    assert [row["loss"] for row in rows(out / "results.csv")] == names
    trained = {path.name for path in (out / "checkpoints").iterdir()}
    assert trained == {f"{name}-seed3.pt" for name in names} | {f"teacher-seed{seed}.pt" for seed in (1003, 2003)}
    teachers = [checkpoints.load(out / f"checkpoints/teacher-seed{s}.pt") for s in (3, 1003)]
    weights = [state["network"]["networks.0.classifier.weight"] for state in teachers]
    assert not torch.equal(*weights)


def test_who_teaches_whom(taught):
    *_, seen = taught
    network = {key: value[0] for key, value in seen.items()}
    assert seen["ban", 3][1] == [network["student", 3]] and seen["ban-2", 3][1] == [network["ban", 3]]
    for several in ("aekd", "endd"):
        assert seen[several, 3][1] == [network["teacher", 1000 * i + 3] for i in range(3)]
    for trained in network.values():  # what a trainer watched, it has left as it was
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in trained.modules())


def test_table_says_what_came_before(taught):
    out, table, _ = taught
    assert "epochs of a pre-stage before: 1 (ab, ft)" in table
    assert {row["epoch"] for row in rows(out / "history.csv")} == {"1"}


def test_what_runs_in_a_step(loaded):
    """The layers of a network are watched only where a loss reads them, and what no loss reads does not run."""
    index = torch.arange(8)
    for name, layers in (("kd", 0), ("fitnets", 1), ("ft", 1), ("ofd", 3), ("label-refinery", 0), ("aekd", 0)):
        with trainer_of(experiments.ROWS[name], loaded, 1) as made:
            teacher = made.teachers[0].network
            for objective in made.objectives:
                batch = made.batch(index, objective)
                assert (batch["student"] is not None) == bool(objective.reads("student"))
                assert (batch["teacher"] is not None) == bool(objective.reads("teacher"))
            hooks = [x for x in teacher.modules() if x is not teacher and (x._forward_hooks or x._forward_pre_hooks)]
            assert len(hooks) == layers
            assert len(batch["teacher"]) == (3 if name == "aekd" else 1)
            torch.testing.assert_close(batch["teacher"][0]["logits"], teacher(batch["images"]))
        assert not any(x._forward_hooks or x._forward_pre_hooks for x in teacher.modules())


def test_all_is_every_row():
    for text in ("all", "all,kd", "kd, all"):
        assert compare._losses("--loss", text) == ",".join(compare.LOSSES)
    assert compare._losses("--loss", compare.Settings.loss) == compare.Settings.loss


# ---- pre-stages ------------------------------------------------------------------------------------------------------
def changes(trainer, steps):
    """Names of the weights that these epochs change, of the student and of the objective."""
    parameters = [*trainer.student.named_parameters(), *trainer.objectives.named_parameters()]
    before = [parameter.detach().clone() for _, parameter in parameters]
    for _ in range(steps):
        trainer.train_epoch()
    return {name for (name, now), was in zip(parameters, before, strict=True) if not torch.equal(now, was)}


@pytest.mark.parametrize(
    ("name", "first", "others_first", "then"),
    [
        ("fitnets", {"stages.0", "stages.1", "0."}, {"stages.2", "classifier"}, {"stages", "classifier"}),
        (
            "ft",
            {"0."},
            {"stages", "classifier", "1.factors.translator"},
            {"stages", "classifier", "1.factors.translator"},
        ),
        ("ab", {"stages", "0."}, {"classifier"}, {"stages", "classifier"}),
        ("fsp", {"stages", "0."}, {"classifier"}, {"stages", "classifier"}),
    ],
)
def test_what_a_pre_stage_trains(loaded, name, first, others_first, then):
    """The layers that each stage changes are exactly these; the teacher does not change, nor do the layers before."""
    trainer = trainer_of(experiments.ROWS[name], loaded, 9)
    teachers = [p for observed in trainer.teachers for p in observed.network.parameters()]
    weights = [parameter.clone() for parameter in teachers]
    assert (trainer.pre_stage_epochs, trainer.all_epochs, trainer.epochs_done) == (2, 11, 0)
    changed = changes(trainer, 2)
    assert len(trainer.pre_stage_losses) == trainer.epochs_done == 2 and not trainer.history
    assert not trainer.optimizer.state, "the momentum of the pre-stage goes on"
    assert all(any(key.startswith(part) for key in changed) for part in first), changed
    assert not any(key.startswith(part) for key in changed for part in others_first), changed
    changed = changes(trainer, 1)
    assert len(trainer.history) == 1 and trainer.epochs_done == 3
    assert all(any(key.startswith(part) for key in changed) for part in then), changed
    assert not any(key.startswith("0.") for key in changed), changed
    assert all(torch.equal(now, was) for now, was in zip(teachers, weights, strict=True))


def test_a_pre_stage_lowers_its_loss(loaded):
    """Each of the pre-stages learns, and its length is RepDistiller's share of the epochs."""
    staged = {name: row for name, row in experiments.ROWS.items() if row.pre_stage}
    assert list(staged) == ["fitnets", "ft", "ab", "fsp"]
    for name, row in staged.items():
        assert [row.pre_stage_epochs(epochs) for epochs in (1, 8, 9, 240)] == [1, 1, 2, 30]
        trainer = trainer_of(row, loaded, 80)
        for _ in range(10):
            trainer.train_epoch()
        assert trainer.pre_stage_losses[-1] < 0.8 * trainer.pre_stage_losses[0], name


@pytest.mark.usefixtures("few_repeats")
def test_stop_after_every_epoch(images, tmp_path, monkeypatch):
    """Pre-stages, Jacobians and students that learn together, resumed after each epoch, end with the same bits."""
    monkeypatch.setattr(experiments.Experiment, "pre_stage_epochs", lambda row, epochs: 2 if row.pre_stage else 0)
    assert main(arguments(images, tmp_path / "whole", "--loss", "ft,fitnets,jacobian,okddip")) == 0
    train_epoch, epochs = trainer.Trainer.train_epoch, 0

    def train_one_epoch(trainer):
        nonlocal epochs
        if epochs % 2:
            epochs += 1
            raise KeyboardInterrupt
        epochs += 1
        train_epoch(trainer)

    monkeypatch.setattr(trainer.Trainer, "train_epoch", train_one_epoch)
    code = main(arguments(images, tmp_path / "stopped", "--loss", "ft,fitnets,jacobian,okddip"))
    while code == 130:
        code = main(["compare", "--resume", "--out", str(tmp_path / "stopped")])
    assert code == 0 and epochs == 2 * (2 + 2 + 4 + 4 + 2 + 2) - 1
    assert_same_results(tmp_path / "stopped", tmp_path / "whole")
    for name in ("ft", "fitnets"):
        states = [checkpoints.load(tmp_path / f"{f}/checkpoints/{name}-seed0.pt") for f in ("whole", "stopped")]
        assert len(states[0]["pre_stage_losses"]) == 2
        assert states[0]["pre_stage_losses"] == states[1]["pre_stage_losses"]
        for key, x in states[0]["objectives"].items():
            assert torch.equal(x, states[1]["objectives"][key])


class Hint(nn.Module):
    """A loss with parameters and randomness of its own, on maps and embeddings."""

    def __init__(self, setting):
        super().__init__()
        self.regressor = nn.Conv2d(*setting.channels("student.map"), *setting.channels("teacher.map"), 1)
        self.register_buffer("seen", torch.zeros(setting.n_data))

    def forward(self, student, teacher, embedding, index):
        self.seen[index] += 1
        noise = torch.rand_like(teacher)
        return (self.regressor(student) - teacher).square().mul(noise).mean() + embedding.square().mean()


def test_new_row_is_enough(images, tmp_path, monkeypatch):
    """A loss that reads maps and embeddings, with parameters, buffers and random numbers, trains and resumes."""
    reads = ("student.map", "teacher.map", "student.embedding", "index")
    monkeypatch.setitem(compare.LOSSES, "hint", "a test")
    monkeypatch.setitem(experiments.ROWS, "hint", experiments.Experiment(Recipe((Part(Hint, reads),))))
    assert main(arguments(images, tmp_path / "whole", "--loss", "hint")) == 0
    state = checkpoints.load(tmp_path / "whole/checkpoints/hint-seed0.pt")
    assert state["objectives"]["0.hint.seen"].sum() == 2 * 16  # 2 epochs of 2 full batches of 8 among 20 images
    epochs = iter(range(5))  # of the 6 epochs, the last is left to the resumed run
    train_epoch = trainer.Trainer.train_epoch

    def stop_before_the_last(trainer):
        if next(epochs, None) is None:
            raise KeyboardInterrupt
        train_epoch(trainer)

    monkeypatch.setattr(trainer.Trainer, "train_epoch", stop_before_the_last)
    assert main(arguments(images, tmp_path / "stopped", "--loss", "hint")) == 130
    monkeypatch.setattr(trainer.Trainer, "train_epoch", train_epoch)
    torch.rand(7)  # the generator is not where the stopped run has left it
    assert main(["compare", "--resume", "--out", str(tmp_path / "stopped")]) == 0
    assert_same_results(tmp_path / "stopped", tmp_path / "whole")


def test_path_of_a_loss(loaded):
    """A loss on kernels is timed against its fallback; one without an op of kdfast has nothing to compare."""

    def times(name):
        return timing.measure(trainer_of(experiments.ROWS[name], loaded, 1))

    # Any function registered for CPU counts as a kernel, so the plain form stands in where none is built.
    with _kernels.override({name: op.fallback for name, op in _kernels.OPS.items()}, keys=("CPU",)):
        for name in ("kd", "ab", "jacobian"):  # ab's is that of its pre-stage: the labels' alone would be "torch"
            on_kernels = times(name)
            assert on_kernels["path"] == "kernel" and on_kernels["fallback_ms"] > 0
    plain = times("dist")
    assert plain["path"] == "torch" and plain["fallback_ms"] is None
    assert 0 < plain["loss_ms"] and 0 < plain["objective_ms"] < 10 * plain["step_ms"]
