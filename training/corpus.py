"""Which files a run reads, and which of them it never trains on.

A document is one file. The split is made on files and from their paths alone, so it is the same on every
machine, for every seed and whatever else is in the folder; no line of a held-out file is ever trained on.
Files with the same content count once, or a copy would carry a held-out text into training.

Nothing here needs torch: an empty folder is a mistake that deserves its answer at once.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mtp_ce.training.schema import DataConfig, RecipeError

# Third-party packages differ from machine to machine, and tests from one Linux distribution to the next.
# encodings and pydoc_data are generated: a hundred near copies of one table, of which some would be held out
# and the rest trained on, and the language reference as one string of 750 kB.
_NOT_STDLIB = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test"),
    *("encodings", "pydoc_data"),
}


# What ast and compile raise about a text; the last two about deep nesting.
NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)

# Python warns of old escapes and the like in what it parses; who trains on a text can't change it. This is a filter
# for good: catch_warnings would put back old ones, and lose what another thread, importing mlflow, has set meanwhile.
SOURCE_NAME = "<corpus>"
warnings.filterwarnings("ignore", module=SOURCE_NAME)


@dataclass(frozen=True)
class Document:
    """One file of the corpus."""

    path: str  # relative to the corpus folder, with forward slashes
    text: str


@dataclass(frozen=True)
class Corpus:
    """The documents of a run, in the order of their paths.

    Attributes:
        train: documents that the tokenizer and the model learn from.
        held_out: documents that only validation reads.
        skipped: files left out because they are empty, not UTF-8, or copies of another one.
        digest: hash of every path, text and side of the split; what caches are keyed by.
    """

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    skipped: int
    digest: str

    @property
    def characters(self) -> int:
        """Length of both sides together."""
        return sum(len(document.text) for document in (*self.train, *self.held_out))


def is_held_out(path: str, fraction: float) -> bool:
    """Say on which side of the split a file stands, from its path relative to the corpus folder."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def find_files(data: DataConfig) -> tuple[Path, list[str]]:
    """List the files of a corpus without reading them.

    Returns:
        The corpus folder, and the files' paths relative to it, sorted.

    Raises:
        RecipeError: the folder does not exist, or one side of the split is empty.
    """
    stdlib = data.corpus == "stdlib"
    root = Path(sysconfig.get_path("stdlib")) if stdlib else Path(data.corpus).expanduser()
    if not root.is_dir():
        raise RecipeError(f"data.corpus is '{data.corpus}', which is not a folder; give one, or 'stdlib'")
    paths: list[str] = []
    for folder, subfolders, names in os.walk(root):
        if stdlib:
            subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
            # _sysconfigdata holds the paths and flags with which this very interpreter was built.
            names = [name for name in names if not name.startswith("_sysconfigdata")]
        inside = Path(folder).relative_to(root)
        paths += [(inside / name).as_posix() for name in names if name.endswith(data.suffix)]
    paths.sort()
    if not paths:
        raise RecipeError(f"data.corpus {root} has no file that ends in '{data.suffix}' (data.suffix)")
    held_out = sum(is_held_out(path, data.holdout_fraction) for path in paths)
    if held_out in (0, len(paths)):
        raise RecipeError(
            f"data.holdout_fraction {data.holdout_fraction} holds out {held_out} of {len(paths)} files; "
            "both sides need at least one: change it or add files"
        )
    return root, paths


def read_corpus(data: DataConfig) -> Corpus:
    """Read every document.

    Raises:
        RecipeError: the folder does not exist, or no readable text is left on one side of the split.
    """
    root, paths = find_files(data)
    train: list[Document] = []
    held_out: list[Document] = []
    seen: set[bytes] = set()
    hasher = hashlib.sha256()
    for path in paths:
        content = (root / path).read_bytes()
        fingerprint = hashlib.sha256(content).digest()
        text = _decode(content)
        if text is None or fingerprint in seen:
            continue
        seen.add(fingerprint)
        side = is_held_out(path, data.holdout_fraction)
        (held_out if side else train).append(Document(path, text))
        hasher.update(f"{path}\0{side}\0".encode() + fingerprint)
    if not train or not held_out:
        raise RecipeError(
            f"data.corpus {root} has {len(train)} readable files to train on and {len(held_out)} held out; "
            "both need at least one that is UTF-8 and not empty"
        )
    skipped = len(paths) - len(train) - len(held_out)
    return Corpus(tuple(train), tuple(held_out), skipped, hasher.hexdigest())


def texts(documents: Iterable[Document]) -> list[str]:
    """Give the texts alone."""
    return [document.text for document in documents]


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
