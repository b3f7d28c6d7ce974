"""`kdfast train --student`: small timm models on photographs, stopped, killed, spread over processes, misused."""

import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import ENVIRONMENT, as_command, disk_that_is_full, full_disk, rows
from processes import held
from test_runs import Payload, flip_a_bit

for extra in ("timm.task", "torchvision", "tensorboard", "webdataset", "sklearn", "rich"):
    pytest.importorskip(extra, reason="the [train] extra or scikit-learn is not installed")

import timm  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.datasets import load_sample_images  # noqa: E402
from timm.data import create_transform  # noqa: E402

from kdfast._text import printable  # noqa: E402
from kdfast.cli import main  # noqa: E402
from kdfast.integrations.timm import DistillationTask  # noqa: E402
from kdfast.runs import images  # noqa: E402
from kdfast.training import data, networks, ranks, readers, settings, trainer  # noqa: E402
from kdfast.training.ranks import Ranks, Stop, Stopped  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, TRAIN, VAL, SIDE = 4, 12, 4, 48  # images of a class and their side
BATCH, EPOCHS = 12, 2
STEPS_AN_EPOCH = CLASSES * TRAIN // BATCH
# Without batch norm, so that the batch may be cut.
STUDENT, TEACHER = "test_efficientnet_gn", "test_resnet"


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """Nothing is written elsewhere, and nothing is fetched."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def tiles():
    """Class name -> tiles of one half of scikit-learn's photographs: a palace's sky and walls, a flower's two sides."""
    palace, flower = load_sample_images().images
    halves = {"sky": palace[:200], "walls": palace[227:], "left": flower[:, :320], "right": flower[:, 320:]}
    for name, half in halves.items():
        rows, columns = (range(0, size - SIDE, SIDE) for size in half.shape[:2])
        yield name, [half[y : y + SIDE, x : x + SIDE] for y in rows for x in columns][: TRAIN + VAL]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder with train/ and val/, and a teacher's weights beside them."""
    root = tmp_path_factory.mktemp("photographs")
    for name, pixels in tiles():
        for number, tile in enumerate(pixels):
            folder = root / ("val" if number % 4 == 3 else "train") / name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(tile).save(folder / f"{number}.jpg", quality=95)
    torch.manual_seed(0)
    torch.save(timm.create_model(TEACHER, num_classes=CLASSES).state_dict(), root / "teacher.pt")
    return root


def arguments(root, out, *more):
    """A run of two epochs; `more` options may replace these."""
    names = {"--data": root, "--student": STUDENT, "--teacher": TEACHER, "--teacher-weights": root / "teacher.pt"}
    names |= {"--image-size": 32, "--epochs": EPOCHS, "--batch-size": BATCH, "--workers": 0, "--device": "cpu"}
    names |= {"--lr": 0.02, "--log-every": 2, "--out": out}
    return ["train", *(str(part) for pair in names.items() for part in pair), *map(str, more)]


def weights(out, name="student.pt"):
    return torch.load(out / name)


def assert_same_results(out, expected):
    """Equal weights and logs, bit for bit; speeds differ."""
    for name in ("student.pt", "student-ema.pt"):
        assert (out / name).exists() == (expected / name).exists()
        if (out / name).exists():
            ours, theirs = weights(out, name), weights(expected, name)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert (out / "epochs.csv").read_bytes() == (expected / "epochs.csv").read_bytes()
    ours, theirs = ([{**row, "images_per_second": 0} for row in rows(f / "train.csv")] for f in (out, expected))
    assert ours == theirs


