"""The doctor's report and exit status, and the command line around it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdfast
from kdfast import _build_record, cli, doctor

PACKAGE = Path(kdfast.__file__).parent


def run_doctor(capsys, *options):
    status = cli.main(["doctor", *options])
    return status, capsys.readouterr().out


def test_report(capsys, monkeypatch):
    monkeypatch.setenv("KDFAST_REQUIRE_KERNELS", "0")
    status, text = run_doctor(capsys)
    assert status == 0
    for line in (f"kdfast        {kdfast.__version__}", "torch         ", "KDFAST_REQUIRE_KERNELS=0", "softmax_kl "):
        assert line in text
    assert "cuda: " in text or "cuda" in text.split("\n\n")[1]


def test_json_agrees_with_the_dispatcher(capsys):
    status, text = run_doctor(capsys, "--json")
    report = json.loads(text)
    assert status == 0
    assert report["ops"] == kdfast._kernels.paths()
    assert report["build"] == _build_record.read() | doctor.build_info()
    if report["libraries"]["_cpu"]["loaded"]:
        assert report["ops"]["softmax_kl"]["cpu"] == "kernel"
    else:
        assert any(note[0] == "cpu" and "reinstall" in note[2] for note in report["notes"])


def test_no_record(monkeypatch, capsys, tmp_path):
    """A source tree that was never installed."""
    monkeypatch.setattr(_build_record, "PATH", tmp_path / "_build.json")
    assert _build_record.read() == {}
    assert "never installed" in run_doctor(capsys)[1]


@pytest.mark.parametrize(
    ("archs", "capability", "covered"),
    [
        (["8.0", "9.0"], "8.6", True),  # machine code serves later minor versions
        (["8.6", "9.0"], "8.0", False),  # but not earlier ones
        (["8.0", "9.0"], "10.0", False),
        (["8.0", "9.0+PTX"], "12.0", True),  # PTX serves everything later
        (["9.0+PTX"], "8.9", False),
    ],
)
def test_covers(archs, capability, covered):
    assert doctor.covers(archs, capability) == covered


def test_notes_name_the_cause():
    """Each reason for a slower path, from a made-up report."""
    loaded = {"path": "x.so", "loaded": True, "error": None, "reason": "", "remedy": ""}
    missing = {"path": None, "loaded": False, "error": None, "reason": "no compiler", "remedy": ""}
    broken = {"path": "x.so", "loaded": False, "error": "undefined symbol", "reason": "", "remedy": ""}
    ops = {"softmax_kl": {"cpu": "kernel", "cuda": "fallback"}}
    gpu = [{"name": "Some GPU", "capability": "7.5"}]

    def notes(cpu, cuda, torch_cuda="13.0", devices=gpu):
        report = {"libraries": {"_cpu": cpu, "_cuda": cuda}, "torch_cuda": torch_cuda, "devices": devices, "ops": ops}
        return list(doctor.notes(report | {"build": {"archs": ["8.0"]}}))

    assert [note[1] for note in notes(missing, missing)] == ["no compiler", "no compiler"]
    assert "undefined symbol" in notes(broken, missing)[0][1]
    assert notes(loaded, missing, torch_cuda=None) == [
        ("cuda", "this torch has no CUDA", "for GPU kernels, install a CUDA torch and then kdfast again")
    ]
    assert "_cuda has no kernel for softmax_kl" in notes(loaded, loaded)[0][1]
    assert "TORCH_CUDA_ARCH_LIST=7.5" in notes(loaded, loaded)[1][2]
    assert notes(loaded, loaded, devices=[])[1][1] == "no GPU is visible"


def test_broken_library(tmp_path):
    """A library that was built and does not load: importing kdfast fails with the reason, the doctor reports it."""
    (tmp_path / "kdfast").mkdir()
    for entry in PACKAGE.iterdir():
        if not entry.name.startswith("_cpu_"):
            (tmp_path / "kdfast" / entry.name).symlink_to(entry)
    (tmp_path / "kdfast/_cpu_baseline.so").write_text("not a library")

    def python(*command):
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        environment.pop("KDFAST_ISA", None)
        return subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)

    imported = python("-c", "import kdfast")
    assert imported.returncode != 0
    assert "ImportError" in imported.stderr
    assert "_cpu_baseline.so" in imported.stderr
    report = python("-m", "kdfast", "doctor")
    assert report.returncode == 1
    assert "_cpu          FAILED: OSError: " in report.stdout


def test_without_the_module(monkeypatch, capsys):
    """As in a wheel: the record beside the libraries says how they were built."""
    record = {"situation": "cpu", "reason": "why", "compiler": "a compiler", "cpu_sets": ["baseline"], "cuda": None}
    monkeypatch.setitem(sys.modules, "kdfast._C", None)  # an import of it is an error
    monkeypatch.setattr(_build_record, "read", lambda: record | {"torch_target": "2.11"})
    assert "a compiler for baseline; for torch >= 2.11" in run_doctor(capsys)[1]


def test_a_library_for_another_cuda_is_left_alone(monkeypatch, tmp_path, capsys):
    """Its dynamic libraries are not there: a reason for the fallback, which says what to do, and no error."""
    (tmp_path / "_cuda.so").touch()
    monkeypatch.setattr(kdfast._kernels, "FOLDER", str(tmp_path))
    monkeypatch.setattr(kdfast._build_record, "read", lambda: {"cuda": "13.0"})
    monkeypatch.setattr("torch.version.cuda", "12.8")
    library = kdfast._kernels.Library()
    kdfast._kernels._load_cuda(library)
    assert not library.loaded and library.error is None
    assert library.reason == f"its CUDA library is for CUDA 13.0, torch {torch.__version__} is for CUDA 12.8"
    assert "--index-url https://download.pytorch.org/whl/cu130)" in library.remedy
    assert "with nvcc 12: pip install" in library.remedy
    monkeypatch.setitem(kdfast._kernels._libraries, "_cuda", library)
    status, text = run_doctor(capsys)
    assert f"cuda: {library.reason}.\n      -> {library.remedy}" in text and status == 0
    monkeypatch.setattr(kdfast._kernels, "_warned", set())
    monkeypatch.delenv("KDFAST_REQUIRE_KERNELS", raising=False)
    with pytest.warns(kdfast.FallbackWarning, match="cu130"):
        kdfast._kernels._announce("softmax_kl", "cuda")


def test_instruction_set_by_hand():
    """KDFAST_ISA names the kernels; one that this processor has not is an error that says which there are."""
    if not kdfast._kernels.status()["_cpu"].loaded:
        pytest.skip("no CPU kernels")
    code = "import kdfast; print(kdfast._kernels.status()['_cpu'].path)"

    def run(name):
        environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "KDFAST_ISA": name}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert "_cpu_baseline.so" in run("baseline").stdout
    wrong = run("mmx")
    assert wrong.returncode != 0
    assert "KDFAST_ISA must be one of baseline" in wrong.stderr and "got 'mmx'" in wrong.stderr


def command(*arguments, **more):
    """A process of the command line, which runs the package that is tested here."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    line = [sys.executable, "-m", "kdfast", *arguments]
    return subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True, **more)


