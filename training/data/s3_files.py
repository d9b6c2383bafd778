"""Files in S3: downloaded into the cache, then read like files on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.data.corpus import Corpus, Excluded
from mtp_ce.training.data.reader import Source, find_reader, is_row_file


class S3Files:
    """Reads a folder or file of S3 with the reader that fits its local copy.

    Args:
        source: an s3:// address.
        data: the recipe's `data` group.
    """

    files: Sequence[Path] = ()

    def __init__(self, source: Source, data: DataConfig) -> None:
        self.source = source
        self._data = data

    def describe(self) -> str:
        """Return the address."""
        return f"{self.source.address}, which a dry run does not fetch"

    def check_split(self, fraction: float) -> None:
        """Check nothing: the files are known once they are downloaded."""

    def read(self, fraction: float, excluded: Excluded) -> Corpus:
        """Download and read.

        Raises:
            RecipeError: S3 has no such object, or the local copy can't be read.
        """
        # boto3 takes a second to load.
        from mtp_ce.training.storage import folders as storage

        key, address = self.source.key, self.source.address
        fetch = storage.fetch_file if is_row_file(address) else storage.fetch_folder
        return find_reader(key, str(fetch(key, address)), self._data).read(fraction, excluded)
