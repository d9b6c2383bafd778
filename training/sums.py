"""What a run reports about its heads, kept as sums on the device and divided once, at the end.

A mean over batches of means over rows is wrong as soon as two batches differ in live rows, and every
division on the host would wait for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_ce.loss import MTPStats


@dataclass
class HeadSums:
    """Sums over the rows (b, t) that a loss has read, per head.

    Attributes:
        ce: [H] fp64, total cross entropy in nats.
        hits: [H] int64, rows whose most likely token is the target.
        rows: [H] int64, rows read: live, and of a weight other than 0.
    """

    ce: Tensor
    hits: Tensor
    rows: Tensor

    @classmethod
    def zeros(cls, horizon: int, device: torch.device) -> HeadSums:
        """Start with nothing counted."""
        return cls(
            ce=torch.zeros(horizon, dtype=torch.float64, device=device),
            hits=torch.zeros(horizon, dtype=torch.int64, device=device),
            rows=torch.zeros(horizon, dtype=torch.int64, device=device),
        )

    def add(self, stats: MTPStats, labels: Tensor) -> None:  # labels [B, S], unshifted
        """Count one batch, without a host synchronisation."""
        read = stats.live & (stats.top1 >= 0)  # [B, S, H]
        self.ce += stats.ce.sum((0, 1), dtype=torch.float64)
        self.rows += read.sum((0, 1))
        for h in range(read.shape[2]):
            target = labels[:, h + 1 :]
            hit = read[:, : target.shape[1], h] & (stats.top1[:, : target.shape[1], h] == target)
            self.hits[h] += hit.sum()

    def merge(self, other: HeadSums) -> None:
        """Add what another one has counted."""
        self.ce += other.ce
        self.hits += other.hits
        self.rows += other.rows

    def results(self) -> list[HeadResult]:
        """Divide; waits for the device."""
        sums = zip(self.ce.tolist(), self.hits.tolist(), self.rows.tolist(), strict=True)
        return [HeadResult(ce / max(rows, 1), hits / max(rows, 1), rows) for ce, hits, rows in sums]

    def ce_mean(self) -> float:
        """Mean cross entropy over the rows of all heads together, nats; waits for the device."""
        return self.ce.sum().item() / max(int(self.rows.sum().item()), 1)


@dataclass(frozen=True)
class HeadResult:
    """How one head did.

    Attributes:
        ce: mean cross entropy, nats per row.
        top1: share of rows whose most likely token is the target.
        rows: how many rows that is the mean of.
    """

    ce: float
    top1: float
    rows: int

    @property
    def perplexity(self) -> float:
        """Perplexity, the exponential of the cross entropy; infinite where that overflows."""
        return math.exp(self.ce) if self.ce < 700 else math.inf
