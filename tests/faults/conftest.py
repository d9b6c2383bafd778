"""A short run on a disk that fails, is full, is read-only or whose machine dies, and what holds afterwards."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KILL = -1
FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS, "kill -9": KILL, "power cut": KILL}

# A reference and the model itself, on rows of a table: caches of rows, tokenizer, tokens and a stage are written.
RECIPE = """
name: short
seed: 0
data: {{corpus: {corpus}, vocab_size: 300, sequence_length: 32, holdout_fraction: 0.2}}
model:
  kind: llama
  hidden_size: 16
  intermediate_size: 32
  layers: 1
  attention_heads: 2
  kv_heads: 1
  tie_embeddings: false
  init_std: 0.08
  mtp: {{kind: residual, horizon: 2, loss: linear}}
scorer: {{name: rho1_excess}}
reference: {{documents: all, train: {{steps: 4, batch_size: 4, log_every: 1}}}}
optimizer: {{lr: 1e-2, warmup_steps: 2}}
train: {{steps: 6, batch_size: 4, log_every: 1, device: cpu}}
checkpoint: {{every: 2, keep: 2}}
validation: {{every: 3, rows: 4, decoding: {{prompts: 0}}}}
tracking: {{kind: none}}
"""


@dataclass(frozen=True)
class Call:
    """A call in the watched folder, as the log has it.

    Attributes:
        what: "call", "struck" by the fault, or "fails" after it.
        kind: one of the kinds in shim.c.
        path: relative to the watched folder.
        to: the new name, where it has one.
    """

    what: str
    kind: str
    path: str
    to: str


@dataclass(frozen=True)
class Answer:
    """How a command ended.

    Attributes:
        code: exit code, negative for a signal; None if it did not end in time.
        printed: on stdout.
        complained: on stderr.
        calls: those in the watched folder.
    """

    code: int | None
    printed: str
    complained: str
    calls: list[Call]


class Server:
    """The process of server.py, disturbed by a compiled library, or by Python where that is None."""

    def __init__(self, library: Path | None, *arguments: str, **environment: str) -> None:
        self.compiled = library is not None
        alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **environment}
        if library:
            alone["LD_PRELOAD"] = str(library)
        self._process = subprocess.Popen(
            [sys.executable, HERE / "server.py", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **alone},
            text=True,
        )
        self._says("ready\n")

    def _says(self, expected: str | None = None) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the server of the fault tests has ended"
        assert expected in (None, line)
        return line

    def ask(
        self, where: Path, program: str, *arguments: str, fault: tuple[str, int, str] | None = None, seconds: float = 60
    ) -> Answer:
        """Run a program of server.py in a folder, whose subfolder `disk` fails; the cache is on that disk.

        Args:
            where: the working directory.
            program: one of PROGRAMS in server.py.
            arguments: of the program.
            fault: kind of call, n and error: one of FAULTS at the n-th call of the kind; n = 0 only counts.
            seconds: after which the program is stuck.
        """
        disk, log = where / "disk", where / "calls.txt"
        disk.mkdir(exist_ok=True)
        log.unlink(missing_ok=True)
        fields = None
        if fault:
            kind, n, error = fault
            fields = {"folder": str(disk), "kind": kind, "n": n, "error": FAULTS[error]}
        order = {
            **{"where": str(where), "program": program, "arguments": arguments, "fault": fields, "seconds": seconds},
            "environment": {"XDG_CACHE_HOME": str(disk / "cache")},
        }
        assert self._process.stdin
        print(json.dumps(order), file=self._process.stdin, flush=True)
        code = json.loads(self._says())
        lines = [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []
        calls = [Call(what, kind, *(name.removeprefix(f"{disk}/") for name in names)) for what, kind, *names in lines]
        texts = [(where / name).read_text(errors="replace") for name in ("printed.txt", "complained.txt")]
        return Answer(code, *texts, calls)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(20)


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The library that injects faults, or None where no compiler is found."""
    if sys.platform != "linux":
        pytest.skip("faults are injected by LD_PRELOAD and found by /proc, which Linux has")
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    options = ["-shared", "-fPIC", "-O1", "-U_FORTIFY_SOURCE", "-Wall", "-Werror"]
    subprocess.run([compiler, *options, "-o", library, HERE / "shim.c", "-ldl"], check=True)
    return library


