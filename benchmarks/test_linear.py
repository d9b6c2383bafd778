"""Weighted multi-token cross entropy of hidden states and the output layer's weight, forward and backward together.

    pytest benchmarks --benchmark-only -k linear

Forward alone would compare nothing: some providers compute the gradients in it, others all over again in backward. The
ceiling is the three matrix products that nobody can leave out.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.case import measure
from benchmarks.clock import DEVICE
from benchmarks.plan import Case, cases
from benchmarks.rounds import recorded
from benchmarks.session import Session


@pytest.mark.benchmark(timer=recorded, warmup=False)
@pytest.mark.parametrize("case", [*cases(DEVICE.type, "linear")], ids=str)
def test_linear(benchmark: BenchmarkFixture, session: Session, case: Case) -> None:
    """One provider, one problem."""
    measure(benchmark, session, case)
