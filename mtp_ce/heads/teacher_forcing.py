"""Heads without parameters: head h at position t is the model's own next-token head at position t + h.

The tokens in between are known in training, so that one next-token pass computes the losses of all heads, with other
weights:

    loss = 1/N sum_j c(j) ce(j)         c(j) = sum_h of the coefficients of valid rows (j - h, h)
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mtp_ce.checks import check_inputs
from mtp_ce.heads.protocol import FusedLoss, Heads, HeadsLoss
from mtp_ce.heads.trunk import TrunkPass
from mtp_ce.loss import MTPStats
from mtp_ce.ops.rows import count_terms, row_coefficients, row_targets, sum_by_token
from mtp_ce.options import LossInputs, LossOptions


class TeacherForcedHeads(Heads):
    """The model's own next-token head, at H positions. It cannot draft, for it needs the tokens in between."""

    kind = "teacher_forcing"
    drafts: ClassVar[bool] = False

    @property
    def output_count(self) -> int:
        """One: all heads read the same rows of logits."""
        return 1

    @property
    def label_halo(self) -> int:
        """One token: what comes after it is predicted from positions beyond the row."""
        return 1

    def forward(self, hidden: Tensor, trunk: TrunkPass | None = None) -> list[Tensor]:
        """Return `hidden` in a list."""
        return [hidden]

    @classmethod
    def count_rows(cls, rows: Tensor, shift: int) -> Tensor | None:
        """See `Heads.count_rows`: one row for every token that a head predicts."""
        # In its order the row of the token that shift skips to; none beyond the last position.
        return sum_by_token(rows.int(), shift, rows.shape[1] + shift).count_nonzero()

    def loss(self, fused: FusedLoss, hidden: list[Tensor], inputs: LossInputs, options: LossOptions) -> HeadsLoss:
        """See `Heads.loss`.

        Raises:
            TypeError, ValueError: as `weighted_mtp_ce` of H heads.
        """
        H, (states,), labels = self.horizon, hidden, inputs.labels
        check_inputs(states, (states.shape[0], states.shape[1], H, states.shape[2]), inputs, options, "hidden")
        B, S = states.shape[:2]
        target, _, valid = row_targets(inputs, options, S, H)
        _, coefficient = row_coefficients(target, valid, inputs, options, torch.float32)
        # Row (t, h) has the logits of row (t + h, 0), which therefore collects the coefficients of up to H rows.
        weights = coefficient.new_zeros(B, S)
        for h in range(min(H, S)):
            weights = weights + F.pad(coefficient[:, : S - h, h], (h, 0))
        summed = replace(options, weight_alignment="position", head_reduction="live", reduction="sum")
        loss, stats = fused(hidden, LossInputs(labels, weights), summed)
        normalizer = count_terms(valid, options, inputs) if inputs.normalizer is None else inputs.normalizer
        if isinstance(normalizer, Tensor):
            # Without a valid row the sum is exactly 0, and so is the loss, even for a normalizer of 0.
            normalizer = torch.where(valid.any(), normalizer, 1)
        loss = loss / normalizer
        if stats is None:
            return HeadsLoss(loss, None)
        # [S, H], the position whose next token is the target.
        source = (target - options.left_halo - options.shift).clamp(min=0)
        ce, lse = (torch.where(valid, x[:, source, 0], 0.0) for x in (stats.ce, stats.lse))
        return HeadsLoss(loss, MTPStats(ce, valid, lse, torch.where(valid, stats.top1[:, source, 0], -1)))
