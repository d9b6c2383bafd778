"""Parquet: a document is one row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mtp_ce.training.data.row_reader import FileRows, Row
from mtp_ce.training.errors import RecipeError

# Rows that are decoded at once.
_BATCH = 100


class ParquetRows(FileRows):
    """Reads the columns of .parquet files that the recipe names."""

    def rows(self, file: Path) -> Iterator[Row]:
        """Yield the rows of one file.

        Raises:
            RecipeError: a column is missing, or the file is not parquet.
        """
        # A reader is found before a dry run needs pyarrow, which takes time to load.
        import pyarrow as pa
        import pyarrow.parquet as pq

        number = 0
        try:
            with pq.ParquetFile(file) as table:
                names = table.schema_arrow.names
                columns = self.fields.columns(names)
                if len(columns) < len(self.fields.keys):
                    # Names the first field that is missing.
                    self.fields.check(str(file), dict.fromkeys(names, ""))
                for batch in table.iter_batches(batch_size=_BATCH, columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield Row(number, f"{file}, row {number}", row)
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise RecipeError(f"{file}: can't be read as parquet, after {number} rows: {reason}") from None
