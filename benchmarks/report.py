"""The report of benchmarks/results/*.json: two tables and the plots.

    python -m benchmarks.report            write docs/benchmarks.md and README.md between their markers, and the plots
    python -m benchmarks.report --check    write nothing; exit code 1 where something would change

A row of a table is a shape of `cases.shown`, of the newest run that measured mtp_ce at it. Every ratio is of that one
run, and of p20.
"""

import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import cases, results
from benchmarks.plots import MIB, TITLES, draw, draw_memory, drawable, label, memory_shapes
from benchmarks.providers import BY_NAME
from benchmarks.shapes import Shape

DOCS, README = results.ROOT / "docs" / "benchmarks.md", results.ROOT / "README.md"
PLOTS = results.ROOT / "benchmarks" / "plots"
# Fraction of the CPU that other processes took. One busy neighbour on two cores is 0.5, and slows down code of many
# short parallel regions by a factor of 10.
NOISY = 0.05
# Cases of this project that are rows of their own within a cell.
OURS = ("mtp_ce", "mtp_ce_dropped")
LEGEND = """\
`linear` is `weighted_mtp_linear_ce` and `logits` is `weighted_mtp_ce`, forward and backward; `token_ce` is forward. A
model's name stands for its vocabulary. The ceiling is the bare matrix products over the valid rows, or for `logits` a
copy of the bytes that the loss must move. Memory is the peak above the inputs, in brackets without the gradients, as a
share of the size of all logits. Peers: their time and memory as multiples of those of mtp_ce, on the same work in the
same run. Every result passed its check against the float64 oracle before it was timed."""
STEP_LEGEND = """\
A training step is forward, loss, backward and AdamW of a model with random weights and residual heads, in one dtype.
`eager` and both `logits` build the logits of all heads, `linear` does not. Tokens per second are of the median step,
milliseconds of p20; memory is the peak of the whole step."""
HEAD = ("", "mtp_ce", "of the ceiling", "memory", "eager loop", "torch.compile", "best fused peer")
SHORT_HEAD = ("", "time", "memory", "eager loop: time, memory", "torch.compile: time, memory")


class Row(NamedTuple):
    """A shape of a table with the cases of its main pass."""

    shape: Shape
    run: results.Run
    cases: dict[str, dict[str, Any]]  # by provider

    @property
    def ours(self) -> dict[str, Any]:
        """The case of mtp_ce."""
        return self.cases["mtp_ce"]


def rows(runs: list[results.Run], shapes: Iterable[Shape]) -> Iterator[Row]:
    """Yield a row for every shape that a run has measured mtp_ce at, of the newest such run."""
    for shape in shapes:
        wanted = cases.MAIN_PASS[shape.path], shape.as_dict()
        for run in reversed(runs):
            found = {case["provider"]: case for case in run["cases"] if (case["pass"], case["shape"]) == wanted}
            if "mtp_ce" in found:
                yield Row(shape, run, found)
                break


