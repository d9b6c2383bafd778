"""Files and folders that are complete on disk or absent, and folders whose contents can be verified.

    write_file(path, text)                    a file
    with whole_folder(folder) as aside: ...   a folder, with the size and hash of each of its files in MANIFEST
    damage(folder)                            what differs from that manifest; None: nothing

Each is written aside, flushed to disk, renamed, and the parent flushed; what it replaces is deleted last. A process
that dies leaves a file or folder aside, `.NAME.mtp_XXXXXXXX`. It was locked by the process that wrote it, so that
`remove_strays` finds those of dead processes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from mtp_ce.training.errors import system_error

T = TypeVar("T")

MANIFEST = ".mtp_files.json"

# Files above LAZY bytes also have a hash of every CHUNK bytes, by which `LazyFile` verifies what is read of them.
CHUNK = 2**26
LAZY = 2**28

_ASIDE = re.compile(r"\.(?P<name>.+)\.mtp_[a-z0-9_]{8}")

# Manifests of folders that this process has verified: path -> inode and time of the manifest.
_verified: dict[Path, tuple[int, int]] = {}


def write_file(path: Path, text: str) -> None:
    """Write a UTF-8 file; `path` is the old file until the new one is complete on disk."""
    aside = Aside.file(path)
    try:
        aside.path.write_text(text, encoding="utf-8")
        aside.commit(replace=True)
    finally:
        aside.discard()


@contextmanager
def whole_folder(folder: Path, *, replace: bool = False, manifest: bool = True) -> Iterator[Path]:
    """Yield an empty folder to write into; it is renamed to `folder` when the block ends without error.

    It lies beside `folder`, so that the rename stays on one file system, where it is atomic.

    Args:
        folder: the folder to create.
        replace: whether `folder` may exist; it is deleted after the rename.
        manifest: whether a manifest is written, for a folder whose files do not change afterwards.

    Raises:
        FileExistsError: `folder` exists when the block ends; it stays as it is.
        OSError: it can't be written, such as to a full disk.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Aside.folder(folder)
    try:
        with _system_errors(folder):
            yield aside.path
        if manifest:
            files = json.dumps({"files": described(aside.path)}, indent=1)
            (aside.path / MANIFEST).write_text(files, encoding="utf-8")
        aside.commit(replace=replace)
    finally:
        aside.discard()


class Aside:
    """A file or folder that is being written beside its final path, locked as long as its process lives.

    Attributes:
        path: where to write.
        final: its path when it is complete.
    """

    def __init__(self, final: Path, make: Callable[[], Path]) -> None:
        self.final = final
        remove_strays(final.parent, final.name)
        self.path, self._lock = _locked(make)

    @classmethod
    def file(cls, final: Path) -> Aside:
        """Create an empty file aside."""

        def make() -> Path:
            descriptor, name = tempfile.mkstemp(prefix=f".{final.name}.mtp_", dir=final.parent)
            os.close(descriptor)
            return Path(name)

        return cls(final, make)

    @classmethod
    def folder(cls, final: Path) -> Aside:
        """Create an empty folder aside."""
        return cls(final, lambda: Path(tempfile.mkdtemp(prefix=f".{final.name}.mtp_", dir=final.parent)))

    def commit(self, *, replace: bool) -> None:
        """Flush to disk and rename.

        Raises:
            FileExistsError: the final path exists, and is not to be replaced.
        """
        folder = self.path.is_dir()
        # The temporary path is private to the user; others may read the final one as usual, and never write it.
        self.path.chmod((0o775 if folder else 0o664) & ~_umask())
        for path in self.path.rglob("*") if folder else ():
            flush(path)
        flush(self.path)
        if not folder:
            self.path.replace(self.final)
        else:
            old = None
            # On POSIX a rename replaces an empty folder silently.
            if self.final.exists() or self.final.is_symlink():
                if not replace:
                    raise FileExistsError(f"{self.final} already exists")
                old = _set_aside(self.final)
            self.path.rename(self.final)
            if old:
                flush(self.final.parent)
                shutil.rmtree(old, ignore_errors=True)
        flush(self.final.parent)

    def discard(self) -> None:
        """Remove what was not committed, and unlock."""
        _remove(self.path)
        os.close(self._lock)


def remove_folder(folder: Path) -> None:
    """Remove a folder; it is renamed first, so that part of it never has its name."""
    shutil.rmtree(_set_aside(folder), ignore_errors=True)


