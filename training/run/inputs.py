"""Inputs shared by all stages of a run: texts, tokenizer, tokens, and the pretrained models that the recipe names."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mtp_ce.training.config.data import DataConfig
from mtp_ce.training.config.model import PretrainedModelConfig
from mtp_ce.training.config.schema import EvaluationRecipe, Recipe
from mtp_ce.training.console import patience, say
from mtp_ce.training.data.chat import chat_template
from mtp_ce.training.data.corpus import Corpus, texts
from mtp_ce.training.data.planted import plant
from mtp_ce.training.data.reader import read_corpus
from mtp_ce.training.data.rows import PackedRows, PaddedRows
from mtp_ce.training.data.tokenizer import load_tokenizer, read_tokenizer
from mtp_ce.training.data.tokens import DocumentTokens, TokenisedCorpus, tokenise, unigram_cross_entropy, vocabulary_of
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.loop.ranks import ALONE, Ranks
from mtp_ce.training.models.sources import check_config, check_heads, check_tokenizer, fetch_source, sources_of

# Approximate number of characters that a tokenizer is trained on; its counts are held in memory. Documents are taken
# with an integer stride, so a smaller corpus is read completely.
TOKENIZER_CHARACTERS = 50_000_000

# Seconds without a line while a corpus is read, a tokenizer trained, and documents tokenized.
SILENT_S = 10.0


@dataclass(frozen=True)
class Inputs:
    """Inputs of every stage.

    Attributes:
        console: where the run prints.
        device: device of the models.
        corpus: the texts.
        tokenizer: tokenizer of the run.
        tokens: token ids, document by document.
        unigram: cross entropy of the held-out tokens under the training tokens' frequencies, nats.
        model_folders: folders of the pretrained models that the recipe names, by recipe key.
        row_length: S.
        vocab_size: V of the model in training.
        ranks: the ranks of the run.
        packing: how documents become rows.
        resumed: whether the run was begun by an earlier process.
        before_noise: the same inputs without the planted noise; None where none is planted.
    """

    console: Console
    device: torch.device
    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    tokens: TokenisedCorpus
    unigram: float
    model_folders: dict[str, Path]
    row_length: int
    vocab_size: int
    ranks: Ranks
    packing: Literal["packed", "padded"] = "packed"
    resumed: bool = False
    before_noise: Inputs | None = None

    @property
    def clean(self) -> Inputs:
        """The inputs without planted noise: what a reference and a critic are trained on."""
        return replace(self.before_noise, resumed=self.resumed) if self.before_noise else self

    def rows(self, documents: Sequence[Tensor], token_weights: Sequence[Tensor] | None = None) -> PackedRows:
        """Pack or pad documents into rows."""
        pad: Any = self.tokenizer.pad_token_id
        kind = PackedRows if self.packing == "packed" else PaddedRows
        return kind(documents, self.row_length, pad, token_weights)

    @property
    def digests(self) -> list[str]:
        """Return what decides the rows besides their length: hashes of texts with split and of tokenizer, packing."""
        vocabulary = vocabulary_of(self.corpus, self.tokenizer)
        return [self.corpus.digest, hashlib.sha256(vocabulary.encode()).hexdigest(), self.packing]


def read_inputs(recipe: Recipe, console: Console, ranks: Ranks = ALONE) -> Inputs:
    """Read and check all inputs before a run writes anything.

    Raises:
        RecipeError: the corpus, the tokenizer, a pretrained model or the device is missing or does not fit.
    """
    device, V, sources = find_device(recipe.train.device, "train.device"), recipe.data.vocab_size, sources_of(recipe)
    model_folders: dict[str, Path] = {}
    # Downloads come first: they fail within seconds, and training a tokenizer takes longer. The model in training comes
    # first among them, because the others must share its vocabulary.
    for key, (source, kind) in sources.items():
        say(console, f"source      {key}: {kind} {source}")
        model_folders[key] = fetch_source(key, source)
        theirs = check_config(key, source, model_folders[key], kind, V)
        if key == "model.source":
            V = theirs
            check_heads(source, model_folders[key], recipe.model.mtp)
    assert V is not None
    tokenizer = _named_tokenizer(recipe, model_folders, V)
    _check_chats(recipe.data, tokenizer)
    corpus = _read_corpus(recipe.data, console)
    _print_corpus(console, corpus)
    stride = max(1, -(-corpus.characters // TOKENIZER_CHARACTERS))
    if tokenizer is None:
        with patience(console, "tokenizer   training", SILENT_S):
            tokenizer = load_tokenizer(texts(corpus.train[::stride]), V)
    for key, folder in model_folders.items():
        if key != "model.source":
            check_tokenizer(key, sources[key][0], folder, tokenizer.get_vocab())
    return _inputs(console, device, recipe.data, corpus, tokenizer, V, model_folders, ranks)


def read_held_out(recipe: EvaluationRecipe, source: str, console: Console) -> Inputs:
    """Read a checkpoint's files, and the text to evaluate it on.

    Args:
        recipe: names the text.
        source: the checkpoint; `model_folders["CHECKPOINT"]` of the result is its folder.
        console: where to print.

    Raises:
        RecipeError: the checkpoint, its tokenizer, the corpus or the device is missing or does not fit.
    """
    device = find_device(recipe.device, "device")
    say(console, f"checkpoint  {source}")
    folder = fetch_source("CHECKPOINT", source)
    V = check_config("CHECKPOINT", source, folder, "language model", None)
    tokenizer = read_tokenizer(folder, "CHECKPOINT", source, V)
    _check_chats(recipe.data, tokenizer)
    corpus = _read_corpus(recipe.data, console)
    _print_corpus(console, corpus)
    return _inputs(console, device, recipe.data, corpus, tokenizer, V, {"CHECKPOINT": folder}, ALONE)


def _read_corpus(data: DataConfig, console: Console) -> Corpus:
    with patience(console, "corpus      reading", SILENT_S):
        return read_corpus(data)


def _print_corpus(console: Console, corpus: Corpus) -> None:
    shared = f" ({corpus.shared:,} of them because validation reads them)" if corpus.shared else ""
    say(
        console,
        f"corpus      {len(corpus.train):,} documents to train on, {len(corpus.held_out):,} held out, "
        f"{corpus.skipped:,} skipped{shared}, {corpus.characters / 1e6:.1f} million characters",
    )


def _progress(console: Console, done: str, total: int) -> Callable[[int], None]:
    """Return what counts documents, and says every few seconds how many are done."""
    count, said = 0, time.monotonic()

    def advance(documents: int) -> None:
        nonlocal count, said
        count += documents
        if time.monotonic() - said > SILENT_S:
            said = time.monotonic()
            say(console, f"{done:<11} {count:,} of {total:,} documents")

    return advance


def _check_chats(data: DataConfig, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """Check, before a corpus is read, that chats can be rendered."""
    if data.messages_field and (tokenizer is None or chat_template(tokenizer) is None):
        theirs = "a tokenizer trained here" if tokenizer is None else "the tokenizer"
        raise RecipeError(
            f"data.messages_field is '{data.messages_field}', but {theirs} has no chat template; give a data.tokenizer "
            "that has one, or put chat_template.jinja into its folder"
        )


def _check_labels(side: str, documents: DocumentTokens) -> None:
    if documents.counts is not None and not documents.counts.any():
        raise RecipeError(
            f"no token of the documents {side} is learnt: none is longer than its prompt, or the tokenizer's chat "
            "template marks none with {% generation %}"
        )


def _inputs(
    console: Console,
    device: torch.device,
    data: DataConfig,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    vocab_size: int,
    model_folders: dict[str, Path],
    ranks: Ranks,
) -> Inputs:
    clean = None
    if data.noise:
        quiet = Console(quiet=True)
        without = data.model_copy(update={"noise": None})
        clean = _inputs(quiet, device, without, corpus, tokenizer, vocab_size, model_folders, ranks)
        clean = replace(clean, console=console)
        corpus = plant(corpus, data.noise)
    tokens = tokenise(corpus, tokenizer, _progress(console, "tokenized", len(corpus.train) + len(corpus.held_out)))
    for side, documents in (("to train on", tokens.train), ("held out", tokens.held_out)):
        _check_labels(side, documents)
    train, held_out = tokens.train.token_count, tokens.held_out.token_count
    say(console, f"tokens      {train:,} to train on, {held_out:,} held out, {len(tokenizer):,} entries")
    if data.noise and tokens.train.noise is not None:
        noise = float(tokens.train.noise.count_nonzero()) / train
        say(console, f"noise       {noise:.1%} of the tokens to train on: {data.noise.describe()}")
    if data.packing == "padded":
        longer = tokens.train.longer_than(data.sequence_length)
        say(console, f"rows        {longer:,} of {len(tokens.train):,} documents cut at {data.sequence_length} tokens")
    unigram = unigram_cross_entropy(tokens, vocab_size)
    S = data.sequence_length
    return Inputs(
        console, device, corpus, tokenizer, tokens, unigram, model_folders, S, vocab_size, ranks, data.packing,
        before_noise=clean,
    )  # fmt: skip


def _named_tokenizer(recipe: Recipe, model_folders: dict[str, Path], vocab_size: int) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer that the recipe names, or the pretrained model's; None if one must be trained."""
    if named := recipe.data.tokenizer:
        return read_tokenizer(fetch_source("data.tokenizer", named), "data.tokenizer", named, vocab_size)
    if isinstance(recipe.model, PretrainedModelConfig):
        return read_tokenizer(model_folders["model.source"], "model.source", recipe.model.source, vocab_size)
    return None


def find_device(wanted: str, key: str) -> torch.device:
    """Return the device that a recipe key names: "auto", "cpu" or "cuda".

    Raises:
        RecipeError: the key is "cuda" and there is no GPU.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"{key} is 'cuda', but torch finds no GPU; give {key}=auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
