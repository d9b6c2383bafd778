"""The tokenizer: exact on any text, made from training text alone, made once."""

from __future__ import annotations

import threading
import time

import pytest
from rich.console import Console

from mtp_ce.training.data import tokenizer as module
from mtp_ce.training.data.tokenizer import END_OF_TEXT, load_tokenizer, read_tokenizer, train_tokenizer
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.run import inputs as run_inputs

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


def test_a_tokenizer_that_truncates_and_pads_does_not_cut_documents(tmp_path):
    """As tokenizers of embedding models do, by settings in tokenizer.json that no text is meant to show."""
    tokenizer = train_tokenizer(TEXTS, 270)
    whole = tokenizer.backend_tokenizer.encode(TEXTS[0]).ids
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=12)
    tokenizer.save_pretrained(tmp_path)
    read = read_tokenizer(tmp_path, "data.tokenizer", "mine", 300)
    long, short = read.backend_tokenizer.encode_batch_fast([TEXTS[0], "x"])
    assert long.ids == whole
    assert len(short.ids) == 1


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", b"[" * 100_000, b'{"model": {"type": "BPE", "vocab": 3}}', b"[]", b"null"]
)
def test_a_damaged_tokenizer_is_one_line(tmp_path, content):
    train_tokenizer(TEXTS, 270).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecipeError, match=r"data\.tokenizer 'mine' has no") as raised:
            read_tokenizer(tmp_path, "data.tokenizer", "mine", 300)
        assert "\n" not in str(raised.value)
        (tmp_path / name).write_bytes(whole)


def test_reading_a_corpus_and_training_a_tokenizer_say_how_long_they_take(small, tmp_path, monkeypatch):
    """Also while the trainer of the tokenizer computes, which is no Python code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    usual = run_inputs.read_corpus

    def slow(data):
        time.sleep(0.1)
        return usual(data)

    monkeypatch.setattr(run_inputs, "read_corpus", slow)
    monkeypatch.setattr(run_inputs, "SILENT_S", 0.02)
    with (tmp_path / "printed.txt").open("w") as printed:
        run_inputs.read_inputs(small(), Console(file=printed, width=120))
    lines = (tmp_path / "printed.txt").read_text().splitlines()
    for expected in ("corpus      reading, 0 s so far", "tokenizer   training, 0 s so far"):
        assert expected in lines
    threads = [thread.name for thread in threading.enumerate()]
    assert "patience" not in threads
