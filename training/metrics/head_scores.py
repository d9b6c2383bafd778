"""Accuracy of each head on held-out text, and its agreement with head 0, in one pass over the text.

    ce, top1, top5   of head h at position t, whose target is the token t + 1 + h
    agrees[h]        ratio of positions t where every head i = 1..h matches head 0's argmax i tokens later:
                     argmax z_i(t) = argmax z_0(t + i)

Speculative decoding accepts a draft as far as its heads agree with head 0, so 1 + sum_h agrees[h] estimates the tokens
per forward. Here the tokens in between come from the text; `decoding` measures text that the model generates.
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
from mtp_ce.options import LossInputs, LossOptions
from mtp_ce.training.data.rows import IGNORE, Batch
from mtp_ce.unembedding import Unembedding

# Rows of logits in memory at a time; on a CPU they fit the caches.
CHUNK_ROWS = {"cpu": 128, "cuda": 2048}


@dataclass(frozen=True)
class HeadResult:
    """Scores of one head; None for a head without a valid row.

    Attributes:
        ce: mean cross entropy, nats per row.
        top1: ratio of rows whose argmax is the target.
        top5: ratio of rows whose target is among the five most likely tokens.
        agrees: ratio of rows where heads 1..h match head 0's later argmax; 1 for head 0, None for heads that can't
            draft.
        rows: number of valid rows.
    """

    ce: float | None
    top1: float | None
    top5: float | None
    agrees: float | None
    rows: int

    @property
    def perplexity(self) -> float | None:
        """Return the perplexity, the exponential of the cross entropy; infinite if it overflows."""
        if self.ce is None:
            return None
        return math.inf if self.ce >= 700 else math.exp(self.ce)


@torch.no_grad()
def score_heads(
    model: MTPWrapper, batches: Iterable[Batch], add: Callable[[Tensor], None] = lambda sums: None
) -> list[HeadResult]:
    """Score every head on batches, all valid rows with the same weight.

    Args:
        model: in eval mode.
        batches: on the device on which the model computes; parameters may be offloaded.
        add: sums a tensor over the ranks in place.

    Returns:
        One result per head.
    """
    H = model.horizon
    sums = torch.zeros(5, H, dtype=torch.float64)  # ce, top1, top5, agrees, rows
    for batch in batches:
        sums = sums.to(batch.labels.device)
        hidden = model.head_hidden_states(input_ids=batch.input_ids, position_ids=batch.position_ids)
        inputs = LossInputs(batch.labels, document_ids=batch.document_ids)
        _, label, valid = row_targets(inputs, LossOptions(ignore_index=IGNORE), batch.input_ids.shape[1], H)
        output = Unembedding.of(model.causal)  # gathered on a sharded model only after a forward
        scores = [_score(output, x, label[..., h], valid[..., h]) for h, x in enumerate(hidden)]
        if len(scores) < H:  # one hidden state serves all heads: head h's rows are head 0's, h positions later
            scores = [scores[0].shifted(h) for h in range(H)]
        agrees = valid[..., 0]
        for h, rows in enumerate(scores):
            mask = valid[..., h]
            agrees = agrees & mask & (rows.argmax == scores[0].shifted(h).argmax)
            terms = (rows.ce, rows.top1, rows.top5, agrees, torch.ones_like(rows.ce))
            sums[:, h] += torch.stack([torch.where(mask, term.double(), 0.0).sum() for term in terms])
    add(sums)
    drafts = model.heads.drafts
    results = []
    for h, (*totals, rows) in enumerate(sums.T.tolist()):
        ce, top1, top5, agreed = (total / rows if rows else None for total in totals)
        results.append(HeadResult(ce, top1, top5, agreed if drafts or h == 0 else None, int(rows)))
    return results


def validation_metrics(results: list[HeadResult]) -> dict[str, float]:
    """Return the metrics of a validation by name; NaN for a head without a valid row, and for a mean without any."""
    rows = sum(result.rows for result in results)
    total = sum(result.ce * result.rows for result in results if result.ce is not None)
    metrics = {"val/ce_mean": total / rows if rows else math.nan}
    for h, result in enumerate(results):
        scores = {"ce": result.ce, "perplexity": result.perplexity, "top1": result.top1, "top5": result.top5}
        metrics |= {f"val/{name}_head_{h}": math.nan if x is None else x for name, x in scores.items()}
        if h and result.agrees is not None:
            metrics[f"val/agrees_head_{h}"] = result.agrees
    return metrics


class _Scores(NamedTuple):
    """Scores of one head at every position; only valid rows are computed."""

    ce: Tensor  # [B, S] fp32, nats
    top1: Tensor  # [B, S] bool
    top5: Tensor  # [B, S] bool
    argmax: Tensor  # [B, S] int64; -1 at masked rows

    def shifted(self, h: int) -> _Scores:
        """Return the rows h positions later; rows past the end are masked."""
        S = self.argmax.shape[1]
        ce, top1, top5 = (F.pad(column[:, h:], (0, min(h, S))) for column in self[:3])
        return _Scores(ce, top1, top5, F.pad(self.argmax[:, h:], (0, min(h, S)), value=-1))


def _score(output: Unembedding, hidden: Tensor, label: Tensor, valid: Tensor) -> _Scores:
    """Score one head from its hidden states, a chunk of rows at a time."""
    count = CHUNK_ROWS[hidden.device.type]
    chunks = []
    for x, target in zip(hidden[valid].split(count), label[valid].split(count), strict=True):
        logits = output.logits(x).float()
        # argmax breaks ties by the first token, as greedy decoding does; topk does not guarantee that.
        argmax, top5 = logits.argmax(-1), logits.topk(min(5, logits.shape[-1])).indices
        ce = logits.logsumexp(-1) - logits.gather(-1, target[:, None])[:, 0]
        chunks.append((ce, argmax == target, (top5 == target[:, None]).any(-1), argmax))

    def scatter(column: Sequence[Tensor], masked: float) -> Tensor:
        values = torch.cat([*column])
        return valid.new_full(valid.shape, masked, dtype=values.dtype).masked_scatter(valid, values)

    ces, top1s, top5s, tokens = zip(*chunks, strict=True)
    return _Scores(scatter(ces, 0), scatter(top1s, 0), scatter(top5s, 0), scatter(tokens, -1))
