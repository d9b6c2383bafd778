"""The README's benchmark section and the plots, from benchmarks/results/*.json.

    python -m benchmarks.report            write README.md between its markers, and benchmarks/plots/*.svg
    python -m benchmarks.report --check    write nothing; exit code 1 where something would change

A row of a table is a shape that plan.py shows, in the newest run that measured mtp_ce at it. Every ratio in it is
of that one run, and of p20. `python -m benchmarks.table` prints every case.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import plan, results
from benchmarks.plots import TITLES, draw, drawable
from benchmarks.provider import NOT_REACHED
from benchmarks.providers import BY_NAME
from benchmarks.shapes import Shape
from benchmarks.table import (
    MIB,
    NOISY,
    UNWEIGHTED,
    is_noisy,
    label,
    largest,
    largest_notes,
    percent,
    steps_noisy,
    timed_steps,
)

README = results.ROOT / "README.md"
PLOTS = results.ROOT / "benchmarks" / "plots"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
HEAD = """\
| | mtp_ce | of the ceiling | memory | eager loop | torch.compile | best fused peer |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |"""
LEGEND = """\
`linear` is `weighted_mtp_linear_ce` and `logits` is `weighted_mtp_ce`, forward and backward; `token_ce` is forward. A
model's name stands for its vocabulary. The ceiling is the bare matrix products of the live rows, or for `logits` a copy
of the bytes that it must move. Memory is the peak above the inputs, in brackets without the gradients, as a share of
all logits. Peers: times the time, times the memory, of mtp_ce on the same work in the same run. Every result passed its
check against the float64 oracle first."""
STEP_HEAD = """\
| {} | tokens/s | a step | in the loss | peak memory | largest micro-batch |
| --- | ---: | ---: | ---: | ---: | ---: |"""
STEP_LEGEND = """\
A training step is forward, loss, backward and AdamW of a model with random weights and residual heads, all of it in one
dtype. `eager` and both `logits` build the logits of all heads, `linear` does not. Tokens per second are of the median
step, milliseconds of p20; the loss is output layer and loss, forward and backward; memory is the peak of the whole
step. The largest micro-batch is what the device's memory lets a path take."""


# Our cases of a row, each with its own time, share of the ceiling and memory.
OURS = ("mtp_ce", "mtp_ce_dropped")


class Row(NamedTuple):
    """A shape of the table with the cases of its main pass."""

    shape: Shape
    run: results.Run
    cases: dict[str, dict[str, Any]]  # by provider


def newest(runs: list[results.Run], shape: Shape) -> Row | None:
    """The newest run that measured mtp_ce at a shape."""
    wanted = shape.as_dict()
    for run in reversed(runs):
        cases = {
            case["provider"]: case
            for case in run["cases"]
            if case["pass"] == plan.MAIN_PASS[shape.path] and case["shape"] == wanted
        }
        if "mtp_ce" in cases:
            return Row(shape, run, cases)
    return None


def work(row: Row) -> str:
    """What was done, in one cell."""
    shape = row.shape
    width = f", D {shape.D}" if shape.D else ""
    dead = f", {1 - shape.live_rows / shape.rows:.0%} dead" if shape.prompt else ""
    cap = f", softcap {shape.softcap:g}" if shape.softcap else ""
    marks = ["stale"] * results.is_stale(row.run, shape.path) + ["noisy"] * is_noisy(row.cases.values())
    size = f"V {shape.V}{width}, N {shape.rows} (H {shape.H}), {shape.dtype}{dead}{cap}"
    return f"`{shape.path}` {shape.model}: {size}{''.join(f' **({mark})**' for mark in marks)}"


def milliseconds(ms: float) -> str:
    """Three digits."""
    return f"{ms:.{0 if ms >= 100 else 1 if ms >= 10 else 2}f} ms"


def against(row: Row, provider: str) -> str:
    """A peer's cell: its time and memory as multiples of ours."""
    if provider not in row.cases:
        return "absent"
    ours, peer = row.cases["mtp_ce"], row.cases[provider]
    return f"{peer['p20_ms'] / ours['p20_ms']:.2f}x, {peer['peak_bytes'] / ours['peak_bytes']:.1f}x"


