"""The balancing loss of a mixture of experts, which the model computes itself (arXiv:2101.03961, equations 4 to 6).

    loss = loss of the heads + share * coefficient * aux_loss
    share = positions of this batch with a target / num_items_in_batch, or 1 without

The model's own forward, over the logits of one position, says what its routers have to pay and leaves the hidden
states that the heads read. A share makes the sum over micro-batches and ranks a mean of what each of them says.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mtp_ce.heads.layers import LayerHeads

# Under which name a model or its configuration has the coefficient.
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def wants_router_loss(causal: Any, heads: nn.Module, asked: bool | None = None) -> bool:
    """Whether a call asks for the loss, or where it says nothing the model's configuration, as in transformers.

    Raises:
        ValueError: the loss is wanted of heads that have routers of their own, which nobody balances.
    """
    wanted = getattr(causal.config.get_text_config(), "output_router_logits", False) if asked is None else asked
    if wanted and isinstance(heads, LayerHeads):
        raise ValueError(
            "output_router_logits is True, which asks for the routers' balancing loss, and heads that are decoder "
            "layers have routers of their own, which no model's loss balances; expected heads='residual', or "
            "output_router_logits=False."
        )
    return bool(wanted)


def coefficient(causal: Any) -> float:
    """Give what the model multiplies its balancing loss by.

    Raises:
        ValueError: it has no such number.
    """
    for name in COEFFICIENTS:
        for where in (causal, causal.config.get_text_config()):
            if (value := getattr(where, name, None)) is not None:
                return float(value)
    raise ValueError(
        f"output_router_logits is True, which asks for the routers' balancing loss, and {type(causal).__name__} has "
        f"none: neither it nor its configuration has {' or '.join(COEFFICIENTS)}. Set output_router_logits to False."
    )


def routed(causal: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Run the model; its last hidden states [B, S, D] and its balancing loss [], not yet times the coefficient.

    Raises:
        ValueError: the model gave no such loss.
    """
    hidden: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        hidden.append(output.last_hidden_state)

    hook = causal.base_model.register_forward_hook(keep)
    try:
        output = causal(**{**inputs, "output_router_logits": True, "logits_to_keep": 1})
    finally:
        hook.remove()
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"output_router_logits is True, and {type(causal).__name__} gave no balancing loss of its routers; "
            "expected a mixture of experts, or output_router_logits=False."
        )
    return hidden[-1], loss
