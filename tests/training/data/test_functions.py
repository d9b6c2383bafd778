"""Functions and their corruption: what is intact compiles, and Python alone decides what a corruption did."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mtp_ce.training.critic.functions import SWAP_REACH, PairRows, compiles, encode_functions, find_functions, make_pair
from mtp_ce.training.data.corpus import Corpus, Document, texts
from mtp_ce.training.data.reader import read_corpus
from mtp_ce.training.data.tokenizer import load_tokenizer

SOURCE = '''
from __future__ import annotations

def outer(x):
    count = 0
    def inner():
        nonlocal count
        count += x
    return inner

class A:
    @property
    @staticmethod
    def decorated(self): return "\\d"

    async def waits(self):
        """Text
at the margin.
        """
        return await self

def outer(x):
    count = 0
    def inner():
        nonlocal count
        count += x
    return inner
'''


@pytest.fixture(scope="module")
def corpus(small) -> Corpus:
    return read_corpus(small().data)


@pytest.fixture(scope="module")
def tokenizer(small, corpus: Corpus) -> PreTrainedTokenizerFast:
    return load_tokenizer(texts(corpus.train), small().data.vocab_size)


@pytest.fixture(scope="module")
def functions(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return encode_functions(find_functions(corpus.train), tokenizer, longest=128)


def draw_pairs(functions, corruption, tokenizer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [make_pair(ids, corruption, tokenizer, generator) for ids in functions]


def text_of(ids: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.decode(ids[1:-1], clean_up_tokenization_spaces=False)


def python_compiles(source: str) -> bool:
    try:
        compile(source, "f", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def test_a_function_comes_with_its_decorators_dedented_and_once():
    functions = find_functions([Document("a.py", SOURCE), Document("b.py", SOURCE)])
    assert [function.split("(")[0] for function in functions] == [
        "def outer",
        "@property\n@staticmethod\ndef decorated",
    ]


def test_a_function_that_does_not_compile_by_itself_is_left_out():
    """A nonlocal of an outer scope that is not there, and a text at the margin that stops the dedent."""
    functions = find_functions([Document("a.py", SOURCE)])
    assert not any(function.startswith(("def inner", "async", " ")) for function in functions)


def test_a_form_feed_is_not_the_end_of_a_line():
    assert find_functions([Document("a.py", "x = 1\n\f\ny = 2\ndef f():\n    return 1\n")]) == [
        "def f():\n    return 1\n"
    ]


def test_a_file_that_does_not_parse_is_passed_over():
    documents = [Document("a.py", "def f(:\n"), Document("b.py", "x = '\0'"), Document("c.py", "def g(): pass\n")]
    assert find_functions(documents) == ["def g(): pass\n"]


def test_what_a_text_means_does_not_depend_on_who_asks():
    """`from __future__ import annotations`, which this project's files have, forbids what Python 3.11 allows."""
    source = "def f():\n    def g(x: (yield)): pass\n"
    assert compiles(source) == python_compiles(source)


def test_every_intact_function_compiles(functions, tokenizer):
    assert len(functions) > 50
    assert all(python_compiles(text_of(ids, tokenizer)) for ids in functions)
    assert all(ids[0] == ids[-1] == tokenizer.eos_token_id and len(ids) <= 128 for ids in functions)


@pytest.mark.parametrize("corruption", ["delete", "swap", "both"])
def test_rewards_agree_with_the_compiler(functions, tokenizer, corruption):
    rewards = []
    for pair in draw_pairs(functions, corruption, tokenizer):
        expected = tuple(float(python_compiles(text_of(ids, tokenizer))) for ids in (pair.intact, pair.corrupted))
        assert pair.rewards == expected
        rewards.append(pair.rewards)
    assert {intact for intact, _ in rewards} == {1.0}
    assert {corrupted for _, corrupted in rewards} == {0.0, 1.0}, "some corrupted functions still compile"


def test_deleting_takes_exactly_one_token(functions, tokenizer):
    for pair in draw_pairs(functions, "delete", tokenizer):
        first = pair.first
        assert pair.intact[:first] == pair.corrupted[:first]
        assert pair.intact[first] != pair.corrupted[first]
        # Also where one of several equal tokens in a row has gone.
        assert pair.intact[:first] + pair.intact[first + 1 :] == pair.corrupted
        assert pair.corrupted[0] == pair.corrupted[-1] == tokenizer.eos_token_id


def test_swapping_exchanges_exactly_two_tokens_near_each_other(functions, tokenizer):
    for pair in draw_pairs(functions, "swap", tokenizer):
        changed = [i for i, (a, b) in enumerate(zip(pair.intact, pair.corrupted, strict=True)) if a != b]
        one, other = changed
        assert pair.first == one
        assert other - one <= SWAP_REACH
        assert (pair.intact[one], pair.intact[other]) == (pair.corrupted[other], pair.corrupted[one])
        assert 0 < one < other < len(pair.intact) - 1


def test_both_draws_each_kind_about_as_often(functions, tokenizer):
    pairs = draw_pairs(functions, "both", tokenizer)
    deleted = sum(len(pair.corrupted) < len(pair.intact) for pair in pairs)
    assert 0.3 < deleted / len(pairs) < 0.7


def test_the_seed_decides_the_corruption(functions, tokenizer):
    assert draw_pairs(functions, "both", tokenizer) == draw_pairs(functions, "both", tokenizer)
    assert draw_pairs(functions, "both", tokenizer) != draw_pairs(functions, "both", tokenizer, seed=1)


def test_every_place_of_a_function_can_be_corrupted(functions, tokenizer):
    """The two borders never change, the tokens beside them do."""
    ids = min((ids for ids in functions if len(set(ids)) == len(ids) - 1), key=len)
    generator = torch.Generator().manual_seed(0)
    firsts = {make_pair(ids, "delete", tokenizer, generator).first for _ in range(60 * len(ids))}
    assert firsts == set(range(1, len(ids) - 1))


def test_a_function_that_is_too_long_is_left_out(corpus, tokenizer):
    sources = find_functions(corpus.train)
    lengths = [len(ids) for ids in encode_functions(sources, tokenizer, longest=10**6)]
    assert sum(n <= 64 for n in lengths) == len(encode_functions(sources, tokenizer, longest=64))
    assert any(n > 64 for n in lengths)


def test_rows_hold_what_the_pairs_hold(functions, tokenizer):
    pairs = draw_pairs(functions[:9], "both", tokenizer)
    rows = PairRows.of(pairs, pad_id=7)
    real = rows.real()
    for p, pair in enumerate(pairs):
        for r, ids in ((p, pair.intact), (p + 9, pair.corrupted)):
            assert rows.input_ids[r, real[r]].tolist() == ids
            assert (rows.input_ids[r, ~real[r]] == 7).all()
        assert (rows.rewards[p].item(), rows.rewards[p + 9].item()) == pair.rewards
        compared = rows.compared()[p].nonzero()[:, 0].tolist()
        end = min(len(pair.intact), len(pair.corrupted))
        assert compared == (list(range(pair.first, end)) if pair.differs else [])
