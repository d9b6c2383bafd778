"""Controls: weights with the distribution of a scorer's, assigned to tokens at random.

A claim that weighting helps needs a comparison with these. `ShuffledWeights` permutes the weights of each sequence, so
that a row's weights depend on that row alone, as the scorer's own do. `RandomMatchedWeights` permutes them over the
batch, so that they depend on all rows that are weighted together.
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
        scorer: the scorer whose weights are permuted.
        seed: determines the permutation, together with the tokens of the row: the same row is always permuted alike.
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
        """Compute the scorer's weights and permute them; arguments as in the scorer's own `run`."""
        weights, statistics = self.scorer.run(input_ids, labels, document_ids, **context)
        supervised = labels != self.ignore_index
        texts, groups = input_ids.flatten()[None], torch.zeros_like(labels, dtype=torch.int64).flatten()
        if self.within_sequence:
            texts, groups = input_ids, sequence_groups(labels.shape, document_ids, labels.device)
        groups = torch.where(supervised.flatten(), groups, labels.numel())
        in_order = torch.argsort(groups, stable=True)
        shuffled = torch.argsort(_hash(texts, self.seed).flatten(), stable=True)
        shuffled = shuffled[torch.argsort(groups[shuffled], stable=True)]
        permuted = torch.empty_like(weights).flatten()
        permuted[shuffled] = weights.flatten()[in_order]
        permuted = permuted.view_as(weights)
        sums = WeightStatistics.of(permuted, supervised)
        return TokenWeights(permuted, replace(sums, clipped=statistics.clipped, neutral=statistics.neutral))


class RandomMatchedWeights(ShuffledWeights):
    """A scorer's weights, permuted among all supervised tokens of the batch.

    Arguments as of `ShuffledWeights`; the tokens of the whole batch determine the permutation.
    """

    within_sequence = False


def _hash(texts: Tensor, seed: int) -> Tensor:  # [R, T]
    """Hash every position of a text from its tokens up to there, its index and the seed; int64 overflow wraps."""
    index = torch.arange(texts.shape[1], device=texts.device)
    x = texts.long().cumsum(1) * 2654435761 + index * 40503 + seed * 97531 + 1
    # The mixing steps of splitmix64; its constants are odd 64-bit numbers.
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))
