"""The upper bound of all scorers where noise was planted: no weight on noise, equal weights on everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtp_ce.scorers.weights import TokenWeights, WeightStatistics


class PlantedTruth:
    """Weights from the truth about planted noise.

    w = n / n_clean on the clean tokens of a batch, 0 on its noise; 1 in a batch of noise alone.

    Args:
        ignore_index: the label of a token that is not supervised.
    """

    def __init__(self, *, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index

    @torch.no_grad()
    def run(
        self,
        input_ids: Tensor,  # [B, S]
        labels: Tensor,  # [B, S]
        document_ids: Tensor | None = None,  # [B, S]
        *,
        noise: Tensor | None = None,  # [B, S] bool
        **context: Any,
    ) -> TokenWeights:
        """Compute the weights of one batch.

        Args:
            input_ids: the tokens; not used.
            labels: `input_ids` with `ignore_index` at the tokens that are not supervised, unshifted.
            document_ids: not used.
            noise: which tokens are noise; None: none of them.
            **context: arguments of other scorers; not used.

        Returns:
            Weights [B, S] fp32 of the token at each position, and their statistics. No host synchronisation.
        """
        supervised = labels != self.ignore_index
        clean = supervised if noise is None else supervised & ~noise
        n_clean = clean.sum()
        chosen = torch.where(n_clean > 0, clean, supervised)
        weights = chosen * (supervised.sum() / chosen.sum().clamp(min=1))
        return TokenWeights(weights, WeightStatistics.of(weights, supervised))