def remove_strays(parent: Path, name: str | None = None) -> None:
    """Remove what dead processes left aside in a folder: all of it, or what was to become `name`."""
    for path in parent.glob(".*"):
        match = _ASIDE.fullmatch(path.name)
        if not match or name not in (None, match["name"]):
            continue
        with suppress(OSError):
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(lock)


def described(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file below a folder but its manifest, by name."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return _by_name(lambda name: _described(folder / name), [name for name in names if name != MANIFEST])


def damage(folder: Path, *, lazy: bool = False) -> str | None:
    """Return how a folder differs from its manifest, in a few words; None where it does not.

    A folder is read once in a process.

    Args:
        folder: written by `whole_folder`.
        lazy: of files above `LAZY` bytes, compare the size alone: they are read through `LazyFile`.
    """
    try:
        stated = (folder / MANIFEST).stat()
        identity = (stated.st_ino, stated.st_mtime_ns)
        files = read_manifest(folder)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} can't be read ({getattr(error, 'strerror', None) or error})"
    if _verified.get(folder) == identity:
        return None
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    if other := sorted(present ^ files.keys()):
        return f"{other[0]} {'is missing' if other[0] in files else 'does not belong to it'}"
    for name, entry in files.items():
        if (size := (folder / name).stat().st_size) != entry["size"]:
            return f"{name} has {size:,} bytes instead of {entry['size']:,}"
    read = [name for name, entry in files.items() if not (lazy and "chunks" in entry)]
    try:
        hashes = _by_name(lambda name: _sha256(folder / name), read)
    except OSError as error:
        return f"{error.filename} can't be read ({error.strerror})"
    if differing := [name for name in read if hashes[name] != files[name]["sha256"]]:
        return f"{differing[0]} differs from what was written"
    _verified[folder] = identity
    return None


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and hashes of a folder's files, by name.

    Raises:
        OSError, ValueError: the manifest is missing or damaged.
    """
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    try:
        files = {
            str(name): {"size": int(entry["size"]), "sha256": str(entry["sha256"])}
            | ({"chunks": list(entry["chunks"])} if "chunks" in entry else {})
            for name, entry in json.loads(text)["files"].items()
        }
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("it is damaged") from None
    return files


class LazyFile:
    """A file of a folder that was verified lazily: each chunk of a large one is verified before its first use.

    Args:
        folder: the folder.
        name: of the file in it.
        refuse: called with a few words where a chunk differs; it raises.

    Attributes:
        pending: numbers of the chunks that are not verified yet; none of a small file.
    """

    def __init__(self, folder: Path, name: str, refuse: Callable[[str], None]) -> None:
        self._path, self._name, self._refuse = folder / name, name, refuse
        self._hashes: list[str] = read_manifest(folder)[name].get("chunks", [])
        self.pending = set(range(len(self._hashes)))

    def check(self, chunks: Iterable[int] | None = None) -> None:
        """Verify these chunks, those of `CHUNK` bytes each; None means all of them."""
        for chunk in sorted(self.pending if chunks is None else self.pending & {*chunks}):
            with self._path.open("rb") as file:
                file.seek(chunk * CHUNK)
                if hashlib.sha256(file.read(CHUNK)).hexdigest() != self._hashes[chunk]:
                    self._refuse(f"{self._name} differs from what was written")
            self.pending.discard(chunk)


def flush(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _system_errors(folder: Path) -> Iterator[None]:
    """Raise OSError for an error of the system that a library written in Rust reports in its text only."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if found := system_error(error):
            raise OSError(found.errno, found.strerror, str(folder)) from None
        raise


def _locked(make: Callable[[], Path]) -> tuple[Path, int]:
    while True:
        path = make()
        lock = os.open(path, os.O_RDONLY)
        # Some network file systems lock no folders; strays stay there.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Between the two lines above another process may have taken it for a stray.
        if path.exists():
            return path, lock
        os.close(lock)


def _set_aside(folder: Path) -> Path:
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.mtp_", dir=folder.parent))
    return folder.rename(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _described(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    entry: dict[str, Any] = {"size": size, "sha256": _sha256(path)}
    if size > LAZY:
        with path.open("rb") as file:
            entry["chunks"] = [hashlib.sha256(content).hexdigest() for content in iter(lambda: file.read(CHUNK), b"")]
    return entry


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _by_name(function: Callable[[str], T], names: list[str]) -> dict[str, T]:
    # Hashing releases the interpreter's lock.
    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(function, names), strict=True))


def _umask() -> int:
    # The umask can't be read without setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
