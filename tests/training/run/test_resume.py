"""A resumed run equals an uninterrupted one: the same parameters to the last bit, the same metrics."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mtp_ce.training.cli import train as cli
from mtp_ce.training.config.recipe import to_yaml
from mtp_ce.training.errors import RecipeError, StepRefusedError, StoppedError
from mtp_ce.training.loop import checkpoint
from mtp_ce.training.run import fitting, pipeline
from mtp_ce.training.run.folder import decided_by
from mtp_ce.training.storage import folders as storage

FULL_DISK = """
import subprocess
from mtp_ce.training.cli.train import main

def shell(command):
    subprocess.run(command.split(), check=True)

shell("mount -t tmpfs -o size=760k tmpfs disk")
print("code", main(["recipe.yaml", "--output", "disk/run"]), flush=True)
shell("mount -o remount,size=9m disk")
print("code", main(["--resume", "disk/run"]), flush=True)
shell("cp -r disk/run copy")
"""

SHORT = ["train.steps=12", "train.log_every=1", "validation.every=5", "validation.decoding.prompts=0"]
SHORT += ["checkpoint.every=3", "validation.at_start=true", "validation.rows=8"]


def quiet(recipe, output, **options):
    return pipeline.train(recipe, output, Console(quiet=True), **options)


def parameters(output: Path) -> dict[str, bytes]:
    """Every parameter of a run's model, bit by bit."""
    files = [load_file(output / "model" / f"{name}.safetensors") for name in ("model", "mtp_heads")]
    return {name: tensor.numpy().tobytes() for tensors in files for name, tensor in tensors.items()}


def record(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time" and "perf" not in k} for line in lines]


@pytest.fixture
def stop_at(monkeypatch):
    """Stop the loop by SIGTERM during a certain step; 0 does not stop it."""
    at = {"step": 0}

    class Stopping(fitting.Trainer):
        def _step(self, step, window):
            if step == at["step"]:
                self.stop.set(signal.SIGTERM)
            super()._step(step, window)

    monkeypatch.setattr(fitting, "Trainer", Stopping)
    return at


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["model.mtp={kind: sequential, shared: true}", "model.tie_embeddings=true", "train.micro_batch_size=4"],
        ["model.mtp.kind=layer", "model.mtp.trunk=detached"],
    ],
    ids=["residual", "one module, tied", "detached"],
)
def test_a_stopped_run_goes_on_to_the_same_bits(options, small, stop_at, tmp_path):
    recipe = small([*SHORT, *options])
    quiet(recipe, tmp_path / "undisturbed")
    for step in (2, 5, 8):
        stop_at["step"] = step
        with pytest.raises(StoppedError):
            quiet(recipe, tmp_path / "stopped", resume=step > 2)
    stop_at["step"] = 0
    quiet(recipe, tmp_path / "stopped", resume=True)
    assert parameters(tmp_path / "stopped") == parameters(tmp_path / "undisturbed")
    assert record(tmp_path / "stopped") == record(tmp_path / "undisturbed")
    ours, theirs = (json.loads((tmp_path / run / "evaluation.json").read_text()) for run in ("stopped", "undisturbed"))
    assert ours == theirs
    assert ours["before"], "what was found before the first step has come through"


def test_a_checkpoint_says_which_form_its_heads_have(small):
    """Those of another form have tensors of the same names and shapes; a checkpoint with other settings is refused."""
    assert decided_by(small(["model.mtp.kind=sequential"]))["heads.format"] == 2
    assert "heads.format" not in decided_by(small(SHORT))


