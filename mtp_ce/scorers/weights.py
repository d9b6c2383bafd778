"""The output of a scorer: token weights, and their statistics as sums, which can be added over batches.

    mean = sum w / n        ess = (sum w)^2 / (n sum w^2)       over the n supervised tokens

ess is the effective sample size as a fraction of n: 1 when all weights are equal, 1/n when one token has all the
weight. With mean(w) = 1 it is 1 / mean(w^2). A mean of means is wrong as soon as batches differ in n, so sums are
stored, and `merge` adds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mtp_ce.next_token import NextToken


@dataclass(frozen=True, slots=True)
class WeightStatistics:
    """Sums over the supervised tokens of one or more batches: 0-d tensors on the weights' device.

    Attributes:
        count: n, supervised tokens, int64.
        total: sum of w, fp32.
        total_squares: sum of w^2, fp32.
        lowest: smallest w, fp32; +inf where there is no supervised token.
        highest: largest w, fp32; -inf where there is no supervised token.
        clipped: tokens whose weight is at a bound of the scorer, int64.
        neutral: tokens with weight 1 because their score was not finite, int64; the first token of a row or document,
            which nothing predicts, is not counted.
    """

    count: Tensor
    total: Tensor
    total_squares: Tensor
    lowest: Tensor
    highest: Tensor
    clipped: Tensor
    neutral: Tensor

    @classmethod
    def of(
        cls, weights: Tensor, supervised: Tensor, clipped: Tensor | None = None, neutral: Tensor | None = None
    ) -> WeightStatistics:
        """Sum over one batch, without a host synchronisation.

        Args:
            weights: [B, S] fp32.
            supervised: [B, S] bool.
            clipped: [B, S] bool, the tokens at a bound of the scorer; None means none of them.
            neutral: [B, S] bool, the tokens without a finite score that should have one; None means none of them.
        """
        w = torch.where(supervised, weights, 0.0)
        # amin of an empty tensor raises; one extra infinite element prevents that and never changes the result.
        edge = weights.new_full((1,), float("inf"))
        none = supervised.new_zeros((), dtype=torch.int64)
        return cls(
            count=supervised.sum(),
            total=w.sum(),
            total_squares=w.square().sum(),
            lowest=torch.cat([torch.where(supervised, weights, edge).flatten(), edge]).amin(),
            highest=torch.cat([torch.where(supervised, weights, -edge).flatten(), -edge]).amax(),
            clipped=none if clipped is None else (clipped & supervised).sum(),
            neutral=none if neutral is None else (neutral & supervised).sum(),
        )

    def merge(self, other: WeightStatistics) -> WeightStatistics:
        """Return the statistics of both batches together."""
        return WeightStatistics(
            count=self.count + other.count,
            total=self.total + other.total,
            total_squares=self.total_squares + other.total_squares,
            lowest=torch.minimum(self.lowest, other.lowest),
            highest=torch.maximum(self.highest, other.highest),
            clipped=self.clipped + other.clipped,
            neutral=self.neutral + other.neutral,
        )

    @property
    def mean(self) -> Tensor:
        """Mean weight of a supervised token; 0 where there is none."""
        return self.total / self.count.clamp(min=1)

    @property
    def min(self) -> Tensor:
        """Smallest weight of a supervised token; 0 where there is none."""
        return torch.where(self.count > 0, self.lowest, 0.0)

    @property
    def max(self) -> Tensor:
        """Largest weight of a supervised token; 0 where there is none."""
        return torch.where(self.count > 0, self.highest, 0.0)

    @property
    def ess(self) -> Tensor:
        """Effective sample size as a fraction of the supervised tokens, 0..1; 0 where all weights are 0."""
        mean_square = self.total_squares / self.count.clamp(min=1)
        return torch.where(self.total_squares > 0, self.mean.square() / mean_square, 0.0)


class TokenWeights(NamedTuple):
    """The weights of one batch."""

    weights: Tensor  # [B, S] fp32, detached, of the token at each position; 0 where it is not supervised
    statistics: WeightStatistics


class Scorer(Protocol):
    """Computes token weights for a batch."""

    def run(
        self,
        input_ids: Tensor,
        labels: Tensor,
        document_ids: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        current: NextToken | None = None,
    ) -> TokenWeights:
        """Compute the weights of one batch [B, S]; see `Rho1ExcessScorer.run` for the arguments."""
        ...