def fused(row: Row) -> str:
    """The fastest fused peer that does the same work, and the fastest that does less, if that is faster."""
    known = BY_NAME[row.shape.path]
    peers = [
        name
        for name in row.cases
        if name in known and not (known[name].ours or known[name].ceiling or name.startswith(("eager", "compiled")))
    ]
    cells = []
    fastest = None
    for weighted in (True, False):
        able = [name for name in peers if known[name].weighted is weighted]
        best = min(able, key=lambda name: row.cases[name]["p20_ms"], default=None)
        if best is None or (fastest is not None and row.cases[best]["p20_ms"] > row.cases[fastest]["p20_ms"]):
            continue
        cells.append(f"{label(row.shape.path, best)} {against(row, best)}")
        fastest = best
    return "<br>".join(cells) or "absent"


def line(row: Row) -> str:
    """A row of the table."""
    ours = [row.cases[name] for name in OURS if name in row.cases]

    def memory(case: dict[str, Any]) -> str:
        besides = (case["peak_bytes"] - row.shape.gradient_bytes) / row.shape.logits_bytes
        return f"{case['peak_bytes'] / MIB:.0f} MiB ({besides:.0%})"

    cells = (
        work(row),
        "<br>".join(milliseconds(case["p20_ms"]) for case in ours),
        "<br>".join(percent(case["share_of_ceiling"]) for case in ours),
        "<br>".join(map(memory, ours)),
        against(row, "eager_loop"),
        against(row, "compiled_loop"),
        fused(row),
    )
    return f"| {' | '.join(cells)} |"


def reasons(run: results.Run) -> Iterator[str]:
    """Who was absent, and why, each reason once."""
    names: dict[str, dict[str, None]] = {}
    for entry in run["absent"]:
        known = BY_NAME[entry["shape"]["path"]].get(entry["provider"])
        # What one of ours has nothing to do at is no peer's lack.
        if entry["reason"] != NOT_REACHED and not (known and known.ours):
            names.setdefault(entry["reason"], {})[entry["provider"]] = None
    for reason, providers in names.items():
        yield f"* Absent: {', '.join(providers)} ({reason})."


def newest_steps(runs: list[results.Run]) -> results.Run | None:
    """The newest run with training steps."""
    return next((run for run in reversed(runs) if results.steps_of(run)), None)


def step_rows(run: results.Run) -> Iterator[str]:
    """The table of a run's training steps."""
    steps = results.steps_of(run)
    shape = steps[0]["shape"]
    marks = ["stale"] * results.is_stale(run, results.STEP) + ["noisy"] * steps_noisy(run)
    model = f"{shape['model']}, {shape['parameters'] / 1e6:.0f} M parameters"
    size = f"V {shape['V']}, D {shape['D']}, H {shape['H']}, {shape['dtype']}, {shape['B']} x {shape['S']} tokens"
    yield STEP_HEAD.format(f"training step of {model}: {size}{''.join(f' **({mark})**' for mark in marks)}")
    for entry in steps:
        if entry.get("reason"):
            yield f"| {entry['provider']} | absent | | | | |"
            continue
        share = entry["share_in_loss"]
        cells = (
            entry["provider"],
            f"{entry['tokens_per_s']:,.0f}",
            milliseconds(entry["p20_ms"]),
            "-" if share is None else f"{share:.0%}",
            f"{entry['peak_bytes'] / MIB:,.0f} MiB",
            f"{largest(entry)} x {shape['S']} tokens" if entry["largest"] else "-",
        )
        yield f"| {' | '.join(cells)} |"


def step_notes(run: results.Run) -> Iterator[str]:
    """What has to be said of it."""
    steps = results.steps_of(run)
    held = steps[0]["shape"]["held_bytes"] / MIB
    yield f"* Weights and the states of AdamW are {held:,.0f} MiB of the peak of every training step."
    for note in largest_notes(timed_steps(run)):
        yield f"* Largest micro-batch: {note}."
    yield from (f"* Absent: {entry['provider']} ({entry['reason']})." for entry in steps if entry.get("reason"))


