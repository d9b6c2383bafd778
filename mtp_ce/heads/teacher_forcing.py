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

    def forward(self, hidden: Tensor, trunk: TrunkPass | None = None) -> list[Tensor]:
        """Return `hidden` in a list."""
        return [hidden]

    @classmethod
    def count_rows(cls, rows: Tensor, shift: int) -> Tensor | None:
        """See `Heads.count_rows`: one row for every token that a head predicts."""
        return sum_by_token(rows.int(), shift).count_nonzero()

    def loss(self, fused: FusedLoss, hidden: list[Tensor], inputs: LossInputs, options: LossOptions) -> HeadsLoss:
        """See `Heads.loss`.

        Raises:
            TypeError, ValueError: as `weighted_mtp_ce` of H heads.
        """
        H, (states,), labels = self.horizon, hidden, inputs.labels
        check_inputs(states, (states.shape[0], states.shape[1], H, states.shape[2]), inputs, options, "hidden")
        B, S = labels.shape
        target, _, valid = row_targets(
            labels, inputs.seq_lens, inputs.document_ids,
            H=H, shift=options.shift, ignore_index=options.ignore_index,
        )  # fmt: skip
        _, coefficient = row_coefficients(target, valid, inputs, options, torch.float32)
        # Row (t, h) has the logits of row (t + h, 0), which therefore collects the coefficients of up to H rows.
        weights = coefficient.new_zeros(B, S)
        for h in range(min(H, S)):
            weights = weights + F.pad(coefficient[:, : S - h, h], (h, 0))
        summed = replace(options, weight_alignment="position", head_reduction="live", reduction="sum")
        loss, stats = fused(hidden, LossInputs(labels, weights), summed)
        normalizer = count_terms(valid, options) if inputs.normalizer is None else inputs.normalizer
        if isinstance(normalizer, Tensor):
            # Without a valid row the sum is exactly 0, and so is the loss, even for a normalizer of 0.
            normalizer = torch.where(valid.any(), normalizer, 1)
        loss = loss / normalizer
        if stats is None:
            return HeadsLoss(loss, None)
        source = (target - options.shift).clamp(min=0)  # [S, H], the position whose next token is the target
        ce, lse = (torch.where(valid, x[:, source, 0], 0.0) for x in (stats.ce, stats.lse))
        return HeadsLoss(loss, MTPStats(ce, valid, lse, torch.where(valid, stats.top1[:, source, 0], -1)))
