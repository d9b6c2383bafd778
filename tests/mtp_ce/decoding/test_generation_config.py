"""Every setting of generate holds in speculative decoding too, or is refused by name before anything is computed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    WatermarkingConfig,
)  # fmt: skip
from transformers.generation.streamers import BaseStreamer

from mtp_ce import MTPWrapper
from mtp_ce.decoding.settings import ARGUMENTS, OFF
from mtp_ce.decoding.speculative import Speculation, generate_speculatively

V = 23
SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
# Positions as an embedding, a window in every other layer, and convolutions: all depend on a row's padding.
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 96},
    "gemma2": {"sliding_window": 6, "head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
KINDS = ["residual", "layer", "sequential"]
PROMPTS = [torch.tensor([[7]]), torch.tensor([[3, 9, 9, 14, 2]]), torch.tensor([[1, 4, 1, 5, 9, 2, 6, 5, 3]])]

# Settings that change greedy text, each with a value that changes the text of some prompt here.
GREEDY: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 21},
    "max_new_tokens": {"max_new_tokens": 7},
    "min_length": {"min_length": 12, "eos_token_id": [*range(14)]},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": [*range(14)]},
    "max_time": {"max_time": 1e-9},
    "eos_token_id": {"eos_token_id": [*range(8)]},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 2.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[9], [18, 1], [3, 5], [*range(3)]]},
    "sequence_bias": {"sequence_bias": [[[18], -6.0], [[9, 1], 8.0]]},
    "forced_bos_token_id": {"forced_bos_token_id": 11},
    "forced_eos_token_id": {"forced_eos_token_id": 13},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (4, 1.6), "eos_token_id": 5},
    "suppress_tokens": {"suppress_tokens": [9, 18, 5, 3]},
    "use_cache": {"use_cache": False, "suppress_tokens": [9, 18]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [9, 18, 5, 3, 22, 14]},
}
# Settings of sampling, each with a value that excludes most tokens.
SAMPLING: dict[str, dict[str, Any]] = {
    "do_sample": {"top_k": 0},
    "temperature": {"temperature": 0.05, "top_p": 0.9},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.3},
    "min_p": {"min_p": 0.5},
    "top_h": {"top_h": 0.1},
    "typical_p": {"typical_p": 0.2},
    "epsilon_cutoff": {"epsilon_cutoff": 0.2},
    "eta_cutoff": {"eta_cutoff": 0.5},
    "renormalize_logits": {"renormalize_logits": True, "top_k": 3},
}
# Settings with a test of their own below.
APART = {"stop_strings", "pad_token_id", "remove_invalid_values"}
# What generate itself does not read in greedy decoding and sampling with a dynamic cache.
IRRELEVANT = {
    "bos_token_id", "early_stopping", "length_penalty", "diversity_penalty", "low_memory", "decoder_start_token_id",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
    "cache_config", "max_cache_len", "compile_config", "disable_compile", "continuous_batching_config",
    "transformers_version", "_from_model_config",
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "num_beams": 3, "num_beam_groups": 2, "num_return_sequences": 2, "constraints": ["x"], "force_words_ids": [[1]],
    "penalty_alpha": 0.6, "dola_layers": "low", "use_mtp": True, "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1, "speculation_type": "dflash", "is_assistant": True, "guidance_scale": 1.5,
    "watermarking_config": WatermarkingConfig(), "token_healing": True,
    "cache_implementation": "static", "prefill_chunk_size": 4, "return_dict_in_generate": True,
    "output_attentions": True, "output_hidden_states": True, "output_scores": True, "output_logits": True,
}  # fmt: skip
REFUSED_ARGUMENTS: dict[str, Any] = {
    "assistant_model": torch.nn.Linear(1, 1), "assistant_tokenizer": "x", "negative_prompt_ids": torch.ones(1, 2),
    "negative_prompt_attention_mask": torch.ones(1, 2), "custom_generate": "someone/repository", "synced_gpus": True,
    "inputs_embeds": torch.zeros(1, 3, 16), "past_key_values": DynamicCache(), "cache": DynamicCache(),
}  # fmt: skip


def drafting(kind: str = "residual", architecture: str = "llama", sharp: float = 4.0, size: int = V) -> MTPWrapper:
    """A model with clear preferences, and heads that guess some of them; the seed is one with which they do."""
    torch.manual_seed(12)
    config = AutoConfig.for_model(architecture, **SMALL, **OWN[architecture], vocab_size=size)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        model.get_output_embeddings().weight.mul_(sharp)
    wrapper = MTPWrapper(model, 4, heads=kind)
    with torch.no_grad():
        for parameter in wrapper.heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return wrapper.eval()


@pytest.fixture(scope="module")
def wrappers() -> dict[str, MTPWrapper]:
    return {kind: drafting(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def plain(wrappers: dict[str, MTPWrapper]) -> list[torch.Tensor]:
    """The greedy text of every prompt without settings; the model is the same whatever the heads."""
    return [wrappers["residual"].generate(prompt, max_new_tokens=16) for prompt in PROMPTS]


@pytest.fixture(params=["residual", "sequential"])
def wrapper(request: pytest.FixtureRequest, wrappers: dict[str, MTPWrapper]) -> MTPWrapper:
    """All drafts of a step at once, and one after the other."""
    one = wrappers[request.param]
    one.causal.generation_config = GenerationConfig()
    return one


def length(options: dict[str, Any]) -> dict[str, Any]:
    return options if {"max_length", "max_new_tokens"} & set(options) else {"max_new_tokens": 16, **options}


def test_every_field_of_a_generation_config_is_followed_refused_or_irrelevant():
    """A new field of transformers fails here, until it stands in one of the lists."""
    lists = [set(GREEDY), set(SAMPLING), APART, IRRELEVANT, set(OFF)]
    assert sum(map(len, lists)) == len(set.union(*lists)), "no field in two lists"
    assert set(vars(GenerationConfig())) - {"do_sample"} == set.union(*lists) - {"do_sample"}
    assert set(REFUSED) == set(OFF), "every refused field has a case"
    assert set(REFUSED_ARGUMENTS) == set(ARGUMENTS)


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_text_is_that_of_generate_under_every_setting(wrapper, plain, name):
    """As an option of the call, as a generation_config of the call, and in the model's own generation_config."""
    changed, total = False, Speculation()
    options = length(GREEDY[name])
    for prompt, without in zip(PROMPTS, plain, strict=True):
        expected = wrapper.generate(prompt, **options)
        changed |= not torch.equal(expected, without)
        found = generate_speculatively(wrapper, prompt, **options)
        assert torch.equal(found.sequences, expected)
        assert found.speculation.tokens == expected.shape[1] - prompt.shape[1]
        total += found.speculation
    assert torch.equal(wrapper.generate(prompt, GenerationConfig(**options), speculative=True), expected)
    wrapper.causal.generation_config = GenerationConfig(**options)
    assert torch.equal(wrapper.generate(input_ids=prompt, speculative=True), expected)
    assert changed, "the setting changes some text, or this shows nothing"
    assert sum(total.kept) or total.tokens < 10, "drafts are kept under it"


