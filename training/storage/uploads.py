"""Upload of finished folders to S3 while training continues.

    uploads = Uploads("s3://bucket/runs/first", warn, keep=3)
    uploads.send(folder, "step-100")        # returns at once
    uploads.close(60)

Training never waits for S3 and never fails with it: a thread uploads one folder after another, a failure is one line,
and the next folder is a new attempt.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.folders import complete_folders, delete_folder, upload_folder

# The recipe's key that holds the address, for messages.
_KEY = "checkpoint.upload"

# How long the end of a run waits for the remaining uploads.
FINISHED_S = 3600.0
STOPPED_S = 90.0


@contextmanager
def copies(address: str | None, warn: Callable[[str], None], keep: int) -> Iterator[Callable[[Path], None]]:
    """Yield a function that uploads a finished folder under its own name; without an address, it does nothing.

    The end of the block waits for the remaining uploads: FINISHED_S seconds, or STOPPED_S after an exception. Whoever
    sent SIGTERM may not wait as long: torchrun kills its workers after 30 seconds.

    Args:
        address: s3://bucket/prefix.
        warn: as for `Uploads`.
        keep: as for `Uploads`.
    """
    if address is None:
        yield lambda folder: None
        return
    uploads = Uploads(address, warn, keep)
    seconds = STOPPED_S
    try:
        yield lambda folder: uploads.send(folder, folder.name)
        seconds = FINISHED_S
    finally:
        uploads.close(seconds)


class Uploads:
    """A thread that uploads folders from a queue, in order.

    Args:
        address: s3://bucket/prefix; folders lie directly below it.
        warn: receives one line for each folder that could not be uploaded, from another thread.
        keep: how many complete folders of one kind stay, the latest; names that differ only in digits, as step-10 and
            step-20, are of one kind.
    """

    def __init__(self, address: str, warn: Callable[[str], None], keep: int) -> None:
        self._address = address.rstrip("/")
        self._warn = warn
        self._keep = keep
        self._folders: SimpleQueue[tuple[Path, str] | None] = SimpleQueue()
        # Names in their order in the queue; the first is being uploaded.
        self._waiting: list[str] = []
        # Part of them may be in S3, where nothing else removes it.
        self._failed: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def send(self, folder: Path, name: str) -> None:
        """Put a finished folder into the queue; it is uploaded to address/name and replaces a folder there."""
        self._waiting.append(name)
        self._folders.put((folder, name))

    def close(self, seconds: float) -> None:
        """Wait for the remaining uploads, at most some seconds; then warn about the others and give them up."""
        self._folders.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._stop.set()
            names = ", ".join(list(self._waiting))
            self._warn(f"{_KEY} {self._address} lacks {names} after {seconds:g} s; given up")

    def _work(self) -> None:
        while (queued := self._folders.get()) is not None and not self._stop.is_set():
            folder, name = queued
            try:
                self._upload(folder, name)
            except Exception as error:  # whatever it is, training continues
                self._failed.add(name)
                if not self._stop.is_set():
                    self._warn(f"{_one_line(error)}; training continues")
            self._waiting.remove(name)

    def _upload(self, folder: Path, name: str) -> None:
        address = f"{self._address}/{name}"
        try:
            # In this daemon thread alone: a silent server must not delay the end of the process.
            upload_folder(_KEY, folder, address, overwrite=True, stop=self._stop, parallel=False)
        except RecipeError:
            if folder.is_dir():
                raise
            raise RecipeError(f"{_KEY} {address}: {folder} was deleted before it was uploaded") from None
        self._failed.discard(name)
        alike = [other for other in complete_folders(_KEY, self._address) if _kind(other) == _kind(name)]
        for old in [*alike[: -self._keep], *sorted(self._failed)]:
            delete_folder(_KEY, f"{self._address}/{old}")
            self._failed.discard(old)


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, RecipeError) else f"{type(error).__name__}: {text}"
