"""What a scorer does with planted noise: its share of the weight, and how much of a step is left for clean tokens.

    token share   n_noise / n                    weight share   sum_noise w / sum w            over predicted tokens
    clean ess     (sum_clean w)^2 / (n sum w^2)

Clean ess is the effective sample size of the clean tokens, as a fraction of all tokens. A step's gradient is
sum w g / n. If the g of single tokens have one variance and only those of clean tokens have a mean that helps, the
squared signal is proportional to (sum_clean w)^2, and the variance to sum w^2. Uniform weights have
(1 - token share)^2; weights that are equal on clean tokens and 0 on noise have the largest value, 1 - token share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class NoiseSums:
    """Sums over clean tokens and over noise.

    Attributes:
        sums: [2, 3] fp64, for clean tokens and noise: tokens, sum of w, sum of w^2.
    """

    sums: Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> NoiseSums:
        """Return sums of zero."""
        return cls(torch.zeros(2, 3, dtype=torch.float64, device=device))

    def add(
        self,
        weights: Tensor,  # [B, S], of the token at the position
        noise: Tensor,  # [B, S] bool
        predicted: Tensor,  # [B, S] bool
    ) -> None:
        """Add one batch, without a host synchronisation."""
        w = weights.double()
        terms = torch.stack([torch.ones_like(w), w, w.square()])  # [3, B, S]
        self.sums += torch.stack([(terms * (mask & predicted)).sum((1, 2)) for mask in (~noise, noise)])

    def metrics(self) -> dict[str, float]:
        """Return the shares and the effective sample size by name, NaN without tokens; synchronises with the device."""
        tokens, weight, squares = self.sums.sum(0)
        return {
            "train/noise_token_share": float(self.sums[1, 0] / tokens),
            "train/noise_weight_share": float(self.sums[1, 1] / weight),
            "train/clean_ess": float(self.sums[0, 1].square() / (tokens * squares)),
        }
