"""Paths as users write them."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

from mtp_ce.training.errors import RecipeError

_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

# Nothing is there; any other error means that the path can't even be looked up.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


def user_path(key: str, text: str) -> Path:
    """Return a path with ~ and ~user expanded, whether or not something is there.

    Args:
        key: the recipe key or argument that names it, for messages.
        text: the path.

    Raises:
        RecipeError: there is no such user, or the path can't be looked up: too long, or below a closed folder.
    """
    try:
        path = Path(text).expanduser()
        path.lstat()
    except RuntimeError:
        raise RecipeError(f"{key} is '{text}', but there is no user {text.partition('/')[0][1:]}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno not in _ABSENT:
            reason = error.strerror if isinstance(error, OSError) else error
            raise RecipeError(f"{key} is '{text[:200]}', which can't be looked up: {reason}") from None
    return path


def special_file(path: Path) -> str | None:
    """Return what a path is where reading it may never end: a named pipe, a socket or a device; None elsewhere.

    Raises:
        OSError: it can't be looked up.
    """
    return _SPECIAL.get(stat.S_IFMT(path.stat().st_mode))
