"""`kdfast compare`: what it writes, that a stopped run continues bit for bit, and that each error is one clear line."""

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import ENVIRONMENT, full_disk, refused, rows
from processes import held
from torch import nn

for extra in ("sklearn", "PIL", "matplotlib", "rich"):
    pytest.importorskip(extra, reason="the [compare] extra is not installed")

from PIL import Image  # noqa: E402

import kdfast  # noqa: E402
from kdfast import _extras, _kernels  # noqa: E402
from kdfast.cli import main  # noqa: E402
from kdfast.lab import compare, comparison, data, experiments, layers, networks, report, students, timing, trainer  # noqa: E402, E501
from kdfast.runs import checkpoints, files, folder, tables  # noqa: E402
from kdfast.runs.errors import RunError  # noqa: E402

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
    for name in ("WARM_UP", "REPEATS", "MIN_REPEATS"):
        monkeypatch.setattr(timing, name, 1)


# `python -m kdfast` with times that are measured in a moment.
QUICK = """
import runpy
from kdfast.lab import timing
timing.WARM_UP = timing.REPEATS = timing.MIN_REPEATS = 1
runpy.run_module("kdfast", run_name="__main__", alter_sys=True)
"""


# ---- results ---------------------------------------------------------------------------------------------------------
def test_digits_end_to_end(tmp_path):
    """All losses on the bundled digits, as a command in a process of its own."""
    command = [sys.executable, "-c", QUICK, "compare", "--loss=all", "--epochs=1", "--seeds=1", "--seed=5", "--out=run"]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ["teacher", "student", *experiments.ROWS]
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


def test_table_on_a_narrow_terminal(capsys, monkeypatch):
    """Nothing is cut."""
    monkeypatch.setenv("COLUMNS", "40")
    tables.print_table(["loss", "accuracy %", "ms a step"], [["label-refinery", "91.00 ± 1.41", "1234567890.12"]], [])
    assert "label-refinery   91.00 ± 1.41   1234567890.12" in capsys.readouterr().out


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


WRITES = 13  # settings, 3 trainings of 2 epochs and their times, 3 files of results


@pytest.mark.usefixtures("few_repeats")
def test_full_disk_at_every_write(images, uninterrupted, tmp_path, monkeypatch, capsys):
    """Wherever the disk is full: one line, exit code 2, earlier files intact, and --resume ends with the same bits."""
    replace = os.replace
    monkeypatch.setattr(report, "_curves_png", lambda results, title: b"no picture")  # two runs for each write

    for allowed in range(WRITES + 1):
        out = tmp_path / str(allowed)
        remaining = iter(range(allowed))

        def replace_while_room(source, target, remaining=remaining):
            return (full_disk if next(remaining, None) is None else replace)(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_while_room)
            if allowed == WRITES:
                assert main(arguments(images, out)) == 0
                break
            line = refused(capsys, arguments(images, out))
        assert "No space left on device" in line and "--resume" in line
        assert not list(out.rglob("*.tmp")), "a full disk keeps a temporary file"
        before = {path: path.read_bytes() for path in out.rglob("*.pt")}
        assert main(arguments(images, out, "--resume")) == 0
        assert_same_results(out, uninterrupted)
        finished = {path: content for path, content in before.items() if b"times" in content}
        assert all(path.read_bytes() == content for path, content in finished.items()), "a finished training ran again"


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunError, match="No space left on device"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_planted_link(tmp_path):
    """Temporary files have names that nobody can know, and the lock follows no link."""
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (tmp_path / ".settings.json.tmp").symlink_to(target)
    files.write_atomically(tmp_path / "settings.json", b"new")
    assert (tmp_path / "settings.json").read_bytes() == b"new" and target.read_bytes() == b"precious"
    (tmp_path / files.LOCK).symlink_to(tmp_path / "made")
    with pytest.raises(RunError, match="--out: cannot write to"), files.locked(tmp_path):
        pass
    assert not (tmp_path / "made").exists()


