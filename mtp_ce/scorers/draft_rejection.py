"""Draft rejection: the accepted tokens that speculative decoding loses by a wrong draft of a token.

    match(t,h) = [argmax z_h(t) = argmax z_0(t+h)]         draft of head h at t, and the trunk's own token t+1+h
    length(t)  = sum_{k=1..K} prod_{i=1..k} match(t,i)     drafts accepted after position t, K = H - 1
    lost(t,h)  = length(t) with match(t,h) = 1, minus length(t)
    score[j]   = sum_{h=1..K} lost(j-1-h, h)               over the heads that draft token j

Greedy verification accepts drafts up to the first that differs from the trunk's own token. Only that first one loses
anything by itself, one token and the matching drafts behind it: lost(t,h) is in 0 .. K-h+1, and a mistake at an early
depth costs more. The mean of 1 + length(t) is the mean accepted length.

The trunk's own token is head 0's argmax on the text of the batch. Where the trunk would have written that text, this
is what an engine counts; elsewhere it is an estimate. A depth whose target is masked, or is in another document, ends
the round without a rejection.

The score is our own. Source of the rule of acceptance: arXiv:2211.17192, section 2.3, at temperature 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mtp_ce.loss import MTPStats
from mtp_ce.next_token import NextToken
from mtp_ce.scorers.normalize import check_normalization, normalize_weights
from mtp_ce.scorers.weights import TokenWeights


class DraftRejectionScorer:
    """Weights from the accepted tokens that wrong drafts of a token lose.

    It reads the heads of the forward that is trained, and computes no second one: its cost is one pass over the output
    layer for all heads, see `NextToken.rows`.

    Args:
        ignore_index: the label of a token that is not supervised.
        **normalization: options of `normalize_weights`.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> hidden = torch.eye(4)[None, [1, 2, 3, 0]]  # head 0 predicts tokens 1, 2, 3, 0
        >>> second = torch.eye(4)[None, [2, 0, 0, 0]]  # head 1 drafts 2 (right), then 0 in place of 3
        >>> current = NextToken(hidden, torch.eye(4), drafting=(second,))
        >>> tokens = torch.arange(4)[None]
        >>> DraftRejectionScorer().explain(tokens, tokens, current=current)["score"]
        tensor([[nan, 0., 0., 1.]])
    """

    def __init__(self, *, ignore_index: int = -100, **normalization: Any) -> None:
        check_normalization(**normalization)
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
        """Return score and rejected, the number of rounds that a draft of the token ends, [B, S] fp32.

        NaN where nothing predicts the token, and where a head of a round is not finite. A token that no head drafts,
        the second one of a document, has score 0. Arguments as in `run`.
        """
        stats = current.rows(labels, document_ids, self.ignore_index)
        predicted = labels != self.ignore_index
        predicted[:, :1] = False
        if document_ids is not None:
            predicted[:, 1:] &= document_ids[:, 1:] == document_ids[:, :-1]
        lost = lost_tokens(stats)
        parts = {"score": lost, "rejected": torch.where(lost > 0, 1.0, lost)}
        return {name: torch.where(predicted, _by_token(part), torch.nan) for name, part in parts.items()}

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
        """Compute the weights of one batch; arguments and results as in `Rho1ExcessScorer.run`.

        `current` has the heads that draft: what `MTPWrapper` passes to a function in the place of token weights, and
        `MTPWrapper.next_token` returns.

        Raises:
            ValueError: `current` is missing, or has no heads that draft.
        """
        if current is None or not current.drafting:
            what = "None" if current is None else "a NextToken without heads that draft"
            raise ValueError(
                f"current is {what}; expected the model's heads on this batch, as MTPWrapper passes them to a function "
                "token_weights: heads that draft, and a horizon of at least 2."
            )
        scores = self.explain(input_ids, labels, document_ids, position_ids=position_ids, current=current)
        supervised = labels != self.ignore_index
        return normalize_weights(scores["score"], supervised, document_ids=document_ids, **self.normalization)


def lost_tokens(stats: MTPStats) -> Tensor:
    """Return lost(t,h) [B, S, H] fp32 of the module's comment, 0 for head 0, NaN in a round that is not finite.

    Args:
        stats: of all heads' rows, without weights.
    """
    top1, live, finite = stats.top1, stats.live, stats.ce.isfinite()
    compared = (live & _later(live)).cumprod(-1).bool()
    match = compared & (top1 == _later(top1))
    H = top1.shape[-1]
    behind = torch.zeros_like(stats.ce, dtype=torch.float32)  # matching drafts right after h
    for h in reversed(range(H - 1)):
        behind[..., h] = torch.where(match[..., h + 1], 1 + behind[..., h + 1], 0.0)
    accepted = F.pad(match.cumprod(-1).bool()[..., :-1], (1, 0), value=True)
    lost = torch.where(compared & accepted & ~match, 1 + behind, 0.0)
    broken = (compared & ~(finite & _later(finite))).any(-1, keepdim=True)
    return torch.where(broken & compared, torch.nan, lost)


def _later(rows: Tensor) -> Tensor:  # [B, S, H]
    """Return head 0's row at t + h, which predicts the same token as head h at t; the last row beyond the end."""
    S, H = rows.shape[1:]
    position = torch.arange(S, device=rows.device)[:, None] + torch.arange(H, device=rows.device)
    return rows[:, :, 0][:, position.clamp(max=S - 1)]


def _by_token(lost: Tensor) -> Tensor:  # [B, S, H] -> [B, S]
    """Sum over the heads that draft a token."""
    S, H = lost.shape[1:]
    total = lost.new_zeros(lost.shape[:2])
    for h in range(1, min(H, S - 1)):
        total[:, 1 + h :] += lost[:, : S - 1 - h, h]
    return total