def refused(capsys, argv):
    """The one line of the error that ends the command."""
    assert main(argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("kdfast train: error: ")
    return line


def without(argv, option):
    place = argv.index(option)
    return argv[:place] + argv[place + 2 :]


@pytest.fixture(scope="module")
def undisturbed(photographs, tmp_path_factory):
    """Options -> the folder of a run with them in one process, which nothing has stopped."""
    runs = {}

    def folder(*more):
        if more not in runs:
            runs[more] = tmp_path_factory.mktemp("undisturbed") / "run"
            assert main(arguments(photographs, runs[more], *more)) == 0
        return runs[more]

    return folder


# ---- one process -----------------------------------------------------------------------------------------------------
def test_end_to_end(photographs, tmp_path):
    """As a command of its own, with every option that changes how a step computes."""
    options = (
        "--recipe at --amp --channels-last --accumulate 2 --ema 0.9 --optimizer adamw --lr 0.002 --warmup-epochs 1"
    )
    options += " --auto-augment rand-m9-mstd0.5 --workers 2 --seed 3"
    done = as_command(*arguments(photographs, "run", *options.split()), cwd=tmp_path)
    assert [line.split()[0] for line in done.stdout.splitlines()[2:4]] == ["student", "its"]
    assert "images/s" in done.stderr and "to go" in done.stderr and "\x1b" not in done.stdout + done.stderr
    out = tmp_path / "run"
    assert [int(row["step"]) for row in rows(out / "train.csv")] == [2, 4, 6, 8]
    rates = [float(row["learning_rate"]) for row in rows(out / "train.csv")]
    assert rates[0] == pytest.approx(0.002 / 4) and rates[1] > rates[2] > rates[3]
    assert {"loss", "task_loss", "at_loss", "images_per_second"} <= rows(out / "train.csv")[0].keys()
    assert [row["epoch"] for row in rows(out / "epochs.csv")] == ["1", "2"]
    assert list((out / "tensorboard").iterdir())
    for name, prefix in (("student.pt", ""), ("student-ema.pt", "ema_")):
        measured = accuracy(photographs, out / name)
        assert measured == pytest.approx(float(rows(out / "epochs.csv")[-1][f"{prefix}top1"]), abs=100 / 16), name


def accuracy(root, file):
    """Top-1 in percent of a file of weights on the validation images, by timm alone, in float32."""
    model = timm.create_model(STUDENT, num_classes=CLASSES, checkpoint_path=str(file)).eval()
    config = timm.data.resolve_data_config({"img_size": 32}, model=model)
    dataset = timm.data.create_dataset("", root=str(root), split="validation")
    dataset.transform = create_transform(**config)
    images, labels = zip(*dataset, strict=True)
    with torch.no_grad():
        return 100 * (model(torch.stack(images)).argmax(1) == torch.tensor(labels)).double().mean().item()


def test_against_a_plain_loop(photographs, undisturbed):
    """KD written out, with the cosine, momentum and weight decay: the weights of the command, to rounding."""
    out = undisturbed()
    chosen = settings.Settings(str(photographs), STUDENT, TEACHER, str(photographs / "teacher.pt"), image_size=32)
    student, teacher = networks.student(chosen, CLASSES), networks.teacher(chosen, CLASSES, 32).eval()
    config = timm.data.resolve_data_config({"img_size": 32}, model=student)
    images = timm.data.create_dataset("", root=str(photographs), split="train")
    transform = create_transform(**config, is_training=True, color_jitter=None)
    decay = [p for p in student.parameters() if p.dim() > 1]
    others = [p for p in student.parameters() if p.dim() <= 1]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decay, "weight_decay": 1e-4}]
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True)
    total, losses = EPOCHS * STEPS_AN_EPOCH, []
    for step, keys in enumerate(steps()):
        batch = []
        for epoch, index in keys:
            with data.seeded(data.derived_seed(0, epoch, index)):
                batch.append(transform(Image.open(images.reader[index][0])))
        labels = torch.tensor([images.reader.samples[index][1] for _, index in keys])
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * 0.5 * (1 + np.cos(np.pi * step / total))
        logits = student.train()(torch.stack(batch))
        with torch.no_grad():
            target = teacher(torch.stack(batch)).softmax(1)
        kd = F.kl_div(logits.log_softmax(1), target, reduction="batchmean")
        loss = 0.5 * F.cross_entropy(logits, labels) + 0.5 * kd
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    expected = [np.mean(losses[i : i + 2]) for i in range(0, total, 2)]
    assert [float(row["loss"]) for row in rows(out / "train.csv")] == pytest.approx(expected, rel=1e-3)
    assert_close(weights(out), student.state_dict(), start=networks.student(chosen, CLASSES).state_dict())


def assert_close(ours, theirs, start):
    """Equal to a thousandth of the way from `start`: what rounding, and no other batch or loss, explains."""
    for name, value in theirs.items():
        way = (value - start[name]).norm()
        assert (ours[name] - value).norm() <= 1e-3 * way, name


def steps(start=0, **more):
    made = data.Steps(
        **{**dict(samples=CLASSES * TRAIN, batch_size=BATCH, accumulate=1, ranks=ONE, seed=0), **more}, epochs=EPOCHS
    )
    made.start = start
    return list(made)


ONE = Ranks(0, 1, torch.device("cpu"))


def start_weights(photographs):
    chosen = settings.Settings(str(photographs), STUDENT, TEACHER, image_size=32)
    return networks.student(chosen, CLASSES).state_dict()


def test_micro_batches_add_up(photographs, undisturbed):
    assert_close(weights(undisturbed("--accumulate", 3)), weights(undisturbed()), start_weights(photographs))


@pytest.mark.parametrize("on", [False, True])
def test_precision_and_layout(on, photographs, tmp_path, monkeypatch):
    """What the task gets and returns in a step, and the student in a test."""
    seen, forward = set(), DistillationTask.forward

    def look(self, images, *others):
        result = forward(self, images, *others)
        seen.add((images.is_contiguous(memory_format=torch.channels_last), result["output"].dtype))
        return result

    monkeypatch.setattr(DistillationTask, "forward", look)
    options = ["--amp", "--channels-last"] if on else []
    assert main(arguments(photographs, tmp_path / "run", "--epochs", 1, *options)) == 0
    assert seen == {(on, torch.bfloat16 if on else torch.float32)}
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "run").values())


def test_compiled(photographs, undisturbed, tmp_path, monkeypatch, capsys):
    """Through dynamo alone, whose graphs are the networks' own code: inductor would compile for a minute."""
    compiled, compile_task = [], DistillationTask.compile
    monkeypatch.setattr(
        DistillationTask, "compile", lambda self: compiled.append(compile_task(self, backend="eager")) or compiled[0]
    )
    assert main(arguments(photographs, tmp_path / "run", "--compile")) == 0
    assert len(compiled) == 1 and "compiling: the first step takes minutes" in capsys.readouterr().err
    assert_close(weights(tmp_path / "run"), weights(undisturbed()), start_weights(photographs))


