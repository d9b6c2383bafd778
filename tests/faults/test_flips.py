"""A bit of a kept file is flipped, or the file is cut or zeroed: its next use says so, or its result is the same.

Every file that a run leaves is damaged, in every folder: caches of rows, tokens, tokenizers and stages, checkpoints,
models, and the records beside them. Then a command uses it. One that ends well with another result is silent.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

FLIPS = 6
# How a warning on stderr begins.
WARNINGS = ("warning: ", "cache entry ")


@dataclass(frozen=True)
class Use:
    """A way to use what is kept.

    Attributes:
        disk: a disk with the files.
        files: those on it that this command reads, as a pattern.
        command: program and arguments.
        output: what the command writes, relative to the disk; "" if it writes nothing.
    """

    disk: Path
    files: str
    command: tuple[str, ...]
    output: str

    def found(self, short: Any, where: Path, answer: Any) -> dict[str, Any]:
        """Return everything that the command has computed or read, from its files and its screen."""
        lines = r"^(?:inputs|run|tokens|rows|corpus|reference .*reused|weights .*reused).*"
        shown = re.findall(lines, answer.printed, re.M)
        if not self.output:
            return {"shown": shown}
        output = where / "disk" / self.output
        records: list[Any] = []
        for line in (output / "metrics.jsonl").read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
                records.append({key: value for key, value in record.items() if key != "time" and "perf" not in key})
            except ValueError:
                records.append(line)
        return {**short.result_of(output), "metrics": records, "shown": shown}


@dataclass(frozen=True)
class Damage:
    """What is done to a file."""

    use: str
    file: str
    how: str
    seed: int

    def apply(self, disk: Path) -> None:
        """Damage the file in place, with its times as they were."""
        path, draw = disk / self.file, random.Random(str(self))
        content = bytearray(path.read_bytes())
        if self.how == "flip":
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif self.how == "zeros":
            content = bytearray(len(content))
        else:
            content = content[: draw.randrange(len(content))]
        path.write_bytes(content)


@pytest.fixture(scope="session")
def uses(short, tmp_path_factory) -> dict[str, Use]:
    """What reads files that a finished run has kept."""
    done = short.where / "disk"
    cached = tmp_path_factory.mktemp("caches") / "disk"
    shutil.copytree(done / "cache", cached / "cache")
    evaluate = ("eval-mtp", "disk/out", "--output", "disk/eval")
    return {
        **{
            kind: Use(cached, f"cache/mtp_ce/{kind}/**/*", ("read-inputs", "recipe.yaml"), "")
            for kind in ("rows", "tokens", "tokenizers")
        },
        "stages": Use(cached, "cache/mtp_ce/stages/**/*", short.command, "out"),
        "finished run": Use(done, "out/**/*", evaluate, "eval"),
        "finished run, resumed": Use(done, "out/r*", short.command, ""),
    }


def damages(name: str, use: Use, flips: int = FLIPS) -> list[Damage]:
    """Return what is done to the files that a use reads."""
    files = [
        str(path.relative_to(use.disk))
        for path in sorted(use.disk.glob(use.files))
        if path.is_file() and path.stat().st_size
    ]
    ways = [("flip", seed) for seed in range(flips)] + [("zeros", 0), ("cut", 0)]
    return [Damage(name, file, how, seed) for file in files for how, seed in ways]


def outcome(answer: Any, found: Any, expected: Any, before: str) -> str:
    """Return "harmless", "detected", or what is wrong."""
    if answer.code is None:
        return "WRONG: stuck"
    if "Traceback" in answer.printed + answer.complained:
        return f"WRONG: traceback: {answer.complained.strip().splitlines()[-1]}"
    if answer.code:
        lines = answer.complained.count("\n")
        return "refused" if answer.code in (1, 2) and lines == 1 else f"WRONG: exit {answer.code}, {lines} lines"
    if [line for line in answer.complained.splitlines() if not line.startswith(WARNINGS)]:
        return f"WRONG: exit 0 and {answer.complained[:200]!r}"
    silent = not answer.complained and said(answer.printed) == said(before)
    different = {name for name in expected if found.get(name) != expected[name]}
    if not silent:
        # A stage that ran again is not shown as reused. Nothing can make damaged lines of earlier steps again.
        different -= {"metrics"} | ({"shown"} if {*found["shown"]} <= {*expected["shown"]} else set())
    if different:
        return f"WRONG: silent, another {', '.join(sorted(different))}"
    return "harmless" if silent else "said"


def said(printed: str) -> list[str]:
    """Return the lines of a command without what differs from run to run: speed, dates, and where it ran."""
    return [re.sub(r"[\d,]+ tokens/s.*|\d\d:\d\d:\d\d.*|/\S*(?=/disk/)", "", line) for line in printed.splitlines()]


def try_all(servers: Sequence[Any], short: Any, uses: dict[str, Use], tries: Sequence[Damage], where: Path) -> Any:
    """Return the outcome of each damage."""
    expected, free = {}, SimpleQueue()
    for name in {damage.use for damage in tries}:
        folder = short.place(where / name.replace(" ", "-"), uses[name].disk)
        answer = servers[0].ask(folder, *uses[name].command)
        assert (answer.code, answer.complained) == (0, ""), answer
        expected[name] = uses[name].found(short, folder, answer), answer.printed
    for server in servers:
        free.put(server)

    def one(number: int) -> str:
        damage = tries[number]
        server, use, folder = free.get(), uses[damage.use], where / str(number)
        try:
            short.place(folder, use.disk)
            damage.apply(folder / "disk")
            answer = server.ask(folder, *use.command)
            found = use.found(short, folder, answer) if answer.code == 0 else None
            return outcome(answer, found, *expected[damage.use])
        finally:
            free.put(server)
            shutil.rmtree(folder, ignore_errors=True)

    with ThreadPoolExecutor(len(servers)) as threads:
        return dict(zip(tries, threads.map(one, range(len(tries))), strict=True))


def table(outcomes: dict[Damage, str]) -> str:
    """Format the outcomes: a line for each use and damage."""
    rows: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for damage, way in outcomes.items():
        rows[damage.use, damage.how][way.partition(":")[0]] += 1
    lines = [f"{'files':<24}{'damage':<8}{'cases':>6}  outcome"]
    for (use, how), ways in sorted(rows.items()):
        listed = ", ".join(f"{way} {count}" for way, count in ways.most_common())
        lines.append(f"{use:<24}{how:<8}{ways.total():>6}  {listed}")
    wrong = sum(way.startswith("WRONG") for way in outcomes.values())
    return "\n".join([*lines, f"{len(outcomes)} damaged files, {wrong} of them wrong"])


def assert_none_silent(outcomes: dict[Damage, str]) -> None:
    """Fail with what is wrong, most frequent first."""
    wrong: dict[str, list[Damage]] = defaultdict(list)
    for damage, way in outcomes.items():
        if way.startswith("WRONG"):
            name = re.sub(r"[0-9a-f]{32}", "KEY", damage.file)
            wrong[f"{damage.use}: {re.sub(r'[0-9]{5,}', 'N', name)}: {way}"].append(damage)
    listed = [
        f"{len(cases):>4} x {fault}   {Counter(case.how for case in cases)}"
        for fault, cases in sorted(wrong.items(), key=lambda item: -len(item[1]))
    ]
    assert not listed, "\n".join(listed)


@pytest.mark.parametrize("name", ["rows", "tokens", "tokenizers", "finished run"])
def test_a_flipped_bit_is_not_silent(name, server, short, uses, tmp_path):
    """Of the matrix below: one bit in one file of each cache that a run reads first, and in the model."""
    where = "model/" if name == "finished run" else ""
    flips = [damage for damage in damages(name, uses[name], 1) if damage.how == "flip" and where in damage.file]
    assert_none_silent(try_all([server], short, uses, [random.Random(name).choice(flips)], tmp_path))


@pytest.mark.slow
def test_no_damage_to_a_kept_file_is_silent(servers, server, short, uses, tmp_path, tmp_path_factory, capsys):
    """Six flipped bits, zeros and a cut, in every file that a finished run has kept, or one that was stopped."""
    stopped = short.stop(tmp_path_factory.mktemp("stopped"), "out/model")
    uses = {**uses, "stopped run": Use(stopped, "out/**/*", short.command, "out")}
    tries = [damage for name, use in uses.items() for damage in damages(name, use)]
    tries = random.Random(16).sample(tries, len(tries))[: int(os.environ.get("MTP_FLIPS", len(tries)))]
    outcomes = try_all([server, servers()], short, uses, tries, tmp_path)
    with capsys.disabled():
        print(f"\n{table(outcomes)}")
    assert_none_silent(outcomes)
    assert sum(damage.how == "flip" for damage in outcomes) >= 500
