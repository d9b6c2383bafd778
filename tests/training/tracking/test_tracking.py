"""Tracking: what is recorded, under which names and status, and that no server can hold training up."""

from __future__ import annotations

import json
import math
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from mtp_ce.training.cli import train as cli
from mtp_ce.training.config.recipe import to_yaml
from mtp_ce.training.errors import StepRefusedError
from mtp_ce.training.tracking import mlflow as module
from mtp_ce.training.tracking.composite import Tracking
from mtp_ce.training.tracking.jsonl import METRICS_FILE, MetricsFile


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def mlflow_runs(finished_run, small, tmp_path, monkeypatch):
    """A recipe that tracks into the session's database (making one takes seconds), and a way to read it."""
    from mlflow import MlflowClient

    monkeypatch.chdir(Path(finished_run.database.removeprefix("sqlite:///")).parent)
    client = MlflowClient(tracking_uri=finished_run.database)

    def newest(experiment: str):
        found = client.get_experiment_by_name(experiment)
        return client.search_runs([found.experiment_id], order_by=["attributes.start_time DESC"])[0]

    def recipe(experiment: str):
        return small(
            [
                "tracking.kind=mlflow",
                f"tracking.uri={finished_run.database}",
                f"tracking.experiment={experiment}",
            ]
        )

    return recipe, newest


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_a_run_that_was_not_finite_ends_failed_and_says_why_and_where(mlflow_runs, tmp_path, warnings):
    recipe, newest = mlflow_runs
    tracking = Tracking(recipe("failed"), tmp_path, warnings.append)
    tracking.log(1, {"train/loss": 2.0})
    with pytest.raises(StepRefusedError), tracking:
        raise StepRefusedError(7, "optim/grad_norm", math.nan)
    run = newest("failed")
    assert run.info.status == "FAILED"
    assert run.data.tags["stop.step"] == "7"
    assert run.data.tags["stop.quantity"] == "optim/grad_norm"
    assert run.data.tags["stop.value"] == "nan"
    assert "step was not taken" in run.data.tags["stop.reason"]
    assert run.data.metrics == {"train/loss": 2.0}
    assert warnings == []


def test_an_interrupted_run_ends_killed(mlflow_runs, tmp_path, warnings):
    recipe, newest = mlflow_runs
    with pytest.raises(KeyboardInterrupt), Tracking(recipe("killed"), tmp_path, warnings.append):
        raise KeyboardInterrupt
    assert newest("killed").info.status == "KILLED"
    assert warnings == []


def test_a_crash_ends_failed_with_its_message(mlflow_runs, tmp_path, warnings):
    recipe, newest = mlflow_runs
    with pytest.raises(OSError, match="disk full"), Tracking(recipe("crashed"), tmp_path, warnings.append):
        raise OSError("disk full")
    run = newest("crashed")
    assert run.info.status == "FAILED"
    assert run.data.tags["stop.reason"] == "OSError: disk full"


def test_a_call_that_the_server_refuses_loses_only_itself(mlflow_runs, tmp_path, warnings):
    recipe, newest = mlflow_runs
    with Tracking(recipe("refused"), tmp_path, warnings.append) as tracking:
        tracking.log(1, {"a name with % that mlflow refuses!": 1.0})
        tracking.artifact(tmp_path / "missing.png")
        tracking.log(2, {"train/loss": 2.0})
    run = newest("refused")
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"train/loss": 2.0}
    assert len(warnings) == 2
    assert len(lines(tmp_path)) == 2


def test_the_metrics_file_is_json_even_where_a_number_is_not(small, tmp_path, warnings):
    with Tracking(small(), tmp_path, warnings.append) as tracking:
        tracking.log(3, {"train/loss": math.nan, "optim/grad_norm": math.inf, "optim/lr": 0.5})
    (line,) = lines(tmp_path)
    assert line.pop("time") == pytest.approx(time.time(), abs=60)
    assert line == {"step": 3, "train/loss": None, "optim/grad_norm": None, "optim/lr": 0.5}


def test_every_line_is_in_the_file_before_the_next_step(small, tmp_path, warnings):
    """A process that is killed outright keeps what it logged."""
    with Tracking(small(), tmp_path, warnings.append) as tracking:
        tracking.log(1, {"train/loss": 1.0})
        assert [line["step"] for line in lines(tmp_path)] == [1]


