"""`train-mtp`: train a model with several prediction heads from one recipe.

Errors in the command line or the recipe are reported before torch, transformers or mlflow are loaded: one line on
stderr, exit code 2.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_ce.training.cli.command import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_HANGUP,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    EXIT_TERMINATED,
    EXIT_USAGE,
    Parser,
    folder_argument,
    leads,
    missing_packages,
    output_folder,
    sort_out,
    system_reason,
)
from mtp_ce.training.cli.output import unfailing_output
from mtp_ce.training.errors import LeaderFailedError, RecipeError, StepRefusedError, StoppedError
from mtp_ce.training.storage.paths import user_path

if TYPE_CHECKING:
    from mtp_ce.training.config.schema import Recipe

DEFAULT_RECIPE = "rho1"

_EPILOG = """\
shipped recipes:
{recipes}

examples:
  train-mtp                                     train the recipe 'rho1'
  train-mtp --print-config                      print every key with its value after overrides
  train-mtp tiny train.steps=50 optimizer.lr=1e-3 --dry-run
  train-mtp my.yaml tracking.kind=none --output runs/first
  train-mtp --resume runs/first                 resume a stopped run with its own recipe
  train-mtp tiny --output runs/a --resume auto  start the run, or resume it if it exists: for jobs that are restarted
  train-mtp compare rho1 --seeds 3              uniform weights, the recipe's scorer and its controls, on three seeds

exit codes:
  0 success   1 crash   2 error in the command line or the recipe, nothing was trained
  3 a number out of bounds, in a step, in the trained state or in a validation; nothing of it was saved
  129 SIGHUP, as of a closed terminal   130 Ctrl-C   143 SIGTERM; a checkpoint was written, --resume continues from it
