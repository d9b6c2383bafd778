"""JSON lines: a document is one line, an object with fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from mtp_ce.training.data.files import numbered_lines
from mtp_ce.training.data.row_reader import FileRows, Row
from mtp_ce.training.errors import RecipeError


class JsonLines(FileRows):
    """Reads .jsonl and .ndjson files; other fields may differ from line to line, and blank lines are skipped."""

    def rows(self, file: Path) -> Iterator[Row]:
        """Yield the objects of one file; see `objects_of`."""
        yield from objects_of(file)


def objects_of(file: Path) -> Iterator[Row]:
    """Yield the objects of a file with one in each line.

    Raises:
        RecipeError: a line is not JSON, or not an object.
    """
    for number, where, line in numbered_lines(file):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{where}: not JSON that can be read: {error}") from None
        if not isinstance(row, dict):
            raise RecipeError(f"{where}: holds a {type(row).__name__}; expected an object with fields")
        yield Row(number, where, row)
