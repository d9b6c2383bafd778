"""The peers: other people's fused losses, each in the best form that its library has for this work.

The work is a weighted loss, and a weight belongs to a token. A library that returns every row's loss can do it: the
weights come after. One that returns the mean over rows alone can't; it appears as "<name>_mean" with `weighted=False`,
does less work than the others, is checked against the plain mean, and is marked in every table.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.eager import weighted_mean
from benchmarks.shapes import IGNORED, Shape, head_targets

# Rows of a chunk of torch's linear_cross_entropy. The best of 64 to 1024 on two cores, 1.4 times faster than what torch
# chooses by itself; a GPU's products want thousands.
TORCH_ROWS = {"cpu": 512, "cuda": 4096}
# Of Liger, in its form with large chunks. By itself it takes so few that their logits are no larger than hidden.
LIGER_ROWS = 4096


def _reduced(ce: Tensor, target: Tensor, token_weights: Tensor) -> Tensor:
    """The weighted loss of the rows' ce [N], target [B, S, H]."""
    return weighted_mean(ce.float().view(target.shape).sum(-1), (target != IGNORED).sum(-1), token_weights)


def _rows(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden as rows [N, D], and target [B, S, H]: padded labels, so that nothing is sliced."""
    return hidden.flatten(0, 2), head_targets(labels, hidden.shape[2])


def _liger_ce(rows: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy  # type: ignore[import-untyped]

    return liger_cross_entropy(rows, target.flatten(), ignore_index=IGNORED, reduction="none", softcap=softcap).float()


def liger_logits_heads(logits: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None) -> Tensor:
    """Liger's cross entropy per head, on whole heads with padded labels, so that nothing is sliced."""
    total = live_heads = torch.zeros_like(token_weights)
    for h, head in enumerate(logits.unbind(2)):
        target = F.pad(labels[:, h + 1 :], (0, h + 1), value=IGNORED)
        total = total + _liger_ce(head.flatten(0, 1), target, softcap).view(target.shape)
        live_heads = live_heads + (target != IGNORED)
    return weighted_mean(total, live_heads, token_weights)


def liger_logits_rows(logits: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None) -> Tensor:
    """Liger's cross entropy of all rows in one call. It writes the gradient over the logits in its forward."""
    target = head_targets(labels, logits.shape[2])
    return _reduced(_liger_ce(logits.flatten(0, 2), target, softcap), target, token_weights)


def _liger_linear(
    rows: Tensor, unembed: Tensor, target: Tensor, softcap: float | None, reduction: str, **more: int
) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        rows, unembed, target.flatten(),
        ignore_index=IGNORED, reduction=reduction, softcap=softcap, accum_dtype=torch.float32, **more,
    )  # fmt: skip


def liger_linear(
    hidden: Tensor, unembed: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None
) -> Tensor:
    """Liger's fused linear cross entropy, every row's loss; it computes the logits again in backward.

    Versions whose backward of reduction="none" ignores the weights fail the check and are not timed.
    """
    rows, target = _rows(hidden, labels)
    return _reduced(_liger_linear(rows, unembed, target, softcap, "none"), target, token_weights)