def test_a_dead_server_costs_one_warning_and_no_time(small, tmp_path, warnings):
    recipe = small(["tracking.kind=mlflow", "tracking.uri=http://127.0.0.1:9"])
    import mlflow  # noqa: F401  the import is slow and not what is timed

    started = time.monotonic()
    with Tracking(recipe, tmp_path, warnings.append) as tracking:
        logging = time.monotonic()
        for step in range(100):
            tracking.log(step, {"train/loss": 1.0})
        assert time.monotonic() - logging < module.FIRST_PAUSE_S, "logging never waits"
    assert time.monotonic() - started < module.CLOSE_S
    assert len(lines(tmp_path)) == 100
    assert sum("training continues" in warning for warning in warnings) == 1
    assert sum("did not take everything" in warning for warning in warnings) == 1
    assert len(warnings) == 2
    assert all("\n" not in warning for warning in warnings)


def test_a_password_in_the_uri_is_not_shown(small, tmp_path, warnings):
    recipe = small(["tracking.kind=mlflow", "tracking.uri=http://me:s3cr3t@127.0.0.1:9/?token=t0ken"])
    with Tracking(recipe, tmp_path, warnings.append):
        pass
    assert warnings[0].startswith("MLflow at http://***@127.0.0.1:9/?*** fails (MlflowException); training continues")
    assert not any(secret in "".join(warnings) for secret in ("s3cr3t", "t0ken"))


