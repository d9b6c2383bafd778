"""Noise planted in the training documents of a corpus, and which of their tokens it is.

    documents    |eos d a c b e eos|eos f g h eos|       some documents, their tokens permuted
    noise         0   1 1 1 1 1 0   0   0 0 0 0
    spans        |eos a c d b e eos|eos f h g i eos|     spans of every document, their tokens permuted among themselves
    noise         0   0 1 0 1 0 0   0   0 1 1 0 0        (of 1 token here, of `SPAN` tokens in fact)
    duplicates   |eos a b eos|eos a b eos|eos c d eos|   some documents `copies` times; every copy but one is noise
    noise         0   0 0 0   1   1 1 1   0   0 0 0

A permuted token keeps its frequency in the document, so a model of word frequencies loses nothing by it; what can't be
predicted any more is the order. Texts stay as they were: a tokenizer or a critic that reads them is that of the clean
corpus. Everything follows from the noise's own seed and the paths of the documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mtp_ce.training.config.data import NoiseConfig
from mtp_ce.training.data.corpus import Corpus, Document, Lazy, Planted, below
from mtp_ce.training.errors import RecipeError

# Tokens of a span: a line or two of source.
SPAN = 16

# Part of the corpus's digest: raise it when the code below plants other noise.
_FORMAT = "1"


def plant(corpus: Corpus, noise: NoiseConfig) -> Corpus:
    """Return the corpus with noise in its training documents; the held-out ones stay as they are.

    Documents of the kinds `documents` and `duplicates` are chosen by a hash of their paths, so that their number is
    near the one that is asked for.

    Raises:
        RecipeError: no document is chosen, or all of them are.
    """
    documents = corpus.train
    fraction = noise.fraction_of_documents
    chosen = [below(_hash(noise.seed, documents[i].path), fraction) for i in range(len(documents))]
    if noise.kind != "spans" and len(set(chosen)) < 2:
        raise RecipeError(
            f"data.noise.share {noise.share} chooses {sum(chosen)} of {len(chosen)} training documents for noise of "
            f"kind {noise.kind}; expected some and not all: change data.noise.share or data.noise.seed"
        )
    # Index of the document, and whether this occurrence of it has noise.
    places: list[tuple[int, bool]] = []
    for i, has_noise in enumerate(chosen):
        if has_noise and noise.kind == "duplicates":
            places += [(i, copy > 0) for copy in range(noise.copies_of_documents)]
        else:
            places.append((i, has_noise))
    digest = hashlib.sha256(f"{corpus.digest} {_FORMAT} {noise.model_dump_json()}".encode()).hexdigest()
    train = Lazy(len(places), partial(_document, documents, places, noise))
    return replace(corpus, train=train, digest=digest, planted=True)


def _document(
    documents: Sequence[Document], places: list[tuple[int, bool]], noise: NoiseConfig, index: int
) -> Document:
    place, has_noise = places[index]
    document = documents[place]
    if not has_noise:
        return document
    seed = int.from_bytes(_hash(noise.seed, document.path, "order")[:8], "big")
    return replace(document, planted=Planted(noise.kind, noise.share if noise.kind == "spans" else 1.0, seed))


def planted_tokens(ids: NDArray[np.int32], planted: Planted | None) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Return the tokens of a document with its noise, and which of them are noise.

    Args:
        ids: of a document with its first and last end-of-text token, which stay in place.
        planted: what is planted in it.
    """
    if planted is None:
        return ids, np.zeros(len(ids), dtype=np.uint8)
    if planted.kind == "duplicates":
        return ids, np.ones(len(ids), dtype=np.uint8)
    inner = max(0, len(ids) - 2)
    # Raw numbers of this generator are the same in every version of numpy.
    draw = np.random.PCG64(planted.seed).random_raw
    is_noise = np.ones(inner, dtype=bool)
    if planted.kind == "spans" and inner:
        block = (np.arange(inner) + int(draw()) % SPAN) // SPAN
        count = int(block[-1]) + 1
        of_block = np.zeros(count, dtype=bool)
        of_block[np.argsort(draw(count), kind="stable")[: round(planted.share * count)]] = True
        is_noise = of_block[block]
    at = 1 + np.flatnonzero(is_noise)
    ids, noise = ids.copy(), np.zeros(len(ids), dtype=np.uint8)
    if len(at):
        ids[at] = ids[at][np.argsort(draw(len(at)), kind="stable")]
        noise[at] = 1
    return ids, noise


def _hash(*parts: object) -> bytes:
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()
