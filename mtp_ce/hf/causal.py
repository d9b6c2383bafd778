"""The models that can have prediction heads: causal language models of transformers with a base model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def causal_model(model: Any) -> Any:
    """Return the causal language model, without PEFT's wrapper.

    Raises:
        TypeError: it is no model of transformers, or has no output embeddings on top of a base model.
        ValueError: an encoder-decoder.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(causal, PreTrainedModel):
        raise TypeError(f"model is {type(causal).__name__}; expected a causal language model of transformers.")
    if causal.config.is_encoder_decoder:
        raise ValueError(f"model is {type(causal).__name__}, an encoder-decoder; expected a causal language model.")
    if causal.get_output_embeddings() is None or causal.base_model is causal:
        raise TypeError(
            f"model is {type(causal).__name__} without output embeddings on top of a base model; expected a causal "
            "language model, as AutoModelForCausalLM loads it."
        )
    return causal


def check_in_memory(causal: Any) -> None:
    """Check that no parameter is offloaded, since the loss reads the output layer outside the module's forward.

    A model that is on the meta device as a whole, without any values yet, may be wrapped.

    Raises:
        ValueError: some of them are.
    """
    offloaded = [name for name, x in causal.named_parameters() if x.is_meta]
    devices = getattr(causal, "hf_device_map", None)
    if offloaded and (devices is not None or len(offloaded) < len(list(causal.parameters()))):
        raise ValueError(
            f"model has offloaded parameters, such as {offloaded[0]}, which are on the meta device outside its "
            "forward; expected all of them in memory: load it without device_map, or with device_map={'': device}."
        )
