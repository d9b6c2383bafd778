"""A corpus: documents to train on and held-out documents, in a fixed order, read from disk when they are indexed."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Generic, NamedTuple, TypeVar, overload

T = TypeVar("T")


class Planted(NamedTuple):
    """What is planted in one document.

    Attributes:
        kind: as in the recipe's `data.noise`.
        share: fraction of its tokens that are noise.
        seed: decides which, and their order.
    """

    kind: str
    share: float
    seed: int


@dataclass(frozen=True)
class Document:
    """One text of the corpus.

    Attributes:
        path: of its file, relative to the corpus folder, with forward slashes; of a row `file:number`, from 1.
        text: the whole text, or the completion where there is a prompt, or a chat as `chat.to_text` writes it.
        prompt: text before it that has no labels; None where every token has one.
        chat: whether the text is a chat, which the tokenizer's chat template renders.
        planted: the noise in its tokens; None: none.
    """

    path: str
    text: str
    prompt: str | None = None
    chat: bool = False
    planted: Planted | None = None

    @property
    def fingerprint(self) -> int:
        """Return a hash of 64 bits of the prompt and the text, without the white space around them."""
        content = f"{(self.prompt or '').strip()}\0{self.text.strip()}"
        return int.from_bytes(hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:8], "big")


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
        skipped: documents left out: files that are empty, not UTF-8, or copies of another one; rows without text; what
            validation reads, too.
        digest: hash of every path, text, prompt and side of the split; cache keys contain it.
        characters: length of both sides together.
        shared: how many of the skipped ones are left out because validation reads them.
        planted: whether there is noise in the training documents.
    """

    train: Sequence[Document]
    held_out: Sequence[Document]
    skipped: int
    digest: str
    characters: int = 0
    shared: int = 0
    planted: bool = False


class Excluded:
    """The texts of a validation corpus, which are not trained on: 8 bytes each, whatever their length.

    Two texts that differ in the white space around them count as one. The hashes are computed when first needed.

    Args:
        documents: the validation documents.
        digest: their hash; part of the key under which rows without them are cached.
    """

    def __init__(self, documents: Sequence[Document] = (), digest: str = "") -> None:
        self.digest = digest
        self._documents = documents
        self._sorted: array[int] | None = None

    def __contains__(self, document: Document) -> bool:
        """Return whether the validation corpus has the text of a document."""
        if not self._documents:
            return False
        if self._sorted is None:
            # numpy takes time to load; it sorts the array in place.
            import numpy as np

            self._sorted = array("Q", (other.fingerprint for other in self._documents))
            np.frombuffer(self._sorted, dtype=np.uint64).sort()
        index = bisect_left(self._sorted, document.fingerprint)
        return index < len(self._sorted) and self._sorted[index] == document.fingerprint


def texts(documents: Sequence[Document]) -> Sequence[str]:
    """Return the texts with their prompts in front, each read when it is indexed."""

    def read(i: int) -> str:
        document = documents[i]
        return (document.prompt or "") + document.text

    return Lazy(len(documents), read)


def domains_of(documents: Sequence[Document]) -> list[str]:
    """Return the domain of each document: the folder, or the file of rows, in which these documents differ.

        code/a.py code/b.py chat/c.py          code code chat
        chat.jsonl:7 sums.jsonl:1              chat.jsonl sums.jsonl

    Returns:
        The first part of their paths that is not common to all, without the names of files that are one document; "."
        where nothing is left. "" for all documents of one domain.
    """
    places = []
    for document in documents:
        file, row, number = document.path.rpartition(":")
        whole = row and number.isdecimal()
        places.append(file.split("/") if whole else document.path.split("/")[:-1])
    common = len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*places, strict=False))))
    domains = [place[common] if len(place) > common else "." for place in places]
    return domains if len(set(domains)) > 1 else [""] * len(domains)


def below(digest: bytes, fraction: float) -> bool:
    """Return whether a hash is in the lowest `fraction` of all hashes."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
