"""A results file as text: `python -m benchmarks.table [file]`, this machine's file where none is named.

Times are medians. The share is that of the device's copy bandwidth, had the provider moved just the bytes that the work
must move. "mtp_ce is" says how much faster mtp_ce is in the same run, forward and backward.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import results

PASSES = ("forward", "backward", "both")
MIB = 2**20


def shape_line(shape: dict[str, Any], gradient_bytes: int) -> str:
    """A problem in one line."""
    prompt = f", {shape['rows'] - shape['live_rows']} rows dead" if shape["prompt"] else ""
    return (
        f"V={shape['V']} H={shape['H']} N={shape['rows']} {shape['dtype']}{prompt}; "
        f"the gradient is {gradient_bytes / MIB:.0f} MiB"
    )


def _provider_line(name: str, by_pass: dict[str, dict[str, Any]], ours: dict[str, Any] | None) -> str:
    def columns(width: int, digits: int, field: str, factor: float = 1.0) -> str:
        return " ".join(
            f"{by_pass[which][field] * factor:{width}.{digits}f}" if which in by_pass else f"{'-':>{width}}"
            for which in PASSES
        )

    both = by_pass.get("both")
    speed_up = f"{both['p50_ms'] / ours['p50_ms']:6.2f}x" if both and ours else f"{'-':>7}"
    peak = f"{both['peak_bytes'] / MIB:8.1f}" if both else f"{'-':>8}"
    return f"  {name:15}{columns(8, 2, 'p50_ms')}   {columns(6, 1, 'share_of_copy', 100)}  {speed_up} {peak}"


def table(run: results.Run) -> Iterator[str]:
    """The lines of one run."""
    shapes: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for case in run["cases"]:
        line = shape_line(case["shape"], case["gradient_bytes"])
        shapes.setdefault(line, {}).setdefault(case["provider"], {})[case["pass"]] = case
    passes = " ".join(f"{which:>8}" for which in PASSES)
    yield f"{'':17}{'ms, median':>26}   {'share of copy, %':>20}  {'mtp_ce':>7} {'peak':>8}"
    shares = " ".join(f"{which:>6}" for which in ("fwd", "bwd", "both"))
    yield f"{'':17}{passes}   {shares}  {'is':>7} {'MiB':>8}"
    for line, providers in shapes.items():
        yield line
        ours = providers.get("mtp_ce", {}).get("both")
        for name, by_pass in providers.items():
            yield _provider_line(name, by_pass, ours)
    reasons: dict[str, dict[str, int]] = {}
    for entry in run["absent"]:
        cases = reasons.setdefault(entry["reason"], {})
        cases[entry["provider"]] = cases.get(entry["provider"], 0) + 1
    for reason, cases in reasons.items():
        yield f"absent: {', '.join(f'{name} ({count} cases)' for name, count in cases.items())}: {reason}"
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items() if number)
    yield f"{run['device']}, which copies {run['copy_bytes_per_s'] / 1e9:.1f} GB/s; {run['measured']}"
    yield f"{versions}; commit {(run['commit'] or 'unknown')[:12]}"
    if results.is_stale(run):
        yield "STALE: the kernel sources have changed since this run"


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
