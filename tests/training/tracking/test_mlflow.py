"""MLflow: where a run goes, what it is called, and what a resumed run sends."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtp_ce.training.config.tracking import TrackingConfig
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.tracking.composite import Tracking, describe_tracking
from mtp_ce.training.tracking.mlflow import MlflowTracker


@pytest.fixture
def client(finished_run, monkeypatch):
    """A client of the session's database; nothing in the environment names another."""
    from mlflow import MlflowClient

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    # Artifacts go below the working directory.
    monkeypatch.chdir(Path(finished_run.database.removeprefix("sqlite:///")).parent)
    return MlflowClient(tracking_uri=finished_run.database)


@pytest.fixture
def runs(client):
    """Return the runs of an experiment by name, the oldest first of those with one name."""

    def find(experiment: str) -> dict[str, list]:
        found = client.get_experiment_by_name(experiment)
        named: dict[str, list] = {}
        for run in client.search_runs([found.experiment_id], order_by=["attributes.start_time"]):
            named.setdefault(run.info.run_name, []).append(run)
        return named

    return find


@pytest.fixture
def track(small, finished_run, tmp_path):
    """Record metrics in a run and its stage `main`, as one process; returns the warnings."""

    def record(experiment: str, *steps: int) -> list[str]:
        overrides = ["tracking.kind=mlflow", f"tracking.uri={finished_run.database}"]
        recipe = small([*overrides, f"tracking.experiment={experiment}"])
        warnings: list[str] = []
        with (
            Tracking(recipe, tmp_path, warnings.append, name="one") as whole,
            Tracking(recipe, tmp_path, warnings.append, whole, "main") as main,
        ):
            for step in steps:
                main.log(step, {"train/loss": step / 2, "optim/lr": 0.1})
            whole.summary(steps[-1], {"val/ce_mean": 1.5})
        return warnings

    return record


def test_a_resumed_run_sends_no_metric_that_mlflow_has(track, client, runs):
    """The first process sent steps after its last checkpoint, which the second one trains again."""
    assert track("again", 1, 2, 3) == []
    assert track("again", 2, 3, 4, 5) == []
    ((whole,), (main,)) = (runs("again")[name] for name in ("one", "one/main"))
    for name in ("train/loss", "optim/lr"):
        history = client.get_metric_history(main.info.run_id, name)
        assert [metric.step for metric in history] == [1, 2, 3, 4, 5], name
    assert [metric.step for metric in client.get_metric_history(whole.info.run_id, "val/ce_mean")] == [3, 5]


def test_a_run_that_was_deleted_begins_anew_with_its_stages_and_says_so(track, client, runs):
    track("deleted", 1, 2)
    (before,) = runs("deleted")["one"]
    client.delete_run(before.info.run_id)
    (warning,) = track("deleted", 2, 3)
    assert "does not have the run one any more: it was deleted, or this is another server" in warning
    assert "a new one begins, and metrics.jsonl has the earlier metrics" in warning
    found = runs("deleted")
    (whole,) = found["one"]
    assert whole.info.run_id != before.info.run_id
    _, main = found["one/main"]
    assert main.data.tags["mlflow.parentRunId"] == whole.info.run_id
    assert [metric.step for metric in client.get_metric_history(main.info.run_id, "train/loss")] == [2, 3]


def test_a_stage_that_was_deleted_begins_anew_below_its_run(track, client, runs):
    track("stage deleted", 1, 2)
    client.delete_run(runs("stage deleted")["one/main"][0].info.run_id)
    (warning,) = track("stage deleted", 2, 3)
    assert "does not have the run one/main any more" in warning
    found = runs("stage deleted")
    ((whole,), (main,)) = found["one"], found["one/main"]
    assert main.data.tags["mlflow.parentRunId"] == whole.info.run_id
    assert {run.info.status for run in (whole, main)} == {"FINISHED"}


def test_a_deleted_experiment_is_named_with_the_way_out(track, client, monkeypatch):
    monkeypatch.setattr("mtp_ce.training.tracking.mlflow.FIRST_PAUSE_S", 0.1)
    client.delete_experiment(client.create_experiment("gone"))
    first, last = track("gone", 1)
    assert "experiment 'gone' was deleted there; restore it, or give tracking.experiment=..." in first
    assert "did not take everything" in last


def test_the_environment_names_server_and_experiment_where_the_recipe_does_not(
    small, finished_run, client, runs, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", finished_run.database)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the environment")
    for overrides in ([], ["tracking.experiment=of the recipe"]):
        with Tracking(small(["tracking.kind=mlflow", *overrides]), tmp_path, pytest.fail, name="a"):
            pass
        (tmp_path / "mlflow.json").unlink()
    assert [*runs("of the environment")] == [*runs("of the recipe")] == ["a"]
    number = client.get_experiment_by_name("of the recipe").experiment_id
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", number)
    with Tracking(small(["tracking.kind=mlflow"]), tmp_path, pytest.fail, name="b"):
        pass
    assert {*runs("of the recipe")} == {"a", "b"}


# Address -> what the last line of a run says; None: no run was created there.
WHERE = {
    "http://127.0.0.1:5000": "http://127.0.0.1:5000",
    "https://me:s3cr3t@host/mlflow/": "https://host/mlflow",
    "https://host/?token=s3cr3t": "https://host",
    "sqlite:///mlflow.db": "mlflow ui --backend-store-uri sqlite:///mlflow.db",
    "sqlite:///my runs/mlflow.db": "mlflow ui --backend-store-uri 'sqlite:///my runs/mlflow.db'",
    "my/mlruns": "mlflow ui --backend-store-uri my/mlruns",
    "postgresql+psycopg2://host/runs": "mlflow ui --backend-store-uri postgresql+psycopg2://host/runs",
    "postgresql://me:s3cr3t@host/runs": "postgresql://***@host/runs",
    "databricks": "databricks",
    "databricks://profile": "databricks://profile",
}


@pytest.mark.parametrize("uri", WHERE)
def test_a_run_says_where_it_can_be_viewed(uri):
    assert MlflowTracker(TrackingConfig(uri=uri)).where() == WHERE[uri]


def test_the_command_for_an_address_of_the_environment_does_not_repeat_it(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:s3cr3t@host/runs")
    assert MlflowTracker(TrackingConfig()).where() == 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert MlflowTracker(TrackingConfig()).where() == "mlflow ui --backend-store-uri sqlite:///mlflow.db"


@pytest.mark.parametrize("key", ["tracking.uri", "MLFLOW_TRACKING_URI"])
def test_an_address_whose_password_can_not_be_told_apart_is_refused(key, monkeypatch):
    address = "https://me:12/s3cr3t@host/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    config = TrackingConfig(uri=address if key == "tracking.uri" else None)
    with pytest.raises(RecipeError, match=rf"^{key} has no host .* write %40 for @ and %2F for /") as raised:
        MlflowTracker(config)
    assert "s3cr3t" not in str(raised.value)
    assert MlflowTracker(TrackingConfig(uri=address.replace("/s3cr3t", "%2Fs3cr3t"))).where() == "https://host/x"


def test_a_dry_run_shows_no_secret_of_a_server_that_is_down(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cr3t@127.0.0.1:9/?token=t0ken")
    said = describe_tracking(TrackingConfig())
    assert said.startswith("MLflow at http://***@127.0.0.1:9/?*** is not reachable: [Errno")
    assert "s3cr3t" not in said
    assert "t0ken" not in said