def test_the_reference_of_a_stopped_run_goes_on_too(rho1, stop_at, tmp_path, monkeypatch):
    recipe = rho1(["checkpoint.every=2", "reference.train.log_every=1", "validation.decoding.prompts=0"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    quiet(recipe, tmp_path / "undisturbed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    for step in (5, 4):  # of the reference, which resumes, and then of the model itself
        stop_at["step"] = step
        with pytest.raises(StoppedError):
            quiet(recipe, tmp_path / "stopped", resume=step == 4)
    stop_at["step"] = 0
    quiet(recipe, tmp_path / "stopped", resume=True)
    assert parameters(tmp_path / "stopped") == parameters(tmp_path / "undisturbed")
    for stage in (".", "reference"):
        assert record(tmp_path / "stopped" / stage) == record(tmp_path / "undisturbed" / stage)


@pytest.fixture
def stopped(small, stop_at, tmp_path):
    """A run that was stopped in step 8, with checkpoints of steps 6 and 8."""
    recipe = small(SHORT)
    stop_at["step"] = 8
    with pytest.raises(StoppedError):
        quiet(recipe, tmp_path / "run")
    stop_at["step"] = 0
    return recipe, tmp_path / "run"


def test_only_the_newest_checkpoints_are_kept_and_hold_no_pickle(stopped):
    _, run = stopped
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    kinds = {path.suffix for path in (run / "checkpoints").rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json"}


def spoil(folder: Path, how: str) -> None:
    (tensors,) = folder.glob("*.safetensors")
    match how:
        case "a flipped bit":
            content = bytearray(tensors.read_bytes())
            content[-5] ^= 1
            tensors.write_bytes(content)
        case "cut short":
            tensors.write_bytes(tensors.read_bytes()[:-100])
        case "a missing file":
            tensors.unlink()
        case "no state":
            (folder / checkpoint.STATE_FILE).unlink()
        case "half a state":
            state = folder / checkpoint.STATE_FILE
            state.write_text(state.read_text()[:200])
        case "another state":
            state = folder / checkpoint.STATE_FILE
            state.write_text(state.read_text().replace('"last_epoch": 8', '"last_epoch": 3'))
        case "one file more":
            (folder / "more.safetensors").write_bytes(tensors.read_bytes())


SPOILT = {
    "a flipped bit": "is damaged",
    "cut short": "is damaged",
    "a missing file": "is missing",
    "no state": "has no readable state.json",
    "half a state": "has no readable state.json",
    "another state": "is damaged: state.json differs from what was written",
    "one file more": "is damaged: more.safetensors does not belong to it",
}


@pytest.mark.parametrize(("how", "said"), SPOILT.items())
def test_a_checkpoint_that_can_not_be_trusted_is_named_and_the_one_before_is_used(how, said, stopped, capsys):
    recipe, run = stopped
    spoil(run / "checkpoints" / "step-00000008", how)
    pipeline.train(recipe, run, Console(width=1000), resume=True)
    out = capsys.readouterr().out
    assert f"checkpoint {run}/checkpoints/step-00000008 " in out
    assert said in out
    assert f"resumed     after step 6, from {run}/checkpoints/step-00000006" in out


def plant_nan(folder: Path, name: str) -> None:
    """A value that is no number in a tensor of a checkpoint, as versions that did not look could write it."""
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = math.nan
    save_file(tensors, file, metadata)
    state = json.loads((folder / checkpoint.STATE_FILE).read_text())
    state["files"] = checkpoint._digests(folder)
    del state["sha256"]
    (folder / checkpoint.STATE_FILE).write_text(json.dumps(state | {"sha256": checkpoint._digest(state)}))


NOT_FINITE = ["model.model.model.norm.weight", "optimizer.model.lm_head.weight.exp_avg_sq"]


@pytest.mark.parametrize("name", NOT_FINITE)
def test_a_checkpoint_that_is_not_finite_is_named_and_the_one_before_is_used(name, stopped, capsys):
    recipe, run = stopped
    plant_nan(run / "checkpoints" / "step-00000008", name)
    named = name.partition(".")[2]
    pipeline.train(recipe, run, Console(width=1000), resume=True)
    out = capsys.readouterr().out
    assert (
        f"warning: checkpoint {run}/checkpoints/step-00000008 can't be continued: {named} is nan after step 8, "
        "expected a finite number; using an older one\n"
    ) in out
    assert f"resumed     after step 6, from {run}/checkpoints/step-00000006" in out
    assert [line["step"] for line in record(run) if "train/loss" in line] == list(range(1, 13))


def test_where_no_checkpoint_is_finite_the_run_ends_refused_and_all_of_them_stay(stopped, capsys, monkeypatch):
    _, run = stopped
    for folder in (run / "checkpoints").iterdir():
        plant_nan(folder, NOT_FINITE[0])
    monkeypatch.chdir(run.parent)
    assert cli.main(["--resume", "run"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"train-mtp: error: {NOT_FINITE[0].partition('.')[2]} is nan after step 6, expected a finite number; nothing"
    )
    assert not (run / "model").exists()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]


def test_a_refused_first_step_of_a_resumed_run_is_taken_from_the_checkpoint_before(stopped, small, monkeypatch, capsys):
    """Refused once: the second time the run comes to that step its numbers are in order."""
    recipe, run = stopped
    refused = []

    class Refusing(fitting.Trainer):
        def _step(self, step, window):
            if step == 9 and not refused:
                refused.append(self.done)
                raise StepRefusedError(step, "train/loss", math.nan)
            super()._step(step, window)

    monkeypatch.setattr(fitting, "Trainer", Refusing)
    pipeline.train(recipe, run, Console(width=1000), resume=True)
    out = capsys.readouterr().out
    assert (
        "step-00000008 can't be continued: train/loss is nan at step 9, expected a finite number; using an older" in out
    )
    assert f"resumed     after step 6, from {run}/checkpoints/step-00000006" in out
    quiet(recipe, run.parent / "undisturbed")
    assert parameters(run) == parameters(run.parent / "undisturbed")
    assert record(run) == record(run.parent / "undisturbed")


def test_a_later_refused_step_ends_the_run(stopped, monkeypatch):
    recipe, run = stopped

    class Refusing(fitting.Trainer):
        def _step(self, step, window):
            if step == 10:
                raise StepRefusedError(step, "train/loss", math.nan)
            super()._step(step, window)

    monkeypatch.setattr(fitting, "Trainer", Refusing)
    with pytest.raises(StepRefusedError, match="at step 10"):
        quiet(recipe, run, resume=True)


@pytest.mark.parametrize("how", ["a flipped bit", "not finite"])
def test_a_refused_checkpoint_takes_no_place_from_those_that_can_be_used(how, stopped, small, stop_at):
    """One is kept, and the refused one is of a later step than the next."""
    _, run = stopped
    newest = run / "checkpoints" / "step-00000008"
    if how == "not finite":
        plant_nan(newest, NOT_FINITE[0])
    else:
        spoil(newest, how)
    recipe = small([*SHORT, "checkpoint.keep=1"])
    stop_at["step"] = 7
    with pytest.raises(StoppedError):
        quiet(recipe, run, resume=True)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000007", "step-00000008"]
    stop_at["step"] = 0
    quiet(recipe, run, resume=True)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000012"]


def test_a_checkpoint_of_another_run_is_named_and_left_alone(stopped, small, stop_at, tmp_path, capsys):
    recipe, run = stopped
    stop_at["step"] = 9
    with pytest.raises(StoppedError):
        quiet(small([*SHORT, "optimizer.lr=0.5"]), tmp_path / "other")
    stop_at["step"] = 0
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step-00000009", run / "checkpoints" / "step-00000009")
    pipeline.train(recipe, run, Console(width=1000), resume=True)
    out = capsys.readouterr().out
    assert "step-00000009 belongs to another run: optimizer.lr 0.5 instead of 0.01; using an older one" in out
    assert f"resumed     after step 8, from {run}/checkpoints/step-00000008" in out


def test_a_run_without_a_checkpoint_that_can_be_used_is_not_begun_again_in_silence(stopped):
    recipe, run = stopped
    for folder in (run / "checkpoints").iterdir():
        spoil(folder, "a flipped bit")
    with pytest.raises(
        RecipeError, match=r"step-00000008 is damaged.*no other checkpoint in .*checkpoints can be used"
    ):
        quiet(recipe, run, resume=True)


RESUMED = {
    "another recipe": (
        ["--resume", "auto", "--output", "run", "recipe.yaml", "optimizer.lr=0.5"],
        "optimizer.lr is 0.5",
    ),
    "a recipe's name": (["--resume", "run", "tiny"], "uses the run's own recipe; leave out 'tiny'"),
    "no run": (["--resume", "elsewhere"], "elsewhere is not a run directory"),
    "auto without a folder": (["--resume", "auto"], "--resume auto needs --output DIR"),
    "two folders": (["--resume", "run", "--output", "other"], "leave out --output other"),
    "a comparison": (["compare", "--resume", "run"], "--resume belongs to a run"),
}


@pytest.mark.parametrize(("arguments", "said"), RESUMED.values(), ids=RESUMED)
def test_a_wrong_resume_is_one_line_and_changes_nothing(arguments, said, stopped, capsys, monkeypatch):
    recipe, run = stopped
    monkeypatch.chdir(run.parent)
    (run.parent / "recipe.yaml").write_text(to_yaml(recipe))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_run_goes_on_from_its_folder_alone_and_only_once(stopped, capsys, monkeypatch):
    _, run = stopped
    monkeypatch.chdir(run.parent)
    assert cli.main(["--resume", "run", "train.micro_batch_size=4"]) == 0
    assert "resumed     after step 8, from run/checkpoints/step-00000008" in capsys.readouterr().out
    assert cli.main(["--resume", "run"]) == 0
    assert capsys.readouterr().out.startswith("run run finished 20")


def test_what_is_left_of_a_write_that_was_killed_is_no_checkpoint(stopped, small):
    recipe, run = stopped
    newest = run / "checkpoints" / "step-00000008"
    newest.rename(newest.with_name(".step-00000008"))
    (newest.with_name(".step-00000008") / checkpoint.STATE_FILE).unlink()
    quiet(recipe, run, resume=True)
    assert [line["step"] for line in record(run) if "train/loss" in line] == list(range(1, 13))


def test_a_full_disk_costs_checkpoints_and_a_model_that_can_be_saved_later(small, tmp_path):
    """A real file system of 760 kB, which holds the record and one checkpoint; then it grows, and the run resumes."""
    recipe = small(SHORT)
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    (tmp_path / "disk").mkdir()
    shell = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", FULL_DISK]
    done = subprocess.run(
        shell, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False
    )
    first, second, _ = done.stdout.split("code ")
    assert "the checkpoint of step 6 could not be written (No space left on device)" in first
    assert first.splitlines()[-1].startswith("train-mtp: error: No space left on device"), first
    assert "train-mtp --resume disk/run resumes" in first
    assert second.startswith("1\n"), first
    assert "resumed     after step 3, from disk/run/checkpoints/step-00000003" in second
    assert done.stdout.endswith("code 0\n")
    quiet(recipe, tmp_path / "undisturbed")
    assert parameters(tmp_path / "copy") == parameters(tmp_path / "undisturbed")
    assert record(tmp_path / "copy") == record(tmp_path / "undisturbed")


def test_a_resumed_run_goes_on_in_its_mlflow_run(small, stop_at, finished_run, tmp_path):
    tracked = ["tracking.kind=mlflow", f"tracking.uri={finished_run.database}", "tracking.experiment=resumed"]
    recipe = small([*SHORT, *tracked])
    stop_at["step"] = 8
    with pytest.raises(StoppedError):
        quiet(recipe, tmp_path / "run")
    client = MlflowClient(tracking_uri=finished_run.database)
    experiment = client.get_experiment_by_name("resumed").experiment_id
    stopped = {run.info.run_id: run.info.status for run in client.search_runs([experiment])}
    assert list(stopped.values()) == ["KILLED", "KILLED"]
    stop_at["step"] = 0
    quiet(recipe, tmp_path / "run", resume=True)
    finished = {run.info.run_id: run.info for run in client.search_runs([experiment])}
    assert finished.keys() == stopped.keys()
    assert {info.status for info in finished.values()} == {"FINISHED"}
    (main,) = [run_id for run_id, info in finished.items() if info.run_name == "run/main"]
    losses = client.get_metric_history(main, "train/loss")
    assert [loss.step for loss in losses] == list(range(1, 13))


def test_a_run_goes_on_from_s3_where_its_machine_is_lost(small, stop_at, s3, prefix, tmp_path, monkeypatch, capsys):
    recipe = small([*SHORT, f"checkpoint.upload=s3://models/{prefix}"])
    quiet(recipe, tmp_path / "undisturbed")
    stop_at["step"] = 8
    with pytest.raises(StoppedError):
        quiet(recipe, tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    stop_at["step"] = 0
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--resume", f"s3://models/{prefix}/run", "--output", "elsewhere"]) == 0
    assert "resumed     after step 8, from elsewhere/checkpoints/step-00000008" in capsys.readouterr().out
    assert parameters(tmp_path / "elsewhere") == parameters(tmp_path / "undisturbed")
    for run in ("undisturbed", "elsewhere"):
        there = storage.fetch_folder("model.source", f"s3://models/{prefix}/{run}/model")
        assert (there / "model.safetensors").read_bytes() == (tmp_path / run / "model/model.safetensors").read_bytes()
    assert cli.main(["--resume", f"s3://models/{prefix}/run", "--output", "elsewhere"]) == 2
    assert "output folder elsewhere exists already" in capsys.readouterr().err
    assert cli.main(["--resume", f"s3://models/{prefix}/other", "--output", "new"]) == 2
    assert f"s3://models/{prefix}/other has no complete checkpoint" in capsys.readouterr().err


def run_command(start_train_mtp, where: Path, kill_at: int | None = None) -> str:
    """Run the recipe to its end, or kill it when it has so many lines of metrics; return what it printed."""
    metrics = where / "out" / "metrics.jsonl"
    run = start_train_mtp(where, "recipe.yaml", "--output", "out", "--resume", "auto")
    try:
        deadline = time.monotonic() + 300
        while run.is_alive() and (kill_at is None or not metrics.exists() or metrics.read_text().count("\n") < kill_at):
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        run.kill()
        run.join()
    printed = (where / "printed.txt").read_text()
    complained = (where / "complained.txt").read_text()
    assert run.exitcode == (0 if kill_at is None else -signal.SIGKILL), printed + complained
    return printed


def kill_and_compare(small, start_train_mtp, folder: Path, kills: int) -> None:
    """Kill a run again and again at random steps, and compare it with one that nobody touched."""
    draw = random.Random(kills)
    # Every process gets a few steps further than the one before, whose steps since its last checkpoint are lost.
    reached = list(accumulate(draw.randint(3, 9) for _ in range(kills)))
    steps = [f"train.steps={reached[-1] + 10}", "train.log_every=1", "checkpoint.every=3", "validation.every=null"]
    recipe = small(steps)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    quiet(recipe, folder / "undisturbed")
    for lines in reached:
        run_command(start_train_mtp, folder, kill_at=lines)
    assert "resumed     after step" in run_command(start_train_mtp, folder)
    assert parameters(folder / "out") == parameters(folder / "undisturbed")
    assert record(folder / "out") == record(folder / "undisturbed")


def test_a_run_that_is_killed_twice_ends_with_the_same_bits(small, start_train_mtp, tmp_path):
    kill_and_compare(small, start_train_mtp, tmp_path, kills=2)


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_with_the_same_bits(small, start_train_mtp, tmp_path):
    kill_and_compare(small, start_train_mtp, tmp_path, kills=20)
