"""One forward of a trunk and its heads: the hidden states of all heads, and the routers' balancing loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mtp_ce.heads.protocol import Heads
from mtp_ce.heads.trunk import TrunkPass, decoder_layers, observed
from mtp_ce.heads.virtual_tokens import check_virtual_tokens, run_with_virtual_tokens, virtual_tokens
from mtp_ce.hf.causal import causal_model
from mtp_ce.hf.router_loss import routed, wants_router_loss


def head_hidden_states(
    model: Any,
    heads: Heads,
    inputs: dict[str, Any],
    joint: bool,
    horizon: int | None = None,
    next_input_ids: Tensor | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """Run the trunk once and the heads on it.

    Args:
        model: the model, with PEFT's wrapper where there is one.
        heads: its heads.
        inputs: arguments of the model's forward.
        joint: whether the heads' gradient reaches the trunk.
        horizon: of this call, for one module that runs at any depth; None means that of the heads.
        next_input_ids: [B, n], the tokens after those of the inputs.

    Returns:
        The hidden states [B, S, D] of the heads, and the balancing loss [] of the model's routers where the call or the
        configuration requests it and the trunk is trained, else None.

    Raises:
        ValueError: the heads return another number of tensors than they declare, or virtual tokens can't be followed.
    """
    causal = causal_model(model)
    # The check also refuses heads with routers of their own, whether the trunk is trained or not.
    balances = wants_router_loss(causal, heads, inputs.get("output_router_logits")) and joint
    trains = joint and torch.is_grad_enabled()
    if heads.reads_last_layer:
        layers, norm = decoder_layers(causal)
        with torch.set_grad_enabled(trains), observed(layers[heads.layer_index]) as call:
            hidden, router_loss = _run(model, inputs, balances)
            tokens = inputs.get("inputs_embeds")
            embed = causal.get_input_embeddings()
            if tokens is None:
                tokens = embed(inputs["input_ids"])
            next_tokens = None if next_input_ids is None else embed(next_input_ids)
        depths = {} if horizon is None else {"horizon": horizon}
        trunk = TrunkPass(call, norm if joint else _detached(norm), tokens, next_tokens)
        outputs: list[Tensor] = heads(hidden, trunk, **depths)
    else:
        with torch.set_grad_enabled(trains):
            hidden, router_loss = _run(model, inputs, balances)
        outputs = heads(hidden)
    expected = heads.output_count if horizon is None else horizon
    if len(outputs) != expected:
        raise ValueError(
            f"heads of the kind {heads.kind!r} returned {len(outputs)} tensors; expected {expected}, "
            "head 0's hidden state first."
        )
    return outputs, router_loss


def _run(model: Any, inputs: dict[str, Any], balances: bool) -> tuple[Tensor, Tensor | None]:
    if virtual_tokens(model):
        check_virtual_tokens(model, reads_last_layer=False, has_router_loss=balances)
        return run_with_virtual_tokens(model, inputs), None
    causal = causal_model(model)
    if balances:
        return routed(causal, inputs)
    return causal.base_model(**inputs).last_hidden_state, None


def _detached(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a module's function with its parameters detached, so that no gradient reaches them."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return lambda hidden: torch.func.functional_call(module, parameters, (hidden,))
