"""The protocol of a data reader, the table of readers, and the choice of one by the address of a corpus.

    stdlib                  stdlib.py       a document is one file of Python's standard library
    a folder                text_files.py   a document is one file that ends in `data.suffix`
    .jsonl, .parquet        jsonl.py, parquet.py    a document is one row
    .txt                    text_lines.py   a document is one line
    owner/name              hub.py          a document is one row of a data set of the Hugging Face hub
    s3://                   s3_files.py     downloads, then reads like files on this machine

To add a reader, write one file and one line in `READERS`, or name a class of your own in the recipe as
`data.reader: package.module:Class`. A reader is found before torch is imported and without a network, so that a wrong
address is reported at once.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from mtp_ce.registry import load_class
from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.data.corpus import Corpus
from mtp_ce.training.errors import RecipeError

READERS = {
    "stdlib": "mtp_ce.training.data.stdlib:StandardLibrary",
    "files": "mtp_ce.training.data.text_files:TextFiles",
    "jsonl": "mtp_ce.training.data.jsonl:JsonLines",
    "parquet": "mtp_ce.training.data.parquet:ParquetRows",
    "lines": "mtp_ce.training.data.text_lines:TextLines",
    "hub": "mtp_ce.training.data.hub:HubRows",
    "s3": "mtp_ce.training.data.s3_files:S3Files",
}

# Files that hold many documents, and their readers. In a folder a .txt file is one document, like any other text file.
ROW_SUFFIXES = {".jsonl": "jsonl", ".parquet": "parquet", ".txt": "lines"}
_ROWS_IN_FOLDERS = (".jsonl", ".parquet")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """An address of a recipe, and the files that it stands for.

    Attributes:
        key: the recipe's key that holds the address, for messages.
        address: as in the recipe.
        root: the folder of the files.
        paths: of the files, relative to it, sorted; empty where they are not local, or a reader of your own is chosen.
    """

    key: str
    address: str
    root: Path = Path()
    paths: tuple[str, ...] = ()


class Reader(Protocol):
    """Reads the documents of one source. The trainer calls `Class(source, data)` with the recipe's `data` group.

    The constructor checks the address and reads no document; it raises RecipeError with a line for the user.
    `row_reader.RowReader` implements everything but the constructor's checks and an iterator over documents.

    Attributes:
        files: the local files that are read, as far as they are known before reading.
    """

    files: Sequence[Path]

    def describe(self) -> str:
        """Return a few words on what was found, for a dry run."""

    def check_split(self, fraction: float) -> None:
        """Raise RecipeError if it is known before reading that one side of the split is empty."""

    def read(self, fraction: float, seen: set[bytes]) -> Corpus:
        """Read every document once and split them.

        Args:
            fraction: of the documents, which are held out; the split may depend on nothing else but the documents.
            seen: hashes of the contents of whole files that were read before in this run; a file in it is a copy.

        Returns:
            The documents in their order; the same documents have the same digest.

        Raises:
            RecipeError: a document can't be read.
        """


def find_corpus(data: DataConfig) -> Reader:
    """Find the corpus and the validation corpus without reading them; return the reader of the corpus.

    Raises:
        RecipeError: one is missing, or one side of the split is empty.
    """
    reader = find_reader("data.corpus", data.corpus, data)
    if data.validation_corpus is not None:
        find_reader("data.validation_corpus", data.validation_corpus, data)
    else:
        reader.check_split(data.holdout_fraction)
    return reader


def read_corpus(data: DataConfig) -> Corpus:
    """Read every document once and split them.

    Raises:
        RecipeError: the corpus is missing or can't be read, or no text is left on one side of the split.
    """
    reader = find_corpus(data)
    seen: set[bytes] = set()
    if data.validation_corpus is None:
        corpus = reader.read(data.holdout_fraction, seen)
    else:
        # First, so that a copy of one of its files is left out of training.
        held_out = find_reader("data.validation_corpus", data.validation_corpus, data).read(0, seen)
        train = reader.read(0, seen)
        corpus = Corpus(
            train=train.train,
            held_out=held_out.train,
            skipped=train.skipped + held_out.skipped,
            digest=hashlib.sha256(f"{train.digest} {held_out.digest}".encode()).hexdigest(),
            characters=train.characters + held_out.characters,
        )
    if not corpus.train or not corpus.held_out:
        raise RecipeError(
            f"data.corpus {data.corpus} has {len(corpus.train)} readable documents to train on and "
            f"{len(corpus.held_out)} held out; both need at least one that is UTF-8 and not empty: change "
            "data.holdout_fraction, give data.validation_corpus or more text"
        )
    return corpus


def find_reader(key: str, address: str, data: DataConfig) -> Reader:
    """Return the reader of an address: the class of `data.reader`, or else the one that fits the address.

    Raises:
        RecipeError: the address stands for nothing, or the reader does not accept it or can't be loaded.
    """
    name, source = (data.reader, Source(key, address)) if data.reader else _choose(key, address, data)
    try:
        reader_class = load_class(name, READERS, "data.reader")
    except ValueError as error:
        raise RecipeError(" ".join(str(error).split())) from None
    try:
        reader: Reader = reader_class(source, data)
    except RecipeError:
        raise
    except Exception as error:
        if name in READERS:
            raise
        # A class of the user's own may raise anything.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RecipeError(f"data.reader '{name}' does not accept {key} '{address}' ({reason})") from None
    return reader


def _choose(key: str, address: str, data: DataConfig) -> tuple[str, Source]:
    """Return the name of the reader that fits an address, and the files that it stands for."""
    if address == "stdlib":
        return "stdlib", Source(key, address)
    if address.startswith("s3://"):
        return "s3", Source(key, address)
    path = Path(address).expanduser()
    if path.is_dir():
        if not (paths := files_below(path, data.suffix)):
            raise RecipeError(f"{key} {path} has no file that ends in '{data.suffix}' (data.suffix)")
        name = ROW_SUFFIXES[data.suffix] if data.suffix in _ROWS_IN_FOLDERS else "files"
        return name, Source(key, address, path, paths)
    if path.is_file():
        return _row_files(Source(key, address, path.parent, (path.name,)))
    if any(mark in address for mark in "*?["):
        fixed = _before_patterns(path.parts)
        root, pattern = Path(*fixed), str(Path(*path.parts[len(fixed) :]))
        matches = sorted(file.relative_to(root).as_posix() for file in root.glob(pattern) if file.is_file())
        if not matches:
            raise RecipeError(f"{key} is '{address}', and no file matches it")
        return _row_files(Source(key, address, root, tuple(matches)))
    if _HUB_NAME.fullmatch(address) and not address.endswith(tuple(ROW_SUFFIXES)):
        return "hub", Source(key, address)
    raise RecipeError(
        f"{key} is '{address}', which is not a folder, nor a {', '.join(ROW_SUFFIXES)} file; give one, a glob, an "
        "s3:// address, a hub name (owner/name), or 'stdlib'"
    )


def _before_patterns(parts: Sequence[str]) -> list[str]:
    """Return the parts of a path before the first one that is a pattern."""
    patterns = [i for i, part in enumerate(parts) if any(mark in part for mark in "*?[")]
    return list(parts[: patterns[0]])


def _row_files(source: Source) -> tuple[str, Source]:
    suffixes = {PurePosixPath(path).suffix for path in source.paths}
    if len(suffixes) != 1 or not suffixes <= set(ROW_SUFFIXES):
        raise RecipeError(
            f"{source.key} '{source.address}' has files that end in {', '.join(sorted(suffixes))}; expected one of "
            f"{', '.join(ROW_SUFFIXES)}. For other text files give the folder, and data.suffix"
        )
    return ROW_SUFFIXES[suffixes.pop()], source


def files_below(root: Path, suffix: str, ignored: Collection[str] = ()) -> tuple[str, ...]:
    """List the files below a folder that end in a suffix, relative to it and sorted, without the ignored subfolders."""
    paths: list[str] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in ignored]
        inside = Path(folder).relative_to(root)
        paths += [(inside / name).as_posix() for name in names if name.endswith(suffix)]
    return tuple(sorted(paths))
