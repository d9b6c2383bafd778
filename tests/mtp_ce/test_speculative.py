"""Speculative decoding gives what the model alone would give: token by token, or in distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mtp_ce import MTPWrapper
from mtp_ce.speculative import generate_speculatively

V = 23


def drafting(architecture: str = "llama", horizon: int = 4, noise: float = 0.02, sharp: float = 4.0) -> MTPWrapper:
    """A model with clear preferences, and heads that guess some of them."""
    torch.manual_seed(0)
    if architecture == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=96))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        model.get_output_embeddings().weight.mul_(sharp)
    model.generation_config.eos_token_id = None
    wrapper = MTPWrapper(model, horizon)
    with torch.no_grad():
        for parameter in wrapper.heads.parameters():
            parameter.normal_(std=noise)
    return wrapper.eval()


def prompts(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(V, (1, length), generator=generator) for length in lengths]


@pytest.mark.parametrize("horizon", [2, 4])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_greedy_decoding_is_the_models_own_token_for_token(architecture, horizon):
    wrapper = drafting(architecture, horizon)
    kept = offered = 0
    for prompt in prompts(25):
        expected = wrapper.generate(prompt, max_new_tokens=40, do_sample=False)
        sequences, found = generate_speculatively(wrapper, prompt, max_new_tokens=40)
        assert torch.equal(sequences, expected)
        assert torch.equal(wrapper.generate(prompt, max_new_tokens=40, speculative=True), expected)
        assert found.tokens == 40
        assert all(one <= other for one, other in zip(found.kept, found.offered, strict=True))
        assert found.forwards <= 41
        kept, offered = kept + sum(found.kept), offered + sum(found.offered)
    assert 0 < kept < offered, "some drafts were kept and some were not, or this shows nothing"


@pytest.mark.parametrize("tokens", [1, 2, 3, 7])
def test_it_stops_at_the_number_of_tokens_asked_for(tokens):
    wrapper = drafting()
    for prompt in prompts(5):
        expected = wrapper.generate(prompt, max_new_tokens=tokens, do_sample=False)
        assert torch.equal(wrapper.generate(prompt, max_new_tokens=tokens, speculative=True), expected)


def test_it_stops_at_the_end_of_text_also_inside_a_draft():
    wrapper = drafting()
    stopped = 0
    for prompt in prompts(10):
        free = wrapper.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :]
        end = int(free[11])
        # Without a mask, transformers would take the prompt's own tokens 0 for padding.
        plain = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
        expected = wrapper.generate(prompt, max_new_tokens=40, eos_token_id=end, **plain)
        assert torch.equal(wrapper.generate(prompt, max_new_tokens=40, eos_token_id=end, speculative=True), expected)
        assert torch.equal(
            wrapper.generate(prompt, max_new_tokens=40, eos_token_id=[end, V + 5], speculative=True), expected
        )
        stopped += expected.shape[1] < prompt.shape[1] + 40
    assert stopped == 10


def test_heads_that_always_guess_right_give_their_number_of_tokens_in_every_forward():
    """A model that says one token whatever came before: every head that says the same is right."""
    wrapper = drafting(noise=0.0)
    with torch.no_grad():
        for name, parameter in wrapper.model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
    _, found = generate_speculatively(wrapper, prompts(1)[0], max_new_tokens=41)
    assert found.acceptance == [1.0, 1.0, 1.0]
    assert found.forwards == 1 + 10, "the prompt, ten rounds of four; the last token needs no check"
    assert found.tokens_per_forward == pytest.approx(41 / 11)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}])
def test_sampling_keeps_the_models_distribution(options):
    """Of the first three tokens after a prompt, against the exact probabilities of all V^3 continuations."""
    wrapper = drafting(sharp=1.5, noise=0.5)
    model, prompt, draws = wrapper.causal, torch.tensor([[1, 2, 3]]), 1000
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(V, V, V)
    kept = offered = 0
    for _ in range(draws):
        (tokens,), found = generate_speculatively(
            wrapper, prompt, max_new_tokens=3, do_sample=True, generator=generator, **options
        )
        counts[tuple(tokens[-3:].tolist())] += 1
        kept, offered = kept + sum(found.kept), offered + sum(found.offered)
    assert 0.02 * offered < kept < 0.98 * offered

    from mtp_ce.speculative import _sampled

    distribution = _sampled(options.get("temperature", 1.0), options.get("top_k"), options.get("top_p"))
    with torch.no_grad():
        first = distribution(model(prompt).logits[0, -1:])[0]
        ones = torch.cat([prompt.expand(V, -1), torch.arange(V)[:, None]], 1)
        second = distribution(model(ones).logits[:, -1])
        twos = torch.cat([ones.repeat_interleave(V, 0), torch.arange(V).repeat(V)[:, None]], 1)
        third = distribution(model(twos).logits[:, -1]).view(V, V, V)
    exact = first[:, None, None] * second[:, :, None] * third
    assert not counts[exact == 0].any(), "what the options rule out never comes"
    for dims in ((1, 2), (0, 2), (0, 1)):
        expected, seen = exact.sum(dims) * draws, counts.sum(dims)
        likely = expected > 5
        chi2 = ((seen - expected).square() / expected)[likely].sum()
        degrees = int(likely.sum())
        # Five standard deviations of a chi-square.
        assert chi2 < degrees + 5 * (2 * degrees) ** 0.5


def test_the_same_generator_gives_the_same_text():
    wrapper = drafting()
    one, other = (
        wrapper.generate(
            prompts(1)[0], max_new_tokens=20, do_sample=True, speculative=True,
            generator=torch.Generator().manual_seed(5),
        )
        for _ in range(2)
    )  # fmt: skip
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda w: w.generate(torch.zeros(2, 3, dtype=torch.long), max_new_tokens=3, speculative=True), "one prompt"),
        (lambda w: w.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=3, speculative=True), "one prompt"),
        (lambda w: w.generate(prompts(1)[0], max_new_tokens=0, speculative=True), "max_new_tokens is 0"),
        (
            lambda w: MTPWrapper(w.model, 3, heads="teacher_forcing").generate(
                prompts(1)[0], max_new_tokens=3, speculative=True
            ),
            "needs 'residual' heads",
        ),
    ],
)
def test_what_can_not_be_drafted_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(drafting())