def test_files_have_the_usual_permissions(tmp_path):
    files.write_atomically(tmp_path / "ours", b"")
    (tmp_path / "usual").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_one_folder_is_of_one_process(images, uninterrupted, tmp_path, capsys):
    """A second process is refused, at the start and on --resume; the lock of one that was killed is none."""
    out = tmp_path / "run"
    with held(out):
        for more in ([], ["--resume"]):
            assert main(arguments(images, out, *more)) == 2
            assert f"--out: another process is writing into {out}; " in capsys.readouterr().err
        assert sorted(os.listdir(out)) == sorted([files.LOCK, ".part.0.tmp"])
    assert main(arguments(images, out)) == 0
    assert not list(out.rglob("*.tmp"))
    assert_same_results(out, uninterrupted)


def test_a_run_that_began_meanwhile(images, tmp_path, monkeypatch, capsys):
    """Between the check of the folder and the first file, another process has started and ended a run there."""
    load = data.load

    def load_while_another_runs(*arguments):
        (tmp_path / "run").mkdir()
        (tmp_path / "run/settings.json").write_text("another's")
        return load(*arguments)

    monkeypatch.setattr(data, "load", load_while_another_runs)
    assert "holds a run already" in refused(capsys, arguments(images, tmp_path / "run"))
    assert (tmp_path / "run/settings.json").read_text() == "another's"


def test_newest_after_the_clock_was_set_back(tmp_path, monkeypatch):
    """The newest run is the one that was started last; two that start at once have two folders."""
    made = []
    for stamp, process in (
        ("20260302-101112", 7),
        ("20260302-101112", 5),
        ("20250101-000000", 11),
        ("20250101-000000", 9),
    ):
        monkeypatch.setattr(folder.time, "strftime", lambda form, stamp=stamp: stamp)
        monkeypatch.setattr(folder.os, "getpid", lambda process=process: process)
        made.append(folder._unused("compare"))
        made[-1].mkdir(parents=True)
        (made[-1] / "settings.json").touch()
        assert folder._newest("compare") == made[-1]
    assert len(set(made)) == 4


def test_interrupt(images, tmp_path, monkeypatch, capsys):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "train_epoch", interrupt)
    assert main(arguments(images, tmp_path / "run")) == 130
    assert f"kdfast compare --resume --out {tmp_path / 'run'}" in capsys.readouterr().err


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


def test_resume_without_out_takes_the_newest(images, tmp_path, capsys):
    options = arguments(images, "x")[:-2]
    assert main(options) == 0
    assert len(list(tmp_path.glob("runs/compare-*"))) == 1
    assert main(["compare", "--resume"]) == 0
    assert len(list(tmp_path.glob("runs/compare-*"))) == 1
    capsys.readouterr()
    assert "--epochs was 2 and is 3" in refused(capsys, ["compare", "--resume", "--epochs", "3"])


def test_resume_of_nothing(tmp_path, capsys):
    """A mistyped folder starts no default run."""
    (tmp_path / "empty").mkdir()
    for out, where in ((["--out", "typo"], "typo"), (["--out", "empty"], "empty"), ([], "runs")):
        assert f"--resume: there is no run in {where} to continue; to start one" in refused(
            capsys, ["compare", "--resume", *out]
        )
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["empty"]


def test_resume_at_the_first_start(images, uninterrupted, tmp_path, capsys):
    """With the options of a run it starts, so that one command serves a start and its restarts."""
    for said in (f"nothing to resume, starting in {tmp_path / 'run'}", ""):
        assert main(arguments(images, tmp_path / "run", "--resume")) == 0
        assert said in (stderr := capsys.readouterr().err) and ("nothing to resume" in stderr) == bool(said)
    assert_same_results(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--epochs", "3"], "--epochs was 2 and is 3"),
        (["--seed", "1", "--loss", "kd,dkd"], "--loss was kd and is kd,dkd; --seed was 0 and is 1"),
        (["--batch-size", "4", "--threads", "2"], "--batch-size was 8 and is 4; --threads was 1 and is 2"),
    ],
)
def test_resume_refuses_other_settings(images, uninterrupted, capsys, more, named):
    assert named in refused(capsys, arguments(images, uninterrupted, *more, "--resume"))


