"""Prompts come from inside held-out documents; decoding is counted over all of them."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from mtp_ce import MTPWrapper
from mtp_ce.training.metrics.decoding import choose_prompts, measure_decoding


def starts(lengths: list[int], count: int, tokens: int) -> list[tuple[int, int]]:
    """Which documents prompts are from, and where in them."""
    documents = [torch.arange(length) + 1000 * i for i, length in enumerate(lengths)]
    prompts = choose_prompts(documents, count, tokens)
    assert all(prompt == list(range(prompt[0], prompt[0] + tokens)) for _, prompt in prompts)
    assert [index for index, _ in prompts] == [prompt[0] // 1000 for _, prompt in prompts]
    return [divmod(prompt[0], 1000) for _, prompt in prompts]


@pytest.mark.parametrize(
    ("lengths", "count", "expected"),
    [
        ([110, 9, 30, 110], 2, [(0, 50), (2, 10)]),
        ([110, 30, 110, 110], 4, [(0, 50), (1, 10), (2, 50), (3, 50)]),
        ([9, 130], 3, [(1, 30), (1, 60), (1, 90)]),
        ([110, 40], 4, [(0, 33), (0, 66), (1, 10), (1, 20)]),
        ([11], 5, [(0, 0)]),
        ([9], 3, []),
    ],
)
def test_prompts_are_spread_over_documents_that_are_long_enough(lengths, count, expected):
    assert starts(lengths, count, 10) == expected


def test_what_every_prompt_came_to_is_added_up():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MTPWrapper(LlamaForCausalLM(LlamaConfig(vocab_size=30, initializer_range=0.3, **sizes)), 3).eval()
    model.generation_config.eos_token_id = None
    prompts = [torch.randint(30, (1, 6 + i)) for i in range(3)]
    result, texts = measure_decoding(model, prompts, new_tokens=10)
    assert (result.prompts, result.prompt_tokens, result.identical) == (3, 8, 3)
    for prompt, text in zip(prompts, texts, strict=True):
        assert torch.equal(text, model.generate(prompt, max_new_tokens=10, do_sample=False))
    assert result.speculation.tokens == 30
    assert result.speculation.forwards <= 3 * 11
    assert result.kept[0] == result.speculation.acceptance[0]
    assert result.kept[1] <= result.kept[0]
    assert result.speedup == result.plain_seconds / result.speculative_seconds > 0


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.5}, {"num_beams": 3, "do_sample": True, "top_k": 4}])
def test_the_models_own_settings_apply_to_both_but_those_that_speculation_does_not_follow(settings):
    """A generation_config with beams or sampling does not end a report; a penalty changes both texts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MTPWrapper(LlamaForCausalLM(LlamaConfig(vocab_size=30, initializer_range=0.3, **sizes)), 3).eval()
    model.causal.generation_config = GenerationConfig(eos_token_id=None, stop_strings=["x"], **settings)
    result, _ = measure_decoding(model, [torch.randint(30, (1, 8)) for _ in range(3)], new_tokens=10)
    assert result.identical == 3
    assert result.speculation.tokens == 30
    assert sum(result.speculation.kept)
