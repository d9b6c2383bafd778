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
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

from mtp_ce.loss import MTPStats


class HeadMeans:
    """Numerator and denominator of every mean, over several batches.

    Args:
        horizon: H.
        drafts: whether the heads draft, so that their agreement with head 0 means something.
    """

    def __init__(self, horizon: int, drafts: bool) -> None:
        self.drafts = drafts and horizon > 1
        # In the same order on every rank, whatever it has added.
        self._names = {
            "ce": [f"ce_head_{h}" for h in range(horizon)],
            "agrees": [f"agrees_head_{h}" for h in range(1, horizon)] if self.drafts else [],
            "aux_loss": ["aux_loss"],
            "loss": ["loss"],
            "tokens": ["mean_token_accuracy", "entropy"],
        }
        self._sums: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Forget all rows."""
        self._sums = {}

    def _add(self, group: str, numerators: Tensor, denominators: Tensor) -> None:
        # MPS has no float64.
        dtype = torch.float32 if numerators.device.type == "mps" else torch.float64
        pairs = torch.stack([numerators.to(dtype), denominators.to(dtype)]).view(2, -1)
        self._sums[group] = self._sums[group] + pairs if group in self._sums else pairs

    @torch.no_grad()
    def add_heads(self, stats: MTPStats, aux_loss: Tensor | None = None) -> None:
        """Add the rows of all heads in one batch, like the others without a sync.

        Args:
            stats: of the loss.
            aux_loss: [], the routers' balancing loss.
        """
        read = stats.top1 >= 0
        rows = read.sum((0, 1))
        self._add("ce", stats.ce.sum((0, 1)), rows)
        if aux_loss is not None:
            self._add("aux_loss", aux_loss * rows[0], rows[0])
        if self.drafts:
            self._add("agrees", *_agreements(stats.top1, read))

    @torch.no_grad()
    def add_tokens(self, stats: MTPStats, next_labels: Tensor, entropy: Tensor) -> None:
        """Add head 0's rows of one batch.

        Args:
            stats: of the loss.
            next_labels: [B, S], labels of head 0's rows.
            entropy: [B, S], of head 0's distributions, 0 in rows without a target.
        """
        top1 = stats.top1[:, :, 0]
        read = top1 >= 0
        numerators = torch.stack([((top1 == next_labels) & read).sum().float(), entropy.sum()])
        self._add("tokens", numerators, torch.stack([read.sum(), stats.live[:, :, 0].sum()]))

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
        dtype = torch.float32 if device.type == "mps" else torch.float64
        nothing = {
            group: torch.zeros(2, len(names), dtype=dtype, device=device) for group, names in self._names.items()
        }
        numerators, denominators = sum_ranks(torch.cat([*(nothing | self._sums).values()], dim=1)).tolist()
        self.clear()
        names = chain.from_iterable(self._names.values())
        return {name: x / n for name, x, n in zip(names, numerators, denominators, strict=True) if n}


def _agreements(top1: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions where heads 1..h match head 0's later argmax, and those where they are compared: [H-1]."""
    S, H = top1.shape[1:]
    # later[t, h] is head 0's argmax at t + h, which predicts the same token as head h at t.
    position = torch.arange(S, device=top1.device)[:, None] + torch.arange(H, device=top1.device)
    later = F.pad(top1[:, :, 0], (0, H - 1), value=-1)[:, position]
    compared = (read & (later >= 0))[:, :, 1:].cumprod(-1)
    agree = (top1 == later)[:, :, 1:].cumprod(-1) * compared
    return agree.sum((0, 1)), compared.sum((0, 1))
