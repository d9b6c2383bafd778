"""Weighted multi-token cross entropy of given logits: forward, backward, and both.

    pytest benchmarks --benchmark-only                 the table
    pytest benchmarks --benchmark-only --results       and benchmarks/results/<device>.json
    pytest benchmarks --benchmark-only -k "bf16 and both and mtp_ce"

Every provider does the same work on the same logits, and passes its oracle check first. Backward is timed alone on a
graph that was built outside. The providers of a shape and pass are timed one after the other, so that a change of the
machine's load hits neighbours alike.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import results
from benchmarks.clock import HAS_GPU, clock, cool_caches, timed
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.session import AbsentError, Problem, Session
from benchmarks.shapes import CPU_SHAPES, GPU_SHAPES, Shape
from mtp_ce.kernels import backward, forward

SHAPES = GPU_SHAPES if HAS_GPU else CPU_SHAPES
PASSES = ("forward", "backward", "both")
# Seconds spent on a case in rounds, and the least and the most rounds.
SECONDS, LEAST, MOST = (0.3, 10, 50) if HAS_GPU else (0.8, 3, 10)

Call = Callable[..., Any]


def calls(provider: Provider, which: str, problem: Problem) -> tuple[Call, Call]:
    """setup, which prepares the arguments outside the timed region, and the timed function of them."""
    inputs = problem.inputs

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        return provider.loss(logits, inputs.labels, inputs.token_weights)

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        logits = inputs.fresh_logits()
        arguments = (logits, loss_of(logits)) if which == "backward" else (logits,)
        cool_caches()
        return arguments, {}

    def both(logits: torch.Tensor) -> Any:
        return torch.autograd.grad(loss_of(logits), logits)

    def backward_alone(logits: torch.Tensor, loss: torch.Tensor) -> Any:
        return torch.autograd.grad(loss, logits)

    by_pass: dict[str, Call] = {"forward": loss_of, "backward": backward_alone, "both": both}
    return setup, by_pass[which]


def bytes_moved(which: str, shape: Shape) -> int:
    """Bytes that the work must move, by the kernels' own account."""
    itemsize = shape.torch_dtype.itemsize
    down = forward.traffic(shape.live_rows, shape.B * shape.S, shape.H, shape.V, itemsize)
    back = backward.traffic(shape.live_rows, shape.rows, shape.V, itemsize)
    return sum({"forward": down, "backward": back, "both": down + back}[which])


@pytest.mark.benchmark(timer=clock, disable_gc=True, warmup=False)
@pytest.mark.parametrize(
    ("shape", "which", "provider"),
    [
        pytest.param(shape, which, provider, id=f"{shape}-{which}-{provider.name}")
        for shape in SHAPES
        for which in PASSES
        for provider in PROVIDERS
    ],
)
def test_weighted_loss_of_logits(
    benchmark: BenchmarkFixture, session: Session, shape: Shape, which: str, provider: Provider
) -> None:
    """One provider, one pass, one problem."""
    benchmark.group = f"{shape} {which}"
    try:
        problem = session.problem(shape)
        errors, peak = session.qualify(provider, problem)
    except AbsentError as absent:
        session.add("absent", provider, which, shape, reason=str(absent))
        pytest.skip(str(absent))

    setup, timed_call = calls(provider, which, problem)
    rounds = min(max(int(SECONDS / timed(timed_call, *setup()[0])), LEAST), MOST)
    benchmark.extra_info["peak_mib_above_inputs"] = round(peak.of(which) / 2**20, 1)
    benchmark.pedantic(timed_call, setup=setup, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable
        return
    moved = bytes_moved(which, shape)
    time = results.timing(benchmark.stats.stats.data, moved, session.run["copy_bytes_per_s"])
    benchmark.extra_info["share_of_copy"] = time["share_of_copy"]
    session.add(
        "cases",
        provider,
        which,
        shape,
        **time,
        peak_bytes=peak.of(which),
        gradient_bytes=shape.gradient_bytes,
        **errors.as_dict(),
    )
