"""The protocol of a data reader, the table of readers, and the choice of one by the address of a corpus.

    stdlib                  stdlib.py       a document is one file of Python's standard library
    a folder                text_files.py   a document is one file that ends in `data.suffix`
    .jsonl, .ndjson         jsonl.py        a document is one line, an object
    .json                   json_values.py  a document is one object of a list, or of objects one after another
    .csv, .parquet          csv_rows.py, parquet.py     a document is one row
    .txt                    text_lines.py   a document is one line
    owner/name              hub.py          a document is one row of a data set of the Hugging Face hub
    s3://                   s3_files.py     downloads, then reads like files on this machine

To add a reader, write one file and one line in `READERS`, or name a class of your own in the recipe as
`data.reader: package.module:Class`. A reader is found before torch is imported and without a network, so that a wrong
address is reported at once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mtp_ce.registry import load_class
from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.data.corpus import Corpus, Excluded
from mtp_ce.training.data.files import check_files, files_below, files_matching, plain_suffix, refuse_unreadable
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.paths import user_path

READERS = {
    "stdlib": "mtp_ce.training.data.stdlib:StandardLibrary",
    "files": "mtp_ce.training.data.text_files:TextFiles",
    "jsonl": "mtp_ce.training.data.jsonl:JsonLines",
    "json": "mtp_ce.training.data.json_values:JsonValues",
    "csv": "mtp_ce.training.data.csv_rows:CsvRows",
    "parquet": "mtp_ce.training.data.parquet:ParquetRows",
    "lines": "mtp_ce.training.data.text_lines:TextLines",
    "hub": "mtp_ce.training.data.hub:HubRows",
    "s3": "mtp_ce.training.data.s3_files:S3Files",
}

# Files that hold many documents, and their readers; all but .parquet may be compressed, as in .jsonl.gz. In a folder a
# .txt file is one document, like any other text file.
ROW_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "lines",
}

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

    def read(self, fraction: float, excluded: Excluded) -> Corpus:
        """Read every document once and split them.

        Args:
            fraction: of the documents, which are held out; the split may depend on nothing else but the documents.
            excluded: what validation reads; a document that is in it is skipped, and counted as shared.

        Returns:
            The documents in their order; the same documents have the same digest.

        Raises:
            RecipeError: a document can't be read.
        """


def find_corpus(data: DataConfig) -> Reader:
    """Find the corpus and the validation corpus without reading them; return the reader of the corpus.

    Raises:
        RecipeError: one is missing or has a file that can't be read, or one side of the split is empty.
    """
    reader = _find("data.corpus", data.corpus, data)
    if data.validation_corpus is not None:
        _find("data.validation_corpus", data.validation_corpus, data)
    else:
        reader.check_split(data.holdout_fraction)
    return reader


def _find(key: str, address: str, data: DataConfig) -> Reader:
    reader = find_reader(key, address, data)
    check_files(key, reader.files)
    return reader


def read_corpus(data: DataConfig) -> Corpus:
    """Read every document once and split them.

    Raises:
        RecipeError: the corpus is missing or can't be read, or no text is left on one side of the split.
    """
    reader = find_corpus(data)
    if data.validation_corpus is None:
        corpus = reader.read(data.holdout_fraction, Excluded())
    else:
        held_out = find_reader("data.validation_corpus", data.validation_corpus, data).read(0, Excluded())
        train = reader.read(0, Excluded(held_out.train, held_out.digest))
        corpus = Corpus(
            train=train.train,
            held_out=held_out.train,
            skipped=train.skipped + held_out.skipped,
            digest=hashlib.sha256(f"{train.digest} {held_out.digest}".encode()).hexdigest(),
            characters=train.characters + held_out.characters,
            shared=train.shared,
        )
    if not corpus.train or not corpus.held_out:
        shared = f" ({corpus.shared} more are in data.validation_corpus, too)" if corpus.shared else ""
        raise RecipeError(
            f"data.corpus {data.corpus} has {len(corpus.train)} readable documents to train on{shared} and "
            f"{len(corpus.held_out)} held out; both need at least one that is UTF-8 and not empty: change "
            "data.holdout_fraction, give data.validation_corpus or more text"
        )
    return corpus


def find_reader(key: str, address: str, data: DataConfig) -> Reader:
    """Return the reader of an address: the class of `data.reader`, or else the one that fits the address.

    Raises:
        RecipeError: the address stands for nothing, or the reader does not accept it or can't be loaded.
    """
    with refuse_unreadable(address, key):
        name, source = (data.reader, Source(key, address)) if data.reader else _choose(key, address, data)
    try:
        reader_class = load_class(name, READERS, "data.reader")
    except ValueError as error:
        raise RecipeError(" ".join(str(error).split())) from None
    try:
        with refuse_unreadable(address, key):
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
    path = user_path(key, address)
    if path.is_dir():
        if not (paths := files_below(path, data.suffix)):
            raise RecipeError(f"{key} {path} has no file that ends in '{data.suffix}' (data.suffix)")
        suffix = plain_suffix(f"file{data.suffix}")
        name = ROW_SUFFIXES[suffix] if suffix in ROW_SUFFIXES and suffix != ".txt" else "files"
        return name, Source(key, address, path, paths)
    if path.is_file():
        return _row_files(Source(key, address, path.parent, (path.name,)))
    if path.exists():
        raise RecipeError(
            f"{key} is '{address}', a named pipe, a socket or a device; write its content to a file, and give that"
        )
    if any(mark in address for mark in "*?["):
        fixed = _before_patterns(path.parts)
        root = Path(*fixed)
        try:
            matches = files_matching(root, path.parts[len(fixed) :])
        except ValueError as error:
            raise RecipeError(f"{key} is '{address}', which is no pattern of paths: {error}") from None
        if not matches:
            raise RecipeError(f"{key} is '{address}', and no file matches it")
        return _row_files(Source(key, address, root, matches))
    if _HUB_NAME.fullmatch(address) and not is_row_file(address):
        return "hub", Source(key, address)
    raise RecipeError(
        f"{key} is '{address}', which is not a folder, nor a {', '.join(ROW_SUFFIXES)} file; give one, a glob, an "
        "s3:// address, a hub name (owner/name), or 'stdlib'"
    )


def is_row_file(name: str) -> bool:
    """Return whether a file holds many documents, by its name."""
    return plain_suffix(name) in ROW_SUFFIXES


def _before_patterns(parts: Sequence[str]) -> list[str]:
    """Return the parts of a path before the first one that is a pattern."""
    patterns = [i for i, part in enumerate(parts) if any(mark in part for mark in "*?[")]
    return list(parts[: patterns[0]])


def _row_files(source: Source) -> tuple[str, Source]:
    suffixes = {plain_suffix(path) for path in source.paths}
    if len(suffixes) != 1 or not suffixes <= set(ROW_SUFFIXES):
        raise RecipeError(
            f"{source.key} '{source.address}' has files that end in {', '.join(sorted(suffixes))}; expected one of "
            f"{', '.join(ROW_SUFFIXES)}. For other text files give the folder, and data.suffix"
        )
    return ROW_SUFFIXES[suffixes.pop()], source


def refuse_fields(data: DataConfig, what: str) -> None:
    """Refuse a recipe that names fields for a source that has none.

    Args:
        data: the recipe's `data` group.
        what: says what has no fields, for the message.

    Raises:
        RecipeError: the recipe names the fields of prompts or of chats.
    """
    for key in ("prompt_field", "messages_field"):
        if field := getattr(data, key):
            raise RecipeError(
                f"data.{key} is '{field}', but {what} have no fields; give .jsonl, .json, .csv or .parquet files, or a "
                "hub name"
            )
