"""The session of a benchmark run: its options, its cases, its progress, its record, and the table at its end."""

import sys
import time
from pathlib import Path

import pytest

# At the end, so that this tree hides nothing that is installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import measure, report, results
from benchmarks.cases import Case, cases

SESSION = pytest.StashKey[measure.Session]()
PROGRESS = pytest.StashKey["Progress"]()
# Of a test that is no case, in the unit of `weight`.
OTHER_WEIGHT = 1e10


def pytest_addoption(parser: pytest.Parser) -> None:
    """--full, --results, --resume and --time-limit."""
    group = parser.getgroup("mtp_ce benchmarks")
    group.addoption("--full", action="store_true", help="every shape: the sweeps over V and H of the plots, too")
    group.addoption(
        "--results", nargs="?", type=Path, const=results.RESULTS, metavar="FOLDER",
        help="write FOLDER/<device>.json; FOLDER is benchmarks/results/ where none is named, else --results=FOLDER",
    )  # fmt: skip
    group.addoption(
        "--resume", action="store_true",
        help="resume the newest run of that file where device, versions, commit and sources are the same",
    )  # fmt: skip
    group.addoption(
        "--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="start no case after this time"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start the clock of --time-limit, and refuse --resume without a file."""
    config.stash[PROGRESS] = Progress(config)
    config.pluginmanager.register(config.stash[PROGRESS])
    if config.getoption("--resume") and not config.getoption("--results"):
        raise pytest.UsageError("--resume needs --results, the folder of the file to resume")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cases of this device, where a test takes one."""
    if "case" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full")
        metafunc.parametrize("case", [*cases(measure.DEVICE.type, full)], ids=str)


def case_of(item: pytest.Item) -> Case | None:
    """Return the case of a test, if it has one."""
    case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    return case if isinstance(case, Case) else None


def weight(item: pytest.Item) -> float:
    """Return about how long a test takes, in elements of logits times the work on each."""
    case = case_of(item)
    return OTHER_WEIGHT if case is None else OTHER_WEIGHT / 2 + case.shape.rows * case.shape.V * (case.shape.D + 300)


# After -k and -m.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases that the resumed run has, and size the rest."""
    run = resumed_run(config)
    known = {results.key(entry) for entry in (*run["cases"], *run["absent"])} if run else set()

    def is_known(item: pytest.Item) -> bool:
        case = case_of(item)
        if case is None:
            return False
        return results.key({"provider": case.provider.name, "pass": case.which, "shape": case.shape.as_dict()}) in known

    done = [item for item in items if is_known(item)]
    config.hook.pytest_deselected(items=done)
    items[:] = [item for item in items if item not in done]
    config.stash[PROGRESS].left = {item.nodeid: weight(item) for item in items}
    config.stash[PROGRESS].count = len(items)


def resumed_run(config: pytest.Config) -> results.Run | None:
    """Return the run that --resume continues."""
    if not config.getoption("--resume"):
        return None
    kind = measure.DEVICE.type
    older = results.read(results.results_path(kind, config.getoption("--results")))
    return results.resumable(older, results.new_run(kind, 1.0))


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> measure.Session:
    """What the cases of this run share; the copy bandwidth is measured before the first."""
    kind, folder = measure.DEVICE.type, pytestconfig.getoption("--results")
    path = results.results_path(kind, folder) if folder else None
    older = results.read(path) if path else []
    run = resumed_run(pytestconfig)
    older = older[:-1] if run else older
    deadline = pytestconfig.stash[PROGRESS].start + pytestconfig.getoption("--time-limit")
    run = run or results.new_run(kind, measure.copy_bandwidth())
    pytestconfig.stash[SESSION] = measure.Session(run, path, older, deadline)
    return pytestconfig.stash[SESSION]


class Progress:
    """A line for every test that ends: which of how many, what it measured, time elapsed, time expected."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.start = time.monotonic()
        self.left: dict[str, float] = {}
        self.count = 0
        self.done = 0.0

    def line(self, test: pytest.TestReport, elapsed: float) -> str:
        """Return the line of a test that has ended."""
        weight = self.left.pop(test.nodeid, 0.0)
        words = dict(test.user_properties).get("measured", test.outcome)
        if test.skipped and isinstance(test.longrepr, tuple):
            words = test.longrepr[2].removeprefix("Skipped: ")
        else:
            # A skipped test takes no time, so the rest is not expected from it.
            self.done += weight
        place = f"[{self.count - len(self.left)}/{self.count}]"
        name = test.nodeid.rpartition("::")[2]
        left = f", about {_minutes(elapsed * sum(self.left.values()) / self.done)} left" if self.done else ""
        return f"{place} {name}: {words}; {_minutes(elapsed)} elapsed{left}"

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Print the line."""
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None and (report.when == "call" or (report.when == "setup" and not report.passed)):
            terminal.write_line(self.line(report, time.monotonic() - self.start))

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Print no dot beside the line."""
        return None if report.failed else (report.outcome, "", "")


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table, last."""
    session = config.stash.get(SESSION, None)
    if session is not None and (session.run["cases"] or session.run["absent"]):
        terminalreporter.section("weighted multi-token cross entropy")
        for line in report.device_section(measure.DEVICE.type, [session.run]):
            terminalreporter.write_line(line)
        if session.path is not None:
            terminalreporter.write_line(f"written to {session.path.name}")