# ---- stopping and going on -------------------------------------------------------------------------------------------
def stop_after(monkeypatch, step, argv, number=signal.SIGTERM):
    """The command, to which a signal comes while its trainer computes this step."""
    compute = trainer.Trainer.step

    def compute_and_stop(self, batches):
        compute(self, batches)
        if self.steps == step:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", compute_and_stop)
        assert main(argv) == 128 + number


@pytest.mark.parametrize("first", [True, False])
def test_every_rank_ends_with_the_signal(photographs, tmp_path, monkeypatch, capsys, first):
    """torchrun sees the same status from each; the first says what happened, the others nothing."""

    def stopped(*_):
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(ranks, "join", lambda device: types.SimpleNamespace(first=first))
    monkeypatch.setattr("kdfast.training.run.train", stopped)
    assert main(arguments(photographs, tmp_path / "run")) == 128 + signal.SIGTERM
    assert bool(capsys.readouterr().err) == first


def resume(out, *more):
    return ["train", "--resume", "--out", str(out), *more]


@pytest.mark.parametrize("recipe", ["kd", "crd"])
def test_stop_and_resume(recipe, photographs, undisturbed, tmp_path, monkeypatch, capsys):
    """SIGTERM within an epoch, at its end, and Ctrl-C: a checkpoint each, and in the end the same bits."""
    options = ("--recipe", recipe, "--ema", 0.9)
    expected, out = undisturbed(*options), tmp_path / "run"
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for step, number in ((1, signal.SIGTERM), (STEPS_AN_EPOCH, signal.SIGTERM), (5, signal.SIGINT)):
        argv = resume(out) if out.exists() else arguments(photographs, out, *options)
        stop_after(monkeypatch, step, argv, number)
        assert f"continue with: kdfast train --resume --out {out}" in capsys.readouterr().err
        assert (out / f"checkpoints/step-{step:010d}.pt").exists() and not (out / "student.pt").exists()
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    with open(out / "train.csv", "a") as file:
        file.write("6,2,1")  # of a process that was killed while it wrote
    assert main(resume(out, "--workers", "1")) == 0
    assert "resumed after step 5 of 8" in capsys.readouterr().err
    assert_same_results(out, expected)
    assert main(resume(out)) == 0  # of a finished run
    assert_same_results(out, expected)


@pytest.mark.parametrize("option", ["--out", "--store-teacher"])
def test_one_folder_is_of_one_process(option, photographs, undisturbed, tmp_path, capsys):
    """A second process is refused; the lock of one that was killed is none."""
    out = tmp_path / "run"
    argv = arguments(photographs, out)
    argv[argv.index("--out")] = option
    with held(out):
        assert f"{option}: another process is writing into {out}; " in refused(capsys, argv)
    assert main(argv) == 0
    if option == "--out":
        assert_same_results(out, undisturbed())


TORCHRUN = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("name", "value"), [("LOCAL_RANK", "0"), ("RANK", "1")])
def test_a_variable_of_torchrun_alone(name, value, photographs, tmp_path, monkeypatch, capsys):
    """It may be left in a shell: the run is one of one process, and speaks."""
    monkeypatch.setenv(name, value)
    assert "--lr: got '0'" in refused(capsys, arguments(photographs, tmp_path / "run", "--lr", "0"))
    assert main(arguments(photographs, tmp_path / "run", "--epochs", 1)) == 0


def test_garbage_in_the_log(photographs, undisturbed, tmp_path, monkeypatch):
    """Rows that are none are left out on --resume."""
    out = tmp_path / "run"
    stop_after(monkeypatch, 3, arguments(photographs, out))
    with open(out / "train.csv", "ab") as file:
        file.write(b"what,is,this\n\0\0\xff,,,\n3,1,1.0,nan,1.0\n")
    (out / "epochs.csv").write_bytes(b"\xfe\0")
    assert main(resume(out)) == 0
    assert_same_results(out, undisturbed())


def test_second_signals(monkeypatch):
    """A second Ctrl-C is meant; torchrun's are the first one once more."""
    with Stop() as stop:
        signal.raise_signal(signal.SIGTERM), signal.raise_signal(signal.SIGINT)
        assert stop.signal == stop.agreed() == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT


def end_of(argv, event=None):
    """-> exit status of the command in a process of its own, with ``event()`` after its first step or batch.

    A process that does not end is an error: one that waits for its loader would do so for ever.
    """

    def work():
        for trainer_method in ("step", "teacher_logits"):
            after(trainer_method, event)
        sys.exit(main(argv))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    hangs = process.is_alive()
    process.kill()
    process.join()
    assert not hangs, "the process does not end"
    return process.exitcode


def after(name, event):
    compute = getattr(trainer.Trainer, name)

    def disturbed(self, *batches):
        result = compute(self, *batches)
        event()
        return result

    setattr(trainer.Trainer, name, disturbed)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def kill_a_loader():
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def fail():
    raise RuntimeError("a fault of the program")


