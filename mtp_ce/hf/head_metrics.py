"""What a trainer logs of the heads: sums over rows on their device, read once for each log.

    ce_head_h      mean cross entropy of head h, nats per row
    agrees_head_h  ratio of positions where heads 1..h match head 0's argmax 1..h tokens later, of those where all of
                   these are read; for heads that draft
    aux_loss       the routers' balancing loss without its coefficient, weighted by the rows of head 0
    loss           in evaluation: sum of the loss / its tokens
    mean_token_accuracy, entropy    of head 0's rows, as TRL's SFTTrainer logs them

Rows are those with a target and a weight other than 0. Micro-batches, steps and ranks add their sums: no mean of means.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mtp_ce.loss import MTPStats


class HeadSums:
    """Numerator and denominator of every mean, over several batches.

    Args:
        horizon: H.
        drafts: whether the heads draft, so that their agreement with head 0 means something.
    """

    def __init__(self, horizon: int, drafts: bool) -> None:
        self.drafts = drafts
        agreements = [f"agrees_head_{h}" for h in range(1, horizon)] if drafts else []
        # In the same order on every rank, whatever it has added.
        of_heads = [f"ce_head_{h}" for h in range(horizon)] + agreements
        self._names = [*of_heads, "aux_loss", "loss", "mean_token_accuracy", "entropy"]
        self._sums: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Forget all rows."""
        self._sums = {}

    def _add(self, name: str, numerator: Tensor, denominator: Tensor) -> None:
        # MPS has no float64.
        dtype = torch.float32 if numerator.device.type == "mps" else torch.float64
        pair = torch.stack([numerator.detach().to(dtype), denominator.to(numerator.device, dtype)])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    @torch.no_grad()
    def add_heads(self, stats: MTPStats, aux_loss: Tensor | None = None) -> None:
        """Add the rows of all heads in one batch, like the others without a sync.

        Args:
            stats: of the loss.
            aux_loss: [], the routers' balancing loss.
        """
        read = stats.top1 >= 0
        S, H = read.shape[1:]
        rows, ce = read.sum((0, 1)), stats.ce.sum((0, 1))
        for h in range(H):
            self._add(f"ce_head_{h}", ce[h], rows[h])
        if aux_loss is not None:
            self._add("aux_loss", aux_loss * rows[0], rows[0])
        if not self.drafts:
            return
        agree = compared = torch.ones_like(read[:, :, 0])
        for h in range(1, H):
            # Head 0's argmax at t + h, which predicts the same token as head h at t.
            later = F.pad(stats.top1[:, h:, 0], (0, min(h, S)), value=-1)
            compared = compared & read[:, :, h] & (later >= 0)
            agree = agree & compared & (stats.top1[:, :, h] == later)
            self._add(f"agrees_head_{h}", agree.sum(), compared.sum())

    @torch.no_grad()
    def add_tokens(self, stats: MTPStats, next_labels: Tensor, entropy: Tensor) -> None:
        """Add head 0's rows of one batch.

        Args:
            stats: of the loss.
            next_labels: [B, S], labels of head 0's rows.
            entropy: [B, S], of head 0's distributions, 0 in rows without a target.
        """
        top1 = stats.top1[:, :, 0]
        rows = (top1 >= 0).sum()
        self._add("mean_token_accuracy", ((top1 == next_labels) & (top1 >= 0)).sum(), rows)
        self._add("entropy", entropy.sum(), stats.live[:, :, 0].sum())

    @torch.no_grad()
    def add_loss(self, loss: Tensor, tokens: Tensor, finite_only: bool) -> None:
        """Add the loss of one batch.

        Args:
            loss: [], a mean over `tokens`.
            tokens: [], their number.
            finite_only: leave out a batch whose loss is not finite.
        """
        total = loss * tokens
        if finite_only:
            total, tokens = (torch.where(loss.isfinite(), x, 0) for x in (total, tokens))
        self._add("loss", total, tokens)

    def take(self, device: torch.device, sum_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the means by name, without those that have no rows, and forget the rows; synchronises.

        Args:
            device: for a rank that has added nothing.
            sum_ranks: sums a tensor over the ranks.
        """
        nothing = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        sums = torch.stack([self._sums.get(name, nothing) for name in self._names])
        self.clear()
        pairs = zip(self._names, sum_ranks(sums).tolist(), strict=True)
        return {name: numerator / denominator for name, (numerator, denominator) in pairs if denominator}
