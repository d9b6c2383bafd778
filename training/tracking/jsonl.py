"""metrics.jsonl: one JSON object a line with `step`, `time` and the metrics of that moment. Every run writes it.

A line is in the file before the next step begins, so a process that is killed loses none. The file holds whole lines
only, on a disk that becomes full too. A resumed run cuts the file back to its checkpoint and appends.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping
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
        self._resumed_bytes = 0
        self._failed = False

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self._path.stat().st_size if self._path.exists() else 0

    def rewind(self, size: int) -> None:
        """Keep the first `size` bytes of an earlier process's file; without this call it is overwritten."""
        # A resumed run whose first step is refused goes back once more.
        if self._file:
            self._file.close()
            self._file = None
        # On another machine the file may be missing or shorter than when the checkpoint was written.
        self._resumed_bytes = min(size, self.size)

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
            self._file.truncate(self._resumed_bytes)
        before, data = self.size, line.encode()
        # An unbuffered write to a disk that becomes full writes a part and raises nothing.
        if self._file.write(data) != len(data):
            self._file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
