"""The scorers that a recipe can name. A new one is its file and one line here."""

from __future__ import annotations

from typing import Annotated

from pydantic import SerializeAsAny

from mtp_ce.training.config.choice import Choice
from mtp_ce.training.config.scorers.options import ScorerConfig

_PACKAGE = "mtp_ce.training.config.scorers"

# Scorers with scores of their own, whose weights a control can permute.
SCORED = {
    "rho1_excess": f"{_PACKAGE}.rho1:Rho1ScorerConfig",
    "critic_delta": f"{_PACKAGE}.critic:CriticScorerConfig",
    "draft_rejection": f"{_PACKAGE}.draft_rejection:DraftRejectionConfig",
}

CONTROLS = {
    "shuffled": f"{_PACKAGE}.controls:ShuffledConfig",
    "random_matched": f"{_PACKAGE}.controls:RandomMatchedConfig",
}

SCORERS = {
    "uniform": f"{_PACKAGE}.uniform:UniformScorerConfig",
    **SCORED,
    **CONTROLS,
    "planted_truth": f"{_PACKAGE}.planted_truth:PlantedTruthConfig",
}

# Types of fields: the options of any scorer, and of one with scores of its own.
AnyScorer = Annotated[SerializeAsAny[ScorerConfig], Choice(ScorerConfig, SCORERS)]
ScoredScorer = Annotated[SerializeAsAny[ScorerConfig], Choice(ScorerConfig, SCORED)]
