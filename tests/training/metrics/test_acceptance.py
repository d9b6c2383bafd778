"""The counts of one teacher-forced forward are those of an engine that drafts, verifies and drafts again."""

from __future__ import annotations

import math
import random
from functools import cache

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mtp_ce import MTPWrapper
from mtp_ce.decoding.speculative import generate_speculatively
from mtp_ce.training.metrics.acceptance import Acceptance, count_accepted, measure_acceptance

V = 12


def engine(draft, target, new_tokens: int, K: int, ends=()) -> tuple[Acceptance, list[int]]:
    """What an engine counts: it drafts K tokens in every round and looks at nothing but what it has produced.

    Args:
        draft: produced tokens -> K tokens.
        target: produced tokens -> the model's next token.
        new_tokens: as in a request.
        K: tokens of a draft.
        ends: tokens that end a text.
    """
    produced, drafts, accepted = [target([])], 0, [0] * K
    while len(produced) < new_tokens and not set(produced) & set(ends):
        tokens, round_ = draft(produced), []
        drafts += 1
        for h, token in enumerate(tokens):
            if target(produced + round_) != token:
                break
            accepted[h] += 1
            round_.append(token)
        produced += [*round_, target(produced + round_)]
    end = next((i for i, token in enumerate(produced) if token in ends), new_tokens - 1)
    return Acceptance(drafts, accepted, end + 1, 1), produced


def test_the_counts_are_those_of_an_engines_loop_over_random_texts_and_drafts():
    """Few tokens, so that drafts are accepted often; ends lie in drafts, at the first token and nowhere."""
    random.seed(0)
    lengths, ended = set(), 0
    for _ in range(300):
        K, new_tokens, tokens = random.randint(1, 5), random.randint(1, 30), random.choice([2, 3, 8])
        text = [random.randrange(tokens) for _ in range(new_tokens + K)]
        drafted = [[random.randrange(tokens) for _ in text] for _ in range(K)]
        ends = random.choice([(), (7,), (1,), (0, 1)])

        def draft(produced, drafted=drafted):
            return [head[len(produced) - 1] for head in drafted]

        expected, produced = engine(draft, lambda produced, text=text: text[len(produced)], new_tokens, K, ends)
        found = count_accepted(drafted, text, new_tokens, ends)
        assert found == expected
        lengths.add(len(produced) - new_tokens)
        ended += found.tokens < new_tokens
    assert lengths >= {0, 1, 2, 3}, "a last round that is cut off by the end of the text, and one that is not"
    assert 30 < ended < 270


