"""A byte-level BPE tokenizer, trained on the training documents only and cached.

It is an ordinary transformers tokenizer. Its one special token `<|endoftext|>` begins and ends a document (as in
GPT-2 it is both begin- and end-of-sequence) and pads rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mtp_ce.training.errors import RecipeError, refuse_unloadable
from mtp_ce.training.storage.cache import cache_folder, cached

END_OF_TEXT = "<|endoftext|>"

# Part of every cache key: raise it when a change of the code below changes the tokenizer.
_FORMAT = "1"


def tokenizer_key(texts: Sequence[str], vocab_size: int) -> str:
    """Return the cache key: a hash of everything that decides the tokenizer."""
    hasher = hashlib.sha256(f"{_FORMAT}\0{vocab_size}\0".encode())
    for text in texts:
        hasher.update(hashlib.sha256(text.encode()).digest())
    return hasher.hexdigest()[:32]


def load_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer of these texts from the cache, or train it and store it there.

    Args:
        texts: the training documents.
        vocab_size: number of entries, including the 256 bytes and the special token.

    Raises:
        RecipeError: the texts are too short for that many entries.
    """
    entry = cache_folder() / "tokenizers" / tokenizer_key(texts, vocab_size)
    folder = cached(entry, lambda aside: train_tokenizer(texts, vocab_size).save_pretrained(aside))
    return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)


def read_tokenizer(folder: Path, key: str, source: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Load a trained tokenizer.

    Args:
        folder: the folder of its files.
        key: the recipe's key that names it, for messages.
        source: its name in the recipe, for messages.
        vocab_size: entries of the model's vocabulary, at least those of the tokenizer.

    Raises:
        RecipeError: the folder has no tokenizer, or it does not fit the model.
    """
    with refuse_unloadable(key, source, "has no tokenizer that can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token_id is None:
        raise RecipeError(f"{key} '{source}' has no fast tokenizer with an end-of-text token")
    if len(tokenizer) > vocab_size:
        raise RecipeError(
            f"{key} '{source}' has a tokenizer of {len(tokenizer)} entries, but the model's vocabulary has "
            f"{vocab_size} (data.vocab_size)"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Those of another use, such as embeddings of 512 tokens, would cut documents.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same texts result in the same entries every time."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() < vocab_size:
        raise RecipeError(
            f"data.vocab_size is {vocab_size}, but the training files have text for {bpe.get_vocab_size()} "
            f"entries only; give data.vocab_size={bpe.get_vocab_size()} or more text"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
