"""Speculative decoding has the output of the model alone: token by token, or in distribution."""

from __future__ import annotations

import re
import warnings
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mtp_ce import MTPWrapper
from mtp_ce.decoding.speculative import Speculation, generate_speculatively

V = 23
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": None,
    "tie_word_embeddings": False,  # or a model of random weights repeats its last token
}
# Windows that every text here is longer than; Gemma's layers have one by turns.
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 96},
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "head_dim": 8},
    "gemma2 with a window in its last layer": {"sliding_window": 6, "head_dim": 8, "num_hidden_layers": 3},
    "gemma4_text": {
        "sliding_window": 6,
        "head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": V,
        "pad_token_id": 0,
    },
}
ARCHITECTURES = ["llama", "gpt_neox", *OWN]
KINDS: list[Any] = ["residual", "layer", "sequential"]


def drafting(
    architecture: str = "llama",
    kind: Any = "residual",
    horizon: int = 4,
    noise: float = 0.02,
    sharp: float = 4.0,
    vocabulary: int = V,
) -> MTPWrapper:
    """A model with clear preferences, and heads that guess some of them."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = {**SMALL, **OWN.get(architecture, {}), "vocab_size": vocabulary}
        config = AutoConfig.for_model(architecture.partition(" ")[0], **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        model.get_output_embeddings().weight.mul_(sharp)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = None  # or tokens 0 of a prompt without a mask are padding
    shared = kind == "shared"
    wrapper = MTPWrapper(model, horizon, heads="sequential" if shared else kind, shared=shared)
    with torch.no_grad():
        for parameter in wrapper.heads.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return wrapper.eval()


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(V, (1, length), generator=generator) for length in lengths]


def plain(wrapper: MTPWrapper, prompt: torch.Tensor, tokens: int, **options: Any) -> torch.Tensor:
    """The output of the model's own `generate`. Without a mask it would take tokens 0 of the prompt for padding."""
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt), **options}
    sequences: torch.Tensor = wrapper.generate(prompt, max_new_tokens=tokens, **options)
    return sequences


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("architecture", "horizon"), [("llama", 2), *((name, 4) for name in ARCHITECTURES)])
def test_greedy_decoding_is_the_models_own_token_for_token(architecture, horizon, kind):
    """The prompts are shorter than a chain of heads, shorter than a sliding window, and longer than both."""
    wrapper = drafting(architecture, kind, horizon)
    total = Speculation()
    for prompt in prompts(1, 2, 5, 12):
        expected = plain(wrapper, prompt, 30)
        sequences, found = generate_speculatively(wrapper, prompt, max_new_tokens=30)
        assert torch.equal(sequences, expected)
        assert found.tokens == 30
        assert found.forwards == found.rounds + 1 <= 30
        assert all(one <= other for one, other in zip(found.kept, found.offered, strict=True))
        total += found
    assert 0 < sum(total.kept) < sum(total.offered), "some drafts were kept and some were not, or this shows nothing"


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        *((name, kind) for name in ARCHITECTURES for kind in ("layer", "sequential")),
        # A layer of Gemma 4 takes more than one module can repeat for several depths.
        *((name, "shared") for name in ARCHITECTURES if name != "gemma4_text"),
    ],
)
def test_heads_draft_with_caches_as_without_them(monkeypatch, architecture, kind):
    """In float64, of which some layers make float32 inside: what was let through otherwise is a wrong position."""
    wrapper = drafting(architecture, kind).double()
    rounds, unrecorded = [], wrapper.heads.drafter

    @contextmanager
    def recording(*arguments):
        with unrecorded(*arguments) as drafter:
            draft_unrecorded = drafter.draft

            def draft(hidden, last, tokens, width, draw):
                decided, logits = drafter.layers[0].get_seq_length() + last + 2, []
                drafted = draft_unrecorded(hidden, last, tokens, width, lambda x: (logits.append(x), draw(x))[1])
                rounds.append((decided, drafted[0][0], torch.cat(logits, 1)[0]))
                return drafted

            drafter.draft = draft
            yield drafter

    monkeypatch.setattr(wrapper.heads, "drafter", recording)
    for prompt in prompts(1, 4, 11):
        rounds.clear()
        text = generate_speculatively(wrapper, prompt, max_new_tokens=16).sequences
        assert len(rounds) >= 3
        for decided, drafted, logits in rounds:
            whole = torch.cat([text[:, :decided], drafted[None]], 1)
            with torch.no_grad():
                heads = wrapper.head_logits(input_ids=whole)[1 : len(drafted) + 1]
            # The last position that the model itself has seen; the token after it is decided too.
            expected = torch.stack([head[0, decided - 2] for head in heads])
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
def test_it_stops_at_max_new_tokens(tokens, kind):
    wrapper = drafting(kind=kind)
    for prompt in prompts(1, 3, 6):
        expected = plain(wrapper, prompt, tokens)
        assert torch.equal(wrapper.generate(prompt, max_new_tokens=tokens, speculative=True), expected)


