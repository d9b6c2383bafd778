"""The faults of shim.c where there is no compiler: by an audit hook, and so for Python's own calls only.

Writes of file objects, libraries in C and Rust, and closing are not seen.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any

KINDS = ("open", "read", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "link", "truncate", "meta")

# Event of the audit hook -> kind, and where its arguments have the descriptor of the folder that a path is relative to.
_EVENTS = {
    "os.rename": ("rename", 2),
    "os.mkdir": ("mkdir", 2),
    "os.remove": ("unlink", 1),
    "os.rmdir": ("rmdir", 1),
    "os.link": ("link", 2),
    "os.symlink": ("link", 2),
    "os.truncate": ("truncate", None),
    "os.chmod": ("meta", 2),
    "os.utime": ("meta", 3),
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# What fails on a disk that is full, and what does not fail on one that became read-only.
_TAKES_SPACE = {"open", "write", "mkdir", "link", "truncate"}
_CHANGES_NOTHING = {"read", "fsync"}


def fault_set(folder: str, wanted: str, n: int, error: int, log: int) -> None:
    """As in shim.c."""
    if n and wanted not in KINDS:
        raise ValueError(f"unknown kind of call {wanted!r}")
    counts = dict.fromkeys(KINDS, 0)
    struck = False

    def within(path: str) -> bool:
        return path == folder or path.startswith(f"{folder}/")

    def strike(kind: str, *paths: str) -> None:
        nonlocal struck
        counts[kind] += 1
        fails, now = False, not struck and kind == wanted and counts[kind] == n
        if struck:
            fails = (error == errno.ENOSPC and kind in _TAKES_SPACE) or (
                error == errno.EROFS and kind not in _CHANGES_NOTHING
            )
        what = "struck" if now else "fails" if fails else "call"
        write(log, "\t".join((what, kind, *paths, *[""] * (2 - len(paths)))).encode() + b"\n")
        struck |= now
        if now and error < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if now or fails:
            raise OSError(error, os.strerror(error), paths[0])

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = place(arguments[0])
            if within(path):
                strike("open" if arguments[2] & _WRITES else "read", path)
        elif event in _EVENTS:
            kind, at = _EVENTS[event]
            names = arguments[:2] if kind in ("rename", "link") else arguments[:1]
            base = arguments[at] if at is not None and at < len(arguments) else -1
            paths = [place(name, base) for name in names if isinstance(name, str | bytes | os.PathLike)]
            if any(map(within, paths)):
                strike(kind, *paths)

    write = os.write

    def watched(kind: str, call: Any) -> Any:
        def wrapper(descriptor: int, *arguments: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if within(path):
                strike(kind, path)
            return call(descriptor, *arguments)

        return wrapper

    for name, kind in (("write", "write"), ("fsync", "fsync"), ("fdatasync", "fsync"), ("ftruncate", "truncate")):
        setattr(os, name, watched(kind, getattr(os, name)))
    sys.addaudithook(hook)


def place(name: Any, folder: int = -1) -> str:
    """The absolute path of a name, relative to the folder of a descriptor or to the working directory."""
    path = os.fsdecode(name)
    if path.startswith("/"):
        return path
    return os.path.join(os.getcwd() if folder == -1 else os.readlink(f"/proc/self/fd/{folder}"), path)
