"""A results file as text: `python -m benchmarks.table [file]`, this machine's file where none is named.

Times are medians, and p20 for forward and backward together, of which the ratios are. "mtp_ce is" says how much faster
mtp_ce is in the same run, and "of the ceiling" is each pass's share of the time of what can't be left out: a copy of
the bytes, or the bare products. A provider with a dagger knows no weights of tokens, and does less work.
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.provider import NOT_REACHED, OUT_OF_MEMORY
from benchmarks.providers import BY_NAME

MIB = 2**20
UNWEIGHTED = "†"
# Share of the CPU that others took. One busy neighbour on two cores is 0.5, and slows down by 10 what has many short
# parallel parts.
NOISY = 0.05
PASSES = ("forward", "backward", "both")
Cases = dict[str, dict[str, dict[str, Any]]]  # provider -> pass -> case


def is_noisy(cases: Iterable[dict[str, Any]]) -> bool:
    """Other processes took so much of the CPU that they may have decided who is faster; or nobody knows."""
    return max(case.get("others_cpu", 1.0) for case in cases) > NOISY


def label(path: str, provider: str) -> str:
    """A provider's name, marked where it does not do the same work."""
    known = BY_NAME[path].get(provider)
    return provider + (UNWEIGHTED if known is not None and not known.weighted else "")


def percent(share: float | None) -> str:
    """A share, "-" where there is none."""
    return f"{share:.0%}" if share else "-"


def shape_line(shape: dict[str, Any]) -> str:
    """A problem in one line."""
    width = f" D={shape['D']}" if shape["D"] else ""
    dead = f", {shape['rows'] - shape['live_rows']} rows dead" if shape["prompt"] else ""
    softcap = f", softcap {shape['softcap']:g}" if shape["softcap"] else ""
    return (
        f"{shape['path']}: {shape['model']} V={shape['V']}{width} H={shape['H']} N={shape['rows']} {shape['dtype']}"
        f"{dead}{softcap}; gradients {shape['gradient_bytes'] / MIB:.0f} MiB, logits {shape['logits_bytes'] / MIB:.0f}"
    )


def by_shape(run: results.Run) -> dict[str, tuple[dict[str, Any], Cases]]:
    """Shape line -> the shape, and its cases."""
    shapes: dict[str, tuple[dict[str, Any], Cases]] = {}
    for case in run["cases"]:
        _, cases = shapes.setdefault(shape_line(case["shape"]), (case["shape"], {}))
        cases.setdefault(case["provider"], {})[case["pass"]] = case
    return shapes


def _provider_line(path: str, name: str, by_pass: dict[str, dict[str, Any]], ours: dict[str, Any] | None) -> str:
    def median(which: str) -> str:
        return f"{by_pass[which]['p50_ms']:8.2f}" if which in by_pass else f"{'-':>8}"

    def share(which: str) -> str:
        return f"{percent(by_pass[which]['share_of_ceiling'] if which in by_pass else None):>8}"

    main = by_pass.get("both") or by_pass.get("forward")
    line = f"  {label(path, name):20}{' '.join(map(median, PASSES))}  {' '.join(map(share, PASSES))}"
    if main is None:
        return line
    speed_up = f"{main['p20_ms'] / ours['p20_ms']:7.2f}x" if ours and ours["pass"] == main["pass"] else f"{'-':>8}"
    return f"{line}  {main['p20_ms']:8.2f} {speed_up} {main['peak_bytes'] / MIB:8.1f}"


def absences(run: results.Run) -> Iterator[str]:
    """Who was absent, and why."""
    reasons: dict[str, dict[str, int]] = {}
    for entry in run["absent"]:
        cases = reasons.setdefault(entry["reason"], {})
        cases[entry["provider"]] = cases.get(entry["provider"], 0) + 1
    for reason, cases in reasons.items():
        yield f"absent: {', '.join(f'{name} ({count})' for name, count in cases.items())}: {reason}"


