"""Corpora whose documents are rows: read once, row by row, into two Arrow files in the cache, one per side.

    .jsonl   one JSON object a line                .txt   one document a line; blank lines are none
    .parquet one row                               hub    one row, through `datasets`

The files are read here and not by `datasets`, which takes the columns of a file from its first block, so that a later
row with another field ends it, and which does not say which line of a file is wrong.

Of a table one batch of rows is in memory at a time. It is read and not mapped: pages of a mapped file count as the
process's own memory, and reading all of a corpus would look like holding it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.data.corpus import Corpus, Document, Lazy, Source, below
from mtp_ce.training.data.tokenizer import cache_folder
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.atomic import whole_folder

# Part of the cache key: raise it when what is kept of a row, or the layout below, changes.
_FORMAT = "1"

# Rows that are read and written together.
BATCH = 100

_SCHEMA = pa.schema([("path", pa.string()), ("text", pa.string()), ("prompt", pa.string())])
_SIDES = ("train.arrow", "held_out.arrow")
_SUMMARY = "summary.json"

# Where a row stands, for messages, and its fields by name.
_Row = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class _Fields:
    """Which fields are read: those of prompt and completion, or that of the text."""

    text: str
    prompt: str | None
    keys: dict[str, str]  # field -> the recipe's key that names it

    @classmethod
    def of(cls, data: DataConfig) -> _Fields:
        if data.prompt_field and data.completion_field:
            keys = {data.prompt_field: "data.prompt_field", data.completion_field: "data.completion_field"}
            return cls(data.completion_field, data.prompt_field, keys)
        return cls(data.text_field, None, {data.text_field: "data.text_field"})

    def document(self, path: str, where: str, row: dict[str, Any]) -> Document:
        for field, key in self.keys.items():
            if field not in row:
                raise RecipeError(f"{where}: no field '{field}' ({key}); it has {_listed(row)}")
            if not isinstance(row[field], str):
                kind = type(row[field]).__name__
                raise RecipeError(f"{where}: field '{field}' ({key}) holds {kind}; expected a string")
        return Document(path, row[self.text], None if self.prompt is None else row[self.prompt])


def read_rows(source: Source, data: DataConfig, fraction: float) -> Corpus:
    """Read the rows of files or of a data set on the hub, or find that they have been read before.

    Files count as the same while their places, sizes and times of change are.

    Args:
        source: kind "rows" or "hub".
        data: names the fields; of the hub's data sets also the subset and the split.
        fraction: share of the rows that is held out.

    Raises:
        RecipeError: a file or row can't be read, or lacks a field; the hub does not give the data set.
    """
    fields = _Fields.of(data)
    rows: Callable[[], Iterator[tuple[str, _Row]]]
    if source.kind == "hub":
        table = _from_hub(source, data)
        files = [Path(part["filename"]) for part in table.cache_files]
        chosen = [source.address, data.subset, data.split]
        columns = [name for name in fields.keys if name in table.column_names]
        # A column that is missing is found missing in the first row.
        picked = table.select_columns(columns) if len(columns) == len(fields.keys) else table

        def rows() -> Iterator[tuple[str, _Row]]:
            for i, row in enumerate(picked, 1):
                yield f"{data.split}:{i}", (f"{source.key} '{source.address}', row {i}", row)
    else:
        files = [source.root / path for path in source.paths]
        chosen = list(source.paths)

        def rows() -> Iterator[tuple[str, _Row]]:
            for name, file in zip(source.paths, files, strict=True):
                for i, row in _READERS[file.suffix](file, fields):
                    yield f"{name}:{i}", row

    stated = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    decides = [_FORMAT, source.kind, chosen, fields.prompt, fields.text, fraction, stated]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]
    folder = cache_folder() / "rows" / key
    if not folder.exists():
        try:
            with whole_folder(folder) as aside:
                _write(aside, (fields.document(path, *row) for path, row in rows()), fraction)
        except FileExistsError:
            pass  # another process read the same rows meanwhile
    return _corpus(folder)


def _write(folder: Path, documents: Iterator[Document], fraction: float) -> None:
    hasher = hashlib.sha256()
    skipped = characters = 0
    with _Table(folder / _SIDES[0]) as train, _Table(folder / _SIDES[1]) as held_out:
        for document in documents:
            if not document.text.strip():
                skipped += 1
                continue
            content = document.text if document.prompt is None else f"{document.prompt}\0{document.text}"
            try:
                fingerprint = hashlib.sha256(content.encode()).digest()
            except UnicodeEncodeError as error:
                raise RecipeError(f"{document.path}: the text is not valid Unicode: {error.reason}") from None
            side = below(fingerprint, fraction)
            (held_out if side else train).add(document)
            hasher.update(f"{document.path}\0{side}\0{document.prompt is None}\0".encode() + fingerprint)
            characters += len(content)
    counts = {"train": train.count, "held_out": held_out.count}
    said = {**counts, "skipped": skipped, "digest": hasher.hexdigest(), "characters": characters}
    (folder / _SUMMARY).write_text(json.dumps(said), encoding="utf-8")


def _corpus(folder: Path) -> Corpus:
    said = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
    train, held_out = (
        _documents(folder / side, said[name]) for side, name in zip(_SIDES, ("train", "held_out"), strict=True)
    )
    return Corpus(train, held_out, said["skipped"], said["digest"], said["characters"])


class _Table:
    """An Arrow file in the making."""

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
        # Batches of one length, so that the place of a row says which batch it is in.
        if len(self._rows) == BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = [[getattr(row, name) for row in self._rows] for name in _SCHEMA.names]
            arrays = [pa.array(column, pa.string()) for column in columns]
            self._writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
            self._rows = []


def _documents(path: Path, count: int) -> Sequence[Document]:
    """The rows of an Arrow file; the batch that was read last is kept, so that going through all reads each once."""
    reader: Any = None
    place, batch = -1, {}

    def read(i: int) -> Document:
        nonlocal reader, place, batch
        if reader is None:
            reader = pa.ipc.open_file(pa.OSFile(str(path)))
        if i // BATCH != place:
            place = i // BATCH
            batch = reader.get_batch(place).to_pydict()
        return Document(*(batch[name][i % BATCH] for name in _SCHEMA.names))

    return Lazy(count, read)


def _lines(file: Path) -> Iterator[tuple[int, str, str]]:
    """Lines with their numbers, and with where they stand; blank ones are passed over."""
    number = 0
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if text := line.decode("utf-8").strip("\r\n"):
                    yield number, f"{file}, line {number}", text
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}, line {number}: not UTF-8: {error.reason}") from None
    except OSError as error:
        raise RecipeError(f"{file} can't be read: {error.strerror}") from None


def _json_rows(file: Path, fields: _Fields) -> Iterator[tuple[int, _Row]]:
    for number, where, line in _lines(file):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{where}: not JSON that can be read: {error}") from None
        if not isinstance(row, dict):
            raise RecipeError(f"{where}: holds a {type(row).__name__}; expected an object with fields")
        yield number, (where, row)


def _text_rows(file: Path, fields: _Fields) -> Iterator[tuple[int, _Row]]:
    for number, where, line in _lines(file):
        if not line.isspace():
            yield number, (where, {fields.text: line})


def _parquet_rows(file: Path, fields: _Fields) -> Iterator[tuple[int, _Row]]:
    number = 0
    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            columns = [name for name in fields.keys if name in names]
            if len(columns) < len(fields.keys):
                # The first field that is missing is the one to name.
                fields.document(file.name, str(file), dict.fromkeys(names, ""))
            for batch in table.iter_batches(batch_size=BATCH, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, (f"{file}, row {number}", row)
    except (pa.ArrowException, OSError) as error:
        raise RecipeError(f"{file}: can't be read as parquet, after {number} rows: {_one_line(error)}") from None


_READERS: dict[str, Callable[[Path, _Fields], Iterator[tuple[int, _Row]]]] = {
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
}


def _from_hub(source: Source, data: DataConfig) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source.address, data.subset, split=data.split)
    except Exception as error:  # the hub's client raises errors of several libraries
        raise RecipeError(
            f"{source.key} is '{source.address}', which is not here, and the hub does not give its split "
            f"'{data.split}' ({_one_line(error)[:200]})"
        ) from None


def _listed(row: dict[str, Any]) -> str:
    names = [f"'{name}'" for name in row]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "no fields"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
