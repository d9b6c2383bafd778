"""The peers: other libraries' fused losses, each in the best form that it has for this work.

The loss is weighted by token. A library that returns the loss of every row supports that: the weights are applied
after (`weighted`). One that only returns the mean over rows does not (`mean`); it is named "<name>_mean", does less
work than the others, is checked against the plain mean, and is marked in every table.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.eager import weighted_mean
from benchmarks.shapes import IGNORED, head_targets

# (rows [N, D], unembed [V, D], target [N], softcap, reduction) -> ce [N], or their mean []
RowLoss = Callable[[Tensor, Tensor, Tensor, float | None, str], Tensor]
# Rows of a chunk of torch's linear_cross_entropy: the best of 64 to 1024 on two cores, 1.4 times faster than its own
# choice; a GPU's products want thousands.
TORCH_ROWS = {"cpu": 512, "cuda": 4096}
# Rows of a chunk of Liger in its form with large chunks. Its own choice keeps their logits no larger than hidden.
LIGER_ROWS = 4096


def weighted(row_loss: RowLoss) -> Callable[..., Tensor]:
    """Return the weighted loss, from every row's."""

    def loss(hidden: Tensor, unembed: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None) -> Tensor:
        target = head_targets(labels, hidden.shape[2])  # padded labels, so that nothing is sliced
        ce = row_loss(hidden.flatten(0, 2), unembed, target.flatten(), softcap, "none")
        return _reduced(ce, target, token_weights)

    return loss


def mean(row_loss: RowLoss) -> Callable[..., Tensor]:
    """Return the plain mean over rows."""

    def loss(hidden: Tensor, unembed: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None) -> Tensor:
        target = head_targets(labels, hidden.shape[2])
        return row_loss(hidden.flatten(0, 2), unembed, target.flatten(), softcap, "mean")

    return loss


def tokens(row_loss: RowLoss) -> Callable[..., Tensor]:
    """Return ce [B, S, H]."""

    def loss(hidden: Tensor, unembed: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        target = head_targets(labels, hidden.shape[2])
        return row_loss(hidden.flatten(0, 2), unembed, target.flatten(), softcap, "none").float().view(target.shape)

    return loss


def _reduced(ce: Tensor, target: Tensor, token_weights: Tensor) -> Tensor:
    return weighted_mean(ce.float().view(target.shape).sum(-1), (target != IGNORED).sum(-1), token_weights)


def _liger_ce(rows: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy  # type: ignore[import-untyped]

    return liger_cross_entropy(rows, target.flatten(), ignore_index=IGNORED, reduction="none", softcap=softcap).float()


def liger_logits_heads(logits: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None) -> Tensor:
    """Liger's cross entropy per head, on whole heads with padded labels, so that nothing is sliced."""
    total = valid_heads = torch.zeros_like(token_weights)
    for h, head in enumerate(logits.unbind(2)):
        target = F.pad(labels[:, h + 1 :], (0, h + 1), value=IGNORED)
        total = total + _liger_ce(head.flatten(0, 1), target, softcap).view(target.shape)
        valid_heads = valid_heads + (target != IGNORED)
    return weighted_mean(total, valid_heads, token_weights)


def liger_logits_rows(logits: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None) -> Tensor:
    """Liger's cross entropy of all rows in one call. Its forward writes the gradient over the logits."""
    target = head_targets(labels, logits.shape[2])
    return _reduced(_liger_ce(logits.flatten(0, 2), target, softcap), target, token_weights)


def liger(rows: Tensor, unembed: Tensor, target: Tensor, softcap: float | None, reduction: str, **more: int) -> Tensor:
    """Liger's fused linear cross entropy; for row losses it computes the logits again in backward.

    Versions whose backward of reduction="none" ignores the weights fail the check and are not timed.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        rows, unembed, target, ignore_index=IGNORED, reduction=reduction, softcap=softcap, accum_dtype=torch.float32,
        **more,
    )  # fmt: skip


def liger_budget(N: int, V: int, D: int) -> int:
    """Return the chunk_mem_const by which Liger cuts N rows into chunks of about LIGER_ROWS.

    It makes ceil(V / (chunk_mem_const D)) chunks, of rows that it rounds up to a power of 2.
    """
    chunks = -(-N // LIGER_ROWS)
    return -(-V // (chunks * D))


def liger_large(rows: Tensor, unembed: Tensor, *rest: Any) -> Tensor:
    """The same with chunks of 4096 rows, instead of 256 at V 151936: more memory, larger products."""
    return liger(rows, unembed, *rest, chunk_mem_const=liger_budget(len(rows), *unembed.shape))


def torch_chunked(rows: Tensor, unembed: Tensor, target: Tensor, softcap: float | None, reduction: str) -> Tensor:
    """The chunked linear_cross_entropy of torch; for row losses it computes the logits again in backward."""
    options = torch.nn.LinearCrossEntropyOptions(  # type: ignore[attr-defined,unused-ignore]
        batch_chunk_size=TORCH_ROWS[rows.device.type], chunking_method=None
    )
    return F.linear_cross_entropy(  # type: ignore[attr-defined,unused-ignore]
        rows, unembed, target, reduction=reduction, ignore_index=IGNORED, options=options
    )


def cce(
    rows: Tensor, unembed: Tensor, target: Tensor, softcap: float | None, reduction: str, filter_eps: str | None = None
) -> Tensor:
    """cut-cross-entropy; with filter_eps "auto", its default, blocks of small gradients are left out."""
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    return linear_cross_entropy(
        rows, unembed, target, ignore_index=IGNORED, softcap=softcap, reduction=reduction, filter_eps=filter_eps
    )


def cce_filtered(*inputs: Any) -> Tensor:
    """cut-cross-entropy with its default filter."""
    return cce(*inputs, filter_eps="auto")


def quack(rows: Tensor, unembed: Tensor, target: Tensor, softcap: float | None, reduction: str) -> Tensor:
    """The chunked linear cross entropy of quack, which only has a mean over rows."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # type: ignore[import-not-found]

    return chunked_linear_cross_entropy(rows, unembed, target, ignore_index=IGNORED, reduction=reduction)
