"""Parquet: a document is one row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_ce.training.data.files import shown
from mtp_ce.training.data.row_reader import FileRows, Row
from mtp_ce.training.errors import RecipeError

# Rows that are decoded at once.
_BATCH = 100


class ParquetRows(FileRows):
    """Reads the columns of .parquet files that the recipe names."""

    def rows(self, file: Path) -> Iterator[Row]:
        """Yield the rows of one file.

        Raises:
            RecipeError: a column is missing, the file is not parquet, or a text is not UTF-8.
        """
        # A reader is found before a dry run needs pyarrow, which takes time to load.
        import pyarrow.parquet as pq

        name, number = shown(file), 0
        try:
            with pq.ParquetFile(file) as table:
                names = table.schema_arrow.names
                columns = self.fields.columns(names)
                if not self.fields.keys.keys() <= {*columns}:
                    # Names the first field that is missing.
                    self.fields.check(name, dict.fromkeys(names, ""))
                for batch in table.iter_batches(batch_size=_BATCH, columns=columns):
                    for row in _rows(batch):
                        number += 1
                        yield Row(number, f"{name}, row {number}", row)
        except RecipeError:
            raise
        except UnicodeDecodeError as error:
            raise RecipeError(f"{name}, row {number + 1}: not UTF-8: {error.reason}") from None
        except Exception as error:  # a damaged file may raise anything
            reason = " ".join(str(error).split())
            raise RecipeError(f"{name}: can't be read as parquet, after {number} rows: {reason}") from None


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        # One after another, as far as the row that can't be decoded.
        for i in range(len(batch)):
            yield from batch.slice(i, 1).to_pylist()
