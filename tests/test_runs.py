"""`kdfast.runs`: a stopped run ends with the same bits, whatever stops it, and each error is one clear line."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from commands import ENVIRONMENT, disk_that_is_full, full_disk
from processes import held

from kdfast.runs import checkpoints, files, folder, options
from kdfast.runs.determinism import derived_seed, reproducible
from kdfast.runs.errors import RunError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """A run without --out is the test's."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run that nothing has stopped."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert tiny.main(["--out", str(out)]) == 0
    return out


def refused(capsys, argv, **more):
    """The one line that the refused command prints to stderr."""
    capsys.readouterr()
    assert tiny.main(argv, **more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kdfast tiny: error: ")
    return line


def assert_same_results(out, expected):
    assert (out / "sum.txt").read_bytes() == (expected / "sum.txt").read_bytes()


# ---- stopping and continuing -----------------------------------------------------------------------------------------
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import tiny
calls, replace = 0, os.replace
def replace_and_die(source, target):
    global calls
    calls += 1
    if calls < int(sys.argv[2]):
        return replace(source, target)
    if sys.argv[3] == "after":
        replace(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_and_die
tiny.main(sys.argv[4:])
"""


def test_kill_and_resume(uninterrupted, tmp_path):
    """SIGKILL in the middle of a checkpoint, then SIGKILL between two, then to the end."""
    for moment, when, done in (("3", "before", 1), ("2", "after", 3)):
        argv = [str(Path(__file__).parent), moment, when, "--out", "run", "--steps", "4", "--resume"]
        killed = subprocess.run([sys.executable, "-c", KILLED, *argv], env=ENVIRONMENT, cwd=tmp_path)
        assert killed.returncode == -signal.SIGKILL
        assert checkpoints.load(tmp_path / "run/checkpoints/state.pt")["done"] == done
    assert tiny.main(["--resume", "--out", "run"]) == 0
    assert not list(tmp_path.rglob("*.tmp"))
    assert_same_results(tmp_path / "run", uninterrupted)


WRITES = 6  # settings, 4 checkpoints, results


@pytest.mark.parametrize("allowed", range(WRITES))
def test_full_disk_at_every_write(allowed, uninterrupted, tmp_path, monkeypatch, capsys):
    """One line, exit code 2, earlier files intact, no temporary file, and --resume ends with the same bits."""
    with disk_that_is_full(monkeypatch, allowed):
        line = refused(capsys, ["--out", "run"])
    assert "cannot write run/" in line and "No space left on device" in line and line.endswith("--resume continues")
    assert not list(tmp_path.rglob("*.tmp"))
    if allowed > 1:
        assert checkpoints.load(tmp_path / "run/checkpoints/state.pt")["done"] == allowed - 1
    assert tiny.main(["--out", "run", "--resume", "--steps", "4"]) == 0
    assert_same_results(tmp_path / "run", uninterrupted)


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


def test_one_folder_is_of_one_process(uninterrupted, tmp_path, capsys):
    """A second process is refused, at the start and on --resume; the lock of one that was killed is none."""
    out = tmp_path / "run"
    argv = ["--out", str(out), "--steps", "4"]
    with held(out):
        for more in ([], ["--resume"]):
            assert tiny.main([*argv, *more]) == 2
            assert f"--out: another process is writing into {out}; " in capsys.readouterr().err
        assert sorted(os.listdir(out)) == sorted([files.LOCK, ".part.0.tmp"])
    assert tiny.main(argv) == 0
    assert not list(out.rglob("*.tmp"))
    assert_same_results(out, uninterrupted)


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "kdfast tiny: interrupted; continue with: kdfast tiny --resume --out run"),
        (OSError(errno.EIO, "Input/output error", "a file"), 2, "kdfast tiny: error: a file: Input/output error"),
        (MemoryError("of 5 GB"), 2, "kdfast tiny: error: out of memory: of 5 GB"),
        (RunError("two\nlines"), 2, "kdfast tiny: error: two lines"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_a_command_answers(raised, status, said, uninterrupted, tmp_path, capsys):
    """One line, and a way on to the same bits."""

    def computed(number):
        if number == 3:
            raise raised

    assert tiny.main(["--out", "run"], computed=computed) == status
    assert capsys.readouterr().err.strip() == said
    assert tiny.main(["--resume", "--out", "run"]) == 0
    assert_same_results(tmp_path / "run", uninterrupted)


def test_a_reader_that_is_gone_and_a_fault_are_no_answers():
    for error in (BrokenPipeError(), RuntimeError("a fault of the program")):
        with pytest.raises(type(error)):
            tiny.main(
                ["--out", type(error).__name__], computed=lambda number, error=error: (_ for _ in ()).throw(error)
            )


# ---- which folder ----------------------------------------------------------------------------------------------------
def test_a_run_that_began_meanwhile(tmp_path, capsys, monkeypatch):
    """Between the check of the folder and the first file, another process has started and ended a run there."""
    lock = files.locked

    def locked_after_another(path):
        path.mkdir()
        (path / "settings.json").write_text("another's")
        return lock(path)

    monkeypatch.setattr(tiny, "locked", locked_after_another)
    assert "holds a run already" in refused(capsys, ["--out", "run"])
    assert (tmp_path / "run/settings.json").read_text() == "another's"


def test_newest_after_the_clock_was_set_back(monkeypatch):
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
        made.append(folder._unused("tiny"))
        made[-1].mkdir(parents=True)
        (made[-1] / "settings.json").touch()
        assert folder._newest("tiny") == made[-1]
    assert len(set(made)) == 4


def test_folders(uninterrupted, tmp_path, capsys):
    """What is somebody else's is not written to, and a new run without --out has a folder of its own."""
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/sum.txt").write_text("of something else")
    before = (uninterrupted / "settings.json").read_bytes()
    for out, named in (
        ("file", "file is a file"),
        ("other", "has a sum.txt that belongs to no run"),
        ("", "--out: got '', expected a folder"),
        (str(uninterrupted), "holds a run already; continue it with --resume"),
    ):
        assert named in refused(capsys, ["--out", out])
    assert sorted(os.listdir(tmp_path)) == ["file", "other"] and os.listdir("other") == ["sum.txt"]
    assert (uninterrupted / "settings.json").read_bytes() == before
    for argv in ([], ["--resume"]):
        assert tiny.main(argv) == 0
        assert len(list(tmp_path.glob("runs/tiny-*"))) == 1


def test_resume_of_nothing(uninterrupted, tmp_path, capsys):
    """A mistyped folder starts no run; with the options of one it starts, so that one command serves its restarts."""
    (tmp_path / "empty").mkdir()
    for out, where in ((["--out", "typo"], "typo"), (["--out", "empty"], "empty"), ([], "runs")):
        assert f"--resume: there is no run in {where} to continue; to start one" in refused(capsys, ["--resume", *out])
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["empty"]
    for said in ("kdfast tiny: nothing to resume, starting in run\n", ""):
        assert tiny.main(["--resume", "--out", "run", "--steps", "4"]) == 0
        assert capsys.readouterr().err == said
    assert_same_results(tmp_path / "run", uninterrupted)


# ---- settings.json ---------------------------------------------------------------------------------------------------
def test_resume_refuses_another_run(uninterrupted, tmp_path, capsys):
    out = ["--resume", "--out", str(uninterrupted)]
    assert "--steps was 4 and is 5; --rate was 0.5 and is 1.0; start anew" in refused(
        capsys, [*out, "--steps", "5", "--rate", "1"]
    )
    assert "the images have changed" in refused(capsys, out, data="other images")
    assert tiny.main([*out, "--workers", "3"]) == 0, "which does not change results"
    stored = json.loads((uninterrupted / "settings.json").read_text())
    stored["environment"]["torch"] = "1.0"
    (tmp_path / "settings.json").write_text(json.dumps(stored))
    named, warned = f"torch was 1.0 and is {torch.__version__}", []
    assert named in refused(capsys, ["--resume", "--out", "."])
    (tmp_path / "checkpoints").mkdir()
    assert tiny.main(["--resume", "--out", "."], warn=warned.append) == 0
    assert warned == [f"the weights may differ in their last bits: {named}"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"steps": -5}, "settings.json: steps: got '-5', expected a whole number of at least 1 and at most 9"),
        ({"steps": True}, "settings.json: steps: got 'True', expected a whole number"),
        ({"rate": 0}, "settings.json: rate: got 0, expected a number greater than 0"),
        ({"rate": []}, "settings.json is damaged"),
        ({"steps": "2"}, "settings.json is damaged"),
        ({"more": 1}, "settings.json is damaged"),
        (None, "settings.json is damaged"),
    ],
)
def test_tampered_settings(change, expected, uninterrupted, tmp_path, capsys):
    stored = json.loads((uninterrupted / "settings.json").read_text())
    stored["settings"] |= change or {}
    text = json.dumps(stored)
    (tmp_path / "settings.json").write_text(text if change else text[:20])
    assert expected in refused(capsys, ["--resume", "--out", str(tmp_path)])


