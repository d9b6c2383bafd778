"""What a person sees of a run: a bar that moves, or plain lines where there is no terminal, and a table."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from mtp_ce.training.evaluation import Evaluation


class Display:
    """The progress of a run.

    On a terminal, one line that is redrawn. Elsewhere (a file, a pipe, a CI log), one line each time
    metrics arrive, which stays readable because nothing is redrawn.

    Args:
        console: where to write.
        steps: how many steps the run has.
        done: how many of them an earlier process has done.
    """

    def __init__(self, console: Console, steps: int, done: int = 0) -> None:
        self._console = console
        self._steps = steps
        self._before = done
        self._done = done
        self._started = time.monotonic()
        self._bar = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
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
        """Show the newest metrics of a model or of a critic, of training or of validation."""
        if "train/loss" in metrics:
            loss, rate = metrics["train/loss"], metrics["perf/tokens_per_s"]
            numbers = f"loss {loss:.3f}  {_heads(metrics, 'train')}  {rate:,.0f} tokens/s"
        elif "critic/loss" in metrics:
            numbers = f"loss {metrics['critic/loss']:.3f}  {metrics['critic/accuracy']:.1%} of pairs in order"
        else:
            found = f"{_heads(metrics, 'val')} nats"
            if "critic/val_loss" in metrics:
                found = f"loss {metrics['critic/val_loss']:.3f}  {metrics['critic/val_accuracy']:.1%} of pairs in order"
            self._line(f"step {step:>5}  validation  {found}")
            if self._done == self._before:
                # What came before the first step says nothing about how long steps take.
                self._started = time.monotonic()
            return
        if self._console.is_terminal:
            self._bar.update(self._task, numbers=numbers)
            return
        elapsed = time.monotonic() - self._started
        left = elapsed / max(self._done - self._before, 1) * (self._steps - self._done)
        self._line(f"step {step:>5}/{self._steps}  {numbers}  {_clock(left)} left")

    def warn(self, message: str) -> None:
        """Show a warning above the bar."""
        warn(self._console, message)

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._started = time.monotonic()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        self._bar.stop()

    def _line(self, text: str) -> None:
        say(self._console, text)


def say(console: Console, line: str) -> None:
    """Print a line as it is, however long."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def warn(console: Console, message: str) -> None:
    """Print a warning; above the bar where one is shown."""
    console.print(f"warning: {message}", style="yellow", soft_wrap=True, highlight=False, markup=False)


def results_table(evaluation: Evaluation) -> Table:
    """Lay out an evaluation, one line per head, beside what token frequencies alone would score."""
    title = f"held-out text: {evaluation.heads[0].rows:,} tokens; cross entropies in nats"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", collapse_padding=True, pad_edge=False)
    before, decoding = evaluation.before, evaluation.decoding
    columns = ["head", *(["before"] if before else []), "CE", "unigram", "perplexity", "top-1", "top-5"]
    for column in (*columns, "agrees", *(["kept"] if decoding else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for h, result in enumerate(evaluation.heads):
        table.add_row(
            f"{h} (+{h + 1})",
            *([f"{before[h].ce:.3f}"] if before else []),
            f"{result.ce:.3f}",
            f"{evaluation.unigram:.3f}",
            f"{result.perplexity:,.1f}",
            f"{result.top1:.1%}",
            f"{result.top5:.1%}",
            "" if h == 0 or result.agrees is None else f"{result.agrees:.1%}",
            *(["" if h == 0 else f"{decoding.kept[h - 1]:.1%}"] if decoding else []),
        )
    return table


def say_evaluation(console: Console, evaluation: Evaluation) -> None:
    """Show the table, what its columns mean, and what decoding found."""
    console.print(results_table(evaluation))
    lines = ["unigram: cross entropy of the held-out tokens under the training tokens' frequencies, add-one smoothed"]
    if evaluation.tokens_per_forward:
        lines.append(
            "agrees: this head and all before it say what head 0 says later, in the held-out text; "
            f"{evaluation.tokens_per_forward:.2f} tokens per forward, if decoding went like that"
        )
    if decoding := evaluation.decoding:
        found = decoding.speculation
        lines += [
            "kept: rounds of decoding in which this head's token and all before it were kept",
            f"decoding: {decoding.prompts} prompts of {decoding.prompt_tokens} tokens, {found.tokens:,} new tokens: "
            f"{found.tokens_per_forward:.2f} tokens per forward (acceptance length {found.acceptance_length:.2f}), "
            f"{decoding.speedup:.2f} times the speed of plain generate; the same text for {decoding.identical} of "
            f"{decoding.prompts}",
        ]
    for line in lines:
        say(console, line)


def _heads(metrics: Mapping[str, float], side: str) -> str:
    prefix = f"{side}/ce_head_"
    return "CE " + " ".join(f"{value:.2f}" for name, value in metrics.items() if name.startswith(prefix))


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
