"""How a causal language model turns hidden states into logits, where that is more than one matrix product.

logits = softcap( (scale * hidden) W^T + bias )         softcap(x) = c tanh(x / c)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Unembedding(NamedTuple):
    """The output layer of a causal language model, as the linear path of the loss takes it."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: nn.Module) -> Unembedding:
        """Read it from a Hugging Face model.

        Args:
            model: has `get_output_embeddings()`; its configuration's final softcap and logit scale are honoured.

        Raises:
            TypeError: the model has no output embeddings, so it can't predict tokens.
            ValueError: PEFT has put an adapter on them.
        """
        layer: Any = getattr(model, "get_output_embeddings", lambda: None)()
        if layer is None:
            raise TypeError(f"{type(model).__name__} has no output embeddings; expected a causal language model.")
        if hasattr(layer, "base_layer"):
            raise ValueError(
                f"{type(model).__name__} has an adapter on its output embeddings, which the loss does not read; leave "
                "them out of target_modules, or train them whole with modules_to_save."
            )
        config = getattr(model, "config", None)
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(layer.weight, getattr(layer, "bias", None), _scale(config), softcap)

    def scaled(self, hidden: Tensor) -> Tensor:
        """Hidden states of which weight, bias and softcap alone make logits."""
        return hidden if self.scale == 1 else hidden * self.scale

    def logits(self, hidden: Tensor) -> Tensor:  # [..., D]
        """Logits [..., V]."""
        logits = nn.functional.linear(self.scaled(hidden), self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _scale(config: Any) -> float:
    """Give what a model multiplies its logits by, which is the same to its hidden states."""
    if config is None or config.model_type == "mpt":  # has a logit_scale that transformers does not use
        return 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    divisor = getattr(config, "logits_scaling", None)  # Granite, MiniCPM3; HyperCLOVA X multiplies by it
    if divisor is None:
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1 / divisor
