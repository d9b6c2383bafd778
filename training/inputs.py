"""What all stages of a run have in common: texts, tokenizer, tokens, and the trained models that the recipe names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mtp_ce.training.corpus import Corpus, read_corpus, texts
from mtp_ce.training.data import PackedRows, TokenisedCorpus, tokenise, unigram_cross_entropy
from mtp_ce.training.report import say
from mtp_ce.training.schema import Recipe, RecipeError
from mtp_ce.training.sources import check_tokenizer, fetch_model, fetch_source, sources_of
from mtp_ce.training.tokenizer import load_tokenizer, read_tokenizer


@dataclass(frozen=True)
class Inputs:
    """What every stage reads.

    Attributes:
        console: where the run speaks.
        device: where it computes.
        corpus: texts.
        tokenizer: how texts become tokens.
        tokens: the texts' tokens, document by document.
        unigram: cross entropy of the held-out tokens under the training tokens' frequencies, nats.
        given: folders of the models that the recipe names as trained, by the recipe's key.
        row_length: S.
    """

    console: Console
    device: torch.device
    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    tokens: TokenisedCorpus
    unigram: float
    given: dict[str, Path]
    row_length: int

    def rows(self, documents: Sequence[Tensor], token_weights: Sequence[Tensor] | None = None) -> PackedRows:
        """Pack documents into rows."""
        pad: Any = self.tokenizer.pad_token_id
        return PackedRows(documents, self.row_length, pad, token_weights)

    @property
    def digests(self) -> list[str]:
        """Hashes of the texts, their split, and the tokenizer."""
        vocabulary = self.tokenizer.backend_tokenizer.to_str()
        return [self.corpus.digest, hashlib.sha256(vocabulary.encode()).hexdigest()]


def read_inputs(recipe: Recipe, console: Console) -> Inputs:
    """Read everything, and look whether it fits, before a run writes anything.

    Raises:
        RecipeError: the corpus, the tokenizer, a trained model or the device is not there or does not fit.
    """
    device, V, sources = find_device(recipe), recipe.data.vocab_size, sources_of(recipe)
    # What may need a network comes first: it fails in seconds, and a tokenizer takes longer.
    given = {key: fetch_model(key, source, kind, V) for key, (source, kind) in sources.items()}
    named = recipe.data.tokenizer
    tokenizer = read_tokenizer(fetch_source("data.tokenizer", named), named, V) if named else None
    corpus = read_corpus(recipe.data)
    say(
        console,
        f"corpus      {len(corpus.train)} files to train on, {len(corpus.held_out)} held out, "
        f"{corpus.characters / 1e6:.1f} million characters",
    )
    tokenizer = tokenizer or load_tokenizer(texts(corpus.train), V)
    for key, folder in given.items():
        check_tokenizer(key, sources[key][0], folder, tokenizer.get_vocab())
    tokens = tokenise(corpus, tokenizer)
    counts = [sum(len(document) for document in side) for side in (tokens.train, tokens.held_out)]
    say(console, f"tokens      {counts[0]:,} to train on, {counts[1]:,} held out, {len(tokenizer):,} entries")
    unigram = unigram_cross_entropy(tokens, V)
    return Inputs(console, device, corpus, tokenizer, tokens, unigram, given, recipe.data.sequence_length)


def find_device(recipe: Recipe) -> torch.device:
    """Give the device that the recipe asks for.

    Raises:
        RecipeError: it asks for a GPU and there is none.
    """
    wanted = recipe.train.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RecipeError("train.device is 'cuda', but torch finds no GPU; give train.device=auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
