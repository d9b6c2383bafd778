"""From a recipe's scorer to the weights of a step: the scorer with its models, online or once before training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel

from mtp_ce.next_token import NextToken
from mtp_ce.scorers.controls import RandomMatchedWeights, ShuffledWeights
from mtp_ce.scorers.critic import CriticDeltaScorer
from mtp_ce.scorers.rho1 import Rho1ExcessScorer
from mtp_ce.scorers.uniform import UniformScorer
from mtp_ce.scorers.weights import Scorer, TokenWeights, WeightStatistics
from mtp_ce.training.config.groups import (
    ControlName,
    ControlScorerConfig,
    CriticScorerConfig,
    Rho1ScorerConfig,
    ScorerConfig,
    UniformScorerConfig,
)
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.data.rows import IGNORE, Batch, PackedRows
from mtp_ce.training.loop.ranks import ALONE, Ranks
from mtp_ce.unembedding import Unembedding

# Takes a micro-batch and the next-token head of the model in training on it.
Weigh = Callable[[Batch, NextToken], TokenWeights]

CONTROLS: dict[ControlName, type[ShuffledWeights]] = {
    "shuffled": ShuffledWeights,
    "random_matched": RandomMatchedWeights,
}


@dataclass(frozen=True)
class FrozenModels:
    """Folders of the trained models that a scorer asks; None where it does not."""

    reference: Path | None = None
    critic: Path | None = None
    current: Path | None = None

    def folders(self) -> list[Path]:
        """Those that are there."""
        return [folder for folder in (self.reference, self.critic, self.current) if folder]


@dataclass(frozen=True)
class Weighing:
    """A scorer at work on batches.

    Attributes:
        scorer: what gives the weights.
        frozen: a model whose losses count in place of those of the model in training; None for that one.
    """

    scorer: Scorer
    frozen: PreTrainedModel | None = None

    def weigh(self, batch: Batch, current: NextToken | None = None) -> TokenWeights:
        """Ask the scorer; a frozen current model takes the place of the one in training."""
        return self.scorer.run(
            batch.input_ids,
            batch.labels,
            batch.document_ids,
            position_ids=batch.position_ids,
            current=self._current(batch, current),
        )

    def explain(self, batch: Batch, current: NextToken | None = None) -> dict[str, Tensor]:
        """What the weights come from, [B, S] each, by name; nothing for a scorer that only moves weights."""
        explain = getattr(self.scorer, "explain", None)
        if explain is None:
            return {}
        parts: dict[str, Tensor] = explain(
            batch.input_ids,
            batch.labels,
            batch.document_ids,
            position_ids=batch.position_ids,
            current=self._current(batch, current),
        )
        return parts

    def _current(self, batch: Batch, current: NextToken | None) -> NextToken | None:
        return NextToken.of(self.frozen, batch.input_ids, batch.position_ids) if self.frozen else current


def build_weighing(recipe: Recipe, models: FrozenModels, device: torch.device, ranks: Ranks = ALONE) -> Weighing:
    """Make the recipe's scorer and load its models, sharded over the ranks that ask them together.

    They are held in the precision of the model in training: losses of two precisions don't compare.
    """

    def load(kind: Any, folder: Path | None) -> PreTrainedModel:
        assert folder is not None
        model: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.float32)
        hold_in_precision(model, recipe.train.precision)
        frozen: PreTrainedModel = nn.Module.to(model, device).eval().requires_grad_(False)
        if kind is AutoModelForCausalLM:
            Unembedding.checked(frozen)  # before it is sharded, and for the current model too
        ranks.shard_frozen(frozen)
        return frozen

    def build(config: ScorerConfig) -> Scorer:
        match config:
            case UniformScorerConfig():
                return UniformScorer()
            case Rho1ScorerConfig():
                return Rho1ExcessScorer(load(AutoModelForCausalLM, models.reference), **config.normalization())
            case CriticScorerConfig():
                critic = load(AutoModelForTokenClassification, models.critic)
                return CriticDeltaScorer(
                    critic, gamma=config.gamma, gae_lambda=config.gae_lambda, **config.normalization()
                )
            case ControlScorerConfig():
                return CONTROLS[config.name](build(config.of), seed=recipe.seed)

    return Weighing(build(recipe.scorer), load(AutoModelForCausalLM, models.current) if models.current else None)


def hold_in_precision(model: nn.Module, precision: Literal["fp32", "bf16"]) -> None:
    """Hold a model that does not learn in the precision of the training: its parameters, as FSDP casts them."""
    if precision == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()


def stored(recipe: Recipe) -> Weigh:
    """Read the weights that the rows carry, made before training by the recipe's scorer."""
    low, high = weight_bounds(recipe)

    def weigh(batch: Batch, current: NextToken) -> TokenWeights:
        assert batch.token_weights is not None
        weights, supervised = batch.token_weights, batch.labels != IGNORE
        clipped = (weights <= low) | (weights >= high)
        return TokenWeights(weights, WeightStatistics.of(weights, supervised, clipped))

    return weigh


@torch.no_grad()
def weigh_rows(weighing: Weighing, rows: PackedRows, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Weigh every token of the rows once, in order; gives [batch_size * S] fp32 weights at a time, on the host."""
    for batch in rows.in_order(batch_size):
        yield weighing.weigh(batch.to(device)).weights.flatten().cpu()


def weight_bounds(recipe: Recipe) -> tuple[float, float]:
    """Smallest and largest weight that the recipe's scorer can give a supervised token."""
    scored = recipe.scored_by
    if scored is None:
        return 1.0, 1.0
    return (scored.eps, scored.w_max) if scored.mode == "softmax" else (0.0, math.inf)


def save_weights(folder: Path, paths: list[str], weights: list[Tensor]) -> None:
    """Write a `datasets` table with one row per document: its path and the weight of each of its tokens."""
    table = {"path": paths, "token_weights": [document.numpy() for document in weights]}
    features = datasets.Features(
        {"path": datasets.Value("string"), "token_weights": datasets.List(datasets.Value("float32"))}
    )
    datasets.Dataset.from_dict(table, features=features).save_to_disk(str(folder))


def load_weights(folder: Path) -> list[Tensor]:
    """Read what `save_weights` wrote."""
    return list(datasets.load_from_disk(str(folder)).with_format("torch")["token_weights"])
