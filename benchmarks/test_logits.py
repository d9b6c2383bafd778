"""Weighted multi-token cross entropy of given logits: forward, backward, and both.

    pytest benchmarks --benchmark-only                 the table
    pytest benchmarks --benchmark-only --results       and benchmarks/results/<device>.json
    pytest benchmarks --benchmark-only -k "logits and bf16 and both and mtp_ce"

Every provider does the same work on the same logits. Backward is timed alone on a graph that was built outside. The
ceiling is a copy of as many bytes as the loss must move.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.case import measure
from benchmarks.clock import DEVICE
from benchmarks.plan import Case, cases
from benchmarks.rounds import recorded
from benchmarks.session import Session


@pytest.mark.benchmark(timer=recorded, warmup=False)
@pytest.mark.parametrize("case", [*cases(DEVICE.type, "logits")], ids=str)
def test_logits(benchmark: BenchmarkFixture, session: Session, case: Case) -> None:
    """One provider, one pass, one problem."""
    measure(benchmark, session, case)
