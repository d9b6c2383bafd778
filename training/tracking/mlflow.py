"""The MLflow tracker: `tracking.kind: mlflow`. Training never waits for MLflow.

    training thread     puts calls into a queue and returns at once
    MLflow thread       connects, sends the calls in order, and sends a call again that the server did not take

A stage is a nested run of its run. A server that does not answer is tried again after a pause; one that refuses a call
loses this call only. What MLflow never took is in metrics.jsonl. A resumed run sends no metric that MLflow has already.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from mtp_ce.training.addresses import is_unclear, shown
from mtp_ce.training.config.tracking import TrackingConfig
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.tracking.jsonl import METRICS_FILE
from mtp_ce.training.tracking.tracker import Status, Tracker, Warn

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Where the recipe and the environment name nothing.
DEFAULT_URI = "sqlite:///mlflow.db"
DEFAULT_EXPERIMENT = "mtp_ce"

# Ids of the MLflow runs of a run directory, so that a resumed run continues them.
MLFLOW_FILE = "mlflow.json"

# Pause before a failed call is sent again; it doubles after every failure.
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0

# How long the end of a run waits for calls that are still in the queue.
CLOSE_S = 30.0

# How long a dry run waits for a server's health.
CHECK_TIMEOUT_S = 3.0

_MLFLOW_ENVIRONMENT = {
    # Training sends nothing about its user to anyone; an explicit choice in the environment wins.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow logs every table that it creates, and errors with a traceback; ours are one line.
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    # MLflow prints two addresses for each run that ends.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # The thread below pauses between attempts; MLflow's own defaults are 7 attempts of 2 minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}

# Stores that `mlflow ui` opens; a server has its own pages.
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql", "file")

# Characters of a tag's value; MLflow refuses longer ones.
_TAG_CHARACTERS = 5000

_Call = Callable[["MlflowClient"], Any]


class MlflowTracker:
    """One MLflow run; every method only puts a call into the connection's queue.

    Args:
        config: server and experiment.

    Raises:
        RecipeError: MLflow is not installed, or its address can't be taken apart.
    """

    def __init__(self, config: TrackingConfig) -> None:
        if find_spec("mlflow") is None:
            raise RecipeError("training needs mlflow: pip install 'mtp_ce[train]', or give tracking.kind=none")
        self._config = config
        self._uri = _uri(config)
        if is_unclear(self._uri):
            raise RecipeError(
                f"{'tracking.uri' if config.uri else 'MLFLOW_TRACKING_URI'} has no host that can be told apart from a "
                "password; write %40 for @ and %2F for / in a password, or set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD"
            )
        self._parent: MlflowTracker | None = None
        self._connection: MlflowConnection
        self._key = ""
        self._id = ""
        self._resumed = False
        # Steps of each metric that an earlier process of a resumed run has sent.
        self._sent: dict[str, set[int]] = {}

    def where(self) -> str:
        """Return the address of the run's page on a server, or the command that shows the runs of a database."""
        address = shown(self._uri)
        kind, separator, _ = self._uri.partition("://")
        if kind in ("http", "https"):
            pages = address.replace("***@", "").removesuffix("?***").rstrip("/")
            return f"{pages}/#/experiments/{self._connection.experiment_id}/runs/{self._id}" if self._id else pages
        # Without a scheme it is the folder of a file store.
        if not (kind.startswith(_DATABASES) or (not separator and kind != "databricks")):
            return address
        if address == self._uri:
            return f"mlflow ui --backend-store-uri {shlex.quote(address)}"
        # A command with the shortened address would not work.
        return address if self._config.uri else 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'

    def check(self) -> str | None:
        """Ask the server for its health, or check that the database can be written."""
        reason = _unreachable(self._uri)
        return reason and f"MLflow at {shown(self._uri)} is not reachable: {shown(reason)}"

    def start(self, name: str, folder: Path, warn: Warn) -> None:
        """Connect, and create the run or reopen the one that the folder had before."""
        self._open(MlflowConnection(self._config, warn, folder / MLFLOW_FILE), name, None)

    def child(self, name: str, folder: Path) -> Tracker:
        """Return a nested run over the same connection."""
        child = MlflowTracker(self._config)
        child._open(self._connection, name, self)
        return child

    def _open(self, connection: MlflowConnection, name: str, parent: MlflowTracker | None) -> None:
        self._connection, self._parent = connection, parent
        self._key = f"{parent._key}/{name}" if parent else name
        started = int(time.time() * 1000)

        def create(client: MlflowClient) -> None:
            # The stages of a run that begins anew do so too: nothing hangs below a run that was deleted.
            again = parent is None or parent._resumed
            if again and (known := connection.known_run(client, self._key)):
                self._id, self._resumed = known, True
                client.update_run(known, status="RUNNING")
                return
            tags = {"mlflow.source.name": Path(sys.argv[0]).name}
            if parent:
                tags["mlflow.parentRunId"] = parent._id
            run = client.create_run(connection.experiment_id, start_time=started, run_name=self._key, tags=tags)
            self._id = run.info.run_id
            connection.remember(self._key, self._id)

        # Calls are sent in order, so the id is set before any other call reads it.
        connection.send(create)

    def params(self, params: Mapping[str, Any]) -> None:
        """Send parameters; a resumed run has them already, and MLflow refuses other values."""

        def call(client: MlflowClient) -> None:
            from mlflow.entities import Param

            if self._resumed:
                return
            client.log_batch(self._id, params=[Param(name, str(value)) for name, value in params.items()])

        self._connection.send(call)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send metrics, with the time of this call. Of a resumed run, MLflow may have some already."""
        now = int(time.time() * 1000)

        def call(client: MlflowClient) -> None:
            from mlflow.entities import Metric

            new = [Metric(name, value, now, step) for name, value in metrics.items() if step not in sent(client, name)]
            if new:
                client.log_batch(self._id, metrics=new)

        def sent(client: MlflowClient, name: str) -> set[int]:
            if self._resumed and name not in self._sent:
                self._sent[name] = {metric.step for metric in client.get_metric_history(self._id, name)}
            return self._sent.get(name, set())

        self._connection.send(call)

    def summary(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send final figures as metrics, so that the list of runs shows them."""
        self.log(step, metrics)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Send tags."""

        def call(client: MlflowClient) -> None:
            for name, value in tags.items():
                client.set_tag(self._id, name, value[:_TAG_CHARACTERS])

        self._connection.send(call)

    def artifact(self, path: Path) -> None:
        """Send a file."""
        self._connection.send(lambda client: client.log_artifact(self._id, str(path)))

    def finish(self, status: Status, tags: Mapping[str, str]) -> None:
        """Send tags and status; the whole run waits for the queue, its stages do not."""
        self.tags(tags)
        self._connection.send(lambda client: client.set_terminated(self._id, status))
        if self._parent is None:
            self._connection.close()


class MlflowConnection:
    """A thread that sends the calls of a queue to one MLflow server, in order.

    Args:
        config: server and experiment.
        warn: takes one line at the first failure, and one at the end if the server never took everything.
        memory: the file with the ids of the runs that the folder had before.
    """

    def __init__(self, config: TrackingConfig, warn: Warn, memory: Path) -> None:
        self._config = config
        self._memory = memory
        self._uri = _uri(config)
        self._shown_uri = shown(self._uri)
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
        """Put a call into the queue."""
        self._calls.put(call)

    def known_run(self, client: MlflowClient, key: str) -> str | None:
        """Return the id of a run that was created for this folder before, if the server still has it."""
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

        known = self._remembered().get(key)
        if known is None:
            return None
        try:
            # A run that was deleted in the UI can still be read, and takes nothing.
            if client.get_run(known).info.lifecycle_stage == "active":
                return known
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
        self._warn(
            f"MLflow at {self._shown_uri} does not have the run {key} any more: it was deleted, or this is another "
            f"server (tracking.uri, MLFLOW_TRACKING_URI); a new one begins, and {METRICS_FILE} has the earlier metrics"
        )
        return None

    def remember(self, key: str, run_id: str) -> None:
        """Store the id of a run that was created."""
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
        """Wait for the thread to send the rest of the queue, at most `CLOSE_S` seconds."""
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
        """Send one call; return False if the server does not answer, so that the call is worth another attempt."""
        try:
            call(self._connected())
        except Exception as error:  # whatever it is, training continues
            if not self._warned:
                self._warned = True
                self._warn(
                    f"MLflow at {self._shown_uri} fails ({self._reason(error)}); "
                    f"training continues, metrics are in {METRICS_FILE}"
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
        # urllib3 logs each of its attempts at length.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self._uri)
        self.experiment_id = self._experiment(client)
        self._client = client
        return client

    def _experiment(self, client: MlflowClient) -> str:
        """Return the id of the experiment that the recipe or the environment names, which is created if need be."""
        name = self._config.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        given = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if given and not name:
            return given
        name = name or DEFAULT_EXPERIMENT
        experiment = client.get_experiment_by_name(name)
        if experiment and experiment.lifecycle_stage != "active":
            raise RuntimeError(f"experiment '{name}' was deleted there; restore it, or give tracking.experiment=...")
        return str(experiment.experiment_id if experiment else client.create_experiment(name))

    def _reason(self, error: Exception) -> str:
        # Clients quote an address whole and in parts; of one with secrets no part can be recognised for certain.
        kind = type(error).__name__
        return kind if self._shown_uri != self._uri else f"{kind}: {_shortened(shown(str(error)))}"

    def _answers(self) -> bool:
        if self._client is None:
            return False
        try:
            self._client.get_experiment(self.experiment_id)
        except Exception:
            return False
        return True


def _uri(config: TrackingConfig) -> str:
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def _unreachable(uri: str) -> str | None:
    """Return why MLflow can't be written to; None where it can, or where only MLflow itself could tell."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        # The health check needs no password, so none is sent.
        address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/health"
        try:
            urlopen(address, timeout=CHECK_TIMEOUT_S).close()
        except HTTPError as error:
            return f"it answers {error.code} {error.reason}" if error.code >= 500 else None
        except (OSError, HTTPException) as error:
            return str(getattr(error, "reason", error))
        return None
    if parts.scheme == "sqlite" and parts.path not in ("", "/"):
        # sqlite:///relative, sqlite:////absolute
        file = Path(parts.path.removeprefix("/"))
        writable = file if file.exists() else file.parent
        if not writable.exists():
            return f"there is no folder {writable}"
        return None if os.access(writable, os.W_OK) else f"{writable} can't be written to"
    return None


def _shortened(message: str) -> str:
    line = " ".join(message.split())
    return f"{line[:117]}..." if len(line) > 120 else line
