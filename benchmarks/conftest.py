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
KIND = measure.DEVICE.type
START = time.monotonic()


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
    """Show progress, and refuse --resume without a file."""
    if config.getoption("--resume") and not config.getoption("--results"):
        raise pytest.UsageError("--resume needs --results, the folder of the file to resume")
    config.pluginmanager.register(Progress(config))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize a test of cases with those of this device."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", [*cases(KIND, metafunc.config.getoption("--full"))], ids=str)


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> measure.Session:
    """What the cases of this run share; the copy bandwidth is measured before the first."""
    folder = pytestconfig.getoption("--results")
    path = results.results_path(KIND, folder) if folder else None
    run, older = results.new_run(KIND, measure.copy_bandwidth()), results.read(path) if path else []
    if pytestconfig.getoption("--resume") and results.is_resumable(older, run):
        run = older.pop()
    deadline = START + pytestconfig.getoption("--time-limit")
    pytestconfig.stash[SESSION] = measure.Session(run, path, older, deadline)
    return pytestconfig.stash[SESSION]


class Progress:
    """A line for every test that ends: which of how many, what it measured, time elapsed, time expected."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.left: dict[str, float] = {}
        self.count = 0
        self.done = 0.0

    # After -k and -m.
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Estimate the time of each test, in elements of logits times the work on each."""
        for item in items:
            case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
            elements = case.shape.rows * case.shape.V * (case.shape.D + 300) if isinstance(case, Case) else 5e9
            self.left[item.nodeid] = 5e9 + elements
        self.count = len(items)

    def line(self, test: pytest.TestReport, elapsed: float) -> str:
        """Return the line of a test that has ended."""
        weight = self.left.pop(test.nodeid, 0.0)
        words = dict(test.user_properties).get("measured", test.outcome)
        if test.skipped and isinstance(test.longrepr, tuple):
            words = test.longrepr[2].removeprefix("Skipped: ")
        else:
            # A skipped test takes no time, so the rest is not estimated from it.
            self.done += weight
        left = f", about {_minutes(elapsed * sum(self.left.values()) / self.done)} left" if self.done else ""
        name = test.nodeid.rpartition("::")[2]
        return f"[{self.count - len(self.left)}/{self.count}] {name}: {words}; {_minutes(elapsed)} elapsed{left}"

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Print the line."""
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None and (report.when == "call" or (report.when == "setup" and not report.passed)):
            terminal.write_line(self.line(report, time.monotonic() - START))

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
    if session is not None and session.run["cases"]:
        terminalreporter.section("weighted multi-token cross entropy")
        for line in report.device_section(KIND, [session.run]):
            terminalreporter.write_line(line)
        if session.path is not None:
            terminalreporter.write_line(f"written to {session.path.name}")