def test_resume_refuses_other_images_and_other_software(images, uninterrupted, tmp_path, capsys):
    settings = json.loads((uninterrupted / "settings.json").read_text())
    for key, value, named in (
        ("data", "0", f"the images of --data {images} have changed"),
        ("environment", {**settings["environment"], "torch": "1.0"}, f"torch was 1.0 and is {torch.__version__}"),
    ):
        (tmp_path / "settings.json").write_text(json.dumps({**settings, key: value}))
        assert named in refused(capsys, ["compare", "--resume", "--out", str(tmp_path)])


def damage_cut(content):
    return content[: len(content) // 2]


def damage_bit(content):
    """Flip one bit among the weights, which the pickle around them does not notice."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [damage_cut, damage_bit, lambda content: b""], ids=["cut", "bit", "empty"])
def test_damaged_checkpoint(images, uninterrupted, tmp_path, capsys, damage):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "settings.json").write_bytes((uninterrupted / "settings.json").read_bytes())
    checkpoint = tmp_path / "checkpoints/teacher-seed0.pt"
    checkpoint.write_bytes(damage((uninterrupted / "checkpoints" / checkpoint.name).read_bytes()))
    assert str(checkpoint) in refused(capsys, ["compare", "--resume", "--out", str(tmp_path)])


def test_damaged_settings(tmp_path, capsys):
    (tmp_path / "settings.json").write_text('{"settings": ')
    assert str(tmp_path / "settings.json") in refused(capsys, ["compare", "--resume", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", -5, "settings.json: epochs: got '-5', expected a whole number of at least 1"),
        ("threads", True, "settings.json: threads: got 'True', expected a whole number"),
        ("loss", "kd,nothing", "settings.json: loss: got 'nothing', expected all"),
        ("seeds", "2", "settings.json is damaged"),
        ("data", 5, "settings.json is damaged"),
    ],
)
def test_tampered_settings(name, value, expected, uninterrupted, tmp_path, capsys):
    stored = json.loads((uninterrupted / "settings.json").read_text())
    stored["settings"][name] = value
    (tmp_path / "settings.json").write_text(json.dumps(stored))
    assert expected in refused(capsys, ["compare", "--resume", "--out", str(tmp_path)])


# ---- wrong arguments and data ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--epochs", "0"], "--epochs: got '0', expected a whole number of at least 1"),
        (["--epochs", "ten"], "--epochs: got 'ten', expected"),
        (["--batch-size", "1"], "--batch-size: got '1', expected a whole number of at least 2"),
        (["--seed", "-1"], "--seed: got '-1', expected"),
        (["--seeds", "0"], "--seeds: got '0', expected"),
        (["--threads", "0"], "--threads: got '0', expected"),
        (["--loss", "kd,hinton"], "--loss: got 'hinton', expected all, or names from kd, reverse-kd"),
        (["--loss", ""], "--loss: got '', expected"),
        (["--device", "gpu"], "--device: got 'gpu', expected cpu or cuda"),
        (["--device", "cuda:99"], "--device: got 'cuda:99'"),
        (["--image-size", "16"], "--image-size: the digits have a size of their own"),
        (["--data", "nowhere"], "nowhere is not a folder"),
        (["--out", "file"], "file is a file"),
        (["--out", "other"], "has a results.csv that belongs to no run"),
    ],
)
def test_wrong_arguments(options, named, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/results.csv").write_text("of something else")
    assert named in refused(capsys, ["compare", *options])
    assert sorted(os.listdir(tmp_path)) == ["file", "other"], "a refused run leaves files"


def test_existing_run_is_not_overwritten(images, uninterrupted, capsys):
    before = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}
    assert "holds a run already; continue it with --resume" in refused(capsys, arguments(images, uninterrupted))
    assert all(path.read_bytes() == content for path, content in before.items())


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


def example(row):
    torch.manual_seed(0)
    pictures, labels = torch.rand(6, 1, 8, 8, requires_grad=True), torch.arange(6) % 3
    teachers = [convnet(networks.TEACHER) for _ in range(experiments.TEACHERS)]
    teacher, *_ = several = networks.Together(networks.Observed(network)(pictures)[0] for network in teachers)
    students = networks.Observed(row.layout(lambda: convnet(networks.STUDENT), row.students))(pictures)
    index, epoch, samples = torch.arange(6), 6, 6
    return trainer.Example(students, teacher, several, pictures, labels, index, epoch, samples, labels, teachers[0])


def a_teacher():
    return networks.ConvNet(1, 2, networks.TEACHER).eval().requires_grad_(False)


def trainer_of(row, loaded, epochs=2, teacher=None, teachers=(), seed=0):
    return trainer.Trainer(trainer.Run(row.name, "student", row, seed), loaded, epochs, 8, teacher, teachers)


def objectives(row, batch):
    """The objectives of the row's pre-stage, if it has one, and of the row itself."""
    objective = trainer.Objective(row, batch)
    return [stage for stage in (objective.pre_stage, objective) if stage is not None]


@pytest.mark.filterwarnings("ignore::kdfast.FallbackWarning")
@pytest.mark.parametrize("row", [experiments.ALONE, *experiments.ROWS.values()], ids=lambda row: row.name)
def test_loss_rows(row):
    """Each row builds, reads what a batch has, and gives a finite value with a gradient for every student."""
    assert row.summary and row.teacher in ("teacher", "student", *experiments.ROWS)
    assert experiments.ROWS.get(row.name, row) is row
    batch = example(row)
    assert len(batch.students) == row.students and batch.student is batch.students[0]
    for objective in objectives(row, batch):
        value = objective(batch)
        # A pre-stage may leave the logits alone, or even the student: FT's is of the paraphraser.
        student = batch.students.logits if objective.row is row else batch.student.maps[1:2]
        if not objective.row.reads_student:
            student = list(objective.parameters())
        if objective.row.reads[0] == "student.preactivations":
            student = batch.student.preactivations
        for grad in torch.autograd.grad(value, student):
            assert value.shape == () and value.isfinite() and grad.isfinite().all() and grad.abs().sum() > 0


def test_rows_cover_the_losses_of_logits():
    features = {"student.embedding", "student.maps", "student.preactivations", "images"}
    built = {type(experiments.ROWS["one"].build(example(experiments.ROWS["one"])).loss)}
    for row in experiments.ROWS.values():
        if not features & set(row.reads) and not row.pre_stage:
            loss = row.build(example(row))
            built.add(type(getattr(loss, "loss", loss)))
    names = ("KD", "ReverseKD", "JSD", "DKD", "DIST", "TfKDSelf", "TfKDReg", "LabelRefinery", "CWTM", "DKPP")
    several = ("AEKD", "EnD", "EnDD", "DML", "ONE", "OKDDip", "KDCL", "FFL", "Codistillation")
    names = (*names, *several, "CollaborativeLearning", "DiversityCooperation")
    assert built == {getattr(kdfast, name) for name in names}


def test_observed_network():
    network, pictures = networks.ConvNet(1, 3, networks.STUDENT), torch.rand(4, 1, 8, 8)
    (outputs,) = networks.Observed(network)(pictures)
    x = pictures
    for stage, before, after in zip(network.stages, outputs.preactivations, outputs.maps, strict=True):
        x = stage.norm(stage.convolution(x))
        torch.testing.assert_close(before, x)
        x = x.relu()
        torch.testing.assert_close(after, x)
    torch.testing.assert_close(outputs.embedding, x.mean((2, 3)))
    torch.testing.assert_close(outputs.logits, network.classifier(outputs.embedding))
    torch.testing.assert_close(outputs.probabilities.sum(1), torch.ones(4))


@pytest.mark.parametrize("layout", [students.Apart, students.Branches])
def test_observed_students(layout):
    """What is observed of each of several students is what that network, run alone, computes."""
    model, pictures = layout(lambda: convnet(networks.STUDENT), 3).eval(), torch.rand(4, 1, 8, 8)
    observed = networks.Observed(model)
    together = observed(pictures)
    assert [outputs.logits.shape for outputs in together] == [(4, 3)] * 3
    for network, outputs, logits in zip(model.networks, together, model(pictures), strict=True):
        (alone,) = networks.Observed(network)(pictures)
        for key in ("logits", "embedding", "maps", "preactivations"):
            torch.testing.assert_close(getattr(outputs, key), getattr(alone, key))
        torch.testing.assert_close(outputs.logits, logits)
    same = together[0].maps[0] is together[1].maps[0]
    assert same == (layout is students.Branches), "common stages run once"
    observed.remove()
    with pytest.raises(RuntimeError, match="has ended"):
        observed(pictures)


def test_layers_of_the_losses():
    """What the losses with layers compute, from the public classes and the stages' weights of the official code."""
    batch = example(experiments.ROWS["ft"])
    student, teacher = batch.student.preactivations, batch.teacher.preactivations
    for built, loss in ((layers.Boundaries(batch), kdfast.AB()), (layers.Overhaul(batch), kdfast.OFD())):
        maps = [connector(x) for connector, x in zip(built.connectors, student, strict=True)]
        margins = [[kdfast.ofd_margin(n.weight, n.bias)] for n in (s.norm for s in batch.teacher_network.stages)]
        more = margins if isinstance(loss, kdfast.OFD) else [[]] * 3
        parts = [loss(s, t, *rest) / 6 for s, t, rest in zip(maps, teacher, more, strict=True)]
        torch.testing.assert_close(built(student, teacher), parts[0] / 4 + parts[1] / 2 + parts[2])
    hints = layers.Hints(batch)
    assert hints.regressor(batch.student.maps[1]).shape == batch.teacher.maps[1].shape
    reconstruction, factors = (objective.loss for objective in objectives(experiments.ROWS["ft"], batch))
    assert factors.paraphraser is reconstruction.paraphraser and reconstruction.factors == networks.TEACHER[-1] // 2


def test_runs_of_a_seed_are_paired(loaded):
    """Equal first weights and equal batches for each loss of a seed; others for another seed."""
    rows = ((experiments.ALONE, 0), (experiments.ROWS["tfkd-reg"], 0), (experiments.ALONE, 1))
    weights, batches = [], []
    for row, seed in rows:
        trainer = trainer_of(row, loaded, seed=seed)
        torch.rand(seed + len(row.name))  # a loss that draws random numbers must not change the order
        weights.append(trainer.student.classifier.weight)
        batches.append(torch.cat(trainer._batches(1)).tolist())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert batches[0] == batches[1] != batches[2]


@pytest.mark.filterwarnings("ignore::kdfast.FallbackWarning")
def test_students_that_learn_together(loaded):
    """The first starts as the student alone does, the others do not; branches have the same first stages."""
    alone = trainer_of(experiments.ALONE, loaded, 2)
    for name in ("dml", "one"):
        row = experiments.ROWS[name]
        trainer = trainer_of(row, loaded)
        both = [t.network.eval() and t.observed(loaded.test_images) for t in (alone, trainer)]
        assert len(both[1]) == row.students
        assert torch.equal(both[0][0].logits, both[1][0].logits)
        assert not torch.equal(both[1][0].logits, both[1][1].logits)
        assert torch.equal(both[1][0].maps[0], both[1][1].maps[0]) == (row.layout is students.Branches)
        trainer.train_epoch()
        # Tested is the first student, which the other ones have moved.
        answers = trainer.observed(loaded.test_images)[0].logits.argmax(1)
        assert trainer.history[0][1] == 100 * (answers == loaded.test_labels).float().mean().item()


@pytest.mark.filterwarnings("ignore::kdfast.FallbackWarning")
def test_objectives_of_students_that_learn_together():
    """Written out: every student has its cross-entropy and what the others say; each its own gradient."""

    def value(name, epoch):
        batch = replace(example(experiments.ROWS[name]), epoch=epoch)
        a, b = (z.log_softmax(1) for z in batch.students.logits)
        ce = nn.functional.nll_loss(a, batch.labels) + nn.functional.nll_loss(b, batch.labels)
        soft = -(b.exp() * a + a.exp() * b).sum(1).mean()
        entropies = -(a.exp() * a + b.exp() * b).sum(1).mean()
        return trainer.Objective(experiments.ROWS[name], batch)(batch), ce, soft, entropies

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
        model = students.Branches(lambda: convnet(networks.STUDENT), 3, rescale)
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
        def __init__(self, run, data, epochs, batch_size, teacher, teachers=()):
            super().__init__(run, data, epochs, batch_size, teacher, teachers)
            seen[run.name, run.seed] = self.student, teacher, teachers

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
    assert seen["ban", 3][1] is network["student", 3] and seen["ban-2", 3][1] is network["ban", 3]
    for several in ("aekd", "endd"):
        assert seen[several, 3][1:] == (None, [network["teacher", 1000 * i + 3] for i in range(3)])
    for trained in network.values():  # what a trainer watched, it has left as it was
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in trained.modules())


