"""Sequential heads are what serving engines feed to an MTP module, in training, in drafts and in their files."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mtp_ce import MTPWrapper
from mtp_ce.decoding.speculative import Speculation, generate_speculatively
from mtp_ce.heads.residual import MTPHeads
from mtp_ce.training.config.model import MTPConfig

V, S = 23, 9
# The epsilon is far from that of `nn.RMSNorm`, which these embeddings would hardly notice otherwise.
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 96, "initializer_range": 0.3, "rms_norm_eps": 1e-2, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
TOKENS = torch.randint(1, V, (2, S), generator=torch.Generator().manual_seed(3))


def wrap(horizon: int, *, shared: bool = False, attention: str = "sdpa", sharp: float = 1.0) -> MTPWrapper:
    """Heads that differ from each other and from the trunk, in float64; a sharp model repeats itself less."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=attention)).double()
    wrapper = MTPWrapper(model, horizon, heads="sequential", shared=shared)
    with torch.no_grad():
        for parameter in wrapper.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.get_output_embeddings().weight.mul_(sharp)
    return wrapper.eval()


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """In float64, where transformers' own is float32 inside."""
    return x * (x.square().mean(-1, keepdim=True) + SIZES["rms_norm_eps"]).rsqrt() * weight


def layer(wrapper: MTPWrapper, module: int, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """A decoder layer over a sequence with attention where `mask` is True, and the trunk's final norm."""
    additive = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, -torch.inf)[:, None]
    rotary = wrapper.causal.model.rotary_emb(x, position_ids=positions)
    block = wrapper.heads.layers[module]
    z = block(x, attention_mask=additive, position_embeddings=rotary, position_ids=positions)
    return norm(z, wrapper.causal.model.norm.weight)


def joined(wrapper: MTPWrapper, module: int, hidden: Tensor, embedded: Tensor) -> Tensor:
    heads = wrapper.heads
    both = [norm(hidden, heads.hidden_norms[module].weight), norm(embedded, heads.token_norms[module].weight)]
    return torch.cat(both, -1) @ heads.projections[module].weight.T


