"""Rho-1: excess loss of the model over a frozen reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mtp_ce.training.config.frozen import StageName
from mtp_ce.training.config.scorers.options import ScoreConfig

if TYPE_CHECKING:
    from mtp_ce.scorers.rho1 import Rho1ExcessScorer


class Rho1ScorerConfig(ScoreConfig):
    """Excess cross entropy over a reference model, arXiv:2404.07965."""

    stages: ClassVar[tuple[StageName, ...]] = ("reference",)
    units: ClassVar[Mapping[str, str]] = {"score": "nats", "ce": "nats", "reference_ce": "nats"}

    name: Literal["rho1_excess"] = Field(description="the scorer that computes the token weights")
    current: str | None = Field(
        default=None,
        min_length=1,
        description="a frozen model to compare with the reference: a folder, an s3:// address or a hub name; "
        "null: the model in training",
    )

    def sources(self) -> dict[str, str]:
        """Return the frozen current model, if one is given."""
        return {"current": self.current} if self.current else {}

    @property
    def reads_current(self) -> bool:
        """Unless a frozen model takes the place of the model in training."""
        return self.current is None

    def build(self, models: Mapping[str, Any], seed: int) -> Rho1ExcessScorer:
        """Build the scorer with its reference."""
        from mtp_ce.scorers.rho1 import Rho1ExcessScorer

        return Rho1ExcessScorer(models["reference"], **self.normalization())
