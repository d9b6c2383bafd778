"""Drafts that a serving engine would reject."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mtp_ce.training.config.scorers.options import ScoreConfig

if TYPE_CHECKING:
    from mtp_ce.scorers.draft_rejection import DraftRejectionScorer


class DraftRejectionConfig(ScoreConfig):
    """Accepted tokens that a wrong draft of the token costs in speculative decoding."""

    units: ClassVar[Mapping[str, str]] = {"score": "tokens", "rejected": "drafts"}

    name: Literal["draft_rejection"] = Field(description="the scorer that computes the token weights")

    @property
    def reads_current(self) -> bool:
        """Always: drafts and verification are those of the model in training."""
        return True

    @property
    def reads_drafts(self) -> bool:
        """Always."""
        return True

    def build(self, models: Mapping[str, Any], seed: int) -> DraftRejectionScorer:
        """Build the scorer, which reads no frozen model."""
        from mtp_ce.scorers.draft_rejection import DraftRejectionScorer

        return DraftRejectionScorer(**self.normalization())
