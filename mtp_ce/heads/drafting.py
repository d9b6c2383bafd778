"""What speculative decoding asks of heads: a drafter that follows the model's forwards.

    residual     y_h ~ head_h(hidden(t))                                t the last position, h = 1..H-1
    layer        y_h ~ norm(layer_h(z(.. t)))                           attends to its own past
    sequential   y_h ~ norm(layer_h(P_h[z_{h-1}; embed(y_{h-1})]))      attends to its own past, one after the other

Every kind of heads has its drafter in its own file. The one here serves all heads that need nothing but the last hidden
state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from mtp_ce.unembedding import Unembedding

# Takes logits [B, N, V] of the next N tokens of a draft, returns tokens [B, N] and the scores [B, N, V] that they were
# drawn from.
Draw = Callable[[Tensor], tuple[Tensor, Tensor]]


class Drafter(Protocol):
    """Drafts tokens in one decoding.

    Attributes:
        repeats: how many accepted positions the next forward of the model must begin with again.
        layers: cache layers of the heads, cropped together with the model's own.
    """

    repeats: int
    layers: list[Any]

    def draft(self, hidden: Tensor, last: int, tokens: Tensor, width: int, draw: Draw) -> tuple[Tensor, Tensor]:
        """Draft the tokens that follow the accepted ones; called once per forward of the model.

        Args:
            hidden: [B, S, D] of that forward, after the model's final norm.
            last: its last accepted position, the same in all rows; later ones belong to rejected tokens.
            tokens: [B, last + 2], accepted: those of the positions up to `last`, and the next one.
            width: number of tokens to draft, at most H - 1 and never more than in the call before.
            draw: chooses tokens; called for every token of the draft in turn, or for several at once.

        Returns:
            Tokens [B, width], and the scores [B, width, V] that they were drawn from.
        """
        ...


class HiddenStateDrafter:
    """Drafter of heads that read the last hidden state and nothing else.

    Args:
        heads: computes H hidden states from one.
        output: the model's output layer.
    """

    repeats = 0

    def __init__(self, heads: Callable[[Tensor], list[Tensor]], output: Unembedding) -> None:
        self.heads, self.output = heads, output
        self.layers: list[Any] = []

    def draft(self, hidden: Tensor, last: int, tokens: Tensor, width: int, draw: Draw) -> tuple[Tensor, Tensor]:
        """See `Drafter.draft`."""
        heads = self.heads(hidden[:, last : last + 1])[1 : width + 1]
        return draw(self.output.logits(torch.cat(heads, 1)))
