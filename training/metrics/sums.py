"""Cross entropies of the heads during training, accumulated as sums on the device and divided once.

A mean over batches of means over rows is wrong as soon as two batches differ in valid rows, and every division on the
host would synchronise with the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_ce.loss import MTPStats


@dataclass
class HeadSums:
    """Sums per head over the rows (b, t) that the loss has computed.

    Attributes:
        ce: [H] fp64, total cross entropy in nats.
        rows: [H] int64, number of rows that are valid and have a nonzero weight.
    """

    ce: Tensor
    rows: Tensor

    @classmethod
    def zeros(cls, horizon: int, device: torch.device) -> HeadSums:
        """Return sums of zero."""
        return cls(
            ce=torch.zeros(horizon, dtype=torch.float64, device=device),
            rows=torch.zeros(horizon, dtype=torch.int64, device=device),
        )

    def add(self, stats: MTPStats) -> None:
        """Add one batch, without a host synchronisation."""
        self.ce += stats.ce.sum((0, 1), dtype=torch.float64)
        self.rows += (stats.live & (stats.top1 >= 0)).sum((0, 1))

    def merge(self, other: HeadSums) -> None:
        """Add other sums."""
        self.ce += other.ce
        self.rows += other.rows

    def ce_of_heads(self) -> list[float]:
        """Return the mean cross entropy of each head, nats, NaN for one without rows; synchronises with the device."""
        return (self.ce / self.rows).tolist()

    def ce_mean(self) -> float:
        """Return the mean cross entropy over the rows of all heads, nats, NaN without rows; synchronises."""
        return (self.ce.sum() / self.rows.sum()).item()
