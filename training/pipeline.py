"""From a recipe to a trained model on disk: reads the inputs, runs the stages, says what came out."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from mtp_ce.training.corpus import find_files
from mtp_ce.training.evaluation import Evaluation
from mtp_ce.training.gguf import converted_folder
from mtp_ce.training.head_scores import validation_metrics
from mtp_ce.training.inputs import find_device, read_inputs
from mtp_ce.training.model import build_model
from mtp_ce.training.ranks import Ranks, join_ranks
from mtp_ce.training.recipe import to_yaml, without_password
from mtp_ce.training.report import say, say_evaluation, warn
from mtp_ce.training.schema import PretrainedModelConfig, Recipe, RecipeError
from mtp_ce.training.sources import local_source, sources_of
from mtp_ce.training.stages import check_stages, main_stage, parameters, scoring_stages
from mtp_ce.training.tracking import METRICS_FILE, Tracking


def describe(recipe: Recipe, output: Path) -> None:
    """Print what `train` would do, without memory for the model and without writing anything.

    Raises:
        RecipeError: the corpus is not there.
    """
    out = Console()
    corpus = find_files(recipe.data)
    train, data, scored = recipe.train, recipe.data, recipe.scored_by
    step_tokens = train.batch_size * data.sequence_length
    say(out, f"recipe      {recipe.name}: {recipe.description}")
    held_out = data.validation_corpus or f"{data.holdout_fraction:.1%}"
    say(out, f"corpus      {corpus}, {held_out} held out")
    for key, (source, kind) in sources_of(recipe).items():
        say(out, f"given       {key}: {kind} {source}")
    for name, stage in (("reference", recipe.reference), ("critic", recipe.critic)):
        needed = scored and scored.name == {"reference": "rho1_excess", "critic": "critic_delta"}[name]
        if needed and stage and stage.train and not stage.source:
            say(out, f"{name:<11} {stage.train.steps:,} steps of {stage.train.batch_size}, where not there already")
    say(out, f"scorer      {recipe.scorer.name}{', before training' if recipe.precompute_weights else ''}")
    say(out, f"model       {_sizes(recipe)}")
    say(
        out,
        f"training    {train.steps:,} steps of {train.batch_size} x {data.sequence_length} = {step_tokens:,} "
        f"tokens: {train.steps * step_tokens:,} in all, for {recipe.model.mtp.horizon} heads",
    )
    say(out, f"device      {find_device(train.device, 'train.device')}")
    say(out, f"output      {output}")
    say(out, f"tracking    {_tracking(recipe)}")
    say(out, "dry run: nothing was written")


def train(recipe: Recipe, output: Path, out: Console | None = None) -> Evaluation:
    """Run a recipe from the corpus to the saved model.

    Args:
        recipe: what to do.
        output: folder to make; it must not exist.
        out: where to say what happens; None means the terminal.

    Returns:
        The heads on held-out text after the last step.

    Raises:
        RecipeError: the corpus, a trained model or the output folder does not fit the recipe.
        StepRefusedError: loss, gradient or weights were out of bounds; the step was not taken.
        KeyboardInterrupt: Ctrl-C; the metrics so far are kept.
    """
    # transformers would draw bars of its own for files that take milliseconds.
    transformers_logging.disable_progress_bar()
    with join_ranks(find_device(recipe.train.device, "train.device")) as ranks:
        return _train(recipe, ranks.share(output), out or Console(quiet=not ranks.leads), ranks)


def _train(recipe: Recipe, output: Path, out: Console, ranks: Ranks) -> Evaluation:
    ranks.lead(lambda: _check_batches(recipe, ranks))
    inputs = ranks.leader_first(lambda: read_inputs(recipe, out, ranks))

    def begin() -> None:
        check_stages(recipe, inputs)
        make_folder(output)
        (output / "recipe.yaml").write_text(to_yaml(without_password(recipe)), encoding="utf-8")

    ranks.lead(begin)
    say(out, f"output      {output}")
    with Tracking(recipe, output, partial(warn, out), records=ranks.leads) as tracking:
        tracking.artifact(output / "recipe.yaml")
        models = scoring_stages(recipe, inputs, output, tracking)
        evaluation = main_stage(recipe, inputs, models, output, tracking)
        tracking.summary(recipe.train.steps, validation_metrics(evaluation.heads) | evaluation.metrics())
    say_evaluation(out, evaluation)
    weights = ", weights.html, weights.png" if recipe.scored_by else ""
    say(
        out,
        f"saved       {output}/model (model, tokenizer, heads), losses.png, evaluation.json, evaluation.png{weights}, "
        f"{METRICS_FILE}, recipe.yaml",
    )
    say(out, f"tracking    {_tracking(recipe)}")
    return evaluation


def _check_batches(recipe: Recipe, ranks: Ranks) -> None:
    ranks.check_batch(recipe.train.batch_size, recipe.train.micro_batch_size)
    if recipe.reference and recipe.reference.train:
        ranks.check_batch(recipe.reference.train.batch_size, recipe.reference.train.micro_batch_size)


def make_folder(output: Path) -> None:
    """Make a run's folder.

    Raises:
        RecipeError: it is there already, or can't be made.
    """
    try:
        output.mkdir(parents=True)
    except OSError as error:
        raise RecipeError(f"output folder {output} can't be made: {error.strerror}; see --output") from None


def _sizes(recipe: Recipe) -> str:
    folder: Path | None = None
    if isinstance(recipe.model, PretrainedModelConfig):
        folder = local_source("model.source", recipe.model.source)
        if folder and folder.is_file():
            folder = converted_folder(folder)
        if folder is None or not folder.exists():
            return "sized when it has been read; a dry run fetches nothing"
    with torch.device("meta"):
        return parameters(build_model(recipe, pretrained=folder))


def _tracking(recipe: Recipe) -> str:
    if recipe.tracking.kind == "none":
        return f"none; metrics go to {METRICS_FILE}"
    return f"mlflow ui --backend-store-uri {without_password(recipe).tracking.uri}"
