"""Ctrl-C as a question that the loop asks between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType


@contextmanager
def stop_on_interrupt() -> Iterator[Event]:
    """Give an event that the first Ctrl-C sets; a second one interrupts at once, as usual.

    An exception thrown into the middle of a step could land inside a C++ callback, where it is printed and
    forgotten, or between an optimizer's two writes.
    """
    stop = Event()
    usual = signal.getsignal(signal.SIGINT)

    def request(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, usual)

    # Only the main thread may set a handler, and a process started to ignore Ctrl-C goes on ignoring it.
    if threading.current_thread() is not threading.main_thread() or usual is not signal.default_int_handler:
        yield stop
        return
    signal.signal(signal.SIGINT, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, usual)
