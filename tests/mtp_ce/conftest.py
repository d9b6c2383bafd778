"""What tests of memory share: a watch on every allocation and product, and memory that starts as NaN."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::matmul", "aten::linear")


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
