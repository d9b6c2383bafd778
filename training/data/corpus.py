"""A corpus: documents to train on and held-out documents, in a fixed order, read from disk when they are indexed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, overload

T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """One text of the corpus.

    Attributes:
        path: of its file, relative to the corpus folder, with forward slashes; of a row `file:number`, from 1.
        text: the whole text, or the completion where there is a prompt.
        prompt: text before it that has no labels; None where every token has one.
    """

    path: str
    text: str
    prompt: str | None = None


class Lazy(Sequence[T], Generic[T]):
    """A sequence whose items are computed when they are indexed.

    Args:
        count: number of items.
        read: returns the i-th.
    """

    def __init__(self, count: int, read: Callable[[int], T]) -> None:
        self._count = count
        self._read = read

    def __len__(self) -> int:
        """Return the number of items."""
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        """Compute an item, or return a lazy slice."""
        indices = range(self._count)[index]
        if isinstance(indices, int):
            return self._read(indices)
        return Lazy(len(indices), lambda i: self._read(indices[i]))


@dataclass(frozen=True)
class Corpus:
    """The documents of a run, in the order of their files and rows.

    Attributes:
        train: documents that the tokenizer and the model are trained on.
        held_out: documents that only validation reads.
        skipped: documents left out: files that are empty, not UTF-8, or copies of another one; rows without text.
        digest: hash of every path, text, prompt and side of the split; cache keys contain it.
        characters: length of both sides together.
    """

    train: Sequence[Document]
    held_out: Sequence[Document]
    skipped: int
    digest: str
    characters: int = 0


def texts(documents: Sequence[Document]) -> Sequence[str]:
    """Return the texts with their prompts in front, each read when it is indexed."""

    def read(i: int) -> str:
        document = documents[i]
        return (document.prompt or "") + document.text

    return Lazy(len(documents), read)


def below(digest: bytes, fraction: float) -> bool:
    """Return whether a hash is in the lowest `fraction` of all hashes."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
