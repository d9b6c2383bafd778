"""Lines of text: a document is one line, as `datasets` reads text; blank lines are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.data.reader import Source
from mtp_ce.training.data.row_reader import FileRows, Row, numbered_lines
from mtp_ce.training.errors import RecipeError


class TextLines(FileRows):
    """Reads .txt files."""

    def __init__(self, source: Source, data: DataConfig) -> None:
        if data.prompt_field:
            raise RecipeError(
                f"data.prompt_field is '{data.prompt_field}', but the lines of {source.key} '{source.address}' have no "
                "fields; give .jsonl or .parquet files, or a hub name"
            )
        super().__init__(source, data)

    def rows(self, file: Path) -> Iterator[Row]:
        """Yield the lines of one file, under the field of the text."""
        for number, where, line in numbered_lines(file):
            yield Row(number, where, {self.fields.text: line})