def test_table_says_what_came_before(taught):
    out, table, _ = taught
    assert "epochs of a pre-stage before: 1 (ab, ft)" in table
    assert {row["epoch"] for row in rows(out / "history.csv")} == {"1"}


def test_what_runs_in_a_step(loaded):
    """The layers of a teacher are looked at only where a loss reads them, and what no loss reads does not run."""
    teachers = [a_teacher() for _ in range(3)]
    index = torch.arange(8)
    for name, layers_read in (("kd", False), ("fitnets", True), ("ft", True), ("ofd", True), ("label-refinery", False)):
        row = experiments.ROWS[name]
        with trainer_of(row, loaded, 1, teachers[0]) as trainer:
            assert bool(teachers[0].classifier._forward_hooks) == row.observes_teacher == layers_read
            for stage in row.stages:
                batch = trainer.batch(index, stage)
                assert bool(batch.students) == stage.reads_student
                assert (batch.teacher is not None) == stage.reads_teacher and batch.teachers == []
            assert (batch.teacher.maps is not None) == layers_read
            torch.testing.assert_close(batch.teacher.logits, teachers[0](batch.images))
        assert not teachers[0].classifier._forward_hooks
    trainer = trainer_of(experiments.ROWS["aekd"], loaded, 1, teachers=teachers)
    batch = trainer.batch(index, trainer.run.row)
    assert batch.teacher is None and len(batch.teachers) == 3
    torch.testing.assert_close(batch.teachers.logits, [network(batch.images) for network in teachers])


