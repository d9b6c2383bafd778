"""From tokens to batches: lay the documents end to end and cut rows, or give each a row, and order the rows.

    documents   |eos a a a a a eos|eos b b eos|eos c c c c c c c eos|
    packed      |eos a a a a a eos eos|b b eos eos c c c c|c c c eos pad ... |         S tokens each
    document_ids 0   0 0 0 0 0 0   1   1 1 1   2   2 2 2 2 2 2 2 2   3
    position_ids 0   1 2 3 4 5 6   0   0 1 2   0   1 2 3 4 0 1 2 3   0 ...

    padded      |eos a a a a a eos pad|eos b b eos pad pad pad pad|eos c c c c c c c|   what is longer is cut

Position ids begin again at every document and at every row, which is how transformers finds the borders
that attention must not cross; document ids are how the loss finds them. No attention mask is made: an
all-ones mask would switch that detection off. Padding is a document of its own, with label -100, and so
have the tokens of a prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter

import torch
from torch import Tensor

from mtp_ce.training.data.tokens import DocumentTokens

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Rows of documents: four int64 tensors [B, S], and weights where they were made before training."""

    input_ids: Tensor
    labels: Tensor  # input_ids, unshifted, with -100 at prompts and padding
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

    Attributes:
        tokens: [N] int32, all of them in order where all documents of a corpus were given.
        lengths: [n] int64, tokens of each document.
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
        self.documents = DocumentTokens.of(documents)
        self.token_weights = None if token_weights is None else torch.cat([*token_weights])

    @property
    def tokens(self) -> Tensor:
        """Where the tokens of the documents are; a mapped file for those of a corpus."""
        return self.documents.tokens

    @property
    def lengths(self) -> Tensor:
        """Tokens of each document, [n] int64."""
        return self.documents.starts.diff()

    def __len__(self) -> int:
        """Give the number of rows."""
        return -(-self.documents.token_count // self.row_length)

    def batch(self, rows: Tensor) -> Batch:
        """Collect rows by number.

        Args:
            rows: [B] int64, each in [0, len(self)).
        """
        starts, count = self.documents.starts, self.documents.token_count
        row_start = rows[:, None] * self.row_length  # [B, 1]
        place = row_start + torch.arange(self.row_length)  # [B, S]
        document_ids = torch.searchsorted(starts, place, right=True) - 1
        position_ids = place - torch.maximum(starts[document_ids], row_start)
        return self._read(place, place < count, document_ids, position_ids)

    def _read(self, place: Tensor, real: Tensor, document_ids: Tensor, position_ids: Tensor) -> Batch:
        """Look up the tokens at some places.

        Args:
            place: [B, S], as if the documents lay end to end.
            real: [B, S], where a token stands; False is padding, whatever the place.
            document_ids: [B, S].
            position_ids: [B, S].
        """
        documents = self.documents
        inside = torch.where(real, place, 0)
        # Of what is no padding; the padding's own document has no entry in the arrays of documents.
        document = torch.where(real, document_ids, 0)
        tokens = documents.tokens[inside if documents.moved is None else inside + documents.moved[document]]
        tokens = tokens.to(torch.int64)
        learnt = real
        if documents.prompts is not None:
            learnt = real & (inside - documents.starts[document] >= documents.prompts[document])
        return Batch(
            input_ids=torch.where(real, tokens, self.pad_id),
            labels=torch.where(learnt, tokens, IGNORE),
            document_ids=document_ids,
            position_ids=position_ids,
            token_weights=None if self.token_weights is None else self.token_weights[inside] * real,
        )

    def in_order(self, batch_size: int, most: int | None = None) -> Iterator[Batch]:
        """Give every row once, from first to last, `batch_size` at a time.

        Args:
            batch_size: rows of a batch.
            most: give so many rows at most, spread evenly over all of them; None means every row.
        """
        count = len(self) if most is None else min(most, len(self))
        for start in range(0, count, batch_size):
            rows = torch.arange(start, min(start + batch_size, count))
            yield self.batch(rows * len(self) // count)


class PaddedRows(PackedRows):
    """Tokenised documents, one in each row of `row_length` tokens: what is longer is cut, what is shorter padded."""

    def __len__(self) -> int:
        """Give the number of rows, which is that of the documents."""
        return len(self.documents)

    def batch(self, rows: Tensor) -> Batch:
        """Collect rows by number.

        Args:
            rows: [B] int64, each in [0, len(self)).
        """
        start = self.documents.starts[rows][:, None]  # [B, 1]
        length = self.documents.starts[rows + 1][:, None] - start
        offset = torch.arange(self.row_length).expand(len(rows), -1)  # [B, S]
        real = offset < length
        document_ids = torch.where(real, rows[:, None], len(self.documents))
        return self._read(start + offset, real, document_ids, torch.where(real, offset, offset - length))


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
