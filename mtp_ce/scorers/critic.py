"""Critic scores: the change of a critic's value, the expected outcome, at every token.

    s[i] = gamma V[i] - V[i-1]                V[i]: value after token i
    A[i] = s[i] + gamma lambda A[i+1]         inside a document, where lambda is given

Source: generalised advantage estimation, arXiv:1506.02438, equation 16, with the reward in the values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mtp_ce.next_token import NextToken
from mtp_ce.scorers.normalize import check_normalization, normalize_weights
from mtp_ce.scorers.weights import TokenWeights


class CriticDeltaScorer:
    """Weights from the change of a value at every token.

    Args:
        critic: called with input_ids [B, S] (and position_ids where they are present), returns values [B, S] or
            [B, S, 1], or an output with these as `.logits`, such as transformers' AutoModelForTokenClassification with
            num_labels=1. It is put into eval mode, and its parameters are frozen.
        gamma: discount of the next value, 0 < gamma <= 1.
        gae_lambda: 0 (only the change at the token itself) to 1 (all later changes too).
        ignore_index: the label of a token that is not supervised.
        **normalization: options of `normalize_weights`.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        critic: nn.Module,
        *,
        gamma: float = 1.0,
        gae_lambda: float = 0.0,
        ignore_index: int = -100,
        **normalization: Any,
    ) -> None:
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma is {gamma}; expected a discount in (0, 1].")
        if not 0 <= gae_lambda <= 1:
            raise ValueError(f"gae_lambda is {gae_lambda}; expected a number in [0, 1].")
        check_normalization(**normalization)
        self.critic = critic.eval().requires_grad_(False)
        self.gamma, self.gae_lambda = gamma, gae_lambda
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
        current: NextToken | None = None,
    ) -> dict[str, Tensor]:
        """Return score and value of the token at each position, [B, S] fp32, from which the weights are computed.

        The score is the change of the value, NaN at the first token of a row or document; the first supervised
        token of a document is compared with the last prompt token before it. Arguments as in `run`.
        """
        values = self._values(input_ids, position_ids)
        B, S = input_ids.shape
        inside = torch.ones(B, max(S - 1, 0), dtype=torch.bool, device=values.device)
        if document_ids is not None:
            inside = document_ids[:, 1:] == document_ids[:, :-1]
        change = values.new_full((B, S), torch.nan)
        change[:, 1:] = torch.where(inside, self.gamma * values[:, 1:] - values[:, :-1], torch.nan)
        if self.gae_lambda == 0:
            return {"score": change, "value": values}
        # Backwards through the row; tokens past a border, or unsupervised ones, add nothing.
        decay, later = self.gamma * self.gae_lambda, values.new_zeros(B)
        columns = []
        for i in reversed(range(S)):
            same = inside[:, i] if i < S - 1 else torch.zeros(B, dtype=torch.bool, device=values.device)
            advantage = change[:, i] + torch.where(same, decay * later, 0.0)
            columns.append(advantage)
            later = torch.where(labels[:, i] == self.ignore_index, 0.0, advantage)
        return {"score": torch.stack(columns[::-1], 1) if columns else change, "value": values}

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
        """Compute the weights of one batch; arguments and results as in `Rho1ExcessScorer.run`, `current` is not used.

        Raises:
            TypeError, ValueError: the critic returns no values, or values of another shape.
        """
        scores = self.explain(input_ids, labels, document_ids, position_ids=position_ids)
        supervised = labels != self.ignore_index
        return normalize_weights(scores["score"], supervised, document_ids=document_ids, **self.normalization)

    def _values(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        options: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
        if getattr(getattr(self.critic, "config", None), "use_cache", False):
            # transformers separates the documents of a packed row only where it builds no cache.
            options["use_cache"] = False
        output = self.critic(input_ids, **options)
        values = getattr(output, "logits", output)
        if not isinstance(values, Tensor):
            raise TypeError(f"critic returns {type(output).__name__}; expected values [B, S] or an output with logits.")
        if values.dim() == 3 and values.shape[2] == 1:
            values = values[:, :, 0]
        if values.shape != input_ids.shape:
            raise ValueError(
                f"critic returns {list(values.shape)}; expected one value per token, {list(input_ids.shape)}: a value "
                "head of width 1."
            )
        return values.float()