def liger_budget(N: int, V: int, D: int) -> int:
    """The chunk_mem_const by which Liger cuts N rows into chunks of about LIGER_ROWS.

    It makes ceil(V / (chunk_mem_const D)) chunks, of rows that it rounds up to a power of 2.
    """
    chunks = -(-N // LIGER_ROWS)
    return -(-V // (chunks * D))


def liger_linear_large(
    hidden: Tensor, unembed: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None
) -> Tensor:
    """The same with large chunks, 4096 rows instead of 256 at V 151936: more memory, larger products."""
    rows, target = _rows(hidden, labels)
    budget = liger_budget(len(rows), *unembed.shape)
    return _reduced(
        _liger_linear(rows, unembed, target, softcap, "none", chunk_mem_const=budget), target, token_weights
    )


def liger_linear_mean(
    hidden: Tensor, unembed: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None
) -> Tensor:
    """Liger's own mean over rows. NOT the same work: no weights, gradients ready after forward."""
    rows, target = _rows(hidden, labels)
    return _liger_linear(rows, unembed, target, softcap, "mean")


def liger_token_ce(hidden: Tensor, unembed: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """Every row's loss; Liger computes no gradient where none is wanted."""
    rows, target = _rows(hidden, labels)
    return _liger_linear(rows, unembed, target, softcap, "none").view(target.shape)


def _torch_linear(rows: Tensor, unembed: Tensor, target: Tensor, reduction: str) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(  # type: ignore[attr-defined,unused-ignore]
        batch_chunk_size=TORCH_ROWS[rows.device.type], chunking_method=None
    )
    return F.linear_cross_entropy(  # type: ignore[attr-defined,unused-ignore]
        rows, unembed, target.flatten(), reduction=reduction, ignore_index=IGNORED, options=options
    )


def torch_missing(shape: Shape, device: torch.device) -> str | None:
    """What torch's linear_cross_entropy lacks."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__.partition('+')[0]} has no chunked linear_cross_entropy"
    return None if shape.softcap is None else "torch's linear_cross_entropy has no softcap"


def torch_linear(
    hidden: Tensor, unembed: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None
) -> Tensor:
    """The chunked linear_cross_entropy of torch, every row's loss; it computes the logits again in backward."""
    rows, target = _rows(hidden, labels)
    return _reduced(_torch_linear(rows, unembed, target, "none"), target, token_weights)


def torch_linear_mean(
    hidden: Tensor, unembed: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None
) -> Tensor:
    """The mean over rows that torch has itself. NOT the same work: no weights, gradients ready after forward."""
    rows, target = _rows(hidden, labels)
    return _torch_linear(rows, unembed, target, "mean")


def torch_token_ce(hidden: Tensor, unembed: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """Every row's loss, chunk by chunk."""
    rows, target = _rows(hidden, labels)
    return _torch_linear(rows, unembed, target, "none").view(target.shape)


def _cce(rows: Tensor, unembed: Tensor, target: Tensor, softcap: float | None, filter_eps: str | None) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    return linear_cross_entropy(
        rows, unembed, target.flatten(),
        ignore_index=IGNORED, softcap=softcap, reduction="none", filter_eps=filter_eps,
    )  # fmt: skip


def cce_linear(hidden: Tensor, unembed: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None) -> Tensor:
    """cut-cross-entropy, every row's loss, with its usual filter: blocks of small gradients are left out."""
    rows, target = _rows(hidden, labels)
    return _reduced(_cce(rows, unembed, target, softcap, "auto"), target, token_weights)


def cce_linear_exact(
    hidden: Tensor, unembed: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None
) -> Tensor:
    """cut-cross-entropy without the filter; its sums are still rounded to the dtype of the inputs."""
    rows, target = _rows(hidden, labels)
    return _reduced(_cce(rows, unembed, target, softcap, None), target, token_weights)


def cce_token_ce(hidden: Tensor, unembed: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """Every row's loss."""
    rows, target = _rows(hidden, labels)
    return _cce(rows, unembed, target, softcap, None).float().view(target.shape)


def quack_missing(shape: Shape, device: torch.device) -> str | None:
    """What quack's kernels need: Hopper or newer, a package, no softcap."""
    from benchmarks.provider import needs

    reason = needs("quack", "quack-kernels")(shape, device)
    if reason is None and torch.cuda.get_device_capability(device) < (9, 0):
        return "quack-kernels needs a GPU of the Hopper generation or newer"
    return reason or (None if shape.softcap is None else "quack's linear cross entropy has no softcap")


def quack_linear_mean(
    hidden: Tensor, unembed: Tensor, labels: Tensor, token_weights: Tensor, softcap: float | None
) -> Tensor:
    """The chunked linear cross entropy of quack, which has a mean over rows only. NOT the same work: no weights."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # type: ignore[import-not-found]

    rows, target = _rows(hidden, labels)
    return chunked_linear_cross_entropy(rows, unembed, target.flatten(), ignore_index=IGNORED, reduction="mean")
