"""The main stage of a run: train the model itself, save it, and report on it.

A run has finished once its model is saved. run.json then holds what the report needs of the training, until the report
is complete: a run whose report was stopped or failed is resumed with the report alone.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.console import say, warn
from mtp_ce.training.interrupt import stop_on_signal
from mtp_ce.training.loop.weighing import (
    FrozenModels,
    Weigh,
    build_weighing,
    hold_in_precision,
    load_weights,
    stored,
)
from mtp_ce.training.metrics.evaluation import Evaluation
from mtp_ce.training.metrics.head_scores import HeadResult
from mtp_ce.training.models.sources import check_manifest
from mtp_ce.training.report.evaluation import write_evaluation
from mtp_ce.training.run.evaluate import decode
from mtp_ce.training.run.fitting import fit
from mtp_ce.training.run.folder import end_report, finish, pending_report
from mtp_ce.training.run.inputs import Inputs
from mtp_ce.training.run.stages import WEIGHTS_FOLDER, weights_stage
from mtp_ce.training.storage.atomic import flush
from mtp_ce.training.storage.uploads import copies
from mtp_ce.training.tracking.composite import Tracking


def main_stage(recipe: Recipe, inputs: Inputs, models: FrozenModels, output: Path, tracking: Tracking) -> Evaluation:
    """Train the model itself, evaluate its heads, and draw token weights of held-out passages if weighted.

    Of a run that has finished without its report, only the report is made.

    Raises:
        RecipeError: the record or the saved model of such a run is damaged.
    """
    ranks = inputs.ranks
    pending = ranks.share(ranks.lead(lambda: pending_report(output)))
    rows = inputs.rows(inputs.tokens.train)
    weigh: Weigh | None = None
    if not pending and recipe.precompute_weights:
        stage = weights_stage(recipe, inputs, models, output, tracking)
        rows, weigh = inputs.rows(inputs.tokens.train, load_weights(stage / WEIGHTS_FOLDER)), stored(recipe)
    elif not pending:
        weigh = build_weighing(recipe, models, inputs.device, inputs.ranks).weigh
    address = f"{recipe.checkpoint.upload.rstrip('/')}/{output.name}" if recipe.checkpoint.upload else None
    with (
        Tracking(recipe, output, partial(warn, inputs.console), tracking, "main", records=ranks.leads) as run,
        copies(address if ranks.leads else None, partial(warn, inputs.console), recipe.checkpoint.keep) as copy,
    ):
        model = None
        if weigh:
            with stop_on_signal() as stop:
                trainer, results = fit(recipe, inputs, rows, weigh, output, run, copy)
                state = _state(results, trainer.validations.get(0), run)
                # The model is saved: a failure of the report leaves nothing to resume but the report.
                ranks.lead(partial(finish, output, state))
                ranks.check(stop)
            model = None if ranks.sharded else trainer.model
            # Frees shards, optimizer and scorer before the report loads models.
            del trainer, weigh
            _free_memory(inputs.device)
        else:
            assert pending
            state = pending
            say(inputs.console, f"resumed     the model is in {output / 'model'}; its report is missing")
            ranks.lead(lambda: check_manifest("--resume", str(output), output / "model"))
            if ranks.leads:
                run.rewind(state["metrics_bytes"], state["metrics_sha256"])
                # Its upload may have been cut off, too.
                copy(output / "model")
        trained = _evaluation(state, inputs.unigram)
        evaluation = ranks.share(ranks.lead(lambda: _report(recipe, inputs, models, output, run, trained, model)))
        assert evaluation is not None
        return evaluation


def _state(heads: list[HeadResult], before: list[HeadResult] | None, run: Tracking) -> dict[str, Any]:
    """Return what the report needs of a finished training, as plain values."""
    size, sha256 = run.recorded()
    return {
        "heads": [asdict(head) for head in heads],
        "before": before and [asdict(head) for head in before],
        "metrics_bytes": size,
        "metrics_sha256": sha256,
    }


def _evaluation(state: dict[str, Any], unigram: float) -> Evaluation:
    """Return the evaluation of a finished training, without decoding."""
    heads, before = (state[name] and [HeadResult(**head) for head in state[name]] for name in ("heads", "before"))
    return Evaluation(heads, unigram, before)


def _report(
    recipe: Recipe,
    inputs: Inputs,
    models: FrozenModels,
    output: Path,
    run: Tracking,
    trained: Evaluation,
    model: MTPWrapper | None,
) -> Evaluation:
    """Decode, draw token weights and write the evaluation, on rank 0; what fails costs a warning.

    Args:
        recipe: the run.
        inputs: inputs of the run.
        models: folders of the scorer's frozen models.
        output: run directory.
        run: receives metrics and files.
        trained: the evaluation so far.
        model: the trained model; None: it is loaded from its files.
    """
    evaluation = trained
    failures: list[str] = []
    # The other ranks wait, so this one may leave in the middle.
    with inputs.ranks.stop.at_once(), _failure_is_a_warning(inputs, output, failures):
        # A rank holds only its shards of a sharded model; the files hold all of it.
        if model is None:
            model = MTPWrapper.from_pretrained(output / "model", dtype=torch.float32)
            nn.Module.to(model, inputs.device)
        decoding, acceptance = decode(model, inputs, recipe.validation.decoding)
        evaluation = replace(trained, decoding=decoding, acceptance=acceptance)
        if recipe.scorer.weighted:
            # matplotlib writes a font cache on first import; a dry run writes nothing.
            from mtp_ce.training.run.passages import show_weights

            # Rank 0 works alone here: it can't run models sharded over all ranks, nor use the others' scores.
            alone = recipe.model_copy(update={"scorer": recipe.scorer.on_one_rank()})
            weighing = build_weighing(alone, models, inputs.device)
            hold_in_precision(model, recipe.train.precision)
            for path in show_weights(inputs, weighing, model, recipe.scorer.name, output):
                flush(path)
                run.artifact(path)
    with inputs.ranks.stop.at_once(), _failure_is_a_warning(inputs, output, failures):
        run.log(recipe.train.steps, evaluation.metrics())
        for path in write_evaluation(evaluation, output, f"{output.name}: the heads on held-out text"):
            flush(path)
            run.artifact(path)
        if not failures:
            end_report(output)
    return evaluation


@contextmanager
def _failure_is_a_warning(inputs: Inputs, output: Path, failures: list[str]) -> Iterator[None]:
    """Turn a failure of the report, such as running out of memory, into a warning, and add it to `failures`."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        failures.append(reason)
        warn(
            inputs.console,
            f"the report on the trained model failed with {type(error).__name__}: {reason}. The model is saved; "
            f"train-mtp --resume {output} makes the report again",
        )


def _free_memory(device: torch.device) -> None:
    """Free objects held by reference cycles only, such as a sharded module and its hooks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
