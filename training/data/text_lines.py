"""Lines of text: a document is one line, as `datasets` reads text; blank lines are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.data.files import numbered_lines
from mtp_ce.training.data.reader import Source, refuse_fields
from mtp_ce.training.data.row_reader import FileRows, Row


class TextLines(FileRows):
    """Reads .txt files."""

    def __init__(self, source: Source, data: DataConfig) -> None:
        refuse_fields(data, f"the lines of {source.key} '{source.address}'")
        super().__init__(source, data)

    def rows(self, file: Path) -> Iterator[Row]:
        """Yield the lines of one file, under the field of the text."""
        for number, where, line in numbered_lines(file):
            yield Row(number, where, {self.fields.text: line})
