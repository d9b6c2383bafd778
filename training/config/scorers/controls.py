"""Controls: another scorer's weights on other tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from mtp_ce.training.config.scorers.options import ScorerConfig
from mtp_ce.training.config.scorers.table import ScoredScorer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mtp_ce.scorers.controls import ShuffledWeights


class ControlConfig(ScorerConfig):
    """Another scorer's weights, permuted. What it needs is what that scorer needs."""

    of: ScoredScorer = Field(description="the scorer whose weights are permuted")

    def sources(self) -> dict[str, str]:
        """Return the models that the other scorer's options name."""
        return {f"of.{option}": source for option, source in self.of.sources().items()}

    @property
    def reads_current(self) -> bool:
        """As the other scorer."""
        return self.of.reads_current

    @property
    def reads_drafts(self) -> bool:
        """As the other scorer."""
        return self.of.reads_drafts

    @property
    def depends_on_batch(self) -> bool:
        """As the other scorer."""
        return self.of.depends_on_batch

    @property
    def bounds(self) -> tuple[float, float]:
        """Those of the other scorer."""
        return self.of.bounds

    @property
    def scored_by(self) -> ScorerConfig:
        """The other scorer."""
        return self.of

    def flops_per_token(self, vocab_size: int, hidden_size: int, horizon: int) -> int:
        """Return the FLOPs of the other scorer."""
        return self.of.flops_per_token(vocab_size, hidden_size, horizon)

    def on_one_rank(self) -> Self:
        """Return the control of the other scorer on one rank."""
        return self.model_copy(update={"of": self.of.on_one_rank()})

    def among(self, group: ProcessGroup | None) -> Self:
        """Return the control of the other scorer among these ranks."""
        return self.model_copy(update={"of": self.of.among(group)})


class ShuffledConfig(ControlConfig):
    """Another scorer's weights, permuted within each sequence."""

    name: Literal["shuffled"] = Field(description="the scorer that computes the token weights")

    def build(self, models: Mapping[str, Any], seed: int) -> ShuffledWeights:
        """Build the other scorer and the permutation of its weights."""
        from mtp_ce.scorers.controls import ShuffledWeights

        return ShuffledWeights(self.of.build(models, seed), seed=seed)


class RandomMatchedConfig(ControlConfig):
    """Another scorer's weights, permuted over all rows of a forward."""

    name: Literal["random_matched"] = Field(description="the scorer that computes the token weights")

    @property
    def depends_on_batch(self) -> bool:
        """Always: weights move between rows."""
        return True

    def build(self, models: Mapping[str, Any], seed: int) -> ShuffledWeights:
        """Build the other scorer and the permutation of its weights."""
        from mtp_ce.scorers.controls import RandomMatchedWeights

        return RandomMatchedWeights(self.of.build(models, seed), seed=seed)
