"""From documents to batches: tokenise once, lay the documents end to end, cut rows, order them.

    documents   |bos a a a a a eos|bos b b eos|bos c c c c c c c eos|        a document is one file
    rows        |bos a a a a a eos bos|b b eos bos c c c c|c c c eos pad ... |          S tokens each
    document_ids 0 0 0 0 0 0 0 1       1 1 1 2 2 2 2 2     2 2 2 2   3
    position_ids 0 1 2 3 4 5 6 0       0 1 2 0 1 2 3 4     0 1 2 3   0 ...

Position ids begin again at every document and at every row, which is how transformers finds the borders
that attention must not cross; document ids are how the loss finds them. No attention mask is made: an
all-ones mask would switch that detection off. Padding is a document of its own, with label -100.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mtp_ce.training.atomic import whole_folder
from mtp_ce.training.corpus import Corpus
from mtp_ce.training.tokenizer import cache_folder

IGNORE = -100

# Part of the cache key: raise it when `_encode` changes what comes out.
_FORMAT = "1"


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents: four int64 tensors [B, S], and weights where they were made before training."""

    input_ids: Tensor
    labels: Tensor  # input_ids, unshifted, with -100 at padding
    document_ids: Tensor
    position_ids: Tensor
    token_weights: Tensor | None = None  # [B, S] fp32, of the token that stands there

    def to(self, device: torch.device) -> Batch:
        """Copy to a device."""
        return self._each(lambda tensor: tensor.to(device))

    def split(self, rows: int) -> Iterator[Batch]:
        """Give micro-batches of at most `rows` rows, as views."""
        for start in range(0, len(self.input_ids), rows):
            yield self.part(slice(start, start + rows))

    def part(self, rows: slice) -> Batch:
        """Give some of the rows, as views."""
        return self._each(itemgetter(rows))

    def unlabelled(self) -> Batch:
        """Give the same rows with nothing to predict."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            input_ids=change(self.input_ids),
            labels=change(self.labels),
            document_ids=change(self.document_ids),
            position_ids=change(self.position_ids),
            token_weights=None if self.token_weights is None else change(self.token_weights),
        )


class PackedRows:
    """Tokenised documents, laid end to end and cut in rows of `row_length` tokens.

    Args:
        documents: token ids of each document, 1-d.
        row_length: S. Nothing is dropped: the last row is padded.
        pad_id: what fills the last row.
        token_weights: fp32 weights of each document's tokens, 1-d, or None.
    """

    def __init__(
        self,
        documents: Sequence[Tensor],
        row_length: int,
        pad_id: int,
        token_weights: Sequence[Tensor] | None = None,
    ) -> None:
        self.row_length = row_length
        self.pad_id = pad_id
        self.tokens = torch.cat([document.to(torch.int32) for document in documents])
        self.token_weights = None if token_weights is None else torch.cat([*token_weights])
        self.lengths = torch.tensor([len(document) for document in documents])
        # One start more than there are documents: the padding's, so that it needs no case of its own.
        self._starts = torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths.cumsum(0)])

    def __len__(self) -> int:
        """Give the number of rows."""
        return -(-len(self.tokens) // self.row_length)

    def batch(self, rows: Tensor) -> Batch:
        """Collect rows by number.

        Args:
            rows: [B] int64, each in [0, len(self)).
        """
        row_start = rows[:, None] * self.row_length  # [B, 1]
        place = row_start + torch.arange(self.row_length)  # [B, S], in self.tokens
        real = place < len(self.tokens)
        inside = place.clamp(max=len(self.tokens) - 1)
        tokens = self.tokens[inside].to(torch.int64)
        document_ids = torch.searchsorted(self._starts, place, right=True) - 1
        return Batch(
            input_ids=torch.where(real, tokens, self.pad_id),
            labels=torch.where(real, tokens, IGNORE),
            document_ids=document_ids,
            position_ids=place - torch.maximum(self._starts[document_ids], row_start),
            token_weights=None if self.token_weights is None else self.token_weights[inside] * real,
        )

    def in_order(self, batch_size: int, most: int | None = None) -> Iterator[Batch]:
        """Give every row once, from first to last, `batch_size` at a time.

        Args:
            batch_size: rows of a batch.
            most: give so many rows at most, spread evenly over all of them; None means every row.
        """
        order = torch.arange(len(self))
        if most is not None and most < len(self):
            order = order[:most] * len(self) // most
        for rows in order.split(batch_size):
            yield self.batch(rows)


@lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    """Shuffle row numbers: a function of its arguments alone, the same on every machine and rank."""
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    return torch.randperm(rows, generator=generator)


def seed_of(*parts: object) -> int:
    """Give a seed of 64 bits, another one for every other combination of parts."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:8], "big")


