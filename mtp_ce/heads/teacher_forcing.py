"""Heads without parameters: head h is the model's own next-token head, h tokens further on.

The tokens in between are given, so one next-token pass has the losses of all heads, with other weights:

    loss = 1/N sum_j c(j) ce(j)         c(j) = sum_h w / K(j - h) over live (j - h, h)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mtp_ce.checks import check_inputs
from mtp_ce.loss import MTPLoss, MTPStats
from mtp_ce.ops.rows import row_coefficients, row_targets
from mtp_ce.options import LossInputs, LossOptions

IGNORE = -100


def teacher_forced(
    next_token_loss: Callable[[Tensor], MTPLoss],
    hidden: Tensor,  # [B, S, D]
    labels: Tensor,  # [B, S]
    token_weights: Tensor | None,  # [B, S] or [B, S, H]
    *,
    H: int,
    shift: int,
    weight_alignment: str,
    document_ids: Tensor | None,  # [B, S]
    normalizer: float | Tensor | None,
) -> MTPLoss:
    """Give the loss of H such heads, with statistics of all of them.

    Args:
        next_token_loss: of weights [B, S] of the positions: the loss of the one pass, summed.
        hidden: what that pass reads.
        labels: as in `weighted_mtp_ce`, like all that follow.
        token_weights: of the tokens or the rows.
        H: the number of heads.
        shift: 1, or 0 for labels that are shifted already.
        weight_alignment: "target" or "position".
        document_ids: borders that no head looks across.
        normalizer: what the sum is divided by; None means the positions with a target.

    Raises:
        TypeError, ValueError: as `weighted_mtp_ce` of H heads.
    """
    options = LossOptions(shift=shift, weight_alignment=weight_alignment)
    inputs = LossInputs(labels, token_weights, document_ids=document_ids, normalizer=normalizer)
    shape = (hidden.shape[0], hidden.shape[1], H, hidden.shape[2])
    check_inputs(hidden, shape, inputs, options, "hidden")
    B, S = labels.shape
    place, _, live = row_targets(labels, None, document_ids, H=H, shift=shift, ignore_index=IGNORE)
    _, coefficient = row_coefficients(place, live, inputs, options, torch.float32)
    moved = coefficient.new_zeros(B, S)
    for h in range(min(H, S)):
        moved = moved + F.pad(coefficient[:, : S - h, h], (h, 0))
    loss, stats = next_token_loss(moved)
    positions = live.any(-1).sum().clamp(min=1) if normalizer is None else normalizer
    source = (place - shift).clamp(min=0)  # [S, H], the position whose next token is the target
    ce, lse = (torch.where(live, part[:, source, 0], 0.0) for part in (stats.ce, stats.lse))
    return MTPLoss(loss / positions, MTPStats(ce, live, lse, torch.where(live, stats.top1[:, source, 0], -1)))
