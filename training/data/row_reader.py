"""Readers whose documents are rows: read once, in order, and stored in the cache.

Rows are split by a hash of their content, so copies of a row are always on the same side, and all of them count.
`RowReader` turns an iterator over documents into a reader; `FileRows` reads files of rows with named fields.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.data.chat import TOOLS, to_text
from mtp_ce.training.data.corpus import Corpus, Document, Excluded
from mtp_ce.training.data.files import refuse_unreadable, shown
from mtp_ce.training.data.reader import Source
from mtp_ce.training.errors import RecipeError

# Keys of the recipe that a reader of the user's own may read.
_READ_KEYS = {
    *("subset", "split", "suffix", "text_field", "messages_field"),
    *("prompt_field", "input_field", "completion_field"),
}


class RowReader(ABC):
    """Reads a source row by row. A subclass implements `documents`, and sets `files` in its constructor.

    Args:
        source: the address.
        data: the recipe's `data` group.
    """

    files: Sequence[Path] = ()

    def __init__(self, source: Source, data: DataConfig) -> None:
        self.source = source
        self.data = data

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield every document in order; its path locates it, such as `file:number`.

        Raises:
            RecipeError: a row can't be read; the message names the line or row.
        """

    def identity(self) -> list[Any]:
        """Return what decides the documents beside the files: plain values, part of the cache key.

        For a class of the user's own: its name, the hash of its module's source, the address and the keys of `data`. A
        source without local files needs its own version here, or the documents of the first reading are used for good.
        """
        kind = type(self)
        code = hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()
        keys = self.data.model_dump(include=_READ_KEYS)
        return [f"{kind.__module__}:{kind.__qualname__}", code, self.source.address, keys]

    def describe(self) -> str:
        """Return the address and the reader."""
        return f"{self.source.address}, read by {type(self).__name__}"

    def check_split(self, fraction: float) -> None:
        """Check nothing: rows are counted when they are read."""
        return

    def read(self, fraction: float, excluded: Excluded) -> Corpus:
        """Read the rows, or reuse the cached ones while identity, paths, sizes and times of the files are the same.

        Args:
            fraction: of the rows, which are held out.
            excluded: rows that validation reads; they are skipped.

        Raises:
            RecipeError: a file or row can't be read, or lacks a field.
        """
        # pyarrow takes time to load.
        from mtp_ce.training.data.row_store import stored_rows

        return stored_rows(self.identity(), self.files, self._readable, fraction, excluded)

    def _readable(self) -> Iterator[Document]:
        """Yield the documents; errors of files and encodings are one line."""
        with refuse_unreadable(self.source.address, self.source.key):
            yield from self.documents()


@dataclass(frozen=True)
class Fields:
    """Which fields of a row are read: those of prompt and completion, that of a chat, or that of the text.

    Attributes:
        text: the field of the text, the completion or the chat.
        prompt: the field of the prompt, or None.
        keys: field -> the recipe's key that names it.
        input: the field of a second paragraph of the prompt, or None.
        chat: whether the field of the text holds the messages of a chat.
    """

    text: str
    prompt: str | None
    keys: dict[str, str]
    input: str | None = None
    chat: bool = False

    @classmethod
    def of(cls, data: DataConfig) -> Fields:
        """Return the fields that a recipe names."""
        if data.messages_field:
            return cls(data.messages_field, None, {data.messages_field: "data.messages_field"}, chat=True)
        if data.prompt_field and data.completion_field:
            keys = {data.prompt_field: "data.prompt_field", data.completion_field: "data.completion_field"}
            keys |= {data.input_field: "data.input_field"} if data.input_field else {}
            return cls(data.completion_field, data.prompt_field, keys, data.input_field)
        return cls(data.text_field, None, {data.text_field: "data.text_field"})

    @property
    def identity(self) -> list[Any]:
        """Return plain values that decide the documents: part of the cache key."""
        # The key of texts and prompts is older than input and chat, that of chats older than tools.
        more = [self.input, self.chat, *([TOOLS] if self.chat else [])]
        return [self.prompt, self.text, *(more if self.input or self.chat else [])]

    def columns(self, names: Sequence[str]) -> list[str]:
        """Return the columns of a table that have to be read."""
        return [name for name in (*self.keys, *([TOOLS] if self.chat else [])) if name in names]

    def document(self, path: str, where: str, row: dict[str, Any]) -> Document:
        """Return the document of a row.

        Args:
            path: the document's path.
            where: file and line, for messages.
            row: the row's fields.

        Raises:
            RecipeError: a field is missing, or does not hold what it should.
        """
        self.check(where, row)
        if self.chat:
            return Document(path, to_text(row[self.text], f"{where}: field '{self.text}'", row.get(TOOLS)), chat=True)
        if self.prompt is None:
            return Document(path, row[self.text])
        if self.input is None:
            return Document(path, row[self.text], row[self.prompt])
        paragraphs = (row[self.prompt], row[self.input])
        return Document(path, row[self.text], "".join(f"{part}\n\n" for part in paragraphs if part))

    def check(self, where: str, row: dict[str, Any]) -> None:
        """Raise RecipeError if a field is missing, or holds neither a string nor the messages of a chat."""
        for field, key in self.keys.items():
            if field not in row:
                raise RecipeError(f"{where}: no field '{field}' ({key}); it has {_listed(row)}")
            value = row[field]
            if field == self.input and value is None:
                continue
            if not isinstance(value, list if self.chat else str):
                expected = "a list of messages" if self.chat else "a string"
                raise RecipeError(f"{where}: field '{field}' ({key}) holds {type(value).__name__}; expected {expected}")


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
        number: of the line or row, from 1.
        where: file and number, for messages.
        fields: values by name.
    """

    number: int
    where: str
    fields: dict[str, Any]


class FileRows(RowReader):
    """Reads files of rows; a subclass implements `rows` for its format.

    The files are not read by `datasets`, which takes the columns of a file from its first block, so that a later row
    with another field ends it, and which does not report which line of a file is wrong.
    """

    def __init__(self, source: Source, data: DataConfig) -> None:
        super().__init__(source, data)
        self.files = [source.root / path for path in source.paths]
        self.fields = Fields.of(data)

    @abstractmethod
    def rows(self, file: Path) -> Iterator[Row]:
        """Yield the rows of one file."""

    def documents(self) -> Iterator[Document]:
        """Yield the documents of all files."""
        for path, file in zip(self.source.paths, self.files, strict=True):
            name = shown(path)
            for row in self.rows(file):
                yield self.fields.document(f"{name}:{row.number}", row.where, row.fields)

    def identity(self) -> list[Any]:
        """Return the paths and the fields."""
        return ["rows", list(self.source.paths), *self.fields.identity]

    def describe(self) -> str:
        """Return the file, or how many there are."""
        if len(self.files) == 1:
            return f"rows of {shown(self.files[0])}"
        return f"rows of {len(self.files)} files in {shown(self.source.root)}"


def _listed(row: dict[str, Any]) -> str:
    names = [f"'{name}'" for name in row]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "no fields"
