"""The cache: what can be made or downloaded again."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache's folder: $XDG_CACHE_HOME/mtp_ce or ~/.cache/mtp_ce."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtp_ce"


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Let one process at a time write `folder`, and remove what killed processes left beside it.

    The lock is on an empty file, `folder.lock`. It stays: a lock on a removed file excludes nobody.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for lock in folder.parent.glob("*.lock"):
        # Whoever writes with `whole_folder` holds the lock, so that these folders are nobody's.
        with suppress(OSError), _locked(lock, fcntl.LOCK_NB):
            for aside in folder.parent.glob(f".{lock.stem}.*"):
                shutil.rmtree(aside, ignore_errors=True)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        yield


@contextmanager
def _locked(lock: Path, flags: int = 0) -> Iterator[None]:
    with lock.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
        yield
