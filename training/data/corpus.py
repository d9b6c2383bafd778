"""Which texts a run reads, and which of them it never trains on.

    stdlib, a folder of text files          a document is one file
    .jsonl, .parquet, a hub data set        a document is one row
    .txt                                    a document is one line

Files are split by a hash of their paths alone, so the split is the same on every machine, for every seed and whatever
else is in the folder; files with the same content count once, or a copy would carry a held-out text into training.
Rows are split by a hash of their content, so copies of a row are always on the same side, and all of them count.

Texts stay on disk: a document is read when it is asked for. Finding a corpus needs neither torch nor a network: an
empty folder is a mistake that deserves its answer at once.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Generic, Literal, TypeVar, overload

from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.errors import RecipeError

T = TypeVar("T")

# Third-party packages differ from machine to machine, and tests from one Linux distribution to the next.
# encodings and pydoc_data are generated: a hundred near copies of one table, of which some would be held out
# and the rest trained on, and the language reference as one string of 750 kB.
_NOT_STDLIB = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test"),
    *("encodings", "pydoc_data"),
}

# What holds many documents. In a folder a .txt file is one document, as any other text file is.
ROW_SUFFIXES = (".jsonl", ".parquet", ".txt")
_ROWS_IN_FOLDERS = (".jsonl", ".parquet")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

# What ast and compile raise about a text; the last two about deep nesting.
NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)

# Python warns of old escapes and the like in what it parses; who trains on a text can't change it. This is a filter
# for good: catch_warnings would put back old ones, and lose what another thread, importing mlflow, has set meanwhile.
SOURCE_NAME = "<corpus>"
warnings.filterwarnings("ignore", module=SOURCE_NAME)


@dataclass(frozen=True)
class Document:
    """One text of the corpus.

    Attributes:
        path: of its file, relative to the corpus folder, with forward slashes; of a row `file:number`, from 1.
        text: all of it, or the completion where there is a prompt.
        prompt: what stands before the text and is read but not learnt; None where all is learnt.
    """

    path: str
    text: str
    prompt: str | None = None


class Lazy(Sequence[T], Generic[T]):
    """A sequence whose items are made when they are asked for.

    Args:
        count: how many there are.
        read: makes the i-th.
    """

    def __init__(self, count: int, read: Callable[[int], T]) -> None:
        self._count = count
        self._read = read

    def __len__(self) -> int:
        """Give the number of items."""
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        """Make an item, or give a slice whose items are made later."""
        places = range(self._count)[index]
        if isinstance(places, int):
            return self._read(places)
        return Lazy(len(places), lambda i: self._read(places[i]))


@dataclass(frozen=True)
class Corpus:
    """The documents of a run, in the order of their files and rows.

    Attributes:
        train: documents that the tokenizer and the model learn from.
        held_out: documents that only validation reads.
        skipped: what was left out: files that are empty, not UTF-8, or copies of another one; rows without text.
        digest: hash of every path, text, prompt and side of the split; what caches are keyed by.
        characters: length of both sides together.
    """

    train: Sequence[Document]
    held_out: Sequence[Document]
    skipped: int
    digest: str
    characters: int = 0


@dataclass(frozen=True)
class Source:
    """Where documents come from, found but not read.

    Attributes:
        key: the recipe's key that names it.
        address: how the recipe names it.
        kind: one document a file, one a row or line, or what a network must fetch first.
        root: the folder of the files.
        paths: of the files, relative to it, sorted; none where a network is needed.
    """

    key: str
    address: str
    kind: Literal["files", "rows", "hub", "s3"]
    root: Path = Path()
    paths: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say in words what was found."""
        if not self.paths:
            return f"{self.address}, which a dry run does not fetch"
        if len(self.paths) == 1 and self.kind == "rows":
            return f"rows of {self.root / self.paths[0]}"
        return f"{'rows of ' if self.kind == 'rows' else ''}{len(self.paths)} files in {self.root}"


def is_held_out(path: str, fraction: float) -> bool:
    """Say on which side of the split a file stands, from its path relative to the corpus folder."""
    return below(hashlib.sha256(path.encode()).digest(), fraction)