@pytest.mark.parametrize("settings", [{}, {"max_length": 20}, {"max_new_tokens": 5}])
@pytest.mark.parametrize(
    "options", [{}, {"max_length": 17}, {"max_new_tokens": 6}, {"max_length": 17, "max_new_tokens": 6}]
)
@pytest.mark.parametrize("length", [7, 90])
def test_the_number_of_new_tokens_follows_the_models_own_rules(settings, options, length):
    """By option, by the model's own settings, or 20 within the model's positions; with a tokenizer's mask."""
    wrapper = drafting()
    for name, value in settings.items():
        setattr(wrapper.causal.generation_config, name, value)
    (prompt,) = prompts(length)
    given = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **options}
    try:
        expected = wrapper.generate(**given, do_sample=False, pad_token_id=0)
    except ValueError as error:  # a maximal length that the prompt has already
        with pytest.raises(ValueError, match=re.escape(str(error))):
            wrapper.generate(**given, speculative=True)
        return
    assert torch.equal(wrapper.generate(**given, speculative=True), expected)


def test_the_last_position_of_a_model_is_used_and_none_after_it():
    wrapper = drafting("gpt2", "sequential")
    prompt = prompts(80)[0]
    assert torch.equal(wrapper.generate(prompt, max_new_tokens=17, speculative=True), plain(wrapper, prompt, 17))


def test_it_stops_at_the_end_of_text_as_the_model_does():
    wrapper, prompt = drafting(), prompts(5)[0]
    for end in set(plain(wrapper, prompt, 30)[0, 5:].tolist()):
        expected = plain(wrapper, prompt, 30, eos_token_id=end)
        for ends in (end, [end, V + 5]):
            sequences, found = generate_speculatively(wrapper, prompt, max_new_tokens=30, eos_token_id=ends)
            assert torch.equal(sequences, expected)
            assert found.tokens == expected.shape[1] - 5


def test_it_stops_at_the_end_of_text_also_inside_a_draft():
    """The same samples, with every token of theirs as the end: the text is cut there, whatever its round gave after."""
    wrapper, inside = drafting(sharp=1.5), 0

    def text(**options):
        generator = torch.Generator().manual_seed(1)
        # Under logits processors, here of top_k, a draft ends before the end of the text.
        (tokens,), found = generate_speculatively(
            wrapper, prompts(1)[0], max_new_tokens=40, do_sample=True, top_k=0, generator=generator, **options
        )
        assert found.tokens == len(tokens) - 1
        return tokens[1:].tolist(), found

    free, _ = text()
    for end in set(free):
        ended, found = text(eos_token_id=end)
        assert ended == free[: free.index(end) + 1]
        inside += found.tokens < 1 + found.rounds + sum(found.kept)
    assert inside, "some ends stood before the last token of their round"


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_are_always_right_yield_h_tokens_per_forward(kind):
    """A model that always predicts one token: every head that predicts the same token is accepted."""
    wrapper = drafting(kind=kind, noise=0.0)
    with torch.no_grad():
        for name, parameter in wrapper.named_parameters():
            if "norm" not in name:
                parameter.zero_()
    _, found = generate_speculatively(wrapper, prompts(5)[0], max_new_tokens=41)
    assert found.acceptance == [1.0, 1.0, 1.0]
    assert found.acceptance_length == 4.0
    assert found.forwards == 1 + 10, "the prompt with one token, and ten rounds of four"
    assert found.tokens_per_forward == pytest.approx(41 / 11)


