"""The models that can have prediction heads: causal language models of transformers with a base model."""

from __future__ import annotations

from typing import Any

import transformers
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
    if causal.get_output_embeddings() is None:
        raise TypeError(
            f"model is {type(causal).__name__} without output embeddings on top of a base model; expected a causal "
            "language model, as AutoModelForCausalLM loads it."
        )
    if causal.base_model is causal:
        raise TypeError(
            f"model is {type(causal).__name__}, whose base model can't be run by itself: transformers "
            f"{transformers.__version__} names it {causal.base_model_prefix!r}, and the model has no such module. "
            "The architecture is unsupported."
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


def check_trainable(model: Any) -> None:
    """Check that a quantised model has adapters to train, by the rules of transformers' Trainer.

    Raises:
        ValueError: there are none, or the method of quantisation does not support training.
    """
    if not getattr(model, "is_quantized", False):
        return
    from transformers.trainer_utils import validate_quantization_for_training

    try:
        validate_quantization_for_training(model)
    except ValueError as error:
        raise ValueError(
            "trunk is 'joint', and model is quantised, so that its weights can't be trained; expected adapters on it "
            f"(LoRA), or trunk='frozen', which trains the heads alone. transformers: {error}"
        ) from None
