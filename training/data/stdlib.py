"""The source of Python's standard library: text files that every machine with Python has."""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path, PurePosixPath

from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.data.files import files_below
from mtp_ce.training.data.reader import Source
from mtp_ce.training.data.text_files import TextFiles

# Third-party packages differ from machine to machine, and tests from one Linux distribution to the next.
# encodings and pydoc_data are generated: a hundred near copies of one table, of which some would be held out
# and the rest trained on, and the language reference as one string of 750 kB.
_NOT_STDLIB = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test"),
    *("encodings", "pydoc_data"),
}


class StandardLibrary(TextFiles):
    """Reads the standard library of the Python that runs."""

    def __init__(self, source: Source, data: DataConfig) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        paths = files_below(root, data.suffix, _NOT_STDLIB)
        # _sysconfigdata holds the paths and flags with which this very interpreter was built.
        paths = tuple(path for path in paths if not PurePosixPath(path).name.startswith("_sysconfigdata"))
        super().__init__(replace(source, root=root, paths=paths), data)
