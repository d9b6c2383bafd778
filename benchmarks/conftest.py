"""The session of a benchmark run: its options, its record, and the table at its end."""

import sys
import time
from pathlib import Path

import pytest

# For the processes that memory is measured in; at the end, so that it hides nothing that is installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import clock, results
from benchmarks.session import Session
from benchmarks.table import table

SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--results and --time-limit."""
    group = parser.getgroup("mtp_ce benchmarks")
    group.addoption("--results", action="store_true", help="write benchmarks/results/<device>.json")
    group.addoption(
        "--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="start no case after this time"
    )


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Session:
    """What the cases of this run share; the copy bandwidth is measured before the first of them."""
    kind = clock.DEVICE.type
    path = results.results_path(kind) if pytestconfig.getoption("--results") else None
    deadline = time.monotonic() + pytestconfig.getoption("--time-limit")
    pytestconfig.stash[SESSION] = Session(results.new_run(kind, clock.copy_bandwidth()), path, deadline)
    return pytestconfig.stash[SESSION]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table, last."""
    session = config.stash.get(SESSION, None)
    if session is not None and (session.run["cases"] or session.run["absent"]):
        terminalreporter.section("weighted multi-token cross entropy")
        for line in table(session.run):
            terminalreporter.write_line(line)
        if session.path is not None:
            terminalreporter.write_line(f"written to benchmarks/results/{session.path.name}")
