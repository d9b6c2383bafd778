"""The tokens of a corpus: computed once, document by document, and cached as memory-mapped arrays.

    tokens    |eos a a a a a eos|eos b b eos|eos c c c c c c c eos|      int32, 4 bytes a token
    starts     0                 7           11                   20     int64, 8 bytes a document
    prompts                                                              int64, where documents have prompts:
                                                                         tokens at the beginning without a label
    learnt    |  0 0 0 1 1 1 0|                                     uint8, 1 byte a token, where documents are
                                                                         chats: whether a token has a label
    noise     |  0 1 1 1 1 1 0|                                     uint8, 1 byte a token, where noise is planted:
                                                                         whether a token is noise

A mapped array is on disk until it is read, and its pages are evicted when memory is needed. So the memory of a run
does not grow with its corpus.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mtp_ce.training.data.chat import chat_template, encode_chat
from mtp_ce.training.data.corpus import Corpus, Document
from mtp_ce.training.data.planted import planted_tokens
from mtp_ce.training.errors import RecipeError
from mtp_ce.training.storage.atomic import CHUNK, LazyFile
from mtp_ce.training.storage.cache import cache_folder, cached, discard

# Part of the cache key: raise it when `_encode` or the layout changes.
_FORMAT = "2"

# Documents and characters of a chunk that is tokenized at once: the tokenizer needs some hundred bytes a token.
_DOCUMENTS = 1000
_CHARACTERS = 500_000

_SUMMARY = "summary.json"


class DocumentTokens(Sequence[Tensor]):
    """Token ids of documents, each an int64 1-d tensor that begins and ends with the end-of-text token, chats excepted.

    Attributes:
        tokens: [N] int32, of all documents or of more than these.
        starts: [n + 1] int64, where each document begins in the concatenation of these documents, and its end.
        offsets: [n] int64, how much later each document begins in `tokens`; None where `tokens` is the concatenation.
        prompts: [n] int64, number of tokens at the beginning without a label; None: none.
        learnt: [N] uint8, like `tokens`, whether a token has a label; None: all that are in no prompt.
        noise: [N] uint8, like `tokens`, whether a token is planted noise; None: unknown.
        counts: how often each token is a label, [V] or shorter.
        file: verifies what is read of `tokens`; None where they are in memory.
    """

    def __init__(
        self,
        tokens: Tensor,
        starts: Tensor,
        *,
        offsets: Tensor | None = None,
        prompts: Tensor | None = None,
        learnt: Tensor | None = None,
        noise: Tensor | None = None,
        counts: Tensor | None = None,
        file: LazyFile | None = None,
    ) -> None:
        self.tokens = tokens
        self.file = file
        self.starts = starts
        self.offsets = offsets
        self.prompts = prompts
        self.learnt = learnt
        self.noise = noise
        self.counts = counts

    @classmethod
    def of(cls, documents: Sequence[Tensor]) -> DocumentTokens:
        """Concatenate documents that are in memory; return tokens of documents as they are."""
        if isinstance(documents, cls):
            return documents
        lengths = torch.tensor([len(document) for document in documents])
        # One start more than there are documents: that of the padding, which then needs no special case.
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        # The first token of a document counts nowhere, because no model predicts it.
        counts = torch.bincount(torch.cat([document[1:] for document in documents]))
        return cls(torch.cat([document.to(torch.int32) for document in documents]), starts, counts=counts)

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> DocumentTokens: ...
    def __getitem__(self, index: int | slice) -> Tensor | DocumentTokens:
        """Return a document, or some of them."""
        if isinstance(index, slice):
            return self.choose(range(len(self))[index])
        document = range(len(self))[index]
        start, end = self.starts[document : document + 2].tolist()
        offset = 0 if self.offsets is None else int(self.offsets[document])
        if self.file:
            first, last = ((i + offset) * self.tokens.itemsize // CHUNK for i in (start, max(start, end - 1)))
            self.file.check(range(first, last + 1))
        return self.tokens[start + offset : end + offset].to(torch.int64)

    def gather(self, index: Tensor) -> Tensor:
        """Return the tokens at indices of `tokens`, in their shape, int64."""
        if self.file and self.file.pending:
            self.file.check((index * self.tokens.itemsize // CHUNK).unique().tolist())
        return self.tokens[index].to(torch.int64)

    @property
    def token_count(self) -> int:
        """Number of tokens of all documents."""
        return int(self.starts[-1])

    def choose(self, indices: Sequence[int]) -> DocumentTokens:
        """Return some of the documents by index, without copying their tokens."""
        chosen = torch.tensor(list(indices), dtype=torch.int64)
        begins = self.starts[chosen]
        lengths = self.starts[chosen + 1] - begins
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        offsets = begins - starts[:-1] + (0 if self.offsets is None else self.offsets[chosen])
        prompts = None if self.prompts is None else self.prompts[chosen]
        return DocumentTokens(
            self.tokens, starts, offsets=offsets, prompts=prompts, learnt=self.learnt, noise=self.noise, file=self.file
        )

    def longer_than(self, tokens: int) -> int:
        """Count the documents of more than `tokens` tokens."""
        # A chunk at a time: the starts are mapped, too.
        chunks = range(0, len(self), 2**20)
        return sum(int((self.starts[i : i + 2**20 + 1].diff() > tokens).sum()) for i in chunks)


@dataclass(frozen=True)
class TokenisedCorpus:
    """Token ids of every document."""

    train: DocumentTokens
    held_out: DocumentTokens


def tokenise(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, progress: Callable[[int], None] = lambda documents: None
) -> TokenisedCorpus:
    """Return the token ids of a corpus from the cache, or compute them and store them there.

    The cache key is a hash of the texts, the prompts, the split, the tokenizer, and of chats the chat template.

    Args:
        corpus: the documents.
        tokenizer: of the run; has a chat template if the documents are chats.
        progress: called with the number of documents that were tokenized since it was last called.
    """
    vocabulary = vocabulary_of(corpus, tokenizer)
    key = hashlib.sha256(f"{_FORMAT}\0{corpus.digest}\0{vocabulary}".encode()).hexdigest()[:32]

    def make(aside: Path) -> None:
        for side, documents in (("train", corpus.train), ("held_out", corpus.held_out)):
            (aside / side).mkdir()
            _encode(documents, tokenizer, aside / side, progress, planted=corpus.planted and side == "train")

    folder = cached(cache_folder() / "tokens" / key, make, lazy=True)
    return TokenisedCorpus(train=_mapped(folder, "train"), held_out=_mapped(folder, "held_out"))


def vocabulary_of(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return what decides the tokens of a corpus beside its documents: the tokenizer, and of chats the template."""
    chats = bool(corpus.train) and corpus.train[0].chat
    # The order without doubles: a tokenizer may have another template for chats with tools.
    templates = dict.fromkeys((chat_template(tokenizer), chat_template(tokenizer, []))) if chats else {}
    return tokenizer.backend_tokenizer.to_str() + "".join(f"\0{template}" for template in templates)


