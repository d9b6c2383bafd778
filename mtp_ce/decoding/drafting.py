"""Drafting: what the heads of each kind make of one forward of the model, and what they remember between forwards.

    residual     y_h ~ head_h(hidden(t))                                t the last position, h = 1..H-1
    layer        y_h ~ norm(layer_h(z(.. t)))                           attends to its own past
    sequential   y_h ~ norm(layer_h(P_h[z_{h-1}; embed(y_{h-1})]))      attends to its own past, one after the other

A head that is a layer is called as the model's last one was called in the same forward, so it gets masks and positions
that fit, of every architecture, as long as its own cache has as many positions as the model's. So all caches are cut
alike.

In a chain, head h reads the token h further on. At the last H - 2 positions some head has read a draft there, which the
next round may replace. So those positions are cut from all caches, and the next forward of the model begins with them
again: `repeats` = H - 2, else 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtp_ce.heads.layers import LayerCall, LayerHeads, decoder_layers, watched
from mtp_ce.heads.residual import MTPHeads
from mtp_ce.unembedding import Unembedding

if TYPE_CHECKING:
    from mtp_ce.hf.wrapper import MTPWrapper

# Takes logits [N, V], gives tokens [N] and what they were drawn from, [N, V].
Draw = Callable[[Tensor], tuple[Tensor, Tensor]]

KINDS = ("residual", "layer", "sequential")


class Drafter(Protocol):
    """What decoding asks of heads.

    Attributes:
        repeats: how many decided positions the next forward of the model has to begin with again.
        layers: what the heads remember, cut as the model's own cache is.
    """

    repeats: int
    layers: list[Any]

    def draft(self, hidden: Tensor, last: int, tokens: Tensor, width: int, draw: Draw) -> tuple[Tensor, Tensor]:
        """Draft the tokens that follow what is decided; once for every forward of the model.

        Args:
            hidden: [1, S, D] of that forward, after the model's final norm.
            last: its last position that stays; those after it belong to rejected tokens.
            tokens: [last + 2], decided: those of the positions up to `last`, and the one after.
            width: how many tokens, at most H - 1 and never more than the time before.
            draw: chooses tokens.

        Returns:
            Tokens [width], and what they were drawn from [width, V].
        """
        ...


@contextmanager
def drafter(wrapper: MTPWrapper, new_cache: Callable[[], Any]) -> Iterator[Drafter]:
    """Give the drafter of a wrapper's heads; inside the block it follows the model's forwards.

    Args:
        wrapper: its heads are of one of `KINDS`.
        new_cache: gives an empty cache of the model's configuration.
    """
    causal, heads = wrapper.causal, wrapper.heads
    output = Unembedding.of(causal)
    if isinstance(heads, MTPHeads):
        yield _Residual(heads, output)
        return
    layers, norm = decoder_layers(causal)
    with watched(layers[-1]) as call:
        if heads.kind == "layer":
            yield _Layers(heads, call, norm, output, new_cache)
        else:
            yield _Chain(heads, call, norm, output, new_cache, causal.get_input_embeddings())


class _Residual:
    """Heads that need the last hidden state and no more."""

    repeats = 0

    def __init__(self, heads: MTPHeads, output: Unembedding) -> None:
        self.heads, self.output = heads, output
        self.layers: list[Any] = []

    def draft(self, hidden: Tensor, last: int, tokens: Tensor, width: int, draw: Draw) -> tuple[Tensor, Tensor]:
        heads = self.heads(hidden[0, last : last + 1])[1 : width + 1]
        return draw(self.output.logits(torch.cat(heads)))


class _Layers:
    """Decoder layers side by side, each with a cache of its own."""

    repeats = 0

    def __init__(
        self,
        heads: LayerHeads,
        call: LayerCall,
        norm: nn.Module,
        output: Unembedding,
        new_cache: Callable[[], Any],
    ) -> None:
        self.heads, self.call, self.norm, self.output = heads, call, norm, output
        self.caches = [new_cache() for _ in heads.layers]
        # A head is a copy of the model's last layer, and takes that one's place in its cache.
        self.layers = [cache.layers[-1] for cache in self.caches]

    def draft(self, hidden: Tensor, last: int, tokens: Tensor, width: int, draw: Draw) -> tuple[Tensor, Tensor]:
        z = self.call.output
        assert z is not None
        heads = list(zip(self.heads.layers, self.caches, strict=True))[:width]
        ends = [self.call.again(layer, z, cache)[:, last : last + 1] for layer, cache in heads]
        return draw(self.output.logits(self.norm(torch.cat(ends, 1))[0]))


class _Chain(_Layers):
    """Decoder layers in a chain: each is given the token that the one before has drafted."""

    def __init__(
        self,
        heads: LayerHeads,
        call: LayerCall,
        norm: nn.Module,
        output: Unembedding,
        new_cache: Callable[[], Any],
        embed: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(heads, call, norm, output, new_cache)
        self.embed, self.repeats = embed, heads.horizon - 2

    def draft(self, hidden: Tensor, last: int, tokens: Tensor, width: int, draw: Draw) -> tuple[Tensor, Tensor]:
        z = self.call.output
        assert z is not None
        embedded = self.embed(tokens[None])
        drafts: list[tuple[Tensor, Tensor]] = []
        for h, (layer, cache) in enumerate(list(zip(self.heads.layers, self.caches, strict=True))[:width], start=1):
            if drafts:
                embedded = torch.cat([embedded, self.embed(drafts[-1][0][None])], 1)
            # After `last` there is nothing to know; attention keeps those positions from the others.
            ahead = F.pad(embedded[:, h:], (0, 0, 0, z.shape[1] - last - 1))
            z = self.call.again(layer, self.heads.chained(h, z, ahead), cache)
            drafts.append(draw(self.output.logits(self.norm(z[0, last : last + 1]))))
        drafted, drawn_from = (torch.cat(parts) for parts in zip(*drafts, strict=True))
        return drafted, drawn_from
