"""Rows in the cache: two Arrow files of documents, one per side of the split, written once and read batch by batch.

Of a table one batch of rows is in memory at a time. It is read and not mapped: pages of a mapped file count as the
process's own memory, and reading all of a corpus would look like holding it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from mtp_ce.training.data.corpus import Corpus, Document, Excluded, Lazy, below
from mtp_ce.training.data.files import refuse_unreadable, shown
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.atomic import CHUNK, LazyFile
from mtp_ce.training.storage.cache import cache_folder, cached, discard

# Part of the cache key: raise it when what is stored of a row, or the layout below, changes.
_FORMAT = "2"

# Rows that are read and written together.
BATCH = 100

_SCHEMA = pa.schema([("path", pa.string()), ("text", pa.string()), ("prompt", pa.string()), ("chat", pa.bool_())])
_SIDES = ("train.arrow", "held_out.arrow")
_SUMMARY = "summary.json"


def stored_rows(
    identity: Sequence[Any],
    files: Sequence[Path],
    documents: Callable[[], Iterable[Document]],
    fraction: float,
    excluded: Excluded,
) -> Corpus:
    """Return the documents from the cache, or read them and store them.

    Args:
        identity: plain values that decide the documents, beside the files.
        files: what is read; the cache entry is used while their paths, sizes and modification times stay the same.
        documents: starts reading.
        fraction: of the documents, which are held out.
        excluded: documents that are skipped.

    Raises:
        RecipeError: a document can't be read.
    """
    stated = []
    for file in files:
        with refuse_unreadable(file):
            status = file.stat()
        stated.append((os.path.realpath(file), status.st_size, status.st_mtime_ns))
    without = [excluded.digest] if excluded.digest else []
    key = hashlib.sha256(json.dumps([_FORMAT, *identity, fraction, stated, *without]).encode()).hexdigest()[:32]
    entry = cache_folder() / "rows" / key
    return _corpus(cached(entry, lambda aside: _write(aside, documents(), fraction, excluded), lazy=True))


def _write(folder: Path, documents: Iterable[Document], fraction: float, excluded: Excluded) -> None:
    hasher = hashlib.sha256()
    skipped = shared = characters = 0
    with _Table(folder / _SIDES[0]) as train, _Table(folder / _SIDES[1]) as held_out:
        for document in documents:
            if not document.text.strip():
                skipped += 1
                continue
            if document in excluded:
                shared += 1
                continue
            content = document.text if document.prompt is None else f"{document.prompt}\0{document.text}"
            try:
                path, fingerprint = document.path.encode(), hashlib.sha256(content.encode()).digest()
            except UnicodeEncodeError as error:
                raise RecipeError(f"{shown(document.path)}: the text is not valid Unicode: {error.reason}") from None
            side = below(fingerprint, fraction)
            (held_out if side else train).add(document)
            kind = "chat" if document.chat else document.prompt is None
            hasher.update(path + f"\0{side}\0{kind}\0".encode() + fingerprint)
            characters += len(content)
    counts = {"train": train.count, "held_out": held_out.count}
    counts |= {"skipped": skipped + shared, "shared": shared}
    summary = {**counts, "digest": hasher.hexdigest(), "characters": characters}
    (folder / _SUMMARY).write_text(json.dumps(summary), encoding="utf-8")


def _corpus(folder: Path) -> Corpus:
    summary = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
    train, held_out = (
        _documents(folder / side, summary[name]) for side, name in zip(_SIDES, ("train", "held_out"), strict=True)
    )
    return Corpus(train, held_out, summary["skipped"], summary["digest"], summary["characters"], summary["shared"])


class _Table:
    """An Arrow file that is being written."""

    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, _SCHEMA)
        self._rows: list[Document] = []
        self.count = 0

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()
        self._file.close()

    def add(self, document: Document) -> None:
        self._rows.append(document)
        self.count += 1
        # Batches of equal length, so that the index of a row decides its batch.
        if len(self._rows) == BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = [[getattr(row, name) for row in self._rows] for name in _SCHEMA.names]
            arrays = [pa.array(column, kind) for column, kind in zip(columns, _SCHEMA.types, strict=True)]
            self._writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
            self._rows = []


class _VerifiedFile(io.FileIO):
    """A file that is verified chunk by chunk as it is read."""

    def __init__(self, path: Path, lazy: LazyFile) -> None:
        super().__init__(path)
        self._lazy = lazy

    def read(self, size: int | None = -1, /) -> Any:
        first = self.tell() // CHUNK
        content = super().read(-1 if size is None else size)
        self._lazy.check(range(first, -(-self.tell() // CHUNK)))
        return content


def _documents(path: Path, count: int) -> Sequence[Document]:
    """Return the rows of an Arrow file; the latest batch stays in memory, so a pass over all rows reads each once."""
    reader: Any = None
    current, batch = -1, {}

    def refuse(reason: str) -> None:
        discard(path.parent)
        raise RecipeError(f"cache entry {path.parent} is damaged ({reason}); start again, and it is made again")

    def read(i: int) -> Document:
        nonlocal reader, current, batch
        if reader is None:
            verified = _VerifiedFile(path, LazyFile(path.parent, path.name, refuse))
            reader = pa.ipc.open_file(pa.PythonFile(verified, "r"))
        if i // BATCH != current:
            current = i // BATCH
            batch = reader.get_batch(current).to_pydict()
        return Document(*(batch[name][i % BATCH] for name in _SCHEMA.names))

    return Lazy(count, read)
