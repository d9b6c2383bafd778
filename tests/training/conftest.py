"""What the trainer's tests share: a small corpus, a small recipe, and one run of it per session."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from mtp_ce.training.evaluation import Evaluation
from mtp_ce.training.recipe import load_recipe
from mtp_ce.training.schema import Recipe

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

    from mtp_ce.training import pipeline

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


@pytest.fixture
def refused() -> Callable[[str, dict[str, tuple[list[str], list[str]]], Path], None]:
    """Check that mistakes cost one line each, exit code 2, no import of torch and no change of the folder.

    Takes the command, what arguments it gets and what words its answer has by mistake, and the folder it is run in. All
    of them go through one interpreter, which would have to be started for each.
    """

    def check(command: str, mistakes: dict[str, tuple[list[str], list[str]]], folder: Path) -> None:
        before = sorted(folder.rglob("*"))
        module = f"mtp_ce.training.{command.removesuffix('-mtp')}_cli"
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