@pytest.mark.parametrize(
    ("event", "status"),
    [(terminate, 143), (interrupt, 130), (kill_a_loader, 2), (fail, 1)],
    ids=["SIGTERM", "Ctrl-C", "killed loader", "error"],
)
@pytest.mark.parametrize("work", ["train", "store"])
def test_it_ends_with_processes_that_load(work, event, status, photographs, tmp_path, capfd):
    """As a command does at a signal, at the death of a loader (as of memory) and at an error, and it can go on."""
    argv = arguments(photographs, tmp_path / "run", "--workers", 2, "--epochs", 4)
    if work == "store":
        argv[argv.index("--out")] = "--store-teacher"
    assert end_of(argv, event) == status
    said = capfd.readouterr().err
    if event is kill_a_loader:
        assert "error: --workers: one of the 2 processes that load images was ended by SIGKILL; " in said
    assert ("Traceback" in said) == (event is fail)
    assert main([*argv, *["--resume"] * (work == "train")]) == 0


GIVES_A_FILE_AWAY = """
import os, sys, time
from multiprocessing import process, reduction
from kdfast.training.ranks import end_with_parent
if sys.argv[1] == "loader":
    end_with_parent(0)
process.current_process().authkey = b"any"
print(reduction.DupFd(os.open(os.devnull, os.O_RDONLY))._id[0], flush=True)
input()
time.sleep(0.2)
"""


@pytest.mark.parametrize("kind", ["loader", "other"])
@pytest.mark.parametrize("after", ["connecting", "the greeting"])
def test_a_loader_is_silent_when_its_parent_hangs_up(kind, after):
    """In the middle of taking a tensor over: what killed the parent's other loader stops it anywhere."""
    code = [sys.executable, "-c", GIVES_A_FILE_AWAY, kind]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(code, text=True, **pipes) as process:
        address = process.stdout.readline().strip()
        with socket.socket(socket.AF_UNIX) as parent:
            parent.connect(address)
            if after == "the greeting":
                assert parent.recv(4)
        _, said = process.communicate("\n")
    assert process.returncode == 0 and ("Traceback" in said) == (kind == "other"), said


def test_no_checkpoint_after_a_loss_that_is_not_finite(photographs, tmp_path, capsys):
    argv = arguments(photographs, tmp_path / "run", "--lr", 1e30, "--log-every", 100, "--checkpoint-every", 1)
    assert "a loss is not finite before step" in refused(capsys, argv)
    newest = max((tmp_path / "run/checkpoints").iterdir())
    assert all(torch.isfinite(x).all() for x in torch.load(newest)["sums"].values())


def test_dropout_goes_on_where_it_was(photographs, tmp_path, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **more: create(name, drop_rate=0.5, **more))
    assert main(arguments(photographs, tmp_path / "expected")) == 0
    stop_after(monkeypatch, 3, arguments(photographs, tmp_path / "run"))
    torch.manual_seed(1)
    assert main(resume(tmp_path / "run")) == 0
    assert_same_results(tmp_path / "run", tmp_path / "expected")


def test_damaged_checkpoints(photographs, undisturbed, tmp_path, monkeypatch, capsys):
    """A flipped bit in the newest: it is named, and the one before is used."""
    out = tmp_path / "run"
    stop_after(monkeypatch, 3, arguments(photographs, out, "--checkpoint-every", 1))
    _, newest = sorted((out / "checkpoints").iterdir())
    newest.write_bytes(flip_a_bit(newest.read_bytes()))
    assert main(resume(out)) == 0
    said = capsys.readouterr().err
    assert f"{newest} is damaged" in said and "resumed after step 2 of 8" in said
    assert_same_results(out, undisturbed())


@pytest.mark.parametrize("allowed", range(5), ids=["settings", "start", "epoch", "last", "weights"])
def test_full_disk(allowed, photographs, undisturbed, tmp_path, monkeypatch, capsys):
    """One line, and a way on."""
    with disk_that_is_full(monkeypatch, allowed):
        line = refused(capsys, arguments(photographs, tmp_path / "run"))
    assert "No space left on device" in line and line.endswith("--resume continues")
    assert main(arguments(photographs, tmp_path / "run", "--resume")) == 0
    assert_same_results(tmp_path / "run", undisturbed())


def test_full_disk_at_the_log(photographs, tmp_path, monkeypatch, capsys):
    class Full(io.StringIO):
        tell = full_disk

    monkeypatch.setattr("kdfast.training.log.open", lambda *args, **more: Full(), raising=False)
    line = refused(capsys, arguments(photographs, tmp_path / "run"))
    assert "train.csv: No space left on device" in line and "--resume continues" in line


# ---- processes -------------------------------------------------------------------------------------------------------
DISTURBED = """
import os, pathlib, signal, sys
from kdfast.cli import main
from kdfast.training.trainer import Trainer

compute = Trainer.step

def step(self, batches):
    compute(self, batches)
    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first_life and [os.environ["RANK"], str(self.steps)] == sys.argv[1:3]:
        os.kill(os.getpid(), signal.Signals[sys.argv[3]])

Trainer.step = step
code = main(sys.argv[4:])
threads = [name.read_text().strip() for name in pathlib.Path("/proc/self/task").glob("*/comm")]
sys.stdout.write(f"threads: {threads}\\n")
sys.exit(code)
"""


