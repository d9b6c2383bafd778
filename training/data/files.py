"""Files of a corpus: finding them, checking that they can be read, and reading them.

Linked folders are followed, each folder once, so a link to a folder above ends nothing. A byte order mark at the
beginning of a file is not part of its text. `.gz` and `.zst` are decompressed.
"""

from __future__ import annotations

import codecs
import io
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.paths import special_file

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}

# Longest line, and longest file that is read as a whole: a compressed file of a few MB may hold any amount of text.
LONGEST = 2**30
# A read of more would allocate all of it before it knows how much there is.
_PIECE = 2**20


def shown(path: str | Path) -> str:
    r"""Return a path as text that can be encoded: bytes of a file name that are not UTF-8 become `\udcxx`."""
    return str(path).encode("utf-8", "backslashreplace").decode()


@contextmanager
def refuse_unreadable(path: str | Path, key: str = "") -> Iterator[None]:
    """Turn errors of reading in the block into one line.

    Args:
        path: what is read; used where an error names no file.
        key: the recipe's key that names it.

    Raises:
        RecipeError: in place of OSError and UnicodeError.
    """
    where = f"{key}: " if key else ""
    try:
        yield
    except UnicodeError as error:
        reason = getattr(error, "reason", error)
        raise RecipeError(f"{where}{shown(path)} can't be read: not UTF-8: {reason}") from None
    except OSError as error:
        named = error.filename if isinstance(error.filename, str) else path
        reason = " ".join(str(error.strerror or error).split())
        raise RecipeError(f"{where}{shown(named)} can't be read: {reason}") from None


def plain_suffix(name: str | Path) -> str:
    """Return the suffix that tells the format: `.jsonl` of `a.jsonl` and of `a.jsonl.gz`."""
    path = Path(name)
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def files_below(root: Path, suffix: str, ignored: Collection[str] = ()) -> tuple[str, ...]:
    """List the files below a folder that end in a suffix, relative to it and sorted, without the ignored subfolders.

    Raises:
        OSError: a folder can't be read.
    """
    paths: list[str] = []
    for folder, names in _folders_below(root, ignored):
        wanted = (folder / name for name in names if name.endswith(suffix))
        paths += [path.relative_to(root).as_posix() for path in wanted if not _is_lock(path)]
    return tuple(sorted(paths))


def files_matching(root: Path, pattern: Sequence[str]) -> tuple[str, ...]:
    """List the files below a folder that match a pattern, relative to it and sorted; `**` enters linked folders, too.

    Args:
        root: where the pattern starts.
        pattern: the parts of a glob.
    """
    found = {path.relative_to(root).as_posix() for path in _matching(root, pattern) if not path.is_dir()}
    return tuple(sorted(path for path in found if not _is_lock(root / path)))


def check_files(key: str, files: Iterable[Path]) -> None:
    """Check that files exist and may be read, and that reading them ends.

    Raises:
        RecipeError: one is missing, is a link to nothing, may not be read, or is a named pipe or a device.
    """
    for file in files:
        try:
            special = special_file(file)
        except OSError as error:
            where = f"; it is a link to {shown(os.readlink(file))}" if file.is_symlink() else ""
            raise RecipeError(f"{key} has {shown(file)}, which can't be read: {error.strerror}{where}") from None
        if special:
            raise RecipeError(f"{key} has {shown(file)}, which is {special}; write its content to a file first")
        if not os.access(file, os.R_OK):
            raise RecipeError(f"{key} has {shown(file)}, which can't be read; see its permissions")


def open_file(path: Path) -> IO[bytes]:
    """Open a file, decompressed."""
    if path.suffix not in COMPRESSED:
        return path.open("rb")
    # A reader is found before anything needs pyarrow, which takes time to load.
    import pyarrow as pa

    if not path.stat().st_size:
        # It reads nothing as nothing, and a download that failed often leaves nothing.
        raise RecipeError(f"{shown(path)} can't be read: it is empty, and not compressed")
    # It holds zstd, which Python has from 3.14 on.
    stream: Any = pa.CompressedInputStream(pa.OSFile(str(path)), COMPRESSED[path.suffix])
    return cast(IO[bytes], io.BufferedReader(stream))


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, decompressed and without byte order mark.

    Raises:
        OSError: it can't be read.
        RecipeError: it is too long.
    """
    pieces: list[bytes] = []
    size = 0
    with open_file(path) as file:
        while piece := file.read(_PIECE):
            pieces.append(piece)
            size += len(piece)
            if size > LONGEST:
                raise RecipeError(f"{shown(path)} holds more than {LONGEST:,} bytes, which are read at once; divide it")
    return b"".join(pieces).removeprefix(codecs.BOM_UTF8)


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file with their ends, numbered from 1.

    Raises:
        RecipeError: the file can't be read, or a line is not UTF-8 or too long.
    """
    number, name = 0, shown(path)
    with refuse_unreadable(path), open_file(path) as file:
        while line := file.readline(LONGEST):
            number += 1
            if len(line) == LONGEST:
                raise RecipeError(f"{name}, line {number}: longer than {LONGEST:,} bytes")
            try:
                text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode("utf-8")
            except UnicodeDecodeError as error:
                raise RecipeError(f"{name}, line {number}: not UTF-8: {error.reason}") from None
            yield number, text


def numbered_lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the lines of a UTF-8 file that are not blank: number, location for messages, text.

    Raises:
        RecipeError: as `lines_of`.
    """
    name = shown(path)
    for number, line in lines_of(path):
        text = line.strip("\r\n")
        if text and not text.isspace():
            yield number, f"{name}, line {number}", text


def _folders_below(root: Path, ignored: Collection[str] = ()) -> Iterator[tuple[Path, list[str]]]:
    """Yield every folder below a root with the names of its files, each folder once and linked ones last."""
    # Paths and not numbers of inodes, which some network file systems do not have.
    seen: set[str] = set()
    linked = [root]
    while linked:
        for place, subfolders, names in os.walk(linked.pop(0), onerror=_raise):
            folder, real = Path(place), os.path.realpath(place)
            subfolders[:] = sorted(name for name in subfolders if name not in ignored)
            if real in seen:
                subfolders[:] = []
                continue
            seen.add(real)
            linked += [folder / name for name in subfolders if (folder / name).is_symlink()]
            yield folder, names


def _matching(root: Path, pattern: Sequence[str]) -> Iterator[Path]:
    if "**" not in pattern:
        yield from root.glob(os.path.join(*pattern)) if pattern else [root]
        return
    split = pattern.index("**")
    for top in _matching(root, pattern[:split]):
        if top.is_dir():
            for folder, _ in _folders_below(top):
                yield from _matching(folder, pattern[split + 1 :] or ["*"])


def _raise(error: OSError) -> None:
    # os.walk leaves out a folder that can't be read, and says nothing.
    raise error


def _is_lock(path: Path) -> bool:
    """Return whether a file is an editor's lock, such as `.#file.py`: a hidden link to nothing."""
    return path.name.startswith(".") and path.is_symlink() and not path.exists()
