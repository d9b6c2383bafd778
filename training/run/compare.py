"""Does weighting help? Uniform weights, a recipe's scorer and its two controls, on one budget and several seeds.

    difference[seed] = CE(arm, seed) - CE(uniform, seed)        nats, of one head, on held-out text

Runs of one seed share initial weights and the order of the rows, so their difference is less noisy than their levels.
Every model is scored unweighted, on all held-out files and on the documented ones, the kind of text that the reference
of the recipe `rho1` is trained on. Heads that draft are scored by their mean accepted length, too, as an engine counts
it in greedy texts of the model from held-out prompts.

Where noise is planted in the corpus (`data.noise`), there are more arms: the scorer in its other mode and in another
scope, the truth as weights, and a baseline without weights, documents filtered by the loss of the reference. The course
of the weights on noise is part of the results.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.console import say, warn
from mtp_ce.training.data.python_source import is_documented
from mtp_ce.training.data.tokens import DocumentTokens
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.interrupt import ignore_sigterm
from mtp_ce.training.loop.ranks import Ranks, join_ranks
from mtp_ce.training.loop.trainer import Trainer
from mtp_ce.training.loop.weighing import FrozenModels, build_weighing
from mtp_ce.training.metrics.evaluation import Evaluation
from mtp_ce.training.metrics.head_scores import HeadResult, validation_metrics
from mtp_ce.training.report.comparison import FILTERED, comparison_table, noise_course, write_comparison
from mtp_ce.training.run.evaluate import decode, load_checkpoint
from mtp_ce.training.run.filtering import best_predicted
from mtp_ce.training.run.fitting import fit
from mtp_ce.training.run.folder import RECIPE_FILE, make_folder
from mtp_ce.training.run.inputs import Inputs, find_device, read_inputs
from mtp_ce.training.run.stage_cache import folder_digest, stage_key
from mtp_ce.training.run.stages import STAGE_FILE, Stage, check_stages, run_stage, scoring_stages
from mtp_ce.training.tracking.composite import Tracking
from mtp_ce.training.tracking.jsonl import METRICS_FILE


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison.

    Attributes:
        name: in folders and tables.
        recipe: its scorer; the seed is that of the comparison's first one.
        documents: returns the documents to train on.
        filtered: whether they are less than all.
    """

    name: str
    recipe: Recipe
    documents: Callable[[], DocumentTokens]
    filtered: bool = False


