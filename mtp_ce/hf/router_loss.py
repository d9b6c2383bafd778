"""The balancing loss of a mixture of experts, which the model computes itself (arXiv:2101.03961, equations 4 to 6).

    loss = loss of the heads + fraction * coefficient * aux_loss
    fraction = N of this batch, as the loss counts it, / num_items_in_batch, or 1 without

The model's own forward, over the logits of one position, returns its routers' loss and computes the hidden states that
the heads read. The fraction makes the sum over micro-batches and ranks a mean of their balancing losses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mtp_ce.heads.protocol import Heads
from mtp_ce.ops.rows import count_terms
from mtp_ce.options import LossInputs, LossOptions

# Names of the coefficient, in the model or in its configuration.
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def wants_router_loss(causal: Any, heads: Heads, requested: bool | None = None) -> bool:
    """Return whether a call requests the loss; None means as the model's configuration says, as in transformers.

    Raises:
        ValueError: it is requested with heads whose own routers nothing balances.
    """
    configured = getattr(causal.config.get_text_config(), "output_router_logits", False)
    wanted = configured if requested is None else requested
    if wanted and heads.may_have_routers:
        raise ValueError(
            "output_router_logits is True, which adds the routers' balancing loss, and heads that are decoder layers "
            "have routers of their own, which no model's loss balances; expected heads='residual', or "
            "output_router_logits=False."
        )
    return bool(wanted)


def coefficient(causal: Any) -> float:
    """Return the factor of the model's balancing loss.

    Raises:
        ValueError: the model has none.
    """
    for name in COEFFICIENTS:
        for holder in (causal, causal.config.get_text_config()):
            if (value := getattr(holder, name, None)) is not None:
                return float(value)
    raise ValueError(
        f"output_router_logits is True, which adds the routers' balancing loss, and {type(causal).__name__} has none: "
        f"neither it nor its configuration has {' or '.join(COEFFICIENTS)}. Set output_router_logits to False."
    )


def normalized_fraction(live: Tensor, inputs: LossInputs, options: LossOptions) -> Tensor | float:
    """Return the factor of one micro-batch: its own N divided by the whole batch's, 0 without a valid row.

    Args:
        live: [B, S, H] bool, the valid rows.
        inputs: of the loss, with N of the whole batch as the normalizer, or None where this is all of it.
        options: of the loss.
    """
    if inputs.normalizer is None:
        return 1
    own = count_terms(live, options, inputs)
    return own / torch.where(own == 0, 1, inputs.normalizer)


def routed(causal: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Run the model; return its last hidden states [B, S, D] and its balancing loss [], without the coefficient.

    Raises:
        ValueError: the model returned no such loss.
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
            f"output_router_logits is True, and {type(causal).__name__} returned no balancing loss of its routers; "
            "expected a mixture of experts, or output_router_logits=False."
        )
    return hidden[-1], loss