@cache
def trained(kind: str, horizon: int, shared: bool = False) -> MTPWrapper:
    """A tiny model that has learnt a text with repetitions in part, so that some drafts are accepted."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=V, max_position_embeddings=128, initializer_range=0.3, eos_token_id=None, **sizes)
    model = MTPWrapper(LlamaForCausalLM(config), horizon, heads=kind, shared=shared)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(50):
        tokens = torch.randint(V, (8, 1)) + torch.where(torch.rand(8, 32) < 0.2, 5, 1).cumsum(1)
        tokens = tokens % V
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():  # some drafts have to be wrong
        for parameter in model.heads.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def prompts(count: int = 4) -> list[list[int]]:
    rows = torch.Generator().manual_seed(1)
    return [torch.randint(V, (3 + i,), generator=rows).tolist() for i in range(count)]


def drafted_alone(model: MTPWrapper, prompt: list[int], K: int):
    """A draft from the produced tokens alone: each head reads the drafts before it, as in an engine."""
    wide = model
    if model.horizon < K + 1:
        wide = MTPWrapper(model.causal, K + 1, heads="sequential", shared=True).eval()
        wide.heads.load_state_dict(model.heads.state_dict())

    @torch.no_grad()
    def draft(produced):
        text, tokens = [*prompt, *produced], []
        for h in range(1, K + 1):
            logits = wide.head_logits(input_ids=torch.tensor([text + tokens]))[h]
            tokens.append(int(logits[0, len(text) - 2].argmax()))
        return tokens

    @torch.no_grad()
    def target(produced):
        return int(model.causal(torch.tensor([prompt + produced])).logits[0, -1].argmax())

    return draft, target


KINDS = [
    ("residual", 4, False, None), ("layer", 3, False, None), ("sequential", 4, False, None),
    ("sequential", 4, False, 2), ("sequential", 2, False, 3), ("sequential", 3, True, 5),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "horizon", "shared", "draft_tokens"), KINDS)
def test_one_forward_over_the_greedy_text_counts_what_drafting_does(kind, horizon, shared, draft_tokens):
    model, K, total = trained(kind, horizon, shared), draft_tokens or horizon - 1, Acceptance()
    for ends in ([], [5]):
        model.generation_config.eos_token_id = ends or None
        found = measure_acceptance(model, prompts(), 20, draft_tokens)
        for prompt, counts in zip(prompts(), found, strict=True):
            expected, _ = engine(*drafted_alone(model, prompt, K), 20, K, ends)
            assert counts == expected
            total += counts
    model.generation_config.eos_token_id = None
    assert total.drafts > total.accepted[0] >= total.accepted[-1] > 0, "some drafts are accepted whole, some not"


def test_the_counts_agree_with_speculative_decoding_here():
    """Its last draft is shortened to the tokens that are left, so that it accepts fewer there; all else is equal."""
    model, same, shortened = trained("sequential", 4), 0, 0
    for new_tokens in range(2, 24):
        (found,) = measure_acceptance(model, prompts(1), new_tokens)
        own = generate_speculatively(model, torch.tensor(prompts(1)), max_new_tokens=new_tokens).speculation
        beyond = 1 + found.drafts + sum(found.accepted) - new_tokens
        assert own.rounds == found.drafts
        assert sum(own.kept) == sum(found.accepted) - beyond
        if beyond == 0:
            same += 1
            assert own.kept == found.accepted
        shortened += beyond > 0
    assert same > 3
    assert shortened > 3


def test_texts_that_were_decoded_before_are_used_and_not_decoded_again(monkeypatch):
    model, decoded, generate = trained("residual", 4), [], MTPWrapper.generate

    def counted(self, *arguments, **options):
        decoded.append(options["max_new_tokens"])
        return generate(self, *arguments, **options)

    for eos in (None, 5):
        model.generation_config.eos_token_id = eos
        expected = measure_acceptance(model, prompts(), 12)
        texts = [model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False) for p in prompts()]
        with monkeypatch.context() as patch:
            patch.setattr(MTPWrapper, "generate", counted)
            assert measure_acceptance(model, prompts(), 12, texts=texts) == expected
    model.generation_config.eos_token_id = None
    assert decoded == [2] * 8, "the K - 1 tokens by which the last draft may exceed the text"


def test_ignore_eos_counts_beyond_the_end_of_a_text():
    model = trained("residual", 4)
    whole = measure_acceptance(model, prompts(), 20)
    model.generation_config.eos_token_id = 5
    assert measure_acceptance(model, prompts(), 20, ignore_eos=True) == whole
    assert sum(counts.tokens for counts in measure_acceptance(model, prompts(), 20)) < 80
    model.generation_config.eos_token_id = None


@pytest.mark.parametrize(
    ("kind", "horizon", "draft_tokens", "words"),
    [("residual", 4, 4, "draft_tokens is 4; expected from 1 to 3"), ("residual", 4, 0, "draft_tokens is 0"),
     ("teacher_forcing", 3, None, "'teacher_forcing' with horizon 3")],
)  # fmt: skip
def test_drafts_longer_than_the_heads_are_refused(kind, horizon, draft_tokens, words):
    config = LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = MTPWrapper(LlamaForCausalLM(config), horizon, heads=kind).eval()
    with pytest.raises(ValueError, match=words):
        measure_acceptance(model, prompts(1), 4, draft_tokens)


def test_counts_add_up_and_texts_without_a_draft_have_no_rates():
    one, other = Acceptance(4, [3, 1], 9, 1), Acceptance(2, [1, 1], 5, 1)
    total = one + other + Acceptance()
    assert total == Acceptance(6, [4, 2], 14, 2)
    assert total.mean_length == 2
    assert total.rates == [4 / 6, 2 / 6]
    nothing = Acceptance(0, [0], 1, 1)
    assert math.isnan(nothing.mean_length)
    assert math.isnan(nothing.rates[0])
