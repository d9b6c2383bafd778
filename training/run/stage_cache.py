"""The stage cache: finished stages by a hash of everything that decides their result, so nothing is trained twice.

    key = sha256(kind, the stage's part of the recipe, its inputs)

Settings that change only memory, device, names or logging of a stage are not in the hash.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mtp_ce.training.config.recipe import results_only
from mtp_ce.training.storage.atomic import whole_folder
from mtp_ce.training.storage.cache import cache_folder

StageKind = Literal["reference", "critic", "weights", "main"]

# Part of every key: raise it when the code of a stage changes its results.
_FORMAT = "3"


def stage_key(kind: StageKind, settings: Mapping[str, Any], inputs: Sequence[str]) -> str:
    """Hash everything that decides the result of a stage.

    Args:
        kind: which stage it is.
        settings: its part of the recipe, as plain values.
        inputs: hashes of what it reads.
    """
    text = json.dumps([_FORMAT, kind, results_only(settings), list(inputs)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cached_stage(kind: StageKind, key: str) -> Path | None:
    """Return the folder of a finished stage, or None if it is not in the cache."""
    folder = _folder(kind, key)
    return folder if folder.exists() else None


def store_stage(kind: StageKind, key: str, folder: Path) -> Path:
    """Copy the folder of a finished stage into the cache, atomically; return the copy."""
    try:
        with whole_folder(_folder(kind, key)) as aside:
            shutil.copytree(folder, aside, dirs_exist_ok=True)
    except FileExistsError:
        pass  # another process finished the same stage meanwhile
    return _folder(kind, key)


def folder_digest(folder: Path) -> str:
    """Hash the names and contents of a folder's files."""
    hasher = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        hasher.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return hasher.hexdigest()


def _folder(kind: StageKind, key: str) -> Path:
    return cache_folder() / "stages" / kind / key
