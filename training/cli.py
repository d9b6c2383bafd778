"""`train-mtp`: train a model with several prediction heads from one recipe.

Everything a person can get wrong on the command line or in a recipe is answered here or in what this file
imports at its top, before torch, transformers or mlflow are loaded: one line on stderr, exit code 2.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from mtp_ce.training.schema import Recipe

EXIT_DONE = 0
EXIT_USAGE = 2
EXIT_REFUSED = 3
EXIT_INTERRUPTED = 130

DEFAULT_RECIPE = "rho1"

# What floor 2 imports sooner or later; mlflow only where the recipe asks for it.
_TRAIN_EXTRA = (
    *("datasets", "matplotlib", "pydantic", "rich"),
    *("safetensors", "tokenizers", "transformers", "yaml"),
)

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")

_EPILOG = """\
shipped recipes:
{recipes}

examples:
  train-mtp                                     train the recipe 'rho1'
  train-mtp --print-config                      show every key, its value after overrides
  train-mtp tiny train.steps=50 optimizer.lr=1e-3 --dry-run
  train-mtp my.yaml tracking.kind=none --output runs/first
  train-mtp compare rho1 --seeds 3              uniform, the recipe's scorer and its controls, on three seeds

exit codes:
  0 done   1 a crash   2 a mistake in the call or the recipe, nothing was trained
  3 loss, gradient or token weights out of bounds; the step was not taken   130 Ctrl-C
"""


class Parser(argparse.ArgumentParser):
    """One that answers a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line; argparse would print the whole usage before it."""
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments without the program's name; None takes them from the process.
    """
    try:
        return _main(argv)
    except KeyboardInterrupt:
        return _complain("interrupted", EXIT_INTERRUPTED)


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    # Asked before anything imports one of them, and without importing any.
    if missing := missing_packages():
        return _complain(missing, EXIT_USAGE)
    from mtp_ce.training.corpus import find_files
    from mtp_ce.training.recipe import load_recipe, to_yaml
    from mtp_ce.training.schema import RecipeError
    from mtp_ce.training.sources import find_sources

    try:
        comparing = arguments.what[:1] == ["compare"]
        if arguments.seeds and not comparing:
            raise RecipeError("--seeds belongs to train-mtp compare; a single run takes the override seed=N")
        recipes, overrides = sort_out(arguments.what[1:] if comparing else arguments.what)
        if len(recipes) > 1:
            raise RecipeError(f"expected one recipe and overrides a.b=c, got {' and '.join(map(repr, recipes))}")
        recipe = load_recipe(recipes[0] if recipes else DEFAULT_RECIPE, overrides)
        if comparing:
            recipe.arms()
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise RecipeError("compare runs in one process; start it without torchrun")
        if arguments.print_config:
            print(to_yaml(recipe), end="")
            return EXIT_DONE
        if recipe.tracking.kind == "mlflow" and (missing := missing_packages("mlflow")):
            return _complain(f"{missing}, or give tracking.kind=none", EXIT_USAGE)
        output = output_folder(recipe.name, arguments.output)
        find_files(recipe.data)
        find_sources(recipe)
        return _run(recipe, output, arguments.dry_run, (arguments.seeds or 3) if comparing else None)
    except RecipeError as error:
        return _complain(str(error), EXIT_USAGE)


def _run(recipe: Recipe, output: Path, dry_run: bool, seeds: int | None) -> int:
    # Only here do torch and transformers load; everything above has been answered by then.
    if dry_run:
        from mtp_ce.training.describe import describe

        describe(recipe, output)
        return EXIT_DONE
    from mtp_ce.training.compare import compare
    from mtp_ce.training.pipeline import train
    from mtp_ce.training.ranks import LeaderFailedError
    from mtp_ce.training.trainer import StepRefusedError

    try:
        if seeds:
            compare(recipe, output, seeds)
        else:
            train(recipe, output)
    except StepRefusedError as error:
        return _complain(str(error), EXIT_REFUSED)
    except LeaderFailedError:
        return EXIT_USAGE
    except KeyboardInterrupt:
        metrics = sorted(output.rglob("metrics.jsonl"))
        kept = f"; metrics so far are in {' and '.join(map(str, metrics))}" if metrics else ""
        return _complain(f"interrupted{kept}", EXIT_INTERRUPTED)
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    folder = Path(__file__).resolve().parent / "recipes"
    recipes = "\n".join(f"  {path.stem:<12}{_headline(path)}" for path in sorted(folder.glob("*.yaml")))
    parser = Parser(
        prog="train-mtp",
        usage="train-mtp [compare] [recipe] [a.b=c ...] [--dry-run] [--print-config] [--output DIR] [--seeds N]",
        description="Train a language model that predicts several tokens at once, from one recipe.",
        epilog=_EPILOG.format(recipes=recipes),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "what",
        nargs="*",
        metavar="compare | recipe | a.b=c",
        help=f"a shipped recipe's name or the path of a YAML file (default: {DEFAULT_RECIPE}), and any "
        "number of overrides, whose values are read as YAML; the word compare before them trains the recipe with "
        "uniform weights, its own scorer and the two controls, and reports the differences",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the recipe, size the model without memory for it, say what would be done; writes nothing",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the recipe with every default and override, as YAML",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for metrics, plot and model; must not exist (default: runs/<recipe>-<UTC time>)",
    )
    parser.add_argument(
        "--seeds", type=_seeds, metavar="N", help="how many seeds compare trains every scorer on (default: 3)"
    )
    return parser


def _seeds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seeds from 1")
    return int(text)


def _headline(recipe: Path) -> str:
    # The first line is a comment that says what the recipe is for; --help must work without a YAML reader.
    with recipe.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()


def sort_out(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell names from overrides of the form a.b=c."""
    overrides = [word for word in words if _OVERRIDE.match(word)]
    return [word for word in words if not _OVERRIDE.match(word)], overrides


def output_folder(name: str, wanted: Path | None) -> Path:
    """Give the folder that a command writes to: the one asked for, or a new one under runs/ that begins with `name`.

    Raises:
        RecipeError: it is there already, or can't be made.
    """
    from mtp_ce.training.schema import RecipeError

    # Of several ranks the first one decides, and may have made the folder already.
    if not _leads():
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


def _leads() -> bool:
    """Whether this is the process that speaks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _complain(message: str, code: int) -> int:
    if not _leads():
        return code
    print(f"train-mtp: {'error: ' if code != EXIT_INTERRUPTED else ''}{message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
