"""Decoder layers in a chain: each reads the head before it, and the embedding of the token which that one predicts.

    z_0      = output of the model's last decoder layer, before its final norm          [B, S, D]
    z_h      = layer_h(P_h [norm_a(z_{h-1}); norm_b(embed(token t + h))])               h = 1..H-1
    hidden_h = norm(z_h)

The layers are those of `mtp_ce.heads.layer`. P_h is initialised as the identity on z and 0 on the embedding.

At the end of a row there is no token t + h. Such rows have no target either, and causal attention keeps them from
others.

Source: arXiv:2412.19437, section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtp_ce.heads.drafting import Draw
from mtp_ce.heads.layer import LayerDrafter, LayerHeads
from mtp_ce.heads.trunk import LayerCall, TrunkPass, decoder_layers, observed
from mtp_ce.unembedding import Unembedding


class SequentialHeads(LayerHeads):
    """A chain of decoder layers; arguments and errors as of `LayerHeads`."""

    kind = "sequential"

    def __init__(self, model: Any, horizon: int) -> None:
        super().__init__(model, horizon)
        D = self.hidden_size
        self.projections = nn.ModuleList(nn.Linear(2 * D, D, bias=False) for _ in self.layers)
        self.hidden_norms = nn.ModuleList(nn.RMSNorm(D) for _ in self.layers)
        self.token_norms = nn.ModuleList(nn.RMSNorm(D) for _ in self.layers)
        with torch.no_grad():
            for projection in self.projections:
                assert isinstance(projection, nn.Linear)
                projection.weight.copy_(torch.eye(D, 2 * D))

    def forward(self, hidden: Tensor, trunk: TrunkPass | None = None) -> list[Tensor]:  # [B, S, D]
        """Return H tensors [B, S, D]; the first one is `hidden` itself."""
        assert trunk is not None
        call, norm, tokens = trunk
        z, outputs = call.hidden, [hidden]
        for h, layer in enumerate(self.layers, start=1):
            ahead = F.pad(tokens[:, h:], (0, 0, 0, min(h, tokens.shape[1])))
            z = call.repeat(layer, self.layer_input(h, z, ahead))
            outputs.append(norm(z))
        return outputs

    def layer_input(self, h: int, z: Tensor, ahead: Tensor) -> Tensor:  # [B, S, D], both
        """Return the input of layer h: z of the head before, joined with the embeddings of the tokens at t + h."""
        joined = torch.cat([self.hidden_norms[h - 1](z), self.token_norms[h - 1](ahead)], -1)
        projected: Tensor = self.projections[h - 1](joined)
        return projected

    @contextmanager
    def drafter(self, causal: Any, new_cache: Callable[[], Any]) -> Iterator[ChainDrafter]:
        """See `Heads.drafter`."""
        layers, norm = decoder_layers(causal)
        with observed(layers[-1]) as call:
            yield ChainDrafter(self, call, norm, Unembedding.of(causal), new_cache, causal.get_input_embeddings())


class ChainDrafter(LayerDrafter):
    """Decoder layers in a chain: each reads the token that the one before has drafted.

    Head h reads the token at t + h. At the last H - 2 positions some head has therefore read a draft, which the next
    round may replace. Those positions are cropped from all caches, and the next forward of the model begins with them
    again: `repeats` = H - 2.
    """

    heads: SequentialHeads

    def __init__(
        self,
        heads: SequentialHeads,
        call: LayerCall,
        norm: Callable[[Tensor], Tensor],
        output: Unembedding,
        new_cache: Callable[[], Any],
        embed: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(heads, call, norm, output, new_cache)
        self.embed, self.repeats = embed, heads.horizon - 2

    def draft(self, hidden: Tensor, last: int, tokens: Tensor, width: int, draw: Draw) -> tuple[Tensor, Tensor]:
        """See `Drafter.draft`."""
        z = self.call.hidden
        embedded = self.embed(tokens)
        drafts: list[tuple[Tensor, Tensor]] = []
        for h, (layer, cache) in enumerate(list(zip(self.heads.layers, self.caches, strict=True))[:width], start=1):
            if drafts:
                embedded = torch.cat([embedded, self.embed(drafts[-1][0])], 1)
            # No token is known after `last`; attention keeps those positions from the others.
            ahead = F.pad(embedded[:, h:], (0, 0, 0, z.shape[1] - last - 1))
            z = self.call.repeat(layer, self.heads.layer_input(h, z, ahead), cache)
            drafts.append(draw(self.output.logits(self.norm(z[:, last : last + 1]))))
        drafted, drawn_from = (torch.cat(rounds, 1) for rounds in zip(*drafts, strict=True))
        return drafted, drawn_from
