"""JSON files: a document is one object of a list, or of objects that follow one another.

The text of a file is in memory at once, its objects one at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_ce.training.data.files import read_bytes, refuse_unreadable, shown
from mtp_ce.training.data.row_reader import FileRows, Row
from mtp_ce.training.errors import RecipeError

_SPACE = re.compile(r"[ \t\r\n]*")


class JsonValues(FileRows):
    """Reads .json files; an object is numbered from 1."""

    def rows(self, file: Path) -> Iterator[Row]:
        """Yield the objects of one file.

        Raises:
            RecipeError: the file is not JSON, or a value is not an object.
        """
        name, number = shown(file), 0
        with refuse_unreadable(file):
            text = read_bytes(file).decode("utf-8")
        values = _values(text)
        while True:
            try:
                row = next(values)
            except StopIteration:
                return
            except (ValueError, RecursionError) as error:
                raise RecipeError(f"{name}: not JSON that can be read, after {number} objects: {error}") from None
            number += 1
            if not isinstance(row, dict):
                raise RecipeError(
                    f"{name}, object {number}: holds a {type(row).__name__}; expected an object with fields"
                )
            yield Row(number, f"{name}, object {number}", row)


def _values(text: str) -> Iterator[Any]:
    """Yield the values of a list, or all values of a text.

    Raises:
        ValueError: the text is not JSON.
    """
    decoder = json.JSONDecoder()

    def skip(position: int) -> int:
        space = _SPACE.match(text, position)
        assert space is not None
        return space.end()

    at = skip(0)
    listed = text.startswith("[", at)
    at = skip(at + 1) if listed else at
    while at < len(text) and not (listed and text.startswith("]", at)):
        value, at = decoder.raw_decode(text, at)
        yield value
        at = skip(at)
        if listed and text.startswith(",", at):
            at = skip(at + 1)
        elif listed and not text.startswith("]", at):
            raise ValueError(f"expected ',' or ']' at character {at + 1}")
    if listed and (at >= len(text) or skip(at + 1) < len(text)):
        raise ValueError("the list does not end, or text follows it")
