"""From a recipe's scorer to the weights of a step: the scorer with its frozen models, online or precomputed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel

from mtp_ce.next_token import NextToken
from mtp_ce.scorers.weights import Scorer, TokenWeights, WeightStatistics
from mtp_ce.training.config.frozen import FrozenModel, ModelKind
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.data.rows import IGNORE, Batch, PackedRows
from mtp_ce.training.errors import RecipeError, refuse_unloadable
from mtp_ce.training.loop.finite import first_not_finite
from mtp_ce.training.loop.ranks import ALONE, Ranks
from mtp_ce.unembedding import Unembedding

# Largest allowed ratio of supervised tokens whose score is not finite. They get weight 1, so a scorer that fails would
# train with uniform weights. A scorer that works has none of them.
NEUTRAL_BOUND = 0.01

# Takes a micro-batch and the heads of the model in training on it.
Weigh = Callable[[Batch, NextToken], TokenWeights]

# Folders of the frozen models of a scorer, by role.
FrozenModels = Mapping[str, Path]

MODEL_CLASSES: dict[ModelKind, Any] = {
    "language model": AutoModelForCausalLM,
    "critic": AutoModelForTokenClassification,
}


@dataclass(frozen=True)
class Weighing:
    """A scorer applied to batches.

    Attributes:
        scorer: computes the weights.
        frozen: a model whose losses take the place of those of the model in training; None: no such model.
        reads_current: whether the scorer gets the model in training, where `frozen` is None.
        units: unit of each number that the scorer explains its weights with.
        reads_noise: whether the scorer gets the truth about planted noise.
    """

    scorer: Scorer
    frozen: PreTrainedModel | None = None
    reads_current: bool = True
    units: Mapping[str, str] = field(default_factory=dict)
    reads_noise: bool = False

    def weigh(self, batch: Batch, current: NextToken | None = None) -> TokenWeights:
        """Compute the weights [B, S] of a batch; tokens beyond its rows are scored in the rows that hold them."""
        batch = batch.without_halos()
        return self.scorer.run(
            batch.input_ids,
            batch.labels,
            batch.document_ids,
            position_ids=batch.position_ids,
            current=self._current(batch, current),
            **({"noise": batch.noise} if self.reads_noise else {}),
        )

    def explain(self, batch: Batch, current: NextToken | None = None) -> dict[str, Tensor]:
        """Return what the weights come from, [B, S] each, by name; nothing for a scorer without `explain`."""
        explain = getattr(self.scorer, "explain", None)
        if explain is None:
            return {}
        details: dict[str, Tensor] = explain(
            batch.input_ids,
            batch.labels,
            batch.document_ids,
            position_ids=batch.position_ids,
            current=self._current(batch, current),
        )
        return details

    def _current(self, batch: Batch, current: NextToken | None) -> NextToken | None:
        if self.frozen:
            return NextToken.of(self.frozen, batch.input_ids, batch.position_ids)
        return current if self.reads_current else None


def build_weighing(recipe: Recipe, folders: FrozenModels, device: torch.device, ranks: Ranks = ALONE) -> Weighing:
    """Build the recipe's scorer and load its frozen models, sharded over the ranks that score together.

    They are held in the precision of the model in training: losses of two precisions are not comparable.

    Args:
        recipe: its scorer declares the models.
        folders: where they are, by role.
        device: where to load them.
        ranks: the ranks that score together.

    Raises:
        RecipeError: a frozen model has a parameter that is not finite.
    """
    scorer, precision = recipe.scorer, recipe.train.precision
    models = {m.role: load_frozen(m, folders[m.role], precision, device) for m in recipe.frozen_models()}
    for model in models.values():
        ranks.shard_frozen(model)
    return Weighing(
        scorer.among(ranks.data_group).build(models, recipe.seed),
        frozen=models.get("current"),
        reads_current=scorer.reads_current,
        units=scorer.scored_by.units,
        reads_noise=scorer.reads_noise,
    )


def load_frozen(
    role: FrozenModel, folder: Path, precision: Literal["fp32", "bf16"], device: torch.device
) -> PreTrainedModel:
    """Load a frozen model on a device.

    Raises:
        RecipeError: it can't be loaded, or has a parameter that is not finite.
    """
    with refuse_unloadable(role.key, role.source or str(folder)):
        model: PreTrainedModel = MODEL_CLASSES[role.kind].from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        )
    _check_finite(role, folder, model)
    hold_in_precision(model, precision)
    frozen: PreTrainedModel = nn.Module.to(model, device).eval().requires_grad_(False)
    if role.kind == "language model":
        Unembedding.checked(frozen)  # before it is sharded, and for the current model too
    return frozen


def _check_finite(role: FrozenModel, folder: Path, model: PreTrainedModel) -> None:
    if found := first_not_finite(dict(model.named_parameters())):
        name, value = found
        where = f"{role.key} '{role.source}'" if role.source else f"the {role.role} in {folder.parent}"
        way_out = "give another model" if role.source else "delete that folder, and the stage is trained again"
        raise RecipeError(f"{where} has {value} in its parameter {name}; expected finite numbers: {way_out}")


def hold_in_precision(model: nn.Module, precision: Literal["fp32", "bf16"]) -> None:
    """Cast the parameters of a frozen model to the precision of the training, as FSDP does."""
    if precision == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()


def stored(recipe: Recipe) -> Weigh:
    """Read the weights that the rows carry, precomputed by the recipe's scorer."""
    low, high = recipe.scorer.bounds

    def weigh(batch: Batch, current: NextToken) -> TokenWeights:
        assert batch.token_weights is not None
        inner = batch.without_halos()
        weights, supervised = inner.token_weights, inner.labels != IGNORE
        assert weights is not None
        clipped = (weights <= low) | (weights >= high)
        return TokenWeights(batch.token_weights, WeightStatistics.of(weights, supervised, clipped))

    return weigh


@torch.no_grad()
def weigh_rows(weighing: Weighing, rows: PackedRows, batch_size: int, device: torch.device) -> Iterator[TokenWeights]:
    """Weigh every token of the rows once, in order; yields the weights of `batch_size` rows at a time."""
    for batch in rows.in_order(batch_size):
        yield weighing.weigh(batch.to(device))


def save_weights(folder: Path, paths: list[str], weights: list[Tensor]) -> None:
    """Write a `datasets` table with one row per document: its path and the weight of each of its tokens."""
    # It takes seconds to load, with pandas, and few runs store weights.
    import datasets

    table = {"path": paths, "token_weights": [document.numpy() for document in weights]}
    features = datasets.Features(
        {"path": datasets.Value("string"), "token_weights": datasets.List(datasets.Value("float32"))}
    )
    datasets.Dataset.from_dict(table, features=features).save_to_disk(str(folder))


def load_weights(folder: Path) -> list[Tensor]:
    """Read what `save_weights` wrote."""
    import datasets

    return list(datasets.load_from_disk(str(folder)).with_format("torch")["token_weights"])
