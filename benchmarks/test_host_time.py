"""Host time of a call, and of one with its backward: what a step pays before the device has done anything.

    pytest benchmarks --benchmark-only -k host_time

The tensors are so small that a GPU is done before the host is. On a CPU the work itself is in the time.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.measure import DEVICE, Session
from mtp_ce import weighted_mtp_ce, weighted_mtp_linear_ce

B, S, H, V, D = 1, 4, 4, 512, 64
ROUNDS, CALLS = 100, 10


def step(path: str, which: str, compiled: bool) -> Callable[[], None]:
    """Return one call of a path, with its backward where `which` is "both"."""

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


@pytest.mark.benchmark(group="host time")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("which", ["forward", "both"])
@pytest.mark.parametrize("path", ["logits", "linear"])
def test_host_time(
    benchmark: BenchmarkFixture,
    session: Session,
    record_property: Callable[[str, object], None],
    path: str,
    which: str,
    compiled: bool,
) -> None:
    """One path, eager or under torch.compile; the median is recorded."""
    name = f"{path} {which} {'compiled' if compiled else 'eager'}"
    if name in session.run["host_us"]:
        pytest.skip("in the resumed run")
    session.skip_after_deadline()
    torch._dynamo.reset()
    # The warm-up round compiles.
    benchmark.pedantic(step(path, which, compiled), rounds=ROUNDS, iterations=CALLS, warmup_rounds=1)
    if benchmark.disabled:
        return
    microseconds = round(benchmark.stats.stats.median * 1e6, 1)
    session.run["host_us"][name] = microseconds
    session.save()
    record_property("measured", f"{microseconds:.0f} us")