@pytest.fixture(scope="session")
def start_server() -> Iterator[Callable[..., Server]]:
    """Start servers, which end with the session; takes the arguments of Server."""
    with ExitStack() as ends:
        yield lambda *arguments, **environment: ends.enter_context(closing(Server(*arguments, **environment)))


@pytest.fixture(scope="session")
def servers(
    shim: Path | None, start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Server]:
    """Start servers that have imported the trainer; each takes one order at a time."""
    # Fonts are looked up once for all, and not on the disk that fails.
    return partial(start_server, shim, MPLCONFIGDIR=str(tmp_path_factory.getbasetemp() / "matplotlib"))


@pytest.fixture(scope="session")
def server(servers: Callable[[], Server]) -> Server:
    """One server for the session."""
    return servers()


@pytest.fixture(scope="session")
def recipe_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The recipe of the short run, with a corpus of about 100 functions in a .jsonl file."""
    table = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    sources = sorted((Path(sysconfig.get_path("stdlib")) / "json").glob("*.py"))
    texts = [part for source in sources for part in re.split(r"\n(?=def |class |    def )", source.read_text())]
    table.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if len(text) > 40))
    return RECIPE.format(corpus=table)


# Counts the calls, and lets none fail.
COUNT = ("open", 0, "EIO")


def result(output: Path) -> dict[str, str]:
    """Return the parameters of a run as hashes, and what it has measured."""
    values = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((output / "model").glob("*.safetensors"))
    }
    evaluation = output / "evaluation.json"
    return values | ({evaluation.name: evaluation.read_text()} if evaluation.exists() else {})


class Short:
    """The short run, as often as a test wants it.

    Attributes:
        command: the program and the arguments that start the run, or resume it.
        where: the folder of a run that nobody disturbed, with recipe.yaml, disk/out and disk/cache.
        answer: what that one printed, and its calls.
        result: what every other attempt is held against.
    """

    result_of = staticmethod(result)
    command = ("train-mtp", "recipe.yaml", "--resume", "auto", "--output", "disk/out")

    def __init__(self, server: Server, recipe: str, where: Path) -> None:
        self._server = server
        self._recipe = recipe
        self.where = self.place(where)
        self.answer = server.ask(where, *self.command, fault=COUNT, seconds=300)
        assert (self.answer.code, self.answer.complained) == (0, ""), self.answer.printed + self.answer.complained
        self.result = result(where / "disk" / "out")

    def place(self, where: Path, disk: Path | None = None) -> Path:
        """Make a folder to run in, with the recipe, and a copy of a disk if one is given."""
        where.mkdir(exist_ok=True)
        (where / "recipe.yaml").write_text(self._recipe)
        if disk:
            shutil.copytree(disk, where / "disk", symlinks=True)
        return where

    def stop(self, where: Path, before: str) -> Path:
        """Run until something is renamed to a path, and kill the run there; return the disk."""
        renames = [call.to for call in self.answer.calls if call.kind == "rename"]
        fault = ("rename", renames.index(before) + 1, "kill -9")
        assert self._server.ask(self.place(where), *self.command, fault=fault).code == -signal.SIGKILL
        return where / "disk"

    def differs(self, output: Path) -> list[str]:
        """Name what a finished run has computed differently."""
        ours = result(output)
        return [name for name in self.result.keys() | ours.keys() if self.result.get(name) != ours.get(name)]


@pytest.fixture(scope="session")
def short(server: Server, recipe_text: str, tmp_path_factory: pytest.TempPathFactory) -> Short:
    """The short run."""
    return Short(server, recipe_text, tmp_path_factory.mktemp("undisturbed"))
