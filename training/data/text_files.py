"""Text files of a folder: a document is one file.

Files are split by a hash of their paths alone, so the split is the same on every machine, for every seed and whatever
else is in the folder. Files with the same content count once, or a copy would carry a held-out text into training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.data.corpus import Corpus, Document, Excluded, Lazy, below
from mtp_ce.training.data.files import read_bytes, refuse_unreadable, shown
from mtp_ce.training.data.reader import Source, refuse_fields
from mtp_ce.training.errors import RecipeError


class TextFiles:
    """Reads every UTF-8 file of a source; the text stays on disk and is read again when it is indexed.

    Args:
        source: the folder and its files.
        data: the recipe's `data` group.

    Raises:
        RecipeError: the recipe names fields, which files do not have.
    """

    def __init__(self, source: Source, data: DataConfig) -> None:
        refuse_fields(data, f"{source.key} '{source.address}' is a folder of text files, which")
        self.source = source
        self.files: Sequence[Path] = [source.root / path for path in source.paths]

    def describe(self) -> str:
        """Return how many files were found, and where."""
        return f"{len(self.files)} files in {shown(self.source.root)}"

    def check_split(self, fraction: float) -> None:
        """Check from the paths alone that both sides of the split have a file."""
        held_out = sum(is_held_out(path, fraction) for path in self.source.paths)
        if held_out in (0, len(self.files)):
            raise RecipeError(
                f"data.holdout_fraction {fraction} holds out {held_out} of {len(self.files)} files; both sides need at "
                "least one: change it or add files"
            )

    def read(self, fraction: float, excluded: Excluded) -> Corpus:
        """Read every file once; keep hashes and not texts in memory."""
        sides: dict[bool, list[tuple[str, bytes]]] = {False: [], True: []}
        seen: set[bytes] = set()
        hasher = hashlib.sha256()
        characters = shared = 0
        for path, file in zip(self.source.paths, self.files, strict=True):
            with refuse_unreadable(file):
                content = read_bytes(file)
            text = _decode(content)
            if text is None:
                continue
            if Document(path, text) in excluded:
                shared += 1
                continue
            # A copy may have other line ends, or a byte order mark.
            fingerprint, same = (hashlib.sha256(form).digest() for form in (content, text.encode()))
            if same in seen:
                continue
            seen.add(same)
            side = is_held_out(path, fraction)
            sides[side].append((path, fingerprint))
            hasher.update(_bytes(path) + f"\0{side}\0".encode() + fingerprint)
            characters += len(text)

        train, held_out = sides[False], sides[True]
        return Corpus(
            train=self._documents(train),
            held_out=self._documents(held_out),
            skipped=len(self.files) - len(train) - len(held_out),
            digest=hasher.hexdigest(),
            characters=characters,
            shared=shared,
        )

    def _documents(self, files: list[tuple[str, bytes]]) -> Sequence[Document]:
        return Lazy(len(files), lambda i: _read_file(self.source.root, *files[i]))


def is_held_out(path: str, fraction: float) -> bool:
    """Return whether a file is held out, from its path relative to the corpus folder."""
    return below(hashlib.sha256(_bytes(path)).digest(), fraction)


def _bytes(path: str) -> bytes:
    # Names of files need not be UTF-8.
    return path.encode("utf-8", "surrogateescape")


def _read_file(root: Path, path: str, fingerprint: bytes) -> Document:
    try:
        content = read_bytes(root / path)
    except OSError as error:
        raise RecipeError(
            f"{shown(root / path)} can't be read any more: {error.strerror or error}; start again"
        ) from None
    text = _decode(content)
    # The tokens in the cache were made from the text of the first reading.
    if text is None or hashlib.sha256(content).digest() != fingerprint:
        raise RecipeError(f"{shown(root / path)} changed while it was being read; start again")
    return Document(shown(path), text)


def _decode(content: bytes) -> str | None:
    try:
        text = content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
    return text if text.strip() else None
