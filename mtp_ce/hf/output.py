"""What a wrapper's forward returns with labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from mtp_ce.loss import MTPStats


@dataclass
class MTPOutput(ModelOutput):
    """Output of `MTPWrapper.forward` with labels.

    Attributes:
        loss: [] fp32, weighted, over all heads, plus the routers' loss times the model's coefficient.
        logits: [B, S, V] of head 0, where `return_logits` is True.
        stats: per-head statistics, where `return_stats` is True.
        aux_loss: [] balancing loss of the model's routers, where it is requested.
        entropy: [B, S] fp32, nats, of head 0's distribution where it has a target, else 0; where `return_entropy` is
            True.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    stats: MTPStats | None = None
    aux_loss: Tensor | None = None
    entropy: Tensor | None = None
