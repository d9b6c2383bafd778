"""What a training step costs with each way that the loss can go: see step.py for the step and for the paths.

    python -m benchmarks.training_step              a table: a minute on two cores, and on a GPU
    python -m benchmarks.training_step --results    and benchmarks/results/<device>.json

tokens/s       of whole steps, timed in turns: the median, and p20 of the milliseconds
in the loss    share of a step between the hidden states and the gradients of hidden states and output layer: output
               layer and loss, forward and backward. Measured inside steps whose backward is cut in two there, by the
               device's own clock; the median of SHARES steps. The same region alone, on hidden states that lie ready,
               would have neither the caches nor the allocator of a step.
peak memory    of a whole step, with weights, gradients and the states of AdamW. On a GPU by torch's allocator; on a CPU
               by the resident size of a fresh process that only takes this path, above what it was without a model.
largest        rows of S tokens that a GPU's memory lets a step take: doubled until it does not, then bisected, until
               --time-limit. A CPU swaps rather than say no: there is no such figure.

No path is timed before its loss and its gradients passed the check against the float64 oracle (oracle.py) on the same
hidden states. All are timed at one micro-batch: that of the size, halved until every path fits. Without transformers
there is no model: the whole is absent, and that is no failure.
"""

import argparse
import gc
import multiprocessing
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import clock, memory, oracle, results, resume, rounds, step
from benchmarks.provider import NOT_REACHED, OUT_OF_MEMORY, AbsentError
from benchmarks.shapes import Inputs, Shape
from benchmarks.table import table, timed_steps
from mtp_ce.training.cli.command import EXIT_CRASH, EXIT_DONE, EXIT_INTERRUPTED, Parser

SHARES = 3
# A step of more rows than this many doublings is not looked for.
MOST_TRIES = 16


class Largest(NamedTuple):
    """The most rows that were seen to fit, and what kept one more from it."""

    rows: int
    limit: str


def why(error: Exception) -> str:
    """An exception in a few words."""
    words = str(error).strip().splitlines() or [""]
    if isinstance(error, torch.OutOfMemoryError) or OUT_OF_MEMORY in words[0].lower():
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {words[0][:160]}"


def forget() -> None:
    """Give back what torch keeps of a GPU's free memory: pieces of one size would stand in another's way."""
    if clock.HAS_GPU:
        torch.cuda.empty_cache()


def attempt(training: step.Training, call: Callable[[], Any]) -> str | None:
    """Call, and say why it failed; None where it did not."""
    try:
        call()
        if clock.HAS_GPU:
            torch.cuda.synchronize()
    except Exception as error:
        # The frames of the traceback would keep gigabytes of tensors alive.
        traceback.clear_frames(error.__traceback__)
        reason = why(error)
    else:
        return None
    training.optimizer.zero_grad()
    gc.collect()
    return reason


def fits(training: step.Training, path: step.Path, shape: Shape, B: int) -> str | None:
    """Why a step of B rows does not fit; None where it does."""
    forget()
    return attempt(training, lambda: training.step(path, step.make_batch(shape, B)))


def common_rows(training: step.Training, shape: Shape) -> tuple[int, dict[str, str]]:
    """The micro-batch that all paths are timed at, and why some can't take even one row."""
    B = shape.B
    while True:
        reasons = {path.name: fits(training, path, shape, B) for path in step.PATHS}
        failed = {name: reason for name, reason in reasons.items() if reason is not None}
        if OUT_OF_MEMORY not in failed.values() or B == 1:
            return B, failed
        B //= 2


