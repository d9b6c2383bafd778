"""Folders that are either complete or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; it is renamed to `folder` when the block ends without error.

    It lies beside `folder`, so that the rename stays on one file system, where it is atomic. A process that is killed
    leaves only this folder, whose name begins with a dot.

    Raises:
        FileExistsError: `folder` exists when the block ends; it stays as it is.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield aside
        # mkdtemp makes it private to the user; a finished folder gets the ordinary permissions.
        aside.chmod(0o777 & ~_umask())
        # On POSIX a rename replaces an empty folder silently.
        if folder.exists():
            raise FileExistsError(f"{folder} already exists")
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    # The umask can't be read without setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