def torchrun(processes, argv, restarts=0, disturbed=None):
    """-> exit code and output. `disturbed`: a rank, a step and a signal that it then gets, in its first life."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [f"--max-restarts={restarts}"]
    if disturbed is None:
        command += ["-m", "kdfast", *argv, "--resume"]
    else:
        Path("disturbed.py").write_text(DISTURBED)
        command += ["disturbed.py", *map(str, disturbed), *argv, "--resume"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def finished(processes, argv, **more):
    code, output = torchrun(processes, argv, **more)
    assert code == 0, output
    return output


def assert_ended(output, processes):
    """Nothing runs on in `processes` that `torchrun` has disturbed: a thread of gloo could abort one at its exit."""
    threads = re.findall("threads: (.*)", output)
    assert len(threads) == processes, output
    assert not any("gloo" in names for names in threads), threads


def test_two_processes_are_one(photographs, undisturbed, tmp_path):
    """RKD of a batch of which each process has half; without the other half it would be another loss."""
    options = ("--recipe", "rkd", "--ema", 0.9)
    output = finished(2, arguments(photographs, tmp_path / "run", *options))
    assert output.count("top-1 %") == 1 and output.count("nothing to resume") == 1, output
    expected = undisturbed(*options)
    assert_one_process(photographs, tmp_path / "run", expected, ("student.pt", "student-ema.pt"))
    for ours, theirs in zip(rows(tmp_path / "run/train.csv"), rows(expected / "train.csv"), strict=True):
        assert float(ours["rkd_loss"]) == pytest.approx(float(theirs["rkd_loss"]), rel=1e-3)


def assert_one_process(photographs, out, expected, names):
    """The weights and the validation of `out` are those of `expected` to rounding."""
    for name in names:
        assert_close(weights(out, name), weights(expected, name), start_weights(photographs))
    for ours, theirs in zip(rows(out / "epochs.csv"), rows(expected / "epochs.csv"), strict=True):
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-3)


def test_killed_process_and_restart(photographs, tmp_path):
    """kill -9 of one of three; torchrun starts them anew, and the weights are those of a run without it."""
    options = ("--recipe", "crd", "--checkpoint-every", 1)  # three: with two, a sum has no order that could change
    finished(3, arguments(photographs, tmp_path / "expected", *options))
    argv = arguments(photographs, tmp_path / "run", *options, "--workers", 1)
    output = finished(3, argv, restarts=1, disturbed=(1, 3, "SIGKILL"))
    assert "exitcode: -9" in output and "resumed after step" in output
    assert_ended(output, 3)
    assert_same_results(tmp_path / "run", tmp_path / "expected")


def test_stopped_processes_and_one_that_goes_on(photographs, undisturbed, tmp_path, capsys):
    """One of two gets a SIGTERM, both stop after the same step; the rest is done by a single process."""
    out = tmp_path / "run"
    code, output = torchrun(2, arguments(photographs, out, "--workers", 1), disturbed=(1, 3, "SIGTERM"))
    assert code != 0 and output.count("continue with: kdfast train --resume") == 1 and "exitcode: 143" in output
    assert_ended(output, 2)
    assert main(resume(out)) == 0
    assert "resumed after step 3 of 8" in capsys.readouterr().err
    assert_one_process(photographs, out, undisturbed(), ["student.pt"])


def test_errors_of_processes_are_one_line(photographs, tmp_path):
    """What is wrong in every process is said once, and none of them waits for another."""
    code, output = torchrun(2, arguments(photographs, tmp_path / "run", "--batch-size", 13))
    assert code != 0
    assert output.count("error: --batch-size: got 13, expected a multiple of 1 micro-batches (--accumulate) on 2") == 1


# ---- what a step sees ------------------------------------------------------------------------------------------------
def test_ranks_share_each_micro_batch():
    for accumulate in (1, 2):
        whole = steps(accumulate=accumulate)
        parts = [steps(accumulate=accumulate, ranks=Ranks(rank, 3, ONE.device)) for rank in range(3)]
        assert [sum(slices, []) for slices in zip(*parts, strict=True)] == whole
    assert sum(steps(accumulate=2), []) == sum(steps(), [])


def test_order_is_a_function_of_seed_and_epoch():
    first, second = steps()[:STEPS_AN_EPOCH], steps()[STEPS_AN_EPOCH:]
    assert sorted(sum(first, [])) == [(0, index) for index in range(CLASSES * TRAIN)]
    assert sorted(sum(second, [])) == [(1, index) for index in range(CLASSES * TRAIN)]
    assert [i for _, i in sum(first, [])] != [i for _, i in sum(second, [])] and steps() != steps(seed=1)
    for start in (1, STEPS_AN_EPOCH, STEPS_AN_EPOCH + 1):
        assert steps(start=start) == steps()[start:]
    assert {a for a, _ in sum(steps(augmentations=1), [])} == {0}, "stored augmentations come again"
    assert len(sum(steps(samples=50), [])) == EPOCHS * CLASSES * TRAIN, "the last two do not fill a batch"


def images_of(photographs):
    reader = readers.open_readers(str(photographs), None, None, None)[0]
    transform = create_transform(32, is_training=True, auto_augment="rand-m9-mstd0.5", normalize=False)
    return data.Images(reader, transform, seed=0, replace=True)


def test_augmented_images_can_be_made_again(photographs):
    """The same key gives the same bytes in any order and process, and nothing else's random numbers move."""
    images = images_of(photographs)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    before = torch.rand(1), random.random(), np.random.rand()
    made = {key: images[key][0] for key in ((0, 5), (1, 5), (0, 6))}
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    for key in reversed(made):
        images[key]
    assert before == (torch.rand(1), random.random(), np.random.rand())
    assert not torch.equal(made[0, 5], made[1, 5])
    with data.loading(images, [[(0, 5), (0, 6)], [(1, 5)]], workers=2, pin_memory=False) as batches:
        first, second = batches
    assert torch.equal(first.images, torch.stack([made[0, 5], made[0, 6]])) and torch.equal(
        second.images[0], made[1, 5]
    )
    assert first.index.tolist() == [5, 6] and (first.augmentation, second.augmentation) == (0, 1)
    assert first.labels.tolist() == [images.reader.samples[5][1], images.reader.samples[6][1]]