class _Encoded(NamedTuple):
    """Tokens of a chunk of documents.

    Attributes:
        ids: int32 tokens of each document.
        masked: number of tokens at the beginning of each that are no labels.
        learnt: whether a token is a label, of each document; None: all after the masked ones.
    """

    ids: list[NDArray[np.int32]]
    masked: list[int]
    learnt: list[NDArray[np.uint8]] | None = None

    def labels(self) -> NDArray[np.int32]:
        """Return the tokens that are labels."""
        documents = [document[count:] for document, count in zip(self.ids, self.masked, strict=True)]
        if self.learnt is None:
            return np.concatenate(documents)
        kept = [learnt[count:] for learnt, count in zip(self.learnt, self.masked, strict=True)]
        return np.concatenate(documents)[np.concatenate(kept).astype(bool)]


def _encode_chunk(chunk: list[Document], tokenizer: PreTrainedTokenizerFast) -> _Encoded:
    # The first token of a document is no label, because no model predicts it.
    if chunk[0].chat:
        chats = [encode_chat(document.path, document.text, tokenizer) for document in chunk]
        ids, learnt = ([chat[part] for chat in chats] for part in (0, 1))
        arrays = [np.array(document, dtype=np.int32) for document in ids]
        return _Encoded(arrays, [1] * len(chunk), [np.array(mask, dtype=np.uint8) for mask in learnt])
    border, encode = tokenizer.eos_token_id, tokenizer.backend_tokenizer.encode_batch_fast
    prompted = chunk[0].prompt is not None
    texts = encode([document.text for document in chunk], add_special_tokens=not prompted)
    before: list[list[int]] = [[]] * len(chunk)
    if prompted:
        # Tokenized alone, as it is when the model is prompted.
        encoded = encode([document.prompt for document in chunk], add_special_tokens=False)
        before = [prompt.ids for prompt in encoded]
    whole = [[border, *prompt, *text.ids, border] for prompt, text in zip(before, texts, strict=True)]
    return _Encoded([np.array(document, dtype=np.int32) for document in whole], [1 + len(ids) for ids in before])


