"""Train one model with prediction heads: build the parts, resume from a checkpoint, run the loop, save the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.serving.carried import CarriedModuleLostError
from mtp_ce.training.config.model import PretrainedModelConfig
from mtp_ce.training.config.recipe import to_yaml
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.console import Display, say, warn
from mtp_ce.training.data.rows import PackedRows
from mtp_ce.training.errors import RecipeError, StepRefusedError
from mtp_ce.training.interrupt import Stop, stop_on_signal
from mtp_ce.training.loop.checkpoint import FOLDER as CHECKPOINTS
from mtp_ce.training.loop.checkpoint import Checkpoint, Checkpoints
from mtp_ce.training.loop.trainer import Trainer
from mtp_ce.training.loop.weighing import Weigh
from mtp_ce.training.metrics.head_scores import HeadResult
from mtp_ce.training.models.build import build_model, checkpoint_activations
from mtp_ce.training.models.optimizer import build_optimizer, build_schedule, resume_schedule
from mtp_ce.training.models.saved import save_model
from mtp_ce.training.run.folder import decided_by
from mtp_ce.training.run.inputs import Inputs
from mtp_ce.training.tracking.composite import Tracking
from mtp_ce.training.tracking.jsonl import METRICS_FILE


def fit(
    recipe: Recipe,
    inputs: Inputs,
    rows: PackedRows,
    weigh: Weigh,
    folder: Path,
    run: Tracking,
    copy: Callable[[Path], None] = lambda folder: None,
) -> tuple[Trainer, list[HeadResult]]:
    """Train one model with prediction heads; save it and the plot of its losses.

    If the folder has checkpoints of this training, it resumes from the newest. One from which the first step is refused
    gives way to the one before it.

    Args:
        recipe: model, optimizer, steps and seed.
        inputs: texts, tokens and device.
        rows: training rows.
        weigh: returns the token weights of a micro-batch.
        folder: for checkpoints, model and plot; exists.
        run: receives metrics and files.
        copy: called with the folder of every checkpoint written, and with that of the model.

    Returns:
        The finished loop, and its last validation, one result per head.

    Raises:
        RecipeError: no checkpoint can be used.
        StepRefusedError: a number is out of bounds, in a step, in what would be saved, or in a validation.
        StoppedError: a signal ended the loop; its state is in a checkpoint.
    """
    torch.manual_seed(recipe.seed)
    pretrained = inputs.model_folders["model.source"] if isinstance(recipe.model, PretrainedModelConfig) else None
    model = build_model(recipe, inputs.tokenizer.eos_token_id, pretrained)
    # transformers wraps its own `to` in a way that hides `self` from type checkers.
    nn.Module.to(model, inputs.device)
    ranks = inputs.ranks
    where = f"{inputs.device}, sharded over {ranks.size} ranks" if ranks.size > 1 else str(inputs.device)
    if ranks.tensor_parallel > 1:
        where = f"{where}, {ranks.tensor_parallel} of which share the layers"
    say(inputs.console, f"model       {parameters(model)}; on {where}")
    if recipe.train.activation_checkpointing:
        checkpoint_activations(model)
    rows = rows.with_halos(*label_halos(model))
    ranks.shard(model, recipe.train)
    optimizer = build_optimizer(model, recipe.optimizer)
    schedule = build_schedule(optimizer, recipe.optimizer, recipe.train.steps)
    together: dict[str, Any] = {"ranks": ranks.data_size} if recipe.scorer.depends_on_batch else {}
    if any(rows.halos):
        together["rows.halos"] = list(rows.halos)
    checkpoints = Checkpoints(
        folder / CHECKPOINTS,
        decided=decided_by(recipe) | together | {"inputs": [*inputs.digests, inputs.row_length, len(rows)]},
        keep=recipe.checkpoint.keep,
        ranks=ranks,
        warn=partial(warn, inputs.console),
        written=copy,
    )

    def attempt(start: Checkpoint | None, stop: Stop) -> tuple[Trainer, list[HeadResult]] | Checkpoint:
        """Train from a checkpoint; return the checkpoint to try next if the first step from it is refused."""
        with Display(inputs.console, recipe.train.steps, start.step if start else 0) as display:
            trainer = Trainer(
                recipe=recipe,
                model=model,
                weigh=weigh,
                optimizer=optimizer,
                schedule=schedule,
                rows=rows,
                held_out=inputs.rows(inputs.tokens.held_out),
                device=inputs.device,
                log=log_and_show(run, display),
                tick=display.tick,
                stop=stop,
                weight_bounds=recipe.scorer.bounds,
                ranks=ranks,
                save_checkpoint=lambda trainer: checkpoints.save(
                    trainer.done, model, optimizer, lambda: _notes(trainer, run)
                ),
            )
            try:
                if start:
                    checkpoints.load(start, model, optimizer)
                    _resume(trainer, start, run)
                    # Versions before this check wrote checkpoints that are not finite.
                    trainer.refuse_not_finite()
                    say(inputs.console, f"resumed     after step {start.step:,}, from {start.folder}")
                elif inputs.resumed:
                    say(inputs.console, "resumed     no checkpoint yet; starts at step 1")
                return trainer, trainer.fit()
            except StepRefusedError as error:
                older = checkpoints.before(start, error.reason) if start and trainer.done == start.step else None
                if older is None:
                    raise
                return older

    # Until the model is saved: a signal after the last step must not lose it.
    with stop_on_signal() as stop:
        found = attempt(checkpoints.newest(), stop)
        while isinstance(found, Checkpoint):
            found = attempt(found, stop)
        trainer, results = found
        tensors = ranks.full_tensors(model)

        def save() -> None:
            try:
                save_model(folder / "model", model, inputs.tokenizer, state_dict=tensors)
            except CarriedModuleLostError as error:
                raise RecipeError(
                    f"model.source '{error.source}' was removed during training, and its MTP module is to be carried "
                    f"over into the saved model; put it back, then train-mtp --resume {folder}"
                ) from None
            copy(folder / "model")
            try:
                from mtp_ce.training.report.plot import draw_losses

                title = f"{folder.name}: cross entropy of each head"
                draw_losses(folder / METRICS_FILE, folder / "losses.png", title, inputs.unigram)
                run.artifact(folder / "losses.png")
            except Exception as error:  # such as a metrics file on a full disk: no reason to end a trained run
                warn(inputs.console, f"losses.png could not be drawn ({type(error).__name__}: {error})")

        ranks.lead(save)
    return trainer, results


def label_halos(model: MTPWrapper) -> tuple[int, int]:
    """Return how many tokens before and after a packed row its labels have, so that no target is lost at its end.

    With head_reduction "target" a token is divided by all heads that predict it, from the row before, too, and counts
    once in the text. Where the heads can't predict the whole halo, its first token is left, which this row predicts
    alone.
    """
    halo, H = model.label_halo, model.horizon
    if model.loss_options.head_reduction != "target":
        return 0, halo
    return (H - 1, H) if halo == H else (0, min(halo, 1))


def _notes(trainer: Trainer, run: Tracking) -> dict[str, Any]:
    """Return what a checkpoint stores besides tensors."""
    validations = {str(step): [asdict(head) for head in heads] for step, heads in trainer.validations.items()}
    size, sha256 = run.recorded()
    return {
        "recipe": to_yaml(trainer.recipe),
        "schedule": trainer.schedule.state_dict(),
        "metrics_bytes": size,
        "metrics_sha256": sha256,
        "validations": validations,
    }


def _resume(trainer: Trainer, checkpoint: Checkpoint, run: Tracking) -> None:
    """Restore step, schedule, validations and metrics file; model and optimizer are loaded already."""
    trainer.done = checkpoint.step
    resume_schedule(trainer.schedule, checkpoint.notes["schedule"])
    validations = checkpoint.notes["validations"]
    trainer.validations |= {int(step): [HeadResult(**head) for head in heads] for step, heads in validations.items()}
    # Earlier versions stored no hash.
    run.rewind(checkpoint.notes["metrics_bytes"], checkpoint.notes.get("metrics_sha256"))


def parameters(model: MTPWrapper) -> str:
    """Format the parameter counts of a model."""
    trunk = sum(parameter.numel() for parameter in model.causal.parameters())
    heads = sum(parameter.numel() for parameter in model.heads.parameters())
    return f"{trunk + heads:,} parameters: trunk {trunk:,}, extra heads {heads:,}"


def log_and_show(run: Tracking, display: Display) -> Callable[[int, dict[str, float]], None]:
    """Return a callback that sends metrics to the tracker and to the screen."""

    def log(step: int, metrics: dict[str, float]) -> None:
        run.log(step, metrics)
        display.show(step, metrics)

    return log
