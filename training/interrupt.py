"""Ctrl-C, SIGTERM and SIGHUP, deferred to a place where a run can stop and lose nothing.

outside a loop    the exception is raised at once, as Python does for Ctrl-C
inside a loop     the first signal sets a flag that the loop checks between steps; a second Ctrl-C raises at once
several ranks     the whole run is such a loop: all ranks agree on the flag before any leaves, because a rank that
                  leaves a collective by itself blocks the others. Work of rank 0 for which they wait may raise at once

Further SIGTERMs and SIGHUPs are ignored: a scheduler signals both torchrun and its workers, and torchrun forwards its
own signal.
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

# Signals that ask a process to end: a scheduler's, and that of a terminal or an ssh connection that is closed.
ENDING = (signal.SIGTERM, signal.SIGHUP)


class Stop:
    """A flag that stops a loop, with the signal that set it."""

    def __init__(self) -> None:
        self.signal = 0
        self._raises = False

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
    def at_once(self) -> Iterator[None]:
        """Raise StoppedError inside the block when a signal arrives, or at its start if one has arrived."""
        with self._mode(raises=True):
            self.check()
            yield

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only set the flag inside the block."""
        with self._mode(raises=False):
            yield

    @contextmanager
    def _mode(self, *, raises: bool) -> Iterator[None]:
        before, self._raises = self._raises, raises
        try:
            yield
        finally:
            self._raises = before

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Set the flag on a signal; the next Ctrl-C raises at once, further SIGTERMs and SIGHUPs are ignored."""
        self.set(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _ignore)
        if self._raises:
            self.check()


# The flag of the outermost `stop_on_signal` of the main thread.
_outermost: Stop | None = None


@contextmanager
def terminate_in_order() -> Iterator[None]:
    """Raise StoppedError on the first SIGTERM or SIGHUP, so that the run shuts down as after Ctrl-C; ignore others.

    Schedulers send SIGTERM to reclaim a machine, and torchrun sends it to the remaining ranks when one has died.
    """
    with ExitStack() as handlers:
        for number in ENDING:
            handlers.enter_context(_handled(number, signal.SIG_DFL, _raise_stopped))
        yield


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Yield a flag that the first Ctrl-C, SIGTERM or SIGHUP sets; a second Ctrl-C raises at once.

    The flag starts set if SIGTERM arrived during the last step of an earlier loop, which then completed. A block inside
    another one has the flag of the outer one.

    An exception raised in the middle of a step could land inside a C++ callback, where it is printed and lost, or
    between two writes of the optimizer.
    """
    global _outermost
    if _outermost is not None:
        with _outermost.deferred():
            yield _outermost
        return
    stop = Stop()
    for ending in ENDING:
        if signal.getsignal(ending) is _ignore:
            stop.set(ending)
    usual: dict[int, Handler] = {signal.SIGINT: signal.default_int_handler, **dict.fromkeys(ENDING, _raise_stopped)}
    with ExitStack() as handlers:
        for number, handler in usual.items():
            handlers.enter_context(_handled(number, handler, stop.handle))
        if threading.current_thread() is threading.main_thread():
            _outermost = stop
        try:
            yield stop
        finally:
            if _outermost is stop:
                _outermost = None


def ignore_sigterm() -> None:
    """Ignore SIGTERM and SIGHUP until the end of `terminate_in_order`, because a shutdown is already in progress.

    torchrun sends SIGTERM to the remaining ranks when one has failed, while they are failing too.
    """
    for number in ENDING:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) is _raise_stopped:
            signal.signal(number, _ignore)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    ignore_sigterm()
    raise StoppedError(number)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Ignore a signal that is not the first."""


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
