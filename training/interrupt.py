"""Ctrl-C and SIGTERM, deferred to the border between two steps of a training loop.

outside a loop    the exception is raised at once, as Python does for Ctrl-C
inside a loop     the first signal sets a flag that the loop checks between steps; a second Ctrl-C raises at once

Further SIGTERMs are ignored: a scheduler signals both torchrun and its workers, and torchrun forwards its own signal.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from mtp_ce.training.errors import StoppedError

Handler = Callable[[int, FrameType | None], Any] | signal.Handlers


class Stop:
    """A flag that stops a loop, with the signal that set it."""

    def __init__(self) -> None:
        self.signal = 0

    def set(self, number: int = signal.SIGINT) -> None:
        """Set the flag."""
        self.signal = number

    def is_set(self) -> bool:
        """Return whether the flag is set."""
        return self.signal != 0

    def check(self) -> None:
        """Raise StoppedError if the flag is set."""
        if self.signal:
            raise StoppedError(self.signal)


@contextmanager
def terminate_in_order() -> Iterator[None]:
    """Raise StoppedError on the first SIGTERM, so that the run shuts down as after Ctrl-C; ignore further ones.

    Schedulers send SIGTERM to reclaim a machine, and torchrun sends it to the remaining ranks when one has died.
    """
    with _handled(signal.SIGTERM, signal.SIG_DFL, _raise_stopped):
        yield


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Yield a flag that the first Ctrl-C or SIGTERM sets; a second Ctrl-C raises at once.

    The flag starts set if SIGTERM arrived during the last step of an earlier loop, which then completed.

    An exception raised in the middle of a step could land inside a C++ callback, where it is printed and lost, or
    between two writes of the optimizer.
    """
    stop = Stop()
    if signal.getsignal(signal.SIGTERM) is _ignore:
        stop.set(signal.SIGTERM)

    def request(number: int, frame: FrameType | None) -> None:
        stop.set(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _ignore)

    usual: dict[int, Handler] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _raise_stopped}
    with ExitStack() as handlers:
        for number, handler in usual.items():
            handlers.enter_context(_handled(number, handler, request))
        yield stop


def ignore_sigterm() -> None:
    """Ignore SIGTERM until the end of `terminate_in_order`, because a shutdown is already in progress.

    torchrun sends SIGTERM to the remaining ranks when one has failed, while they are failing too.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is _raise_stopped:
        signal.signal(signal.SIGTERM, _ignore)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    signal.signal(number, _ignore)
    raise StoppedError(number)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Ignore a SIGTERM that is not the first."""


@contextmanager
def _handled(number: int, usual: Handler, handler: Handler) -> Iterator[None]:
    # Only the main thread may set a handler; a handler that is not Python's default, such as SIG_IGN, stays.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) is not usual:
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    except BaseException:
        # An exception that leaves a loop ends the run.
        usual = _ignore if usual is _raise_stopped else usual
        raise
    finally:
        if not (signal.getsignal(number) is _ignore and usual is _raise_stopped):
            signal.signal(number, usual)