def test_all_is_every_row():
    for text in ("all", "all,kd", "kd, all"):
        assert compare._losses("--loss", text) == ",".join(experiments.ROWS)
    assert compare._losses("--loss", compare.Settings.loss) == compare.Settings.loss


# ---- pre-stages ------------------------------------------------------------------------------------------------------
def changes(trainer, steps):
    """Names of the weights that these epochs change, of the student and of the objective."""
    parameters = [*trainer.student.named_parameters(), *trainer.objective.named_parameters()]
    before = [parameter.detach().clone() for _, parameter in parameters]
    for _ in range(steps):
        trainer.train_epoch()
    return {name for (name, now), was in zip(parameters, before, strict=True) if not torch.equal(now, was)}


@pytest.mark.parametrize(
    ("name", "first", "others_first", "then"),
    [
        ("fitnets", {"stages.0", "stages.1", "pre_stage"}, {"stages.2", "classifier"}, {"stages", "classifier"}),
        ("ft", {"pre_stage"}, {"stages", "classifier", "loss.translator"}, {"stages", "classifier", "loss.translator"}),
        ("ab", {"stages", "pre_stage"}, {"classifier"}, {"stages", "classifier"}),
        ("fsp", {"stages", "pre_stage"}, {"classifier"}, {"stages", "classifier"}),
    ],
)
def test_what_a_pre_stage_trains(loaded, name, first, others_first, then):
    """The layers that each stage changes are exactly these; the teacher does not change, nor do the layers before."""
    teacher = a_teacher()
    weights = [parameter.clone() for parameter in teacher.parameters()]
    trainer = trainer_of(experiments.ROWS[name], loaded, 9, teacher)
    assert (trainer.pre_stage_epochs, trainer.all_epochs, trainer.epochs_done) == (2, 11, 0)
    changed = changes(trainer, 2)
    assert len(trainer.pre_stage_losses) == trainer.epochs_done == 2 and not trainer.history
    assert not trainer.optimizer.state, "the momentum of the pre-stage goes on"
    assert all(any(key.startswith(part) for key in changed) for part in first), changed
    assert not any(key.startswith(part) for key in changed for part in others_first), changed
    changed = changes(trainer, 1)
    assert len(trainer.history) == 1 and trainer.epochs_done == 3
    assert all(any(key.startswith(part) for key in changed) for part in then), changed
    assert not any(key.startswith("pre_stage") for key in changed), changed
    assert all(torch.equal(now, was) for now, was in zip(teacher.parameters(), weights, strict=True))