def table(head: tuple[str, ...], lines: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table, the first column to the left."""
    yield f"| {' | '.join(head)} |"
    yield f"| --- |{' ---: |' * (len(head) - 1)}"
    yield from (f"| {' | '.join(cells)} |" for cells in lines)


def is_noisy(entries: Iterable[dict[str, Any]]) -> bool:
    """Whether other processes took so much of the CPU that they may have changed a ratio."""
    return max(entry["others_cpu"] for entry in entries) > NOISY


def marks(stale: bool, noisy: bool) -> str:
    """Return the marks of a row."""
    return "".join(f" **({mark})**" for mark, holds in (("stale", stale), ("noisy", noisy)) if holds)


def work(row: Row) -> str:
    """Return what was computed, in one cell."""
    shape = row.shape
    width = f", D {shape.D}" if shape.D else ""
    masked = f", {1 - shape.valid_rows / shape.rows:.0%} masked" if shape.prompt else ""
    cap = f", softcap {shape.softcap:g}" if shape.softcap else ""
    distribution = "" if shape.distribution == "random" else f", {shape.distribution.replace('_', ' ')}"
    size = f"V {shape.V}{width}, N {shape.rows} (H {shape.H}), {shape.dtype}{masked}{cap}{distribution}"
    marked = marks(results.is_stale(row.run), is_noisy(row.cases.values()))
    return f"`{shape.path}` {shape.model}: {size}{marked}"


def milliseconds(ms: float) -> str:
    """Return a time with three digits."""
    return f"{ms:.{0 if ms >= 100 else 1 if ms >= 10 else 2}f} ms"


def against(row: Row, provider: str) -> str:
    """Return a peer's cell: its time and memory as multiples of ours."""
    if provider not in row.cases:
        return "absent"
    ours, peer = row.ours, row.cases[provider]
    return f"{peer['p20_ms'] / ours['p20_ms']:.2f}x, {peer['peak_bytes'] / ours['peak_bytes']:.1f}x"


def fused(row: Row) -> str:
    """Return the fastest fused peer that does the same work, and a faster one that does less where there is one."""
    known = BY_NAME[row.shape.path]
    peers = [
        name
        for name in row.cases
        if name in known and not (known[name].ours or known[name].ceiling or name.startswith(("eager", "compiled")))
    ]
    cells, limit = [], float("inf")
    for weighted in (True, False):
        able = [name for name in peers if known[name].weighted is weighted and row.cases[name]["p20_ms"] < limit]
        if able:
            fastest = min(able, key=lambda name: row.cases[name]["p20_ms"])
            limit = row.cases[fastest]["p20_ms"]
            cells.append(f"{label(row.shape.path, fastest)} {against(row, fastest)}")
    return "<br>".join(cells) or "absent"


def memory(row: Row, case: dict[str, Any]) -> str:
    """Return a peak, and without the gradients as a share of all logits."""
    rest = (case["peak_bytes"] - row.shape.gradient_bytes) / row.shape.logits_bytes
    return f"{case['peak_bytes'] / MIB:.0f} MiB ({rest:.0%})"


def cells(row: Row) -> tuple[str, ...]:
    """Return the cells of a row of the long table."""
    ours = [row.cases[name] for name in OURS if name in row.cases]
    return (
        work(row),
        "<br>".join(milliseconds(case["p20_ms"]) for case in ours),
        "<br>".join(percent(case["share_of_ceiling"]) for case in ours),
        "<br>".join(memory(row, case) for case in ours),
        against(row, "eager_loop"),
        against(row, "compiled_loop"),
        fused(row),
    )


def percent(share: float | None) -> str:
    """Return a share in percent, "-" where there is none."""
    return f"{share:.0%}" if share else "-"


def absences(run: results.Run) -> Iterator[str]:
    """Yield each reason once, with the peers that were absent for it."""
    reasons: dict[str, dict[str, None]] = {}
    for entry in run["absent"]:
        # One of ours is absent where it has nothing to do.
        if not entry["provider"].startswith("mtp_ce"):
            reasons.setdefault(entry["reason"], {})[entry["provider"]] = None
    yield from (f"* Absent: {', '.join(peers)} ({reason})." for reason, peers in reasons.items())


def steps_of(runs: list[results.Run]) -> results.Run | None:
    """Return the newest run with training steps."""
    return next((run for run in reversed(runs) if run["steps"]), None)


def steps_table(run: results.Run) -> Iterator[str]:
    """Yield the table of a run's training steps."""
    steps = run["steps"]
    shape = steps[0]["shape"]
    model = f"{shape['model']}, {shape['parameters'] / 1e6:.0f} M parameters"
    size = f"V {shape['V']}, D {shape['D']}, H {shape['H']}, {shape['dtype']}, {shape['B']} x {shape['S']} tokens"
    title = f"training step of {model}: {size}{marks(results.is_stale(run, 'step'), is_noisy(steps))}"
    yield from table(
        (title, "tokens/s", "a step", "peak memory"),
        (
            (
                step["provider"],
                f"{step['tokens_per_s']:,.0f}",
                milliseconds(step["p20_ms"]),
                f"{step['peak_bytes'] / MIB:,.0f} MiB",
            )
            for step in steps
        ),
    )


def device_section(slug: str, runs: list[results.Run]) -> Iterator[str]:
    """Yield the lines of one results file."""
    kind = runs[-1]["kind"]
    found = [row for path in cases.PATHS for row in rows(runs, cases.shown(kind, path))]
    stepped = steps_of(runs)
    used = [run for run in runs if run is stepped or any(row.run is run for row in found)]
    lines = [*table(HEAD, map(cells, found)), ""] if found else []
    if stepped:
        lines += [*steps_table(stepped), ""]
    yield from (f"### {runs[-1]['device']}", "", *lines)
    if any("**(stale)**" in line for line in lines):
        yield "* Stale: the sources have changed since they were timed."
    if any("**(noisy)**" in line for line in lines):
        yield f"* Noisy: other processes took more than {NOISY:.0%} of the CPU."
    if any("†" in line for line in lines):
        yield "* † has no token weights and does less work: the plain mean over rows."
    if any(name in row.cases for row in found for name in OURS[1:]):
        yield "* The second line of a row is mtp_ce given the number of valid rows (`drop_dead_rows`)."
    yield from dict.fromkeys(line for run in used for line in absences(run))
    for run in used:
        yield f"* {measured(run)}"
    for place, path in enumerate(drawn(runs)):
        link = f"[{TITLES[path]}: time and memory over V and H](../benchmarks/plots/{slug}-{path}.svg)"
        yield ""
        yield link if place else f"!{link}"


def measured(run: results.Run) -> str:
    """Return when a run was, with what, of which commit."""
    numbers = ", ".join(f"{name} {number}" for name, number in run["versions"].items() if number)
    return f"Measured {run['measured'][:10]} with {numbers}; commit {(run['commit'] or 'unknown')[:12]}."


def drawn(runs: list[results.Run]) -> list[str]:
    """Return the paths that have a plot."""
    return [path for path in cases.PATHS if drawable(runs, path)]


def devices(folder: Path = results.RESULTS) -> dict[str, list[results.Run]]:
    """Return the runs of every results file, by its name without the suffix."""
    files = {path.stem: results.read(path) for path in sorted(folder.glob("*.json"))}
    return {slug: runs for slug, runs in files.items() if runs}


def section(folder: Path = results.RESULTS) -> str:
    """Return the section of docs/benchmarks.md."""
    found = devices(folder)
    lines = [text for slug, runs in found.items() for text in (*device_section(slug, runs), "")]
    legends = [LEGEND, ""] + [STEP_LEGEND, ""] * any(map(steps_of, found.values()))
    return "\n".join([*legends, *lines] if lines else ["No results yet.", ""])


def short(folder: Path = results.RESULTS) -> str:
    """Return the table of the README: the first shape of each path, device by device."""
    lines = []
    for runs in devices(folder).values():
        kind = runs[-1]["kind"]
        found = [row for path in cases.PATHS for row in rows(runs, cases.summary(kind, path)[:1])]
        for row in found:
            time = milliseconds(row.ours["p20_ms"])
            peers = (against(row, "eager_loop"), against(row, "compiled_loop"))
            lines.append((f"{runs[-1]['device']}, {work(row)}", time, memory(row, row.ours), *peers))
    return "\n".join([*table(SHORT_HEAD, lines), ""]) if lines else "No results yet.\n"


# Page -> the name of its markers, and what stands between them.
PAGES = {DOCS: ("benchmarks", section), README: ("results", short)}


def replaced(text: str, name: str, new: str) -> str:
    """Return a page with new text between its markers."""
    start, stop = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = text.partition(start)
    _, end, after = rest.partition(stop)
    if not (begin and end):
        raise ValueError(f"the page has no section between {start} and {stop}; add both lines where it belongs")
    return f"{before}{begin}\n\n{new}{end}{after}"


def main(arguments: list[str]) -> int:
    """Write, or check."""
    files = {page: replaced(page.read_text(), name, make()).encode() for page, (name, make) in PAGES.items()}
    with tempfile.TemporaryDirectory() as folder:
        for slug, runs in devices().items():
            for path in drawn(runs):
                file = Path(folder) / f"{slug}-{path}.svg"
                draw(runs, path, file)
                files[PLOTS / file.name] = file.read_bytes()
            if memory_shapes(runs):
                file = Path(folder) / f"{slug}-memory.svg"
                draw_memory(runs, file)
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
