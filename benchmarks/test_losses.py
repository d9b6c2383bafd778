"""Weighted multi-token cross entropy of logits and of hidden states, and token_ce: every provider on the same work.

    pytest benchmarks --benchmark-only                 the shapes that matter most, under 5 minutes on two cores
    pytest benchmarks --benchmark-only --full          every shape of the plots
    pytest benchmarks --benchmark-only --results       also written to benchmarks/results/<device>.json
    pytest benchmarks --benchmark-only -k "logits and bf16 and both"

Of the linear path forward and backward are timed together: some providers compute the gradients in forward, others
compute the logits again in backward.
"""

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Case
from benchmarks.measure import Session, clock


@pytest.mark.benchmark(timer=clock)
def test_loss(
    benchmark: BenchmarkFixture, session: Session, case: Case, record_property: Callable[[str, object], None]
) -> None:
    """One provider, one pass, one shape."""
    record_property("measured", session.measure(case, benchmark))
