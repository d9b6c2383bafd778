"""Starting the ranks: one process each on gloo, once a file."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent


def start(ranks: int, jobs: dict[str, Any], folder: Path, timeout: int) -> Callable[..., list[Any]]:
    """Run scenarios and cases on so many ranks; return what looks up the results of all of them by name."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py"), str(rank), str(ranks), str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, said[0][-3000:]
    by_rank = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]

    def of(*key: Any) -> list[Any]:
        results = [rank[key if len(key) > 1 else key[0]] for rank in by_rank]
        for result in results:
            assert not isinstance(result, str), result
        return results

    return of


@pytest.fixture(scope="session")
def start_ranks() -> Callable[..., Callable[..., list[Any]]]:
    """The function `start` of this file."""
    return start


@pytest.fixture(scope="session")
def ranks_file() -> ModuleType:
    """ranks.py as a module."""
    spec = importlib.util.spec_from_file_location("ranks", HERE / "ranks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
