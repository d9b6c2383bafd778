"""The truth about planted noise as weights: what a scorer that makes no mistake would compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mtp_ce.training.config.scorers.options import ScorerConfig

if TYPE_CHECKING:
    from mtp_ce.scorers.planted_truth import PlantedTruth


class PlantedTruthConfig(ScorerConfig):
    """Equal weights on every token of a batch that is no noise, and none on noise that `data.noise` planted."""

    name: Literal["planted_truth"] = Field(description="the scorer that computes the token weights")

    @property
    def reads_noise(self) -> bool:
        """It reads nothing else."""
        return True

    @property
    def depends_on_batch(self) -> bool:
        """The mean is taken over all rows."""
        return True

    @property
    def bounds(self) -> tuple[float, float]:
        """Without an upper bound: one clean token may have the weight of all."""
        return 0.0, math.inf

    def build(self, models: Mapping[str, Any], seed: int) -> PlantedTruth:
        """Build the scorer, which reads no model."""
        from mtp_ce.scorers.planted_truth import PlantedTruth

        return PlantedTruth()
