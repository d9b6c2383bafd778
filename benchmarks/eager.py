"""The loss in plain torch, as it is usually written, for all three paths.

bf16 logits are cast to fp32, as transformers does: torch's cross entropy of bf16 returns bf16, wrong in the third digit
of every row.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import IGNORED, head_targets


def weighted_mean(total: Tensor, valid_heads: Tensor, token_weights: Tensor) -> Tensor:
    """Return the loss [] from the sum of ce over valid heads [B, S] and their number [B, S]."""
    return (token_weights * total / valid_heads.clamp(min=1)).sum() / (valid_heads > 0).sum()


def row_ce(logits: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    """Return the cross entropy of every row [..., V] against its target [...], 0 where that is IGNORED."""
    z = logits.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    ce = F.cross_entropy(z.flatten(0, -2), target.flatten(), reduction="none", ignore_index=IGNORED)
    return ce.view(target.shape)


def loop_over_heads(
    rows_of: Callable[[int, int], Tensor], H: int, labels: Tensor, weights: Tensor, softcap: float | None
) -> Any:
    """Compute the loss head by head against shifted labels; `rows_of(h, end)` returns the logits of head h before end.

    The losses are padded rather than written into a buffer: torch.compile is three times as fast with that.
    """
    S = labels.shape[1]
    total = valid_heads = torch.zeros_like(weights)
    for h in range(H):
        k = h + 1
        target = labels[:, k:]
        total = total + F.pad(row_ce(rows_of(h, S - k), target, softcap), (0, k))
        valid_heads = valid_heads + F.pad((target != IGNORED).float(), (0, k))
    return weighted_mean(total, valid_heads, weights)


def logits_loop(logits: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None) -> Tensor:
    """The usual loop over the heads, each a view of the logits.

    The slices cost time in backward: autograd adds one gradient of the size of all logits for each head.
    """
    return loop_over_heads(lambda h, end: logits[:, :end, h], logits.shape[2], labels, token_weights, softcap)


def logits_rows(logits: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None) -> Tensor:
    """The fastest in eager torch: no loop and no slice, one cross entropy of all rows with padded labels."""
    target = head_targets(labels, logits.shape[2])
    total = row_ce(logits, target, softcap).sum(-1)
    return weighted_mean(total, (target != IGNORED).sum(-1), token_weights)


def linear_loop(
    hidden: Tensor, unembed: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None
) -> Tensor:
    """The usual loop: every head's logits by the output layer, then their cross entropy."""
    return loop_over_heads(
        lambda h, end: hidden[:, :end, h] @ unembed.t(), hidden.shape[2], labels, token_weights, softcap
    )


def linear_rows(
    hidden: Tensor, unembed: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None
) -> Tensor:
    """One product and one cross entropy of all rows."""
    return logits_rows(hidden @ unembed.t(), labels, token_weights, softcap)


def token_loop(hidden: Tensor, unembed: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """Return ce head by head, so that the logits of one head exist at a time."""
    ce = []
    for h in range(hidden.shape[2]):
        rows = hidden[:, : -(h + 1), h] @ unembed.t()
        ce.append(F.pad(row_ce(rows, labels[:, h + 1 :], softcap), (0, h + 1)))
    return torch.stack(ce, dim=2)