# ---- images that cannot be read --------------------------------------------------------------------------------------
def copy_of(photographs, tmp_path):
    return Path(shutil.copytree(photographs, tmp_path / "copy"))


def test_unreadable_images_are_named_and_skipped(photographs, tmp_path, capsys):
    root = copy_of(photographs, tmp_path)
    cut, text = root / "train/sky/0.jpg", root / "val/walls/3.jpg"
    cut.write_bytes(cut.read_bytes()[:-400])
    text.write_text("no image")
    assert main(arguments(root, tmp_path / "run", "--workers", 1)) == 0
    printed = capsys.readouterr()
    assert printed.err.count(f"cannot read {cut}, skipped (1 so far): ") == 1
    assert printed.err.count(f"cannot read {text}, skipped (2 so far): cannot identify image file") == 1
    assert "48 training and 16 validation images, 2 skipped" in printed.out
    accuracy = float(rows(tmp_path / "run/epochs.csv")[-1]["top1"])
    assert accuracy * 15 / 100 == pytest.approx(round(accuracy * 15 / 100)), "the validation has 15 images"
    for file in (cut, text):
        assert f"cannot read {file}" in refused(capsys, arguments(root, tmp_path / file.stem, "--strict"))
        file.unlink()


def test_the_next_image_stands_in(photographs, tmp_path):
    root = copy_of(photographs, tmp_path)
    images = images_of(root)
    Path(images.reader.samples[7][0]).write_bytes(b"")
    image, _, augmentation, index, unread = images[1, 7]
    assert index == 8 and augmentation == 1 and [place for place, _ in unread] == [7]
    assert torch.equal(image, images[1, 8][0])


def test_a_broken_disk_is_no_broken_image(photographs, tmp_path, capsys):
    root = copy_of(photographs, tmp_path)
    for file in root.glob("train/*/*.jpg"):
        file.write_bytes(b"")
    assert "10 images in a row cannot be read" in refused(capsys, arguments(root, tmp_path / "run"))


# ---- folders and shards ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda root: shutil.rmtree(root / "val/sky"), "val has no 'sky'; expected the same class folders"),
        (lambda root: shutil.rmtree(root / "train/sky"), "train has no 'sky'; expected the same class folders"),
        (lambda root: (root / "train/moon").mkdir(), "train has no images in 'moon'"),
        (lambda root: shutil.rmtree(root / "val"), "has no folder val"),
        (lambda root: shutil.rmtree(root), "is not a folder"),
    ],
)
def test_folders_that_do_not_fit(change, expected, photographs, tmp_path, capsys):
    root = copy_of(photographs, tmp_path)
    change(root)
    argv = arguments(root, tmp_path / "run", "--teacher-weights", photographs / "teacher.pt")
    assert expected in refused(capsys, argv)


def test_which_files_are_images(photographs, tmp_path, capsys):
    """Those of `kdfast compare`, each of the class whose folder it is in; the others are counted."""
    root = copy_of(photographs, tmp_path)
    plain, _, _ = readers.open_readers(str(root), None, None, None)
    reference = timm.data.create_dataset("", root=str(root / "train"), search_split=False).reader
    assert plain.samples == reference.samples and plain.class_to_idx == reference.class_to_idx
    (root / "train/sky/walls").mkdir()  # the name of another class
    tile = Image.open(root / "train/sky/0.jpg")
    added = [root / "train/sky/walls" / f"x{suffix}" for suffix in sorted(images.SUFFIXES - {".jpg", ".pgm"})]
    for path in added:
        tile.save(path)
    for name in ("notes.txt", "a.heic", "b.HEIC", ".hidden.jpg"):
        (root / "val/sky" / name).write_text("no image")
    reader, _, _ = readers.open_readers(str(root), None, None, None, print)
    labels = {Path(path): label for path, label in reader.samples}
    assert len(reader) == len(plain) + len(added)
    assert {labels[path] for path in added} == {reader.class_to_idx["sky"]}
    assert "left out 3 files in class folders" in (said := capsys.readouterr().out)
    assert ".heic (2), .txt (1)" in said
    found = data.Images(reader, np.asarray, seed=0, replace=False)
    assert not any(found[0, index][4] for index in range(len(found)))


def test_sixteen_bits(photographs, tmp_path):
    """Half of the light is half of the light."""
    root = copy_of(photographs, tmp_path)
    Image.fromarray(np.full((8, 8), 32767, dtype=np.uint16)).save(root / "train/sky/0.png")
    reader, _, _ = readers.open_readers(str(root), None, None, None)
    (index,) = (number for number, (path, _) in enumerate(reader.samples) if path.endswith("sky/0.png"))
    image, *_ = data.Images(reader, np.asarray, seed=0, replace=False)[0, index]
    assert image.shape == (8, 8, 3) and (image == 127).all()


