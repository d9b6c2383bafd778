"""What MLflow costs a training: throughput with tracking on and off, in alternating pairs of runs.

    python -m benchmarks.tracking_overhead                     3 pairs of the default recipe: 10 minutes on two cores
    python -m benchmarks.tracking_overhead --pairs 9 tiny train.steps=2000

Each run is a fresh process, forked from one that has imported the trainer; MLflow itself is imported in the run, by
the thread that sends, as in a real one. The two runs of a pair stand next to each other and the first of them
alternates, so that a machine that slows down favours neither. A first run, which does not count, fills the caches: the
reference, the tokenizer and the tokens are there for all others, and the main stage alone is timed.

    tokens/s    all steps of the main stage, from the perf/tokens_per_s of its metrics.jsonl: what the promise is about
    wall        seconds from the first to the last line of those metrics, with logging and validation

What MLflow costs is for the most part its import and the making of a database, a second or two of a core at the start:
a run of few steps shows it, and a long one does not.

Folders and databases are temporary; a trained reference stays in the user's cache, as it does after any run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

# Later overrides win: those of the command line come after these.
DEFAULTS = ["validation.every=null", "validation.rows=16", "validation.decoding.prompts=0"]
PROMISE = 0.03


class Figures(NamedTuple):
    """What one run came to."""

    tokens_per_s: float
    wall_s: float


def read_figures(metrics: Path) -> Figures:
    """Read the metrics of a main stage."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return figures([line for line in lines if "perf/tokens_per_s" in line])


def figures(windows: list[dict[str, Any]]) -> Figures:
    """Put windows of steps together: each has its share of the steps, and its rate."""
    # Every step has as many tokens, so the rate of all steps is the harmonic mean of the windows', by their steps.
    steps = [window["step"] for window in windows]
    taken = [after - before for before, after in zip([0, *steps], steps, strict=False)]
    time = sum(count / window["perf/tokens_per_s"] for count, window in zip(taken, windows, strict=True))
    return Figures(steps[-1] / time, windows[-1]["time"] - windows[0]["time"])


def _train(folder: str, words: list[str], kind: str) -> Figures:
    from mtp_ce.training.cli.train import main

    os.chdir(folder)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        if main([*words, f"tracking.kind={kind}", "--output", "run"]) != 0:
            raise RuntimeError("the training did not end well; see above")
    return read_figures(Path("run", "metrics.jsonl"))


def run_once(words: list[str], kind: str) -> Figures:
    """Train in a fresh process and a folder of its own, tracked or not."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mtp_ce.training.run.compare", "mtp_ce.training.run.pipeline"])
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_train, folder, words, kind).result()


def main(argv: Sequence[str] | None = None) -> float:
    """Run the pairs, print each and the medians, and give the median ratio of throughputs, on to off."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tracking_overhead", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--pairs", type=int, default=3, help="how many pairs of runs (default: 3)")
    parser.add_argument("words", nargs="*", metavar="recipe | a.b=c", help="as train-mtp takes them")
    options = parser.parse_intermixed_args(argv)
    words = [*DEFAULTS, *options.words]
    print(f"train-mtp {' '.join(words)}", flush=True)
    run_once([*words, "tracking.uri=sqlite:///mlflow.db"], "none")
    print("pair   tokens/s with MLflow   without   ratio   wall s with   without", flush=True)
    ratios = []
    for pair in range(options.pairs):
        order = ("mlflow", "none") if pair % 2 == 0 else ("none", "mlflow")
        found = {kind: run_once([*words, "tracking.uri=sqlite:///mlflow.db"], kind) for kind in order}
        on, off = found["mlflow"], found["none"]
        ratios.append((on.tokens_per_s / off.tokens_per_s, on.wall_s / off.wall_s))
        print(
            f"{pair + 1:>4}   {on.tokens_per_s:>20,.0f}   {off.tokens_per_s:>7,.0f}   {ratios[-1][0]:.3f}   "
            f"{on.wall_s:>11.1f}   {off.wall_s:>7.1f}",
            flush=True,
        )
    ratio, wall = (median(column) for column in zip(*ratios, strict=True))
    kept = "within" if ratio >= 1 - PROMISE else "NOT within"
    print(
        f"median of {options.pairs} pairs: throughput {ratio:.3f} times that without, {kept} {PROMISE:.0%}; "
        f"wall {wall:.3f} times"
    )
    return ratio


if __name__ == "__main__":
    main()
