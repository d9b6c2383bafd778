"""Controls: weights that look like a scorer's and know nothing of the text.

A claim that weighting helps means little until it beats these: `ShuffledWeights` keeps each sequence's weights and
moves them to other tokens of it, `RandomMatchedWeights` moves them anywhere in the batch. So the first one's weights of
a row depend on that row alone, as the scorer's own do, and the second one's on all rows that are weighed together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mtp_ce.scorers.normalize import sequence_groups
from mtp_ce.scorers.weights import Scorer, TokenWeights, WeightStatistics


class ShuffledWeights:
    """A scorer's weights, permuted among the supervised tokens of each sequence.

    Args:
        scorer: whose weights are permuted.
        seed: decides the permutation, together with the tokens of the row, which is always permuted in the same way.
        ignore_index: the label of a token that is not supervised.
    """

    within_sequence = True

    def __init__(self, scorer: Scorer, *, seed: int = 0, ignore_index: int = -100) -> None:
        self.scorer = scorer
        self.seed = seed
        self.ignore_index = ignore_index

    @torch.no_grad()
    def run(
        self,
        input_ids: Tensor,  # [B, S]
        labels: Tensor,  # [B, S]
        document_ids: Tensor | None = None,  # [B, S]
        **context: Any,
    ) -> TokenWeights:
        """Weigh as the scorer does, and permute; arguments as in the scorer's own `run`."""
        weights, statistics = self.scorer.run(input_ids, labels, document_ids, **context)
        supervised = labels != self.ignore_index
        texts, groups = input_ids.flatten()[None], torch.zeros_like(labels, dtype=torch.int64).flatten()
        if self.within_sequence:
            texts, groups = input_ids, sequence_groups(labels.shape, document_ids, labels.device)
        groups = torch.where(supervised.flatten(), groups, labels.numel())
        kept = torch.argsort(groups, stable=True)
        drawn = torch.argsort(_hash(texts, self.seed).flatten(), stable=True)
        drawn = drawn[torch.argsort(groups[drawn], stable=True)]
        permuted = torch.empty_like(weights).flatten()
        permuted[drawn] = weights.flatten()[kept]
        permuted = permuted.view_as(weights)
        moved = WeightStatistics.of(permuted, supervised)
        return TokenWeights(permuted, replace(moved, clipped=statistics.clipped, neutral=statistics.neutral))


class RandomMatchedWeights(ShuffledWeights):
    """A scorer's weights, permuted among all supervised tokens of the batch: random, of the same distribution.

    Arguments as of `ShuffledWeights`; the tokens of the whole batch decide the permutation.
    """

    within_sequence = False


def _hash(texts: Tensor, seed: int) -> Tensor:  # [R, T]
    """A number for every place of a text, from its tokens up to there, the place and the seed; wraps around."""
    place = torch.arange(texts.shape[1], device=texts.device)
    x = texts.long().cumsum(1) * 2654435761 + place * 40503 + seed * 97531 + 1
    # The mixing steps of splitmix64, whose constants are odd and of 64 bits.
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))
