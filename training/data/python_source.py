"""Documents that are Python source: parsing them, and which of them are documented modules."""

from __future__ import annotations

import ast
import warnings
from pathlib import PurePosixPath

from mtp_ce.training.data.corpus import Document

# What ast and compile raise about a text; the last two about deep nesting.
NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)

# Python warns of old escapes and the like in source that it parses; whoever trains on a text can't change it. The
# filter is permanent: catch_warnings would restore old filters, and lose those that another thread has set meanwhile,
# such as the one that imports mlflow.
SOURCE_NAME = "<corpus>"
warnings.filterwarnings("ignore", module=SOURCE_NAME)


def is_documented(document: Document) -> bool:
    """Return whether a file is a public module with a docstring: the curated part of a Python corpus.

    Whoever writes for others to read documents, and marks what is private with an underscore: private modules hold
    tables, generated code and fallbacks of C code, and a module without a docstring is mostly a script or a shim.
    """
    parts = PurePosixPath(document.path).with_suffix("").parts
    if any(part.startswith("_") and part != "__init__" for part in parts):
        return False
    tree = parse_python(document.text)
    return tree is not None and ast.get_docstring(tree) is not None


def parse_python(source: str) -> ast.Module | None:
    """Parse a text; return None where it is not valid Python."""
    try:
        return ast.parse(source, filename=SOURCE_NAME)
    except NOT_PYTHON:
        return None
