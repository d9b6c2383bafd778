"""Exceptions that end a run; the command line turns each into one line and an exit code."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager

# Characters of what a library says that are shown.
_LONGEST_REASON = 240


class RecipeError(ValueError):
    """A user error: the message is one line that names the key or path and the way out."""


class StepRefusedError(RuntimeError):
    """Loss, gradient or token weights were out of bounds; the optimizer step was not taken.

    Attributes:
        step: the refused step, counted from 1.
        quantity: name of the metric that was out of bounds.
        value: its value.
    """

    def __init__(self, step: int, quantity: str, value: float, expected: str = "a finite number") -> None:
        advice = "" if math.isfinite(value) else ". A lower learning rate or a longer warm-up usually helps"
        super().__init__(
            f"{quantity} is {value} at step {step}, expected {expected}; the step was not taken and the run ends "
            f"FAILED{advice}"
        )
        self.step = step
        self.quantity = quantity
        self.value = value


class StoppedError(KeyboardInterrupt):
    """The run was stopped by a signal. Like Ctrl-C, it is not caught by `except Exception`.

    Attributes:
        signal: SIGINT or SIGTERM.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


class LeaderFailedError(RuntimeError):
    """Rank 0 failed and reports the cause; the other ranks exit silently."""


@contextmanager
def readable(key: str, source: str, problem: str = "can't be read") -> Iterator[None]:
    """Turn what a library raises about a user's files into one line: anything, where they are damaged.

    Args:
        key: recipe key that names the files.
        source: value of that key.
        problem: what it means for the key.

    Raises:
        RecipeError: the block raised an exception.
    """
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise RecipeError(f"{key} '{source}' {problem}: {type(error).__name__}: {reason}") from error
