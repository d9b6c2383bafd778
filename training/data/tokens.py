"""The tokens of a corpus: made once, document by document, and kept in the cache as arrays that are mapped.

    tokens    |eos a a a a a eos|eos b b eos|eos c c c c c c c eos|      int32, 4 bytes a token
    starts     0                 7           11                   20     int64, 8 bytes a document
    prompts                                                              int64, where documents have prompts:
                                                                         tokens at the beginning that nobody learns

A mapped array is on disk until it is read, and the pages that were read go when memory is wanted for something else.
So what a run holds of its corpus does not grow with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mtp_ce.training.data.corpus import Corpus, Document
from mtp_ce.training.storage.atomic import whole_folder
from mtp_ce.training.storage.cache import cache_folder

# Part of the cache key: raise it when `_encode` or the layout changes.
_FORMAT = "2"

# Documents that are tokenised together, and characters after which they are enough: what the tokenizer holds of a
# token while it works is some hundred bytes.
_DOCUMENTS = 1000
_CHARACTERS = 500_000

_SUMMARY = "summary.json"


class DocumentTokens(Sequence[Tensor]):
    """Token ids of documents, each an int64 1-d tensor that begins and ends with the end-of-text token.

    Attributes:
        tokens: [N] int32, of all documents or of more than these.
        starts: [n + 1] int64, where each document would begin if these ones alone lay end to end, and their end.
        moved: [n] int64, how much further on each begins in `tokens`; None where they do lie end to end.
        prompts: [n] int64, how many tokens at the beginning are not learnt; None: none.
        counts: how often each token is learnt or asked for, [V] or shorter.
    """

    def __init__(
        self,
        tokens: Tensor,
        starts: Tensor,
        *,
        moved: Tensor | None = None,
        prompts: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        self.tokens = tokens
        self.starts = starts
        self.moved = moved
        self.prompts = prompts
        self.counts = counts

    @classmethod
    def of(cls, documents: Sequence[Tensor]) -> DocumentTokens:
        """Take documents that are in memory, or give those that are here already."""
        if isinstance(documents, cls):
            return documents
        lengths = torch.tensor([len(document) for document in documents])
        # One start more than there are documents: the padding's, so that it needs no case of its own.
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        # The first token of a document counts nowhere, because no model is asked to predict it.
        counts = torch.bincount(torch.cat([document[1:] for document in documents]))
        return cls(torch.cat([document.to(torch.int32) for document in documents]), starts, counts=counts)

    def __len__(self) -> int:
        """Give the number of documents."""
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> DocumentTokens: ...
    def __getitem__(self, index: int | slice) -> Tensor | DocumentTokens:
        """Give a document, or some of them."""
        if isinstance(index, slice):
            return self.choose(range(len(self))[index])
        place = range(len(self))[index]
        start, end = self.starts[place : place + 2].tolist()
        further = 0 if self.moved is None else int(self.moved[place])
        return self.tokens[start + further : end + further].to(torch.int64)

    @property
    def token_count(self) -> int:
        """How many tokens the documents have together."""
        return int(self.starts[-1])

    def choose(self, places: Sequence[int]) -> DocumentTokens:
        """Give some of the documents by number, without copying their tokens."""
        chosen = torch.tensor(list(places), dtype=torch.int64)
        begins = self.starts[chosen]
        lengths = self.starts[chosen + 1] - begins
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        moved = begins - starts[:-1] + (0 if self.moved is None else self.moved[chosen])
        prompts = None if self.prompts is None else self.prompts[chosen]
        return DocumentTokens(self.tokens, starts, moved=moved, prompts=prompts)

    def longer_than(self, tokens: int) -> int:
        """Count the documents of more tokens."""
        # A part at a time: the starts are mapped, too.
        parts = range(0, len(self), 2**20)
        return sum(int((self.starts[i : i + 2**20 + 1].diff() > tokens).sum()) for i in parts)


@dataclass(frozen=True)
class TokenisedCorpus:
    """Token ids of every document."""

    train: DocumentTokens
    held_out: DocumentTokens


def tokenise(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> TokenisedCorpus:
    """Read the token ids of a corpus from the cache, or make them and put them there.

    They are kept by a hash of the texts, the prompts, the split and the tokenizer.
    """
    vocabulary = tokenizer.backend_tokenizer.to_str()
    key = hashlib.sha256(f"{_FORMAT}\0{corpus.digest}\0{vocabulary}".encode()).hexdigest()[:32]
    folder = cache_folder() / "tokens" / key
    if not folder.exists():
        try:
            with whole_folder(folder) as aside:
                for side, documents in (("train", corpus.train), ("held_out", corpus.held_out)):
                    (aside / side).mkdir()
                    _encode(documents, tokenizer, aside / side)
        except FileExistsError:
            pass  # another process made the same tokens meanwhile
    return TokenisedCorpus(train=_mapped(folder / "train"), held_out=_mapped(folder / "held_out"))


def _encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the arrays of one side."""
    border, encode = tokenizer.eos_token_id, tokenizer.backend_tokenizer.encode_batch_fast
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    end, prompted = 0, False
    with (
        (folder / "tokens").open("wb") as tokens,
        (folder / "starts").open("wb") as starts,
        (folder / "prompts").open("wb") as prompts,
    ):
        starts.write(np.zeros(1, dtype=np.int64).tobytes())
        for part in _parts(documents):
            prompted = part[0].prompt is not None
            texts = encode([document.text for document in part], add_special_tokens=not prompted)
            before: list[list[int]] = [[]] * len(part)
            if prompted:
                # By itself, as a prompt is tokenised when a model is asked to continue it.
                encoded = encode([document.prompt for document in part], add_special_tokens=False)
                before = [prompt.ids for prompt in encoded]
            whole = [[border, *prompt, *text.ids, border] for prompt, text in zip(before, texts, strict=True)]
            ids = [np.array(document, dtype=np.int32) for document in whole]
            masked = [1 + len(prompt) for prompt in before]
            ends = end + np.cumsum([len(document) for document in ids], dtype=np.int64)
            end = int(ends[-1])
            tokens.write(np.concatenate(ids).tobytes())
            starts.write(ends.tobytes())
            if prompted:
                prompts.write(np.array(masked, dtype=np.int64).tobytes())
            seen = np.bincount(np.concatenate([document[count:] for document, count in zip(ids, masked, strict=True)]))
            # A tokenizer may have numbers beyond the number of its entries.
            counts = np.pad(counts, (0, max(0, len(seen) - len(counts))))
            counts[: len(seen)] += seen
    (folder / "counts").write_bytes(counts.tobytes())
    said = {"documents": len(documents), "tokens": end, "counts": len(counts), "prompted": prompted}
    (folder / _SUMMARY).write_text(json.dumps(said), encoding="utf-8")


