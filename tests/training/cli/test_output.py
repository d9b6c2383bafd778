"""What a command prints may be lost; the command goes on, with the exit code that it would have had."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mtp_ce.training.cli import evaluate as eval_cli
from mtp_ce.training.cli import export
from mtp_ce.training.cli import train as cli
from mtp_ce.training.cli.output import unfailing_output
from mtp_ce.training.config.recipe import to_yaml
from mtp_ce.training.models import sources
from mtp_ce.training.run import evaluate, pipeline

PRINTS = "import sys; from mtp_ce.training.cli.train import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("words", [["--help"], ["tiny", "--print-config"]])
def test_a_full_disk_below_stdout_is_one_line_and_no_other_exit_code(words):
    """The interpreter flushes once more at its end: 120 if that fails."""
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-c", PRINTS, *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.stderr == "warning: stdout can't be written (No space left on device); the command goes on\n"
    assert run.returncode == 0


def test_a_reader_that_goes_away_is_no_line_and_no_other_exit_code():
    reads, writes = os.pipe()
    os.close(reads)
    words = ["tiny", "--print-config"]
    run = subprocess.run([sys.executable, "-c", PRINTS, *words], stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (run.returncode, run.stderr) == (0, "")


def test_both_streams_may_be_full():
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-c", PRINTS, "tiny", "train.steps=0"], stdout=full, stderr=full)
    assert run.returncode == 2


@pytest.fixture
def short(small, tmp_path: Path) -> Path:
    """A folder with a recipe of three steps."""
    overrides = ["train.steps=3", "train.log_every=1", "validation.every=null", "validation.decoding.prompts=0"]
    (tmp_path / "short.yaml").write_text(to_yaml(small(overrides)))
    return tmp_path


def test_a_run_ends_well_on_a_full_disk_below_its_output(short, start_train_mtp):
    (short / "printed.txt").symlink_to("/dev/full")
    process = start_train_mtp(short, "short.yaml", "--output", "out")
    process.join(600)
    assert process.exitcode == 0, (short / "complained.txt").read_text()
    assert (short / "out" / "model" / "model.safetensors").is_file()
    assert (short / "complained.txt").read_text() == (
        "warning: stdout can't be written (No space left on device); the command goes on\n"
    )


def test_a_run_ends_well_without_the_reader_of_its_output(short, start_train_mtp):
    """As `train-mtp | head -1`."""
    os.mkfifo(short / "printed.txt")
    first = []

    def head() -> None:
        with (short / "printed.txt").open() as pipe:
            first.append(pipe.readline())

    reader = threading.Thread(target=head, daemon=True)
    reader.start()
    process = start_train_mtp(short, "short.yaml", "--output", "out")
    process.join(600)
    assert process.exitcode == 0, (short / "complained.txt").read_text()
    assert first[0].startswith("corpus ")
    assert (short / "complained.txt").read_text() == ""
    assert (short / "out" / "evaluation.json").is_file()


def ascii_stream() -> io.TextIOWrapper:
    """A stdout of LANG=C or PYTHONIOENCODING=ascii."""
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


def test_characters_that_stdout_lacks_are_escaped(monkeypatch):
    out = ascii_stream()
    monkeypatch.setattr(sys, "stdout", out)
    with unfailing_output():
        print("🏃 run é", "a file name that is not UTF-8: \udcff")
    assert out.buffer.getvalue() == b"\\U0001f3c3 run \\xe9 a file name that is not UTF-8: \\udcff\n"
    assert sys.stdout is out


def test_a_corpus_outside_of_ascii_is_printed_to_an_ascii_stdout(corpus_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("größe").symlink_to(corpus_folder)
    out = ascii_stream()
    monkeypatch.setattr(sys, "stdout", out)
    words = ["data.corpus=größe", "data.holdout_fraction=0.2", "tracking.kind=none", "--dry-run"]
    assert cli.main(["tiny", *words]) == 0
    printed = out.buffer.getvalue().decode("ascii")
    assert "gr\\xf6\\xdfe" in printed
    assert printed.endswith("dry run: nothing was written\n")


def test_a_closed_stdout_and_none_at_all_end_nothing(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stdout", stream)
        with unfailing_output():
            print("lost", flush=True)


def test_no_file_takes_the_place_of_a_closed_stdout():
    """What libraries write to 1 and 2 would end up in it."""
    opens = "import os, sys; from mtp_ce.training.cli.output import unfailing_output\n"
    opens += "with unfailing_output():\n    sys.exit(os.open(os.devnull, os.O_RDONLY))"
    run = subprocess.run([sys.executable, "-c", opens], preexec_fn=lambda: os.closerange(0, 3))
    assert run.returncode > 2


def _from_file(path: Path) -> None:
    torch.from_file(str(path), size=1)


def _from_rust(path: Path) -> None:
    raise ValueError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})")


def _from_python(path: Path) -> None:
    path.open("rb")


@pytest.mark.parametrize("fails", [_from_file, _from_rust, _from_python])
def test_an_error_of_the_disk_is_one_line_of_every_command(fails, tmp_path, monkeypatch, capsys):
    """Also where a library reports it in its text alone."""
    gone, output = tmp_path / "gone", tmp_path / "output"

    def fail(*_: object, **__: object) -> None:
        fails(gone)

    monkeypatch.setattr(pipeline, "train", fail)
    monkeypatch.setattr(evaluate, "evaluate", fail)
    monkeypatch.setattr(export, "_export", fail)
    monkeypatch.setattr(sources, "find_checkpoint", lambda source: (source, None))
    commands = {
        "train-mtp": (cli.main, ["tiny", "tracking.kind=none", "--output", str(output)]),
        "eval-mtp": (eval_cli.main, ["some/model", "tracking.kind=none", "--output", str(output)]),
        "export-mtp": (export.main, ["some/model", "base", str(output)]),
    }
    reason = f"{os.strerror(errno.ENOSPC)}: {output}" if fails is _from_rust else f"No such file or directory: {gone}"
    for name, (main, arguments) in commands.items():
        assert main(arguments) == 1
        assert capsys.readouterr().err == f"{name}: error: {reason}\n"
