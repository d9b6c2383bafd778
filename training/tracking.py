"""Where the numbers of a run go: always to metrics.jsonl, and to MLflow where the recipe asks for it.

    with Tracking(recipe, folder, warn) as tracking:
        tracking.log(step, {"train/loss": 4.2})

Leaving the block ends the MLflow run: FINISHED, KILLED on Ctrl-C, FAILED on any other exception, with tags
that say why. Training never waits for MLflow and never fails with it: a thread of its own connects and sends,
a server that does not answer is asked again later, and what it never took is in metrics.jsonl all the same.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mtp_ce.training.recipe import flatten, without_password
from mtp_ce.training.schema import Recipe

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRICS_FILE = "metrics.jsonl"

# A server that does not answer is asked again after the first pause, then after twice that, and so on.
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0

# How long the end of a run waits for MLflow to take what is left.
CLOSE_S = 30.0

_MLFLOW_ENVIRONMENT = {
    # Training sends nothing about its user to anyone; an explicit choice in the environment wins.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow announces every table that it creates.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # The thread below does the waiting between attempts; MLflow's own would be 7 attempts of 2 minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}

# MLflow refuses longer ones.
_LONGEST_TAG = 5000

# One thing to send: takes a client and the run's id.
_Call = Callable[["MlflowClient", str], Any]


class Tracking:
    """The metrics file of a run, and its MLflow run if it has one.

    Args:
        recipe: what the run does; its values become MLflow parameters.
        folder: the run's folder, which exists; its name becomes the MLflow run's.
        warn: takes a line about a server that does not answer.
    """

    def __init__(self, recipe: Recipe, folder: Path, warn: Callable[[str], None]) -> None:
        self._file = (folder / METRICS_FILE).open("x", encoding="utf-8", buffering=1)
        self._mlflow = None
        if recipe.tracking.kind == "mlflow":
            self._mlflow = MlflowRun(recipe, folder.name, warn)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics by name after `step` optimizer steps; what is not finite is null in the file."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        if self._mlflow:
            self._mlflow.log(step, metrics)

    def artifact(self, path: Path) -> None:
        """Attach a file to the MLflow run; it has to stay where it is until the run ends."""
        if self._mlflow:
            self._mlflow.artifact(path)

    def __enter__(self) -> Self:
        """Open nothing more: the file is open, and the thread connects by itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the run with the status that the exception calls for."""
        self._file.close()
        if self._mlflow is None:
            return
        if error is None:
            self._mlflow.end("FINISHED", {})
        elif isinstance(error, KeyboardInterrupt):
            self._mlflow.end("KILLED", {"stop.reason": "interrupted"})
        else:
            # trainer.NonFiniteError knows where it happened; other exceptions have their message alone.
            where = {
                f"stop.{name}": str(getattr(error, name))
                for name in ("step", "quantity", "value")
                if hasattr(error, name)
            }
            reason = f"{type(error).__name__}: {error}"
            self._mlflow.end("FAILED", {"stop.reason": reason[:_LONGEST_TAG], **where})


class MlflowRun:
    """One MLflow run, filled by a thread from a queue.

    Args:
        recipe: names server and experiment; its values become the run's parameters.
        run_name: how the run is called.
        warn: takes one line when the server fails for the first time, and one if it never took everything.
    """

    def __init__(self, recipe: Recipe, run_name: str, warn: Callable[[str], None]) -> None:
        shown = without_password(recipe)
        self._config = recipe.tracking
        self._shown_uri = shown.tracking.uri
        self._run_name = run_name
        self._warn = warn
        self._warned = False
        self._lost = False
        self._started = int(time.time() * 1000)
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._closing = threading.Event()
        self._send_parameters(flatten(shown))
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send metrics, with the time of this call."""
        now = int(time.time() * 1000)

        def call(client: MlflowClient, run_id: str) -> None:
            from mlflow.entities import Metric

            client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

        self._calls.put(call)

    def artifact(self, path: Path) -> None:
        """Send a file."""
        self._calls.put(lambda client, run_id: client.log_artifact(run_id, str(path)))

    def end(self, status: str, tags: Mapping[str, str]) -> None:
        """Send tags and status, then wait for the thread, at most `CLOSE_S` seconds."""

        def call(client: MlflowClient, run_id: str) -> None:
            for name, value in tags.items():
                client.set_tag(run_id, name, value)
            client.set_terminated(run_id, status)

        self._calls.put(call)
        self._calls.put(None)
        self._closing.set()
        self._thread.join(CLOSE_S)
        if self._lost or self._thread.is_alive():
            self._warn(f"MLflow at {self._shown_uri} did not take everything; {METRICS_FILE} has all metrics")

    def _send_parameters(self, parameters: Mapping[str, Any]) -> None:
        def call(client: MlflowClient, run_id: str) -> None:
            from mlflow.entities import Param

            client.log_batch(run_id, params=[Param(name, str(value)) for name, value in parameters.items()])

        self._calls.put(call)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            pause = FIRST_PAUSE_S
            while not self._try(call):
                if self._closing.wait(pause):
                    # The run is over: one last attempt instead of another pause.
                    if self._try(call):
                        break
                    self._lost = True
                    return
                pause = min(2 * pause, LONGEST_PAUSE_S)

    def _try(self, call: _Call) -> bool:
        """Send one thing; False if the server is away, so that it is worth another attempt."""
        try:
            call(self._connected(), self._run_id)
        except Exception as error:  # whatever it is, training goes on
            if not self._warned:
                self._warned = True
                reason = _one_line(str(error).replace(self._config.uri, self._shown_uri))
                self._warn(
                    f"MLflow at {self._shown_uri} fails ({type(error).__name__}: {reason}); "
                    f"training goes on, metrics are in {METRICS_FILE}"
                )
            # A server that answers has refused this very call and would refuse it again.
            if not self._answers():
                return False
            self._lost = True
        return True

    def _connected(self) -> MlflowClient:
        if self._client is not None:
            return self._client
        for name, value in _MLFLOW_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # urllib3 prints each of its attempts, with a traceback's worth of detail.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self._config.uri)
        experiment = client.get_experiment_by_name(self._config.experiment)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(self._config.experiment)
        run = client.create_run(
            experiment_id,
            start_time=self._started,
            run_name=self._run_name,
            tags={"mlflow.source.name": "train-mtp"},
        )
        self._run_id = run.info.run_id
        self._client = client
        return client

    def _answers(self) -> bool:
        if self._client is None:
            return False
        try:
            self._client.get_run(self._run_id)
        except Exception:
            return False
        return True


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    return f"{line[:117]}..." if len(line) > 120 else line
