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
        reason: the three in words, with what was expected.
    """

    when, consequence = "at step", "the step was not taken"

    def __init__(self, step: int, quantity: str, value: float, expected: str = "a finite number") -> None:
        advice = "" if math.isfinite(value) else ". A lower learning rate or a longer warm-up usually helps"
        self.reason = f"{quantity} is {value} {self.when} {step}, expected {expected}"
        super().__init__(f"{self.reason}; {self.consequence} and the run ends FAILED{advice}")
        self.step = step
        self.quantity = quantity
        self.value = value


class StateRefusedError(StepRefusedError):
    """A step left a number out of bounds: a parameter, an optimizer moment, a validation; nothing of it is saved.

    Attributes:
        step: number of steps done.
        quantity: name of the tensor or metric.
        value: its value.
    """

    when, consequence = "after step", "nothing of it is saved"


class StoppedError(KeyboardInterrupt):
    """The run was stopped by a signal. Like Ctrl-C, it is not caught by `except Exception`.

    Attributes:
        signal: SIGINT, SIGTERM or SIGHUP.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


class LeaderFailedError(RuntimeError):
    """Rank 0 failed and reports the cause; the other ranks exit silently."""