@pytest.mark.parametrize("name", [b"\xff\xfe", b"\x1b[31mred"], ids=["not UTF-8", "escape sequence"])
def test_names_that_are_no_text(name, photographs, tmp_path, capsys):
    """They train, and are shown as escapes."""
    root, name = copy_of(photographs, tmp_path), os.fsdecode(name)
    for part in ("train", "val"):
        (root / part / "sky").rename(root / part / name)
    broken = root / "train" / name / f"{name}.jpg"
    broken.write_text("no image")
    assert main(arguments(root, tmp_path / "run", "--epochs", 1, "--workers", 1)) == 0
    said = capsys.readouterr().err
    assert (
        f"cannot read {printable(str(broken))}, skipped" in said
        and "\x1b" not in said
        and "\\x" in said.replace("\\udc", "\\x")
    )
    assert "\x1b" not in refused(capsys, arguments(root, tmp_path / "strict", "--epochs", 1, "--strict"))


def test_fingerprint(photographs, tmp_path, monkeypatch):
    """Other pixels under the same names are other data, by their sizes or the bytes of a sample."""
    root = copy_of(photographs, tmp_path)

    def digest():
        return readers.fingerprint(readers.open_readers(str(root), None, None, None)[0])

    before = digest()
    path = sorted((root / "train/sky").iterdir())[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    assert digest() != before, "equal names and sizes"
    path.write_bytes(content)
    assert digest() == before
    monkeypatch.setattr(readers, "SAMPLED", 1)
    sampled, last = digest(), max((root / "train").rglob("*.jpg"))
    assert sampled != before
    last.write_bytes(last.read_bytes() + b"x")
    assert digest() != sampled, "equal names, and bytes of the sample"
    Path(last).unlink(), last.symlink_to("nowhere")
    digest()


def shards(photographs, folder, label=lambda text: text):
    """The photographs as webdataset shards in the reader's order, two for training; `label` changes a label's text."""
    folder.mkdir()
    train, val, _ = readers.open_readers(str(photographs), None, None, None)
    half = len(train) // 2
    parts = {"train-0.tar": (train, range(half)), "train-1.tar": (train, range(half, len(train)))}
    parts["val-0.tar"] = (val, range(len(val)))
    for name, (reader, indices) in parts.items():
        with tarfile.open(folder / name, "w") as archive:
            for index in indices:
                file, number = reader[index]
                members = {f"{index:04}.jpg": file.read(), f"{index:04}.cls": label(str(number)).encode()}
                for member, content in members.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return folder


SPLITS = ("--train-split", "train-{0..1}.tar", "--val-split", "val-0.tar")


def from_shards(photographs, folder, out, *more):
    return arguments(photographs, out, "--data", f"wds/{folder}", *SPLITS, *more)


def test_shards_train_like_the_folder(photographs, undisturbed, tmp_path):
    folder = shards(photographs, tmp_path / "shards")
    assert main(from_shards(photographs, folder, tmp_path / "run")) == 0
    assert_same_results(tmp_path / "run", undisturbed())
    named = {
        name: {"name": name, "num_samples": 1, "filenames": files, "shard_lengths": [1] * len(files)}
        for name, files in (("train", ["train-0.tar", "train-1.tar"]), ("validation", ["val-0.tar"]))
    }
    (folder / "_info.json").write_text(json.dumps({"splits": named}))
    train_reader, val_reader, classes = readers.open_readers(f"wds/{folder}", "train", "validation", None)
    assert (len(train_reader), len(val_reader), classes) == (CLASSES * TRAIN, CLASSES * VAL, CLASSES)


@pytest.mark.parametrize(
    ("label", "more", "expected"),
    [
        (lambda text: "7" if text == "3" else text, ["--classes", 4], "train-1.tar/0036 has label 7, expected 0 to 3"),
        (lambda text: "-1" if text == "0" else text, [], "train-0.tar/0000 has label -1, expected 0 to 3"),
        (lambda text: "2" if text == "1" else text, [], "has no image of class 1"),
        (lambda text: "cat", [], "cannot read the shard"),
        (lambda text: text, ["--train-split", "train-{0..2}.tar"], "train-2.tar is missing"),
        (lambda text: text, ["--train-split", "nothing"], "timm finds no split 'nothing'"),
        (lambda text: text, ["--train-split", "train"], "expected a split of its _info.json, or names of shards"),
    ],
)
def test_shards_that_do_not_fit(label, more, expected, photographs, tmp_path, capsys):
    folder = shards(photographs, tmp_path / "shards", label)
    assert expected in refused(capsys, from_shards(photographs, folder, tmp_path / "run", *more))


def test_truncated_shard(photographs, tmp_path, capsys):
    """Cut in the middle of an image: the images behind it are gone, and the one that is cut has no label."""
    folder = shards(photographs, tmp_path / "shards")
    content = (folder / "train-1.tar").read_bytes()
    (folder / "train-1.tar").write_bytes(content[: len(content) // 2 + 700])
    line = refused(capsys, from_shards(photographs, folder, tmp_path / "run"))
    assert "train-1.tar" in line


# ---- arguments -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--student", "test_resnot"], "--student: timm has no model 'test_resnot'; expected test_resnet"),
        (["--teacher", "nothing_like_it_at_all"], "--teacher: timm has no model 'nothing_like_it_at_all'"),
        (["--teacher", "test_vit"], "cannot load the weights of test_vit; expected those of a test_vit of 4 classes"),
        (["--teacher-weights", "missing.pt"], "--teacher-weights: missing.pt is not a file"),
        (["--recipe", "kdd"], "--recipe: got 'kdd', expected one of kd, dkd"),
        (["--recipe", "ofd"], "--recipe ofd: "),
        (["--classes", "3"], "--classes: got 3, but"),
        (["--batch-size", "13", "--accumulate", "2"], "--batch-size: got 13, expected a multiple of 2 micro-batches"),
        (["--batch-size", "12", "--accumulate", "12"], "--accumulate: got 12, which leaves 1 of the 12 images"),
        (["--student", "microsoft/resnet-18"], "--student: timm cannot make 'microsoft/resnet-18': "),
        (["--batch-size", "100"], "--batch-size: got 100, expected at most the 48 training images"),
        (["--warmup-epochs", "2"], "--warmup-epochs: got 2, expected less than the 2 of --epochs"),
        (["--lr", "1e30"], "a loss is not finite before step"),  # found while it runs
        (["--optimizer", "sdg"], "--optimizer: "),
        (["--auto-augment", "round-m9"], "--auto-augment: timm does not take 'round-m9'"),
        (["--sync-bn"], "--sync-bn: torch has it for CUDA alone"),
        (["--data", "wds/"], "--data: got 'wds/'"),
        (["--out", ""], "--out: is missing"),
    ],
)  # fmt: skip
def test_bad_arguments(more, expected, photographs, tmp_path, capsys):
    assert expected in refused(capsys, arguments(photographs, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists() or "1e30" in more, "a refused run leaves files"


def test_missing_arguments(photographs, tmp_path, capsys):
    assert "--teacher: is missing" in refused(capsys, ["train", "--student", STUDENT, "--data", "x", "--out", "y"])
    assert "--data: is missing" in refused(capsys, ["train", "--teacher", TEACHER, "--out", "y"])


def test_resume_of_nothing(tmp_path, capsys):
    """A mistyped folder starts no run, whatever else is given."""
    for more in ([], ["--lr", "0.2"], ["--data", "x", "--teacher", TEACHER]):
        assert "--resume: there is no run in typo to continue; to start one" in refused(capsys, resume("typo", *more))
    assert not list(tmp_path.iterdir())


def test_without_timm(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    argv = ["train", "--student", STUDENT, "--teacher", TEACHER, "--data", "images", "--out", "run"]
    assert "timm is not installed; install it with: pip install " in refused(capsys, argv)
    assert not list(tmp_path.iterdir())


def test_changed_arguments_and_data(photographs, tmp_path, capsys, monkeypatch):
    root, out = copy_of(photographs, tmp_path), tmp_path / "run"
    stop_after(monkeypatch, 1, arguments(root, out))
    capsys.readouterr()
    assert "holds a run already; continue it with --resume" in refused(capsys, arguments(root, out))
    assert "--lr was 0.02 and is 0.03" in refused(capsys, resume(out, "--lr", "0.03"))
    next(root.glob("train/*/*.jpg")).unlink()
    assert "have changed" in refused(capsys, resume(out))


# ---- the teacher -----------------------------------------------------------------------------------------------------
def test_teacher_from_the_cache(photographs, tmp_path, capsys, monkeypatch):
    """Pretrained weights out of timm's cache, and one line where they are not there or of other classes."""
    import huggingface_hub.constants
    from safetensors.torch import save_file

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    argv = without(arguments(photographs, tmp_path / "run"), "--teacher-weights")
    assert "name a file with --teacher-weights" in refused(capsys, argv)
    model = timm.create_model(TEACHER)
    cached = tmp_path / f"cache/models--timm--{TEACHER}.{model.pretrained_cfg['tag']}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(model.state_dict(), cached / "snapshots" / ("0" * 40) / "model.safetensors")
    assert "test_resnet knows 1000 classes, the data has 4" in refused(capsys, argv)
    found = networks.teacher(settings.Settings("", STUDENT, TEACHER), 1000, 32).state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_weights_that_would_run_code(photographs, tmp_path, capsys, monkeypatch):
    """Weights are read as tensors alone, whatever the default of timm."""
    load, asked = timm.models.load_checkpoint, []

    def look(*arguments, **more):
        asked.append(more.get("weights_only"))
        return load(*arguments, **more)

    monkeypatch.setattr(timm.models, "load_checkpoint", look)
    torch.save({"state_dict": {}, "payload": Payload(tmp_path / "ran")}, tmp_path / "weights.pt")
    argv = arguments(photographs, tmp_path / "run", "--teacher-weights", tmp_path / "weights.pt")
    assert "--teacher-weights: " in refused(capsys, argv)
    assert asked == [True] and not (tmp_path / "ran").exists()


def test_models_of_one_size_are_set_to_the_images(photographs):
    chosen = settings.Settings("", "test_vit", "test_vit", image_size=64)
    assert networks.student(chosen, CLASSES)(torch.zeros(1, 3, 64, 64)).shape == (1, CLASSES)
