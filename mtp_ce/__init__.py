"""Weighted multi-token prediction: the loss, fused.

    from mtp_ce import weighted_mtp_ce

Names are resolved on first use, so that the command line can report a mistake before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtp_ce.heads.residual import MTPHeads
    from mtp_ce.hf.output import MTPOutput
    from mtp_ce.hf.trainer import MTPTrainer
    from mtp_ce.hf.wrapper import MTPWrapper
    from mtp_ce.linear import token_ce, weighted_mtp_linear_ce
    from mtp_ce.loss import MTPLoss, MTPStats, WeightedMTPLoss, weighted_mtp_ce
    from mtp_ce.next_token import NextToken
    from mtp_ce.scorers.controls import RandomMatchedWeights, ShuffledWeights
    from mtp_ce.scorers.critic import CriticDeltaScorer
    from mtp_ce.scorers.draft_rejection import DraftRejectionScorer
    from mtp_ce.scorers.normalize import normalize_weights
    from mtp_ce.scorers.rho1 import Rho1ExcessScorer
    from mtp_ce.scorers.uniform import UniformScorer

_HOME = {
    "CriticDeltaScorer": "mtp_ce.scorers.critic",
    "DraftRejectionScorer": "mtp_ce.scorers.draft_rejection",
    "MTPHeads": "mtp_ce.heads.residual",
    "MTPLoss": "mtp_ce.loss",
    "MTPOutput": "mtp_ce.hf.output",
    "MTPStats": "mtp_ce.loss",
    "MTPTrainer": "mtp_ce.hf.trainer",
    "MTPWrapper": "mtp_ce.hf.wrapper",
    "NextToken": "mtp_ce.next_token",
    "RandomMatchedWeights": "mtp_ce.scorers.controls",
    "Rho1ExcessScorer": "mtp_ce.scorers.rho1",
    "ShuffledWeights": "mtp_ce.scorers.controls",
    "UniformScorer": "mtp_ce.scorers.uniform",
    "WeightedMTPLoss": "mtp_ce.loss",
    "normalize_weights": "mtp_ce.scorers.normalize",
    "token_ce": "mtp_ce.linear",
    "weighted_mtp_ce": "mtp_ce.loss",
    "weighted_mtp_linear_ce": "mtp_ce.linear",
}

__all__ = [
    "CriticDeltaScorer",
    "DraftRejectionScorer",
    "MTPHeads",
    "MTPLoss",
    "MTPOutput",
    "MTPStats",
    "MTPTrainer",
    "MTPWrapper",
    "NextToken",
    "RandomMatchedWeights",
    "Rho1ExcessScorer",
    "ShuffledWeights",
    "UniformScorer",
    "WeightedMTPLoss",
    "normalize_weights",
    "token_ce",
    "weighted_mtp_ce",
    "weighted_mtp_linear_ce",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mtp_ce' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