def check(training: step.Training, paths: Sequence[step.Path], shape: Shape, batch: step.Batch) -> dict[str, str]:
    """Which of the paths are wrong, and by how much: in the loss, or in the gradient of hidden or unembed."""
    with torch.no_grad():
        hidden = torch.stack(training.hidden(batch), dim=2)
    values = {"hidden": hidden, "unembed": training.unembed.detach()}
    truth = oracle.find_truth(shape, Inputs("linear", values, batch.tokens, batch.token_weights, None))
    # No path rounds its loss, whatever it does to gradients.
    loss = [expected for expected in truth if expected.name == "loss"]
    wrong = {}
    for path in paths:
        found = training.results(path, batch)
        unit_of = shape.torch_dtype if path.rounds else torch.float32
        errors = oracle.check(truth, found, unit_of) | oracle.check(loss, found)
        for name, error in errors.items():
            if not error.acceptable:
                wrong[path.name] = f"is wrong: its {name} errs by {error.distance:.3g}, {error.allowed:.3g} is allowed"
    return wrong


def peak_here(size: step.Size, name: str) -> int:
    """Bytes of the second step of a path above this process without a model; it is to be a fresh one."""
    # Loads all that a model needs, and makes none.
    with torch.device("meta"):
        step.build_model(size)
    memory.reset_mark()
    before = memory.resident("VmRSS")
    training = step.Training(size)
    path = next(path for path in step.PATHS if path.name == name)
    for _ in range(2):
        memory.reset_mark()
        training.step(path, step.make_batch(size.shape, size.shape.B))
    return memory.resident("VmHWM") - before


def peak_bytes(training: step.Training, size: step.Size, path: step.Path, batch: step.Batch) -> int:
    """Peak memory of a whole step."""
    if clock.HAS_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        training.step(path, batch)
        return torch.cuda.max_memory_allocated()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.step", "mtp_ce.hf.wrapper", "transformers.models.llama"])
    # Ctrl-C is for the process that waits: what is started while it is ignored goes on ignoring it.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    forkserver.ensure_running()
    signal.signal(signal.SIGINT, handler)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_here, size, path.name).result()


def largest(why_not: Callable[[int], str | None], known: int, deadline: float = float("inf")) -> Largest:
    """The most rows that fit, from a number that does; `why_not` says why another does not."""
    rows, above, limit = known, None, NOT_REACHED
    for _ in range(MOST_TRIES):
        if time.monotonic() > deadline or above == rows + 1:
            break
        tried = 2 * rows if above is None else (rows + above) // 2
        reason = why_not(tried)
        if reason is None:
            rows = tried
        else:
            above, limit = tried, reason
    return Largest(rows, limit if above == rows + 1 else NOT_REACHED)


class Measurement:
    """The steps of one size: an entry for every path, with its figures or with the reason why there are none."""

    def __init__(self, size: step.Size) -> None:
        self.training = step.Training(size)
        B, reasons = common_rows(self.training, size.shape)
        self.size = size._replace(shape=replace(size.shape, B=B))
        self.batch = step.make_batch(size.shape, B)
        fitting = [path for path in step.PATHS if path.name not in reasons]
        reasons |= check(self.training, fitting, self.size.shape, self.batch)
        forget()
        self.paths = [path for path in fitting if path.name not in reasons]
        described = {
            "model": size.name, "layers": size.layers, "V": size.shape.V, "D": size.shape.D,
            "H": size.shape.H, "S": size.shape.S, "B": B, "dtype": size.shape.dtype,
            "parameters": self.training.parameters(), "held_bytes": self.training.held_bytes(),
        }  # fmt: skip
        self.entries: dict[str, dict[str, Any]] = {
            path.name: {"provider": path.name, "shape": described} for path in step.PATHS
        }
        for name, reason in reasons.items():
            self.entries[name]["reason"] = reason

    def time(self) -> None:
        """Time, memory, share in the loss."""
        training, batch = self.training, self.batch
        peaks = {path.name: peak_bytes(training, self.size, path, batch) for path in self.paths}
        begin, busy = time.monotonic(), clock.busy_elsewhere()
        outcomes = rounds.in_turns({path.name: (tuple, lambda p=path: training.step(p, batch)) for path in self.paths})
        others = (clock.busy_elsewhere() - busy) / (time.monotonic() - begin) / (os.cpu_count() or 1)
        for name, outcome in outcomes.items():
            if isinstance(outcome, Exception):
                self.entries[name]["reason"] = why(outcome)
                continue
            figures = results.timing(outcome, None)
            self.entries[name] |= {
                **{key: figures[key] for key in ("rounds", "p20_ms", "p50_ms", "p80_ms")},
                "tokens_per_s": round(batch.tokens.numel() / statistics.median(outcome), 1),
                "share_in_loss": None,
                "peak_bytes": peaks[name],
                "largest": Largest(self.size.shape.B, NOT_REACHED)._asdict() if clock.HAS_GPU else None,
                "others_cpu": round(max(0.0, others), 3),
            }
        self.paths = [path for path in self.paths if "reason" not in self.entries[path.name]]
        shares: dict[str, list[float]] = {path.name: [] for path in self.paths}
        for _ in range(SHARES):
            for path in self.paths:
                attempt(training, lambda p=path: shares[p.name].append(training.share_in_loss(p, batch)))
        for name, measured in shares.items():
            if measured:
                self.entries[name]["share_in_loss"] = round(statistics.median(measured), 4)

    def find_largest(self, path: step.Path, deadline: float) -> None:
        """The largest micro-batch of a path that was timed."""
        found = largest(partial(fits, self.training, path, self.size.shape), self.size.shape.B, deadline)
        self.entries[path.name]["largest"] = found._asdict()


