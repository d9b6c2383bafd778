"""From tokens to batches: documents concatenated and cut into rows, or one document a row, and the order of the rows.

    documents   |eos a a a a a eos|eos b b eos|eos c c c c c c c eos|
    packed      |eos a a a a a eos eos|b b eos eos c c c c|c c c eos pad ... |         S tokens each
    document_ids 0   0 0 0 0 0 0   1   1 1 1   2   2 2 2 2 2 2 2 2   3
    position_ids 0   1 2 3 4 5 6   0   0 1 2   0   1 2 3 4 0 1 2 3   0 ...

    labels      |eos a a a a a eos eos|b b              those of the first row with a halo of 2 tokens
    padded      |eos a a a a a eos pad|eos b b eos pad pad pad pad|eos c c c c c c c|   longer documents are truncated

Position ids restart at every document and at every row: transformers detects from them the boundaries that
attention must not cross, and the loss takes the boundaries from document ids. There is no attention mask, since
an all-ones mask would disable this detection. Padding is a document of its own. The labels of padding, of the tokens
of a prompt, and of what is not an assistant's in a chat are -100.

With halos the labels of a packed row, and its document ids, go on into the rows beside it, so that its last positions
predict the tokens that follow. Without, the last H positions of every row lose targets.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from mtp_ce.training.data.tokens import DocumentTokens

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Rows of documents, int64, token weights if they were computed before training, and planted noise.

    T = left_halo + S + halo: labels, document ids, weights and noise have the tokens before and after the row, too.
    """

    input_ids: Tensor  # [B, S]
    labels: Tensor  # [B, T], the tokens, unshifted, with -100 at what is not learnt
    document_ids: Tensor  # [B, T]
    position_ids: Tensor  # [B, S]
    token_weights: Tensor | None = None  # [B, T] fp32, of the token at the position
    noise: Tensor | None = None  # [B, T] bool, whether the token at the position is planted noise; None: unknown
    next_input_ids: Tensor | None = None  # [B, halo], the tokens after the row
    left_halo: int = 0

    def to(self, device: torch.device) -> Batch:
        """Copy to a device."""
        return self._each(lambda tensor: tensor.to(device))

    def split(self, rows: int) -> Iterator[Batch]:
        """Yield micro-batches of at most `rows` rows, as views."""
        for start in range(0, len(self.input_ids), rows):
            yield self.part(slice(start, start + rows))

    def part(self, rows: slice) -> Batch:
        """Return some of the rows, as views."""
        return self._each(itemgetter(rows))

    def without_halos(self) -> Batch:
        """Return the same rows with labels, document ids, weights and noise of their own tokens alone."""
        own = slice(self.left_halo, self.left_halo + self.input_ids.shape[1])
        return replace(
            self,
            labels=self.labels[:, own],
            document_ids=self.document_ids[:, own],
            token_weights=None if self.token_weights is None else self.token_weights[:, own],
            noise=None if self.noise is None else self.noise[:, own],
            next_input_ids=None,
            left_halo=0,
        )

    def over_labels(self, weights: Tensor) -> Tensor:
        """Return weights [B, T] of the labels from weights [B, S] of the row's own tokens: 1 in the halos."""
        if weights.shape == self.labels.shape:
            return weights
        halo = self.labels.shape[1] - self.left_halo - weights.shape[1]
        return F.pad(weights, (self.left_halo, halo), value=1.0)

    def unlabelled(self) -> Batch:
        """Return the same rows without labels."""
        return replace(self, labels=torch.full_like(self.labels, IGNORE))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {name: change(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)


class PackedRows:
    """Tokenized documents, concatenated and cut into rows of `row_length` tokens.

    Args:
        documents: token ids of each document, 1-d.
        row_length: S. Nothing is dropped: the last row is padded.
        pad_id: the token that pads the last row.
        token_weights: fp32 weights of each document's tokens, 1-d, or None.

    Attributes:
        documents: token ids of the documents.
        token_weights: [N] fp32, or None.
        halos: how many tokens of the text before and after a row its labels have.
    """

    halos: tuple[int, int] = (0, 0)

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
        """The array that holds the documents' tokens, [N] int32; a memory-mapped file for those of a corpus."""
        return self.documents.tokens

    @property
    def lengths(self) -> Tensor:
        """Tokens of each document, [n] int64."""
        return self.documents.starts.diff()

    def with_halos(self, before: int, after: int) -> Self:
        """Return the same rows with labels that go on into the text beside them."""
        rows = copy.copy(self)
        rows.halos = (before, after)
        return rows

    def __len__(self) -> int:
        """Return the number of rows."""
        return -(-self.documents.token_count // self.row_length)

    def batch(self, rows: Tensor) -> Batch:
        """Collect rows by number.

        Args:
            rows: [B] int64, each in [0, len(self)).
        """
        starts, count = self.documents.starts, self.documents.token_count
        row_start = rows[:, None] * self.row_length  # [B, 1]
        before, after = self.halos
        index = row_start + torch.arange(-before, self.row_length + after)  # [B, T]
        # Before the text is document -1, after it that of the padding.
        document_ids = torch.searchsorted(starts, index, right=True) - 1
        own = slice(before, before + self.row_length)
        position_ids = index[:, own] - torch.maximum(starts[document_ids[:, own]], row_start)
        return self._gather(index, (index >= 0) & (index < count), document_ids, position_ids)

    def _gather(self, index: Tensor, is_token: Tensor, document_ids: Tensor, position_ids: Tensor) -> Batch:
        """Gather tokens by index.

        Args:
            index: [B, T], into the concatenated documents.
            is_token: [B, T], False at padding, whatever the index.
            document_ids: [B, T].
            position_ids: [B, S].
        """
        documents = self.documents
        # Padding reads token 0 of document 0, which is replaced below: it has no entry in the arrays of documents.
        index = torch.where(is_token, index, 0)
        document = torch.where(is_token, document_ids, 0)
        place = index if documents.offsets is None else index + documents.offsets[document]
        tokens = documents.gather(place)
        has_label = is_token
        if documents.prompts is not None:
            has_label = is_token & (index - documents.starts[document] >= documents.prompts[document])
        if documents.learnt is not None:
            has_label = is_token & (documents.learnt[place] != 0)
        before, after = self.halos
        input_ids = torch.where(is_token, tokens, self.pad_id)
        return Batch(
            input_ids=input_ids[:, before : before + self.row_length],
            labels=torch.where(has_label, tokens, IGNORE),
            document_ids=document_ids,
            position_ids=position_ids,
            token_weights=None if self.token_weights is None else self.token_weights[index] * is_token,
            noise=None if documents.noise is None else (documents.noise[place] != 0) & is_token,
            next_input_ids=input_ids[:, before + self.row_length :] if after else None,
            left_halo=before,
        )

    def in_order(self, batch_size: int, most: int | None = None) -> Iterator[Batch]:
        """Yield every row once, from first to last, `batch_size` at a time.

        Args:
            batch_size: rows of a batch.
            most: maximum number of rows, spread evenly over all of them; None means every row.
        """
        count = len(self) if most is None else min(most, len(self))
        for start in range(0, count, batch_size):
            rows = torch.arange(start, min(start + batch_size, count))
            yield self.batch(rows * len(self) // count)


class PaddedRows(PackedRows):
    """Tokenized documents, one in each row of `row_length` tokens: longer ones are truncated, shorter ones padded."""

    def with_halos(self, before: int, after: int) -> Self:
        """Return the rows as they are: what was truncated is no target."""
        return self

    def __len__(self) -> int:
        """Return the number of rows, which is that of the documents."""
        return len(self.documents)

    def batch(self, rows: Tensor) -> Batch:
        """Collect rows by number.

        Args:
            rows: [B] int64, each in [0, len(self)).
        """
        start = self.documents.starts[rows][:, None]  # [B, 1]
        length = self.documents.starts[rows + 1][:, None] - start
        offset = torch.arange(self.row_length).expand(len(rows), -1)  # [B, S]
        is_token = offset < length
        document_ids = torch.where(is_token, rows[:, None], len(self.documents))
        return self._gather(start + offset, is_token, document_ids, torch.where(is_token, offset, offset - length))


@lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> Tensor:
    """Shuffle row numbers: a function of its arguments alone, the same on every machine and rank."""
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    return torch.randperm(rows, generator=generator)


def seed_of(*parts: object) -> int:
    """Return a seed of 64 bits, a different one for every combination of parts."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:8], "big")


def rows_of_step(step: int, batch_size: int, rows: int, seed: int) -> Tensor:
    """Return the rows that an optimizer step trains on.

    The orders of the epochs are concatenated, and step s (from 0) takes batch_size rows from s * batch_size on. So
    every row is seen once before any is seen twice, and a resumed run needs nothing but s.

    Returns:
        [batch_size] int64 row numbers.
    """
    index = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = torch.div(index, rows, rounding_mode="floor")
    return torch.cat(
        [epoch_order(rows, seed, epoch)[index[epochs == epoch] % rows] for epoch in epochs.unique().tolist()]
    )
