"""What the tests of parts from outside the package share: a module beside the package, and a run of three steps."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mtp_ce.training.cli.train import main

ROOT = Path(__file__).resolve().parents[2]

THREE_STEPS = [
    "data.vocab_size=300",
    "data.sequence_length=32",
    "data.holdout_fraction=0.2",
    "model.hidden_size=16",
    "model.intermediate_size=16",
    "model.layers=1",
    "model.attention_heads=2",
    "model.kv_heads=1",
    "model.mtp.horizon=2",
    "optimizer.warmup_steps=1",
    "train.steps=3",
    "train.batch_size=4",
    "train.log_every=1",
    "train.device=cpu",
    "validation.every=null",
    "validation.decoding.prompts=0",
]


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, from which Python imports modules; it holds a small corpus `texts`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    for i in range(60):
        (tmp_path / "texts" / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


@pytest.fixture
def module_of_page() -> Callable[[str, str], str]:
    """Return the Python block of a page of the docs whose first line is `# name`."""

    def find(page: str, name: str) -> str:
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        (block,) = re.findall(rf"^```python\n(# {re.escape(name)}\n.*?)^```", text, re.MULTILINE | re.DOTALL)
        return block

    return find


@pytest.fixture
def train() -> Callable[..., int]:
    """Run `train-mtp tiny` for three steps with more overrides; returns the exit code."""

    def run(*overrides: str) -> int:
        return main(["tiny", *THREE_STEPS, *overrides])

    return run


@pytest.fixture
def metrics(beside: Path) -> Callable[[], list[dict]]:
    """Return the lines of the metrics file of the run `out`."""

    def read() -> list[dict]:
        return [json.loads(line) for line in (beside / "out" / "metrics.jsonl").read_text().splitlines()]

    return read


@pytest.fixture
def files_below() -> Callable[[Path], set[Path]]:
    """Return everything in a folder but Python's caches."""
    return lambda folder: {path for path in folder.rglob("*") if "__pycache__" not in path.parts}
