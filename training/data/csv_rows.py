"""CSV: a document is one row; the first row has the names of the fields."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from mtp_ce.training.data.files import LONGEST, lines_of, shown
from mtp_ce.training.data.row_reader import FileRows, Row
from mtp_ce.training.errors import RecipeError

# The default refuses a text of more than 128 kB. It is a setting of the whole process.
csv.field_size_limit(LONGEST)


class CsvRows(FileRows):
    """Reads .csv files: separated by commas, quoted with double quotes."""

    def rows(self, file: Path) -> Iterator[Row]:
        """Yield the rows of one file; a row is numbered by the line where it ends.

        Raises:
            RecipeError: the file is not CSV, or a row has more or fewer values than there are fields.
        """
        name = shown(file)
        table = csv.DictReader((line for _, line in lines_of(file)), strict=True)
        try:
            for row in table:
                where = f"{name}, line {table.line_num}"
                if None in row or None in row.values():
                    fields = len(table.fieldnames or ())
                    raise RecipeError(f"{where}: has not as many values as there are fields ({fields})")
                yield Row(table.line_num, where, row)
        except csv.Error as error:
            raise RecipeError(f"{name}, line {table.reader.line_num}: not CSV that can be read: {error}") from None
