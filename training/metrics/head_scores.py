"""How well each head predicts held-out text, and how far its guesses would carry, from one pass over the text.

    ce, top1, top5   of head h at position t, whose target is the token t + 1 + h
    agrees[h]        share of positions t at which every head i = 1..h says what head 0 says i tokens later:
                     argmax z_i(t) = argmax z_0(t + i)

A draft of speculative decoding is kept as far as its heads agree with head 0, so 1 + sum_h agrees[h] estimates the
tokens of a forward. Here the text in between is given; what decoding finds on text of its own is in `decoding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mtp_ce.hf.wrapper import MTPWrapper
from mtp_ce.ops.rows import row_targets
from mtp_ce.training.data.rows import IGNORE, Batch
from mtp_ce.unembedding import Unembedding

# Rows whose logits are alive at a time: on a CPU they stay near the caches.
CHUNK_ROWS = {"cpu": 128, "cuda": 2048}


@dataclass(frozen=True)
class HeadResult:
    """How one head did.

    Attributes:
        ce: mean cross entropy, nats per row.
        top1: share of rows whose most likely token is the target.
        top5: share of rows whose target is among the five most likely tokens.
        agrees: share of rows at which this head and all before it say what head 0 says later; 1 for head 0, None for
            heads that can't draft.
        rows: how many rows that is the mean of.
    """

    ce: float
    top1: float
    top5: float
    agrees: float | None
    rows: int

    @property
    def perplexity(self) -> float:
        """Perplexity, the exponential of the cross entropy; infinite where that overflows."""
        return math.exp(self.ce) if self.ce < 700 else math.inf


@torch.no_grad()
def score_heads(
    model: MTPWrapper, batches: Iterable[Batch], add: Callable[[Tensor], None] = lambda sums: None
) -> list[HeadResult]:
    """Score every head on batches, each live row with the same weight.

    Args:
        model: in eval mode.
        batches: where the model computes; parameters may wait elsewhere.
        add: adds up a tensor over all that score a part of the batches, in place.

    Returns:
        One result per head; of no rows, zeros.
    """
    H = model.horizon
    sums = torch.zeros(5, H, dtype=torch.float64)  # ce, top1, top5, agrees, rows
    for batch in batches:
        sums = sums.to(batch.labels.device)
        hidden = model.head_hidden_states(input_ids=batch.input_ids, position_ids=batch.position_ids)
        _, label, live = row_targets(batch.labels, None, batch.document_ids, H=H, shift=1, ignore_index=IGNORE)
        output = Unembedding.of(model.causal)  # of a sharded model, whole only after a forward
        read = [_read(output, x, label[..., h], live[..., h]) for h, x in enumerate(hidden)]
        if len(read) < H:  # one hidden state serves all heads: head h's rows are head 0's, h positions later
            read = [read[0].further(h) for h in range(H)]
        agrees = live[..., 0]
        for h, rows in enumerate(read):
            alive = live[..., h]
            agrees = agrees & alive & (rows.said == read[0].further(h).said)
            parts = (rows.ce, rows.top1, rows.top5, agrees, torch.ones_like(rows.ce))
            sums[:, h] += torch.stack([torch.where(alive, part.double(), 0.0).sum() for part in parts])
    add(sums)
    drafts = model.heads.drafts
    results = []
    for h, (*totals, rows) in enumerate(sums.T.tolist()):
        ce, top1, top5, agreed = (total / max(rows, 1) for total in totals)
        results.append(HeadResult(ce, top1, top5, agreed if drafts or h == 0 else None, int(rows)))
    return results


def validation_metrics(results: list[HeadResult]) -> dict[str, float]:
    """Name what a validation found."""
    rows = sum(result.rows for result in results)
    metrics = {"val/ce_mean": sum(result.ce * result.rows for result in results) / max(rows, 1)}
    for h, result in enumerate(results):
        metrics[f"val/ce_head_{h}"] = result.ce
        metrics[f"val/perplexity_head_{h}"] = result.perplexity
        metrics[f"val/top1_head_{h}"] = result.top1
        metrics[f"val/top5_head_{h}"] = result.top5
        if h and result.agrees is not None:
            metrics[f"val/agrees_head_{h}"] = result.agrees
    return metrics


class _Read(NamedTuple):
    """What a head's logits say at every position; only live rows are read."""

    ce: Tensor  # [B, S] fp32, nats
    top1: Tensor  # [B, S] bool
    top5: Tensor  # [B, S] bool
    said: Tensor  # [B, S] int64, the most likely token; -1 where nothing was read

    def further(self, h: int) -> _Read:
        """The rows h positions later; past the end nothing was read."""
        S = self.said.shape[1]
        ce, top1, top5 = (F.pad(part[:, h:], (0, min(h, S))) for part in self[:3])
        return _Read(ce, top1, top5, F.pad(self.said[:, h:], (0, min(h, S)), value=-1))


def _read(output: Unembedding, hidden: Tensor, label: Tensor, live: Tensor) -> _Read:
    """Read one head's logits, a chunk of rows at a time."""
    count = CHUNK_ROWS[hidden.device.type]
    parts = []
    for x, target in zip(hidden[live].split(count), label[live].split(count), strict=True):
        logits = output.logits(x).float()
        # Ties go to the first token, as in greedy decoding, which topk does not promise.
        said, best = logits.argmax(-1), logits.topk(min(5, logits.shape[-1])).indices
        ce = logits.logsumexp(-1) - logits.gather(-1, target[:, None])[:, 0]
        parts.append((ce, said == target, (best == target[:, None]).any(-1), said))

    def place(column: Sequence[Tensor], elsewhere: float) -> Tensor:
        values = torch.cat([*column])
        return live.new_full(live.shape, elsewhere, dtype=values.dtype).masked_scatter(live, values)

    ces, top1, top5, tokens = zip(*parts, strict=True)
    return _Read(place(ces, 0), place(top1, 0), place(top5, 0), place(tokens, -1))
