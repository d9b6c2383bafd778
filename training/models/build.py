"""The model of a run: a Llama with random weights or a pretrained model, wrapped with prediction heads."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mtp_ce.heads.kinds import CONFIG_FILE
from mtp_ce.heads.protocol import Heads, heads_class
from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.config.model import MTPConfig, PretrainedModelConfig, TrunkConfig
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.errors import RecipeError, refuse_unloadable


def build_model(recipe: Recipe, end_of_text: int | None = None, pretrained: Path | None = None) -> MTPWrapper:
    """Build the model on the default device; random weights come from torch's global seed.

    Args:
        recipe: sizes and heads come from `recipe.model`, vocabulary and longest row from `recipe.data`.
        end_of_text: token id that opens and closes a document; None if there is no tokenizer yet.
        pretrained: folder of the model that a recipe of kind "pretrained" starts from. Heads saved beside it are loaded
            with it.

    Raises:
        RecipeError: as `with_heads`, the scorer needs heads that draft, or the files of a pretrained model can't be
            read.
    """
    heads = recipe.model.mtp
    loaded = _check_kind(heads)
    if recipe.scorer.reads_drafts and not loaded.drafts:
        raise RecipeError(
            f"scorer {recipe.scorer.name} needs heads that draft, and those of model.mtp.kind {heads.kind} don't; give "
            "model.mtp.kind=sequential"
        )
    if not isinstance(recipe.model, PretrainedModelConfig):
        return with_heads(_trunk(recipe, end_of_text, pretrained), heads)
    with refuse_unloadable("model.source", recipe.model.source):
        return _pretrained(recipe, end_of_text, pretrained)


def _pretrained(recipe: Recipe, end_of_text: int | None, pretrained: Path | None) -> MTPWrapper:
    heads = recipe.model.mtp
    # A model of one head, such as a reference, ignores saved heads.
    if pretrained and heads.horizon > 1 and (pretrained / CONFIG_FILE).exists():
        wrapper = MTPWrapper.from_pretrained(pretrained, **_of_the_loss(heads), dtype=torch.float32)
        found = (wrapper.horizon, wrapper.kind, wrapper.heads.shared and wrapper.heads.can_share)
        assert found == (heads.horizon, heads.kind, heads.shared), "sources.check_heads has compared them"
        return wrapper
    return with_heads(_trunk(recipe, end_of_text, pretrained), heads)


def with_heads(trunk: PreTrainedModel, heads: MTPConfig) -> MTPWrapper:
    """Return a trunk with new heads.

    Raises:
        RecipeError: the class of the heads can't be loaded, or is no subclass of `Heads`.
    """
    _check_kind(heads)
    return MTPWrapper(trunk, heads.horizon, heads=heads.kind, shared=heads.shared, **_of_the_loss(heads))


def _of_the_loss(heads: MTPConfig) -> dict[str, Any]:
    """Return the arguments of `MTPWrapper` that are not saved with the heads."""
    return heads.model_dump(include={"trunk", "loss", "head_reduction", "targets", "activation_checkpointing"})


def _check_kind(heads: MTPConfig) -> type[Heads]:
    try:
        loaded = heads_class(heads.kind, "model.mtp.kind")
    except (TypeError, ValueError) as error:
        raise RecipeError(str(error)) from None
    if heads.shared and not loaded.can_share:
        raise RecipeError(f"model.mtp.shared is true with kind {heads.kind}, which can't be shared; give false")
    return loaded


def _trunk(recipe: Recipe, end_of_text: int | None, pretrained: Path | None) -> PreTrainedModel:
    if not isinstance(recipe.model, PretrainedModelConfig):
        return LlamaForCausalLM(llama_config(recipe.model, recipe.data, end_of_text))
    assert pretrained is not None
    trunk: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        pretrained, dtype=torch.float32, trust_remote_code=False
    )
    return trunk


def checkpoint_activations(model: MTPWrapper) -> None:
    """Recompute the activations of every decoder layer of the trunk, and of every head, in the backward.

    Raises:
        RecipeError: the architecture's layers do not support it.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        name = type(model.causal).__name__
        raise RecipeError(
            f"train.activation_checkpointing is true, but the layers of {name} do not support it; give false"
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
    model.heads.checkpoint_activations()


def llama_config(sizes: TrunkConfig, data: DataConfig, end_of_text: int | None = None) -> LlamaConfig:
    """Return the configuration of a Llama for the recipe's rows.

    Args:
        sizes: widths and depth.
        data: the vocabulary and the longest row.
        end_of_text: token id that opens and closes a document; None if there is no tokenizer yet.
    """
    assert data.vocab_size is not None
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
