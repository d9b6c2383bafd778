"""Terminal output of a running command: lines, warnings, and a progress bar."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from mtp_ce.training.addresses import shown

# Columns of the bar, of the time that is left, and between them, where the numbers are cut to make room.
_NARROWEST = len("------ 0:00:00 left") + 3


class Display:
    """The progress of a run.

    On a terminal, a progress bar. Elsewhere (a file, a pipe, a CI log), one line per logged step, because nothing can
    be redrawn there.

    Args:
        console: where to write.
        steps: number of steps of the run.
        done: number of steps done by earlier processes.
    """

    def __init__(self, console: Console, steps: int, done: int = 0) -> None:
        self._console = console
        self._steps = steps
        self._before = done
        self._done = done
        self._started = time.monotonic()
        self._bar = Progress(
            BarColumn(bar_width=None),
            # A column that may wrap is the first to shrink on a narrow terminal.
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
            expand=True,
        )
        self._task = self._bar.add_task("", total=steps, completed=done, numbers="")

    def tick(self) -> None:
        """Count one step."""
        self._done += 1
        self._bar.advance(self._task)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show metrics of training or validation, of a model or a critic."""
        if "train/loss" in metrics:
            loss, rate = metrics["train/loss"], metrics["perf/tokens_per_s"]
            numbers = f"loss {number(loss, '.3f')}  {_heads(metrics, 'train')}  {rate:,.0f} tokens/s"
        elif "critic/loss" in metrics:
            numbers = _pairs(metrics, "critic/")
        else:
            result = f"{_heads(metrics, 'val')} nats"
            if "critic/val_loss" in metrics:
                result = _pairs(metrics, "critic/val_")
            self._line(f"step {step:>5}  validation  {result}")
            if self._done == self._before:
                # A validation before the first step does not count towards the time per step.
                self._started = time.monotonic()
            return
        if self._console.is_terminal:
            room = self._console.width - len(f"{self._steps}/{self._steps}") - _NARROWEST
            self._bar.update(self._task, numbers=numbers[: max(room, 0)].rstrip())
            return
        elapsed = time.monotonic() - self._started
        left = elapsed / max(self._done - self._before, 1) * (self._steps - self._done)
        self._line(f"step {step:>5}/{self._steps}  {numbers}  {_clock(left)} left")

    def warn(self, message: str) -> None:
        """Show a warning above the bar."""
        warn(self._console, message)

    def __enter__(self) -> Self:
        """Start drawing."""
        self._started = time.monotonic()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop drawing; the last state stays on the screen."""
        self._bar.stop()

    def _line(self, text: str) -> None:
        say(self._console, text)


@contextmanager
def patience(console: Console, what: str, seconds: float) -> Iterator[None]:
    """Print a line every few seconds of a block that prints nothing itself.

    Args:
        console: where to print.
        what: the beginning of the line; how long the block has taken follows.
        seconds: between two lines.
    """
    started, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(seconds):
            say(console, f"{what}, {time.monotonic() - started:.0f} s so far")

    thread = threading.Thread(target=tell, name="patience", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def number(value: float | None, form: str) -> str:
    """Format a number, or "-" where there is none: None, or NaN in metrics."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def say(console: Console, line: str) -> None:
    """Print one line, with addresses shortened, and without wrapping, highlighting or markup."""
    console.print(shown(line), soft_wrap=True, highlight=False, markup=False)


def warn(console: Console, message: str) -> None:
    """Print a warning, above the progress bar if there is one."""
    console.print(f"warning: {shown(message)}", style="yellow", soft_wrap=True, highlight=False, markup=False)


def _heads(metrics: Mapping[str, float], side: str) -> str:
    prefix = f"{side}/ce_head_"
    return "CE " + " ".join(number(value, ".2f") for name, value in metrics.items() if name.startswith(prefix))


def _pairs(metrics: Mapping[str, float], side: str) -> str:
    loss, accuracy = number(metrics[f"{side}loss"], ".3f"), number(metrics[f"{side}accuracy"], ".1%")
    return f"loss {loss}  {accuracy} of pairs in order"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
