"""The share of a linear call, forward and backward, that its cross-entropy kernel takes; the rest is products.

    pytest benchmarks --benchmark-only -k ce_share

Each launch of the kernel is timed where it stands, between the products, and so is the whole call: on a GPU by events,
which say nothing of the host. On a CPU the kernel is the function of mtp_ce/ops/cpu.py.
"""

import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import plan, resume
from benchmarks.clock import DEVICE, HAS_GPU, clock, cool_caches
from benchmarks.provider import AbsentError
from benchmarks.providers import BY_NAME
from benchmarks.rounds import recorded, replay
from benchmarks.session import Session
from benchmarks.shapes import Inputs, Shape
from benchmarks.targets import LINEAR
from mtp_ce.kernels import forward_backward
from mtp_ce.ops import cpu

# Where mtp_ce/ops/chunks.py finds the kernel when it is called.
KERNEL = (forward_backward, "launch_forward_backward") if HAS_GPU else (cpu, "forward_backward")
SHAPES = LINEAR if HAS_GPU else plan.summary("cpu", "linear")[:1]
ROUNDS = 10 if HAS_GPU else 3


def seconds(inputs: Inputs) -> tuple[float, float]:
    """Of one call with its gradients: all launches of the kernel together, and the whole."""
    launch: Callable[..., None] = getattr(*KERNEL)
    moments: list[tuple[Any, Any]] = []

    def timed_launch(*arguments: Any, **options: Any) -> None:
        start = clock()
        launch(*arguments, **options)
        moments.append((start, clock()))

    values = inputs.fresh()
    cool_caches()
    with mock.patch.object(*KERNEL, timed_launch):
        start = clock()
        gradients = torch.autograd.grad(BY_NAME["linear"]["mtp_ce"].run(*values, *inputs.rest), values)
        end = clock()
    del gradients
    return sum(after - before for before, after in moments), end - start


@pytest.mark.place(0)
@pytest.mark.benchmark(group="share of the cross-entropy kernel", timer=recorded, warmup=False)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ce_share(benchmark: BenchmarkFixture, session: Session, shape: Shape) -> None:
    """One shape; what pytest-benchmark shows is the kernel's part of a call."""
    if resume.has_ce_share(shape, session.resumed, DEVICE.type):
        pytest.skip("it is in the results")
    try:
        inputs = session.problem(shape).inputs
    except AbsentError as absent:
        pytest.skip(str(absent))
    # The first call compiles.
    found = [seconds(inputs) for _ in range(1 if benchmark.disabled else ROUNDS + 1)]
    found = found[1:] or found
    replay([kernel for kernel, _ in found])
    benchmark.pedantic(lambda: None, rounds=len(found))
    if benchmark.disabled:
        return
    share = round(statistics.median(kernel / whole for kernel, whole in found), 4)
    benchmark.extra_info["share"] = share
    session.run.setdefault("ce_share", {})[str(shape)] = share
    session.save()
