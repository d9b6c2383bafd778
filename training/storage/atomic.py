"""A folder that is either there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write into; it takes the name `folder` when the block ends without error.

    The aside folder lies beside the final one, so that the rename stays on one file system, where it is one
    step. A process that dies in between leaves only the aside folder, whose name begins with a dot.

    Raises:
        FileExistsError: `folder` is there already when the block ends; it is left as it is.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield aside
        # mkdtemp makes it private to the user; a finished folder gets the ordinary permissions.
        aside.chmod(0o777 & ~_umask())
        # On POSIX a rename replaces an empty folder without a word, so that case is checked by hand.
        if folder.exists():
            raise FileExistsError(f"{folder} exists and is left alone")
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    # There is no way to ask for the umask without setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
