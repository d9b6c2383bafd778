"""Whether Python compiles a text: asked in a process of its own, under limits of time and memory.

CPython's compiler copies every `finally` block, so that 755 characters of nested ones take 18 s and 1.9 GB. What is too
long or too deep is not compiled at all; the rest is, by one long-lived process, which the system ends at its limit. The
limit is of processor time, so that a busy machine changes no answer.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache

MAX_CHARACTERS = 200_000
MAX_DEPTH = 14
MAX_SECONDS = 4
MAX_BYTES = 1 << 30

# Reads the length of a text and the text, answers 1 or 0. It imports no package, and shares no `__future__` statement
# with this file. Every text may use `seconds` more than were used before it.
_PROGRAM = f"""
import resource, sys, time, warnings
warnings.simplefilter("ignore")
for limit, most in ((resource.RLIMIT_AS, {MAX_BYTES}), (resource.RLIMIT_CORE, 0)):
    try:
        resource.setrlimit(limit, (most, most))
    except (ValueError, OSError):
        pass  # not on this system
hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
while head := sys.stdin.buffer.read(8):
    source = sys.stdin.buffer.read(int.from_bytes(head, "big")).decode("utf-8", "surrogatepass")
    until = int(time.process_time()) + 1 + {MAX_SECONDS}
    resource.setrlimit(resource.RLIMIT_CPU, (until if hard == resource.RLIM_INFINITY else min(until, hard), hard))
    try:
        compile(source, "<corpus>", "exec")
        answer = b"1"
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        answer = b"0"
    sys.stdout.buffer.write(answer)
    sys.stdout.buffer.flush()
"""


class _Compiler:
    """The process, started when it is first asked, and again after it was ended by a limit."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._owner = 0

    def ask(self, source: str) -> bool:
        with self._lock:
            for _ in range(2):
                try:
                    if answer := self._answer(source):
                        return answer == b"1"
                except BaseException:
                    # The answer to this text must not be taken for that to the next one.
                    self.end()
                    raise
                # The process has ended. By its limit of time: no. By anything else, such as a machine out of memory:
                # asked again once.
                if self.end() == -signal.SIGXCPU:
                    return False
        return False

    def _answer(self, source: str) -> bytes:
        # A process that was forked off this one must not read the answers of its parent.
        if self._process is None or self._owner != os.getpid():
            self._process, self._owner = self._start(), os.getpid()
        data = source.encode("utf-8", "surrogatepass")
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(len(data).to_bytes(8, "big") + data)
            self._process.stdin.flush()
        except BrokenPipeError:
            return b""
        return self._process.stdout.read(1)

    def _start(self) -> subprocess.Popen[bytes]:
        # In a session of its own it gets no Ctrl-C; it ends with its standard input.
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def end(self) -> int | None:
        """End the process, if it runs and belongs to this one, and return its exit code."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return None
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                if pipe:
                    pipe.close()
        with suppress(subprocess.TimeoutExpired):
            # It may be about to end, and then its exit code says why.
            return process.wait(0.5)
        process.kill()
        return process.wait()


_COMPILER = _Compiler()
atexit.register(_COMPILER.end)


# A function is asked about again for every corruption of it.
@lru_cache(maxsize=64)
def compiles(source: str) -> bool:
    """Return whether Python compiles a text, without running it; False where that takes too much."""
    if len(source) > MAX_CHARACTERS or _depth(source) > MAX_DEPTH:
        return False
    return _COMPILER.ask(source)


def _depth(source: str) -> int:
    """Return how many indented blocks are inside each other, at most: lines of brackets and of texts count as well."""
    margins = [0]
    deepest = 0
    for line in source.splitlines():
        inside = line.lstrip(" \t\f")
        if not inside or inside[0] in "#)]}\"'":
            continue
        margin = len(line) - len(inside)
        while margin < margins[-1]:
            margins.pop()
        if margin > margins[-1]:
            margins.append(margin)
            deepest = max(deepest, len(margins) - 1)
    return deepest
