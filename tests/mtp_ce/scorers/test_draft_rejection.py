"""The scorer draft_rejection: a token weighs what speculative decoding loses by its wrong drafts."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mtp_ce import DraftRejectionScorer, MTPWrapper, NextToken, RandomMatchedWeights, ShuffledWeights
from mtp_ce.heads.kinds import KINDS, may_draft
from mtp_ce.heads.protocol import heads_class

V = 5  # few tokens, so that random drafts match often
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def packed() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and documents of two rows: three documents with a masked prompt in one, and a row with padding."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (2, 24), generator=generator)
    documents = torch.tensor([[0] * 7 + [1] * 9 + [2] * 8, [0] * 20 + [1] * 4])
    labels = tokens.clone()
    labels[0, 7:11] = -100
    labels[1, 20:] = -100
    return tokens, labels, documents


def planted(argmax: Tensor) -> NextToken:  # [B, S, H]
    """Heads with these most likely tokens."""
    first, *further = torch.nn.functional.one_hot(argmax, V).float().unbind(2)
    return NextToken(first, torch.eye(V), drafting=tuple(further))


def accepted(match: list[bool]) -> int:
    """Drafts before the first that does not match."""
    return [*match, False].index(False)


def counterfactual(argmax: Tensor, labels: Tensor, documents: Tensor) -> Tensor:
    """The score by its definition: every round again, with one of its drafts corrected."""
    B, S, H = argmax.shape
    score = torch.zeros(B, S)
    for b in range(B):
        for t in range(S):
            drafted = []
            for h in range(H):
                j = t + 1 + h
                if j >= S or labels[b, j] == -100 or documents[b, j] != documents[b, t]:
                    break
                drafted.append(bool(argmax[b, t, h] == argmax[b, t + h, 0]))
            rounds = drafted[1:]
            for h in range(len(rounds)):
                corrected = [*rounds[:h], True, *rounds[h + 1 :]]
                score[b, t + 2 + h] += accepted(corrected) - accepted(rounds)
    return score


@pytest.mark.parametrize("horizon", [2, 3, 5])
def test_the_score_is_what_decoding_would_gain_by_the_right_drafts_of_the_token(packed, horizon) -> None:
    tokens, labels, documents = packed
    argmax = torch.randint(V, (2, 24, horizon), generator=torch.Generator().manual_seed(horizon))
    argmax[torch.rand(2, 24, horizon) < 0.4] = 1
    score = DraftRejectionScorer().explain(tokens, labels, documents, current=planted(argmax))["score"]
    unpredicted = labels == -100
    unpredicted[:, 0] = True
    unpredicted[:, 1:] |= documents[:, 1:] != documents[:, :-1]
    assert torch.equal(score.isnan(), unpredicted)
    expected = counterfactual(argmax, labels, documents)
    assert torch.equal(score.nan_to_num(), expected.masked_fill(unpredicted, 0))
    assert expected.max() > (1 if horizon > 2 else 0)
    assert (expected == 0).any()


def test_the_rejected_token_has_the_largest_weight_and_a_round_has_one_rejection(packed) -> None:
    """All heads agree but head 1 about one token; what head 2 gets wrong behind it costs nothing."""
    tokens = packed[0][:1]
    trunk = torch.randint(V, (24,), generator=torch.Generator().manual_seed(1))
    argmax = torch.stack([trunk.roll(-h) for h in range(3)], -1)[None]
    argmax[0, 9, 1] = (argmax[0, 9, 1] + 1) % V  # head 1's draft of token 11
    argmax[0, 9, 2] = (argmax[0, 9, 2] + 1) % V  # head 2's draft of token 12, in the same round
    weights, statistics = DraftRejectionScorer().run(tokens, tokens, current=planted(argmax))
    assert weights[0].argmax() == 11
    others = weights[0, 1:][torch.arange(1, 24) != 11]
    assert (others == others[0]).all()
    assert float(statistics.mean) == pytest.approx(1, abs=1e-5)
    assert 0.05 <= float(statistics.min) < 1 < float(statistics.max) <= 3
    parts = DraftRejectionScorer().explain(tokens, tokens, current=planted(argmax))
    assert parts["rejected"].nan_to_num().sum() == 1
    assert parts["score"][0, 11] == 1


@pytest.mark.parametrize("head", [0, 2])
def test_a_head_that_is_not_finite_gives_neutral_weights_that_are_counted(packed, head) -> None:
    """A round with such a head has no length: all that it drafts is without a score, and nothing else."""
    tokens, labels, documents = packed
    current = planted(torch.randint(V, (2, 24, 3), generator=torch.Generator().manual_seed(4)))
    hidden = [current.hidden, *current.drafting]
    hidden[head][1, 8] = torch.nan
    weights, statistics = DraftRejectionScorer().run(tokens, labels, documents, current=current)
    # Head 0's row at 8 verifies drafts of rounds 6 and 7, and begins round 8.
    lost = {8, 9, 10, 11} if head == 0 else {10, 11}
    scores = DraftRejectionScorer().explain(tokens, labels, documents, current=current)["score"]
    assert set(scores[1, 1:20].isnan().nonzero()[:, 0].add(1).tolist()) == lost
    assert int(statistics.neutral) == len(lost)
    assert all(weights[1, j] == 1 for j in lost)
    assert not scores[0, 12:16].isnan().any()


@pytest.fixture(scope="module")
def wrapper() -> MTPWrapper:
    """One shared module on a detached trunk."""
    torch.manual_seed(0)
    trunk = LlamaForCausalLM(LlamaConfig(vocab_size=V, initializer_range=0.3, **SIZES))
    return MTPWrapper(trunk, 4, heads="sequential", shared=True, trunk="detached")


def test_the_weights_come_from_the_forward_that_is_trained(wrapper, packed) -> None:
    """One forward of the trunk, the weights that `next_token` gives, a gradient of the heads, none of the trunk."""
    tokens, labels, documents = packed
    scorer, scored, calls = DraftRejectionScorer(), [], []

    def weigh(current: NextToken) -> Tensor:
        scored.append(scorer.run(tokens, labels, documents, current=current).weights)
        return scored[0]

    hook = wrapper.causal.model.register_forward_hook(lambda *_: calls.append(1))
    loss = wrapper(tokens, labels=labels, document_ids=documents, token_weights=weigh).loss
    hook.remove()
    loss.backward()
    assert calls == [1]
    assert not scored[0].requires_grad
    assert scored[0][labels != -100].std() > 0.1
    with torch.no_grad():
        current = wrapper.next_token(input_ids=tokens)
        assert torch.equal(scorer.run(tokens, labels, documents, current=current).weights, scored[0])
        given = wrapper(tokens, labels=labels, document_ids=documents, token_weights=scored[0]).loss
        assert given == loss
    assert all(p.grad is None for p in wrapper.causal.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in wrapper.heads.parameters())


@pytest.mark.parametrize("control", [ShuffledWeights, RandomMatchedWeights])
def test_controls_permute_the_weights(wrapper, packed, control) -> None:
    tokens, labels, documents = packed
    current = wrapper.next_token(input_ids=tokens)
    own = DraftRejectionScorer().run(tokens, labels, documents, current=current).weights
    moved = control(DraftRejectionScorer(), seed=1).run(tokens, labels, documents, current=current).weights
    supervised = labels != -100
    assert torch.equal(own[supervised].sort().values, moved[supervised].sort().values)
    assert (moved[~supervised] == 0).all()
    assert not torch.equal(own, moved)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "gpt_neox"])
def test_rows_are_those_of_the_heads_logits(family, packed) -> None:
    """With the model's softcap, scale and no bias: argmax and cross entropy at rows with a target, -1 at others."""
    tokens, labels, documents = packed
    torch.manual_seed(0)
    more = {"gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0}, "cohere": {"logit_scale": 0.5}}.get(family, {})
    tied = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": None, "initializer_range": 0.3}
    config = AutoConfig.for_model(family, vocab_size=V, num_key_value_heads=2, **SIZES, **tied, **more)
    model = MTPWrapper(AutoModelForCausalLM.from_config(config, trust_remote_code=False), 3, heads="residual").eval()
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.normal_(std=0.3)
        stats = model.next_token(input_ids=tokens).rows(labels, documents)
        logits = torch.stack(model.head_logits(input_ids=tokens), 2)
    assert 0 < stats.live.sum() < stats.live.numel()
    assert torch.equal(stats.top1, torch.where(stats.live, logits.argmax(-1), -1))
    label = torch.stack([labels.roll(-1 - h, 1) for h in range(3)], -1).clamp(min=0)
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 2), label.flatten(), reduction="none").view_as(stats.ce)
    torch.testing.assert_close(stats.ce, torch.where(stats.live, ce, 0.0))


def test_the_table_of_kinds_says_which_heads_draft() -> None:
    """Recipes are checked by it, before the classes are loaded."""
    assert {name: kind.drafts for name, kind in KINDS.items()} == {name: heads_class(name).drafts for name in KINDS}
    assert not may_draft("teacher_forcing")
    assert may_draft("my.module:Class")


def test_heads_that_do_not_draft_are_refused(packed) -> None:
    tokens = packed[0]
    trunk = LlamaForCausalLM(LlamaConfig(vocab_size=V, **SIZES))
    with pytest.raises(ValueError, match=r"current is None; expected the model's heads"):
        DraftRejectionScorer().run(tokens, tokens)
    for heads, horizon in (("teacher_forcing", 3), ("residual", 1)):
        current = MTPWrapper(trunk, horizon, heads=heads).next_token(input_ids=tokens)
        with pytest.raises(ValueError, match=re.escape("without heads that draft; expected the model's heads")):
            ShuffledWeights(DraftRejectionScorer()).run(tokens, tokens, current=current)
    with pytest.raises(ValueError, match=r"w_max is 0\.5"):
        DraftRejectionScorer(w_max=0.5)
