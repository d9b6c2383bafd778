"""The wrapper: any causal language model, its own forward and files untouched, the contract's loss over all heads."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from mtp_ce import MTPWrapper, weighted_mtp_ce

V = 61
SMALL = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OWN = {
    "gpt2": {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    },
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0, "pad_token_id": 1},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 8},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 4.0},
    "qwen3": {"head_dim": 8},
    "phi": {"partial_rotary_factor": 0.5, **NO_DROPOUT},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
}
ARCHITECTURES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "phi",
    "opt",
    "mixtral",
    "cohere",
    "granite",
]
KINDS = ["none", "teacher_forcing", "residual", "layer", "sequential"]


def build(architecture: str = "llama", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(architecture, **{**SMALL, **OWN.get(architecture, {})})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        # Initial weights of a few hundredths would make every comparison one of rounding errors.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def wrap(model: Any, kind: str, horizon: int = 3, **options: Any) -> MTPWrapper:
    """Heads with parameters changed from their initial values."""
    wrapper = MTPWrapper(model, 1 if kind == "none" else horizon, heads=kind, **options)
    with torch.no_grad():
        for parameter in wrapper.heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return wrapper.eval()


def batch(rows: int = 2, length: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels with holes, weights."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, V, (rows, length), generator=generator)
    labels = tokens.masked_fill(torch.rand(rows, length, generator=generator) < 0.2, -100)
    return tokens, labels, torch.rand(rows, length, generator=generator) + 0.1


def full_logits(wrapper: MTPWrapper, tokens: torch.Tensor, **inputs: Any) -> list[torch.Tensor]:
    """Logits of every head, by the model's own output layer on the heads' hidden states."""
    model = wrapper.causal
    heads = wrapper.head_hidden_states(input_ids=tokens, **inputs)
    if wrapper.kind == "teacher_forcing":
        # Head h at t is head 0 at t + h.
        heads = [torch.roll(heads[0], -h, 1) for h in range(wrapper.horizon)]
    logits = []
    for hidden in heads:
        hook = model.get_decoder().register_forward_hook(lambda _, __, output, hidden=hidden: _replace(output, hidden))
        try:
            logits.append(model(tokens, use_cache=False, **inputs).logits)
        finally:
            hook.remove()
    return logits


def _replace(output: Any, hidden: torch.Tensor) -> Any:
    output.last_hidden_state = hidden
    return output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_is_the_contracts_on_the_models_own_logits(architecture, kind):
    """The output layer is the model's own forward, whatever softcap, scale or bias it has."""
    tokens, labels, weights = batch()
    wrapper = wrap(build(architecture), kind)
    output = wrapper(tokens, labels=labels, token_weights=weights, return_stats=True, return_logits=True)
    logits = full_logits(wrapper, tokens)
    expected = weighted_mtp_ce(
        [x.double() for x in logits],
        labels,
        weights.double(),
        weight_alignment="target",
        head_reduction="target",
        impl="reference",
        return_stats=True,
    )
    torch.testing.assert_close(output.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(output.stats.live, expected.stats.live)
    torch.testing.assert_close(output.stats.ce.double(), expected.stats.ce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.logits, logits[0])
    torch.testing.assert_close(wrapper(tokens).logits, logits[0])


@pytest.mark.parametrize("kind", ["residual", "layer"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tuple_has_what_the_output_has(architecture, kind):
    """Where the call asks for one, or the configuration."""
    tokens, labels, weights = batch()
    wrapper = wrap(build(architecture), kind)
    arguments = {"labels": labels, "token_weights": weights, "return_logits": True}
    wanted = wrapper(tokens, **arguments)
    tuples = [wrapper(tokens, **arguments, return_dict=False)]
    if architecture != "opt":  # which fails by itself
        wrapper.config.return_dict = False
        tuples.append(wrapper(tokens, **arguments))
    for found in tuples:
        assert isinstance(found, tuple)
        loss, logits = found
        assert torch.equal(loss, wanted.loss)
        assert torch.equal(logits, wanted.logits)
    assert torch.equal(wrapper(tokens, **arguments, return_dict=True).loss, wanted.loss)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_the_loss_on_full_logits(architecture, kind):
    """Of every parameter, the heads' and the model's."""
    tokens, labels, weights = batch()
    wrapper = wrap(build(architecture), kind)
    wrapper(tokens, labels=labels, token_weights=weights).loss.backward()
    ours = {
        name: parameter.grad.clone() for name, parameter in wrapper.named_parameters() if parameter.grad is not None
    }
    wrapper.zero_grad(set_to_none=True)
    options = {"weight_alignment": "target", "head_reduction": "target", "impl": "reference"}
    weighted_mtp_ce(full_logits(wrapper, tokens), labels, weights, **options).backward()
    for name, parameter in wrapper.named_parameters():
        assert (parameter.grad is None) == (name not in ours), name
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=2e-5, msg=name)
    if kind in ("residual", "layer", "sequential"):
        assert sum(ours[name].abs().sum() > 0 for name in ours if name.startswith("heads.")) >= 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_wrapper_reloads_bit_for_bit_and_the_model_loads_alone(architecture, kind, tmp_path):
    tokens, labels, _ = batch()
    wrapper = wrap(build(architecture), kind)
    wrapper.save_pretrained(tmp_path)
    again = MTPWrapper.from_pretrained(tmp_path).eval()
    assert (again.kind, again.horizon) == (wrapper.kind, wrapper.horizon)
    assert torch.equal(again(tokens, labels=labels).loss, wrapper(tokens, labels=labels).loss)
    for (name, one), (_, other) in zip(wrapper.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    alone = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(alone(tokens).logits, wrapper(tokens).logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_is_the_models_own(architecture):
    tokens, _, _ = batch()
    model = build(architecture)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = model.generate(tokens, **options)
    assert torch.equal(wrap(model, "residual").generate(tokens, **options), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_head_without_weights_is_the_loss_of_transformers(architecture):
    tokens, labels, _ = batch()
    model = build(architecture)
    wrapper = MTPWrapper(model, 1, heads="none")
    torch.testing.assert_close(wrapper(tokens, labels=labels).loss, model(tokens, labels=labels).loss)
    items = torch.tensor(7)
    torch.testing.assert_close(
        wrapper(tokens, labels=labels, num_items_in_batch=items).loss,
        model(tokens, labels=labels, num_items_in_batch=items).loss,
    )
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(
        wrapper(tokens, shift_labels=shifted).loss, model(tokens, labels=labels, shift_labels=shifted).loss
    )


@pytest.mark.parametrize("kind", KINDS)
def test_shifted_labels_give_the_loss_of_unshifted_ones(kind):
    tokens, labels, weights = batch()
    wrapper = wrap(build(), kind)
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    moved = nn.functional.pad(weights[:, 1:], (0, 1))
    torch.testing.assert_close(
        wrapper(tokens, shift_labels=shifted, token_weights=moved).loss,
        wrapper(tokens, labels=labels, token_weights=weights).loss,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_both_paths_of_the_loss_are_one_loss(kind):
    """The logits path writes its gradient over the logits, which changes nothing that anyone sees."""
    tokens, labels, weights = batch()
    losses, gradients = [], []
    for path in ("linear", "logits"):
        wrapper = wrap(build("gemma2"), kind, loss=path)
        output = wrapper(tokens, labels=labels, token_weights=weights, return_logits=True)
        before = output.logits.clone()
        output.loss.backward()
        assert torch.equal(output.logits, before)
        losses.append(output.loss)
        gradients.append({name: x.grad for name, x in wrapper.named_parameters() if x.grad is not None})
        with torch.no_grad():
            torch.testing.assert_close(wrapper(tokens, labels=labels, token_weights=weights).loss, output.loss)
    torch.testing.assert_close(*losses)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_weights_may_be_made_of_the_forwards_own_next_token_head():
    tokens, labels, weights = batch()
    wrapper, seen = wrap(build("gemma2"), "residual"), []

    def weigh(current):
        seen.append(current.token_ce(labels))
        return weights

    loss = wrapper(tokens, labels=labels, token_weights=weigh).loss
    assert torch.equal(loss, wrapper(tokens, labels=labels, token_weights=weights).loss)
    expected = nn.functional.cross_entropy(
        wrapper(tokens).logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
    )
    live = labels[:, 1:] != -100
    torch.testing.assert_close(seen[0][:, 1:][live], expected[live])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("argument", ["document_ids", "position_ids"])
def test_packed_documents_have_the_loss_of_separate_documents(kind, argument):
    """Attention inside a document and no head across its end: rows of one document each have the same losses."""
    tokens, labels, weights = batch(1, 12)
    wrapper = wrap(build(), kind)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    given = {"document_ids": torch.tensor([[3] * 5 + [4] * 7])} if argument == "document_ids" else {}
    packed = wrapper(
        tokens, labels=labels, token_weights=weights, position_ids=positions, num_items_in_batch=10, **given
    ).loss
    alone = sum(
        wrapper(tokens[:, part], labels=labels[:, part], token_weights=weights[:, part], num_items_in_batch=10).loss
        for part in (slice(0, 5), slice(5, 12))
    )
    torch.testing.assert_close(packed, alone)


@pytest.mark.parametrize("loss", ["linear", "logits"])
def test_teacher_forcing_takes_the_memory_of_one_head(loss, watch, device):
    """Forward and backward, of a vocabulary that outweighs all else: the logits of a second head would show."""
    sizes = {**SMALL, "vocab_size": 4000}
    tokens = torch.randint(4000, (1, 64), generator=torch.Generator().manual_seed(0)).to(device)
    peaks = []
    for horizon in (1, 4):
        wrapper = MTPWrapper(LlamaForCausalLM(LlamaConfig(**sizes)), horizon, heads="teacher_forcing", loss=loss)
        nn.Module.to(wrapper, device)

        def step(wrapper: MTPWrapper = wrapper) -> None:
            wrapper(tokens, labels=tokens).loss.backward()

        step()  # makes the gradients of the parameters, and warms up
        peaks.append(watch(step).peak)
    assert peaks[1] < peaks[0] + 0.1 * tokens.numel() * 4000 * 4


@pytest.mark.parametrize("kind", ["residual", "layer", "sequential"])
@pytest.mark.parametrize("trunk", ["detached", "frozen"])
def test_the_trunk_feels_nothing_of_heads_that_are_detached(kind, trunk):
    tokens, labels, _ = batch()
    wrapper = wrap(build(), kind, trunk=trunk)
    joint = wrap(build(), kind)
    joint.heads.load_state_dict(wrapper.heads.state_dict())
    output = wrapper(tokens, labels=labels)
    assert torch.equal(output.loss, joint(tokens, labels=labels).loss), "the loss itself is the same"
    output.loss.backward()
    assert all(parameter.grad is None for parameter in wrapper.model.parameters())
    assert all(parameter.requires_grad == (trunk == "detached") for parameter in wrapper.model.parameters())
    assert sum(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in wrapper.heads.parameters()
    )


@pytest.mark.parametrize("kind", ["residual", "layer", "sequential"])
def test_gradient_checkpointing_changes_no_gradient(kind):
    tokens, labels, _ = batch()
    gradients = []
    for checkpointing in (False, True):
        wrapper = wrap(build(), kind).train()
        if checkpointing:
            wrapper.gradient_checkpointing_enable()
        wrapper(tokens, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in wrapper.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_whole_wrapper_changes_no_gradient(reentrant):
    """With the loss in it: its gradient may overwrite the logits only where no checkpoint keeps them."""
    tokens, labels, _ = batch()
    gradients = []
    for checkpointing in (False, True):
        wrapper = wrap(build(), "residual", loss="logits").train()

        def loss(*_, wrapper=wrapper):
            return wrapper(tokens, labels=labels).loss

        wanted = torch.ones((), requires_grad=True)  # what a reentrant checkpoint looks for among its arguments
        (checkpoint(loss, wanted, use_reentrant=reentrant) if checkpointing else loss()).backward()
        gradients.append({name: parameter.grad for name, parameter in wrapper.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_no_hook_stays_on_the_model():
    model = build()
    wrap(model, "layer")(batch()[0], labels=batch()[1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bf16_models_get_bf16_heads():
    wrapper = wrap(build().to(torch.bfloat16), "sequential")
    assert {parameter.dtype for parameter in wrapper.parameters()} == {torch.bfloat16}
    tokens, labels, _ = batch()
    assert wrapper(tokens, labels=labels).loss.isfinite()


@pytest.mark.parametrize("kind", ["residual", "layer"])
def test_adapters_of_peft_learn_in_the_trunk_and_heads_beside_them(kind):
    from peft import LoraConfig, get_peft_model

    tokens, labels, _ = batch()
    model = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    wrapper = wrap(model, kind)
    for parameter in wrapper.heads.parameters():
        assert parameter.requires_grad
    wrapper(tokens, labels=labels).loss.backward()
    learning = {name for name, parameter in wrapper.named_parameters() if parameter.grad is not None}
    assert any("lora_B" in name for name in learning)
    assert any(name.startswith("heads.") for name in learning)
    assert all("lora_" in name or name.startswith("heads.") for name in learning)
    assert wrapper.generate(input_ids=tokens, max_new_tokens=2, do_sample=False).shape[1] <= tokens.shape[1] + 2


def test_a_horizon_above_1_without_heads_is_a_warning():
    with pytest.warns(UserWarning, match="horizon is 4 with heads='none'; there is one head"):
        assert MTPWrapper(build(), 4, heads="none").horizon == 1


def adapted_output() -> MTPWrapper:
    from peft import LoraConfig, get_peft_model

    return MTPWrapper(get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"])), 2)


MISTAKES = {
    "no heads": (lambda: MTPWrapper(build(), 0), ValueError, "horizon is 0; expected at least 1"),
    "half a head": (lambda: MTPWrapper(build(), 1.5), ValueError, r"horizon is 1\.5"),
    "unknown kind": (lambda: MTPWrapper(build(), 2, heads="medusa"), ValueError, "heads is 'medusa'; expected one of"),
    "unknown trunk": (lambda: MTPWrapper(build(), 2, trunk="free"), ValueError, "trunk is 'free'; expected one of"),
    "nothing to train": (
        lambda: MTPWrapper(build(), 2, heads="teacher_forcing", trunk="frozen"),
        ValueError,
        "nothing would be trained",
    ),
    "no language model": (
        lambda: MTPWrapper(LlamaModel(LlamaConfig(**SMALL)), 2),
        TypeError,
        "LlamaModel without output embeddings",
    ),
    "no model of transformers": (lambda: MTPWrapper(nn.Linear(3, 3), 2), TypeError, "model is Linear"),
    "an encoder-decoder": (
        lambda: MTPWrapper(
            AutoModelForSeq2SeqLM.from_config(
                AutoConfig.for_model("t5", vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            ),
            2,
        ),
        ValueError,
        "an encoder-decoder",
    ),
    "an adapter on the output layer": (adapted_output, ValueError, "an adapter on its output embeddings"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake):
    call, kind, words = MISTAKES[mistake]
    with pytest.raises(kind, match=words):
        call()
