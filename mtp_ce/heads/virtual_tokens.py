"""The virtual tokens of PEFT's prompt learning, which its own forward puts before every text.

    prompt tuning, P-tuning   P trained embeddings before those of the text: P more positions
    prefix tuning             trained keys and values of P positions in the cache of every layer

No head predicts from a virtual token: the hidden states of their positions are dropped, so that the first token of a
text is no target, as without them. Attention of the text to them is the model's own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

PREPENDED = ("PROMPT_TUNING", "P_TUNING")
PREFIXED = ("PREFIX_TUNING",)


def virtual_tokens(model: Any) -> int:
    """Return P, the number of virtual tokens of a model with PEFT's wrapper; 0 for any other."""
    config = _prompt_learning(model)
    return 0 if config is None else int(config.num_virtual_tokens)


def check_virtual_tokens(model: Any, reads_last_layer: bool, has_router_loss: bool) -> None:
    """Check that heads can be trained on a model's virtual tokens.

    Args:
        model: the causal language model, with PEFT's wrapper where there is one.
        reads_last_layer: whether the heads are decoder layers, with attention of their own.
        has_router_loss: whether the model's configuration requests the balancing loss of its routers.

    Raises:
        ValueError: they can't.
    """
    config = _prompt_learning(model)
    if config is None:
        return
    kind = config.peft_type.value
    if kind not in PREPENDED + PREFIXED:
        raise ValueError(
            f"model has virtual tokens of PEFT's {kind}, which the heads can't follow; expected "
            f"{', '.join(PREPENDED + PREFIXED)}, or adapters such as LoRA."
        )
    if reads_last_layer:
        raise ValueError(
            f"model has virtual tokens of PEFT's {kind}, which heads that are decoder layers can't attend to; expected "
            "heads='residual', or adapters such as LoRA."
        )
    if has_router_loss:
        raise ValueError(
            f"output_router_logits is True, which adds the routers' balancing loss, and model has virtual tokens of "
            f"PEFT's {kind}; expected output_router_logits=False, or adapters such as LoRA."
        )


def run_with_virtual_tokens(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Run a model of prompt learning, and return the last hidden states [B, S, D] of the text's own positions.

    Raises:
        ValueError: an input that PEFT would drop with a warning.
    """
    kind = _prompt_learning(model).peft_type.value
    for name in ("position_ids", "cu_seq_lens_q", "token_type_ids"):
        if inputs.get(name) is not None:
            raise ValueError(
                f"{name} is given, and PEFT's {kind} does not apply it behind virtual tokens; expected rows of one "
                "document each, without it, or adapters such as LoRA."
            )
    causal, hidden = model.get_base_model(), []
    checkpoints = causal.training and any(getattr(part, "gradient_checkpointing", False) for part in causal.modules())
    if kind in PREFIXED and checkpoints:
        raise ValueError(
            f"gradient checkpointing is on, which drops the prefix of PEFT's {kind}; expected "
            "gradient_checkpointing=False, or adapters such as LoRA."
        )

    def keep(_: Any, __: Any, output: Any) -> None:
        hidden.append(output.last_hidden_state)

    hook = causal.base_model.register_forward_hook(keep)
    try:
        # The logits of one position: the heads have their own.
        model(**inputs, logits_to_keep=1)
    finally:
        hook.remove()
    text = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    last: Tensor = hidden[-1][:, -text.shape[1] :]
    return last


def prepare_behind_virtual_tokens(model: Any, tokens: Tensor, **kwargs: Any) -> dict[str, Any]:
    """Return a model's `prepare_inputs_for_generation` for tokens whose virtual tokens, if any, are in the cache.

    PEFT's own prepares no more than a single token. Mask and positions count the virtual tokens as it does.
    """
    config, causal = _prompt_learning(model), getattr(model, "get_base_model", lambda: model)()
    if config is None:
        inputs: dict[str, Any] = causal.prepare_inputs_for_generation(tokens, **kwargs)
        return inputs
    inputs = type(causal).prepare_inputs_for_generation(causal, tokens, **kwargs)
    if inputs.get("attention_mask") is not None:
        inputs["attention_mask"] = F.pad(inputs["attention_mask"], (config.num_virtual_tokens, 0), value=1)
    if inputs.get("position_ids") is not None:
        # Behind prepended tokens PEFT leaves positions to the model, which counts those in the cache.
        prefixed = config.peft_type.value in PREFIXED
        inputs["position_ids"] = inputs["position_ids"] + config.num_virtual_tokens if prefixed else None
    return inputs


def _prompt_learning(model: Any) -> Any:
    config = getattr(model, "active_peft_config", None)
    return config if getattr(config, "is_prompt_learning", False) else None