WITHOUT_TORCH = """
import sys
sys.argv = ["-m", *sys.argv[1:]]
sys.modules["torch"] = None  # an import of it is an error
import kdfast.cli
kdfast.cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize("words", ["--version", *(f"{name} --help".strip() for name in ("", *cli.COMMANDS))])
def test_help_needs_no_torch(words):
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    line = [sys.executable, "-c", WITHOUT_TORCH, *words.split()]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "kdfast" in done.stdout, done.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_fits_two_screens(name, capsys, monkeypatch):
    """Of 40 lines and 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 80


@pytest.mark.parametrize("words", ["compare --student resnet18", "train --loss kd", "study wide --recipe kd"])
def test_programs_know_their_own_options_alone(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(words.split())
    assert f"unrecognized arguments: {' '.join(words.split()[-2:])}" in capsys.readouterr().err


def test_import_loads_the_library_but_no_compiler():
    """Outside of the command line the ops are registered by the import alone; torch._dynamo takes longer than they."""
    code = "import sys, kdfast, torch; torch.ops.kdfast.softmax_kl; print('torch._dynamo' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("words", ["doctor", "--help", "compare --help"])
def test_a_reader_that_has_seen_enough(words):
    """`kdfast doctor | head` ends without a word."""
    process = command(*words.split(), stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == ""
    # argparse ignores the error where the output has no buffer.
    assert process.wait() in (128 + signal.SIGPIPE, *[0] * ("--help" in words))


def test_interrupt_before_a_command_has_begun(capsys, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    assert cli.main(["compare"]) == 130
    assert capsys.readouterr().err == "\nkdfast: interrupted\n"


def test_a_source_tree_says_what_it_is(monkeypatch, tmp_path):
    """Inside a clone Python imports what is not built, whatever is installed."""
    package = tmp_path / "kdfast"
    package.mkdir()
    monkeypatch.setattr(kdfast._kernels, "FOLDER", str(package))
    assert kdfast._kernels._unbuilt("_cpu") == "kdfast._cpu was not built here"
    (tmp_path / "setup.py").touch()
    said = kdfast._kernels._unbuilt("_cpu")
    assert f"the source tree {tmp_path}, where _cpu is not built: start Python in another folder" in said


def test_command_line(capsys, monkeypatch):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"kdfast {kdfast.__version__}\n"
    with pytest.raises(SystemExit, match="2"):
        cli.main([])

    class NeedsRich:
        @staticmethod
        def add_arguments(parser):
            raise cli.MissingExtra("rich is not installed; install it with: pip install rich")

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: NeedsRich)
    assert cli.main(["compare"]) == 2
    assert "pip install rich" in capsys.readouterr().err