def below(digest: bytes, fraction: float) -> bool:
    """Whether a hash is among the lowest; of many hashes this share is."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def find_files(data: DataConfig) -> Source:
    """Find a corpus without reading it, and look at its validation corpus.

    Raises:
        RecipeError: it is not there, or one side of the split is empty.
    """
    source = find_source("data.corpus", data.corpus, data)
    if data.validation_corpus is not None:
        find_source("data.validation_corpus", data.validation_corpus, data)
    elif source.kind == "files":
        held_out = sum(is_held_out(path, data.holdout_fraction) for path in source.paths)
        if held_out in (0, len(source.paths)):
            raise RecipeError(
                f"data.holdout_fraction {data.holdout_fraction} holds out {held_out} of {len(source.paths)} files; "
                "both sides need at least one: change it or add files"
            )
    return source


def find_source(key: str, address: str, data: DataConfig) -> Source:
    """Say what an address names, and list its files where they are on this machine.

    Raises:
        RecipeError: it names nothing, no file, or files that have no rows where the recipe asks for fields.
    """
    source = _find(key, address, data)
    if data.prompt_field and source.kind == "files":
        raise RecipeError(
            f"data.prompt_field is '{data.prompt_field}', but {key} '{address}' is a folder of text files, which have "
            "no fields; give .jsonl or .parquet files, or a hub name"
        )
    if source.kind == "rows" and data.prompt_field and source.paths[0].endswith(".txt"):
        raise RecipeError(
            f"data.prompt_field is '{data.prompt_field}', but the lines of {key} '{address}' have no fields; "
            "give .jsonl or .parquet files, or a hub name"
        )
    return source


def _find(key: str, address: str, data: DataConfig) -> Source:
    if address == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return Source(key, address, "files", root, _files_below(root, data.suffix, stdlib=True))
    if address.startswith("s3://"):
        return Source(key, address, "s3")
    path = Path(address).expanduser()
    if path.is_dir():
        if not (paths := _files_below(path, data.suffix)):
            raise RecipeError(f"{key} {path} has no file that ends in '{data.suffix}' (data.suffix)")
        return Source(key, address, "rows" if data.suffix in _ROWS_IN_FOLDERS else "files", path, paths)
    if path.is_file():
        return Source(key, address, "rows", path.parent, _of_rows(key, address, [path.name]))
    if any(mark in address for mark in "*?["):
        fixed = _before_patterns(path.parts)
        root, pattern = Path(*fixed), str(Path(*path.parts[len(fixed) :]))
        found = sorted(file.relative_to(root).as_posix() for file in root.glob(pattern) if file.is_file())
        if not found:
            raise RecipeError(f"{key} is '{address}', and no file is named like that")
        return Source(key, address, "rows", root, _of_rows(key, address, found))
    if _HUB_NAME.fullmatch(address) and not address.endswith(ROW_SUFFIXES):
        return Source(key, address, "hub")
    raise RecipeError(
        f"{key} is '{address}', which is not a folder, nor a {', '.join(ROW_SUFFIXES)} file; give one, a glob, an "
        "s3:// address, a hub name (owner/name), or 'stdlib'"
    )


def _before_patterns(parts: Sequence[str]) -> list[str]:
    """The parts of a path before the first one that is a pattern."""
    patterns = [i for i, part in enumerate(parts) if any(mark in part for mark in "*?[")]
    return list(parts[: patterns[0]])


def _of_rows(key: str, address: str, paths: Sequence[str]) -> tuple[str, ...]:
    suffixes = {PurePosixPath(path).suffix for path in paths}
    if len(suffixes) != 1 or not suffixes <= set(ROW_SUFFIXES):
        raise RecipeError(
            f"{key} '{address}' has files that end in {', '.join(sorted(suffixes))}; expected one of "
            f"{', '.join(ROW_SUFFIXES)}. Of other text files give the folder, and data.suffix"
        )
    return tuple(paths)


def _files_below(root: Path, suffix: str, *, stdlib: bool = False) -> tuple[str, ...]:
    paths: list[str] = []
    for folder, subfolders, names in os.walk(root):
        if stdlib:
            subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
            # _sysconfigdata holds the paths and flags with which this very interpreter was built.
            names = [name for name in names if not name.startswith("_sysconfigdata")]
        inside = Path(folder).relative_to(root)
        paths += [(inside / name).as_posix() for name in names if name.endswith(suffix)]
    return tuple(sorted(paths))


def read_corpus(data: DataConfig) -> Corpus:
    """Read every document once, and say where each stands.

    Raises:
        RecipeError: the corpus is not there or can't be read, or no text is left on one side of the split.
    """
    source = find_files(data)
    seen: set[bytes] = set()
    if data.validation_corpus is None:
        corpus = _read(source, data, data.holdout_fraction, seen)
    else:
        # First, so that a copy of one of its files is left out of training.
        held_out = _read(find_source("data.validation_corpus", data.validation_corpus, data), data, 0, seen)
        train = _read(source, data, 0, seen)
        corpus = Corpus(
            train=train.train,
            held_out=held_out.train,
            skipped=train.skipped + held_out.skipped,
            digest=hashlib.sha256(f"{train.digest} {held_out.digest}".encode()).hexdigest(),
            characters=train.characters + held_out.characters,
        )
    if not corpus.train or not corpus.held_out:
        raise RecipeError(
            f"data.corpus {source.address} has {len(corpus.train)} readable documents to train on and "
            f"{len(corpus.held_out)} held out; both need at least one that is UTF-8 and not empty: change "
            "data.holdout_fraction, give data.validation_corpus or more text"
        )
    return corpus


def _read(source: Source, data: DataConfig, fraction: float, seen: set[bytes]) -> Corpus:
    """Read one source; held out is the given share of it."""
    if source.kind == "s3":
        source = _fetch(source, data)
    if source.kind == "files":
        return _read_files(source, fraction, seen)
    # Reads Arrow tables, whose package takes time to load.
    from mtp_ce.training.data.row_corpus import read_rows

    return read_rows(source, data, fraction)


def _fetch(source: Source, data: DataConfig) -> Source:
    """Download what is in S3, and find it here."""
    from mtp_ce.training.storage import folders as storage

    one = source.address.endswith(ROW_SUFFIXES)
    fetch = storage.fetch_file if one else storage.fetch_folder
    path = fetch(source.key, source.address)
    found = find_source(source.key, str(path), data)
    return replace(found, address=source.address)


def _read_files(source: Source, fraction: float, seen: set[bytes]) -> Corpus:
    sides: dict[bool, list[tuple[str, bytes]]] = {False: [], True: []}
    hasher = hashlib.sha256()
    characters = 0
    for path in source.paths:
        content = (source.root / path).read_bytes()
        fingerprint = hashlib.sha256(content).digest()
        text = _decode(content)
        if text is None or fingerprint in seen:
            continue
        seen.add(fingerprint)
        side = is_held_out(path, fraction)
        sides[side].append((path, fingerprint))
        hasher.update(f"{path}\0{side}\0".encode() + fingerprint)
        characters += len(text)

    def documents(files: list[tuple[str, bytes]]) -> Sequence[Document]:
        return Lazy(len(files), lambda i: _read_file(source.root, *files[i]))

    train, held_out = sides[False], sides[True]
    skipped = len(source.paths) - len(train) - len(held_out)
    return Corpus(documents(train), documents(held_out), skipped, hasher.hexdigest(), characters)


def _read_file(root: Path, path: str, fingerprint: bytes) -> Document:
    try:
        content = (root / path).read_bytes()
    except OSError as error:
        raise RecipeError(f"{root / path} can't be read any more: {error.strerror}; start again") from None
    text = _decode(content)
    if text is None or hashlib.sha256(content).digest() != fingerprint:
        raise RecipeError(f"{root / path} changed while it was being read; start again")
    return Document(path, text)


def texts(documents: Sequence[Document]) -> Sequence[str]:
    """Give the texts alone, with their prompts, each read when it is asked for."""

    def read(i: int) -> str:
        document = documents[i]
        return (document.prompt or "") + document.text

    return Lazy(len(documents), read)


def is_documented(document: Document) -> bool:
    """Whether a file is a public module with a docstring: the curated part of a Python corpus.

    Whoever writes for others to read documents and names what is private with an underscore: private modules hold
    tables, generated code and fallbacks of C code, and a module without a docstring is mostly a script or a shim.
    """
    parts = PurePosixPath(document.path).with_suffix("").parts
    if any(part.startswith("_") and part != "__init__" for part in parts):
        return False
    tree = parse_python(document.text)
    return tree is not None and ast.get_docstring(tree) is not None


def parse_python(source: str) -> ast.Module | None:
    """Parse a text; None where it is not valid Python."""
    try:
        return ast.parse(source, filename=SOURCE_NAME)
    except NOT_PYTHON:
        return None


def _decode(content: bytes) -> str | None:
    try:
        text = content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
    return text if text.strip() else None