@pytest.mark.parametrize("name", SAMPLING)
def test_no_sample_is_outside_the_support_of_generate(wrapper, name):
    """The processors that generate builds, applied to the model's logits of the prefix, exclude none of the tokens."""
    options = {"do_sample": True, "max_new_tokens": 12, **SAMPLING[name]}
    kept = []

    def processors(model, input_ids, logits_processor, **_):
        kept.append(logits_processor)
        return input_ids

    wrapper.model.generate(PROMPTS[1], custom_generate=processors, **options)
    torch.manual_seed(1)
    text, found = generate_speculatively(wrapper, PROMPTS[1], **options)
    excluded = 0
    for end in range(PROMPTS[1].shape[1], text.shape[1]):
        with torch.no_grad():
            scores = kept[0](text[:, :end], wrapper.causal(text[:, :end]).logits[:, -1].float())
        assert scores[0, text[0, end]] > -torch.inf
        excluded += int((scores == -torch.inf).sum())
    assert (excluded > 0) == (name != "do_sample")
    assert found.tokens == 12


@pytest.mark.parametrize(
    ("kind", "prompts", "options"),
    [
        ("residual", [[1, 2, 3]], {"temperature": 1.3, "min_p": 0.05, "repetition_penalty": 1.3, "top_k": 5}),
        ("sequential", [[1, 2, 3], [0, 0, 4]], {"top_p": 0.9, "no_repeat_ngram_size": 2, "bad_words_ids": [[5]]}),
    ],
)
def test_samples_have_the_distribution_of_generate(kind, prompts, options):
    """Of the four tokens after a prompt, in which two drafts are checked at once, against all continuations."""
    size, draws = 6, 250
    wrapper = drafting(kind, sharp=1.5, size=size)
    texts, mask = torch.tensor(prompts), torch.tensor(prompts).ne(0).long()
    options = {"do_sample": True, "attention_mask": mask, "max_new_tokens": 4, **options}
    processors: list[Any] = []
    wrapper.model.generate(
        texts, custom_generate=lambda model, input_ids, logits_processor, **_: processors.append(logits_processor),
        **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    counts, total = torch.zeros(len(texts), size, size, size, size), Speculation()
    for _ in range(draws):
        rows, found = generate_speculatively(wrapper, texts, generator=generator, **options)
        for counted, row in zip(counts, rows, strict=True):
            counted[tuple(row[-4:].tolist())] += 1
        total += found
    assert all(0.02 < share < 0.98 for share in total.acceptance[:2])
    for counted, prompt, row_mask in zip(counts, texts, mask, strict=True):
        exact, prefixes = torch.ones(1), prompt[None]
        for _ in range(4):
            masks = torch.cat([row_mask.expand(len(prefixes), -1), torch.ones_like(prefixes[:, 3:])], 1)
            positions = (masks.cumsum(1) - 1).clamp(min=0)
            with torch.no_grad():
                logits = wrapper.causal(prefixes, attention_mask=masks, position_ids=positions).logits[:, -1]
            # A penalty that ignores a row's padding holds as many lengths as there are rows.
            scores = torch.cat(
                [processors[0](prefixes[i : i + 1], logits[i : i + 1].float()) for i in range(len(prefixes))]
            )
            exact = (exact[:, None] * scores.softmax(-1)).flatten()
            grown = torch.arange(size).repeat(len(prefixes))[:, None]
            prefixes = torch.cat([prefixes.repeat_interleave(size, 0), grown], 1)
        exact = exact.view_as(counted)
        assert not counted[exact == 0].any(), "what the options rule out never comes"
        for dims in ((2, 3), (0, 3), (0, 1)):  # of every two neighbours
            expected, seen = exact.sum(dims) * draws, counted.sum(dims)
            likely = expected > 5
            chi2 = ((seen - expected).square() / expected)[likely].sum()
            degrees = int(likely.sum())
            # Five standard deviations of a chi-square.
            assert chi2 < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("architecture", OWN)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_with_padding_has_the_text_of_generate_in_every_row(kind, architecture):
    """Rows of unequal lengths, that accept unequal numbers of drafts and end at unequal times."""
    wrapper, total = drafting(kind, architecture), Speculation()
    longest = max(prompt.shape[1] for prompt in PROMPTS)
    padded = torch.cat([torch.nn.functional.pad(x, (longest - x.shape[1], 0), value=21) for x in PROMPTS])
    mask = padded.ne(21).long()
    plain = wrapper.generate(padded, attention_mask=mask, max_new_tokens=20)[:, longest:]
    ends = {"eos_token_id": [int(plain[0, 4]), int(plain[2, 9])], "pad_token_id": 21}
    for options in ({}, ends, {"repetition_penalty": 1.2, **ends}, {"min_new_tokens": 5, **ends}):
        # Without a mask generate infers one from the padding.
        for given in ({"attention_mask": mask}, *([] if options else [{"pad_token_id": 21}])):
            call = {"max_new_tokens": 20, **options, **given}
            expected = wrapper.generate(padded, **call)
            found = generate_speculatively(wrapper, padded, **call)
            assert torch.equal(found.sequences, expected)
            total += found.speculation
            if options is ends:
                assert found.speculation.tokens < 3 * (expected.shape[1] - longest), "some row ends before another"
    assert 0 < sum(total.kept) < sum(total.offered)
    assert all(one <= other for one, other in zip(total.kept, total.offered, strict=True))


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.log: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.log.append(value.tolist())

    def end(self) -> None:
        self.log.append("end")


class LongEnough(StoppingCriteria):
    """Ends a row at its seventh token 9 or 5, whatever generate calls it with otherwise; keeps what it has seen."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        return torch.isin(input_ids[:, -1], torch.tensor([9, 5])) & (input_ids.shape[1] > 15)


@pytest.mark.parametrize("rows", [1, 3])
def test_streamer_and_stopping_criteria_see_what_generate_shows_them(wrapper, rows):
    prompts = torch.cat([PROMPTS[2]] * rows) + torch.arange(rows)[:, None]
    for ends in ({}, {"eos_token_id": 18, "pad_token_id": 21}):
        logs = []
        for decode in (wrapper.generate, lambda *x, **y: generate_speculatively(wrapper, *x, **y).sequences):
            streamer, criterion = Recorder(), LongEnough()
            call = {"streamer": streamer, "stopping_criteria": [criterion], "max_new_tokens": 30, **ends}
            logs.append([decode(prompts, **call).tolist(), streamer.log, criterion.lengths])
        assert logs[0] == logs[1]
        assert logs[0][1][-1] == "end"


def test_strings_end_a_text_as_in_generate(wrapper):
    words = {"w0" if i == 0 else "abcdef" if i == 1 else f"w{i}": i for i in range(V)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))
    expected = wrapper.generate(PROMPTS[2], max_new_tokens=30)
    word = f"w{int(expected[0, 17])}"
    expected = wrapper.generate(PROMPTS[2], max_new_tokens=30, stop_strings=word, tokenizer=tokenizer)
    assert expected.shape[1] < 39
    call = {"max_new_tokens": 30, "speculative": True, "tokenizer": tokenizer}
    assert torch.equal(wrapper.generate(PROMPTS[2], stop_strings=word, **call), expected)
    assert torch.equal(wrapper.generate(PROMPTS[2], GenerationConfig(stop_strings=[word]), **call), expected)
    wrapper.causal.generation_config.stop_strings = [word]
    assert torch.equal(wrapper.generate(PROMPTS[2], **call), expected)
    with pytest.raises(ValueError, match="pass the model's tokenizer"):
        wrapper.generate(PROMPTS[2], max_new_tokens=30, speculative=True)


class Once(LogitsProcessor):
    """No token twice in the whole text; knows nothing about what comes after its end."""

    def __init__(self, end: int) -> None:
        self.end = end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert not (input_ids == self.end).any(), "the text has ended"
        return scores.scatter(1, input_ids, -torch.inf)


def test_processors_of_the_caller_see_the_draft_and_never_the_time_after_the_end(wrapper):
    def allowed(row: int, text: torch.Tensor) -> list[int]:
        assert int(text[-1]) != 6
        return [int(text[-1] + i) % V for i in (3, 5, 8, 13)]

    for prompt in PROMPTS[:2]:
        for own in ({"logits_processor": [Once(6)]}, {"prefix_allowed_tokens_fn": allowed}):
            call = {"max_new_tokens": 18, "eos_token_id": 6, **own}
            assert torch.equal(wrapper.generate(prompt, speculative=True, **call), wrapper.generate(prompt, **call))


def test_values_that_are_no_numbers_are_removed_as_in_generate(wrapper):
    def broken(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, torch.tensor([4]), torch.nan)

    class Broken(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return broken(None, None, scores)

    call = {"max_new_tokens": 12, "logits_processor": [Broken()], "remove_invalid_values": True}
    # Processors of the caller come last in both.
    assert torch.equal(wrapper.generate(PROMPTS[1], speculative=True, **call), wrapper.generate(PROMPTS[1], **call))


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_heads_of_another_dtype_than_the_trunk_draft(dtypes):
    """fp32 heads on a bf16 trunk, as mixed-precision training leaves them."""
    for kind in KINDS:
        wrapper = drafting(kind)
        trunk, heads = (getattr(torch, name) for name in dtypes)
        wrapper.model.to(trunk)
        wrapper.heads.to(heads)
        found = generate_speculatively(wrapper, PROMPTS[1], max_new_tokens=12)
        assert torch.equal(found.sequences, wrapper.generate(PROMPTS[1], max_new_tokens=12))
        assert sum(found.speculation.kept)


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_ARGUMENTS])
def test_what_can_not_be_followed_is_refused_by_name_before_anything_is_computed(wrappers, name):
    wrapper, streamer = wrappers["residual"], Recorder()
    calls: list[Any] = []
    hook = wrapper.causal.base_model.register_forward_pre_hook(lambda *_: calls.append(None))
    value = {**REFUSED, **REFUSED_ARGUMENTS}[name]
    message = (
        re.escape(f"{name} is ") + ".*, which speculative decoding does not follow; expected .*, or generate without"
    )
    try:
        with pytest.raises(ValueError, match=message) as caught:
            wrapper.generate(PROMPTS[0], do_sample=True, streamer=streamer, speculative=True, **{name: value})
    finally:
        hook.remove()
    assert "\n" not in str(caught.value)
    assert not calls
    assert not streamer.log
    if name in REFUSED:  # and in the model's own settings
        own, wrapper.causal.generation_config = wrapper.causal.generation_config, GenerationConfig(do_sample=True)
        setattr(wrapper.causal.generation_config, name, value)
        with pytest.raises(ValueError, match=f"{name} is "):
            wrapper.generate(PROMPTS[0], speculative=True)
        wrapper.causal.generation_config = own


def test_a_misspelt_option_is_an_error_as_in_generate(wrappers):
    with pytest.raises(ValueError, match="max_new_token"):
        wrappers["residual"].generate(PROMPTS[0], max_new_token=3, speculative=True)
