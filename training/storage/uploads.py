"""Finished folders go to S3 while training goes on.

    uploads = Uploads("s3://bucket/runs/first", warn, keep=3)
    uploads.send(folder, "step-100")        # returns at once
    uploads.close(60)

Training never waits for S3 and never fails with it: a thread of its own uploads one folder after another, what goes
wrong is one line, and the next folder is a new attempt.
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

# How long the end of a run waits for what is not uploaded yet.
FINISHED_S = 3600.0
STOPPED_S = 90.0


@contextmanager
def copies(address: str | None, warn: Callable[[str], None], keep: int) -> Iterator[Callable[[Path], None]]:
    """Give what sends a finished folder to S3 under its own name; without an address, what does nothing.

    The end of the block waits for what is left: long, or where it is left by an exception, for a while. Who has sent
    SIGTERM may not wait as long: torchrun ends its workers after 30 seconds.

    Args:
        address: s3://bucket/prefix.
        warn: as of `Uploads`.
        keep: as of `Uploads`.
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
    """A thread that uploads folders, in order, from a queue.

    Args:
        address: s3://bucket/prefix; folders lie directly below it.
        warn: takes one line for each folder that does not get there, from another thread.
        keep: complete folders of one kind that stay there, the latest; names are of one kind where they differ in
            digits alone, as step-10 and step-20 do.
        key: the recipe's key that holds the address, for messages.
    """

    def __init__(self, address: str, warn: Callable[[str], None], keep: int, key: str = "checkpoint.upload") -> None:
        self._address = address.rstrip("/")
        self._warn = warn
        self._keep = keep
        self._key = key
        self._folders: SimpleQueue[tuple[Path, str] | None] = SimpleQueue()
        # Names in the order of sending; the first is being uploaded.
        self._waiting: list[str] = []
        # Half of them may be there, of which a server has no end by itself.
        self._failed: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def send(self, folder: Path, name: str) -> None:
        """Put a finished folder into the queue; it goes to address/name and replaces what is there."""
        self._waiting.append(name)
        self._folders.put((folder, name))

    def close(self, seconds: float) -> None:
        """Wait for what is left, at most some seconds; what is not there by then is named and given up."""
        self._folders.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._stop.set()
            names = ", ".join(list(self._waiting))
            self._warn(f"{self._key} {self._address} has no {names} after {seconds:g} s; given up")

    def _work(self) -> None:
        while (sent := self._folders.get()) is not None and not self._stop.is_set():
            folder, name = sent
            try:
                self._upload(folder, name)
            except Exception as error:  # whatever it is, training goes on
                self._failed.add(name)
                if not self._stop.is_set():
                    self._warn(f"{_one_line(error)}; training goes on")
            self._waiting.remove(name)

    def _upload(self, folder: Path, name: str) -> None:
        address = f"{self._address}/{name}"
        try:
            # In this thread alone, a daemon: a server that has fallen silent does not hold up the end of the run.
            upload_folder(self._key, folder, address, overwrite=True, stop=self._stop, parallel=False)
        except RecipeError:
            if folder.is_dir():
                raise
            raise RecipeError(f"{self._key} {address}: {folder} was deleted before it was uploaded") from None
        self._failed.discard(name)
        alike = [other for other in complete_folders(self._key, self._address) if _kind(other) == _kind(name)]
        for old in [*alike[: -self._keep], *sorted(self._failed)]:
            delete_folder(self._key, f"{self._address}/{old}")
            self._failed.discard(old)


def _kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, RecipeError) else f"{type(error).__name__}: {text}"
