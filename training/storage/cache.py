"""The cache: what can be made or downloaded again. Every entry is verified before its first use in a process."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.atomic import MANIFEST, damage, remove_strays, whole_folder

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the cache's folder: $XDG_CACHE_HOME/mtp_ce or ~/.cache/mtp_ce."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtp_ce"


def cached(
    folder: Path, make: Callable[[Path], object], *, lazy: bool = False, forget: Callable[[Path], None] | None = None
) -> Path:
    """Return an entry of the cache; make it where it is absent or damaged.

    One process at a time makes an entry, and the others wait for it.

    Args:
        folder: of the entry, below `cache_folder()`; its name is a hash of everything that decides its contents.
        make: writes the files into the empty folder that it gets.
        lazy: as for `damage`.
        forget: called with a damaged entry before it is made again.

    Raises:
        RecipeError: the cache can't be written, or belongs to another user.
    """
    if usable(folder, lazy=lazy):
        return folder
    with _writing(folder), _exclusive(folder):
        # Another process may have made it while this one waited.
        if not usable(folder, lazy=lazy):
            if folder.exists():
                logger.warning("cache entry %s is damaged (%s); it is made again", folder, damage(folder, lazy=lazy))
                if forget:
                    forget(folder)
            with whole_folder(folder, replace=True) as aside:
                make(aside)
    return folder


def usable(folder: Path, *, lazy: bool = False) -> bool:
    """Return whether an entry is in the cache and undamaged.

    Raises:
        RecipeError: it belongs to another user, or everyone can write to it.
    """
    if not folder.exists():
        return False
    root = cache_folder()
    for path in (folder, *(parent for parent in folder.parents if parent == root or root in parent.parents)):
        if (owner := path.stat().st_uid) != os.getuid():
            raise RecipeError(
                f"cache folder {path} belongs to another user (uid {owner}), who could change what is trained on; set "
                "XDG_CACHE_HOME to a folder of your own"
            )
    if folder.stat().st_mode & stat.S_IWOTH:
        raise RecipeError(f"cache folder {folder} can be written by every user; run chmod -R o-w {folder}")
    return damage(folder, lazy=lazy) is None


def discard(folder: Path) -> None:
    """Mark an entry as damaged, so that the next process makes it again."""
    with suppress(OSError):
        (folder / MANIFEST).unlink()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Report in one line that the cache is read-only or no folder; other errors pass, such as a full disk."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        in_cache = str(error.filename or "").startswith(str(cache_folder().parent))
        if not in_cache or error.errno not in _NOT_WRITABLE:
            raise
        raise RecipeError(
            f"cache {error.filename} can't be written ({error.strerror}); set XDG_CACHE_HOME to a folder of your own"
        ) from None


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Let one process at a time write an entry, and remove what killed processes left beside it.

    The lock is on an empty file, `folder.lock`. It stays: a lock on a removed file excludes nobody.
    """
    remove_strays(folder.parent)
    with folder.with_name(f"{folder.name}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
