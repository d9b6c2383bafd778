"""The tokenizer: exact on any text, made from training text alone, made once."""

from __future__ import annotations

import pytest

from mtp_ce.training.data import tokenizer as module
from mtp_ce.training.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from mtp_ce.training.errors import RecipeError

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "import os\nprint(os.sep)\n" * 20]


def test_any_text_comes_back_byte_for_byte():
    tokenizer = train_tokenizer(TEXTS, 270)
    text = "\tΩ = '家'  # 🏠\r\n\x00 return  x\n\n\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert max(ids) < 270


def test_one_special_token_opens_closes_and_pads():
    tokenizer = train_tokenizer(TEXTS, 270)
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == END_OF_TEXT
    assert len(tokenizer) == 270


def test_the_same_texts_give_the_same_entries():
    assert train_tokenizer(TEXTS, 280).get_vocab() == train_tokenizer(TEXTS, 280).get_vocab()


def test_a_tokenizer_is_trained_once_and_then_read(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = load_tokenizer(TEXTS, 270)

    def never(*_):
        raise AssertionError("trained twice")

    monkeypatch.setattr(module, "train_tokenizer", never)
    assert load_tokenizer(TEXTS, 270).get_vocab() == first.get_vocab()
    with pytest.raises(AssertionError, match="trained twice"):
        load_tokenizer([TEXTS[0] + "#", TEXTS[1]], 270)
    with pytest.raises(AssertionError, match="trained twice"):
        load_tokenizer(TEXTS, 271)


def test_too_little_text_for_the_vocabulary_is_said_with_the_way_out():
    with pytest.raises(RecipeError, match=r"data.vocab_size is 8192, but .* give data.vocab_size=\d+"):
        train_tokenizer(TEXTS, 8192)
