"""The balancing loss of a mixture of experts: the model's own, in the loss of all heads."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mtp_ce import MTPWrapper

V = 61
SIZES = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": None,
    "pad_token_id": None, "output_router_logits": True,
}  # fmt: skip
# The coefficient as it is called, and the routers' places, differ.
ARCHITECTURES = ["mixtral", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "jetmoe"]
TOKENS = torch.randint(2, V, (3, 12), generator=torch.Generator().manual_seed(1))
# A row that is padding for a third.
PADDED = (torch.arange(12) >= torch.tensor([[0], [0], [4]])).long()


def build(architecture: str = "mixtral", **config: Any) -> Any:
    """A tiny model whose routers are far from balance."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **{**SIZES, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def wrap(model: Any = None, kind: Any = "residual", **options: Any) -> MTPWrapper:
    return MTPWrapper(build() if model is None else model, 3, heads=kind, **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_head_has_loss_and_gradients_of_the_model_itself(architecture):
    inputs = {"input_ids": TOKENS, "attention_mask": PADDED, "labels": TOKENS.masked_fill(PADDED == 0, -100)}
    model = build(architecture)
    own = model(**inputs)
    own.loss.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    got = MTPWrapper(model, 1)(**inputs)
    got.loss.backward()
    assert float(own.aux_loss.detach()) > 2.001, "the routers are out of balance, or the test would show nothing"
    torch.testing.assert_close(got.aux_loss, own.aux_loss)
    # The model's own mean is over rows of labels, this one over positions: of one head they are the same.
    torch.testing.assert_close(got.loss, own.loss, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5, msg=name)
    model.config.output_router_logits = False
    assert bool(got.loss - MTPWrapper(model, 1)(**inputs).loss > 1e-3)


@pytest.mark.parametrize("kind", ["residual", "teacher_forcing"])
def test_heads_change_nothing_of_it(kind):
    wrapper = wrap(kind=kind)
    with_it = wrapper(TOKENS, labels=TOKENS)
    without = wrapper(TOKENS, labels=TOKENS, output_router_logits=False)
    assert without.aux_loss is None
    weighted = wrapper.causal.router_aux_loss_coef * with_it.aux_loss
    torch.testing.assert_close(with_it.loss - without.loss, weighted, rtol=0, atol=1e-6)
    torch.testing.assert_close(wrapper.causal(TOKENS).aux_loss, with_it.aux_loss)


def test_micro_batches_add_up_to_the_mean_of_theirs():
    """By their positions with a target, not as many times the coefficient as there are micro-batches."""
    wrapper = wrap(build(router_aux_loss_coef=1.0))
    labels = TOKENS.clone()
    labels[1, 3:] = -100
    parts = [(TOKENS[:1], labels[:1]), (TOKENS[1:], labels[1:])]
    positions = [11, 2 + 11]
    total = torch.tensor(sum(positions))
    losses = [wrapper(x, labels=y, num_items_in_batch=total) for x, y in parts]
    plain = [wrapper(x, labels=y, num_items_in_batch=total, output_router_logits=False) for x, y in parts]
    got = sum(one.loss - other.loss for one, other in zip(losses, plain, strict=True))
    wanted = sum(n / total * out.aux_loss for n, out in zip(positions, losses, strict=True))
    torch.testing.assert_close(got, wanted)
    assert not torch.allclose(losses[0].aux_loss, losses[1].aux_loss, rtol=1e-3)


@pytest.mark.parametrize("trunk", ["detached", "frozen"])
def test_a_trunk_that_does_not_learn_has_none(trunk):
    wrapper = wrap(trunk=trunk)
    got = wrapper(TOKENS, labels=TOKENS)
    assert got.aux_loss is None
    got.loss.backward()
    assert all(parameter.grad is None for parameter in wrapper.model.parameters())


def test_a_call_asks_for_it_where_the_configuration_does_not():
    wrapper = wrap(build(output_router_logits=False))
    plain, asked = wrapper(TOKENS, labels=TOKENS), wrapper(TOKENS, labels=TOKENS, output_router_logits=True)
    assert plain.aux_loss is None
    assert bool(asked.loss > plain.loss)


def test_generation_and_hidden_states_are_those_without_it():
    wrapper, other = wrap(), wrap(build(output_router_logits=False))
    other.load_state_dict(wrapper.state_dict())
    for one, two in zip(*(w.head_hidden_states(input_ids=TOKENS) for w in (wrapper, other)), strict=True):
        torch.testing.assert_close(one, two)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    wanted = other.generate(TOKENS[:1], **options)
    assert torch.equal(wrapper.generate(TOKENS[:1], **options), wanted)
    assert torch.equal(wrapper.generate(TOKENS[:1], speculative=True, max_new_tokens=8), wanted)


@pytest.mark.parametrize("kind", ["layer", "sequential"])
def test_heads_with_routers_of_their_own_are_refused(kind):
    words = "heads that are decoder layers have routers of their own"
    with pytest.raises(ValueError, match=words):
        wrap(kind=kind)
    wrapper = wrap(build(output_router_logits=False), kind=kind)
    with pytest.raises(ValueError, match=words):
        wrapper(TOKENS, labels=TOKENS, output_router_logits=True)


def test_a_model_without_such_a_loss_is_refused():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has none: .* router_aux_loss_coef or aux_loss_coef"):
        wrap(build("llama"))
    # One that has the number, and no experts.
    wrapper = wrap(build("doge"))
    with pytest.raises(ValueError, match="DogeForCausalLM returned no balancing loss of its routers"):
        wrapper(TOKENS, labels=TOKENS)


def test_it_is_in_compiled_training_steps():
    """And in recomputed ones."""
    wrapper = wrap(build(router_aux_loss_coef=1.0))
    eager = wrapper(TOKENS, labels=TOKENS).loss
    compiled = torch.compile(wrapper, backend="aot_eager")(TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(compiled, eager)
    gradients = torch.autograd.grad(eager, wrapper.parameters())
    wrapper.train()
    wrapper.gradient_checkpointing_enable()
    again = torch.autograd.grad(wrapper(TOKENS, labels=TOKENS).loss, wrapper.parameters())
    for one, two in zip(gradients, again, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
