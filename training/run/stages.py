"""The stages before the main one. Each writes its own folder and is a child run in MLflow.

    reference, critic   a frozen scoring model: trained here, reused from the cache, or named by the recipe
    weights             all token weights computed once before training, if the recipe asks for it

A finished stage is stored in the stage cache under a hash of its settings and inputs, and reused from there.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from mtp_ce.training.config.frozen import ReferenceConfig
from mtp_ce.training.config.model import LlamaModelConfig, MTPConfig, PretrainedModelConfig, TrunkConfig
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.config.scorers.uniform import UniformScorerConfig
from mtp_ce.training.console import Display, say, warn
from mtp_ce.training.critic.training import train_critic
from mtp_ce.training.data.python_source import is_documented
from mtp_ce.training.data.tokens import DocumentTokens
from mtp_ce.training.errors import RecipeError, StateRefusedError
from mtp_ce.training.interrupt import stop_on_signal
from mtp_ce.training.loop.checkpoint import FOLDER as CHECKPOINTS
from mtp_ce.training.loop.finite import refuse_not_finite
from mtp_ce.training.loop.weighing import (
    NEUTRAL_BOUND,
    FrozenModels,
    build_weighing,
    save_weights,
    weigh_rows,
)
from mtp_ce.training.metrics.head_scores import validation_metrics
from mtp_ce.training.models.saved import save_model
from mtp_ce.training.run.fitting import fit, log_and_show
from mtp_ce.training.run.inputs import Inputs
from mtp_ce.training.run.stage_cache import StageKind, cached_stage, folder_digest, stage_key, store_stage
from mtp_ce.training.storage.atomic import damage, remove_folder, whole_folder, write_file
from mtp_ce.training.tracking.composite import Tracking

# Results of a finished stage, stored beside its model.
STAGE_FILE = "stage.json"
WEIGHTS_FOLDER = "token_weights"


def check_stages(recipe: Recipe, inputs: Inputs) -> None:
    """Check for mistakes that would stop a later stage.

    Raises:
        RecipeError: there are no documents to train the reference on.
    """
    trained = {model.role for model in recipe.frozen_models() if model.source is None}
    if "reference" in trained and recipe.reference:
        documents_of(recipe.reference, inputs.clean)


def scoring_stages(recipe: Recipe, inputs: Inputs, output: Path, tracking: Tracking) -> FrozenModels:
    """Return the folders of the scorer's frozen models, by role; a stage trains those that the recipe does not name."""
    # A model with sizes of its own has the vocabulary of the pretrained model in training.
    data = recipe.data.model_copy(update={"vocab_size": inputs.vocab_size})
    sized = recipe.model_copy(update={"data": data})
    return {
        model.role: inputs.model_folders[model.key]
        if model.source
        else TRAINING_STAGES[model.role](sized, inputs.clean, output, tracking) / "model"
        for model in recipe.frozen_models()
    }


