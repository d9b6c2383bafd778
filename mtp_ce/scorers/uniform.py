"""The baseline of all scorers: every supervised token has weight 1."""

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
        """Compute the weights of one batch.

        Args:
            input_ids: the tokens; only their shape is used.
            labels: `input_ids` with `ignore_index` at the tokens that are not supervised, unshifted.
            document_ids: which document each token belongs to; not used.
            **context: arguments of other scorers; not used.

        Returns:
            Weights [B, S] fp32 on the labels' device, *of the token at each position* (so the loss takes
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
