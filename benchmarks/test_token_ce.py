"""The cross entropy of every row from hidden states, without a gradient: what scorers and evaluation wait for.

    pytest benchmarks --benchmark-only -k token_ce

The ceiling is the one matrix product that makes the logits.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.case import measure
from benchmarks.clock import DEVICE
from benchmarks.plan import Case, cases
from benchmarks.rounds import recorded
from benchmarks.session import Session


@pytest.mark.benchmark(timer=recorded, warmup=False)
@pytest.mark.parametrize("case", [*cases(DEVICE.type, "token_ce")], ids=str)
def test_token_ce(benchmark: BenchmarkFixture, session: Session, case: Case) -> None:
    """One provider, one problem."""
    measure(benchmark, session, case)
