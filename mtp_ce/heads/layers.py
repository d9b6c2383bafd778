"""Heads that are decoder layers of the model's own class, so that they attend as the model does.

    z        = output of the model's last decoder layer, before its final norm          [B, S, D]

    layer        hidden_h = norm(layer_h(z))                                            h = 1..H-1
    sequential   z_h      = layer_h(P_h [norm_a(z_{h-1}); norm_b(embed(token t + h))]),  z_0 = z
                 hidden_h = norm(z_h)

norm is the model's own final norm, which all heads share as they share the unembedding. A layer begins as a copy of the
model's last one and is called as that one was called in the same forward (mask, positions), which works for every
architecture whose layers look alike. P_h begins as the identity on z and 0 on the embedding.

At the end of a row there is no token t + h. Such rows have no target either, and causal attention keeps them from
others.

Source: "layer" arXiv:2404.19737, section 2; "sequential" arXiv:2412.19437, section 2.2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtp_ce.heads.residual import CONFIG_FILE, TENSORS_FILE
from mtp_ce.unembedding import has_values, undisturbed

LayerKind = Literal["layer", "sequential"]

# Not the final norm, though they stand where it does: of BART's embeddings; of Gemma's per-layer inputs.
OTHER_NORMS = ("layernorm_embedding", "per_layer_projection_norm")


@dataclass
class LayerCall:
    """How the model's last decoder layer was called in one forward, and what it gave."""

    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    output: Tensor | None = None  # [B, S, D]

    def again(self, layer: nn.Module, hidden: Tensor, cache: Any = None) -> Tensor:
        """Call another layer in the same way, on other hidden states, with a cache of its own or with none."""

        def own(value: Any) -> Any:
            # Architectures differ in the argument's name and place. The model's cache is the model's business.
            return cache if hasattr(value, "get_seq_length") else value

        options = {name: own(value) for name, value in self.options.items() if name != "hidden_states"}
        if cache is None and "use_cache" in options:
            options["use_cache"] = False
        return _tensor(layer(hidden, *map(own, self.arguments), **options))


