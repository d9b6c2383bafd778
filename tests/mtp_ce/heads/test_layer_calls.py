"""Heads that are decoder layers, where the model's own call of a layer is repeated: checkpoints, torch.compile."""

from __future__ import annotations

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

from mtp_ce import MTPWrapper

SIZES = {
    "vocab_size": 29, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
TOKENS = torch.arange(2, 24).view(2, 11)


def wrapped(heads: str, trunk: str) -> MTPWrapper:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2))
    if heads == "shared":
        return MTPWrapper(model, 3, heads="sequential", trunk=trunk, shared=True)
    return MTPWrapper(model, 2, heads=heads, trunk=trunk)


def gradients(wrapper: MTPWrapper) -> dict[str, torch.Tensor]:
    wrapper.zero_grad()
    wrapper(TOKENS, labels=TOKENS).loss.backward()
    return {name: x.grad.clone() for name, x in wrapper.named_parameters() if x.grad is not None}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the frozen trunk itself
@pytest.mark.parametrize("trunk", ["joint", "detached", "frozen"])
@pytest.mark.parametrize("heads", ["residual", "layer", "sequential", "shared"])
def test_checkpointing_changes_no_gradient(heads, trunk):
    """Reentrant checkpoints need an input that requires a gradient, which a frozen trunk's output does not."""
    wrapper = wrapped(heads, trunk).train()
    expected = gradients(wrapper)
    assert all(f"heads.{name}" in expected for name, _ in wrapper.heads.named_parameters())
    for reentrant in (True, False):
        wrapper.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        found = gradients(wrapper)
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            # A reentrant checkpoint adds up the gradients of a module's calls in another order.
            tolerance = 1e-5 if heads == "shared" else 0
            torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("heads", "trunk"), [("layer", "joint"), ("shared", "detached")])
def test_heads_of_layers_compile_without_a_graph_break(heads, trunk):
    torch.compiler.reset()
    wrapper = wrapped(heads, trunk)
    last = wrapper.causal.model.layers[-1]
    expected, eager = wrapper(TOKENS, labels=TOKENS).loss, gradients(wrapper)
    wrapper.zero_grad()
    loss = torch.compile(lambda tokens: wrapper(tokens, labels=tokens).loss, fullgraph=True, backend="aot_eager")(
        TOKENS
    )
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in wrapper.named_parameters():
        if name in eager:
            torch.testing.assert_close(parameter.grad, eager[name])
    assert "forward" not in vars(last)
    assert not last._forward_hooks


def test_a_model_whose_base_model_has_another_name_is_refused_for_that():
    sizes = {**SIZES, "intermediate_size_mlp": 16, "num_local_experts": 2, "head_dim": 8, "pad_token_id": None}
    model = Llama4ForCausalLM(Llama4TextConfig(**sizes))
    with pytest.raises(
        TypeError, match=r"Llama4ForCausalLM, whose base model can't be run by itself: .* unsupported\."
    ):
        MTPWrapper(model, 2)