def measure(size: step.Size, run: results.Run, deadline: float, record: Callable[[], None]) -> None:
    """Put the steps of a size into a run, and record it whenever there is more."""
    measurement = Measurement(size)
    measurement.time()
    run["steps"] = [*measurement.entries.values()]
    record()
    if not clock.HAS_GPU:
        return
    for place, path in enumerate(measurement.paths):
        # Each its part of the time that is left, so that the first does not take it from the last.
        now = time.monotonic()
        measurement.find_largest(path, now + (deadline - now) / (len(measurement.paths) - place))
        record()


def parser() -> argparse.ArgumentParser:
    """The options."""
    description, _, more = (__doc__ or "").partition("\n\n")
    made = Parser(prog="python -m benchmarks.training_step", description=description, epilog=more)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument(
        "--results", nargs="?", type=Path, const=results.RESULTS, metavar="FOLDER",
        help="write FOLDER/<device>.json; FOLDER is benchmarks/results/ where none is named",
    )  # fmt: skip
    made.add_argument(
        "--time-limit", type=float, default=float("inf"), metavar="SECONDS",
        help="look for no larger micro-batch after this time, counted from the start of the process",
    )  # fmt: skip
    made.add_argument(
        "--resume", action="store_true", help="do nothing where that file has all of it, of these sources and versions"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where a path failed or is wrong, 0 where the whole is absent with a reason."""
    options = parser().parse_args(arguments)
    if options.results and options.results.exists() and not options.results.is_dir():
        parser().error(f"argument --results: {options.results} is no folder")
    if options.resume and not options.results:
        parser().error("argument --resume: it needs --results, the folder whose file is gone on with")
    kind = clock.DEVICE.type
    path = results.results_path(kind, options.results) if options.results else None
    older = results.read(path) if path else []
    if options.resume and resume.has_steps(older, kind):
        print(f"all of it is in {path.name}")
        return EXIT_DONE
    try:
        run = results.new_run(kind, clock.copy_bandwidth())

        def record() -> None:
            # A reason says nothing about figures that an older run has.
            if path and timed_steps(run):
                results.write(path, results.merged(older, run))

        measure(step.SIZES[kind], run, clock.deadline(options.time_limit), record)
    except AbsentError as absent:
        print(f"absent: {absent}")
        return EXIT_DONE
    except torch.OutOfMemoryError:
        print(f"absent: this device has too little memory for {step.SIZES[kind].name} and AdamW")
        return EXIT_DONE
    except KeyboardInterrupt:
        print("python -m benchmarks.training_step: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(*table(run), sep="\n")
    if path and timed_steps(run):
        print(f"written to {path.name}")
    failed = [entry for entry in run["steps"] if entry.get("reason") not in (None, OUT_OF_MEMORY)]
    return EXIT_CRASH if failed else EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
