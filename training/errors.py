"""Exceptions that end a run; the command line turns each into one line and an exit code."""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from mtp_ce.training.addresses import shown

# Characters of what a library says that are shown.
_LONGEST_REASON = 240


class RecipeError(ValueError):
    """A user error: the message is one line that names the key or path and the way out, with addresses shortened."""

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))


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


def system_error(error: BaseException) -> OSError | None:
    """Return the error of the system behind an exception; None: there is none.

    Libraries in Rust and C++ report it in their text alone: `No space left on device (os error 28)`, or
    `unable to open file </a/b> in read-only mode: Input/output error (5)`.
    """
    if isinstance(error, OSError):
        return error
    text = str(error) if isinstance(error, Exception) else ""
    for number in map(int, re.findall(r"\((?:os error )?([1-9]\d{0,2})\)", text)):
        if (reason := os.strerror(number)) in text:
            named = re.search(r"<(/[^>]*)>", text)
            return OSError(number, reason, named[1] if named else None)
    return None


# Of a model or tokenizer whose files come with Python code.
NEVER_RUN = (
    "needs Python code that comes with it, which is never run; load it yourself, with transformers and "
    "trust_remote_code=True, and train it with mtp_ce.MTPWrapper(model, horizon)"
)


@contextmanager
def refuse_unloadable(key: str, source: str, problem: str = "can't be read") -> Iterator[None]:
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
        reason = " ".join(str(error).split())
        # The advice of transformers is to pass an argument, which no recipe has.
        if "trust_remote_code" in reason:
            raise RecipeError(f"{key} '{source}' {problem}: it {NEVER_RUN}") from error
        reason = reason[:_LONGEST_REASON]
        raise RecipeError(f"{key} '{source}' {problem}: {type(error).__name__}: {reason}") from error
