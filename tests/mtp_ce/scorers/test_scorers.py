"""Scorers: the weight lands on the token that earned it, and on no other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

from mtp_ce import (
    CriticDeltaScorer,
    NextToken,
    RandomMatchedWeights,
    Rho1ExcessScorer,
    ShuffledWeights,
    UniformScorer,
    normalize_weights,
    weighted_mtp_ce,
)

V = 40


class Oracle(nn.Module):
    """A causal language model that predicts the next token of one text exactly, except at chosen positions."""

    def __init__(
        self, text: Tensor, blind: Tensor | None = None
    ) -> None:  # [B, S], [B, S] bool: of the token predicted
        super().__init__()
        hidden = torch.zeros(*text.shape, V)
        following = nn.functional.one_hot(text[:, 1:], V).float() * 30
        if blind is not None:
            following = following * ~blind[:, 1:, None]
        hidden[:, :-1] = following
        self.hidden = hidden
        self.head = nn.Linear(V, V, bias=False)
        nn.init.eye_(self.head.weight)

    @property
    def base_model(self):
        return lambda input_ids, **_: SimpleNamespace(last_hidden_state=self.hidden)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.fixture
def packed() -> SimpleNamespace:
    """Two rows: three documents with a masked prompt in the second, and one document with padding."""
    torch.manual_seed(0)
    input_ids = torch.randint(V, (2, 24))
    document_ids = torch.tensor([[0] * 7 + [1] * 9 + [2] * 8, [0] * 20 + [1] * 4])
    labels = input_ids.clone()
    labels[0, 7:11] = -100
    labels[1, 20:] = -100
    first = torch.ones_like(labels, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return SimpleNamespace(
        input_ids=input_ids, labels=labels, document_ids=document_ids, first=first, scored=(labels != -100) & ~first
    )


def llama(kind=LlamaForCausalLM, **more):
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return kind(LlamaConfig(vocab_size=V, **sizes, **more))


def test_a_perfect_reference_has_no_loss_at_any_supervised_token(packed) -> None:
    ce = NextToken.of(Oracle(packed.input_ids), packed.input_ids).token_ce(packed.labels, packed.document_ids)
    assert (ce[packed.scored] < 0.01).all()
    assert torch.equal(ce.isnan(), ~packed.scored)


def test_a_text_moved_by_one_is_not_predicted(packed) -> None:
    """The control of the test above: off by one in either direction the loss is 30 nats or so."""
    for move in (-1, 1):
        moved = Oracle(packed.input_ids.roll(move, 1))
        ce = NextToken.of(moved, packed.input_ids).token_ce(packed.labels, packed.document_ids)
        assert ce[packed.scored].median() > 10


@pytest.mark.parametrize("position", [(0, 3), (0, 6), (0, 11), (0, 15), (0, 23), (1, 1), (1, 19)])
def test_the_token_that_only_the_reference_predicts_has_the_largest_weight(packed, position) -> None:
    """First and last tokens of documents, after a prompt, before padding."""
    blind = torch.zeros_like(packed.labels, dtype=torch.bool)
    blind[position] = True
    scorer = Rho1ExcessScorer(Oracle(packed.input_ids))
    current = NextToken.of(Oracle(packed.input_ids, blind), packed.input_ids)
    weights, statistics = scorer.run(packed.input_ids, packed.labels, packed.document_ids, current=current)
    document = packed.document_ids[position[0]] == packed.document_ids[position]
    others = packed.scored[position[0]] & document
    others[position[1]] = False
    assert weights[position] > 2 * weights[position[0]][others].max()
    assert (weights[packed.labels == -100] == 0).all()
    assert (weights[packed.first & (packed.labels != -100)] == 1).all()
    assert float(statistics.mean) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_the_loss_gives_the_planted_weight_to_that_very_token(packed, shift: int) -> None:
    """weight_alignment="target" with the scorer's weights: only rows that predict the token feel it."""
    weights = torch.ones(2, 24)
    weights[0, 13] = 2
    logits = torch.randn(2, 24, 3, V)
    labels = packed.labels
    rule = {"shift": shift, "weight_alignment": "target", "document_ids": packed.document_ids, "reduction": "none"}
    change = weighted_mtp_ce(logits, labels, weights, **rule) - weighted_mtp_ce(logits, labels, **rule)
    expected = [13 - shift - h for h in range(3) if packed.document_ids[0, 13 - shift - h] == 1]
    assert change.nonzero().tolist() == [[0, t] for t in sorted(expected)]


