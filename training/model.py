"""The model of a run: a transformers Llama with random weights, in the wrapper that gives it prediction heads."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM

from mtp_ce.training.schema import DataConfig, Recipe, TrunkConfig
from mtp_ce.wrapper import MTPWrapper


def build_model(recipe: Recipe, end_of_text: int | None = None) -> MTPWrapper:
    """Build the model with random weights, on the default device (meta included), from torch's global seed.

    Args:
        recipe: sizes and heads come from `recipe.model`, vocabulary and longest row from `recipe.data`.
        end_of_text: token id that opens and closes a document; None where there is no tokenizer yet.
    """
    heads = recipe.model.mtp
    llama = LlamaForCausalLM(llama_config(recipe.model, recipe.data, end_of_text))
    return MTPWrapper(llama, heads.horizon, heads=heads.kind, loss=heads.loss)


def llama_config(sizes: TrunkConfig, data: DataConfig, end_of_text: int | None = None) -> LlamaConfig:
    """Give the configuration of a Llama that reads the recipe's rows.

    Args:
        sizes: widths and depth.
        data: the vocabulary and the longest row.
        end_of_text: token id that opens and closes a document; None where there is no tokenizer yet.
    """
    return LlamaConfig(
        vocab_size=data.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.attention_heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=data.sequence_length,
        initializer_range=sizes.init_std,
        tie_word_embeddings=sizes.tie_embeddings,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
