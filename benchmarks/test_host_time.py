"""Host time of a call, and of one with its backward: what a step pays before the device has done anything.

    pytest benchmarks --benchmark-only -k host_time

The tensors are so small that a GPU is done before the host is. It is waited for between rounds, never in one: 10 calls
fit into its queue. On a CPU the work itself is in the time.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import resume
from benchmarks.clock import DEVICE, HAS_GPU
from benchmarks.provider import AbsentError
from benchmarks.rounds import recorded, replay
from benchmarks.session import Session
from mtp_ce import weighted_mtp_ce, weighted_mtp_linear_ce

B, S, H, V, D = 1, 4, 4, 512, 64
ROUNDS, CALLS = 100, 10


def step(path: str, which: str, compiled: bool) -> Callable[[], None]:
    """One call of a path, and its backward where `which` is "both"."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE).requires_grad_()

    function, leaves = {
        "logits": (weighted_mtp_ce, [leaf(B, S, H, V)]),
        "linear": (weighted_mtp_linear_ce, [leaf(B, S, H, D), leaf(V, D)]),
    }[path]
    labels, weights = torch.randint(V, (B, S), device=DEVICE), torch.rand(B, S, device=DEVICE)

    def loss(*leaves: Tensor) -> Tensor:
        return function(*leaves, labels, weights)

    evaluate = torch.compile(loss, fullgraph=True) if compiled else loss

    def run() -> None:
        result = evaluate(*leaves)
        if which == "both":
            torch.autograd.grad(result, leaves)

    return run


def wait() -> None:
    """For the device."""
    if HAS_GPU:
        torch.cuda.synchronize()


@pytest.mark.benchmark(group="host time", timer=recorded, warmup=False)
@pytest.mark.parametrize(
    "compiled",
    [
        pytest.param(False, id="eager"),
        # It compiles for seconds, for a time that no ratio is of.
        pytest.param(True, id="compiled", marks=pytest.mark.place(3)),
    ],
)
@pytest.mark.parametrize("which", ["forward", "both"])
@pytest.mark.parametrize("path", ["logits", "linear"])
def test_host_time(benchmark: BenchmarkFixture, session: Session, path: str, which: str, compiled: bool) -> None:
    """One path, as it is or under torch.compile."""
    name = f"{path} {which} {'compiled' if compiled else 'eager'}"
    if resume.has_host_time(name, session.resumed, DEVICE.type):
        pytest.skip("it is in the results")
    try:
        session.look_at_the_time()
    except AbsentError as absent:
        pytest.skip(str(absent))
    torch._dynamo.reset()
    run = step(path, which, compiled)
    seconds = []
    for _ in range(1 if benchmark.disabled else ROUNDS + 1):
        wait()
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        seconds.append((time.perf_counter() - start) / CALLS)
    wait()
    # The first round compiles.
    seconds = seconds[1:] or seconds
    replay(seconds)
    benchmark.pedantic(lambda: None, rounds=len(seconds))
    if benchmark.disabled:
        return
    microseconds = round(statistics.median(seconds) * 1e6, 1)
    benchmark.extra_info["median_us"] = microseconds
    session.run.setdefault("host_us", {})[name] = microseconds
    session.save()