def _parts(documents: Sequence[Document]) -> Iterator[list[Document]]:
    part: list[Document] = []
    characters = 0
    for document in documents:
        part.append(document)
        characters += len(document.text) + len(document.prompt or "")
        if len(part) == _DOCUMENTS or characters >= _CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part


def _mapped(folder: Path) -> DocumentTokens:
    said = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))

    def array(name: str, size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_file(str(folder / name), shared=False, size=size, dtype=dtype)

    return DocumentTokens(
        array("tokens", said["tokens"], torch.int32),
        array("starts", said["documents"] + 1),
        prompts=array("prompts", said["documents"]) if said["prompted"] else None,
        counts=array("counts", said["counts"]),
    )


def unigram_cross_entropy(tokens: TokenisedCorpus, vocab_size: int) -> float:
    """Measure how well token frequencies alone predict the held-out text.

        - mean_{i held out} log((n[token_i] + 1) / (sum n + V))         n: counts in the training documents

    It is what a model scores that has learnt how often each token comes and nothing about context; add-one
    smoothing gives tokens that training never showed a place. The first token of a document and those of a prompt
    count on neither side, because no model is asked to predict them.

    Returns:
        Nats per token.
    """
    counts = _counts(tokens.train, vocab_size).to(torch.float64)
    log_share = ((counts + 1) / (counts.sum() + vocab_size)).log()
    seen = _counts(tokens.held_out, vocab_size)
    return float(-(seen * log_share).sum() / seen.sum())


def _counts(documents: DocumentTokens, vocab_size: int) -> Tensor:
    assert documents.counts is not None
    counts = torch.zeros(max(vocab_size, len(documents.counts)), dtype=torch.int64)
    counts[: len(documents.counts)] = documents.counts
    return counts
