"""metrics.jsonl: one JSON object a line with `step`, `time` and the metrics of that moment. Every run writes it.

A line is in the file before the next step begins, so a process that is killed loses none. The file holds whole lines
only, on a disk that becomes full too. A resumed run cuts the file back to its checkpoint, which knows the hash of these
lines, and appends.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path

from mtp_ce.training.tracking.tracker import Warn

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """The metrics file of a run or stage; the first metrics create it.

    Args:
        folder: where it is, an existing folder.
        warn: takes one line when the file can't be written.
    """

    def __init__(self, folder: Path, warn: Warn) -> None:
        self._path = folder / METRICS_FILE
        self._warn = warn
        self._file: FileIO | None = None
        # Bytes of this run in the file, those of earlier processes included, and their hash.
        self._bytes, self._hash = 0, hashlib.sha256()
        self._failed = False

    def recorded(self) -> tuple[int, str]:
        """Flush the file to disk; return size and SHA-256 of what this run has written."""
        if self._file:
            with suppress(OSError):  # a file that can't be flushed must not cost a checkpoint
                os.fsync(self._file.fileno())
        return self._bytes, self._hash.hexdigest()

    def rewind(self, size: int, sha256: str | None) -> None:
        """Keep the first `size` bytes of an earlier process's file; without this call it is overwritten.

        Where they are there and have another hash, a warning says so.
        """
        # A resumed run whose first step is refused goes back once more.
        if self._file:
            self._file.close()
            self._file = None
        # On another machine the file may be missing or shorter than when the checkpoint was written.
        self._bytes, self._hash = 0, hashlib.sha256()
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            while chunk := file.read(min(2**20, size - self._bytes)):
                self._hash.update(chunk)
                self._bytes += len(chunk)
        if sha256 not in (None, self._hash.hexdigest()):
            self._warn(
                f"{self._path} is damaged: lines of earlier steps differ from what was written; they stay as they are"
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line; a value that is not finite is written as null."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        try:
            self._append(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        except OSError as error:  # a full disk must not end the training
            if not self._failed:
                self._warn(f"{self._path} can't be written from step {step} on ({error.strerror}); training continues")
            self._failed = True

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()

    def _append(self, line: str) -> None:
        if self._file is None:
            self._file = self._path.open("ab", buffering=0)
            self._file.truncate(self._bytes)
        data = line.encode()
        # An unbuffered write to a disk that becomes full writes a part and raises nothing.
        if self._file.write(data) != len(data):
            self._file.truncate(self._bytes)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._bytes += len(data)
        self._hash.update(data)
