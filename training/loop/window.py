"""Metrics of the steps since the last line of metrics, kept as sums and divided once."""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_ce.scorers.weights import WeightStatistics
from mtp_ce.training.loop.ranks import Ranks
from mtp_ce.training.metrics.noise import NoiseSums
from mtp_ce.training.metrics.sums import HeadSums


@dataclass
class Window:
    """Sums over steps.

    Attributes:
        sums: cross entropies of this rank, per head.
        ranks: the ranks over which `sums` are reduced when they are read.
        step_tokens: tokens of one step, over all ranks.
        noise: of this rank, where noise is planted; None: unknown.
    """

    sums: HeadSums
    ranks: Ranks
    step_tokens: int
    steps: int = 0
    seconds: float = 0.0
    lr: float = 0.0
    loss: Tensor | float = 0.0
    count: Tensor | int = 0
    grad_norm: Tensor | float = 0.0
    weights: WeightStatistics | None = None
    noise: NoiseSums | None = None

    def add(
        self,
        *,
        loss: Tensor,  # [], the sum
        count: Tensor,  # [], what the loss is a mean over
        sums: HeadSums,
        weights: WeightStatistics,
        noise: NoiseSums | None,
        grad_norm: Tensor,  # []
        lr: float,
        seconds: float,
    ) -> None:
        """Add one step, without a host synchronisation."""
        self.steps += 1
        self.seconds += seconds
        self.lr = lr
        self.loss = self.loss + loss
        self.count = self.count + count
        self.grad_norm = grad_norm
        self.weights = weights if self.weights is None else self.weights.merge(weights)
        self.sums.merge(sums)
        if noise:
            self.noise = noise if self.noise is None else NoiseSums(self.noise.sums + noise.sums)

    def metrics(self) -> dict[str, float]:
        """Read everything to the host, under the names that trackers show.

        Losses and cross entropies are in nats over all steps of the window, divided once; weights are over supervised
        tokens; valid_token_ratio is the ratio of positions with a target, or of predicted tokens; lr and grad_norm
        (before clipping) are those of the last step; tokens_per_s counts steps alone, without validation. NaN where
        there is nothing to divide by: a loss without a target, a head without rows, weights without a supervised token.
        """
        assert self.weights is not None
        count, tokens = float(self.count), self.steps * self.step_tokens
        weights, supervised = self.weights, int(self.weights.count)

        def of_weights(value: Tensor) -> float:
            return float(value) if supervised else math.nan

        self.ranks.add(self.sums.ce, self.sums.rows, *([self.noise.sums] if self.noise else []))
        return {
            "train/loss": float(self.loss) / count if count else math.nan,
            "train/ce_mean": self.sums.ce_mean(),
            **{f"train/ce_head_{h}": ce for h, ce in enumerate(self.sums.ce_of_heads())},
            "train/weight_mean": of_weights(weights.mean),
            "train/weight_min": of_weights(weights.min),
            "train/weight_max": of_weights(weights.max),
            "train/weight_ess": of_weights(weights.ess),
            "train/weight_clipped_ratio": of_weights(weights.clipped / weights.count),
            "train/weight_neutral_ratio": of_weights(weights.neutral / weights.count),
            **(self.noise.metrics() if self.noise else {}),
            "train/valid_token_ratio": count / tokens,
            "optim/lr": self.lr,
            "optim/grad_norm": float(self.grad_norm),
            "perf/tokens_per_s": tokens / self.seconds,
            "perf/peak_memory_mb": peak_memory_mb(),
        }


def peak_memory_mb() -> float:
    """Return the peak memory of the run so far, in 10^6 bytes: of the GPU, or of RAM where there is none."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
