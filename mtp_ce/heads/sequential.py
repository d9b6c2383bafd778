"""Decoder layers in a chain: each reads the head before it, and the embedding of the token which that one predicts.

    hidden_0 = the trunk's hidden state after its final norm                            [B, S, D]
    z_h      = layer_h(P_h [norm_a(hidden_{h-1}); norm_b(embed(token t + h))])          h = 1..H-1
    hidden_h = norm(z_h)

This is what serving engines feed to MTP modules: head 1 the hidden state that the output layer reads, and every later
head the normed output of the one before. Position 0 has an embedding of zeros in place of that of its next token, but
not in the families of the layout "qwen", whose engines read it as it is (`mtp_ce.heads.modules`). norm is the model's
own final norm, norm_a and norm_b have its epsilon, and the layers are those of `mtp_ce.heads.layer`.

P_h is initialised as the identity on the hidden state and 0 on the embedding, and norm_a to undo the gain of norm, so
that a layer begins with what the model's last layer returned, up to scale.

With `shared=True` one module serves all heads (`mtp_ce.heads.repeated`); otherwise every head has its own, which
attends to its own past.

At the end of a row there is no token t + h, unless the call passes the tokens after it. Such rows have no target
either, and causal attention keeps them from others.

Source: arXiv:2412.19437, section 2.2; vLLM's mimo_mtp.py and qwen3_next_mtp.py, SGLang's deepseek_nextn.py, Megatron's
multi_token_prediction.py and transformers' `MtpModel`, which all pass on the normed output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtp_ce.heads.drafting import Drafter, Draw
from mtp_ce.heads.kinds import KINDS
from mtp_ce.heads.layer import LayerDrafter, LayerHeads
from mtp_ce.heads.modules.layout import ModuleLayout
from mtp_ce.heads.modules.table import MODULE_LAYOUTS, layout_of
from mtp_ce.heads.repeated import Drafts, check_takes_masks, draft_positions, repeat_at_depth, takes_masks
from mtp_ce.heads.trunk import LayerCall, TrunkPass, decoder_layers, observed, observed_rotary
from mtp_ce.unembedding import Unembedding, has_values


class SequentialHeads(LayerHeads):
    """A chain of decoder layers; other arguments and errors as of `LayerHeads`.

    Args:
        model: the causal language model.
        horizon: H.
        shared: whether one module serves all extra heads.

    Attributes:
        layout: what the projection reads first, what a further depth reads, and what position 0 does.
    """

    kind = "sequential"
    can_share: ClassVar[bool] = True
    reads_next_tokens: ClassVar[bool] = True
    layout: ModuleLayout = MODULE_LAYOUTS["mimo"]
    format: ClassVar[int] = KINDS["sequential"].format

    def __init__(self, model: Any, horizon: int, shared: bool = False) -> None:
        super().__init__(model, horizon, min(horizon - 1, 1) if shared else None)
        self.shared = shared
        # The layers read their kind of attention from it, which may be changed later.
        self.config = model.config.get_text_config(decoder=True)
        self.layout = self.layout._replace(masks_first=layout_of(self.config.model_type).masks_first)
        D, epsilon = self.hidden_size, getattr(self.config, "rms_norm_eps", None)
        self.projections = nn.ModuleList(nn.Linear(2 * D, D, bias=False) for _ in self.layers)
        self.hidden_norms = nn.ModuleList(nn.RMSNorm(D, eps=epsilon) for _ in self.layers)
        self.token_norms = nn.ModuleList(nn.RMSNorm(D, eps=epsilon) for _ in self.layers)
        gain = _inverse_gain(decoder_layers(model)[1], D)
        with torch.no_grad():
            for projection, hidden_norm in zip(self.projections, self.hidden_norms, strict=True):
                assert isinstance(projection, nn.Linear)
                projection.weight.copy_(torch.eye(D, 2 * D))
                if gain is not None:
                    assert isinstance(hidden_norm, nn.RMSNorm)
                    hidden_norm.weight.copy_(gain)

    @property
    def label_halo(self) -> int:
        """H; 2 of a module at several depths, whose draft at depth h takes the place of position t + h - 1."""
        return min(self.horizon, 2) if self.shared else self.horizon

    def _check(self, model: Any) -> None:
        """Check a shared module at its second depth, too: that training computes what drafting does."""
        if self.shared and self.horizon > 2:
            check_takes_masks(self.config)
        super()._check(model)
        if self.shared and len(self.layers):
            training = self.training
            try:
                self.eval()  # dropout would differ between the two
                self._check_depths(model)
            finally:
                self.train(training)

    def _check_depths(self, model: Any) -> None:
        layers, norm = decoder_layers(model)
        layer, unembed = self.layers[0], model.get_output_embeddings().weight
        tokens = torch.arange(3, device=unembed.device)[None] % unembed.shape[0]
        try:
            with observed(layers[self.layer_index]) as call, observed_rotary(model) as rotary:
                hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        except (ImportError, RuntimeError, ValueError):
            return  # as in `LayerHeads._check`
        try:
            embedded = model.get_input_embeddings()(tokens)
            first = self.layer_input(1, hidden, self.ahead_of(embedded, 1, call, 3))
            _, passed = self.normed(1, call.repeat(layer, first), norm)
            second = self.layer_input(2, passed, self.ahead_of(embedded, 2, call, 3))
            # The draft after two positions is the third one of a sequence, whatever the layer is made of.
            expected = call.repeat(layer, torch.cat([first[:, :2], second[:, 1:2]], 1))[:, 2]
            draft_positions(call, rotary, 1, 1)
            if not takes_masks(self.config):
                return
            found = repeat_at_depth(call, layer, [first, second])[:, 1]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise self._unsupported(model, "the last one can't be called for several depths at once") from error
        tolerance = 1e-2 if found.dtype in (torch.float32, torch.float64) else 0.1
        if (found - expected).norm() > tolerance * expected.norm():
            raise self._unsupported(model, "the last one keeps a state other than attention's keys and values")

    def forward(
        self, hidden: Tensor, trunk: TrunkPass | None = None, horizon: int | None = None
    ) -> list[Tensor]:  # [B, S, D]
        """Return H tensors [B, S, D]; the first one is `hidden` itself.

        Args:
            hidden: see `Heads.forward`.
            trunk: likewise.
            horizon: 1 + the depths at which a single module runs, as engines draft with it; None means H.
        """
        assert trunk is not None
        tokens = trunk.tokens if trunk.next_tokens is None else torch.cat([trunk.tokens, trunk.next_tokens], 1)
        outputs: list[Tensor] = [hidden]
        inputs: list[Tensor] = []  # of a single layer, at the depths before
        for h in range(1, self.horizon if horizon is None else horizon):
            results = self.checkpointed(partial(self._head, h, trunk), tokens, hidden, *inputs)
            read, hidden, output = results[0], results[1], results[-1]
            outputs.append(output)
            if len(self.layers) == 1:
                inputs.append(read)
        return outputs

    def _head(self, h: int, trunk: TrunkPass, tokens: Tensor, hidden: Tensor, *before: Tensor) -> tuple[Tensor, ...]:
        """Return the input of layer h, what the next layer reads of its output, and head h where that is another.

        Args:
            h: the head.
            trunk: of this forward.
            tokens: [B, S, D] or more, its embeddings and those of the tokens after it.
            hidden: [B, S, D], what the layer reads of the head before.
            *before: inputs of a single layer at the depths before.
        """
        read = self.layer_input(h, hidden, self.ahead_of(tokens, h, trunk.call, hidden.shape[1]))
        if before:
            check_takes_masks(self.config)
            z = repeat_at_depth(trunk.call, self.layers[0], [*before, read])
        else:
            z = trunk.call.repeat(self.layers[h - 1], read)
        output, further = self.normed(h, z, trunk.norm)
        return (read, output) if further is output else (read, further, output)

    def layer_input(self, h: int, hidden: Tensor, ahead: Tensor) -> Tensor:  # [B, S, D], both
        """Return the input of layer h: the head before, joined with the embeddings of the tokens at t + h."""
        module = min(h, len(self.layers)) - 1
        halves = [self.hidden_norms[module](hidden), self.token_norms[module](ahead)]
        if not self.layout.hidden_first:
            halves.reverse()
        projected: Tensor = self.projections[module](torch.cat(halves, -1))
        return projected

    def normed(self, h: int, z: Tensor, norm: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:  # [B, S, D], all
        """Return the hidden state of head h, and what the next layer reads of it.

        Args:
            h: the head.
            z: output of its layer.
            norm: the model's final norm.
        """
        hidden = norm(z)
        return hidden, hidden if self.layout.passes_normed else z

    def ahead_of(self, tokens: Tensor, h: int, call: LayerCall, S: int) -> Tensor:  # [B, S, D]
        """Return the embeddings of the tokens at t + h, those beyond the tokens as zeros.

        Args:
            tokens: embeddings [B, S, D] of the tokens at t, and of those after them, where they are known.
            h: the head.
            call: the last layer's call, for its position_ids.
            S: number of positions.
        """
        ahead = tokens[:, h : h + S]
        ahead = F.pad(ahead, (0, 0, 0, S - ahead.shape[1]))
        return self.mask_position_zero(ahead, call, 0) if h == 1 else ahead

    def mask_position_zero(self, ahead: Tensor, call: LayerCall, begin: int) -> Tensor:  # [B, S, D]
        """Return head 1's embeddings with zeros at position 0: at the first token, and where documents begin.

        Engines mask them so, and place head h at position t + h - 1.

        Args:
            ahead: the embeddings.
            call: the last layer's call, for its position_ids.
            begin: index of the first position, for layers that are called without position_ids.
        """
        if not self.layout.masks_first:
            return ahead
        positions = call.options.get("position_ids")
        if not (isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == ahead.shape[1]):
            positions = torch.arange(begin, begin + ahead.shape[1], device=ahead.device)[None]
        return ahead.masked_fill((positions == 0)[..., None].to(ahead.device), 0)

    @property
    def mtp_modules(self) -> list[dict[str, nn.Module]]:
        """See `Heads`."""
        parts = zip(self.hidden_norms, self.token_norms, self.projections, self.layers, strict=True)
        return [
            {"hidden_norm": hidden_norm, "token_norm": token_norm, "projection": projection, "decoder": layer}
            for hidden_norm, token_norm, projection, layer in parts
        ]

    @property
    def layer_runs(self) -> list[int]:
        """See `Heads.layer_runs`: a shared module computes the depths before again, for their keys and values."""
        return list(range(1, self.horizon)) if self.shared else [1] * len(self.layers)

    @contextmanager
    def drafter(self, causal: Any, new_cache: Callable[[], Any]) -> Iterator[Drafter]:
        """See `Heads.drafter`."""
        layers, norm = decoder_layers(causal)
        output, embed = Unembedding.of(causal), causal.get_input_embeddings()
        with observed(layers[self.layer_index]) as call, observed_rotary(causal) as rotary:
            if self.shared:
                drafts = Drafts(call, rotary, new_cache())
                yield RepeatedDrafter(self, drafts, norm, output, embed)
            else:
                yield ChainDrafter(self, call, norm, output, new_cache, embed)


def _inverse_gain(norm: nn.Module, D: int) -> Tensor | None:  # [D]
    """Return the gain with root mean square about 1 that undoes that of an RMSNorm; None of another norm."""
    weights = list(norm.parameters())
    if "RMSNorm" not in type(norm).__name__ or len(weights) != 1 or not has_values(weights[0]):
        return None
    with torch.no_grad():  # of ones it returns its gain, whether its weight is that or 1 less
        gain = norm(torch.ones(1, 1, D, dtype=weights[0].dtype, device=weights[0].device)).flatten().float()
    size = gain.square().mean().sqrt()
    # Coordinates that the norm all but removes stay small.
    inverse: Tensor = torch.where(gain.abs() > 0.05 * size, size / gain, gain / size)
    return inverse


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
        begin = self.layers[0].get_seq_length()
        embedded = self.embed(tokens)
        drafts: list[tuple[Tensor, Tensor]] = []
        for h, (layer, cache) in enumerate(list(zip(self.heads.layers, self.caches, strict=True))[:width], start=1):
            if drafts:
                embedded = torch.cat([embedded, self.embed(drafts[-1][0])], 1)
            # No token is known after `last`; attention keeps those positions from the others.
            ahead = F.pad(embedded[:, h:], (0, 0, 0, hidden.shape[1] - last - 1))
            if h == 1:
                ahead = self.heads.mask_position_zero(ahead, self.call, begin)
            z = self.call.repeat(layer, self.heads.layer_input(h, hidden, ahead), cache)
            output, hidden = self.heads.normed(h, z, self.norm)
            drafts.append(draw(self.output.logits(output[:, last : last + 1])))
        drafted, drawn_from = (torch.cat(rounds, 1) for rounds in zip(*drafts, strict=True))
        return drafted, drawn_from


class RepeatedDrafter:
    """One module that drafts as engines run it: over the accepted positions once, then token by token to any depth.

    The cache keeps accepted positions alone, where the module has read the trunk's hidden state and the true next
    token, so that no later round replaces them: `repeats` = 0.
    """

    repeats = 0

    def __init__(
        self,
        heads: SequentialHeads,
        drafts: Drafts,
        norm: Callable[[Tensor], Tensor],
        output: Unembedding,
        embed: Callable[[Tensor], Tensor],
    ) -> None:
        self.heads, self.drafts, self.norm, self.output, self.embed = heads, drafts, norm, output, embed
        self.layers = [drafts.cache.layers[heads.layer_index]]

    def draft(self, hidden: Tensor, last: int, tokens: Tensor, width: int, draw: Draw) -> tuple[Tensor, Tensor]:
        """See `Drafter.draft`."""
        layer, begin = self.heads.layers[0], self.layers[0].get_seq_length()
        ahead = F.pad(self.embed(tokens)[:, 1:], (0, 0, 0, hidden.shape[1] - last - 1))
        ahead = self.heads.mask_position_zero(ahead, self.drafts.call, begin)
        z = self.drafts.first(layer, self.heads.layer_input(1, hidden, ahead), last)
        output, hidden = self.heads.normed(1, z, self.norm)
        drafts = [draw(self.output.logits(output))]
        for h in range(2, width + 1):
            z = self.drafts.further(layer, self.heads.layer_input(h, hidden, self.embed(drafts[-1][0])), h)
            output, hidden = self.heads.normed(h, z, self.norm)
            drafts.append(draw(self.output.logits(output)))
        drafted, drawn_from = (torch.cat(rounds, 1) for rounds in zip(*drafts, strict=True))
        return drafted, drawn_from