@pytest.mark.parametrize("packed", [False, True])
def test_a_head_reads_the_normed_output_before_it_and_nothing_at_position_0(packed):
    """In rows of two documents the second one has a position 0 too."""
    wrapper = wrap(3)
    positions = torch.arange(S).expand(2, S)
    documents = torch.arange(S) >= 5 if packed else torch.zeros(S, dtype=torch.bool)
    positions = positions - 5 * documents
    mask = (documents[:, None] == documents) & torch.ones(S, S, dtype=torch.bool).tril()
    with torch.no_grad():
        heads = wrapper.head_hidden_states(input_ids=TOKENS, position_ids=positions)
        embedded = wrapper.get_input_embeddings()(TOKENS)
        ahead = embedded[:, 1:].masked_fill((positions[:, :-1] == 0)[..., None], 0)
        first = joined(wrapper, 0, heads[0][:, :-1], ahead)
        hidden = layer(wrapper, 0, first, positions[:, :-1], mask[None, :-1, :-1])
        torch.testing.assert_close(heads[1][:, :-1], hidden, rtol=1e-5, atol=1e-5)
        second = joined(wrapper, 1, hidden[:, :-1], embedded[:, 2:])
        hidden = layer(wrapper, 1, second, positions[:, :-2], mask[None, :-2, :-2])
        torch.testing.assert_close(heads[2][:, :-2], hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_shared_module_is_trained_as_an_engine_runs_it(attention):
    """After every position anew: over the text so far, then over draft after draft, each one position further."""
    wrapper = wrap(4, shared=True, attention=attention)
    with torch.no_grad():
        heads = wrapper.head_hidden_states(input_ids=TOKENS)
        embedded = wrapper.get_input_embeddings()(TOKENS)
        for t in range(S - 1):
            ahead = embedded[:, 1 : t + 2].clone()
            ahead[:, 0] = 0
            sequence = joined(wrapper, 0, heads[0][:, : t + 1], ahead)
            for h in range(1, min(4, S - t)):
                n = sequence.shape[1]
                mask = torch.ones(1, n, n, dtype=torch.bool).tril()
                hidden = layer(wrapper, 0, sequence, torch.arange(n)[None], mask)[:, -1:]
                torch.testing.assert_close(heads[h][:, t : t + 1], hidden, rtol=1e-5, atol=1e-5)
                further = embedded[:, t + h + 1 : t + h + 2]
                if further.shape[1]:
                    sequence = torch.cat([sequence, joined(wrapper, 0, hidden, further)], 1)


def test_a_shared_module_follows_padding_and_documents():
    """A row gives the same heads alone, behind padding, and as the second document of a packed row."""
    wrapper = wrap(4, shared=True)
    with torch.no_grad():
        alone = wrapper.head_hidden_states(input_ids=TOKENS)
        packed = torch.cat([TOKENS.flip(1)[:, :4], TOKENS], 1)
        positions = torch.cat([torch.arange(4), torch.arange(S)]).expand(2, -1)
        behind = wrapper.head_hidden_states(input_ids=packed, position_ids=positions)
        given = (torch.arange(S + 4) >= 4).long().expand(2, -1)
        padded = wrapper.head_hidden_states(
            input_ids=packed, attention_mask=given, position_ids=(given.cumsum(1) - 1).clamp(min=0)
        )
    for h, expected in enumerate(alone):
        known = S - h  # later positions read tokens past the end
        torch.testing.assert_close(behind[h][:, 4 : 4 + known], expected[:, :known])
        torch.testing.assert_close(padded[h][:, 4 : 4 + known], expected[:, :known])


def test_one_module_has_the_parameters_of_one_head_and_learns_from_all():
    sizes = {}
    for horizon in (2, 3, 6):
        wrapper = wrap(horizon, shared=True)
        sizes[horizon] = {name: x.shape for name, x in wrapper.heads.named_parameters()}
    assert sizes[2] == sizes[3] == sizes[6] == {name: x.shape for name, x in wrap(2).heads.named_parameters()}
    # At H = 2 it is the same module, so that nothing but later heads can change its gradient.
    gradients = []
    for horizon, weights in ((2, [1, 1]), (6, [1, 1, 0, 0, 0, 0]), (6, [1, 1, 1, 0, 0, 0]), (6, [1, 1, 0, 0, 0, 1])):
        wrapper = wrap(horizon, shared=True)
        options = {"head_reduction": "live", "head_weights": torch.tensor(weights, dtype=torch.float32)}
        wrapper(TOKENS, labels=TOKENS, **options).loss.backward()
        assert all(x.grad is not None and x.grad.abs().max() > 0 for x in wrapper.parameters())
        gradients.append(torch.cat([x.grad.flatten() for x in wrapper.heads.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert (gradients[2] - gradients[1]).norm() > 1e-3 * gradients[1].norm()
    assert (gradients[3] - gradients[1]).norm() > 1e-3 * gradients[1].norm()


@pytest.mark.parametrize("horizon", [2, 3, 6])
def test_a_shared_module_drafts_to_any_depth_and_keeps_what_the_walk_over_the_text_says(horizon):
    """Count for count, on the model's own text; it is trained for H = 3 here."""
    wrapper, deep = wrap(3, shared=True, sharp=6), wrap(horizon, shared=True, sharp=6)
    new, kept = 24, 0
    for prompt in (TOKENS[:1, :1], TOKENS[:1, :4], TOKENS[1:]):
        length = prompt.shape[1]
        plain = wrapper.generate(
            prompt, max_new_tokens=new, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(prompt)
        )
        text, found = generate_speculatively(wrapper, prompt, max_new_tokens=new, horizon=horizon)
        assert torch.equal(text, plain)
        with torch.no_grad():
            drafts = [logits.argmax(-1)[0] for logits in deep.head_logits(input_ids=text)]
        counts, last = Speculation(0, 0, 0, [0] * (horizon - 1), [0] * (horizon - 1)), length - 1
        while last + 2 < length + new:
            width = min(horizon - 1, length + new - last - 3)
            for h in range(1, width + 1):
                counts.offered[h - 1] += 1
                if drafts[h][last] != text[0, last + 1 + h]:
                    width = h - 1
                    break
                counts.kept[h - 1] += 1
            last += width + 1
        assert (found.offered, found.kept) == (counts.offered, counts.kept)
        kept += sum(found.kept)
    assert kept


def test_a_shared_module_drafts_for_a_padded_batch():
    wrapper = wrap(3, shared=True, sharp=6)
    prompts, given = TOKENS.clone(), torch.ones_like(TOKENS)
    prompts[0, :4] = given[0, :4] = 0
    options = {"attention_mask": given, "max_new_tokens": 12, "pad_token_id": 0}
    text, found = generate_speculatively(wrapper, prompts, horizon=5, **options)
    assert torch.equal(text, wrapper.generate(prompts, do_sample=False, **options))
    assert len(found.offered) == 4


def test_other_heads_draft_to_their_own_depth_at_most():
    for horizon, kind in ((4, "sequential"), (1, "sequential"), (4, "residual")):
        wrapper = MTPWrapper(LlamaForCausalLM(LlamaConfig(**SIZES)), 3, heads=kind)
        with pytest.raises(ValueError, match=rf"horizon is {horizon}; expected one from 2 to 3, that of the heads"):
            generate_speculatively(wrapper, TOKENS, max_new_tokens=2, horizon=horizon)
    text, found = generate_speculatively(wrapper, TOKENS[:1], max_new_tokens=6, horizon=2)
    assert len(found.kept) == 1
    assert text.shape[1] == S + 6


def test_files_say_that_a_module_is_shared(tmp_path):
    wrapper = wrap(4, shared=True).float()
    wrapper.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "mtp_heads.json").read_text()) == {
        "kind": "sequential", "hidden_size": 16, "horizon": 4, "format": 2, "shared": True,
    }  # fmt: skip
    again = MTPWrapper.from_pretrained(tmp_path).eval()
    assert again.heads.shared
    for one, other in zip(*(x.head_logits(input_ids=TOKENS) for x in (wrapper, again)), strict=True):
        assert torch.equal(one, other)
    config = json.loads((tmp_path / "mtp_heads.json").read_text())
    for changed, message in (
        ({"shared": False}, "has 1 extra heads, and .* has horizon 4; expected one fewer than that"),
        ({"shared": "yes"}, "has shared 'yes'"),
        ({"kind": "layer", "format": 1}, "has shared 'True'"),
    ):
        (tmp_path / "mtp_heads.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(ValueError, match=message):
            MTPWrapper.from_pretrained(tmp_path)


def test_heads_of_every_depth_are_not_taken_for_a_shared_module(tmp_path):
    wrap(3).heads.save_pretrained(tmp_path)
    file = tmp_path / "mtp_heads.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "shared": True}))
    with pytest.raises(ValueError, match=r"has 2 extra heads, .* has horizon 3 and shared true; expected one for all"):
        MTPWrapper.with_saved_heads(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path)


@pytest.mark.parametrize(("form", "version"), [(None, "an earlier"), (1, "an earlier"), (3, "a later")])
def test_heads_of_another_form_are_refused_by_name(form, version, tmp_path):
    """Those of the first form read the hidden state before the final norm; their tensors have the same names."""
    wrap(2).heads.save_pretrained(tmp_path)
    config = {"kind": "sequential", "hidden_size": 16, "horizon": 2, **({} if form is None else {"format": form})}
    (tmp_path / "mtp_heads.json").write_text(json.dumps(config))
    message = rf"heads of the kind 'sequential' in format {form or 1}, of {version} version .*: train them again"
    with pytest.raises(ValueError, match=message):
        MTPWrapper.with_saved_heads(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path)


def test_files_of_other_kinds_have_no_format(tmp_path):
    MTPHeads(16, 3).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "mtp_heads.json").read_text()) == {
        "kind": "residual",
        "hidden_size": 16,
        "horizon": 3,
    }


def test_what_cannot_be_shared_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    for kind in ("residual", "layer", "teacher_forcing"):
        with pytest.raises(ValueError, match=rf"shared is True with heads='{kind}'; expected heads='sequential'"):
            MTPWrapper(model, 3, heads=kind, shared=True)
    with pytest.raises(ValidationError, match="shared is true with kind layer; give kind sequential, or shared false"):
        MTPConfig(kind="layer", shared=True)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"attention 'flash_attention_2', and .* expected attn_implementation='sdpa'"):
        MTPWrapper(model, 3, heads="sequential", shared=True)