torchrun itself exits with 1 for any code but 0
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments without the program's name; None takes them from the process.
    """
    with unfailing_output():
        try:
            return _main(argv)
        except KeyboardInterrupt:
            return _complain("interrupted", EXIT_INTERRUPTED, prints=leads())


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    # Checked before anything imports them, and without importing them.
    if missing := missing_packages():
        return _complain(missing, EXIT_USAGE)
    from mtp_ce.training.config.recipe import load_arms, load_recipe, to_yaml
    from mtp_ce.training.data.reader import find_corpus
    from mtp_ce.training.models.sources import find_sources
    from mtp_ce.training.run.folder import RECIPE_FILE, check_same, finished, pending_report
    from mtp_ce.training.tracking.tracker import build_tracker

    try:
        comparing = arguments.what[:1] == ["compare"]
        if arguments.seeds and not comparing:
            raise RecipeError("--seeds belongs to train-mtp compare; a single run takes the override seed=N")
        if arguments.resume and comparing:
            raise RecipeError("--resume belongs to a run; train-mtp compare reuses what it has finished by itself")
        if arguments.arm and not comparing:
            raise RecipeError("--arm belongs to train-mtp compare; a single run takes the override itself")
        recipes, overrides = sort_out(arguments.what[1:] if comparing else arguments.what)
        if len(recipes) > 1:
            raise RecipeError(f"expected one recipe and overrides a.b=c, got {' and '.join(map(repr, recipes))}")
        if arguments.dry_run and (arguments.resume or "").startswith("s3://"):
            raise RecipeError("--resume s3://... creates a folder, and --dry-run writes nothing; leave out one of them")
        if recipes and arguments.resume not in (None, "auto"):
            raise RecipeError(f"--resume {arguments.resume} uses the run's own recipe; leave out '{recipes[0]}'")
        resumed = run_to_resume(arguments.resume, arguments.output)
        default = str(resumed / RECIPE_FILE) if resumed else DEFAULT_RECIPE
        name = recipes[0] if recipes else default
        recipe = load_recipe(name, overrides)
        arms = load_arms(name, overrides, arguments.arm)
        if comparing:
            recipe.arms(arms)
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise RecipeError("compare runs in one process; start it without torchrun")
        if arguments.print_config:
            print(to_yaml(recipe), end="")
            return EXIT_DONE
        build_tracker(recipe.tracking)
        if resumed:
            check_same(resumed, recipe)
            if (when := finished(resumed)) and not pending_report(resumed):
                if leads():
                    print(f"run {resumed} finished {when}; its model is in {resumed}/model")
                return EXIT_DONE
        output = resumed or output_folder(recipe.name, arguments.output)
        find_corpus(recipe.data)
        find_sources(recipe)
        seeds = (arguments.seeds or 3) if comparing else None
        return _run(recipe, output, arms, dry_run=arguments.dry_run, seeds=seeds, resume=resumed is not None)
    except RecipeError as error:
        return _complain(str(error), EXIT_USAGE)


def _run(
    recipe: Recipe, output: Path, arms: dict[str, Recipe], *, dry_run: bool, seeds: int | None, resume: bool
) -> int:
    # Torch and transformers load here, after all cheap checks.
    if dry_run:
        from mtp_ce.training.run.dry_run import dry_run as print_dry_run

        print_dry_run(recipe, output)
        return EXIT_DONE
    from mtp_ce.training.interrupt import terminate_in_order
    from mtp_ce.training.run.compare import compare
    from mtp_ce.training.run.pipeline import train

    answer = partial(_answer, output=output, seeds=seeds)
    with terminate_in_order():
        try:
            if seeds:
                compare(recipe, output, seeds, others=arms)
            else:
                train(recipe, output, resume=resume, answer=answer)
        except BaseException as error:
            return answer(error)
    return EXIT_DONE


def _answer(error: BaseException, output: Path, seeds: int | None) -> int:
    """Report why a run ended early and return the exit code; re-raise a crash."""
    match error:
        case RecipeError():
            return _complain(str(error), EXIT_USAGE)
        case LeaderFailedError():
            return EXIT_USAGE
        case StepRefusedError():
            return _complain(str(error), EXIT_REFUSED, prints=leads())
        case StoppedError(signal=signal.SIGHUP):
            return _complain(f"hung up{_remains(output, seeds)}", EXIT_HANGUP, prints=leads())
        case StoppedError(signal=signal.SIGTERM):
            return _complain(f"terminated{_remains(output, seeds)}", EXIT_TERMINATED, prints=leads())
        case KeyboardInterrupt():
            return _complain(f"interrupted{_remains(output, seeds)}", EXIT_INTERRUPTED, prints=leads())
    if reason := system_reason(error, output):
        return _complain(f"{reason}{_remains(output, seeds)}", EXIT_CRASH, prints=True)
    raise error


def _remains(output: Path, seeds: int | None) -> str:
    """Format what a stopped run left: its model if that is saved, or its metrics and what --resume does."""
    from mtp_ce.training.run.folder import finished, is_run, pending_report

    again = ""
    if not seeds and is_run(output):
        with suppress(RecipeError):
            if finished(output):
                missing = f", train-mtp --resume {output} writes the report" if pending_report(output) else ""
                return f"; the model is saved in {output}/model{missing}"
        kept = any(output.rglob("state.json"))
        again = f"; train-mtp --resume {output} {'resumes' if kept else 'starts again, as there is no checkpoint yet'}"
    metrics = sorted(output.rglob("metrics.jsonl"))
    where = f"; metrics so far are in {' and '.join(map(str, metrics))}" if metrics else ""
    return where + again


def run_to_resume(wanted: str | None, output: Path | None) -> Path | None:
    """Return the directory of the run to resume; None for a new run.

    Workers restarted by torchrun resume the run that they started.

    Args:
        wanted: value of --resume: "auto", a run directory or its copy in S3, or None.
        output: value of --output.

    Raises:
        RecipeError: there is no such run, or "auto" comes without --output.
    """
    from mtp_ce.training.run.folder import RECIPE_FILE, RUN_FILE, fetch_run, is_run, restarted_run

    if wanted is None:
        begun = restarted_run(output.parent if output else Path("runs"))
        return begun if output in (None, begun) else None
    if wanted == "auto":
        if output is None:
            raise RecipeError("--resume auto needs --output DIR: the run to resume or to start")
        return output if is_run(output) else None
    if wanted.startswith("s3://"):
        if output is None:
            raise RecipeError(f"--resume {wanted} needs --output DIR: the run directory to create from the copy")
        fetch_run(wanted, output)
        return output
    folder = user_path("--resume", wanted)
    if output is not None:
        raise RecipeError(f"--resume {folder} continues in that folder; leave out --output {output}")
    if not is_run(folder):
        raise RecipeError(f"--resume {folder} is not a run directory: it has no {RECIPE_FILE} and {RUN_FILE}")
    return folder


def _parser() -> argparse.ArgumentParser:
    folder = Path(__file__).resolve().parents[1] / "recipes"
    recipes = "\n".join(f"  {path.stem:<12}{_headline(path)}" for path in sorted(folder.glob("*.yaml")))
    parser = Parser(
        prog="train-mtp",
        usage="train-mtp [compare] [recipe] [a.b=c ...] [--dry-run] [--print-config] [--output DIR] "
        "[--resume auto|DIR] [--seeds N] [--arm 'a.b=c ...'] [--version]",
        description="Train a language model with multi-token prediction heads from one recipe.",
        epilog=_EPILOG.format(recipes=recipes),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "what",
        nargs="*",
        metavar="compare | recipe | a.b=c",
        help=f"name of a shipped recipe or path of a YAML file (default: {DEFAULT_RECIPE}), and any number of "
        "overrides with YAML values; with the word compare before them, train with uniform weights, the recipe's "
        "scorer and two controls, and report the differences",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the recipe and print steps, FLOPs and memory of the run; allocates no model and writes nothing",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the recipe with every default and override, as YAML",
    )
    parser.add_argument(
        "--output",
        type=folder_argument,
        metavar="DIR",
        help="run directory for metrics, plots and model; must not exist (default: runs/<recipe>-<UTC time>)",
    )
    parser.add_argument(
        "--resume",
        metavar="auto|DIR|s3://...",
        help="resume the run in DIR, bitwise equal to an uninterrupted run; auto: resume the run in --output, or start "
        "it; s3://...: resume a copy made by checkpoint.upload, in --output",
    )
    parser.add_argument(
        "--seeds", type=_seeds, metavar="N", help="number of seeds that compare trains every scorer on (default: 3)"
    )
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="'a.b=c ...'",
        help="one more scorer for compare: overrides of the recipe's scorer, such as scorer.temperature=2.0; may be "
        "given several times",
    )
    return parser


def _seeds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number of seeds")
    return int(text)


def _headline(recipe: Path) -> str:
    # The first line of a recipe is a comment that describes it; --help must work without a YAML reader.
    with recipe.open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip()


def _complain(message: str, code: int, prints: bool | None = None) -> int:
    """Print an error and return the exit code.

    The processes of one machine make the same errors, so one of them prints.

    Args:
        message: one line.
        code: exit code; decides the prefix of the line.
        prints: whether this process prints; None means the first process of a machine.
    """
    if prints if prints is not None else os.environ.get("LOCAL_RANK", "0") == "0":
        error = "" if code in (EXIT_HANGUP, EXIT_INTERRUPTED, EXIT_TERMINATED) else "error: "
        who = "" if leads() else f"rank {os.environ['RANK']} on {socket.gethostname()}: "
        print(f"train-mtp: {error}{who}{message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
