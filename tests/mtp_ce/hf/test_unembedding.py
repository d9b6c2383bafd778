"""The output layer as it is read is the one the model has: of every architecture, or the model is refused by name."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mtp_ce import MTPWrapper, Rho1ExcessScorer
from mtp_ce.unembedding import Unembedding

V = 61
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 1,
}
HEADS = {**SIZES, "head_dim": 8}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": V}
GEMMA4 = {**HEADS, **PER_LAYER, "final_logit_softcapping": 3.0}
SEEING = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
BART = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "encoder_layers": 1}
# A name, the configuration, and what is read of it: scale, softcap, vocabulary.
READ: dict[str, tuple[str, dict[str, Any], float, float | None, int]] = {
    "llama": ("llama", SIZES, 1.0, None, V),
    "gpt2": ("gpt2", {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2}, 1.0, None, V),
    "mixtral": ("mixtral", {**SIZES, "num_local_experts": 4}, 1.0, None, V),
    "gptj, a bias": ("gptj", {"vocab_size": V, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}, 1.0, None, V),
    "mpt, a scale it does not use": (
        "mpt",
        {"vocab_size": V, "d_model": 16, "n_layers": 2, "n_heads": 2, "logit_scale": 0.3},
        1.0,
        None,
        V,
    ),
    "bart, whose forward goes past its base model": ("bart", {"vocab_size": V, **BART}, 1.0, None, V),
    "gemma2": ("gemma2", {**HEADS, "final_logit_softcapping": 3.0}, 1.0, 3.0, V),
    "gemma2 as released": ("gemma2", HEADS, 1.0, 30.0, V),
    "gemma3 with images": ("gemma3", {"text_config": HEADS, "vision_config": SEEING}, 1.0, None, V),
    "gemma4": ("gemma4_text", GEMMA4, 1.0, 3.0, V),
    "gemma4 with images": ("gemma4", {"text_config": GEMMA4, "vision_config": SEEING}, 1.0, 3.0, V),
    "recurrent_gemma": (
        "recurrent_gemma",
        {**SIZES, "num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 16, "logits_soft_cap": 3.0},
        1.0,
        3.0,
        V,
    ),
    "xlstm": (
        "xlstm",
        {"vocab_size": V, "hidden_size": 32, "num_heads": 2, "num_blocks": 2, "output_logit_soft_cap": 3.0},
        1.0,
        3.0,
        V,
    ),
    "cohere2": ("cohere2", {**SIZES, "logit_scale": 0.3}, 0.3, None, V),
    "falcon_h1": ("falcon_h1", {**SIZES, **MAMBA, "lm_head_multiplier": 0.3}, 0.3, None, V),
    "granite": ("granite", {**SIZES, "logits_scaling": 3.0}, 1 / 3, None, V),
    "hyperclovax": ("hyperclovax", {**SIZES, "logits_scaling": 3.0}, 3.0, None, V),
    "inkling": ("inkling_text", {**HEADS, "logits_mup_width_multiplier": 3.0}, 1 / 3, None, V),
    "inkling, a padded vocabulary": ("inkling_text", {**HEADS, "unpadded_vocab_size": 50}, 1 / 24, None, 50),
}
REFUSED: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": SIZES,
    "electra": {**SIZES, "embedding_size": 16},
    "electra with narrower embeddings": {**SIZES, "embedding_size": 8},
    "modernbert-decoder": {**SIZES, "pad_token_id": 0, "cls_token_id": 0, "sep_token_id": 0, "eos_token_id": 0},
}
CLASSES = {"bert": "BertLMHeadModel", "roberta": "Roberta", "electra": "Electra", "modernbert-decoder": "ModernBert"}


def build(architecture: str, config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = {**config, "is_decoder": True} if architecture in CLASSES else config
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", READ)
def test_scale_softcap_bias_and_vocabulary_are_the_models(name, dtype):
    architecture, config, *expected = READ[name]
    model = build(architecture, config).to(dtype)
    output = Unembedding.checked(model)
    assert [output.scale, output.softcap, output.weight.shape[0]] == expected
    if dtype == torch.float32 and architecture != "xlstm":  # whose own forward is of some sizes only
        tokens = torch.arange(2, 8)[None]
        with torch.no_grad():
            logits = output.logits(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
            torch.testing.assert_close(logits, model(tokens, use_cache=False).logits)


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_before_the_output_layer_is_refused_by_name(name):
    architecture = name.partition(" ")[0]
    words = f"model is {CLASSES[architecture]}.*, which has more than a linear layer"
    with pytest.raises(ValueError, match=words):
        MTPWrapper(build(architecture, REFUSED[name]), 2)


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        ("gemma2 as released", {"softcap": None}),
        ("gemma2 as released", {"softcap": 25.0}),
        ("cohere2", {"scale": 1.0}),
        ("gptj, a bias", {"bias": None}),
        ("bart, whose forward goes past its base model", {"scale": 0.9}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_reading_is_found_also_of_small_weights(monkeypatch, config, wrong, dtype):
    """Of weights as they are initialised, whose logits no softcap would change."""
    model = build(*READ[config][:2]).to(dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.1)
    output = Unembedding.of(model)
    Unembedding.checked(model)
    monkeypatch.setattr(Unembedding, "of", lambda _: output._replace(**wrong))
    with pytest.raises(ValueError, match="more than a linear layer"):
        Unembedding.checked(model)


def test_a_reference_is_held_to_it_too():
    with pytest.raises(ValueError, match="model is BertLMHeadModel, which has more"):
        Rho1ExcessScorer(build("bert", SIZES))


@pytest.mark.parametrize("name", ["llama", "bert", "bart, whose forward goes past its base model"])
def test_the_model_is_left_as_it_was(name):
    """Also one that is refused: forward, modes, gradients, hooks and random numbers."""
    architecture, config = READ[name][:2] if name in READ else (name, REFUSED[name])
    model = build(architecture, config).train()
    model.base_model.eval()
    own = model.base_model.forward
    modes = [module.training for module in model.modules()]
    attributes = [{*vars(module)} for module in model.modules()]
    state = torch.get_rng_state()
    try:
        Unembedding.checked(model)
    except ValueError:
        assert name == "bert"
    assert model.base_model.forward == own
    assert [module.training for module in model.modules()] == modes
    assert [{*vars(module)} for module in model.modules()] == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_forward_that_another_library_has_put_there_stays_there():
    model = build("llama", SIZES)
    model.base_model.forward = wrapped = model.base_model.forward
    Unembedding.checked(model)
    assert vars(model.base_model)["forward"] is wrapped


def test_neither_layers_nor_attention_are_run():
    """So a model may be wrapped on another device than its kernels are for."""
    model = build("llama", SIZES)
    for module in model.base_model.modules():
        module.forward = None
    assert Unembedding.checked(model).weight is model.lm_head.weight


def test_a_model_without_values_is_wrapped_unseen():
    with torch.device("meta"):
        wrapper = MTPWrapper(LlamaForCausalLM(LlamaConfig(**SIZES)), 2, heads="layer")
    assert all(parameter.is_meta for parameter in wrapper.parameters())


# Heads that are decoder layers are held to the model likewise.


@pytest.mark.parametrize("kind", ["layer", "sequential"])
@pytest.mark.parametrize("name", ["gemma4", "gemma4 with images", "gemma3 with images"])
def test_layers_with_inputs_of_their_own_are_heads(name, kind):
    """Gemma 4 has a norm of its per-layer inputs behind the final one."""
    wrapper = MTPWrapper(build(*READ[name][:2]), 3, heads=kind)
    tokens = torch.arange(2, 12)[None]
    wrapper(tokens, labels=tokens).loss.backward()
    layers: Any = wrapper.heads.layers
    assert all(parameter.grad is not None for parameter in layers[0].parameters())


@pytest.mark.parametrize("kind", ["layer", "sequential"])
@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("opt", {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 8}),
        ("gemma3n_text", {**GEMMA4, "num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2}),
        ("falcon_h1", {**SIZES, **MAMBA}),
        ("openai-gpt", {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    ],
)
def test_layers_that_can_not_be_heads_are_refused_by_name(architecture, config, kind):
    config = {**config, "activation_sparsity_pattern": [0.0, 0.0]} if architecture == "gemma3n_text" else config
    model = build(architecture, config)
    with pytest.raises(ValueError, match=f"{type(model).__name__} has decoder layers .*; use heads='residual'"):
        MTPWrapper(model, 3, heads=kind)
    assert isinstance(MTPWrapper(model, 3).causal, nn.Module)