def test_a_pre_stage_lowers_its_loss(loaded):
    """Each of the pre-stages learns, and its length is RepDistiller's share of the epochs."""
    staged = [row for row in experiments.ROWS.values() if row.pre_stage]
    assert [row.name for row in staged] == ["fitnets", "ft", "ab", "fsp"]
    for row in staged:
        assert [row.pre_stage_epochs(epochs) for epochs in (1, 8, 9, 240)] == [1, 1, 2, 30]
        teacher = a_teacher()
        trainer = trainer_of(row, loaded, 80, teacher)
        for _ in range(10):
            trainer.train_epoch()
        assert trainer.pre_stage_losses[-1] < 0.8 * trainer.pre_stage_losses[0], row.name


@pytest.mark.usefixtures("few_repeats")
def test_stop_after_every_epoch(images, tmp_path, monkeypatch):
    """Pre-stages, Jacobians and students that learn together, resumed after each epoch, end with the same bits."""
    monkeypatch.setattr(experiments.LossRow, "pre_stage_epochs", lambda row, epochs: 2 if row.pre_stage else 0)
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
        for key, x in states[0]["objective"].items():
            assert torch.equal(x, states[1]["objective"][key])


class Hint(nn.Module):
    """A loss with parameters and randomness of its own, on maps and embeddings."""

    def __init__(self, example):
        super().__init__()
        self.regressor = nn.Conv2d(example.student.maps[-1].shape[1], example.teacher.maps[-1].shape[1], 1)
        self.register_buffer("seen", torch.zeros(example.samples))

    def forward(self, student, teacher, embedding, index):
        self.seen[index] += 1
        noise = torch.rand_like(teacher[-1])
        return (self.regressor(student[-1]) - teacher[-1]).square().mul(noise).mean() + embedding.square().mean()


