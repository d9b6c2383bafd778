"""The n-th file-system call of a short run fails, or the process dies there; nothing is lost, and nothing is silent.

Held of every fault: the disturbed run does not hang, prints no traceback, and either trains the same model or ends with
one line. The same command again, on a disk that works, ends with the parameters and the evaluation of a run that nobody
disturbed, bit for bit, and leaves no half-written file of the process that died.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

# How a warning on stderr begins; it is not the one line of an error.
WARNINGS = ("warning: ", "cache entry ")
# How many of about 3,000 cases the slow tier runs; the environment variable MTP_FAULTS names another number.
FAULTS = 600
ERRORS = ("ENOSPC", "EIO", "EROFS", "kill -9", "power cut")


@dataclass(frozen=True)
class Case:
    """One fault of one scenario.

    Attributes:
        scenario: what stands on the disk when the run begins; a name in `scenarios`.
        kind: of the call.
        n: which of its kind.
        error: what happens at it.
        site: the call's path without what differs from run to run.
    """

    scenario: str
    kind: str
    n: int
    error: str
    site: str


@dataclass
class Outcome:
    """What happened in a case: the way it took, and what is wrong with it."""

    way: str
    wrong: list[str] = field(default_factory=list)


def site(call: Any) -> str:
    """Return a call's path without keys, steps and random names."""
    path = re.sub(r"(\.mtp_|/\.tmp)\w{6,8}(?=/|$)", r"\1*", call.path)
    return re.sub(r"\d{5,}", "N", re.sub(r"[0-9a-f]{32}", "KEY", path))


def choose(scenario: str, calls: Sequence[Any], draw: random.Random) -> list[Case]:
    """Return a case for every kind of call, place and error; which of several calls of one place is drawn."""
    places: dict[tuple[str, str], list[int]] = defaultdict(list)
    counts: Counter[str] = Counter()
    for call in calls:
        counts[call.kind] += 1
        places[call.kind, site(call)].append(counts[call.kind])
    return [
        Case(scenario, kind, draw.choice(numbers), error, where)
        for (kind, where), numbers in places.items()
        for error in (ERRORS if kind != "read" else ("EIO",))
    ]


def draw_evenly(cases: Sequence[Case], draw: random.Random) -> list[Case]:
    """Return the cases in random order, but so that scenarios, kinds of call and errors take turns."""
    groups: dict[tuple[str, str, str], list[Case]] = defaultdict(list)
    for case in draw.sample(cases, len(cases)):
        groups[case.scenario, case.kind, case.error].append(case)
    turns = [(turn, case) for group in groups.values() for turn, case in enumerate(group)]
    return [case for _, case in sorted(turns, key=lambda pair: pair[0])]


