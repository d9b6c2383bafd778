"""The session of a benchmark run: its options, its order, its record, and the table at its end."""

import sys
from pathlib import Path

import pytest

# For the processes that memory is measured in; at the end, so that it hides nothing that is installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import clock, results, resume
from benchmarks.plan import Case
from benchmarks.session import Session
from benchmarks.table import table

SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--results, --resume and --time-limit."""
    group = parser.getgroup("mtp_ce benchmarks")
    group.addoption(
        "--results", nargs="?", type=Path, const=results.RESULTS, metavar="FOLDER",
        help="write FOLDER/<device>.json; FOLDER is benchmarks/results/ where none is named, else --results=FOLDER",
    )  # fmt: skip
    group.addoption(
        "--resume", action="store_true", help="leave out what that file has of this device, these sources and versions"
    )
    group.addoption(
        "--time-limit", type=float, default=float("inf"), metavar="SECONDS",
        help="start nothing that takes seconds after this time, counted from the start of the process",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Refuse what can't be resumed."""
    if config.getoption("--resume") and not config.getoption("--results"):
        raise pytest.UsageError("--resume needs --results, the folder whose file is gone on with")


def resumed(config: pytest.Config) -> list[results.Run]:
    """The runs that this one goes on with; none without --resume."""
    if not config.getoption("--resume"):
        return []
    return results.read(results.results_path(clock.DEVICE.type, config.getoption("--results")))


def case_of(item: pytest.Item) -> Case | None:
    """The case that a benchmark is about."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    case = parameters.get("case")
    return case if isinstance(case, Case) else None


def place_of(item: pytest.Item) -> int:
    """Where a benchmark stands among the others; those of one place keep the order of their files."""
    case, mark = case_of(item), item.get_closest_marker("place")
    if case is not None:
        return case.place
    return -1 if mark is None else int(mark.args[0])


# After -k and -m, which decide what is compared with what.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is left to measure, in the order of its importance over all paths: see plan.py."""
    cases = [case for item in items if (case := case_of(item)) is not None]
    places = resume.left(cases, resumed(config), clock.DEVICE.type)
    done = [item for item in items if (case := case_of(item)) is not None and case not in places]
    config.hook.pytest_deselected(items=done)
    items[:] = [item for item in items if item not in done]
    for item in items:
        if (case := case_of(item)) is not None:
            item.callspec.params["case"] = case._replace(place=places[case])
    items.sort(key=place_of)


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Session:
    """What the cases of this run share; the copy bandwidth is measured before the first of them."""
    kind = clock.DEVICE.type
    folder = pytestconfig.getoption("--results")
    path = results.results_path(kind, folder) if folder else None
    deadline = clock.deadline(pytestconfig.getoption("--time-limit"))
    run = results.new_run(kind, clock.copy_bandwidth())
    cases = [case for item in request.session.items if (case := case_of(item)) is not None]
    pytestconfig.stash[SESSION] = Session(run, path, deadline, cases, resumed(pytestconfig))
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
