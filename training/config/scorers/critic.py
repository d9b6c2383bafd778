"""A critic's view: how much each token changes its value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mtp_ce.training.config.frozen import StageName
from mtp_ce.training.config.scorers.options import ScoreConfig

if TYPE_CHECKING:
    from mtp_ce.scorers.critic import CriticDeltaScorer


class CriticScorerConfig(ScoreConfig):
    """Change of a critic's value at the token."""

    stages: ClassVar[tuple[StageName, ...]] = ("critic",)

    name: Literal["critic_delta"] = Field(description="the scorer that computes the token weights")
    gamma: float = Field(default=1.0, gt=0, le=1, description="discount of the next value")
    gae_lambda: float = Field(
        default=0.0, ge=0, le=1, description="0: the change at the token alone; 1: all later changes too"
    )

    def build(self, models: Mapping[str, Any], seed: int) -> CriticDeltaScorer:
        """Build the scorer with its critic."""
        from mtp_ce.scorers.critic import CriticDeltaScorer

        return CriticDeltaScorer(models["critic"], gamma=self.gamma, gae_lambda=self.gae_lambda, **self.normalization())
