"""Shared by the command lines: exit codes, argument parser, overrides, output folders, missing packages.

Nothing here loads torch, transformers or mlflow, so an error in the command line takes about a second to report.
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
EXIT_HANGUP = 129
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

# Packages that training imports; mlflow is checked only where the recipe uses it.
_TRAIN_EXTRA = (
    *("datasets", "matplotlib", "pydantic", "rich"),
    *("safetensors", "tokenizers", "transformers", "yaml"),
)

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error alone; argparse would print the whole usage before it."""
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def sort_out(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words into names and overrides of the form a.b=c."""
    overrides = [word for word in words if _OVERRIDE.match(word)]
    return [word for word in words if not _OVERRIDE.match(word)], overrides


def output_folder(name: str, wanted: Path | None) -> Path:
    """Return the folder that a command writes to: `wanted`, or a new one under runs/ named after `name` and the time.

    Raises:
        RecipeError: it exists already, or can't be created.
    """
    # Rank 0 decides for all ranks, and may have created the folder already.
    if not leads():
        return wanted or Path("runs") / name
    output = wanted or Path("runs") / f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    if output.exists() or output.is_symlink():
        raise RecipeError(f"output folder {output} exists already; name another one with --output")
    for parent in output.parents:
        if parent.exists() and not parent.is_dir():
            raise RecipeError(f"output folder {output} can't be created: {parent} is a file; name another one")
    return output


def missing_packages(*names: str) -> str:
    """Return an error that names missing packages, or ""; without names, check what every training command needs."""
    missing = [name for name in names or _TRAIN_EXTRA if find_spec(name) is None]
    return f"training needs {', '.join(missing)}: pip install 'mtp_ce[train]'" if missing else ""


def leads() -> bool:
    """Return whether this is rank 0, which prints for all ranks."""
    return os.environ.get("RANK", "0") == "0"