class LayerHeads(nn.Module):
    """Extra heads of decoder layers.

    Args:
        model: the causal language model whose last layer they copy.
        horizon: H, the number of heads; head 0 is the model's own.
        kind: "layer": side by side on the model's output; "sequential": each on the one before, and on the token that
            head predicted, which training knows.

    Raises:
        ValueError: the model's decoder layers can't be found, or can't be called again on other hidden states.
    """

    def __init__(self, model: Any, horizon: int, kind: LayerKind) -> None:
        super().__init__()
        layers, _ = decoder_layers(model)
        last, config = layers[-1], model.config.get_text_config(decoder=True)
        unembed = model.get_output_embeddings().weight
        self.hidden_size, self.horizon, self.kind = unembed.shape[1], horizon, kind
        # PEFT keeps a layer's own parameters one level deeper; its adapters stay with the model.
        own = {name.replace(".base_layer.", "."): x for name, x in last.state_dict().items() if "lora_" not in name}
        try:
            self.layers = nn.ModuleList(type(last)(config, len(layers) - 1) for _ in range(horizon - 1))
            for layer in self.layers:
                layer.load_state_dict(own)
        except (AttributeError, RuntimeError, TypeError) as error:
            raise _not_these(model, f"a second {type(last).__name__} can't be made") from error
        if kind == "sequential":
            D = self.hidden_size
            self.projections = nn.ModuleList(nn.Linear(2 * D, D, bias=False) for _ in self.layers)
            self.hidden_norms = nn.ModuleList(nn.RMSNorm(D) for _ in self.layers)
            self.token_norms = nn.ModuleList(nn.RMSNorm(D) for _ in self.layers)
            with torch.no_grad():
                for projection in self.projections:
                    assert isinstance(projection, nn.Linear)
                    projection.weight.copy_(torch.eye(D, 2 * D))
        self.to(device=unembed.device, dtype=unembed.dtype)
        if has_values(unembed):
            with undisturbed(model):
                self._try(model)

    def _try(self, model: Any) -> None:
        """Run model and heads over two tokens, and look whether they are what the equations above say."""
        layers, norm = decoder_layers(model)
        tokens = torch.arange(2, device=model.get_output_embeddings().weight.device)[None]
        try:
            with watched(layers[-1]) as call:
                hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        except (ImportError, RuntimeError, ValueError):
            return  # the model's kernels are for another device than it is on yet
        try:
            z = norm(call.output)
            outputs = self(hidden, call, norm, model.get_input_embeddings()(tokens))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise _not_these(model, "the last one can't be called again on other hidden states") from error
        if z.shape != hidden.shape or not torch.allclose(z, hidden, 1e-3, 1e-3, equal_nan=True):
            raise _not_these(model, "after the last one comes more than a norm")
        if any(x.shape != hidden.shape for x in outputs):
            raise _not_these(model, "the last one gives more than hidden states [B, S, D]")

    def forward(
        self,
        hidden: Tensor,  # [B, S, D], after the model's final norm
        call: LayerCall,
        norm: Callable[[Tensor], Tensor],
        tokens: Tensor,  # [B, S, D], embeddings
    ) -> list[Tensor]:
        """Return H tensors [B, S, D]; the first one is `hidden` itself."""
        z = call.output
        assert z is not None
        outputs = [hidden]
        for h, layer in enumerate(self.layers, start=1):
            if self.kind == "layer":
                outputs.append(norm(call.again(layer, z)))
                continue
            ahead = F.pad(tokens[:, h:], (0, 0, 0, min(h, tokens.shape[1])))
            z = call.again(layer, self.chained(h, z, ahead))
            outputs.append(norm(z))
        return outputs

    def chained(self, h: int, z: Tensor, ahead: Tensor) -> Tensor:  # [B, S, D], both
        """Give what layer h of a chain reads: z of the head before, and the embeddings of the tokens h further on."""
        joined = torch.cat([self.hidden_norms[h - 1](z), self.token_norms[h - 1](ahead)], -1)
        read: Tensor = self.projections[h - 1](joined)
        return read

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the tensors and what they are; see `MTPHeads.save_pretrained`."""
        from safetensors.torch import save_file

        tensors = self.state_dict() if state_dict is None else state_dict
        save_file({name: x.detach().contiguous() for name, x in tensors.items()}, Path(folder) / TENSORS_FILE)
        config = {"kind": self.kind, "hidden_size": self.hidden_size, "horizon": self.horizon}
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _not_these(model: Any, why: str) -> ValueError:
    return ValueError(f"{type(model).__name__} has decoder layers that can't be heads: {why}; take heads='residual'.")


def decoder_layers(model: Any) -> tuple[nn.ModuleList, nn.Module]:
    """Give a causal language model's decoder layers and its final norm.

    Raises:
        ValueError: there is no list of as many modules as the configuration has layers.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for parent in model.get_decoder().modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                after = dict(parent.named_children())
                norms = [
                    module
                    for other, module in after.items()
                    if other not in OTHER_NORMS and other != name and "Norm" in type(module).__name__
                ]
                # Others of embeddings stand before the final one. BART and some OPT models have none.
                return child, norms[-1] if norms else nn.Identity()
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder layers; take heads='residual'.")


@contextmanager
def watched(layer: nn.Module) -> Iterator[LayerCall]:
    """Note how a layer is called inside the block; the hooks are gone after it."""
    call = LayerCall()

    def before(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        call.arguments, call.options = arguments[1:], dict(options)

    def after(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        call.output = _tensor(output)

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    try:
        yield call
    finally:
        for hook in hooks:
            hook.remove()


def _tensor(output: Any) -> Tensor:
    # Some architectures' layers give a tuple that begins with the hidden states.
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
