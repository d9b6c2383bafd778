"""Heads without parameters: head h at position t is the model's own next-token head at position t + h.

The tokens in between are known in training, so that one next-token pass computes the losses of all heads, with other
weights:

    loss = 1/N sum_j c(j) ce(j)         c(j) = sum_h w / K(j - h) over valid rows (j - h, h)
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mtp_ce.checks import check_normalizer, check_options, check_tensors
from mtp_ce.heads.protocol import FusedLoss, Heads, LossRule
from mtp_ce.heads.trunk import TrunkPass
from mtp_ce.loss import MTPLoss, MTPStats
from mtp_ce.ops.rows import row_coefficients, row_targets

IGNORE = -100


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

    def loss(
        self, fused: FusedLoss, hidden: list[Tensor], labels: Tensor, token_weights: Tensor | None, rule: LossRule
    ) -> MTPLoss:
        """See `Heads.loss`.

        Raises:
            TypeError, ValueError: as `weighted_mtp_ce` of H heads.
        """
        H, (states,) = self.horizon, hidden
        check_options(shift=rule.shift, weight_alignment=rule.weight_alignment)
        shape = (states.shape[0], states.shape[1], H, states.shape[2])
        check_tensors(
            states, shape, labels, token_weights, rule.weight_alignment, None, None, rule.document_ids, "hidden"
        )
        check_normalizer(rule.normalizer, "mean", states.device, "hidden")
        B, S = labels.shape
        target, _, valid = row_targets(labels, None, rule.document_ids, H=H, shift=rule.shift, ignore_index=IGNORE)
        _, coefficient = row_coefficients(
            target, valid, token_weights, None,
            over_horizon=False, target_weights=rule.weight_alignment == "target", dtype=torch.float32,
        )  # fmt: skip
        # Row (t, h) has the logits of row (t + h, 0), which therefore collects the coefficients of up to H rows.
        weights = coefficient.new_zeros(B, S)
        for h in range(min(H, S)):
            weights = weights + F.pad(coefficient[:, : S - h, h], (h, 0))
        loss, stats = fused(hidden, labels, weights, shift=rule.shift, reduction="sum")
        positions = valid.any(-1).sum().clamp(min=1) if rule.normalizer is None else rule.normalizer
        source = (target - rule.shift).clamp(min=0)  # [S, H], the position whose next token is the target
        ce, lse = (torch.where(valid, x[:, source, 0], 0.0) for x in (stats.ce, stats.lse))
        return MTPLoss(loss / positions, MTPStats(ce, valid, lse, torch.where(valid, stats.top1[:, source, 0], -1)))
