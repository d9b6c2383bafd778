"""What the trainer's tests share: a small corpus, a small recipe, and one run of it per session."""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
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
