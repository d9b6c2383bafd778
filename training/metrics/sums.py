"""What training reports about its heads, kept as sums on the device and divided once, at the end.

A mean over batches of means over rows is wrong as soon as two batches differ in live rows, and every
division on the host would wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_ce.loss import MTPStats


@dataclass
class HeadSums:
    """Sums over the rows (b, t) that a loss has read, per head.

    Attributes:
        ce: [H] fp64, total cross entropy in nats.
        rows: [H] int64, rows read: live, and of a weight other than 0.
    """

    ce: Tensor
    rows: Tensor

    @classmethod
    def zeros(cls, horizon: int, device: torch.device) -> HeadSums:
        """Start with nothing counted."""
        return cls(
            ce=torch.zeros(horizon, dtype=torch.float64, device=device),
            rows=torch.zeros(horizon, dtype=torch.int64, device=device),
        )

    def add(self, stats: MTPStats) -> None:
        """Count one batch, without a host synchronisation."""
        self.ce += stats.ce.sum((0, 1), dtype=torch.float64)
        self.rows += (stats.live & (stats.top1 >= 0)).sum((0, 1))

    def merge(self, other: HeadSums) -> None:
        """Add what another one has counted."""
        self.ce += other.ce
        self.rows += other.rows

    def ce_of_heads(self) -> list[float]:
        """Mean cross entropy of each head, nats; waits for the device."""
        return (self.ce / self.rows.clamp(min=1)).tolist()

    def ce_mean(self) -> float:
        """Mean cross entropy over the rows of all heads together, nats; waits for the device."""
        return self.ce.sum().item() / max(int(self.rows.sum().item()), 1)