def test_counts_of_several_prompts_add_up():
    one = Speculation(forwards=5, rounds=4, tokens=9, offered=[4, 3], kept=[3, 1])
    other = Speculation(forwards=3, rounds=2, tokens=4, offered=[2], kept=[1])
    both = sum([one, other], Speculation())
    assert both == Speculation(forwards=8, rounds=6, tokens=13, offered=[6, 3], kept=[4, 1])
    assert both.acceptance == [4 / 6, 1 / 3]
    assert both.acceptance_length == 1 + 5 / 6
    assert (one.rounds, one.kept) == (4, [3, 1]), "the sum is a new one"


def test_the_same_generator_yields_the_same_text():
    wrapper = drafting()
    one, other = (
        wrapper.generate(
            prompts(5)[0], max_new_tokens=20, do_sample=True, speculative=True,
            generator=torch.Generator().manual_seed(5),
        )
        for _ in range(2)
    )  # fmt: skip
    assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_read_with_the_prompt_alone(kind):
    """The prompt ends in an image, whose positions a chain of heads would repeat."""
    torch.manual_seed(0)
    sizes = {**SMALL, "vocab_size": V, "num_key_value_heads": 2, "eos_token_id": None, "bos_token_id": None}
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**sizes), image_token_index=V - 1)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        model.get_output_embeddings().weight.mul_(4)
    wrapper = MTPWrapper(model, 4, heads=kind).eval()
    tokens = torch.tensor([[1, 2, 3, *[V - 1] * 4]])
    call = {"pixel_values": torch.randn(1, 3, 8, 8), "max_new_tokens": 16, "suppress_tokens": [V - 1]}
    found = generate_speculatively(wrapper, tokens, **call)
    assert torch.equal(found.sequences, wrapper.generate(input_ids=tokens, **call))
    call["pixel_values"] = -call["pixel_values"]
    assert not torch.equal(found.sequences, wrapper.generate(input_ids=tokens, **call)), "the image changes the text"


def test_no_hook_stays_on_the_model_also_after_an_error():
    wrapper = drafting("gpt2", "sequential")
    generate_speculatively(wrapper, prompts(5)[0], max_new_tokens=5)
    with pytest.raises(IndexError):
        generate_speculatively(wrapper, prompts(90)[0], max_new_tokens=40)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in wrapper.modules())


def refused(kind: Any, horizon: int = 3) -> MTPWrapper:
    return MTPWrapper(drafting().model, horizon, heads=kind)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: drafting().generate(torch.zeros(1, 0).long(), speculative=True), r"input_ids is \[1, 0\]; expected"),
        (lambda: drafting().generate(torch.zeros(3).long(), speculative=True), r"input_ids is \[3\]; expected prompts"),
        (lambda: drafting().generate(speculative=True), "input_ids is None; expected prompts"),
        (
            lambda: generate_speculatively(refused("teacher_forcing"), prompts(1)[0], max_new_tokens=3),
            "heads are 'teacher_forcing' with horizon 3; speculative decoding needs heads that draft",
        ),
        (lambda: generate_speculatively(refused("none", 1), prompts(1)[0], max_new_tokens=3), "heads are 'none'"),
        (
            lambda: generate_speculatively(refused("layer", 1), prompts(1)[0], max_new_tokens=3),
            "heads are 'layer' with horizon 1",
        ),
        (
            lambda: generate_speculatively(drafting("mamba"), prompts(4)[0], max_new_tokens=3),
            r"model is MambaForCausalLM, whose cache transformers \S+ can't crop",
        ),
        (
            lambda: generate_speculatively(drafting("rwkv"), prompts(4)[0], max_new_tokens=3),
            r"model is RwkvForCausalLM, whose cache transformers \S+ can't crop",
        ),
    ],
)
def test_what_can_not_be_drafted_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