def _encode(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    progress: Callable[[int], None],
    planted: bool,
) -> None:
    """Write the arrays of one side."""
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    end, prompted, chat = 0, False, False
    with (
        (folder / "tokens").open("wb") as tokens,
        (folder / "starts").open("wb") as starts,
        (folder / "prompts").open("wb") as prompts,
        (folder / "learnt").open("wb") as learnt,
        (folder / "noise").open("wb") if planted else nullcontext() as noise,
    ):
        starts.write(np.zeros(1, dtype=np.int64).tobytes())
        for chunk in _chunks(documents):
            prompted, chat = chunk[0].prompt is not None, chunk[0].chat
            encoded = _encode_chunk(chunk, tokenizer)
            if noise:
                pairs = [planted_tokens(ids, d.planted) for ids, d in zip(encoded.ids, chunk, strict=True)]
                encoded = encoded._replace(ids=[ids for ids, _ in pairs])
                noise.write(np.concatenate([is_noise for _, is_noise in pairs]).tobytes())
            ends = end + np.cumsum([len(document) for document in encoded.ids], dtype=np.int64)
            end = int(ends[-1])
            tokens.write(np.concatenate(encoded.ids).tobytes())
            starts.write(ends.tobytes())
            if prompted:
                prompts.write(np.array(encoded.masked, dtype=np.int64).tobytes())
            if encoded.learnt is not None:
                learnt.write(np.concatenate(encoded.learnt).tobytes())
            seen = np.bincount(encoded.labels())
            # Ids of a tokenizer may exceed the number of its entries.
            counts = np.pad(counts, (0, max(0, len(seen) - len(counts))))
            counts[: len(seen)] += seen
            progress(len(chunk))
    (folder / "counts").write_bytes(counts.tobytes())
    summary = {"documents": len(documents), "tokens": end, "counts": len(counts), "prompted": prompted, "chat": chat}
    if planted:
        summary["planted"] = True
    (folder / _SUMMARY).write_text(json.dumps(summary), encoding="utf-8")


def _chunks(documents: Sequence[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text) + len(document.prompt or "")
        if len(chunk) == _DOCUMENTS or characters >= _CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _mapped(folder: Path, side: str) -> DocumentTokens:
    summary = json.loads((folder / side / _SUMMARY).read_text(encoding="utf-8"))

    def array(name: str, size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_file(str(folder / side / name), shared=False, size=size, dtype=dtype)

    def refuse(reason: str) -> None:
        discard(folder)
        raise RecipeError(f"cache entry {folder} is damaged ({reason}); start again, and it is made again")

    # The other arrays are small beside the tokens, or are read as a whole anyway.
    planted = bool(summary.get("planted"))
    for name in ("starts", "prompts", "learnt", "counts", *(["noise"] if planted else [])):
        LazyFile(folder, f"{side}/{name}", refuse).check(None)
    return DocumentTokens(
        array("tokens", summary["tokens"], torch.int32),
        array("starts", summary["documents"] + 1),
        prompts=array("prompts", summary["documents"]) if summary["prompted"] else None,
        learnt=array("learnt", summary["tokens"], torch.uint8) if summary.get("chat") else None,
        noise=array("noise", summary["tokens"], torch.uint8) if planted else None,
        counts=array("counts", summary["counts"]),
        file=LazyFile(folder, f"{side}/tokens", refuse),
    )


def unigram_cross_entropy(tokens: TokenisedCorpus, vocab_size: int) -> float:
    """Compute the cross entropy of the held-out text under the token frequencies of the training documents.

        - mean_{i held out} log((n[token_i] + 1) / (sum n + V))         n: counts in the training documents

    A model that knows token frequencies and no context has this cross entropy. Add-one smoothing assigns a probability
    to tokens that are not in the training documents. The first token of a document and those of a prompt count on
    neither side, because no model predicts them.

    Returns:
        Nats per token.
    """
    counts = _counts(tokens.train, vocab_size).to(torch.float64)
    log_probability = ((counts + 1) / (counts.sum() + vocab_size)).log()
    seen = _counts(tokens.held_out, vocab_size)
    return float(-(seen * log_probability).sum() / seen.sum())


def _counts(documents: DocumentTokens, vocab_size: int) -> Tensor:
    assert documents.counts is not None
    counts = torch.zeros(max(vocab_size, len(documents.counts)), dtype=torch.int64)
    counts[: len(documents.counts)] = documents.counts
    return counts