def test_excess_is_signed_and_topk_keeps_what_is_still_to_be_learnt(packed) -> None:
    hard, unlearnable = torch.zeros(2, 24, dtype=torch.bool), torch.zeros(2, 24, dtype=torch.bool)
    hard[0, [2, 4]], unlearnable[0, 5] = True, True
    scorer = Rho1ExcessScorer(Oracle(packed.input_ids, unlearnable), mode="topk", top_fraction=0.3)
    current = NextToken.of(Oracle(packed.input_ids, hard), packed.input_ids)
    given = (packed.input_ids, packed.labels, packed.document_ids)
    scores = scorer.explain(*given, current=current)["score"]
    assert (scores[0, [2, 4]] > 3).all()
    assert scores[0, 5] < -3
    weights, _ = scorer.run(*given, current=current)
    assert weights[0, :7].tolist() == pytest.approx([1, 0, 3, 0, 3, 0, 0])


def test_weights_get_no_gradient_and_the_reference_never_learns(packed) -> None:
    reference, model = llama(), llama()
    scorer = Rho1ExcessScorer(reference.train())
    hidden = model.model(packed.input_ids).last_hidden_state
    assert hidden.requires_grad
    current = NextToken(hidden, model.lm_head.weight)
    weights, _ = scorer.run(packed.input_ids, packed.labels, packed.document_ids, current=current)
    assert not weights.requires_grad
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert not reference.training
    # Model and reference are the same: no excess anywhere.
    assert torch.equal(weights, (packed.labels != -100).float())


@pytest.mark.parametrize("config", ["llama", "gemma_softcap", "granite_scaling", "cohere_scale"])
def test_next_token_is_the_models_own_loss(packed, config: str) -> None:
    """Head, softcap and logit scale: the cross entropy of transformers' own logits."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if config == "llama":
        model = llama()
    elif config == "gemma_softcap":
        model = Gemma2ForCausalLM(
            Gemma2Config(vocab_size=V, **sizes, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5)
        )
    elif config == "granite_scaling":
        from transformers import GraniteConfig, GraniteForCausalLM

        model = GraniteForCausalLM(GraniteConfig(vocab_size=V, **sizes, logits_scaling=4.0))
    else:
        from transformers import CohereConfig, CohereForCausalLM

        model = CohereForCausalLM(CohereConfig(vocab_size=V, **sizes, logit_scale=0.25))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        logits = model.eval()(packed.input_ids).logits
        ce = NextToken.of(model, packed.input_ids).token_ce(packed.labels)
    expected = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), packed.labels[:, 1:], reduction="none")
    scored = packed.labels[:, 1:] != -100
    assert torch.allclose(ce[:, 1:][scored], expected[scored], rtol=1e-5, atol=1e-5)


class Planted(nn.Module):
    """A critic whose value jumps at one token of each row and stays."""

    def __init__(self, jumps: list[int], width: int = 0) -> None:
        super().__init__()
        self.jumps = jumps
        self.width = width

    def forward(self, input_ids: Tensor) -> Tensor:
        values = torch.zeros(input_ids.shape)
        for row, jump in enumerate(self.jumps):
            values[row, jump:] = 5.0
        return values[:, :, None].expand(-1, -1, self.width) if self.width else values


@pytest.mark.parametrize("jumps", [[4, 1], [11, 10], [12, 19], [17, 3]])
@pytest.mark.parametrize("width", [0, 1])
def test_a_value_jump_puts_the_largest_weight_on_its_token(packed, jumps, width) -> None:
    """Also on the first supervised token, which compares with the prompt's last value."""
    scorer = CriticDeltaScorer(Planted(jumps, width))
    weights, _ = scorer.run(packed.input_ids, packed.labels, packed.document_ids)
    for row, jump in enumerate(jumps):
        document = packed.scored[row] & (packed.document_ids[row] == packed.document_ids[row, jump])
        assert weights[row].masked_fill(~document, 0).argmax() == jump
        document[jump] = False
        assert weights[row, jump] > 2 * weights[row][document].max()