class Recurrent(LlamaDecoderLayer):
    """Its state is a sum over positions, where drafts of other positions do not belong."""

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        z: Tensor = super().forward(hidden_states, **options)
        return z + z.cumsum(1)


class Biased(LlamaDecoderLayer):
    """It has an argument by position which nothing knows how to repeat."""

    def forward(self, hidden_states: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        z: Tensor = super().forward(hidden_states, **options)
        return z


@pytest.mark.parametrize(
    ("kind", "reason"), [(Recurrent, "keeps a state other than"), (Biased, "can't be called for several depths")]
)
def test_layers_that_several_depths_cannot_share_are_refused(kind, reason):
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.layers[-1] = last = kind(model.config, 1)
    if kind is Biased:
        last.register_forward_pre_hook(
            lambda module, arguments, options: (arguments, {**options, "bias": torch.zeros(1)}), with_kwargs=True
        )
    MTPWrapper(model, 3, heads="sequential")
    with pytest.raises(ValueError, match=rf"LlamaForCausalLM has .*: .* {reason} .*; use shared=False or heads="):
        MTPWrapper(model, 2, heads="sequential", shared=True)


@pytest.mark.parametrize("shared", [False, True])
def test_a_layer_begins_with_what_the_last_one_returned(shared):
    """The gain of the final norm, far from 1 in trained models, is undone."""
    model = wrap(2).causal
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(0.2, 3, 16))
        last: list[Tensor] = []
        model.model.layers[-1].register_forward_hook(lambda _, __, output: last.append(output))
        heads = MTPWrapper(model, 3, heads="sequential", shared=shared).heads
        hidden = model.model(TOKENS).last_hidden_state
        x = heads.layer_input(1, hidden, torch.randn_like(hidden))
    cosine = torch.nn.functional.cosine_similarity(x, last[-1], dim=-1)
    assert cosine.min() > 0.99


def test_the_check_of_depths_leaves_no_trace():
    """Dropout in the layer would make it fail, so that it runs in evaluation mode."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.5)).train()
    wrapper = MTPWrapper(model, 3, heads="sequential", shared=True)
    assert all(module.training for module in wrapper.heads.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
