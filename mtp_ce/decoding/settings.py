"""The settings of `generate` that speculative decoding does not follow: refused by name before anything is computed.

All others are applied by transformers itself: its `generate` prepares the inputs, the logits processors and the
stopping criteria, and calls the loop of `mtp_ce.decoding.speculative` in place of its own. Settings of beams, of
assistants and of static caches that change nothing while their method is off are ignored, as `generate` ignores them.
The cache is always on, whatever `use_cache` is, which changes no text.
"""

from __future__ import annotations

from typing import Any

# Values with which a setting of GenerationConfig is off. Another value is refused.
OFF: dict[str, tuple[Any, ...]] = {
    # Other ways to decode.
    "num_beams": (1, None),
    "num_beam_groups": (1, None),
    "num_return_sequences": (1, None),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    # Other drafts.
    "use_mtp": (None, False),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "speculation_type": (None,),
    "is_assistant": (None, False),
    # Logits that depend on more than this text, or tokens that leave a mark of how they were drawn.
    "guidance_scale": (None, 1),
    "watermarking_config": (None,),
    "token_healing": (None, False),
    # A rejected draft is cropped from a cache that grows with the text.
    "cache_implementation": (None, "dynamic"),
    "prefill_chunk_size": (None,),
    # Speculative decoding returns tokens and counts.
    "return_dict_in_generate": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_scores": (None, False),
    "output_logits": (None, False),
}

# Arguments of `generate` and of the model's forward, likewise.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "assistant_model": (None,),
    "assistant_tokenizer": (None,),
    "negative_prompt_ids": (None,),
    "negative_prompt_attention_mask": (None,),
    "custom_generate": (None,),
    "synced_gpus": (None, False),
    "inputs_embeds": (None,),
    "past_key_values": (None,),
    "cache": (None,),
}


def check_followed(config: Any, arguments: dict[str, Any]) -> None:
    """Check that speculative decoding can do what `generate` would.

    Args:
        config: the GenerationConfig of this call, with the model's own settings and the caller's.
        arguments: the caller's other arguments.

    Raises:
        ValueError: names the first setting or argument that can't be followed.
    """
    for names, values in ((OFF, vars(config)), (ARGUMENTS, arguments)):
        for name, off in names.items():
            value = values.get(name)
            if not any(value is one or (isinstance(value, int | float | str) and value == one) for one in off):
                shown = repr(value) if isinstance(value, int | float | str) else f"a {type(value).__name__}"
                raise ValueError(
                    f"{name} is {shown}, which speculative decoding does not follow; expected {off[0]}, or generate "
                    "without speculative=True."
                )