def reference_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe of the reference stage: a next-token model, uniform weights, its own steps and seed."""
    stage = recipe.reference
    assert stage is not None
    assert stage.train is not None
    next_token = MTPConfig(horizon=1, loss=recipe.model.mtp.loss)
    sizes = LlamaModelConfig(**stage.model.model_dump()) if stage.model else recipe.model
    return recipe.model_copy(
        update={
            "name": "reference",
            "description": f"next-token model of the {stage.documents} files",
            "seed": stage.seed,
            "data": recipe.data.model_copy(update={"noise": None}),
            "model": sizes.model_copy(update={"mtp": next_token}),
            "scorer": UniformScorerConfig(),
            "precompute_weights": False,
            "reference": None,
            "critic": None,
            "optimizer": stage.optimizer or recipe.optimizer,
            "train": recipe.train.model_copy(update=stage.train.model_dump()),
            "validation": recipe.validation.model_copy(update={"every": None}),
        }
    )


def documents_of(stage: ReferenceConfig, inputs: Inputs) -> DocumentTokens:
    """Return the tokens of the documents that a reference is trained on.

    Raises:
        RecipeError: there are none.
    """
    if stage.documents == "all":
        return inputs.tokens.train
    documents = inputs.tokens.train.choose([i for i, text in enumerate(inputs.corpus.train) if is_documented(text)])
    if not documents:
        raise RecipeError(
            "reference.documents is 'documented', but no training file is a public module with a docstring; "
            "give reference.documents=all or reference.source"
        )
    return documents


def _reference(recipe: Recipe, inputs: Inputs, output: Path, tracking: Tracking) -> Path:
    reference, stage = reference_recipe(recipe), recipe.reference
    assert stage is not None
    documents = documents_of(stage, inputs)
    settings = reference.model_dump(include={"seed", "model", "optimizer", "train"}) | {"row_length": inputs.row_length}

    def work(folder: Path, run: Tracking) -> dict[str, float]:
        weighing = build_weighing(reference, {}, inputs.device)
        _, results = fit(reference, inputs, inputs.rows(documents), weighing.weigh, folder, run)
        return validation_metrics(results)

    what = f"a next-token model of {len(documents)} {stage.documents} files, {reference.train.steps:,} steps"
    digests = [*inputs.digests, *_pretrained_digest(reference.model, inputs)]
    key = stage_key("reference", {**settings, "documents": stage.documents}, digests)
    return run_stage(
        Stage("reference", "reference", what, key, reference, work, together=True), inputs, output, tracking
    )


def _pretrained_digest(model: TrunkConfig | PretrainedModelConfig, inputs: Inputs) -> list[str]:
    """Return the hash of the pretrained model that a stage starts from, if any."""
    return [folder_digest(inputs.model_folders["model.source"])] if isinstance(model, PretrainedModelConfig) else []


def _critic(recipe: Recipe, inputs: Inputs, output: Path, tracking: Tracking) -> Path:
    stage = recipe.critic
    assert stage is not None
    assert stage.train is not None
    sizes = stage.model or recipe.model
    settings = {
        **stage.model_dump(),
        "row_length": inputs.row_length,
        # The rewards depend on what this Python version compiles.
        "python": sys.version_info[:2],
        "model": sizes.model_dump(exclude={"mtp"}),
        "optimizer": (stage.optimizer or recipe.optimizer).model_dump(),
    }
    steps = stage.train.steps

    def work(folder: Path, run: Tracking) -> dict[str, float]:
        with Display(inputs.console, steps) as display, stop_on_signal() as stop:
            model, results = train_critic(
                recipe, inputs.corpus, inputs.tokenizer, inputs.device,
                pretrained=inputs.model_folders.get("model.source"),
                log=log_and_show(run, display), tick=display.tick, stop=stop,
            )  # fmt: skip
        refuse_not_finite(steps, dict(model.named_parameters()))
        save_model(folder / "model", model, inputs.tokenizer)
        return results

    what = f"a value of every token by {stage.objective} of intact and corrupted functions, {steps:,} steps"
    key = stage_key("critic", settings, [*inputs.digests, *_pretrained_digest(sizes, inputs)])
    return run_stage(Stage("critic", "critic", what, key, recipe, work), inputs, output, tracking)


# What trains a frozen model, by its group in the recipe.
TRAINING_STAGES: dict[str, Callable[[Recipe, Inputs, Path, Tracking], Path]] = {
    "reference": _reference,
    "critic": _critic,
}


def weights_stage(recipe: Recipe, inputs: Inputs, models: FrozenModels, output: Path, tracking: Tracking) -> Path:
    """Return the folder of all token weights, computed before training or reused from the cache."""
    settings = {
        "scorer": recipe.scorer.model_dump(),
        "row_length": inputs.row_length,
        "seed": recipe.seed,
        "precision": recipe.train.precision,
        "neutral_bound": NEUTRAL_BOUND,
    }
    digests = [*inputs.digests, *map(folder_digest, models.values())]
    rows = inputs.rows(inputs.tokens.train)
    batch_size = recipe.validation.batch_size

    def work(folder: Path, run: Tracking) -> dict[str, float]:
        batches, statistics = [], None
        weighing = build_weighing(recipe, models, inputs.device)
        with Display(inputs.console, -(-len(rows) // batch_size)) as display, stop_on_signal() as stop:
            for batch in weigh_rows(weighing, rows, batch_size, inputs.device):
                batches.append(batch.weights.flatten().cpu())
                statistics = batch.statistics if statistics is None else statistics.merge(batch.statistics)
                display.tick()
                stop.check()
        assert statistics is not None
        neutral = float(statistics.neutral / statistics.count.clamp(min=1))
        if neutral > NEUTRAL_BOUND:
            raise StateRefusedError(0, "weights/neutral_ratio", neutral, f"0 to {NEUTRAL_BOUND:g}")
        weights = torch.cat(batches)[: inputs.tokens.train.token_count]
        paths = [document.path for document in inputs.corpus.train]
        with whole_folder(folder / WEIGHTS_FOLDER, replace=True) as aside:
            save_weights(aside, paths, list(weights.split(rows.lengths.tolist())))
        return {
            "weights/mean": float(weights.mean()),
            "weights/ess": float(weights.mean() ** 2 / weights.square().mean()),
            "weights/neutral_ratio": neutral,
        }

    what = f"{inputs.tokens.train.token_count:,} tokens weighed by {recipe.scorer.name}"
    key = stage_key("weights", settings, digests)
    return run_stage(Stage("weights", "weights", what, key, recipe, work), inputs, output, tracking)


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        kind: its folder in the stage cache.
        name: its folder in the run directory, and its MLflow run.
        what: one line for the terminal.
        key: hash of everything that decides the result.
        recipe: recipe of the stage.
        work: does the work in a folder with a tracker, and returns the results by name.
        together: whether all ranks run it; otherwise rank 0 does.
    """

    kind: StageKind
    name: str
    what: str
    key: str
    recipe: Recipe
    work: Callable[[Path, Tracking], dict[str, float]]
    together: bool = False


