"""Output that fails ends no command: a reader that went away, a full disk, an encoding that lacks a character."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


@contextmanager
def unfailing_output() -> Iterator[None]:
    """Keep errors of stdout and stderr from ending the block, and from changing the exit code of the process."""
    # A process can be started without them. The next file to be opened would take their place, and what libraries
    # print would be written into it.
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)
    before = sys.stdout, sys.stderr
    streams = [stream and _Unfailing(stream) for stream in before]
    sys.stdout, sys.stderr = streams  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in filter(None, streams):
            stream.end()
        sys.stdout, sys.stderr = before


class _Unfailing:
    """A stream that drops what it can't write, and escapes characters that its encoding lacks.

    Args:
        stream: has all other methods.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text if possible; return its length."""
        self._attempt(lambda: self._stream.write(self._encodable(text)))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write lines if possible."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Flush if possible."""
        self._attempt(self._stream.flush)

    def end(self) -> None:
        """Flush, and discard what can't be flushed: the interpreter would try it again and exit with 120."""
        if not self._attempt(self._stream.flush):
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def _encodable(self, text: str) -> str:
        encoding = self._stream.encoding or "utf-8"
        try:
            text.encode(encoding, self._stream.errors or "strict")
        except UnicodeEncodeError:
            return text.encode(encoding, "backslashreplace").decode(encoding)
        return text

    def _attempt(self, write: Callable[[], object]) -> bool:
        try:
            write()
        except (OSError, ValueError) as error:  # a closed stream raises ValueError
            # A reader that goes away, as head does, wants no more; anything else is worth a line.
            if not self._failed and not isinstance(error, BrokenPipeError) and self is sys.stdout:
                reason = getattr(error, "strerror", None) or error
                print(f"warning: stdout can't be written ({reason}); the command goes on", file=sys.stderr)
            self._failed = True
            return False
        return True
