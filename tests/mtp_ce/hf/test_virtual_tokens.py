"""Prompt, prefix and P-tuning of PEFT: heads read the text behind its virtual tokens, or the combination is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import (
    CPTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from mtp_ce import MTPWrapper
from mtp_ce.decoding.speculative import Speculation, generate_speculatively

SIZES = {
    "vocab_size": 29, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
COMMON = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
KINDS = {
    "prompt": lambda: PromptTuningConfig(**COMMON),
    "p": lambda: PromptEncoderConfig(**COMMON, encoder_hidden_size=8),
    "prefix": lambda: PrefixTuningConfig(**COMMON),
}
TOKENS = torch.arange(2, 24).view(2, 11)


def tuned(kind: str, causal: Any = LlamaForCausalLM, config: Any = LlamaConfig) -> Any:
    """A model with virtual tokens that change its text."""
    torch.manual_seed(3)
    model = get_peft_model(causal(config(**SIZES, initializer_range=0.4)), KINDS[kind]())
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_()
    return model


def gradients(model: Any) -> list[torch.Tensor | None]:
    found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_the_model_with_its_virtual_tokens(kind):
    """With one head: they were ignored, and had no gradient. A padded row too, where the mask covers them."""
    model = tuned(kind)
    wrapper = MTPWrapper(model, 1, heads="none")
    masks = (None, torch.ones_like(TOKENS), torch.tensor([[0] * 4 + [1] * 7, [1] * 11]))
    for mask in masks:
        labels = TOKENS if mask is None else TOKENS.masked_fill(mask == 0, -100)
        # PEFT predicts the first token of a text from the last virtual one.
        labels = labels.index_fill(1, torch.tensor([0]), -100)
        model(TOKENS, attention_mask=mask, labels=labels).loss.backward()
        expected = gradients(model)
        assert len(expected) >= 1
        assert all(grad is not None and grad.any() for grad in expected)
        loss = wrapper(TOKENS, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.testing.assert_close(loss, model(TOKENS, attention_mask=mask, labels=labels).loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_reads_the_text_behind_the_virtual_tokens(kind):
    model = tuned(kind)
    wrapper = MTPWrapper(model, 3)
    hidden = wrapper.head_hidden_states(input_ids=TOKENS)
    expected = model(TOKENS, output_hidden_states=True).hidden_states[-1][:, -TOKENS.shape[1] :]
    for one in hidden:  # heads begin as head 0
        torch.testing.assert_close(one, expected)
    plain = model.get_base_model()(TOKENS, output_hidden_states=True).hidden_states[-1]
    assert not torch.allclose(plain, expected, atol=0.1), "virtual tokens change the hidden states"
    frozen = MTPWrapper(tuned(kind), 3, trunk="frozen")
    loss = frozen(TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(loss, wrapper(TOKENS, labels=TOKENS).loss)
    loss.backward()
    assert all(parameter.grad is None for parameter in frozen.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_speculation_has_the_text_of_generate_behind_virtual_tokens(kind):
    wrapper, total = MTPWrapper(tuned(kind), 4).eval(), Speculation()
    with torch.no_grad():
        for parameter in wrapper.heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    padded, mask = TOKENS.clone(), torch.ones_like(TOKENS)
    padded[0, :5], mask[0, :5] = 0, 0
    for prompt, given in ((TOKENS[:1], torch.ones(1, 11).long()), (padded, mask)):
        call = {"attention_mask": given, "max_new_tokens": 20, "repetition_penalty": 1.1, "pad_token_id": 0}
        expected = wrapper.generate(prompt, **call)
        base = wrapper.causal.generate(prompt, **call)
        assert not torch.equal(expected, base), "virtual tokens change the text"
        found = generate_speculatively(wrapper, prompt, **call)
        assert torch.equal(found.sequences, expected)
        total += found.speculation
    assert sum(total.kept)


def test_what_virtual_tokens_do_not_go_with_is_refused_by_name():
    for heads in ("layer", "sequential"):
        with pytest.raises(ValueError, match=r"PEFT's PREFIX_TUNING, which heads that are decoder layers .*'residual'"):
            MTPWrapper(tuned("prefix"), 3, heads=heads)
    causal = LlamaForCausalLM(LlamaConfig(**SIZES))
    cpt = CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1],
        tokenizer_name_or_path="none",
    )  # fmt: skip
    with pytest.raises(ValueError, match="virtual tokens of PEFT's CPT, which the heads can't follow; expected"):
        MTPWrapper(get_peft_model(causal, cpt), 3)
    routers = {"num_local_experts": 2, "output_router_logits": True}
    with pytest.raises(ValueError, match=r"output_router_logits is True, .* and model has virtual tokens"):
        MTPWrapper(tuned("prompt", MixtralForCausalLM, lambda **sizes: MixtralConfig(**sizes, **routers)), 3)

    positions = torch.arange(11).expand(2, -1)
    for kind in KINDS:
        with pytest.raises(ValueError, match=r"position_ids is given, and PEFT's .* does not apply it"):
            MTPWrapper(tuned(kind), 3)(TOKENS, position_ids=positions, labels=TOKENS)
    checkpointed = MTPWrapper(tuned("prefix"), 3).train()
    checkpointed.causal.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing is on, which drops the prefix"):
        checkpointed(TOKENS, labels=TOKENS)
    assert checkpointed.eval()(TOKENS, labels=TOKENS).loss > 0


def quantised(model: Any, **quantizer: Any) -> Any:
    """A model with the attributes that transformers sets on a quantised one."""
    model.is_quantized = True
    method = SimpleNamespace(quant_method="some4bit")
    model.hf_quantizer = SimpleNamespace(is_trainable=True, is_qat_trainable=False, quantization_config=method)
    vars(model.hf_quantizer).update(quantizer)
    return model


def test_a_quantised_model_without_adapters_trains_heads_alone():
    """As transformers' Trainer has it, whose check the wrapper would hide."""
    make = lambda: quantised(LlamaForCausalLM(LlamaConfig(**SIZES)))  # noqa: E731
    with pytest.raises(ValueError, match=r"trunk is 'joint', and model is quantised, .*LoRA.*trunk='frozen'.*purely"):
        MTPWrapper(make(), 3)
    for trunk in ("detached", "frozen"):
        MTPWrapper(make(), 3, trunk=trunk)(TOKENS, labels=TOKENS).loss.backward()
    from peft import LoraConfig

    adapted = get_peft_model(make(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    MTPWrapper(adapted, 3)(TOKENS, labels=TOKENS).loss.backward()
    MTPWrapper(quantised(LlamaForCausalLM(LlamaConfig(**SIZES)), is_qat_trainable=True), 3)
    with pytest.raises(ValueError, match="quantization method do not support training"):
        MTPWrapper(quantised(LlamaForCausalLM(LlamaConfig(**SIZES)), is_qat_trainable=True, is_trainable=False), 3)


def test_a_quantised_output_layer_and_copies_of_quantised_layers_are_refused_with_the_way_out():
    model = quantised(LlamaForCausalLM(LlamaConfig(**SIZES)))
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(232, 1, dtype=torch.uint8), requires_grad=False)
    message = (
        r"whose output layer is quantised: Linear with a weight Parameter of torch.uint8; .*modules_to_not_convert"
    )
    with pytest.raises(ValueError, match=message):
        MTPWrapper(model, 3, trunk="frozen")

    model = quantised(LlamaForCausalLM(LlamaConfig(**SIZES)))
    projection = model.model.layers[-1].mlp.up_proj
    projection.weight = torch.nn.Parameter(torch.zeros(128, 1, dtype=torch.uint8), requires_grad=False)
    for heads in ("layer", "sequential"):
        with pytest.raises(ValueError, match="the last one, whose weights are quantised; use heads='residual'"):
            MTPWrapper(model, 3, heads=heads, trunk="frozen")