def test_new_row_is_enough(images, tmp_path, monkeypatch):
    """A loss that reads maps and embeddings, with parameters, buffers and random numbers, trains and resumes."""
    reads = ("student.maps", "teacher.maps", "student.embedding", "index")
    monkeypatch.setitem(compare.LOSSES, "hint", "a test")
    monkeypatch.setitem(experiments.ROWS, "hint", experiments.LossRow("hint", "a test", Hint, reads))
    assert main(arguments(images, tmp_path / "whole", "--loss", "hint")) == 0
    state = checkpoints.load(tmp_path / "whole/checkpoints/hint-seed0.pt")
    assert state["objective"]["loss.seen"].sum() == 2 * 16  # 2 epochs of 2 full batches of 8 among 20 images
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
    teacher = a_teacher()

    def times(name):
        return timing.measure(trainer_of(experiments.ROWS[name], loaded, 1, teacher))

    # Any function registered for CPU counts as a kernel, so the plain form stands in where none is built.
    with _kernels.override({name: op.fallback for name, op in _kernels.OPS.items()}, keys=("CPU",)):
        for name in ("kd", "ab", "jacobian"):  # ab's is that of its pre-stage: the labels' alone would be "torch"
            on_kernels = times(name)
            assert on_kernels["path"] == "kernel" and on_kernels["fallback_ms"] > 0
    plain = times("dist")
    assert plain["path"] == "torch" and plain["fallback_ms"] is None
    assert 0 < plain["loss_ms"] and 0 < plain["objective_ms"] < 10 * plain["step_ms"]
