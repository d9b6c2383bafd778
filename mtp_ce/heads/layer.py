"""A decoder layer of the model's own class per extra head, so that heads attend as the model does.

    z        = output of the model's last decoder layer, before its final norm          [B, S, D]
    hidden_h = norm(layer_h(z))                                                         h = 1..H-1

norm is the model's own final norm, which all heads share as they share the unembedding. A layer is initialised as a
copy of the model's last one and is called with the arguments of that one's call in the same forward (mask, positions),
which works for every architecture whose layers are alike.

Source: arXiv:2404.19737, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mtp_ce.heads.drafting import Drafter, Draw
from mtp_ce.heads.protocol import Heads
from mtp_ce.heads.trunk import LayerCall, TrunkPass, decoder_layers, observed
from mtp_ce.unembedding import Unembedding, has_values, undisturbed


class LayerHeads(Heads):
    """Decoder layers side by side on the output of the model's last layer.

    Args:
        model: the causal language model whose last layer they copy.
        horizon: H, the number of heads; head 0 is the model's own.
        modules: how many layers are made; None means one for every extra head.

    Raises:
        ValueError: the model's decoder layers are not found, or a further one cannot be made.
    """

    kind = "layer"
    reads_last_layer: ClassVar[bool] = True
    may_have_routers: ClassVar[bool] = True
    checkpoints_layers: ClassVar[bool] = True
    file_metadata: ClassVar[dict[str, str] | None] = None

    def __init__(self, model: Any, horizon: int, modules: int | None = None) -> None:
        layers, _ = decoder_layers(model)
        last, config = layers[-1], model.config.get_text_config(decoder=True)
        super().__init__(model.get_output_embeddings().weight.shape[1], horizon)
        # PEFT keeps a layer's own parameters one level deeper; its adapters stay with the model.
        weights = {name.replace(".base_layer.", "."): x for name, x in last.state_dict().items() if "lora_" not in name}
        try:
            count = horizon - 1 if modules is None else modules
            self.layers = nn.ModuleList(type(last)(config, len(layers) - 1) for _ in range(count))
            for layer in self.layers:
                layer.load_state_dict(weights)
        except (AttributeError, RuntimeError, TypeError) as error:
            reason = f"a second {type(last).__name__} can't be made"
            if getattr(model, "is_quantized", False):
                reason += " as a copy of the last one, whose weights are quantised"
            raise self._unsupported(model, reason) from error

    @classmethod
    def of_model(cls, model: Any, horizon: int, **options: Any) -> Self:
        """See `Heads.of_model`; options are those of the class.

        Raises:
            ValueError: as the class, or the model's last layer can't be called again on other hidden states.
        """
        heads, unembed = cls(model, horizon, **options), model.get_output_embeddings().weight
        heads.to(device=unembed.device, dtype=unembed.dtype)
        heads.check_on(model)
        return heads

    def check_on(self, model: Any) -> None:
        """Check the heads in a forward of their model, where it has values.

        Raises:
            ValueError: see `of_model`.
        """
        if has_values(model.get_output_embeddings().weight):
            with undisturbed(model):
                self._check(model)

    def _check(self, model: Any) -> None:
        """Run model and heads over two tokens, and check that the equations above hold."""
        layers, norm = decoder_layers(model)
        tokens = torch.arange(2, device=model.get_output_embeddings().weight.device)[None]
        try:
            with observed(layers[self.layer_index]) as call:
                hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        except (ImportError, RuntimeError, ValueError):
            return  # the model's kernels are for another device than the one it is on now
        try:
            z = norm(call.output) if self.layer_index in (-1, len(layers) - 1) else hidden
            outputs = self(hidden, TrunkPass(call, norm, model.get_input_embeddings()(tokens)))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise self._unsupported(model, "the last one can't be called again on other hidden states") from error
        if z.shape != hidden.shape or not torch.allclose(z, hidden, 1e-3, 1e-3, equal_nan=True):
            raise self._unsupported(model, "after the last one comes more than a norm")
        if any(x.shape != hidden.shape for x in outputs):
            raise self._unsupported(model, "the last one returns more than hidden states [B, S, D]")

    def _unsupported(self, model: Any, reason: str) -> ValueError:
        name, use = type(model).__name__, "shared=False or heads='residual'" if self.shared else "heads='residual'"
        return ValueError(f"{name} has decoder layers that can't be heads: {reason}; use {use}.")

    def forward(self, hidden: Tensor, trunk: TrunkPass | None = None) -> list[Tensor]:  # [B, S, D]
        """Return H tensors [B, S, D]; the first one is `hidden` itself."""
        assert trunk is not None
        call, norm = trunk.call, trunk.norm

        def head(layer: nn.Module, z: Tensor) -> Tensor:
            return norm(call.repeat(layer, z))

        return [hidden, *(self.checkpointed(partial(head, layer), call.hidden) for layer in self.layers)]

    @property
    def decoder_layers(self) -> Sequence[nn.Module]:
        """The layer of every extra head."""
        return list(self.layers)

    @contextmanager
    def drafter(self, causal: Any, new_cache: Callable[[], Any]) -> Iterator[Drafter]:
        """See `Heads.drafter`."""
        layers, norm = decoder_layers(causal)
        with observed(layers[self.layer_index]) as call:
            yield LayerDrafter(self, call, norm, Unembedding.of(causal), new_cache)


class LayerDrafter:
    """Decoder layers side by side, each with a cache of its own.

    A layer is called with the arguments of the model's last layer in the same forward, so that masks and positions fit
    for every architecture as long as its cache has as many positions as the model's. So all caches are cropped alike.
    """

    repeats = 0

    def __init__(
        self,
        heads: LayerHeads,
        call: LayerCall,
        norm: Callable[[Tensor], Tensor],
        output: Unembedding,
        new_cache: Callable[[], Any],
    ) -> None:
        self.heads, self.call, self.norm, self.output = heads, call, norm, output
        self.caches = [new_cache() for _ in heads.layers]
        # A head is a copy of the model's last layer, with that layer's index in the cache.
        self.layers = [cache.layers[heads.layer_index] for cache in self.caches]

    def draft(self, hidden: Tensor, last: int, tokens: Tensor, width: int, draw: Draw) -> tuple[Tensor, Tensor]:
        """See `Drafter.draft`."""
        z = self.call.hidden
        heads = list(zip(self.heads.layers, self.caches, strict=True))[:width]
        ends = [self.call.repeat(layer, z, cache)[:, last : last + 1] for layer, cache in heads]
        return draw(self.output.logits(self.norm(torch.cat(ends, 1))))