def measured(run: results.Run) -> str:
    """When, with what, of which commit."""
    numbers = ", ".join(f"{name} {number}" for name, number in run["versions"].items() if number)
    return f"* Measured {run['measured'][:10]} with {numbers}; commit {(run['commit'] or 'unknown')[:12]}."


def device_section(slug: str, runs: list[results.Run]) -> Iterator[str]:
    """The lines of one results file."""
    kind = runs[-1]["kind"]
    rows = [row for path in results.PATHS for shape in plan.shown(kind, path) if (row := newest(runs, shape))]
    stepped = newest_steps(runs)
    used = [run for run in runs if run is stepped or any(row.run is run for row in rows)]
    yield f"### {runs[-1]['device']}"
    yield ""
    if rows:
        yield HEAD
        yield from map(line, rows)
        yield ""
    if stepped:
        yield from step_rows(stepped)
        yield ""
    if any(results.is_stale(row.run, row.shape.path) for row in rows) or (
        stepped and results.is_stale(stepped, results.STEP)
    ):
        yield "* Stale: the sources have changed since they were timed."
    if any(is_noisy(row.cases.values()) for row in rows) or (stepped and steps_noisy(stepped)):
        yield f"* Noisy: other processes took more than {NOISY:.0%} of the CPU meanwhile, or nobody looked."
    if any(UNWEIGHTED in line(row) for row in rows):
        yield f"* {UNWEIGHTED} knows no token weights, and does less work: the plain mean over rows."
    if any(name in row.cases for row in rows for name in OURS[1:]):
        yield "* The second line of a row is mtp_ce given the number of live rows (`drop_dead_rows`)."
    yield from dict.fromkeys(reason for run in used for reason in reasons(run))
    if stepped:
        yield from step_notes(stepped)
    yield from dict.fromkeys(map(measured, used))
    for place, path in enumerate(drawn(runs)):
        link = f"[{TITLES[path]}: time and memory over V and H](benchmarks/plots/{slug}-{path}.svg)"
        yield ""
        yield link if place else f"!{link}"


def drawn(runs: list[results.Run]) -> list[str]:
    """The paths that have a plot."""
    return [path for path in results.PATHS if drawable(runs, path)]


def held(folder: Path = results.RESULTS) -> dict[str, list[results.Run]]:
    """File name without its ending -> runs."""
    files = {path.stem: results.read(path) for path in sorted(folder.glob("*.json"))}
    return {slug: runs for slug, runs in files.items() if runs}


def section(folder: Path = results.RESULTS) -> str:
    """The text between the markers, with them."""
    lines = [text for slug, runs in held(folder).items() for text in (*device_section(slug, runs), "")]
    legends = [LEGEND, ""] + ([STEP_LEGEND, ""] if any(newest_steps(runs) for runs in held(folder).values()) else [])
    body = [*legends, *lines] if lines else ["No results yet.", ""]
    return "\n".join([BEGIN, "", *body]) + END


def replaced(text: str, new: str) -> str:
    """A page with another section between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md has no section between {BEGIN} and {END}.")
    return before + new + after


def main(arguments: list[str]) -> int:
    """Write, or check."""
    page = README.read_text()
    files = {README: replaced(page, section()).encode()}
    with tempfile.TemporaryDirectory() as folder:
        for slug, runs in held().items():
            for path in drawn(runs):
                file = Path(folder) / f"{slug}-{path}.svg"
                draw(runs, path, file)
                files[PLOTS / file.name] = file.read_bytes()
    changed = [file for file, content in files.items() if not file.exists() or file.read_bytes() != content]
    gone = [file for file in PLOTS.glob("*.svg") if file not in files]
    for file in (*changed, *gone):
        print(file.relative_to(results.ROOT))
    if "--check" in arguments:
        return int(bool(changed or gone))
    PLOTS.mkdir(exist_ok=True)
    for file in changed:
        file.write_bytes(files[file])
    for file in gone:
        file.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