def run_stage(stage: Stage, inputs: Inputs, output: Path, tracking: Tracking) -> Path:
    """Run a stage and store it in the cache, or reuse it from there; return its folder in the cache."""
    folder, console, ranks = output / stage.name, inputs.console, inputs.ranks
    ranks.lead(lambda: folder.mkdir(exist_ok=True))
    with Tracking(stage.recipe, folder, partial(warn, console), tracking, records=ranks.leads) as run:
        cached = ranks.share(ranks.lead(lambda: _finished(stage, folder, partial(warn, console))))
        reused = cached is not None
        if cached is None:
            say(console, f"{stage.name:<11} {stage.what}")
            # Until the stage is stored: a signal after its last step must not lose it.
            with stop_on_signal() as stop:
                results = stage.work(folder, run) if stage.together else ranks.lead(lambda: stage.work(folder, run))
                cached = ranks.share(ranks.lead(lambda: _store(stage, folder, results or {}, partial(warn, console))))
                ranks.check(stop)
        assert cached is not None
        record = json.loads((cached / STAGE_FILE).read_text(encoding="utf-8"))
        # A head without rows has no result.
        results = {name: value for name, value in record["results"].items() if value is not None}
        how = f"reused, unchanged since {record['finished']}" if reused else "done"
        say(console, f"{stage.name:<11} {how}: {_format(results)}")
        say(console, f"            {cached}")
        if ranks.leads:
            write_file(folder / STAGE_FILE, json.dumps({**record, "folder": str(cached)}, indent=2))
        run.summary(0, results)
        run.tags({"stage.key": stage.key, "stage.finished": record["finished"]})
        run.artifact(folder / STAGE_FILE)
    return cached


def _finished(stage: Stage, folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the stage from the cache, or from the run directory: a process may have died before it was stored."""
    if cached := cached_stage(stage.kind, stage.key):
        return cached
    try:
        record = json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    parts = [part for part in (folder / "model", folder / WEIGHTS_FOLDER) if part.exists()]
    if not isinstance(record, dict) or record.get("key") != stage.key or not parts or any(map(damage, parts)):
        return None
    return _stored(stage, folder, warn)


def _store(stage: Stage, folder: Path, results: dict[str, float], warn: Callable[[str], None]) -> Path:
    """Record that a stage has finished, and store it in the cache."""
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    plain = {name: value if math.isfinite(value) else None for name, value in results.items()}
    record = {"stage": stage.kind, "key": stage.key, "finished": finished, "results": plain}
    # From here on the stage need not run again, whatever happens to the cache.
    write_file(folder / STAGE_FILE, json.dumps(record, indent=2))
    return _stored(stage, folder, warn)


def _stored(stage: Stage, folder: Path, warn: Callable[[str], None]) -> Path:
    """Copy a finished stage to the cache; where that has no room, the run directory keeps it."""
    try:
        stored = store_stage(stage.kind, stage.key, folder)
    except OSError as error:
        # shutil.Error lists every file that could not be copied.
        reason = error.strerror or "a file could not be copied"
        warn(f"the {stage.name} could not be stored in the cache ({reason}); this run uses {folder}")
        stored = folder
    if (folder / CHECKPOINTS).exists():
        remove_folder(folder / CHECKPOINTS)
    return stored


def _format(results: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in list(results.items())[:2])