# ---- checkpoints -----------------------------------------------------------------------------------------------------
def flip_a_bit(content):
    """Among the weights, which the pickle around them does not notice."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {"cut": lambda content: content[: len(content) // 2], "bit": flip_a_bit, "empty": lambda content: b""}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoints(damage, tmp_path, capsys):
    """The file is named; of the newest two the one before is used, and where both are damaged: one line."""
    assert tiny.main(["--out", "run"]) == 0
    path = Path("run/checkpoints/state.pt")
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path} is damaged; delete it" in refused(capsys, ["--resume", "--out", "run"])
    for step in range(4):
        checkpoints.save_newest(tmp_path, step, {"steps": step, "weights": torch.zeros(1000)})
    older, newest = sorted(tmp_path.glob("step-*"))
    newest.write_bytes(damage(newest.read_bytes()))
    said = []
    assert checkpoints.load_newest(tmp_path, said.append)["steps"] == 2
    assert said == [f"{newest} is damaged; trying the one before"]
    older.write_bytes(damage(older.read_bytes()))
    with pytest.raises(RunError, match="has no checkpoint that is whole"):
        checkpoints.load_newest(tmp_path, said.append)
    assert checkpoints.exist(tmp_path)


def test_a_checkpoint_of_something_else():
    with pytest.raises(RunError, match="of another run"):
        checkpoints.continue_from(lambda state: state["missing"], {}, "of another run")
    assert checkpoints.continue_from(lambda state: None, {"a": 1}, "") == {"a": 1}


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"state": Payload(tmp_path / "ran")}, tmp_path / "state.pt")
    with pytest.raises(RunError, match="is damaged"):
        checkpoints.load(tmp_path / "state.pt")
    assert not (tmp_path / "ran").exists()


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# ---- options and determinism -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("check", "text", "value"),
    [
        (options.whole(1), "3", 3),
        (options.whole(1), "0", "expected a whole number of at least 1"),
        (options.whole(1), "ten", "got 'ten', expected a whole number"),
        (options.whole(0, 4), "5", "of at least 0 and at most 4"),
        (options.number(below=1), "0", 0.0),
        (options.number(below=1), "1", "expected a number of at least 0 and below 1"),
        (options.number(zero=False), "0", "expected a number greater than 0"),
        (options.number(), "nan", "expected a number of at least 0"),
        (options.device, "cpu", "cpu"),
        (options.device, "gpu", "got 'gpu', expected cpu or cuda"),
        (options.device, "meta", "got 'meta', expected cpu or cuda"),
        (options.device, "cuda:99", "got 'cuda:99', but torch"),
    ],
)
def test_checks(check, text, value):
    if isinstance(value, str) and value != "cpu":
        with pytest.raises(RunError, match=f"--x: .*{value}"):
            check("--x", text)
    else:
        assert check("--x", text) == value


def test_help_is_what_is_declared():
    text = " ".join(tiny.parser().format_help().split())
    for part in (
        "--steps N steps (default: 4)",
        "speed: --workers N processes (default: 0) --fast no wait",
        "--resume",
    ):
        assert part in text
    given = tiny.parser().parse_args(["--fast"])
    assert (given.steps, given.fast) == (None, True) and options.resolve(tiny.Settings, given).steps == 4
    assert options.resolve(tiny.Settings, given, steps=7).steps == 7, "a default of the program's own"


def test_reproducible_leaves_torch_as_it_was():
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with reproducible(threads=2):
        assert torch.get_num_threads() == 2 and torch.are_deterministic_algorithms_enabled()
    assert before == (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    assert derived_seed(0, 1) != derived_seed(1, 0)
