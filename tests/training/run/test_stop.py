"""How a run that does not reach its end leaves: Ctrl-C, and numbers that are not finite."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest
import torch

from mtp_ce.training.cli import train as cli
from mtp_ce.training.config.recipe import to_yaml
from mtp_ce.training.errors import StoppedError
from mtp_ce.training.interrupt import stop_on_signal, terminate_in_order
from mtp_ce.training.run import fitting
from mtp_ce.training.run.folder import finished


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_the_run_killed_with_its_code_and_all_that_was_done(
    number, code, word, small, start_train_mtp, finished_run, tmp_path
):
    """A real signal to a real process, while it trains."""
    recipe = small(
        [
            "train.steps=100000",
            "train.log_every=1",
            "validation.every=null",
            "tracking.kind=mlflow",
            f"tracking.uri={finished_run.database}",
            f"tracking.experiment={word}",
        ]
    )
    (tmp_path / "long.yaml").write_text(to_yaml(recipe))
    process = start_train_mtp(tmp_path, "long.yaml", "--output", "out")
    complained, metrics = tmp_path / "complained.txt", tmp_path / "out" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 600
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert process.is_alive(), complained.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, number)
        process.join(600)
    finally:
        process.kill()
    assert process.exitcode == code
    assert complained.read_text().splitlines() == [
        f"train-mtp: {word}; metrics so far are in out/metrics.jsonl; train-mtp --resume out resumes"
    ]
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 3

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=finished_run.database)
    experiment = client.get_experiment_by_name(word)
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["KILLED", "KILLED"], "the run and its stage"
    assert {run.data.tags["stop.reason"] for run in runs} == {number.name}
    (run,) = [run for run in runs if run.info.run_name == "out/main"]
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == len(steps)
    (newest,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert newest.name == f"step-{steps[-1]:08d}"


@pytest.fixture
def poisoned(monkeypatch):
    """Every model is built with one NaN in its final norm."""
    build = fitting.build_model

    def build_poisoned(*arguments, **options):
        model = build(*arguments, **options)
        with torch.no_grad():
            model.causal.model.norm.weight[0] = float("nan")
        return model

    monkeypatch.setattr(fitting, "build_model", build_poisoned)


def test_a_loss_that_is_not_finite_ends_the_run_failed_with_3(
    small, finished_run, poisoned, tmp_path, capsys, monkeypatch
):
    recipe = small(
        [
            "tracking.kind=mlflow",
            f"tracking.uri={finished_run.database}",
            "tracking.experiment=poisoned",
        ]
    )
    (tmp_path / "small.yaml").write_text(to_yaml(recipe))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["small.yaml", "--output", "out"]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "train/loss is nan at step 1, expected a finite number; the step was not taken" in error
    assert not (tmp_path / "out" / "model").exists()

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=finished_run.database)
    runs = client.search_runs([client.get_experiment_by_name("poisoned").experiment_id])
    assert len(runs) == 2, "the run and its stage"
    for run in runs:
        assert run.info.status == "FAILED"
        assert {name: run.data.tags[f"stop.{name}"] for name in ("step", "quantity", "value")} == {
            "step": "1",
            "quantity": "train/loss",
            "value": "nan",
        }


def test_a_learning_rate_that_explodes_in_the_only_step_saves_no_model(small, tmp_path, capsys, monkeypatch):
    """No step follows whose loss would show it."""
    (tmp_path / "small.yaml").write_text(to_yaml(small(["train.steps=1", "optimizer.warmup_steps=0"])))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["small.yaml", "optimizer.lr=3e38", "--output", "out"]) == 3
    (error,) = capsys.readouterr().err.splitlines()
    assert re.match(
        r"train-mtp: error: model\.\S+ is (nan|-?inf) after step 1, expected a finite number; nothing", error
    )
    assert error.endswith("A lower learning rate or a longer warm-up usually helps")
    assert not (tmp_path / "out" / "model").exists()
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert finished(tmp_path / "out") is None


def test_the_first_ctrl_c_asks_and_the_second_insists():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop_on_signal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.is_set()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def usual_sigterm():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def test_more_of_sigterm_says_nothing_new_until_all_has_ended(usual_sigterm):
    """A scheduler sends it to torchrun and to its workers, and torchrun sends its own to the workers."""
    with terminate_in_order():
        with stop_on_signal() as stop:
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
            assert stop.signal == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with terminate_in_order():
        with pytest.raises(StoppedError):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_to_a_run_that_fails_already_changes_nothing(usual_sigterm):
    """torchrun sends it to the ranks that are left when one has failed."""

    def fail():
        with stop_on_signal():
            raise RuntimeError("another rank is gone")

    with terminate_in_order():
        with pytest.raises(RuntimeError, match="another rank is gone"):
            fail()
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_in_the_last_step_of_a_loop_ends_the_next_one_before_its_first(usual_sigterm):
    with terminate_in_order():
        with stop_on_signal():
            signal.raise_signal(signal.SIGTERM)
        with stop_on_signal() as stop:
            assert stop.signal == signal.SIGTERM
    with stop_on_signal() as stop:
        assert not stop.is_set()


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.is_set()
    finally:
        signal.signal(signal.SIGINT, before)