def test_a_jump_across_a_border_is_nobodys(packed) -> None:
    """The value before is another document's: the first token has no score, and all others have the same."""
    weights, statistics = CriticDeltaScorer(Planted([16, 0])).run(packed.input_ids, packed.labels, packed.document_ids)
    assert torch.equal(weights, (packed.labels != -100).float())
    assert int(statistics.neutral) == 0, "nothing predicts the first token of a row or document"


def test_gamma_and_lambda_are_generalised_advantage_estimation(packed) -> None:
    values = torch.randn(2, 24)
    critic = nn.Module()
    critic.forward = lambda input_ids: values
    plain = CriticDeltaScorer(critic, gamma=0.9).explain(packed.input_ids, packed.labels, packed.document_ids)["score"]
    smooth = CriticDeltaScorer(critic, gamma=0.9, gae_lambda=0.8)
    got = smooth.explain(packed.input_ids, packed.labels, packed.document_ids)["score"]
    for b in range(2):
        for i in range(24):
            if packed.first[b, i]:
                assert got[b, i].isnan()
                continue
            assert plain[b, i] == pytest.approx(float(0.9 * values[b, i] - values[b, i - 1]), rel=1e-5)
            expected, j = float(plain[b, i]), i + 1
            while j < 24 and not packed.first[b, j] and packed.labels[b, j] != -100:
                expected += 0.72 ** (j - i) * float(plain[b, j])
                j += 1
            assert float(got[b, i]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_token_classifier_of_transformers_is_a_critic(packed) -> None:
    critic = llama(LlamaForTokenClassification, num_labels=1)
    weights, statistics = CriticDeltaScorer(critic).run(packed.input_ids, packed.labels, packed.document_ids)
    assert float(statistics.mean) == pytest.approx(1, abs=1e-5)
    assert len(weights[packed.scored].unique()) > 5


def test_a_critic_as_transformers_makes_it_sees_no_other_document_of_the_row(packed) -> None:
    """Its configuration enables the cache, with which transformers lets attention cross the borders."""
    critic = llama(LlamaForTokenClassification, num_labels=1, initializer_range=0.3)
    assert critic.config.use_cache
    positions = torch.arange(24) - torch.tensor([0] * 7 + [7] * 9 + [16] * 8)
    other = packed.input_ids[:1].clone()
    other[:, 7:16] = (other[:, 7:16] + 1) % V
    first, second = (
        CriticDeltaScorer(critic).explain(x, x, packed.document_ids[:1], position_ids=positions[None])["value"]
        for x in (packed.input_ids[:1], other)
    )
    differs = (first != second)[0]
    assert differs.tolist() == (packed.document_ids[0] == 1).tolist()


class Counting:
    """A scorer whose weights are all different."""

    def run(self, input_ids, labels, document_ids=None, **context):
        scores = torch.arange(labels.numel()).view(labels.shape).float()
        return normalize_weights(scores, labels != -100, document_ids=document_ids, scope="batch")


@pytest.mark.parametrize("control", [ShuffledWeights, RandomMatchedWeights])
def test_controls_keep_the_weights_and_lose_the_tokens(packed, control) -> None:
    given = (packed.input_ids, packed.labels, packed.document_ids)
    original, statistics = Counting().run(*given)
    weights, moved = control(Counting(), seed=3).run(*given, position_ids=None, current=None)
    supervised = packed.labels != -100
    assert (weights[~supervised] == 0).all()
    assert torch.equal(weights[supervised].sort().values, original[supervised].sort().values)
    assert (weights != original)[supervised].float().mean() > 0.6
    assert [float(getattr(moved, x)) for x in ("mean", "max", "clipped")] == pytest.approx(
        [float(getattr(statistics, x)) for x in ("mean", "max", "clipped")]
    )
    kept = [
        torch.equal(weights[b][inside].sort().values, original[b][inside].sort().values)
        for b, d in ((0, 0), (0, 1), (0, 2), (1, 0))
        for inside in [supervised[b] & (packed.document_ids[b] == d)]
    ]
    assert all(kept) == (control is ShuffledWeights)
    assert torch.equal(weights, control(Counting(), seed=3).run(*given).weights), "a row is always permuted alike"
    assert not torch.equal(weights, control(Counting(), seed=4).run(*given).weights)
    other = (packed.input_ids.flip(1), packed.labels, packed.document_ids)
    assert not torch.equal(weights, control(Counting(), seed=3).run(*other).weights)


@pytest.mark.parametrize("scorer", ["scorer", "shuffled"])
def test_weights_of_a_row_do_not_depend_on_the_rows_beside_it(packed, scorer) -> None:
    model, rows = llama(initializer_range=0.3), Rho1ExcessScorer(llama(initializer_range=0.2))

    def weigh(part: slice) -> Tensor:
        ids, labels, documents = (x[part] for x in (packed.input_ids, packed.labels, packed.document_ids))
        control = ShuffledWeights(rows, seed=3) if scorer == "shuffled" else rows
        return control.run(ids, labels, documents, current=NextToken.of(model, ids)).weights

    apart = torch.cat([weigh(slice(0, 1)), weigh(slice(1, 2))])
    torch.testing.assert_close(apart, weigh(slice(0, 2)), rtol=0, atol=1e-5)
    assert apart.std() > 0.1


def test_the_permutation_is_uniform(packed) -> None:
    """Over 400 seeds each of 4 tokens takes each of 4 places about 100 times."""
    tokens, counts = torch.arange(4)[None], torch.zeros(4, 4)
    for seed in range(400):
        weights = ShuffledWeights(Counting(), seed=seed).run(tokens, tokens).weights[0]
        ranks = weights.argsort().argsort()
        counts[torch.arange(4), ranks] += 1
    assert counts.min() > 65
    assert counts.max() < 140


def test_every_scorer_takes_the_same_call(packed) -> None:
    model = llama()
    context = {
        "position_ids": torch.arange(24).expand(2, -1),
        "current": NextToken.of(model, packed.input_ids),
    }
    critic = llama(LlamaForTokenClassification, num_labels=1)
    for scorer in (UniformScorer(), Rho1ExcessScorer(llama()), CriticDeltaScorer(critic), ShuffledWeights(Counting())):
        weights, statistics = scorer.run(packed.input_ids, packed.labels, packed.document_ids, **context)
        assert weights.shape == packed.labels.shape
        assert float(statistics.mean) == pytest.approx(1, abs=1e-5)
        assert all(float(x) >= 0 for x in (statistics.min, statistics.max, statistics.ess))


def test_bad_input_names_the_argument(packed) -> None:
    given = (packed.input_ids, packed.labels)
    with pytest.raises(TypeError, match="reference is Linear without output embeddings; expected"):
        Rho1ExcessScorer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"eps is 2; expected"):
        Rho1ExcessScorer(llama(), eps=2)
    with pytest.raises(TypeError, match="temprature"):
        Rho1ExcessScorer(llama(), temprature=2)
    with pytest.raises(ValueError, match="current is None; expected"):
        Rho1ExcessScorer(llama()).run(*given)
    with pytest.raises(ValueError, match="reference has V = 40 entries and the model 50; expected one vocabulary"):
        Rho1ExcessScorer(llama()).run(*given, current=NextToken(torch.zeros(2, 24, 16), torch.zeros(50, 16)))
    with pytest.raises(ValueError, match="gamma is 0; expected"):
        CriticDeltaScorer(nn.Identity(), gamma=0)
    with pytest.raises(ValueError, match=r"gae_lambda is 1\.5; expected"):
        CriticDeltaScorer(nn.Identity(), gae_lambda=1.5)
    with pytest.raises(ValueError, match=r"critic returns \[2, 24, 40\]; expected one value per token, \[2, 24\]"):
        CriticDeltaScorer(llama()).run(*given)
    critic = nn.Module()
    critic.forward = lambda input_ids: SimpleNamespace()
    with pytest.raises(TypeError, match="critic returns SimpleNamespace; expected values"):
        CriticDeltaScorer(critic).run(*given)
    with pytest.raises(TypeError, match="Linear has no output embeddings; expected a causal language model"):
        NextToken.of(nn.Linear(2, 2), packed.input_ids)
