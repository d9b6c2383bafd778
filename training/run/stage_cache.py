"""The stage cache: finished stages by a hash of everything that decides their result, so nothing is trained twice.

    key = sha256(kind, the stage's part of the recipe, its inputs)

Settings that change only memory, device, names or logging of a stage are not in the hash.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mtp_ce.training.config.recipe import results_only
from mtp_ce.training.loop.checkpoint import FOLDER as CHECKPOINTS
from mtp_ce.training.storage.atomic import MANIFEST, damage
from mtp_ce.training.storage.cache import cache_folder, cached, usable

logger = logging.getLogger(__name__)

StageKind = Literal["reference", "critic", "weights", "main"]

# Part of every key: raise it when the code of a stage changes its results.
_FORMAT = "4"


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
    """Return the folder of a finished stage, or None if it is not in the cache or is damaged there."""
    folder = _folder(kind, key)
    if usable(folder):
        return folder
    if folder.exists():
        logger.warning("cache entry %s is damaged (%s); the stage runs again", folder, damage(folder))
    return None


def store_stage(kind: StageKind, key: str, folder: Path) -> Path:
    """Copy the folder of a finished stage into the cache; return the copy."""

    def copy(aside: Path) -> None:
        # Checkpoints are of no use to a finished stage; hidden files are what dead processes left, and manifests.
        shutil.copytree(folder, aside, dirs_exist_ok=True, ignore=shutil.ignore_patterns(CHECKPOINTS, ".*"))

    return cached(_folder(kind, key), copy)


def folder_digest(folder: Path) -> str:
    """Hash the names and contents of a folder's files but its manifest."""
    hasher = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        hasher.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return hasher.hexdigest()


def _folder(kind: StageKind, key: str) -> Path:
    return cache_folder() / "stages" / kind / key
