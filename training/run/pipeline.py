"""From a recipe to a trained model on disk: read the inputs, run the stages, print the evaluation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from transformers.utils import logging as transformers_logging

from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.console import say, warn
from mtp_ce.training.errors import StepRefusedError
from mtp_ce.training.interrupt import ignore_sigterm
from mtp_ce.training.loop.ranks import Ranks, join_ranks
from mtp_ce.training.metrics.evaluation import Evaluation
from mtp_ce.training.metrics.head_scores import validation_metrics
from mtp_ce.training.report.evaluation import print_evaluation
from mtp_ce.training.run.folder import RECIPE_FILE, check_same, locked_run, start_run
from mtp_ce.training.run.inputs import find_device, read_inputs
from mtp_ce.training.run.main_stage import main_stage
from mtp_ce.training.run.stages import check_stages, scoring_stages
from mtp_ce.training.storage.folders import check_writable
from mtp_ce.training.tracking.composite import Tracking
from mtp_ce.training.tracking.jsonl import METRICS_FILE


def train(
    recipe: Recipe,
    output: Path,
    out: Console | None = None,
    *,
    resume: bool = False,
    answer: Callable[[BaseException], int] | None = None,
) -> Evaluation:
    """Run a recipe from the corpus to the saved model.

    Args:
        recipe: the run.
        output: run directory to create; it must not exist, unless `resume` is set.
        out: where to print; None means the terminal.
        resume: whether to resume the unfinished run of the same recipe in `output`.
        answer: as for `join_ranks`.

    Returns:
        The heads on held-out text after the last step.

    Raises:
        RecipeError: the corpus, a trained model or the output folder does not fit the recipe.
        StepRefusedError: loss, gradient or weights were out of bounds; the step was not taken.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP; the state of the loop and the metrics so far are on disk.
    """
    # transformers would draw its own progress bars for files that load in milliseconds.
    transformers_logging.disable_progress_bar()
    device = find_device(recipe.train.device, "train.device")
    with join_ranks(device, recipe.train, answer, agreed=(StepRefusedError,)) as ranks, ExitStack() as lock:
        output, resume = ranks.share((output, resume))
        return _train(recipe, output, out or Console(quiet=not ranks.leads), ranks, lock, resume)


def _train(recipe: Recipe, output: Path, out: Console, ranks: Ranks, lock: ExitStack, resume: bool) -> Evaluation:
    ranks.lead(lambda: _check_batches(recipe, ranks))
    inputs = replace(ranks.leader_first(lambda: read_inputs(recipe, out, ranks)), resumed=resume)

    def start() -> None:
        check_stages(recipe, inputs)
        if recipe.checkpoint.upload:
            check_writable("checkpoint.upload", recipe.checkpoint.upload)
        if resume:
            check_same(output, recipe)
        else:
            start_run(output, recipe)
        lock.enter_context(locked_run(output))

    ranks.lead(start)
    say(out, f"output      {output}")
    with Tracking(recipe, output, partial(warn, out), records=ranks.leads, on_error=ignore_sigterm) as tracking:
        tracking.artifact(output / RECIPE_FILE)
        models = scoring_stages(recipe, inputs, output, tracking)
        evaluation = main_stage(recipe, inputs, models, output, tracking)
        # A signal to a rank that only waits for the report.
        ranks.check(ranks.stop)
        tracking.summary(recipe.train.steps, validation_metrics(evaluation.heads) | evaluation.metrics())
    print_evaluation(out, evaluation)
    weights = ", weights.html, weights.png" if recipe.scorer.weighted else ""
    say(
        out,
        f"saved       {output}/model (model, tokenizer, heads), losses.png, evaluation.json, evaluation.png{weights}, "
        f"{METRICS_FILE}, recipe.yaml",
    )
    say(out, f"tracking    {tracking.where}")
    return evaluation


def _check_batches(recipe: Recipe, ranks: Ranks) -> None:
    ranks.check_batch(recipe.train.batch_size, recipe.train.micro_batch_size)
    if recipe.reference and recipe.reference.train:
        ranks.check_batch(recipe.reference.train.batch_size, recipe.reference.train.micro_batch_size)
