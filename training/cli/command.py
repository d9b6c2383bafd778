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
from typing import Any, NoReturn

from mtp_ce.training.addresses import shown
from mtp_ce.training.errors import RecipeError, system_error
from mtp_ce.training.storage.paths import user_path

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
    """An argument parser that reports an error in one line, and knows --version."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument("--version", action=_Version, nargs=0, help="print the versions that are installed")

    def error(self, message: str) -> NoReturn:
        """Print the error alone; argparse would print the whole usage before it."""
        self.exit(EXIT_USAGE, f"{self.prog}: error: {shown(message)}; see {self.prog} --help\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        # Only here: --help has half a second.
        from importlib.metadata import PackageNotFoundError, version

        def named(package: str) -> str:
            try:
                return f"{package} {version(package)}"
            except PackageNotFoundError:
                return f"{package} not installed"

        print(f"{named('mtp_ce')} ({', '.join(map(named, ('torch', 'triton', 'transformers')))})")
        parser.exit(EXIT_DONE)


def folder_argument(text: str) -> Path:
    """Return the path of a folder, with ~ expanded: the `type` of an option."""
    return _path(text, "give a folder on this machine")


def file_argument(text: str) -> Path:
    """Return the path of a file, with ~ expanded: the `type` of an option."""
    return _path(text, "give a file on this machine")


def _path(text: str, way_out: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"it is the address {shown(text)}; {way_out}")
    try:
        return user_path("it", text)
    except RecipeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def sort_out(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words into names and overrides of the form a.b=c."""
    overrides = [word for word in words if _OVERRIDE.match(word)]
    return [word for word in words if not _OVERRIDE.match(word)], overrides


def output_folder(name: str, wanted: Path | None) -> Path:
    """Return the folder that a command writes to: `wanted`, or a new one under runs/ named after `name` and the time.

    The time has microseconds, so that commands started together write to folders of their own.

    Raises:
        RecipeError: it exists already, or can't be created.
    """
    # Rank 0 decides for all ranks, and may have created the folder already.
    if not leads():
        return wanted or Path("runs") / name
    output = wanted or user_path("the output folder", f"runs/{name}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
    if output.exists() or output.is_symlink():
        raise RecipeError(f"output folder {output} exists already; name another one with --output")
    for parent in output.parents:
        if parent.exists() and not parent.is_dir():
            raise RecipeError(f"output folder {output} can't be created: {parent} is a file; name another one")
    return output


def system_reason(error: BaseException, where: Path) -> str:
    """Return a few words on an error of the system, such as a full disk; "" for other exceptions.

    Args:
        error: what ended the command.
        where: named where the error names no file.
    """
    found = system_error(error)
    if found is None:
        return ""
    # pyarrow and shutil give no number.
    return f"{found.strerror or ' '.join(str(found).split())[:200]}: {found.filename or where}"


def missing_packages(*names: str) -> str:
    """Return an error that names missing packages, or ""; without names, check what every training command needs."""
    missing = [name for name in names or _TRAIN_EXTRA if find_spec(name) is None]
    return f"training needs {', '.join(missing)}: pip install 'mtp_ce[train]'" if missing else ""


def leads() -> bool:
    """Return whether this is rank 0, which prints for all ranks."""
    return os.environ.get("RANK", "0") == "0"
