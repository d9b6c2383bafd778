"""What the trainer's tests share: a small corpus, a small recipe, and one run of it per session."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from mtp_ce.training.config.recipe import load_recipe
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.metrics.evaluation import Evaluation

SMALL = [
    "name=small",
    "data.vocab_size=512",
    "data.sequence_length=64",
    "data.holdout_fraction=0.2",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.layers=2",
    "model.attention_heads=2",
    "model.kv_heads=1",
    "model.mtp.horizon=3",
    "optimizer.lr=1e-2",
    "optimizer.warmup_steps=2",
    "train.steps=60",
    "train.batch_size=8",
    "train.log_every=12",
    "train.device=cpu",
    "validation.every=24",
    "validation.decoding={prompts: 2, prompt_tokens: 16, new_tokens: 12}",
    "tracking.kind=none",
]


@pytest.fixture(scope="session", autouse=True)
def _private_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tokenizers and tokens made by tests don't mix with the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


# A person's own settings would lead the tests to another server.
_AWS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_CONFIG_FILE")


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory):
    """A client of a server that speaks S3 and checks signatures, with the empty buckets `models` and `texts`."""
    import boto3

    folder = tmp_path_factory.mktemp("gateway")
    program, database = Path(sys.executable).with_name("juicefs"), f"sqlite3://{folder}/meta.db"
    store = ["--storage", "file", "--bucket", f"{folder}/store/", "--trash-days", "0"]
    subprocess.run([program, "format", database, "test", *store], check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = free.getsockname()
    place = "{}:{}".format(*where)
    quiet = ["--no-banner", "--no-usage-report", "--no-bgjob", "--log", f"{folder}/log", "--metrics", "127.0.0.1:0"]
    process = subprocess.Popen(
        [
            program,
            "gateway",
            database,
            place,
            "--multi-buckets",
            "--keep-etag",
            *quiet,
            "--cache-dir",
            folder / "cache",
        ],
        env={**os.environ, "MINIO_ROOT_USER": "testkey", "MINIO_ROOT_PASSWORD": "testsecret123"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(500):
            with socket.socket() as asking:
                if asking.connect_ex(where) == 0:
                    break
            time.sleep(0.02)
        keys = {"aws_access_key_id": "testkey", "aws_secret_access_key": "testsecret123"}
        client = boto3.client("s3", endpoint_url=f"http://{place}", region_name="us-east-1", **keys)
        for bucket in ("models", "texts"):
            client.create_bucket(Bucket=bucket)
        yield client
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def s3(gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The client of the gateway, which is where S3 is for everything in the test; with an empty cache."""
    for name in _AWS:
        monkeypatch.delenv(name, raising=False)
    settings = {
        "AWS_ENDPOINT_URL_S3": gateway.meta.endpoint_url,
        "AWS_ACCESS_KEY_ID": "testkey",
        "AWS_SECRET_ACCESS_KEY": "testsecret123",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "no credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return gateway


class Proxy:
    """Stands before a server, writes down what is asked, and cuts off answers.

    Attributes:
        asked: the head of every request, as it came.
        cuts: bytes after which the answer to the next requests for objects ends; None lets one through.
        between: called after each cut.
        breaks: bodies that are sent in parts whose connection ends with their first bytes.
        damage: answers with bodies in which the last byte of what comes first is changed.
    """

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("http://").partition(":")
        self._server = (host, int(port))
        self._door = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._door.getsockname()[1]}"
        self.asked: list[str] = []
        self.cuts: list[int | None] = []
        self.between: Callable[[], object] = lambda: None
        self.damage = 0
        self.breaks = 0
        self._held = b""
        self._open = threading.Event()
        self._open.set()
        self.served = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def gets(self, key: str = "") -> list[str]:
        """Heads of the requests for the bodies of objects."""
        return [head for head in self.asked if re.match(rf"GET /\w+/[^? ]*{re.escape(key)} ", head)]

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self._door.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._server) as server:
            limit: list[int | None] = [None]
            asking = threading.Thread(target=self._ask, args=(client, server, limit), daemon=True)
            asking.start()
            try:
                while data := server.recv(1 << 16):
                    if limit[0] is not None:
                        data, limit[0] = data[: limit[0]], limit[0] - len(data)
                    if self.damage and len(data) == 1 << 16:
                        self.damage -= 1
                        data = data[:-1] + bytes([data[-1] ^ 1])
                    client.sendall(data)
                    self.served += len(data)
                    if limit[0] is not None and limit[0] <= 0:
                        self.between()
                        break
            except OSError:
                pass
            for end in (client, server):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _ask(self, client: socket.socket, server: socket.socket, limit: list[int | None]) -> None:
        try:
            while data := client.recv(1 << 16):
                if re.match(rb"[A-Z]+ /", data):
                    self.asked.append(data.partition(b"\r\n\r\n")[0].decode("latin-1"))
                    body = re.match(rb"GET /\w+/[^? ]+ ", data)
                    limit[0] = self.cuts.pop(0) if body and self.cuts else None
                if self.breaks and re.match(rb"PUT /[^ ]+\?[^ ]*partNumber", data):
                    self.breaks -= 1
                    client.shutdown(socket.SHUT_RDWR)
                    return
                if self._held in data:
                    self._open.wait()
                server.sendall(data)
        except OSError:
            pass

    @contextmanager
    def held(self, words: bytes = b"") -> Iterator[None]:
        """No request with these words goes through in the block, and everything after it."""
        self._held = words
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def close(self) -> None:
        """Take no new connections."""
        self._door.close()


