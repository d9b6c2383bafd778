"""The critic: its losses against plain loops, padding out of sight, and that it learns what Python knows."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerFast

from mtp_ce.scorers.critic import CriticDeltaScorer
from mtp_ce.training.config.schema import Recipe
from mtp_ce.training.critic import training as module
from mtp_ce.training.critic.functions import Pair, PairRows, encode_functions, find_functions, make_pair
from mtp_ce.training.critic.loss import CENTRE, OBJECTIVES, ranking_loss, regression_loss, score_pairs
from mtp_ce.training.critic.training import build_critic, train_critic
from mtp_ce.training.data.corpus import Corpus, Document, texts
from mtp_ce.training.data.reader import read_corpus
from mtp_ce.training.data.tokenizer import load_tokenizer, train_tokenizer
from mtp_ce.training.errors import RecipeError, StepRefusedError
from mtp_ce.training.interrupt import Stop

CPU = torch.device("cpu")
CRITIC = [
    "data.sequence_length=128",
    "critic.train.steps=3",
    "critic.train.batch_size=8",
    "critic.train.log_every=1",
    "critic.optimizer.lr=1e-2",
    "critic.optimizer.final_lr_ratio=0.1",
]


@pytest.fixture
def recipe(small):
    def make(*overrides: str) -> Recipe:
        return small([*CRITIC, *overrides])

    return make


@pytest.fixture(scope="module")
def corpus(small) -> Corpus:
    return read_corpus(small().data)


@pytest.fixture(scope="module")
def tokenizer(small, corpus: Corpus) -> PreTrainedTokenizerFast:
    return load_tokenizer(texts(corpus.train), small().data.vocab_size)


@pytest.fixture(scope="module")
def pairs(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> list[Pair]:
    """Corrupted functions of uneven length, some of which still compile."""
    generator = torch.Generator().manual_seed(0)
    functions = encode_functions(find_functions(corpus.train), tokenizer, longest=128)
    pairs = [make_pair(ids, "both", tokenizer, generator) for ids in functions[:12]]
    assert 0 < sum(pair.differs for pair in pairs) < 12
    return pairs


@pytest.fixture
def critic(small) -> PreTrainedModel:
    torch.manual_seed(0)
    recipe = small(CRITIC)
    critic = build_critic(recipe, end_of_text=0)
    # It begins with values 0, behind which the trunk has no gradient.
    torch.nn.init.normal_(critic.score.weight)
    return critic


def gradients(critic: PreTrainedModel) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in critic.parameters()]


def test_ranking_is_bradley_terry_at_every_token_from_the_first_difference(pairs):
    rows = PairRows.of(pairs, pad_id=0)
    values = torch.randn(rows.input_ids.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, count = 0.0, 0
    for p, pair in enumerate(pairs):
        if pair.rewards[0] == pair.rewards[1]:
            continue
        for i in range(pair.first, min(len(pair.intact), len(pair.corrupted))):
            expected -= math.log(1 / (1 + math.exp(-(values[p, i] - values[len(pairs) + p, i]))))
            count += 1
    for side, name in enumerate(("intact", "corrupted")):
        for p, pair in enumerate(pairs):
            for i in range(len(getattr(pair, name)) if pair.differs else 0):
                expected += CENTRE * float(values[side * len(pairs) + p, i]) ** 2
    assert float(ranking_loss(values, rows)) == pytest.approx(expected, rel=1e-12)
    assert int(OBJECTIVES["ranking"].tokens(rows).sum()) == count


def test_regression_is_the_squared_error_against_the_reward_of_the_function(pairs):
    rows = PairRows.of(pairs, pad_id=0)
    values = torch.randn(rows.input_ids.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, count = 0.0, 0
    for side, name in enumerate(("intact", "corrupted")):
        for p, pair in enumerate(pairs):
            for i in range(len(getattr(pair, name))):
                expected += float(values[side * len(pairs) + p, i] - pair.rewards[side]) ** 2
                count += 1
    assert float(regression_loss(values, rows)) == pytest.approx(expected, rel=1e-12)
    assert int(OBJECTIVES["regression"].tokens(rows).sum()) == count


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_values_at_padding_reach_neither_the_loss_nor_the_gradient(pairs, objective):
    rows = PairRows.of(pairs, pad_id=0)
    values = torch.randn(rows.input_ids.shape, generator=torch.Generator().manual_seed(1))
    planted = torch.where(rows.real(), values, torch.nan).requires_grad_()
    loss = OBJECTIVES[objective].total(planted, rows)
    (gradient,) = torch.autograd.grad(loss, planted)
    assert torch.equal(loss, OBJECTIVES[objective].total(values, rows))
    assert (gradient[~rows.real()] == 0).all()
    assert (gradient[OBJECTIVES["regression"].tokens(rows)].isfinite()).all()
    assert rows.ranked(planted).equal(rows.ranked(values))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_tokens_at_padding_change_nothing(critic, pairs, objective):
    rows = PairRows.of(pairs, pad_id=0)
    random = torch.randint(512, rows.input_ids.shape, generator=torch.Generator().manual_seed(1))
    other = PairRows(torch.where(rows.real(), rows.input_ids, random), rows.lengths, rows.rewards, rows.first)
    assert not torch.equal(rows.input_ids, other.input_ids)
    found = []
    for some in (rows, other):
        critic.zero_grad()
        found.append((score_pairs(critic, [some], OBJECTIVES[objective]), gradients(critic)))
    assert found[0][0] == found[1][0]
    for one, two in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_add_up_to_the_batch(critic, pairs, objective, size):
    """Though each is padded to a length of its own and has another share of the compared tokens."""
    critic = critic.double()
    found = []
    for at_once in (len(pairs), size):
        critic.zero_grad()
        parts = [PairRows.of(pairs[i : i + at_once], pad_id=0) for i in range(0, len(pairs), at_once)]
        found.append((score_pairs(critic, parts, OBJECTIVES[objective]), gradients(critic)))
    (whole, expected), (summed, actual) = found
    assert (whole.tokens, whole.ranked, whole.differing) == (summed.tokens, summed.ranked, summed.differing)
    assert whole.loss == pytest.approx(summed.loss, rel=1e-6), "rotary positions are rounded to fp32"
    for one, two in zip(expected, actual, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-9)


def test_a_batch_without_a_pair_to_rank_has_gradient_zero(critic, pairs):
    rows = PairRows.of([pair for pair in pairs if not pair.differs], pad_id=0)
    sums = score_pairs(critic, [rows], OBJECTIVES["ranking"])
    assert (sums.loss, sums.tokens, sums.differing) == (0.0, 0, 0)
    assert all((gradient == 0).all() for gradient in gradients(critic))


def test_documents_in_one_row_do_not_see_each_other(critic):
    """The scorer reads packed rows; the critic keeps them apart without being told to make no cache."""
    ids = torch.randint(512, (1, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(20).remainder(12)[None]
    other = ids.clone()
    other[:, :12] += 1
    critic.eval()
    with torch.no_grad():
        first, second = (critic(x.remainder(512), position_ids=positions).logits for x in (ids, other))
    assert torch.equal(first[:, 12:], second[:, 12:])
    assert not torch.equal(first[:, :12], second[:, :12])


def test_the_seed_decides_the_critic_and_nothing_else_does(recipe, corpus, tokenizer):
    models = []
    for before, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(before)
        critic, _ = train_critic(recipe(f"critic.seed={seed}"), corpus, tokenizer, CPU, log=lambda *_: None)
        models.append(critic.state_dict())
        assert torch.initial_seed() == before
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0]["score.weight"], models[2]["score.weight"])


def test_metrics_come_under_their_names_and_the_last_line_is_the_validation(recipe, corpus, tokenizer):
    lines, ticks = [], []
    _, results = train_critic(
        recipe(), corpus, tokenizer, CPU, log=lambda *line: lines.append(line), tick=lambda: ticks.append(1)
    )
    assert [step for step, _ in lines] == [1, 2, 3, 3]
    assert all(
        set(metrics) == {"critic/loss", "critic/accuracy", "optim/lr", "optim/grad_norm"} for _, metrics in lines[:3]
    )
    assert lines[-1] == (3, results)
    assert set(results) == {"critic/val_loss", "critic/val_accuracy"}
    assert len(ticks) == 3


def test_what_is_not_finite_never_reaches_the_optimizer(recipe, corpus, tokenizer, monkeypatch):
    built, lines = [], []

    def poisoned(*args, **options):
        built.append(build_critic(*args, **options))
        with torch.no_grad():
            built[0].score.weight[0, 0] = torch.inf
        built.append(copy.deepcopy(built[0]))
        return built[0]

    monkeypatch.setattr(module, "build_critic", poisoned)
    with pytest.raises(StepRefusedError) as refused:
        train_critic(recipe(), corpus, tokenizer, CPU, log=lambda *line: lines.append(line))
    assert refused.value.step == 1
    assert refused.value.quantity == "critic/loss"
    assert not math.isfinite(refused.value.value)
    before, after = built[1].state_dict(), built[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert lines == []


def test_a_stop_ends_before_the_next_step_and_logs_what_was_done(recipe, corpus, tokenizer):
    stop, lines = Stop(), []
    few = recipe("critic.train.steps=9", "critic.train.log_every=5")
    with pytest.raises(KeyboardInterrupt):
        train_critic(
            few, corpus, tokenizer, CPU, log=lambda *line: lines.append(line),
            tick=lambda: stop.set() if len(lines) == 1 else None, stop=stop,
        )  # fmt: skip
    assert [step for step, _ in lines] == [1, 2]


def test_too_few_functions_are_an_error_with_the_way_out(recipe, tokenizer):
    corpus = Corpus((Document("a.py", "def f(): pass\n"),), (Document("b.py", "def g(): pass\n"),), 0, "")
    with pytest.raises(RecipeError, match=r"has 1 functions .* raise data\.sequence_length"):
        train_critic(recipe(), corpus, tokenizer, CPU, log=lambda *_: None)


def expression(generator: torch.Generator, depth: int) -> str:
    """A random expression of names, calls and lists."""
    kind = int(torch.randint(4 if depth else 2, (), generator=generator))
    if kind < 2:
        return "abcd"[int(torch.randint(4, (), generator=generator))]
    inside = [expression(generator, depth - 1) for _ in range(2)]
    return f"{inside[0]}({inside[1]})" if kind == 2 else f"[{', '.join(inside)}]"


@pytest.fixture(scope="module")
def written() -> Corpus:
    """Functions of one small grammar: little enough to be learnt in seconds."""
    generator = torch.Generator().manual_seed(3)
    files = ["".join(f"def f(a, b):\n    return {expression(generator, 3)}\n" for _ in range(40)) for _ in range(12)]
    documents = [Document(f"{i}.py", text) for i, text in enumerate(files)]
    return Corpus(tuple(documents[:9]), tuple(documents[9:]), 0, "")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_trained_critic_ranks_functions_it_never_saw_and_drops_at_the_error(recipe, written, objective, tmp_path):
    """Well above chance on held-out files; saved, reloaded and asked by the scorer, it finds a planted error."""
    learnt = recipe(
        f"critic.objective={objective}", "data.vocab_size=270", "critic.optimizer.lr=3e-3",
        "critic.train.steps=150", "critic.train.batch_size=16",
    )  # fmt: skip
    tokenizer = train_tokenizer(texts(written.train), 270)
    critic, results = train_critic(learnt, written, tokenizer, CPU, log=lambda *_: None)
    assert results["critic/val_accuracy"] > 0.65

    critic.save_pretrained(tmp_path)
    scorer = CriticDeltaScorer(AutoModelForTokenClassification.from_pretrained(tmp_path))
    generator = torch.Generator().manual_seed(5)
    functions = encode_functions(find_functions(written.held_out), tokenizer, longest=128)
    pairs = [make_pair(ids, "both", tokenizer, generator) for ids in functions]
    rows = PairRows.of([pair for pair in pairs if pair.differs], pad_id=tokenizer.eos_token_id)
    intact, corrupted = scorer.explain(rows.input_ids, rows.input_ids)["score"].chunk(2)
    # The corrupted token itself and the two after it, against the same places of the intact function.
    distance = torch.arange(rows.input_ids.shape[1]) - rows.first[:, None]
    near = rows.compared() & (distance >= 0) & (distance < 3)
    drops = torch.where(near, corrupted - intact, 0.0).sum(1)
    assert drops.mean() < -3 * drops.std() / math.sqrt(len(drops)), "three standard errors below zero"
