"""Heads that are decoder layers, where the model's own call of a layer is repeated: checkpoints, torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

from mtp_ce import MTPWrapper
from mtp_ce.heads.protocol import Heads

SIZES = {
    "vocab_size": 29, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
TOKENS = torch.arange(2, 24).view(2, 11)


def wrapped(heads: str, trunk: str, **options: Any) -> MTPWrapper:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2))
    if heads == "shared":
        return MTPWrapper(model, 3, heads="sequential", trunk=trunk, shared=True, **options)
    return MTPWrapper(model, 3, heads=heads, trunk=trunk, **options)


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

    def compare() -> None:
        found = gradients(wrapper)
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            # A checkpoint adds up the gradients of several heads in another order.
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)

    for reentrant in (True, False):
        wrapper.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        with runs_of(wrapper.heads) as runs:
            compare()
        assert runs == [*RUNS[heads], *reversed(RUNS[heads])], "each head runs once more, the last one first"
    wrapper.gradient_checkpointing_disable()
    assert not any(getattr(part, "gradient_checkpointing", False) for part in wrapper.modules())
    wrapper.heads.checkpoint_activations()
    with runs_of(wrapper.heads) as runs:
        compare()
    assert len(runs) == 2 * len(RUNS[heads])
    wrapper.eval()
    with runs_of(wrapper.heads) as runs:
        compare()
    assert runs == RUNS[heads]


# The modules that heads 1 and 2 run.
RUNS = {"residual": [0, 1], "layer": [0, 1], "sequential": [0, 1], "shared": [0, 0]}


@contextmanager
def runs_of(heads: Heads) -> Iterator[list[int]]:
    """The runs of the heads' modules inside the block, by index."""
    runs: list[int] = []
    modules = heads.residual_blocks or heads.layers
    hooks = [module.register_forward_hook(lambda *_, h=h: runs.append(h)) for h, module in enumerate(modules)]
    yield runs
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("heads", ["layer", "sequential"])
def test_a_step_with_heads_that_recompute_peaks_near_that_of_one_head(heads, watch):
    """Measured, loss and gradients included: rows of 512 tokens, 4 heads at most 1.5 x one."""
    sizes = {**SIZES, "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64}
    tokens = torch.arange(512)[None] % 29

    def peak(horizon: int, **options: Any) -> int:
        wrapper = MTPWrapper(LlamaForCausalLM(LlamaConfig(**sizes)), horizon, heads=heads, **options).train()
        seen = []
        for _ in range(2):  # the second finds the gradients of the parameters there
            seen.append(watch(lambda: wrapper(tokens, labels=tokens).loss.backward()).peak)
        return seen[-1]

    one, saved, recomputed = peak(1), peak(4), peak(4, activation_checkpointing=True)
    print(heads, saved / one, recomputed / one)
    assert recomputed < 1.5 * one
    assert saved > 1.5 * one


@pytest.mark.parametrize(
    ("heads", "trunk", "checkpoints"),
    [("layer", "joint", False), ("shared", "detached", False), ("sequential", "joint", True)],
)
def test_heads_of_layers_compile_without_a_graph_break(heads, trunk, checkpoints):
    torch.compiler.reset()
    wrapper = wrapped(heads, trunk, activation_checkpointing=checkpoints).train()
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
