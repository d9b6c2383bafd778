"""Where the numbers of a run go: always to metrics.jsonl, and to MLflow where the recipe asks for it.

    with Tracking(recipe, folder, warn) as tracking:
        tracking.log(step, {"train/loss": 4.2})

Leaving the block ends the MLflow run: FINISHED, KILLED on Ctrl-C, FAILED on any other exception, with tags
that say why. A stage of a run is a child of its MLflow run. Training never waits for MLflow and never fails
with it: a thread of its own connects and sends, a server that does not answer is asked again later, and what
it never took is in metrics.jsonl all the same.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mtp_ce.training.config.recipe import flatten, without_password
from mtp_ce.training.config.schema import EvaluationRecipe, Recipe
from mtp_ce.training.interrupt import ignore_sigterm

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRICS_FILE = "metrics.jsonl"
# Which runs of MLflow belong to a folder, so that a resumed run goes on in them.
MLFLOW_FILE = "mlflow.json"

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

# One thing to send.
_Call = Callable[["MlflowClient"], Any]


def shown_by(recipe: Recipe) -> str:
    """Where the metrics of a recipe can be looked at."""
    if recipe.tracking.kind == "none":
        return f"none; metrics go to {METRICS_FILE}"
    return f"mlflow ui --backend-store-uri {without_password(recipe).tracking.uri}"


class Tracking:
    """The metrics file of a run or of one of its stages, and its MLflow run if it has one.

    Args:
        recipe: what the run does; its values become MLflow parameters.
        folder: the run's folder, which exists; the first metrics make the file in it.
        warn: takes a line about a server that does not answer.
        whole: the tracking of the run that this is a stage of; None for the run itself.
        name: what MLflow calls it; None takes the folder's name.
        records: whether anything is written or sent; of several ranks one does.
    """

    def __init__(
        self,
        recipe: Recipe | EvaluationRecipe,
        folder: Path,
        warn: Callable[[str], None],
        whole: Tracking | None = None,
        name: str | None = None,
        records: bool = True,
    ) -> None:
        self._path = folder / METRICS_FILE
        self._records = records
        self._warn = warn
        self._file: FileIO | None = None
        self._kept_bytes = 0
        self._unwritten = False
        name = name or folder.name
        self._run = None
        # Who opens the connection closes it.
        self._connection = None
        if not records:
            return
        if whole is None and recipe.tracking.kind == "mlflow":
            self._connection = MlflowConnection(recipe, warn, folder / MLFLOW_FILE)
            self._run = MlflowRun(self._connection, name)
        elif whole is not None and whole._run is not None:
            self._run = MlflowRun(whole._run.connection, name, whole._run)
        if self._run:
            self._run.parameters(flatten(without_password(recipe)))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics by name after `step` optimizer steps; what is not finite is null in the file."""
        if not self._records:
            return
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        try:
            self._write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        except OSError as error:  # a full disk must not end the training
            if not self._unwritten:
                self._warn(f"{self._path} can't be written from step {step} on ({error.strerror}); training goes on")
            self._unwritten = True
        if self._run:
            self._run.log(step, metrics)

    @property
    def size(self) -> int:
        """Bytes in the metrics file."""
        return self._path.stat().st_size if self._path.exists() else 0

    def rewind(self, size: int) -> None:
        """Go on after the first `size` bytes of a file from before; without this, the first metrics begin it."""
        assert self._file is None
        # A file that was lost with another machine has none of them.
        self._kept_bytes = min(size, self.size)

    def _write(self, line: str) -> None:
        if self._file is None:
            self._file = self._path.open("ab", buffering=0)
            self._file.truncate(self._kept_bytes)
        before, data = self.size, line.encode()
        # A disk that becomes full takes a part; the file has whole lines only.
        if self._file.write(data) != len(data):
            self._file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def summary(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show metrics in the MLflow run that another file has already."""
        if self._run:
            self._run.log(step, metrics)

    def artifact(self, path: Path) -> None:
        """Attach a file to the MLflow run; it has to stay where it is until the run ends."""
        if self._run:
            self._run.artifact(path)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Describe the MLflow run."""
        if self._run:
            self._run.tags(tags)

    def __enter__(self) -> Self:
        """Open nothing: the first metrics make the file, and the thread connects by itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the run with the status that the exception calls for."""
        if error is not None:
            ignore_sigterm()
        if self._file:
            self._file.close()
        if self._run is None:
            return
        if error is None:
            self._run.end("FINISHED", {})
        elif isinstance(error, KeyboardInterrupt):
            reason = getattr(error, "signal", None)
            self._run.end("KILLED", {"stop.reason": reason.name if reason else "interrupted"})
        else:
            # trainer.StepRefusedError knows where it happened; other exceptions have their message alone.
            where = {
                f"stop.{name}": str(getattr(error, name))
                for name in ("step", "quantity", "value")
                if hasattr(error, name)
            }
            reason = f"{type(error).__name__}: {error}"
            self._run.end("FAILED", {"stop.reason": reason[:_LONGEST_TAG], **where})
        if self._connection:
            self._connection.close()


class MlflowRun:
    """One MLflow run; every method only puts something into the connection's queue.

    Args:
        connection: what sends.
        name: how the run is called.
        parent: the run that it is a part of.
    """

    def __init__(self, connection: MlflowConnection, name: str, parent: MlflowRun | None = None) -> None:
        self.connection = connection
        self._id = ""
        self._resumed = False
        self.key: str = f"{parent.key}/{name}" if parent else name
        started = int(time.time() * 1000)

        def create(client: MlflowClient) -> None:
            if known := connection.known_run(client, self.key):
                self._id, self._resumed = known, True
                client.update_run(known, status="RUNNING")
                return
            tags = {"mlflow.source.name": Path(sys.argv[0]).name}
            if parent:
                tags["mlflow.parentRunId"] = parent._id
            run = client.create_run(connection.experiment_id, start_time=started, run_name=name, tags=tags)
            self._id = run.info.run_id
            connection.remember(self.key, self._id)

        # Calls are sent in their order, so the id is there before any other call needs it.
        connection.send(create)

    def parameters(self, parameters: Mapping[str, Any]) -> None:
        """Send what decides the run; a run that is gone on with has it, and MLflow refuses other values."""

        def call(client: MlflowClient) -> None:
            from mlflow.entities import Param

            if self._resumed:
                return
            client.log_batch(self._id, params=[Param(name, str(value)) for name, value in parameters.items()])

        self.connection.send(call)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send metrics, with the time of this call."""
        now = int(time.time() * 1000)

        def call(client: MlflowClient) -> None:
            from mlflow.entities import Metric

            client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

        self.connection.send(call)

    def artifact(self, path: Path) -> None:
        """Send a file."""
        self.connection.send(lambda client: client.log_artifact(self._id, str(path)))

    def tags(self, tags: Mapping[str, str]) -> None:
        """Send tags."""

        def call(client: MlflowClient) -> None:
            for name, value in tags.items():
                client.set_tag(self._id, name, value)

        self.connection.send(call)

    def end(self, status: str, tags: Mapping[str, str]) -> None:
        """Send tags and status."""
        self.tags(tags)
        self.connection.send(lambda client: client.set_terminated(self._id, status))


class MlflowConnection:
    """A thread that sends to one MLflow server, in order, what it finds in a queue.

    Args:
        recipe: names server and experiment.
        warn: takes one line when the server fails for the first time, and one if it never took everything.
        memory: the file that knows which runs were made for the same folder before.
    """

    def __init__(self, recipe: Recipe | EvaluationRecipe, warn: Callable[[str], None], memory: Path) -> None:
        self._config = recipe.tracking
        self._memory = memory
        self._shown_uri = without_password(recipe).tracking.uri
        self._warn = warn
        self._warned = False
        self._lost = False
        self._client: MlflowClient | None = None
        self.experiment_id = ""
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def send(self, call: _Call) -> None:
        """Put something into the queue."""
        self._calls.put(call)

    def known_run(self, client: MlflowClient, key: str) -> str | None:
        """Give the id of a run that was made for this folder before, and is still there."""
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

        known = self._remembered().get(key)
        try:
            return client.get_run(known).info.run_id if known else None
        except MlflowException as error:
            # The server that has it may be another one, or someone has removed it.
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            return None

    def remember(self, key: str, run_id: str) -> None:
        """Note the id of a run that was made."""
        aside = self._memory.with_name(f".{self._memory.name}")
        aside.write_text(json.dumps({**self._remembered(), key: run_id}, indent=2), encoding="utf-8")
        aside.replace(self._memory)

    def _remembered(self) -> dict[str, str]:
        try:
            known: dict[str, str] = json.loads(self._memory.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return known

    def close(self) -> None:
        """Wait for the thread to send what is left, at most `CLOSE_S` seconds."""
        self._calls.put(None)
        self._closing.set()
        self._thread.join(CLOSE_S)
        if self._lost or self._thread.is_alive():
            self._warn(f"MLflow at {self._shown_uri} did not take everything; {METRICS_FILE} has all metrics")

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
            call(self._connected())
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
        self.experiment_id = (
            experiment.experiment_id if experiment else client.create_experiment(self._config.experiment)
        )
        self._client = client
        return client

    def _answers(self) -> bool:
        if self._client is None:
            return False
        try:
            self._client.get_experiment(self.experiment_id)
        except Exception:
            return False
        return True


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    return f"{line[:117]}..." if len(line) > 120 else line
