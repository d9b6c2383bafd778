"""Where what can be made or fetched again is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Give the folder of everything that can be made again: $XDG_CACHE_HOME/mtp_ce or ~/.cache/mtp_ce."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtp_ce"