def cut_power(disk: Path, calls: Sequence[Any], draw: random.Random) -> None:
    """Lose what was written and not flushed, as file systems do that put names on the disk before contents."""
    written: set[str] = set()
    for call in calls[:-1] if calls[-1].kind == "fsync" else calls:
        match call.kind:
            case "open" | "write" | "truncate" | "mmap":
                written.add(call.path)
            case "fsync":
                written.discard(call.path)
            case "rename" if call.what == "call":
                moved = {path for path in written if path == call.path or path.startswith(f"{call.path}/")}
                written = (written - moved) | {call.to + path[len(call.path) :] for path in moved}
    for path in sorted(written):
        file = disk / path
        if file.is_file() and (size := file.stat().st_size):
            how = draw.choice(("empty", "half", "zeros"))
            content = file.read_bytes()[: {"empty": 0, "half": size // 2, "zeros": size}[how]]
            file.write_bytes(bytes(size) if how == "zeros" else content)


def strays(disk: Path) -> list[str]:
    """Return what processes that ended have left: names that begin with a dot, but manifests."""
    return sorted(str(path.relative_to(disk)) for path in disk.rglob(".*") if path.name != ".mtp_files.json")


def spoken(answer: Any) -> list[str]:
    """Return what is wrong with how a command that was not killed ended."""
    if answer.code is None:
        return ["stuck"]
    if "Traceback" in answer.printed + answer.complained:
        last = [line for line in answer.complained.splitlines() if line and not line.startswith(" ")]
        return [f"traceback: {last[-1][:300] if last else ''}"]
    errors = [line for line in answer.complained.splitlines() if not line.startswith(WARNINGS)]
    if len(errors) != (answer.code != 0):
        return [f"{len(errors)} lines with exit {answer.code}: {answer.complained[:300]!r}"]
    return [] if answer.code in (0, 1, 2) else [f"exit {answer.code}"]


def attempt(server: Any, short: Any, case: Case, where: Path, disk: Path | None) -> Outcome:
    """Run a case, and the same command again without a fault."""
    short.place(where, disk)
    out = where / "disk" / "out"
    first = server.ask(where, *short.command, fault=(case.kind, case.n, case.error))
    if not any(call.what == "struck" for call in first.calls):
        return Outcome("not reached")
    wrong: list[str] = []
    if first.code == -9 and case.error in ("kill -9", "power cut"):
        way = "killed"
        if case.error == "power cut":
            cut_power(where / "disk", first.calls, random.Random(str(case)))
    else:
        wrong += [f"disturbed: {fault}" for fault in spoken(first)]
        way = {0: "went through", 1: "one line", 2: "one line"}.get(first.code, "died")
        if first.code == 0 and (other := short.differs(out)):
            # The report is not training: a run may finish without it, and says so.
            wrong += [f"disturbed: exit 0 with another {', '.join(other)}"] * (other != ["evaluation.json"])
    second = server.ask(where, *short.command)
    wrong += [f"again: {fault}" for fault in spoken(second)]
    if second.code:
        wrong.append(f"again: exit {second.code}: {second.complained.strip()[-300:]}")
    elif other := short.differs(out):
        wrong.append(f"again: exit 0 with another {', '.join(other)}")
    if not second.code and (left := strays(where / "disk")):
        wrong.append(f"again: left {', '.join(re.sub(r'[0-9a-f]{32}', 'KEY', name) for name in left[:3])}")
    return Outcome(way, wrong)


def table(outcomes: dict[Case, Outcome]) -> str:
    """Format the outcomes: a line for each kind of call and error."""
    lines = [f"{'call':<10}{'fault':<11}{'cases':>6}  outcome"]
    rows: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for case, outcome in outcomes.items():
        rows[case.kind, case.error][outcome.way if not outcome.wrong else "WRONG"] += 1
    for (kind, error), ways in sorted(rows.items()):
        ways_text = ", ".join(f"{way} {count}" for way, count in ways.most_common())
        lines.append(f"{kind:<10}{error:<11}{ways.total():>6}  {ways_text}")
    wrong = sum(bool(outcome.wrong) for outcome in outcomes.values())
    return "\n".join([*lines, f"{len(outcomes)} faults, {wrong} of them wrong"])


class Scenarios:
    """What stands on the disk when a run begins, by name; each is made when it is first asked for.

    new       nothing
    resumed   a run that was killed while it renamed its second checkpoint, and its caches
    cached    the caches of a run that finished; its folder is gone
    """

    names = ("new", "resumed", "cached")

    def __init__(self, server: Any, short: Any, temporary: pytest.TempPathFactory) -> None:
        self._server, self._short, self._temporary = server, short, temporary
        self._made: dict[str, tuple[Path | None, list[Any]]] = {"new": (None, short.answer.calls)}

    def __getitem__(self, name: str) -> tuple[Path | None, list[Any]]:
        """Return the disk, and the calls of a run that begins with it."""
        if name not in self._made:
            before, where = (self._temporary.mktemp(name) for _ in range(2))
            if name == "resumed":
                disk = self._short.stop(before, "out/checkpoints/step-00000004")
            else:
                disk = before / "disk"
                shutil.copytree(self._short.where / "disk" / "cache", disk / "cache")
            self._short.place(where, disk)
            answer = self._server.ask(where, *self._short.command, fault=("open", 0, "EIO"))
            found = (answer.code, answer.complained, self._short.differs(where / "disk" / "out"))
            assert found == (0, "", []), answer
            self._made[name] = disk, answer.calls
        return self._made[name]


@pytest.fixture(scope="session")
def scenarios(server, short, tmp_path_factory) -> Scenarios:
    return Scenarios(server, short, tmp_path_factory)


def run_all(servers: Sequence[Any], short: Any, cases: Sequence[Case], scenarios: Any, where: Path) -> dict[Any, Any]:
    """Run cases, each server one at a time."""
    free: SimpleQueue[Any] = SimpleQueue()
    for server in servers:
        free.put(server)

    def one(number: int) -> Outcome:
        server, folder = free.get(), where / str(number)
        try:
            return attempt(server, short, cases[number], folder, scenarios[cases[number].scenario][0])
        finally:
            free.put(server)
            shutil.rmtree(folder, ignore_errors=True)

    with ThreadPoolExecutor(len(servers)) as threads:
        return dict(zip(cases, threads.map(one, range(len(cases))), strict=True))


def assert_all_right(outcomes: dict[Case, Outcome]) -> None:
    """Fail with what is wrong, most frequent first."""
    wrong: dict[str, list[Case]] = defaultdict(list)
    for case, outcome in outcomes.items():
        for fault in outcome.wrong:
            wrong[fault].append(case)
    listed = [
        f"{len(cases):>4} x {fault}\n" + "\n".join(f"         {case}" for case in cases[:4])
        for fault, cases in sorted(wrong.items(), key=lambda item: -len(item[1]))
    ]
    assert not listed, "\n".join(listed)


def test_a_run_survives_a_fault_at_a_call_of_every_kind(server, short, scenarios, tmp_path):
    """Of the matrix below: one for each kind of call that a resumed run makes, and a new run that is killed."""
    draw = random.Random(0)
    cases = choose("resumed", scenarios["resumed"][1], draw)
    sample = [draw.choice([case for case in cases if case.kind == kind]) for kind in sorted({c.kind for c in cases})]
    sample += [draw.choice([c for c in choose("new", short.answer.calls, draw) if c.error == "kill -9"])]
    outcomes = run_all([server], short, sample, scenarios, tmp_path)
    assert {outcome.way for outcome in outcomes.values()} >= {"killed", "one line"}
    assert_all_right(outcomes)


@pytest.mark.slow
def test_a_run_survives_a_fault_at_any_call(servers, server, short, scenarios, tmp_path, capsys):
    """In a new run, a resumed one and one with caches: each fault at each kind of call, at places drawn evenly."""
    draw = random.Random(16)
    cases = draw_evenly([case for name in scenarios.names for case in choose(name, scenarios[name][1], draw)], draw)
    cases = cases[: int(os.environ.get("MTP_FAULTS", FAULTS))]
    outcomes = run_all([server, servers()], short, cases, scenarios, tmp_path)
    with capsys.disabled():
        print(f"\n{table(outcomes)}")
    assert sum(outcome.way != "not reached" for outcome in outcomes.values()) >= 200
    assert_all_right(outcomes)
