"""Cross entropy of every token under a causal language model.

    ce[i] = -log p(token i | tokens before i)           nats

A model's hidden state at t scores the token at t + 1, so the values are shifted by one position to the right. A common
mistake of token weighting is to leave them at the position that computed them, and so to weight the wrong token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtp_ce.linear import token_ce, weighted_mtp_linear_ce
from mtp_ce.loss import MTPStats
from mtp_ce.unembedding import Unembedding
from mtp_ce.vocabulary import linear, whole

# fp32 logits of one chunk of rows.
ENTROPY_CHUNK_BYTES = 64 * 2**20


class NextToken(NamedTuple):
    """A causal language model's next-token head on one batch, and the heads that draft, without their logits."""

    hidden: Tensor  # [B, S, D]; position t predicts token t + 1
    unembed: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    # H - 1 tensors [B, S, D]: position t of head h predicts token t + 1 + h. None where no head drafts.
    drafting: tuple[Tensor, ...] = ()

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None) -> NextToken:
        """Run a Hugging Face causal language model up to its last hidden state.

        Args:
            model: has `base_model` and `get_output_embeddings()`; its configuration's final softcap and logit scale
                are applied.
            input_ids: [B, S].
            position_ids: [B, S], restarting at every document of a packed row; None where rows are not packed.

        Raises:
            TypeError: the model has no output embeddings, so it can't predict tokens.
        """
        output = Unembedding.of(model)
        options = {} if position_ids is None else {"position_ids": position_ids}
        base: Any = model.base_model
        hidden = base(input_ids=input_ids, use_cache=False, **options).last_hidden_state
        return cls(output.scaled(hidden), output.weight, output.bias, output.softcap)

    def token_ce(self, labels: Tensor, document_ids: Tensor | None = None, ignore_index: int = -100) -> Tensor:
        """Return the cross entropy [B, S] fp32 of the token at each position, detached.

        NaN where the label is `ignore_index`, and at the first token of a row or document, which nothing predicts.
        """
        B, S = labels.shape
        predicting = token_ce(
            self.hidden, self.unembed, labels,
            bias=self.bias, softcap=self.softcap, document_ids=document_ids, ignore_index=ignore_index,
        )  # fmt: skip
        predicted = labels[:, 1:] != ignore_index
        if document_ids is not None:
            predicted = predicted & (document_ids[:, 1:] == document_ids[:, :-1])
        ce = predicting.new_full((B, S), torch.nan)
        ce[:, 1:] = torch.where(predicted, predicting[:, :-1], torch.nan)
        return ce

    @torch.no_grad()
    def rows(self, labels: Tensor, document_ids: Tensor | None = None, ignore_index: int = -100) -> MTPStats:
        """Return cross entropy and argmax [B, S, H] of every head at its rows with a target.

        One more pass over the output layer, a chunk of logits at a time: 2 H V D FLOPs a position, a third of what the
        loss computes of heads and output layer that are trained.

        Args:
            labels: [B, S], unshifted.
            document_ids: [B, S]; a row has no target in another document.
            ignore_index: the label of tokens that are not targets.
        """
        return weighted_mtp_linear_ce(
            [self.hidden, *self.drafting], self.unembed, labels,
            bias=self.bias, softcap=self.softcap, document_ids=document_ids, ignore_index=ignore_index,
            reduction="sum", return_stats=True,
        ).stats  # fmt: skip

    @torch.no_grad()
    def entropy(self, rows: Tensor) -> Tensor:
        """Return the entropy [B, S] fp32, nats, of the predicted distributions in `rows`; 0 in all others.

        Args:
            rows: [B, S] bool. On a GPU all rows are computed, because counting them would synchronise.
        """
        hidden = self.hidden.flatten(0, 1)
        if compact := not hidden.is_cuda:
            hidden = hidden[rows.flatten()]
        count = max(1, ENTROPY_CHUNK_BYTES // (4 * self.unembed.shape[0]))
        chunks = [self._entropies(chunk) for chunk in hidden.split(count)]
        entropies = torch.cat(chunks) if chunks else hidden.new_zeros(0, dtype=torch.float32)
        if compact:
            return entropies.new_zeros(rows.shape).masked_scatter(rows, entropies)
        return torch.where(rows, entropies.view(rows.shape), 0.0)

    def _entropies(self, hidden: Tensor) -> Tensor:
        logits = whole(linear(hidden, self.unembed, self.bias)).float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return torch.special.entr(logits.softmax(-1)).sum(-1)