def rows_of_step(step: int, batch_size: int, rows: int, seed: int) -> Tensor:
    """Say which rows an optimizer step trains on.

    The epochs' orders follow each other without a gap, and step s (from 0) takes the rows from
    s * batch_size on. So every row is seen once before any is seen twice, and a run that starts again at
    step s needs nothing but s.

    Returns:
        [batch_size] int64 row numbers.
    """
    place = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = torch.div(place, rows, rounding_mode="floor")
    return torch.cat(
        [epoch_order(rows, seed, epoch)[place[epochs == epoch] % rows] for epoch in epochs.unique().tolist()]
    )


@dataclass(frozen=True)
class TokenisedCorpus:
    """Token ids of every document, int64 1-d tensors that begin and end with the end-of-text token."""

    train: list[Tensor]
    held_out: list[Tensor]


def tokenise(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> TokenisedCorpus:
    """Read the token ids of a corpus from the cache, or make them and put them there.

    The cache is a `datasets` table with one row per document, kept by a hash of the texts, the split and
    the tokenizer.
    """
    datasets.disable_progress_bars()
    vocabulary = tokenizer.backend_tokenizer.to_str()
    key = hashlib.sha256(f"{_FORMAT}\0{corpus.digest}\0{vocabulary}".encode()).hexdigest()[:32]
    folder = cache_folder() / "tokens" / key
    if not folder.exists():
        table = _encode(corpus, tokenizer)
        try:
            with whole_folder(folder) as aside:
                table.save_to_disk(str(aside))
        except FileExistsError:
            pass  # another process made the same table meanwhile
    table = datasets.load_from_disk(str(folder)).with_format("torch")
    sides: dict[bool, list[Tensor]] = {False: [], True: []}
    for held_out, ids in zip(table["held_out"], table["ids"], strict=True):
        sides[bool(held_out)].append(ids)
    return TokenisedCorpus(train=sides[False], held_out=sides[True])


def _encode(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> datasets.Dataset:
    documents = [*corpus.train, *corpus.held_out]
    encoded = tokenizer.backend_tokenizer.encode_batch_fast([document.text for document in documents])
    border = tokenizer.eos_token_id
    return datasets.Dataset.from_dict(
        {
            "path": [document.path for document in documents],
            "held_out": [False] * len(corpus.train) + [True] * len(corpus.held_out),
            "ids": [[border, *encoding.ids, border] for encoding in encoded],
        }
    )


def unigram_cross_entropy(tokens: TokenisedCorpus, vocab_size: int) -> float:
    """Measure how well token frequencies alone predict the held-out text.

        - mean_{i held out} log((n[token_i] + 1) / (sum n + V))         n: counts in the training documents

    It is what a model scores that has learnt how often each token comes and nothing about context; add-one
    smoothing gives tokens that training never showed a place. The first token of a document counts on
    neither side, because no model is asked to predict it.

    Returns:
        Nats per token.
    """
    counts = _counts(tokens.train, vocab_size).to(torch.float64)
    log_share = ((counts + 1) / (counts.sum() + vocab_size)).log()
    seen = _counts(tokens.held_out, vocab_size)
    return float(-(seen * log_share).sum() / seen.sum())


def _counts(documents: Sequence[Tensor], vocab_size: int) -> Tensor:
    return torch.bincount(torch.cat([document[1:] for document in documents]), minlength=vocab_size)
