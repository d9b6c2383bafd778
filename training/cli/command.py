"""What the three command lines share: exit codes, the argument parser, overrides, output folders, missing packages.

No module here loads torch, transformers or mlflow at import, so that a mistake in a call costs a second.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from mtp_ce.training.errors import RecipeError

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_USAGE = 2
EXIT_REFUSED = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

# What floor 2 imports sooner or later; mlflow only where the recipe asks for it.
_TRAIN_EXTRA = (
    *("datasets", "matplotlib", "pydantic", "rich"),
    *("safetensors", "tokenizers", "transformers", "yaml"),
)

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


class Parser(argparse.ArgumentParser):
    """One that answers a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line; argparse would print the whole usage before it."""
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def sort_out(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell names from overrides of the form a.b=c."""
    overrides = [word for word in words if _OVERRIDE.match(word)]
    return [word for word in words if not _OVERRIDE.match(word)], overrides


def output_folder(name: str, wanted: Path | None) -> Path:
    """Give the folder that a command writes to: the one asked for, or a new one under runs/ that begins with `name`.

    Raises:
        RecipeError: it is there already, or can't be made.
    """
    # Of several ranks the first one decides, and may have made the folder already.
    if not leads():
        return wanted or Path("runs") / name
    output = wanted or Path("runs") / f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    if output.exists() or output.is_symlink():
        raise RecipeError(f"output folder {output} exists and is left alone; name another one with --output")
    for parent in output.parents:
        if parent.exists() and not parent.is_dir():
            raise RecipeError(f"output folder {output} can't be made: {parent} is a file; name another one")
    return output


def missing_packages(*names: str) -> str:
    """Say what has to be installed, or nothing; without names, of what every command of this floor needs."""
    missing = [name for name in names or _TRAIN_EXTRA if find_spec(name) is None]
    return f"training needs {', '.join(missing)}: pip install 'mtp_ce[train]'" if missing else ""


def leads() -> bool:
    """Whether this is the process that speaks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"
