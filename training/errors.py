"""Exceptions that end a run; the command line turns each into one line and an exit code."""

from __future__ import annotations

import math
import signal


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
