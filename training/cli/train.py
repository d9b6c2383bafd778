"""`train-mtp`: train a model with several prediction heads from one recipe.

Everything a person can get wrong on the command line or in a recipe is answered here or in what this file
imports at its top, before torch, transformers or mlflow are loaded: one line on stderr, exit code 2.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from mtp_ce.training.config.schema import Recipe

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_USAGE = 2
EXIT_REFUSED = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

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
  train-mtp --resume runs/first                 go on with a run that was stopped, with its own recipe
  train-mtp tiny --output runs/a --resume auto  begin it, or go on with it if it is there: for jobs that are restarted
  train-mtp compare rho1 --seeds 3              uniform, the recipe's scorer and its controls, on three seeds

exit codes:
  0 done   1 a crash   2 a mistake in the call or the recipe, nothing was trained
  3 loss, gradient or token weights out of bounds; the step was not taken
  130 Ctrl-C   143 SIGTERM: a checkpoint was written first, --resume goes on from it
torchrun itself ends with 1 for any of them but 0
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
        return _complain("interrupted", EXIT_INTERRUPTED, speaks=_leads())


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    # Asked before anything imports one of them, and without importing any.
    if missing := missing_packages():
        return _complain(missing, EXIT_USAGE)
    from mtp_ce.training.config.recipe import load_recipe, to_yaml
    from mtp_ce.training.data.reader import find_corpus
    from mtp_ce.training.errors import RecipeError
    from mtp_ce.training.models.sources import find_sources
    from mtp_ce.training.run.folder import RECIPE_FILE, check_same, finished
    from mtp_ce.training.tracking.tracker import build_tracker

    try:
        comparing = arguments.what[:1] == ["compare"]
        if arguments.seeds and not comparing:
            raise RecipeError("--seeds belongs to train-mtp compare; a single run takes the override seed=N")
        if arguments.resume and comparing:
            raise RecipeError("--resume belongs to a run; train-mtp compare goes on by itself where it stopped")
        recipes, overrides = sort_out(arguments.what[1:] if comparing else arguments.what)
        if len(recipes) > 1:
            raise RecipeError(f"expected one recipe and overrides a.b=c, got {' and '.join(map(repr, recipes))}")
        if arguments.dry_run and (arguments.resume or "").startswith("s3://"):
            raise RecipeError("--resume s3://... makes a folder, which --dry-run does not; leave out one of them")
        if recipes and arguments.resume not in (None, "auto"):
            raise RecipeError(f"--resume {arguments.resume} takes the run's own recipe; leave out '{recipes[0]}'")
        begun = run_to_resume(arguments.resume, arguments.output)
        own = str(begun / RECIPE_FILE) if begun and not recipes else DEFAULT_RECIPE
        recipe = load_recipe(recipes[0] if recipes else own, overrides)
        if comparing:
            recipe.arms()
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise RecipeError("compare runs in one process; start it without torchrun")
        if arguments.print_config:
            print(to_yaml(recipe), end="")
            return EXIT_DONE
        build_tracker(recipe.tracking)
        if begun:
            check_same(begun, recipe)
            if when := finished(begun):
                if _leads():
                    print(f"run {begun} finished {when}; its model is in {begun}/model")
                return EXIT_DONE
        output = begun or output_folder(recipe.name, arguments.output)
        find_corpus(recipe.data)
        find_sources(recipe)
        seeds = (arguments.seeds or 3) if comparing else None
        return _run(recipe, output, dry_run=arguments.dry_run, seeds=seeds, resume=begun is not None)
    except RecipeError as error:
        return _complain(str(error), EXIT_USAGE)


def _run(recipe: Recipe, output: Path, *, dry_run: bool, seeds: int | None, resume: bool) -> int:
    # Only here do torch and transformers load; everything above has been answered by then.
    if dry_run:
        from mtp_ce.training.run.dry_run import describe

        describe(recipe, output)
        return EXIT_DONE
    from mtp_ce.training.loop.interrupt import terminate_in_order
    from mtp_ce.training.run.compare import compare
    from mtp_ce.training.run.pipeline import train

    answer = partial(_answer, output=output, seeds=seeds)
    with terminate_in_order():
        try:
            if seeds:
                compare(recipe, output, seeds)
            else:
                train(recipe, output, resume=resume, answer=answer)
        except BaseException as error:
            return answer(error)
    return EXIT_DONE


def _answer(error: BaseException, output: Path, seeds: int | None) -> int:
    """Say why a run ends early and give the exit code; a crash is raised."""
    from mtp_ce.training.errors import RecipeError
    from mtp_ce.training.loop.interrupt import StoppedError
    from mtp_ce.training.loop.ranks import LeaderFailedError
    from mtp_ce.training.loop.trainer import StepRefusedError

    match error:
        case RecipeError():
            return _complain(str(error), EXIT_USAGE)
        case LeaderFailedError():
            return EXIT_USAGE
        case StepRefusedError():
            return _complain(str(error), EXIT_REFUSED, speaks=_leads())
        case StoppedError(signal=signal.SIGTERM):
            return _complain(f"terminated{_left(output, seeds)}", EXIT_TERMINATED, speaks=_leads())
        case KeyboardInterrupt():
            return _complain(f"interrupted{_left(output, seeds)}", EXIT_INTERRUPTED, speaks=_leads())
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            full = f"{error.strerror}: {error.filename or output}"
            return _complain(f"{full}{_left(output, seeds)}", EXIT_CRASH, speaks=True)
    raise error


def _left(output: Path, seeds: int | None) -> str:
    """What there is of a run that did not come to its end."""
    metrics = sorted(output.rglob("metrics.jsonl"))
    said = f"; metrics so far are in {' and '.join(map(str, metrics))}" if metrics else ""
    resumable = not seeds and any(output.rglob("state.json"))
    return f"{said}; train-mtp --resume {output} goes on" if resumable else said


def run_to_resume(wanted: str | None, output: Path | None) -> Path | None:
    """Give the folder of the run to go on with; None for a new one.

    Workers that torchrun has started again go on with what they began.

    Args:
        wanted: what --resume says: "auto", a run's folder or its copy in S3, or nothing.
        output: what --output says.

    Raises:
        RecipeError: there is no such run, or "auto" does not say which.
    """
    from mtp_ce.training.errors import RecipeError
    from mtp_ce.training.run.folder import RECIPE_FILE, RUN_FILE, fetch_run, is_run, restarted_run

    if wanted is None:
        return output if output and restarted_run(output.parent) == output else restarted_run(Path("runs"))
    if wanted == "auto":
        if output is None:
            raise RecipeError("--resume auto needs --output DIR: the run to go on with, or to begin")
        return output if is_run(output) else None
    if wanted.startswith("s3://"):
        if output is None:
            raise RecipeError(f"--resume {wanted} needs --output DIR: the folder to make from what is there")
        fetch_run(wanted, output)
        return output
    folder = Path(wanted)
    if output is not None:
        raise RecipeError(f"--resume {folder} goes on in that folder; leave out --output {output}")
    if not is_run(folder):
        raise RecipeError(f"--resume {folder} is not the folder of a run: it has no {RECIPE_FILE} and {RUN_FILE}")
    return folder


def _parser() -> argparse.ArgumentParser:
    folder = Path(__file__).resolve().parents[1] / "recipes"
    recipes = "\n".join(f"  {path.stem:<12}{_headline(path)}" for path in sorted(folder.glob("*.yaml")))
    parser = Parser(
        prog="train-mtp",
        usage="train-mtp [compare] [recipe] [a.b=c ...] [--dry-run] [--print-config] [--output DIR] "
        "[--resume auto|DIR] [--seeds N]",
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
        "--resume",
        metavar="auto|DIR|s3://...",
        help="go on with the run in DIR as if it had never stopped; auto: with the one in --output, or begin it there; "
        "s3://...: with a copy that checkpoint.upload has made, in --output",
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
    from mtp_ce.training.errors import RecipeError

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


def _complain(message: str, code: int, speaks: bool | None = None) -> int:
    """Say what is wrong and give the exit code.

    Of several processes those of one machine find the same mistakes, and one of them says so.

    Args:
        message: one line.
        code: which decides how the line begins.
        speaks: whether this process does; None means the first one of a machine.
    """
    if speaks if speaks is not None else os.environ.get("LOCAL_RANK", "0") == "0":
        error = "" if code in (EXIT_INTERRUPTED, EXIT_TERMINATED) else "error: "
        who = "" if _leads() else f"rank {os.environ['RANK']} on {socket.gethostname()}: "
        print(f"train-mtp: {error}{who}{message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
