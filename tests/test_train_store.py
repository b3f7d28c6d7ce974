"""`kdfast train --store-teacher`, and students that learn from what it writes."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from commands import ENVIRONMENT, as_command, rows

pytest.importorskip("safetensors")
test_train = pytest.importorskip("test_train")
from PIL import Image, ImageOps  # noqa: E402
from test_train import (  # noqa: E402
    CLASSES,
    EPOCHS,
    TRAIN,
    arguments,
    assert_same_results,
    refused,
    resume,
    stop_after,
    weights,
    without,
)

import kdfast  # noqa: E402
from kdfast import teacher_store  # noqa: E402
from kdfast.cli import main  # noqa: E402
from kdfast.integrations.timm import DistillationTask  # noqa: E402
from kdfast.objectives import Term  # noqa: E402
from kdfast.teacher_store import TeacherStore  # noqa: E402
from kdfast.training import data, networks  # noqa: E402

apart, photographs, undisturbed = (getattr(test_train, name) for name in ("apart", "photographs", "undisturbed"))
pytestmark = pytest.mark.usefixtures("one_thread")


def in_two_processes(argv):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "kdfast"]
    done = subprocess.run([*torchrun, *argv], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def storing(root, folder, *more):
    """The command that stores the teacher of `arguments`."""
    return without(arguments(root, "", "--store-teacher", folder, *more), "--out")


def learning(root, folder, out, *more):
    """The command that trains the student of `arguments` from a store."""
    return without(arguments(root, out, "--teacher", folder, *more), "--teacher-weights")


@pytest.fixture(scope="module")
def store(photographs, tmp_path_factory):
    """Options -> the folder of a store that was written with them."""
    made = {}

    def folder(*more):
        if more not in made:
            made[more] = tmp_path_factory.mktemp("store") / "teacher"
            assert main(storing(photographs, made[more], *more)) == 0
        return made[more]

    return folder


# ---- the same student ------------------------------------------------------------------------------------------------
def test_student_is_the_same(photographs, undisturbed, store, tmp_path):
    """From a float32 store: the weights and the log of the run with the teacher, bit for bit."""
    folder = store("--store-dtype", "float32")
    contents = TeacherStore(folder).contents
    assert (contents.samples, contents.classes, contents.augmentations) == (CLASSES * TRAIN, CLASSES, EPOCHS)
    assert contents.model.startswith("test_resnet, weights ")
    assert main(learning(photographs, folder, tmp_path / "run")) == 0
    assert_same_results(tmp_path / "run", undisturbed())


def test_float16(photographs, undisturbed, store, tmp_path):
    """The default store rounds the logits, and the student moves by as little."""
    assert main(learning(photographs, store(), tmp_path / "run")) == 0
    start = networks.student(SETTINGS, CLASSES).state_dict()
    ours, theirs = weights(tmp_path / "run"), weights(undisturbed())
    moved = sum((theirs[key] - start[key]).double().pow(2).sum() for key in theirs)
    apart = sum((theirs[key] - ours[key]).double().pow(2).sum() for key in theirs)
    assert 0 < apart < 1e-4 * moved


@dataclasses.dataclass
class SETTINGS:
    student, image_size, seed, sync_bn = test_train.STUDENT, 32, 0, False


def test_all_classes_as_top_k(photographs, undisturbed, store, tmp_path):
    """With k = C the top-k loss is the loss."""
    folder = store("--store-dtype", "float32", "--store-top-k", CLASSES)
    assert main(learning(photographs, folder, tmp_path / "run")) == 0
    ours, theirs = weights(tmp_path / "run"), weights(undisturbed())
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-5)


def test_top_k(photographs, store, tmp_path):
    """Its own loss, in the log of a run with another seed and the augmentations of the store."""
    folder = store("--store-top-k", 2, "--store-augmentations", 1)
    contents = TeacherStore(folder).contents
    assert (contents.top_k, contents.temperature, contents.augmentations) == (2, 1.0, 1)
    assert main(learning(photographs, folder, tmp_path / "run", "--seed", 5, "--epochs", 3)) == 0
    losses = [float(row["kd_loss"]) for row in rows(tmp_path / "run" / "train.csv")]
    assert losses and all(loss > 0 for loss in losses)


def test_resumed(photographs, store, tmp_path, monkeypatch, capsys):
    """A stopped student goes on from the store, as if nothing had been."""
    folder = store()
    assert main(learning(photographs, folder, tmp_path / "whole")) == 0
    stop_after(monkeypatch, 3, learning(photographs, folder, tmp_path / "run"))
    assert main(resume(tmp_path / "run")) == 0
    assert_same_results(tmp_path / "run", tmp_path / "whole")


def test_two_processes(photographs, undisturbed, store, tmp_path):
    """Each looks up its share of a batch."""
    in_two_processes(learning(photographs, store("--store-dtype", "float32"), tmp_path / "run"))
    ours, theirs = (rows(folder / "train.csv") for folder in (tmp_path / "run", undisturbed()))
    for key in ("kd_loss", "task_loss"):
        assert [float(row[key]) for row in ours] == pytest.approx([float(row[key]) for row in theirs], rel=1e-3)


# ---- writing ---------------------------------------------------------------------------------------------------------
def test_store_of_two_processes(photographs, store, tmp_path):
    """Ranks write shards in turn: together those of one process."""
    command = storing(photographs, tmp_path / "teacher", "--store-dtype", "float32")
    in_two_processes(command)
    ours, theirs = (TeacherStore(f) for f in (tmp_path / "teacher", store("--store-dtype", "float32")))
    assert ours.contents == theirs.contents
    index = torch.arange(CLASSES * TRAIN)
    for augmentation in range(EPOCHS):
        # The batches are half as large.
        torch.testing.assert_close(ours.logits(index, augmentation), theirs.logits(index, augmentation))


def test_stopped_store_continues(photographs, store, tmp_path, monkeypatch, capsys):
    folder, whole = tmp_path / "teacher", store()
    write, written = teacher_store.TeacherStoreWriter.write, []
    monkeypatch.setattr(teacher_store, "SHARD_ROWS", 13)

    def stopping(self, shard, *arguments):
        write(self, shard, *arguments)
        written.append(shard)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(teacher_store.TeacherStoreWriter, "write", stopping)
    assert main(storing(photographs, folder)) == 128 + signal.SIGTERM
    line = "kdfast train: interrupted; the same command continues the store after 3 of 8 missing shards"
    assert capsys.readouterr().err.strip() == line
    assert main(storing(photographs, folder)) == 0
    assert len(written) == len(set(written)) == 8
    ours, theirs = TeacherStore(folder), TeacherStore(whole)
    for augmentation in range(EPOCHS):
        index = torch.arange(CLASSES * TRAIN)
        torch.testing.assert_close(
            ours.logits(index, augmentation), theirs.logits(index, augmentation), rtol=2e-3, atol=1e-4
        )


def test_unreadable_image(photographs, tmp_path, capsys, monkeypatch):
    """Neither in the store nor asked for; a student that can read it, from the same file, is told."""
    path, read = sorted((photographs / "train" / "sky").iterdir())[3], data.Images._read

    def read_others(images, index):
        if images.reader.filename(index, absolute=True) == str(path):
            raise OSError("the disk does not answer")
        return read(images, index)

    with monkeypatch.context() as patch:
        patch.setattr(data.Images, "_read", read_others)
        assert main(storing(photographs, tmp_path / "teacher")) == 0
        assert f"cannot read {path}, skipped" in capsys.readouterr().err
        assert main(learning(photographs, tmp_path / "teacher", tmp_path / "run")) == 0
    line = refused(capsys, learning(photographs, tmp_path / "teacher", tmp_path / "another"))
    found = re.search(r"has no logits of image \d+ \((.+)\) in augmentation 0, which could not be read", line)
    assert found[1] == str(path)


def test_as_a_command(photographs, tmp_path):
    """What it prints, and the reading of the options."""
    done = as_command(*storing(photographs, "teacher", "--store-top-k", "3"), cwd=tmp_path)
    assert done.stdout.startswith("teacher: the top 3 and the rest of test_resnet, weights ")
    assert f"for {CLASSES * TRAIN} images, {EPOCHS} times augmented" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"teacher"}


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--out", "x"], "--out: --store-teacher trains nothing"),
        (["--store-dtype", "int8"], "--store-dtype: got 'int8', expected one of float16, float32"),
        (["--store-top-k", "5"], "--store-top-k: top_k must be from 1 to the 4 classes, got 5"),
        (["--store-top-k", "2", "--recipe", "dkd"], "--recipe dkd does not take the top k"),
    ],
    ids=str,
)
def test_bad_store(more, expected, photographs, tmp_path, capsys):
    assert expected in refused(capsys, storing(photographs, tmp_path / "teacher", *more))


def test_store_of_a_broken_teacher(photographs, tmp_path, capsys):
    weights = {name: x.clone() for name, x in torch.load(photographs / "teacher.pt").items()}
    weights["fc.bias"][1] = float("nan")
    torch.save(weights, tmp_path / "teacher.pt")
    line = refused(capsys, storing(photographs, tmp_path / "store", "--teacher-weights", tmp_path / "teacher.pt"))
    assert "the teacher's logits must be numbers, got NaN or inf for image 0" in line


def test_store_options_without_a_store(photographs, tmp_path, capsys):
    line = refused(capsys, arguments(photographs, tmp_path / "run", "--store-top-k", "2"))
    assert "--store-top-k: expected with --store-teacher" in line


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--recipe", "at"], "--recipe at: it reads the teacher's layers"),
        (
            ["--image-size", "40"],
            "does not fit: it has transform '... RandomResizedCropAndInterpolation(size=(32, 32), ",
        ),
        (["--auto-augment", "rand-m9-mstd0.5"], "does not fit: it has transform '... "),
        (["--teacher-weights", "teacher.pt"], "--teacher-weights: does not go with a folder as --teacher"),
        (["--store-teacher", "other"], "--out: --store-teacher trains nothing"),
    ],
    ids=str,
)
def test_store_that_does_not_fit(more, expected, photographs, store, tmp_path, capsys):
    if "--teacher-weights" in more:
        more = [more[0], str(photographs / more[1])]
    assert expected in refused(capsys, learning(photographs, store(), tmp_path / "run", *more))


@pytest.mark.parametrize("longest", [None, 9], ids=["images", "sequences"])
def test_store_of_log_probabilities(longest, photographs, store, tmp_path, capsys):
    """Of images it trains a student by its tail; of sequences it is refused."""
    contents = TeacherStore(store()).contents
    contents = dataclasses.replace(contents, top_k=2, temperature=1.0, tail="bucket", dtype="float32", longest=longest)
    writer = teacher_store.TeacherStoreWriter(tmp_path / "store", contents)
    for shard in writer.missing():
        logits = torch.randn(shard.end - shard.begin, CLASSES)
        top = kdfast.TopK.of_log_probabilities(*logits.log_softmax(1).topk(2))
        writer.write(
            shard, top if longest is None else [top._replace(values=top[0][:3], indices=top[1][:3])] * len(logits)
        )
    command = learning(photographs, tmp_path / "store", tmp_path / "run")
    if longest is not None:
        assert "does not fit: it has longest 9, not None" in refused(capsys, command)
        return
    assert main(command) == 0
    losses = [float(row["kd_loss"]) for row in rows(tmp_path / "run" / "train.csv")]
    assert losses and all(loss > 0 for loss in losses)


def test_store_of_other_data(photographs, store, tmp_path, capsys):
    """The numbers of both sides are named."""
    fewer = tmp_path / "photographs"
    shutil.copytree(photographs, fewer)
    next((fewer / "train" / "sky").iterdir()).unlink()
    images = CLASSES * TRAIN
    line = refused(capsys, learning(fewer, store(), tmp_path / "run"))
    assert f"does not fit: it has samples {images}, not {images - 1}; data of other images ('" in line
    left = sorted((fewer / "train" / "sky").iterdir())[0]
    shutil.copy(left, left.with_name("another.jpg"))
    line = refused(capsys, learning(fewer, store(), tmp_path / "run"))
    assert f"it has data of other images, or other names, sizes, labels or order of the {images} ('" in line
    shutil.copytree(photographs / "train", fewer / "train", dirs_exist_ok=True)
    left.with_name("another.jpg").unlink()
    for file in (fewer / "train").rglob("*.jpg"):  # the same names, inverted
        ImageOps.invert(Image.open(file)).save(file)
    line = refused(capsys, learning(fewer, store(), tmp_path / "run"))
    assert f"it has data of other images, or other names, sizes, labels or order of the {images} ('" in line
    shutil.rmtree(fewer / "train" / "sky")
    shutil.rmtree(fewer / "val" / "sky")
    line = refused(capsys, learning(fewer, store(), tmp_path / "another"))
    assert f"classes {CLASSES}, not {CLASSES - 1}" in line


def test_folder_that_is_no_store(photographs, tmp_path, capsys):
    line = refused(capsys, learning(photographs, photographs, tmp_path / "run"))
    assert "is no teacher store: it has no manifest.json" in line


def test_another_temperature(photographs, store, tmp_path, capsys):
    """crd-kd reads layers; a store whose rest is of another temperature is what kd has to refuse."""
    folder = tmp_path / "teacher"
    shutil.copytree(store("--store-top-k", 2, "--store-augmentations", 1), folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["contents"]["temperature"] = 4.0
    (folder / "manifest.json").write_text(json.dumps(manifest))
    line = refused(capsys, learning(photographs, folder, tmp_path / "run"))
    assert "the rest of the store's top 2 is of temperature 4.0, --recipe kd has 1.0" in line


# ---- the task --------------------------------------------------------------------------------------------------------
def test_task_without_a_teacher():
    student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    task = DistillationTask(student, None, [Term(kdfast.KD())], verbose=False).train()
    images, labels, logits = torch.randn(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1]), torch.randn(5, 3)
    for teacher in (logits, kdfast.TopK.of(logits, 2, 4.0)):
        result = task(images, labels, teacher_logits=teacher)
        torch.testing.assert_close(result["kd_loss"], kdfast.KD()(student(images), teacher))
        result["loss"].backward()
    with pytest.raises(ValueError, match="teacher_logits must be given with each batch"):
        task(images, labels)
    with pytest.raises(ValueError, match="teacher must be a model, whose layers 1 the terms read, got None"):
        DistillationTask(student, None, [Term(kdfast.FitNets(), reads=("student.1", "teacher.1"))], verbose=False)
