"""Uniform weights: ordinary, unweighted training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mtp_ce.training.config.scorers.options import ScorerConfig

if TYPE_CHECKING:
    from mtp_ce.scorers.uniform import UniformScorer


class UniformScorerConfig(ScorerConfig):
    """Every supervised token has weight 1."""

    weighted: ClassVar[bool] = False

    name: Literal["uniform"] = Field(default="uniform", description="the scorer that computes the token weights")

    @property
    def bounds(self) -> tuple[float, float]:
        """Exactly 1."""
        return 1.0, 1.0

    def build(self, models: Mapping[str, Any], seed: int) -> UniformScorer:
        """Build the scorer, which reads no model."""
        from mtp_ce.scorers.uniform import UniformScorer

        return UniformScorer()
