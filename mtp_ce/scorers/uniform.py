"""The scorer that every other one is compared with: each supervised token weighs 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtp_ce.scorers.weights import TokenWeights, WeightStatistics


class UniformScorer:
    """Weight 1 at every supervised token and 0 elsewhere: ordinary, unweighted training.

    Args:
        ignore_index: the label of a token that is not supervised.

    Example:
        >>> tokens = torch.tensor([[5, 6, 7]])
        >>> UniformScorer().run(tokens, torch.tensor([[-100, 6, 7]])).weights
        tensor([[0., 1., 1.]])
    """

    def __init__(self, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index

    @torch.no_grad()
    def run(
        self,
        input_ids: Tensor,  # [B, S]
        labels: Tensor,  # [B, S]
        document_ids: Tensor | None = None,  # [B, S]
        **context: Any,
    ) -> TokenWeights:
        """Weigh the tokens of one batch.

        Args:
            input_ids: the tokens; a uniform weight does not look at them.
            labels: `input_ids` with `ignore_index` at the tokens that are not supervised, unshifted.
            document_ids: which document each token belongs to; not looked at either.
            **context: what other scorers need; not looked at.

        Returns:
            Weights [B, S] fp32 on the labels' device, *of the token standing there* (so the loss takes
            them with weight_alignment="target"), and their statistics. No host synchronisation.

        Raises:
            ValueError: input_ids and labels differ in shape.
        """
        if input_ids.shape != labels.shape:
            raise ValueError(
                f"labels is {list(labels.shape)}; expected the shape of input_ids, {list(input_ids.shape)}."
            )
        supervised = labels != self.ignore_index
        weights = supervised.to(torch.float32)
        return TokenWeights(weights, WeightStatistics.of(weights, supervised))
