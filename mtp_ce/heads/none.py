"""No extra heads: the model's own next-token head alone, H = 1."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Self

from torch import Tensor

from mtp_ce.heads.protocol import Heads
from mtp_ce.heads.trunk import TrunkPass


class NoHeads(Heads):
    """Head 0 only."""

    kind = "none"
    drafts: ClassVar[bool] = False

    @classmethod
    def of_model(cls, model: Any, horizon: int) -> Self:
        """See `Heads.of_model`; a horizon above 1 is a warning."""
        if horizon > 1:
            # Reported at the call of MTPWrapper: past this method, `build_heads` and the constructor.
            warnings.warn(f"horizon is {horizon} with heads='none'; there is one head.", stacklevel=4)
        return super().of_model(model, 1)

    def forward(self, hidden: Tensor, trunk: TrunkPass | None = None) -> list[Tensor]:
        """Return `hidden` in a list."""
        return [hidden]