def compare(
    recipe: Recipe,
    output: Path,
    seeds: int,
    out: Console | None = None,
    others: Mapping[str, Recipe] | None = None,
    only: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Train every arm on every seed, and write comparison.json, comparison.md and comparison.png.

    Finished trainings are reused from the stage cache, also those of an interrupted comparison.

    Args:
        recipe: names the scorer and the budget; its seed is the first one.
        output: folder to create; it must not exist.
        seeds: number of seeds.
        out: where to print; None means the terminal.
        others: recipes of further arms by name, as in `Recipe.arms`.
        only: the arms beside those; None means all. The first one is the baseline.

    Returns:
        The content of comparison.json.

    Raises:
        RecipeError: as `pipeline.train` and `Recipe.arms`, or `only` names an arm that the recipe doesn't have.
        StepRefusedError, KeyboardInterrupt: as `pipeline.train`.
    """
    transformers_logging.disable_progress_bar()
    known = [*recipe.arms(), *([FILTERED] if recipe.data.noise else [])]
    if unknown := sorted({*(only or ())} - {*known}):
        raise RecipeError(f"only names {unknown[0]!r}; give arms of the recipe: {', '.join(known)}")
    with join_ranks(find_device(recipe.train.device, "train.device"), recipe.train) as ranks:
        recipes = recipe.arms(others)
        names = None if only is None else {*only, *(others or {})}
        return _compare(recipe, recipes, names, output, seeds, out or Console(), ranks)


def _compare(
    recipe: Recipe,
    recipes: dict[str, Recipe],
    names: set[str] | None,
    output: Path,
    seeds: int,
    out: Console,
    ranks: Ranks,
) -> dict[str, Any]:
    inputs = read_inputs(recipe, out, ranks)
    check_stages(recipe, inputs)
    make_folder(output, recipe)
    say(out, f"output      {output}")
    comparison: dict[str, Any] = {
        "recipe": recipe.name,
        "scorers": {},
        "steps": recipe.train.steps,
        "tokens_per_step": recipe.train.batch_size * inputs.row_length,
        "seeds": list(range(recipe.seed, recipe.seed + seeds)),
        "torch": torch.__version__.partition("+")[0],
        "results": {},
    }
    if recipe.data.noise:
        comparison |= {"noise": recipe.data.noise.model_dump(), "course": {}}
    with Tracking(recipe, output, partial(warn, out), on_error=ignore_sigterm) as tracking:
        tracking.artifact(output / RECIPE_FILE)
        models = scoring_stages(recipe, inputs, output, tracking)
        arms = [arm for arm in _arms(recipe, recipes, inputs, models) if names is None or arm.name in names]
        comparison["scorers"] |= {arm.name: arm.recipe.scorer.model_dump() for arm in arms}
        for seed in comparison["seeds"]:
            for arm in arms:
                finished = _run(arm, seed, inputs, models, output, tracking)
                results = json.loads((finished / STAGE_FILE).read_text(encoding="utf-8"))["results"]
                if recipe.data.noise:
                    course, totals = noise_course(finished / METRICS_FILE)
                    comparison["course"].setdefault(arm.name, []).append(course)
                    results |= totals
                comparison["results"].setdefault(arm.name, []).append(results)
        for path in write_comparison(comparison, output):
            tracking.artifact(path)
    out.print(comparison_table(comparison), soft_wrap=True, highlight=False, markup=False)
    say(out, f"saved       {output}/comparison.json, comparison.md, comparison.png")
    return comparison


def _arms(recipe: Recipe, recipes: dict[str, Recipe], inputs: Inputs, models: FrozenModels) -> list[Arm]:
    """Return the arms of a comparison, uniform weights first."""
    arms = [Arm(name, one, lambda: inputs.tokens.train) for name, one in recipes.items()]
    if recipe.data.noise and "reference" in models:
        fraction = 1 - recipe.data.noise.share
        kept = cache(lambda: best_predicted(recipe, inputs, models, fraction))
        arms.append(Arm(FILTERED, arms[0].recipe, kept, filtered=True))
    return arms


def _run(arm: Arm, seed: int, inputs: Inputs, models: FrozenModels, output: Path, tracking: Tracking) -> Path:
    """Train one arm on one seed, or find it in the stage cache; return its folder there."""
    recipe = arm.recipe.model_copy(update={"seed": seed})
    held_out = inputs.corpus.held_out
    documented = inputs.tokens.held_out.choose([i for i, text in enumerate(held_out) if is_documented(text)])

    def work(folder: Path, run: Tracking) -> dict[str, float]:
        weighing = build_weighing(recipe, models, inputs.device, inputs.ranks)
        trainer, results = fit(recipe, inputs, inputs.rows(arm.documents()), weighing.weigh, folder, run)
        metrics = validation_metrics(results)
        ranks = inputs.ranks
        drafting: dict[str, float] | None = ranks.lead(lambda: _drafting(trainer, results, inputs, folder / "model"))
        drafting = ranks.share(drafting)
        metrics |= drafting or {}
        if documented:
            curated = validation_metrics(trainer.validate(inputs.rows(documented)))
            metrics |= {f"documented/{metric.removeprefix('val/')}": value for metric, value in curated.items()}
        return metrics

    settings = recipe.model_dump(include={"seed", "model", "optimizer", "train", "scorer"})
    settings["decoding"] = recipe.validation.decoding.model_dump()
    settings["row_length"] = inputs.row_length
    scoring = [models[model.role] for model in recipe.frozen_models()]
    if arm.filtered:
        settings["documents"] = arm.name
        scoring = [models["reference"]]
    stage = Stage(
        kind="main",
        name=f"{arm.name}-seed{seed}",
        what=f"{recipe.train.steps:,} steps",
        key=stage_key("main", settings, [*inputs.digests, *map(folder_digest, scoring)]),
        recipe=recipe,
        work=work,
    )
    return run_stage(stage, inputs, output, tracking)


def _drafting(trainer: Trainer, results: list[HeadResult], inputs: Inputs, folder: Path) -> dict[str, float]:
    """Return the metrics of drafts, in decoding and as a serving engine counts them.

    Args:
        trainer: the finished loop.
        results: its last validation.
        inputs: held-out documents.
        folder: of the saved model, which is read where each rank has only its shards.
    """
    model = trainer.model
    if inputs.ranks.sharded:
        model = load_checkpoint(str(folder), folder)
        torch.nn.Module.to(model, inputs.device)
    decoded = decode(model, inputs, trainer.recipe.validation.decoding)
    return Evaluation(results, inputs.unigram, None, *decoded).metrics()
