"""Data sets of the Hugging Face hub: a document is one row of `data.split`; the package `datasets` downloads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.data.corpus import Corpus, Document, Excluded
from mtp_ce.training.data.reader import Source
from mtp_ce.training.data.row_reader import Fields, RowReader
from mtp_ce.training.errors import RecipeError


class HubRows(RowReader):
    """Reads one split of a data set, from the cache of `datasets` where it was downloaded before."""

    def __init__(self, source: Source, data: DataConfig) -> None:
        super().__init__(source, data)
        self.fields = Fields.of(data)
        self._table: Any = None

    def describe(self) -> str:
        """Return the name."""
        return f"{self.source.address}, which a dry run does not fetch"

    def identity(self) -> list[Any]:
        """Return the name, subset and split, and the fields."""
        data = self.data
        return ["hub", [self.source.address, data.subset, data.split], *self.fields.identity]

    def read(self, fraction: float, excluded: Excluded) -> Corpus:
        """Download the split, then read it as rows.

        Raises:
            RecipeError: neither the hub nor its cache has the split, or a row lacks a field.
        """
        self._table = _load(self.source, self.data)
        self.files = [Path(part["filename"]) for part in self._table.cache_files]
        return super().read(fraction, excluded)

    def documents(self) -> Iterator[Document]:
        """Yield the rows of the split."""
        columns = self.fields.columns(self._table.column_names)
        # With a column missing the whole row is read, so that the message can list the fields it has.
        table = self._table.select_columns(columns) if self.fields.keys.keys() <= {*columns} else self._table
        for i, row in enumerate(table, 1):
            where = f"{self.source.key} '{self.source.address}', row {i}"
            yield self.fields.document(f"{self.data.split}:{i}", where, row)


def _load(source: Source, data: DataConfig) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source.address, data.subset, split=data.split)
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"{source.key} is '{source.address}', which is not a local path, and its split '{data.split}' can't be "
            f"loaded from the hub ({reason})"
        ) from None