def cases_table(run: results.Run) -> Iterator[str]:
    """The lines of a run's cases, and of who was absent."""
    passes = " ".join(f"{which:>8}" for which in PASSES)
    yield f"{'':22}{'ms, median':>26}  {'of the ceiling':>26}  {'ms':>8} {'mtp_ce':>8} {'peak':>8}"
    yield f"{'':22}{passes}  {passes}  {'p20':>8} {'is':>8} {'MiB':>8}"
    for line, (shape, providers) in by_shape(run).items():
        noisy = is_noisy(case for by_pass in providers.values() for case in by_pass.values())
        yield line + "; NOISY, others were on the CPU" * noisy
        mine = providers.get("mtp_ce", {})
        ours = mine.get("both") or mine.get("forward")
        for name, by_pass in providers.items():
            yield _provider_line(shape["path"], name, by_pass, ours)
    yield from absences(run)


def step_line(shape: dict[str, Any]) -> str:
    """The model of a training step in one line."""
    return (
        f"training step: {shape['model']}, {shape['parameters'] / 1e6:.0f} M parameters, V={shape['V']} D={shape['D']} "
        f"H={shape['H']} {shape['dtype']}, {shape['B']} x {shape['S']} tokens; "
        f"weights and AdamW {shape['held_bytes'] / MIB:.0f} MiB"
    )


def largest(entry: dict[str, Any]) -> str:
    """The largest micro-batch of a path, in rows; "-" where nothing limits it."""
    found = entry["largest"]
    if found is None:
        return "-"
    return f"{'>= ' if found['limit'] == NOT_REACHED else ''}{found['rows']}"


def timed_steps(run: results.Run) -> list[dict[str, Any]]:
    """The training steps that have figures."""
    return [entry for entry in results.steps_of(run) if not entry.get("reason")]


def steps_noisy(run: results.Run) -> bool:
    """Others were on the CPU while they were timed."""
    timed = timed_steps(run)
    return bool(timed) and is_noisy(timed)


def largest_notes(timed: list[dict[str, Any]]) -> Iterator[str]:
    """What has to be said of the largest micro-batches: of none, and of those that memory does not decide."""
    if timed and all(entry["largest"] is None for entry in timed):
        yield "a CPU's memory sets no limit to a micro-batch"
    for entry in timed:
        limit = (entry["largest"] or {}).get("limit")
        if limit not in (None, OUT_OF_MEMORY):
            yield f"{entry['provider']}: {limit}"


def steps_table(run: results.Run) -> Iterator[str]:
    """The lines of a run's training steps."""
    steps = results.steps_of(run)
    if not steps:
        return
    timed = timed_steps(run)
    yield step_line(steps[0]["shape"]) + "; NOISY, others were on the CPU" * steps_noisy(run)
    yield f"{'':22}{'tokens/s':>9} {'ms, median':>11} {'ms, p20':>9} {'in loss':>8} {'peak MiB':>9} {'largest':>8} rows"
    for entry in timed:
        share = entry["share_in_loss"]
        yield (
            f"  {entry['provider']:20}{entry['tokens_per_s']:9.0f} {entry['p50_ms']:11.2f} {entry['p20_ms']:9.2f} "
            f"{'-' if share is None else format(share, '.0%'):>8} {entry['peak_bytes'] / MIB:9.1f} {largest(entry):>8}"
        )
    for entry in steps:
        if entry.get("reason"):
            yield f"absent: {entry['provider']}: {entry['reason']}"
    yield from (f"largest: {note}" for note in largest_notes(timed))


def host_lines(run: results.Run) -> Iterator[str]:
    """Host time of a call on tensors of a few rows."""
    host = run.get("host_us", {})
    if host:
        yield "host time of a small call, us: " + ", ".join(f"{name} {value:.0f}" for name, value in host.items())


def table(run: results.Run) -> Iterator[str]:
    """The lines of one run."""
    if run["cases"] or run["absent"] or not results.steps_of(run):
        yield from cases_table(run)
    yield from host_lines(run)
    yield from steps_table(run)
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items() if number)
    yield f"{run['device']}, which copies {run['copy_bytes_per_s'] / 1e9:.1f} GB/s; {run['measured']}"
    yield f"{versions}; commit {(run['commit'] or 'unknown')[:12]}"
    stale = results.stale_parts(run)
    if stale:
        yield f"STALE: sources have changed since this run: {', '.join(stale)}"


def main(arguments: list[str]) -> int:
    """Print every run of a file; 1 where there is none."""
    from benchmarks.clock import DEVICE

    path = Path(arguments[0]) if arguments else results.results_path(DEVICE.type)
    runs = results.read(path)
    if not runs:
        print(f"no results in {path.name}")
        return 1
    for run in runs:
        print(*table(run), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
