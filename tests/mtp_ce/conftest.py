"""What tests share: a watch on allocations and products, memory that starts as NaN, and the start of gloo ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::matmul", "aten::linear")
RANKS = Path(__file__).resolve().parent / "vocabulary/ranks.py"


@pytest.fixture
def watch(device: torch.device) -> Callable[[Callable[[], Any]], SimpleNamespace]:
    """Run a function; its result, the most bytes held above those before, the largest allocation, the products.

    A TorchDispatchMode sees a custom operator from outside only; the profiler sees what is inside. `spare` is what
    cuBLAS may take for itself: beside it only large cases say something (tests/mtp_ce/loss/test_gpu.py).
    """
    spare = 64 * 2**20 if device.type == "cuda" else 0

    def run(function: Callable[[], Any]) -> SimpleNamespace:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=device.type == "cpu") as seen:
            result = function()
        products = sum(event.key in PRODUCTS for event in seen.events())
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() - before
            return SimpleNamespace(result=result, peak=peak, largest=peak, products=products, spare=spare)
        held = peak = largest = 0
        events = (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak, largest = max(peak, held), max(largest, event.nbytes())
        return SimpleNamespace(result=result, peak=peak, largest=largest, products=products, spare=spare)

    return run


@pytest.fixture
def poisoned_memory(device: torch.device) -> Iterator[None]:
    """Every tensor that is allocated without a value starts as NaN, or as the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert bool(torch.empty(3, device=device).isnan().all())
    assert bool(torch.zeros(3, device=device).new_empty(3).isnan().all())
    assert bool(torch.empty_like(torch.zeros(3, device=device)).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


def start(ranks: int, jobs: dict[str, Any], folder: Path, timeout: int) -> Callable[..., list[Any]]:
    """Run scenarios and cases on so many ranks; return what looks up the results of all of them by name."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    process = subprocess.Popen(
        [sys.executable, str(RANKS), str(ranks), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        said = process.communicate(timeout=timeout)[0]
    finally:
        process.kill()
    assert process.returncode == 0, said[-3000:]
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
