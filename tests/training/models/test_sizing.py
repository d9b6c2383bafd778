"""What a dry run says of FLOPs and memory is what a real step does and holds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from mtp_ce import MTPWrapper, weighted_mtp_ce, weighted_mtp_linear_ce
from mtp_ce.next_token import NextToken
from mtp_ce.training.models.build import checkpoint_activations
from mtp_ce.training.models.sizing import (
    forward_products,
    loss_bytes,
    saved_for_backward,
    step_memory,
    step_products,
    storage_bytes,
)
from mtp_ce.training.models.tensor_parallel import keep_share

CPU = torch.device("cpu")
B, S, V, D = 2, 96, 384, 64


def llama(tie: bool = False, attention: str = "sdpa") -> LlamaForCausalLM:
    """Three layers with grouped keys and values, whose products are not those of any round number."""
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=144, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=S, tie_word_embeddings=tie, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def on_meta(**options: Any) -> MTPWrapper:
    with torch.device("meta"):
        return MTPWrapper(llama(), **options)


def batch() -> dict[str, torch.Tensor]:
    """Packed: two documents in a row."""
    places = torch.arange(S).where(torch.arange(S) < 60, torch.arange(S) - 60).expand(B, S)
    tokens = torch.randint(V, (B, S))
    return {
        "input_ids": tokens,
        "labels": tokens,
        "position_ids": places,
        "document_ids": (torch.arange(S) >= 60).long().expand(B, S),
    }


MODELS = {
    "residual": {"heads": "residual", "horizon": 4},
    "residual, detached": {"heads": "residual", "horizon": 4, "trunk": "detached"},
    "layer": {"heads": "layer", "horizon": 3},
    "layer, frozen": {"heads": "layer", "horizon": 3, "trunk": "frozen"},
    "sequential": {"heads": "sequential", "horizon": 3},
    "sequential, shared": {"heads": "sequential", "horizon": 4, "shared": True},
    "sequential, shared, frozen": {"heads": "sequential", "horizon": 3, "shared": True, "trunk": "frozen"},
    "teacher_forcing": {"heads": "teacher_forcing", "horizon": 3},
    "one head": {"heads": "residual", "horizon": 1},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_products_of_a_step_are_those_that_torch_counts(name):
    """On the path that builds logits, whose products torch can see; they are those of the linear path."""
    model = MTPWrapper(llama(attention="eager"), **MODELS[name], loss="logits")
    with FlopCounterMode(display=False) as counter:
        model(**batch()).loss.backward()
    assert step_products(model, S).total == pytest.approx(counter.get_total_flops() / (B * S), rel=0.01)


def test_no_path_computes_the_gradient_of_a_head_that_does_not_learn():
    """Head 0 of a detached trunk: its hidden states want none."""
    joint, *both = [
        MTPWrapper(llama(), 4, trunk=trunk, loss=loss)
        for trunk, loss in (("joint", "linear"), ("detached", "linear"), ("detached", "logits"))
    ]
    linear, logits = (step_products(model, S).unembedding for model in both)
    assert linear == logits == 14 * V * D
    assert step_products(joint, S).unembedding == 24 * V * D


def test_the_products_of_a_scoring_model_are_those_that_torch_counts():
    model = llama(attention="eager").requires_grad_(False)
    tokens = batch()
    with FlopCounterMode(display=False) as counter:
        head = NextToken.of(model, tokens["input_ids"], tokens["position_ids"])
        nn.functional.linear(head.hidden, head.unembed)
    assert forward_products(model, S) == pytest.approx(counter.get_total_flops() / (B * S), rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_for_backward_is_what_a_real_step_keeps(name):
    model = MTPWrapper(llama(), **MODELS[name])
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**batch(), return_stats=True)
    real = storage_bytes(kept, [*model.parameters(), *model.buffers()])
    assert saved_for_backward(on_meta(**MODELS[name]), B, S, CPU) == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("name", ["residual", "layer"])
def test_half_precision_and_checkpointed_layers_keep_what_a_real_step_keeps(name):
    real, meta = MTPWrapper(llama(), **MODELS[name]), on_meta(**MODELS[name])
    whole = saved_for_backward(meta, B, S, CPU)
    for model in (real, meta):
        checkpoint_activations(model)
    real.to(torch.bfloat16)
    # Buffers keep their precision where parameters are cast for a forward.
    real.model.model.rotary_emb.float()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        real(**batch(), return_stats=True)
    expected = storage_bytes(kept, [*real.parameters(), *real.buffers()])
    found = saved_for_backward(meta, B, S, CPU, torch.bfloat16)
    assert found == pytest.approx(expected, rel=0.02)
    assert found < whole / 4


@pytest.mark.parametrize(("heads", "saved"), [("residual", 1.05), ("layer", 1.9), ("sequential", 1.9)])
def test_heads_that_recompute_hold_hardly_more_than_one(heads, saved):
    """The gradients of the heads that wait for backward included: 4 heads at most 1.5 x one, behind 3 layers."""

    def held(horizon: int, **options: Any) -> int:
        model = on_meta(heads=heads, horizon=horizon, **options)
        return saved_for_backward(model, 32, S, CPU) + horizon * 32 * S * D * 4

    one = held(1)
    assert held(4) > saved * one
    assert held(4, activation_checkpointing=True) < 1.15 * one


def test_what_is_offloaded_leaves_the_device():
    stays, _ = step_memory(on_meta(horizon=4), [], B, S, CPU, 2)
    moved, _ = step_memory(on_meta(horizon=4), [], B, S, CPU, 2, offload=True)
    assert moved.weights == moved.gradients == moved.optimizer == 0
    assert moved.offloaded == stays.weights + stays.gradients + stays.optimizer
    assert moved.total == stays.total - moved.offloaded


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that tensors held in a call, above those before; the profiler sees inside of operators, too."""
    # What others left would be freed meanwhile, and count as if the call had given it back.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    held = peak = 0
    events = (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def looped(hidden: list[torch.Tensor], unembed: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What one writes without this library."""
    losses = []
    for h, x in enumerate(hidden):
        logits = nn.functional.linear(x, unembed)
        targets = nn.functional.pad(labels[:, h + 1 :], (0, h + 1), value=-100)
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_the_loss_are_those_that_it_holds(dtype):
    """A vocabulary at which logits are most of what there is, in several chunks."""
    V, H, rows, length = 16384, 3, 2, 512
    model = MTPWrapper(LlamaForCausalLM(LlamaConfig(**{**llama().config.to_dict(), "vocab_size": V})), H)
    expected = loss_bytes(model, rows, length, CPU, dtype)
    assert expected.chunk_rows < rows * length * H
    hidden = [torch.randn(rows, length, D, dtype=dtype, requires_grad=True) for _ in range(H)]
    unembed = torch.randn(V, D, dtype=dtype, requires_grad=True)
    labels = torch.randint(V, (rows, length))
    learn = [*hidden, unembed]
    linear = peak_bytes(lambda: torch.autograd.grad(weighted_mtp_linear_ce(hidden, unembed, labels), learn))
    assert linear == pytest.approx(expected.linear, rel=0.1)

    def logits() -> None:
        built = [nn.functional.linear(x, unembed) for x in hidden]
        torch.autograd.grad(weighted_mtp_ce(built, labels, inplace_backward=True), learn)

    assert peak_bytes(logits) == pytest.approx(expected.logits, rel=0.1)
    eager = peak_bytes(lambda: torch.autograd.grad(looped(hidden, unembed, labels), learn))
    assert eager == pytest.approx(expected.eager, rel=0.1)


@pytest.mark.parametrize("loss", ["linear", "logits"])
def test_the_memory_of_a_rank_is_what_training_takes(loss):
    """Two steps of two micro-batches: the second finds the optimizer's means there, and gradients in the middle."""
    expected, _ = step_memory(on_meta(horizon=4, loss=loss), [], B, S, CPU, 1)

    def train() -> None:
        model = MTPWrapper(llama(), 4, loss=loss)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            for _ in range(2):
                model(**batch(), return_stats=True).loss.backward()
            optimizer.step()

    assert peak_bytes(train) == pytest.approx(expected.total, rel=0.1)


def test_ranks_share_weights_gradients_and_optimizer_but_not_activations():
    scoring = [llama()]
    alone, _ = step_memory(on_meta(horizon=4), scoring, B, S, CPU, 1)
    shared, _ = step_memory(on_meta(horizon=4), scoring, B, S, CPU, 4)
    assert alone.gathered == 0 < shared.gathered
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(shared, name) == pytest.approx(getattr(alone, name) / 4, abs=1)
    for name in ("activations", "loss"):
        assert getattr(shared, name) == getattr(alone, name)
    # The output layer stays whole, and so do the layer that computes and the next one.
    assert scoring[0].lm_head.weight.nbytes < shared.scoring < alone.scoring
    assert alone.scoring == sum(x.numel() * 4 for x in scoring[0].parameters()) + 4 * 2 * 8


@pytest.mark.parametrize("tie", [False, True])
def test_ranks_that_share_layers_hold_a_part_of_everything_large(tie):
    """Weights and logits fall with the ranks; what a norm or a residual connection saves does not."""
    with torch.device("meta"):
        alone, shared = (MTPWrapper(llama(tie), horizon=4, heads="layer") for _ in range(2))
    keep_share(shared, 2)
    assert shared.causal.lm_head.weight.shape == (V // 2, D)
    assert (shared.causal.lm_head.weight is shared.causal.model.embed_tokens.weight) == tie
    (whole, of_all), (half, of_one) = (step_memory(x, [], B, S, CPU, 1) for x in (alone, shared))
    norms = 4 * D * (2 * 6 + 1)
    assert half.gradients == (whole.gradients - norms) / 2 + norms
    assert whole.activations / 2 < half.activations < whole.activations
    assert of_one.logits < 0.6 * of_all.logits


def test_only_what_learns_has_gradients_and_means():
    memory, _ = step_memory(on_meta(horizon=4, trunk="detached"), [], B, S, CPU, 1)
    assert memory.gradients == 3 * (D * D + D) * 4
    assert memory.optimizer == 2 * memory.gradients
    assert memory.weights > 10 * memory.gradients
