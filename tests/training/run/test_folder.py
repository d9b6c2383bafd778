"""The run directory: begun whole, trained in by one process at a time, and adopted by its own launch alone."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from rich.console import Console

from mtp_ce.training.cli import train as cli
from mtp_ce.training.cli.train import run_to_resume
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.run import folder, pipeline
from mtp_ce.training.run.folder import LOCK_FILE, RUN_FILE, is_run, locked_run, restarted_run, start_run


def test_a_run_directory_is_there_with_all_its_files_or_not_at_all(small, tmp_path, monkeypatch):
    """Death between two of its files would leave a folder that is neither a run nor free."""

    def dies() -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder, "_new_record", dies)
        with pytest.raises(KeyboardInterrupt):
            start_run(tmp_path / "run", small())
    assert os.listdir(tmp_path) == []
    start_run(tmp_path / "run", small())
    assert is_run(tmp_path / "run")


def test_ids_of_runs_differ(small, tmp_path):
    for name in "ab":
        start_run(tmp_path / name, small())
    ids = {json.loads((tmp_path / name / RUN_FILE).read_text())["id"] for name in "ab"}
    assert len(ids) == 2


HOLDER = """
import sys, time
from pathlib import Path
from mtp_ce.training.run.folder import locked_run
with locked_run(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(100)
"""


def test_a_second_process_names_the_first_and_changes_nothing(small, tmp_path, capsys):
    """And one that was killed holds nobody up."""
    start_run(tmp_path / "run", small())
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        before = sorted(path.name for path in (tmp_path / "run").iterdir())
        assert cli.main(["--resume", str(tmp_path / "run")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"is being trained by process {holder.pid} on {socket.gethostname()}; wait for it, or stop it" in line
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
        holder.send_signal(signal.SIGKILL)
    with locked_run(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_FILE).read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_file_system_without_locks_is_named(small, tmp_path, monkeypatch, caplog):
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    start_run(tmp_path / "run", small())
    monkeypatch.setattr(folder.fcntl, "flock", unsupported)
    with locked_run(tmp_path / "run"):
        pass
    assert f"run {tmp_path / 'run'} is not locked (No locks available): start no second process in it" in caplog.text


def test_strays_of_dead_processes_are_removed_from_every_folder_of_a_run(small, tmp_path):
    start_run(tmp_path / "run", small())
    strays = [
        tmp_path / "run" / name for name in (".model.mtp_abcdefgh", "reference/checkpoints/.step-00000003.mtp_abcd_123")
    ]
    for stray in strays:
        stray.mkdir(parents=True)
        (stray / "half").write_text("x")
    with locked_run(tmp_path / "run"):
        pass
    assert not any(stray.exists() for stray in strays)


@pytest.fixture
def begin(small, tmp_path, monkeypatch):
    """Begin a run as a worker of a torchrun agent, on the first start."""

    def run(name: str, launch: str, agent: str | None = None) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
        with monkeypatch.context() as patch:
            if agent:
                ours = folder._launch()
                patch.setattr(folder, "_launch", lambda: ours | {"agent": agent, "agent_started": 1.0})
            start_run(tmp_path / "runs" / name, small())

    return run


def restart(monkeypatch, launch: str) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)


def test_a_restart_adopts_what_its_own_launch_began(begin, tmp_path, monkeypatch):
    """Without --rdzv-id the id of every launch is "none"."""
    begin("mine", "none")
    begin("another job's", "none", agent="1 on elsewhere")
    assert restarted_run(tmp_path / "runs") is None, "this is no restart"
    restart(monkeypatch, "none")
    assert restarted_run(tmp_path / "runs") == tmp_path / "runs" / "mine"
    assert run_to_resume(None, tmp_path / "runs" / "mine") == tmp_path / "runs" / "mine"
    assert run_to_resume(None, tmp_path / "runs" / "another job's") is None
    assert run_to_resume(None, tmp_path / "runs" / "new") is None


BEGIN = """
import sys
from pathlib import Path
from mtp_ce.training.config.recipe import load_recipe
from mtp_ce.training.run.folder import start_run
start_run(Path(sys.argv[1]), load_recipe("tiny"))
"""


def test_a_restarted_job_does_not_report_the_success_of_another(tmp_path, monkeypatch, capsys):
    """One of another agent, whose id is "none", too; both write below one folder."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    other = tmp_path / "runs" / "other"
    subprocess.run([sys.executable, "-c", BEGIN, str(other)], check=True)
    record = json.loads((other / RUN_FILE).read_text())
    (other / RUN_FILE).write_text(json.dumps({**record, "finished": "2026-11-29T00:00:00+00:00"}))
    restart(monkeypatch, "none")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tiny", "data.corpus=lost"]) == 2
    assert "data.corpus is 'lost'" in capsys.readouterr().err


def test_a_restart_after_which_another_node_leads_adopts_under_its_id(begin, tmp_path, monkeypatch):
    begin("of this job", "job-7", agent="1 on another-node")
    restart(monkeypatch, "job-7")
    assert restarted_run(tmp_path / "runs") == tmp_path / "runs" / "of this job"
    record = json.loads((tmp_path / "runs" / "of this job" / RUN_FILE).read_text())
    record["launch"]["began"] = folder._started(os.getppid()) - 60
    (tmp_path / "runs" / "of this job" / RUN_FILE).write_text(json.dumps(record))
    assert restarted_run(tmp_path / "runs") is None, "begun before this launch, under an id that is used again"


def test_a_process_knows_when_it_was_started():
    with subprocess.Popen(["sleep", "10"]) as process:
        assert folder._started(process.pid) == pytest.approx(time.time(), abs=5)
        process.kill()
    assert folder._started(2**22 + 1) is None


def test_a_run_whose_record_is_damaged_is_one_line(small, tmp_path):
    start_run(tmp_path / "run", small())
    for text in ("", "[]", "[" * 100_000, '{"finished": nul'):
        (tmp_path / "run" / RUN_FILE).write_text(text)
        with pytest.raises(RecipeError, match=r"has no readable run\.json"):
            folder.finished(tmp_path / "run")


def test_a_model_that_was_changed_is_refused_by_what_loads_it(small, tmp_path, capsys, monkeypatch):
    recipe = small(["train.steps=3", "validation.decoding.prompts=0"])
    pipeline.train(recipe, tmp_path / "run", Console(quiet=True))
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "run" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    from mtp_ce.training.cli import evaluate

    assert evaluate.main(["run", "--output", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.safetensors differs from what was written; fetch or train it again, or remove .mtp_files.json" in line


def test_what_could_not_be_deleted_at_its_time_is_gone_when_the_run_ends(tmp_path):
    """An old checkpoint that a device error kept."""
    with locked_run(tmp_path):
        (tmp_path / "checkpoints" / ".step-00000002.mtp_abcdefgh").mkdir(parents=True)
    assert [path.name for path in tmp_path.rglob(".*")] == []


def test_a_run_of_an_earlier_version_has_the_settings_that_it_trained_with(small):
    """Keys that came later decide nothing at the value that stands for what there was before."""
    before = folder.decided_by(small([]))
    assert not before.keys() & folder._ADDED.keys()
    assert folder.decided_by(small(["model.mtp.head_reduction=target"])) == {
        **before, "model.mtp.head_reduction": "target"
    }  # fmt: skip
