"""The session of a benchmark run: its options, its order, its record, and the table at its end."""

import sys
import time
from pathlib import Path

import pytest

# For the processes that memory is measured in; at the end, so that it hides nothing that is installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import clock, results
from benchmarks.plan import Case
from benchmarks.session import Session
from benchmarks.table import table

SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--results and --time-limit."""
    group = parser.getgroup("mtp_ce benchmarks")
    group.addoption(
        "--results", nargs="?", type=Path, const=results.RESULTS, metavar="FOLDER",
        help="write FOLDER/<device>.json; FOLDER is benchmarks/results/ where none is named",
    )  # fmt: skip
    group.addoption(
        "--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="start no case after this time"
    )


def case_of(item: pytest.Item) -> Case | None:
    """The case that a benchmark is about."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    case = parameters.get("case")
    return case if isinstance(case, Case) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases in the order of their importance, over all paths: see plan.py."""

    def place(item: pytest.Item) -> int:
        case = case_of(item)
        return -1 if case is None else case.place

    items.sort(key=place)


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Session:
    """What the cases of this run share; the copy bandwidth is measured before the first of them."""
    kind = clock.DEVICE.type
    folder = pytestconfig.getoption("--results")
    path = results.results_path(kind, folder) if folder else None
    deadline = time.monotonic() + pytestconfig.getoption("--time-limit")
    run = results.new_run(kind, clock.copy_bandwidth())
    cases = [case for item in request.session.items if (case := case_of(item)) is not None]
    pytestconfig.stash[SESSION] = Session(run, path, deadline, cases)
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
            terminalreporter.write_line(f"written to {session.path.name}")