@pytest.fixture
def proxy(s3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way to the server for everything in the test but the fixture `s3`, which asks directly."""
    made = Proxy(s3.meta.endpoint_url)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", made.endpoint)
    yield made
    made.close()


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """Where a test's objects are."""
    return re.sub(r"\W+", "-", request.node.name)


@pytest.fixture
def conditions(s3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Another server, which knows checksums and conditional writes, with the empty bucket `models`."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    made = Proxy("http://{}:{}".format(*server.get_host_and_port()).replace("0.0.0.0", "127.0.0.1"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", made.endpoint)
    boto3.session.Session().client("s3").create_bucket(Bucket="models")
    yield made
    made.close()
    server.stop()


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 100 kB or so: the standard library's json and logging packages."""
    folder = tmp_path_factory.mktemp("corpus")
    for package in ("json", "logging"):
        source = Path(sysconfig.get_path("stdlib")) / package
        shutil.copytree(source, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="session")
def small(corpus_folder: Path):
    """Make the small recipe, with more overrides where they are given."""

    def make(overrides: Sequence[str] = ()) -> Recipe:
        return load_recipe("tiny", [*SMALL, f"data.corpus={corpus_folder}", *overrides])

    return make


@pytest.fixture(scope="session")
def rho1(corpus_folder: Path):
    """Make a small recipe with a reference stage, with more overrides where they are given."""
    short = ["train.steps=6", "train.log_every=1", "validation.every=null"]
    reference = ["reference.train.steps=8", "reference.train.batch_size=4"]

    def make(overrides: Sequence[str] = ()) -> Recipe:
        return load_recipe("rho1", [*SMALL, f"data.corpus={corpus_folder}", *short, *reference, *overrides])

    return make


@dataclass(frozen=True)
class FinishedRun:
    """A run that went through: where it wrote, and what it found."""

    recipe: Recipe
    folder: Path
    database: str
    evaluation: Evaluation
    printed: str


def run_tracked(recipe: Recipe, where: Path) -> FinishedRun:
    """Run a recipe in a folder of its own, which becomes the working directory."""
    from rich.console import Console

    from mtp_ce.training.run import pipeline

    with pytest.MonkeyPatch.context() as patch, (where / "printed.txt").open("w") as printed:
        patch.chdir(where)
        evaluation = pipeline.train(recipe, where / "runs" / "one", Console(file=printed, width=120))
    printed_text = (where / "printed.txt").read_text()
    return FinishedRun(recipe, where / "runs" / "one", recipe.tracking.uri, evaluation, printed_text)


@pytest.fixture(scope="session")
def finished_run(small, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The small recipe with MLflow, run once for the whole session."""
    where = tmp_path_factory.mktemp("run")
    return run_tracked(small(["tracking.kind=mlflow", f"tracking.uri=sqlite:///{where}/mlflow.db"]), where)


@pytest.fixture(scope="session")
def weighted_run(rho1, finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A recipe with a reference stage, run once, in an experiment of its own (making a database takes seconds)."""
    tracked = ["tracking.kind=mlflow", f"tracking.uri={finished_run.database}", "tracking.experiment=weighted"]
    return run_tracked(rho1(tracked), tmp_path_factory.mktemp("weighted"))


# In a copy of a process that has imported the trainer: the command line, with what it prints in files.
FORKED = """
import os, signal, sys
import torch
from mtp_ce.training.cli.train import main
os.chdir(where)
os.environ.update(environment)
for number, name in ((1, "printed.txt"), (2, "complained.txt")):
    os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
torch.set_num_threads(threads)
# A test runner in the background may have Ctrl-C ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(arguments))
"""


@pytest.fixture(scope="session")
def start_train_mtp() -> Callable[..., BaseProcess]:
    """Start `train-mtp ARGUMENTS` in a process of its own, which need not import torch and transformers first.

    It prints into printed.txt and complained.txt in its working directory.
    """
    import torch

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["mtp_ce.training.run.compare", "mlflow.tracking"])

    def start(where: Path, *arguments: str) -> BaseProcess:
        options = {"where": where, "arguments": arguments, "environment": dict(os.environ)}
        process = server.Process(target=exec, args=(FORKED, {**options, "threads": torch.get_num_threads()}))
        process.start()
        return process

    return start


# Answers each of a list of command lines in one fresh interpreter, and says what has been imported at the end.
ANSWERING = """
import contextlib, importlib, io, json, sys
main = importlib.import_module(sys.argv[1]).main
answers = []
for arguments in json.load(sys.stdin):
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        try:
            code = main(arguments)
        except SystemExit as exit:
            code = exit.code
    answers.append([code, said.getvalue(), complained.getvalue()])
print(json.dumps([answers, [name for name in ("torch", "transformers") if name in sys.modules]]))
"""


COMMANDS = {"train-mtp": "train", "eval-mtp": "evaluate", "export-mtp": "export"}


@pytest.fixture
def refused() -> Callable[[str, dict[str, tuple[list[str], list[str]]], Path], None]:
    """Check that mistakes cost one line each, exit code 2, no import of torch and no change of the folder.

    Takes the command, what arguments it gets and what words its answer has by mistake, and the folder it is run in. All
    of them go through one interpreter, which would have to be started for each.
    """

    def check(command: str, mistakes: dict[str, tuple[list[str], list[str]]], folder: Path) -> None:
        before = sorted(folder.rglob("*"))
        module = f"mtp_ce.training.cli.{COMMANDS[command]}"
        run = subprocess.run(
            [sys.executable, "-c", ANSWERING, module],
            cwd=folder,
            input=json.dumps([arguments for arguments, _ in mistakes.values()]),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.returncode == 0, run.stderr
        answers, imported = json.loads(run.stdout)
        assert imported == []
        for (mistake, (_, expected)), (code, said, complained) in zip(mistakes.items(), answers, strict=True):
            assert (code, said, complained.count("\n")) == (2, "", 1), mistake
            assert complained.startswith(f"{command}: error: ")
            for words in expected:
                assert words in complained, mistake
        assert sorted(folder.rglob("*")) == before

    return check


@pytest.fixture(scope="session")
def same_training():
    """Compare two runs: loss, gradient norm, weights and validation of every step, and the saved parameters."""
    import torch
    from safetensors.torch import load_file

    def record(folder: Path) -> list[dict]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "time" and "perf" not in k} for line in lines]

    def compare(one: Path, other: Path, steps: int) -> None:
        ours, theirs = record(one), record(other)
        assert len(ours) == len(theirs)
        for mine, yours in zip(ours, theirs, strict=True):
            # Shares of rows jump where two logits are as good as equal.
            shares = {name for name in mine if "/top" in name or "/agrees" in name}
            assert {name: mine.pop(name) for name in shares} == pytest.approx(
                {name: yours.pop(name) for name in shares}, abs=1e-3
            )
            assert mine == pytest.approx(yours, rel=1e-5, abs=1e-7)
        losses = {line["train/loss"] for line in ours if "train/loss" in line}
        assert len(losses) == steps, "every step is another one"
        for file in ("model.safetensors", "mtp_heads.safetensors"):
            tensors, others = (load_file(folder / "model" / file) for folder in (one, other))
            assert tensors.keys() == others.keys()
            for name, tensor in tensors.items():
                torch.testing.assert_close(tensor, others[name], rtol=1e-4, atol=1e-5)

    return compare