def test_a_server_that_hangs_holds_nobody_up(small, tmp_path, warnings, monkeypatch):
    """It accepts the connection and never answers: only the end of the run waits, and not for long."""
    at_most = module.CLOSE_S
    monkeypatch.setattr(module, "CLOSE_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        recipe = small(["tracking.kind=mlflow", f"tracking.uri=http://127.0.0.1:{server.getsockname()[1]}"])
        started = time.monotonic()
        with Tracking(recipe, tmp_path, warnings.append) as tracking:
            tracking.log(1, {"train/loss": 1.0})
        assert time.monotonic() - started < at_most
    assert any("did not take everything" in warning for warning in warnings)


class _Flaky(BaseHTTPRequestHandler):
    """The few MLflow calls that a run makes; answers 503 until it is told to work."""

    up: ClassVar = threading.Event()
    metrics: ClassVar[list[dict]] = []
    sent: ClassVar[list[str]] = []

    def _answer(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.sent.append(f"{self.path} {text}")
        body = json.loads(text or "{}")
        if not self.up.is_set():
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.metrics.extend(body.get("metrics", []))
        info = {"run_id": "r", "run_uuid": "r", "experiment_id": "1", "status": "RUNNING", "start_time": 1}
        answer = {
            "experiment": {"experiment_id": "1", "name": "mtp_ce", "lifecycle_stage": "active"},
            "run": {"info": {**info, "lifecycle_stage": "active", "artifact_uri": "x"}, "data": {}},
            "run_info": info,
        }
        payload = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_GET = do_POST = _answer

    def log_message(self, *_) -> None:
        pass


def test_a_server_that_comes_back_gets_every_metric_once_and_in_order(small, tmp_path, warnings, monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = HTTPServer(("127.0.0.1", 0), _Flaky)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    recipe = small(["tracking.kind=mlflow", f"tracking.uri=http://127.0.0.1:{server.server_port}"])
    try:
        with Tracking(recipe, tmp_path, warnings.append) as tracking:
            for step in range(5):
                tracking.log(step, {"train/loss": float(step)})
            deadline = time.monotonic() + 30
            while not warnings and time.monotonic() < deadline:
                time.sleep(0.05)
            _Flaky.up.set()
    finally:
        server.shutdown()
    assert [metric["step"] for metric in _Flaky.metrics if metric["key"] == "train/loss"] == list(range(5))
    assert len(warnings) == 1
    assert "training continues" in warnings[0]


@pytest.mark.parametrize("lines_before", [2, 5], ids=["in the middle", "at the end"])
def test_a_server_that_goes_away_costs_what_it_did_not_take_and_says_so(
    lines_before, small, tmp_path, warnings, monkeypatch
):
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr(module, "CLOSE_S", 2.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    _Flaky.up.set()
    _Flaky.metrics.clear()
    server = HTTPServer(("127.0.0.1", 0), _Flaky)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    recipe = small(["tracking.kind=mlflow", f"tracking.uri=http://127.0.0.1:{server.server_port}"])
    with Tracking(recipe, tmp_path, warnings.append) as tracking:
        for step in range(lines_before):
            tracking.log(step, {"train/loss": float(step)})
        deadline = time.monotonic() + 30
        while len(_Flaky.metrics) < lines_before and time.monotonic() < deadline:
            time.sleep(0.05)
        server.shutdown()
        server.server_close()
        for step in range(lines_before, 5):
            tracking.log(step, {"train/loss": float(step)})
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(5))
    assert [metric["step"] for metric in _Flaky.metrics] == list(range(lines_before))
    assert "training continues" in warnings[0]
    assert "did not take everything; metrics.jsonl has all metrics" in warnings[-1]


def test_a_metrics_file_that_can_not_be_written_is_one_warning(small, tmp_path, warnings):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with Tracking(small(), tmp_path, warnings.append) as tracking:
        for step in range(3):
            tracking.log(step, {"train/loss": 1.0})
    assert len(warnings) == 1
    assert "metrics.jsonl can't be written from step 0 on" in warnings[0]


def test_tracking_none_works_without_mlflow(small, tmp_path, monkeypatch):
    """The whole command, where mlflow can't be imported."""
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(
        to_yaml(small(["train.steps=3", "train.log_every=1", "validation.every=null"]))
    )
    assert cli.main(["small.yaml", "--output", "out"]) == 0
    assert [line["step"] for line in lines(tmp_path / "out")][:3] == [1, 2, 3]
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "small.yaml"]


def test_no_output_of_a_run_has_the_secrets_of_its_tracker(small, tmp_path, monkeypatch, capsys):
    """On screen, in files, checkpoints included, and in what MLflow receives."""
    monkeypatch.chdir(tmp_path)
    _Flaky.up.set()
    _Flaky.sent.clear()
    server = HTTPServer(("127.0.0.1", 0), _Flaky)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://t0ken:s3cr3t@127.0.0.1:{server.server_port}"
    short = [
        "train.steps=2",
        "optimizer.warmup_steps=1",
        "train.log_every=1",
        "validation.every=null",
        "checkpoint.every=1",
    ]
    (tmp_path / "plain.yaml").write_text(to_yaml(small(short)))
    try:
        words = ["plain.yaml", "tracking.kind=mlflow", f"tracking.uri={uri}", "validation.decoding.prompts=0"]
        assert cli.main([*words, "--output", "out"]) == 0
    finally:
        server.shutdown()
        server.server_close()
    said, complained = capsys.readouterr()
    shown = uri.replace("t0ken:s3cr3t", "***")
    assert f"uri: {shown}\n" in (tmp_path / "out" / "recipe.yaml").read_text()
    assert any(shown in text and "tracking.uri" in text for text in _Flaky.sent), "the parameters have the address"
    # The last line of a run on a server is the address of its page.
    assert said.splitlines()[-1] == f"tracking    {shown.replace('***@', '')}/#/experiments/1/runs/r"
    texts = [said, complained, *_Flaky.sent]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "state.json"} <= {path.name for path in files}
    for text in [*texts, *(path.read_bytes().decode("latin-1") for path in files)]:
        assert "s3cr3t" not in text
        assert "t0ken" not in text


def test_a_resumed_metrics_file_whose_lines_have_changed_is_named(warnings, tmp_path):
    """Bit by bit as it was, cut to the checkpoint; or with a warning, as nothing can make the lines again."""
    file = MetricsFile(tmp_path, warnings.append)
    file.log(1, {"train/loss": 5.0})
    recorded = file.recorded()
    file.log(2, {"train/loss": 4.0})
    file.close()
    path = tmp_path / METRICS_FILE
    MetricsFile(tmp_path, warnings.append).rewind(*recorded)
    assert warnings == []
    path.write_text(path.read_text().replace("5.0", "4.0"))
    resumed = MetricsFile(tmp_path, warnings.append)
    resumed.rewind(*recorded)
    assert [f"{path} is damaged" in line for line in warnings] == [True]
    resumed.log(2, {"train/loss": 3.0})
    assert [json.loads(line)["train/loss"] for line in path.read_text().splitlines()] == [4.0, 3.0]
