"""Ctrl-C and SIGTERM as a question that the loop asks between two steps.

outside a loop    the exception is raised at once, as Python does for Ctrl-C by itself
inside a loop     the first signal is noted, and the loop ends after the step; a second Ctrl-C ends it at once

A second SIGTERM says nothing new: a scheduler sends one to torchrun and to its workers, and torchrun passes its own on.
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
    """Whether a loop was asked to end, and how."""

    def __init__(self) -> None:
        self.signal = 0

    def set(self, number: int = signal.SIGINT) -> None:
        """Ask for it."""
        self.signal = number

    def is_set(self) -> bool:
        """Whether anyone asked."""
        return self.signal != 0

    def check(self) -> None:
        """Raise StoppedError where anyone asked."""
        if self.signal:
            raise StoppedError(self.signal)


@contextmanager
def terminate_in_order() -> Iterator[None]:
    """Have the first SIGTERM raise StoppedError, so that what has begun is ended as after Ctrl-C; more do nothing.

    Schedulers send it when they want a machine back, and torchrun to the ranks that are left when one has died.
    """
    with _handled(signal.SIGTERM, signal.SIG_DFL, _raise_stopped):
        yield


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Give a flag that the first Ctrl-C or SIGTERM sets; a second Ctrl-C acts at once.

    It is set from the beginning where SIGTERM came in the last step of an earlier loop, which then came to its end.

    An exception thrown into the middle of a step could land inside a C++ callback, where it is printed and
    forgotten, or between an optimizer's two writes.
    """
    stop = Stop()
    if signal.getsignal(signal.SIGTERM) is _has_come:
        stop.set(signal.SIGTERM)

    def request(number: int, frame: FrameType | None) -> None:
        stop.set(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _has_come)

    usual: dict[int, Handler] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _raise_stopped}
    with ExitStack() as handlers:
        for number, handler in usual.items():
            handlers.enter_context(_handled(number, handler, request))
        yield stop


def ignore_sigterm() -> None:
    """Have SIGTERM do nothing up to the end of `terminate_in_order`: what is under way is an end already.

    torchrun sends one to the ranks that are left when one has failed, while they fail too.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is _raise_stopped:
        signal.signal(signal.SIGTERM, _has_come)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    signal.signal(number, _has_come)
    raise StoppedError(number)


def _has_come(number: int, frame: FrameType | None) -> None:
    """Take a SIGTERM that is not the first."""


@contextmanager
def _handled(number: int, usual: Handler, handler: Handler) -> Iterator[None]:
    # Only the main thread may set a handler; one that is not the usual one, such as to ignore Ctrl-C, stays.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) is not usual:
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    except BaseException:
        # What leaves a loop ends the run.
        usual = _has_come if usual is _raise_stopped else usual
        raise
    finally:
        if not (signal.getsignal(number) is _has_come and usual is _raise_stopped):
            signal.signal(number, usual)
