"""What every layout checks of the folder it writes, and how it names the heads it is asked to write."""

from __future__ import annotations

from pathlib import Path

from mtp_ce.heads.protocol import Heads


def check_free(folder: str | Path) -> None:
    """Check that a folder holds no model: a base and a draft model have files of the same names.

    Raises:
        FileExistsError: it does.
    """
    if (Path(folder) / "config.json").exists():
        raise FileExistsError(f"folder {folder} holds a model already; expected one without config.json, name another.")


def describe(heads: Heads) -> str:
    """Return kind and horizon of heads, for a message."""
    return f"{heads.kind!r} heads with horizon {heads.horizon}"
