"""Rho-1 excess loss: the model's cross entropy of a token less that of a reference model (arXiv:2404.07965).

    s[i] = ce_model(i) - ce_reference(i)           nats, signed, of token i

Positive: the reference predicts the token better, so that it can still be learned. Near zero: learned already, or noise
that the reference can't predict either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mtp_ce.next_token import NextToken
from mtp_ce.scorers.normalize import check_normalization, normalize_weights
from mtp_ce.scorers.weights import TokenWeights
from mtp_ce.unembedding import Unembedding


class Rho1ExcessScorer:
    """Weights from the excess loss of the model over a frozen reference.

    Args:
        reference: a Hugging Face causal language model of the same vocabulary; it is put into eval mode, and its
            parameters are frozen.
        ignore_index: the label of a token that is not supervised.
        **normalization: options of `normalize_weights`: mode "softmax" or "topk", temperature, eps, w_max,
            top_fraction, scope, group.

    Raises:
        TypeError, ValueError: the reference can't predict tokens, its logits are more than a linear layer, a scale and
            a softcap, or an option is out of its range.

    Source: arXiv:2404.07965, equations 2 and 3.
    """

    def __init__(self, reference: nn.Module, *, ignore_index: int = -100, **normalization: Any) -> None:
        if getattr(reference, "get_output_embeddings", lambda: None)() is None:
            raise TypeError(
                f"reference is {type(reference).__name__} without output embeddings; expected a causal language model."
            )
        Unembedding.checked(reference)
        check_normalization(**normalization)
        self.reference = reference.eval().requires_grad_(False)
        self.ignore_index = ignore_index
        self.normalization = normalization

    @torch.no_grad()
    def explain(
        self,
        input_ids: Tensor,  # [B, S]
        labels: Tensor,  # [B, S]
        document_ids: Tensor | None = None,  # [B, S]
        *,
        position_ids: Tensor | None = None,  # [B, S]
        current: NextToken,
    ) -> dict[str, Tensor]:
        """Return score, ce and reference_ce of the token at each position, [B, S] fp32, nats.

        NaN where nothing predicts the token. Arguments as in `run`.
        """
        reference = NextToken.of(self.reference, input_ids, position_ids)
        if reference.unembed.shape[0] != current.unembed.shape[0]:
            raise ValueError(
                f"reference has V = {reference.unembed.shape[0]} entries and the model {current.unembed.shape[0]}; "
                "expected one vocabulary: excess losses of different tokens don't compare."
            )
        ours, theirs = (x.token_ce(labels, document_ids, self.ignore_index) for x in (current, reference))
        return {"score": ours - theirs, "ce": ours, "reference_ce": theirs}

    @torch.no_grad()
    def run(
        self,
        input_ids: Tensor,  # [B, S]
        labels: Tensor,  # [B, S]
        document_ids: Tensor | None = None,  # [B, S]
        *,
        position_ids: Tensor | None = None,  # [B, S]
        current: NextToken | None = None,
    ) -> TokenWeights:
        """Compute the weights of one batch.

        Args:
            input_ids: the tokens.
            labels: `input_ids` with `ignore_index` at the tokens that are not supervised, unshifted.
            document_ids: borders in packed rows; a document's weights don't depend on its neighbours.
            position_ids: restarting at every document, so that the reference's attention stays inside it.
            current: the model's own next-token head on this batch: `NextToken.of(model, input_ids)`, or built from
                hidden states that are already computed.

        Returns:
            Weights [B, S] fp32 of the token at each position (weight_alignment="target"), and their statistics.
            The first token of a row or document has no score and gets the neutral weight 1, which is not counted.

        Raises:
            ValueError: `current` is missing, or of another vocabulary than the reference.
        """
        if current is None:
            raise ValueError(
                "current is None; expected the model's NextToken on this batch, to compare with the reference."
            )
        scores = self.explain(input_ids, labels, document_ids, position_ids=position_ids, current=current)
        supervised = labels != self.ignore_index
        return normalize_weights(scores["score"], supervised, document_ids=document_ids, **self.normalization)
