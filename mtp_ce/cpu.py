"""Weighted multi-token cross entropy on a CPU: a few rows at a time, in a buffer that stays in cache.

Math       as in kernels/forward.py and kernels/backward.py

Shapes     H tensors [B,S,V] of any strides; results like those of the Triton launchers

Algorithm  The rows that count are gathered in blocks of about 2 MiB of fp32 into one private buffer, where every pass
           (softcap, maximum, exp, sum, gradient) runs. The logits are read once and the gradient written once.

Traffic    Main memory sees what the kernels' `traffic` says. Memory beyond the gradient: two blocks.

Numerics   fp32 (float64 for float64 logits). The maximum and the log of the sum are kept apart, as in the kernels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 2 * 1024 * 1024


def row_targets(
    labels: Tensor,  # [B, S]
    seq_lens: Tensor | None,  # [B]
    document_ids: Tensor | None,  # [B, S]
    *,
    H: int,
    shift: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """place [S,H] (the target's index, inside the sequence), label and live [B,S,H] of every row."""
    B, S = labels.shape
    device = labels.device
    target = torch.arange(S, device=device)[:, None] + shift + torch.arange(H, device=device)
    place = target.clamp(max=S - 1)
    live = (target < S).expand(B, S, H)
    if seq_lens is not None:
        live = live & (target < seq_lens[:, None, None])
    label = labels[:, place].long()
    live = live & (label != ignore_index)
    if document_ids is not None:
        live = live & (document_ids[:, place] == document_ids[:, :, None])
    return place, label, live


def row_coefficients(
    place: Tensor,  # [S, H]
    live: Tensor,  # [B, S, H]
    token_weights: Tensor | None,  # [B, S] or [B, S, H]
    head_weights: Tensor | None,  # [H]
    *,
    over_horizon: bool,
    target_weights: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """share and coefficient [B,S,H] of every row, as in kernels/rows.py."""
    H = live.shape[-1]
    a = torch.ones(H, dtype=dtype, device=live.device) if head_weights is None else head_weights.to(dtype)
    share = torch.where(live, a, 0.0)
    if over_horizon:
        share = share / H
    else:
        total = share.sum(-1, keepdim=True)
        share = share / torch.where(total == 0, 1.0, total)
    if token_weights is None:
        return share, share
    if token_weights.dim() == 3:
        w = token_weights
    elif target_weights:
        w = token_weights[:, place]
    else:
        w = token_weights[:, :, None]
    return share, torch.where(share != 0, w.to(dtype) * share, 0.0)


def check_labels(
    labels: Tensor,  # [B, S]
    seq_lens: Tensor | None,  # [B]
    document_ids: Tensor | None,  # [B, S]
    *,
    H: int,
    V: int,
    shift: int,
    ignore_index: int,
) -> None:
    """IndexError naming the first live label outside [0, V); reads values, so it synchronises on a GPU."""
    place, label, live = row_targets(labels, seq_lens, document_ids, H=H, shift=shift, ignore_index=ignore_index)
    broken = live & ((label < 0) | (label >= V))
    if not bool(broken.any()):
        return
    b, t, h = (int(i) for i in broken.nonzero()[0])
    i = int(place[t, h])
    raise IndexError(
        f"labels[{b}, {i}] is {int(labels[b, i])}; expected ignore_index ({ignore_index}) or a class in [0, V) = "
        f"[0, {V}). Mask it with ignore_index, or give logits as wide as the tokenizer's vocabulary."
    )


def _blocks(read: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(b, t) indices of the rows marked in read [B, S], `rows` at a time."""
    b, t = read.nonzero(as_tuple=True)
    yield from zip(b.split(rows), t.split(rows), strict=True)


def _load(head: Tensor, b: Tensor, t: Tensor, buffer: Tensor, softcap: float | None) -> Tensor:
    """Rows (b, t) of one head as z [rows, V] in the buffer."""
    z = buffer[: len(b)]
    z.copy_(head[b, t])
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z


def _buffer(head: Tensor, dtype: torch.dtype) -> Tensor:
    B, S, V = head.shape
    rows = max(1, BLOCK_BYTES // (V * dtype.itemsize))
    return torch.empty(min(rows, B * S), V, dtype=dtype, device=head.device)


def _accumulator(head: Tensor) -> torch.dtype:
    return torch.float64 if head.dtype == torch.float64 else torch.float32


def forward(
    heads: list[Tensor],  # H x [B, S, V]
    labels: Tensor,  # [B, S]
    token_weights: Tensor | None,  # [B, S] or [B, S, H]
    head_weights: Tensor | None,  # [H]
    seq_lens: Tensor | None,  # [B]
    document_ids: Tensor | None,  # [B, S]
    *,
    shift: int,
    over_horizon: bool,
    target_weights: bool,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    with_top1: bool,
    with_shares: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """out [B,S]; ce, row_max, log_sum, live [B,S,H]; top1 and shares [B,S,H], None where not wanted."""
    B, S, V = heads[0].shape
    H = len(heads)
    dtype = _accumulator(heads[0])
    place, label, live = row_targets(labels, seq_lens, document_ids, H=H, shift=shift, ignore_index=ignore_index)
    share, coefficient = row_coefficients(
        place, live, token_weights, head_weights, over_horizon=over_horizon, target_weights=target_weights, dtype=dtype
    )
    ce, row_max, log_sum, row_loss = (torch.zeros(B, S, H, dtype=dtype, device=labels.device) for _ in range(4))
    top1 = torch.full((B, S, H), -1, dtype=torch.int32, device=labels.device) if with_top1 else None
    buffer = _buffer(heads[0], dtype)
    counts = (share if with_shares else coefficient) != 0
    for h, head in enumerate(heads):
        for b, t in _blocks(counts[:, :, h], len(buffer)):
            z = _load(head, b, t, buffer, softcap)
            z_label = z.gather(1, label[b, t, h][:, None])[:, 0]
            if top1 is None:
                maximum = z.amax(dim=1)
            else:
                maximum, best = z.max(dim=1)
                top1[b, t, h] = best.int()
            mean = z.mean(dim=1) if label_smoothing else None
            # A row of -inf everywhere must give lse = -inf, and -inf - -inf is NaN.
            base = torch.where(maximum == -torch.inf, 0.0, maximum)
            log_s = z.sub_(base[:, None]).exp_().sum(dim=1).log_()
            loss = (maximum - z_label) + log_s
            ce[b, t, h], row_max[b, t, h], log_sum[b, t, h] = loss, maximum, log_s
            if mean is not None:
                loss = loss + label_smoothing * (z_label - mean)
            if z_loss:
                loss = loss + z_loss * (maximum + log_s) ** 2
            row_loss[b, t, h] = loss
    out = torch.where(coefficient != 0, coefficient * row_loss, 0.0).sum(-1)
    shares = torch.where(share != 0, share * row_loss, 0.0) if with_shares else None
    return out, ce, row_max, log_sum, live, top1, shares


def mean(
    out: Tensor,  # [B, S]
    live: Tensor,  # [B, S, H]
    normalizer: Tensor | None,  # []
    *,
    scale: float,
    count: bool,
) -> tuple[Tensor, Tensor]:
    """loss and factor, 0-d; both exactly 0 where no row is live."""
    positions = live.any(-1).sum()
    none = positions == 0
    by = positions if count else out.new_ones(()) if normalizer is None else normalizer
    factor = torch.where(none, 0.0, scale / torch.where(none, 1, by).to(out.dtype))
    return torch.where(none, 0.0, out.sum() * factor), factor


def backward(
    d_loss: Tensor,  # [B, S] of any strides
    heads: list[Tensor],  # H x [B, S, V]
    d_heads: list[Tensor],  # H x [B, S, V], written wholly; may be the heads themselves
    labels: Tensor,
    token_weights: Tensor | None,
    head_weights: Tensor | None,
    seq_lens: Tensor | None,
    document_ids: Tensor | None,
    row_max: Tensor,  # [B, S, H]
    log_sum: Tensor,  # [B, S, H]
    factor: Tensor,  # []
    *,
    shift: int,
    over_horizon: bool,
    target_weights: bool,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
) -> None:
    """Write the gradient of every logit into d_heads."""
    V = heads[0].shape[-1]
    dtype = _accumulator(heads[0])
    place, label, live = row_targets(
        labels, seq_lens, document_ids, H=len(heads), shift=shift, ignore_index=ignore_index
    )
    _, coefficient = row_coefficients(
        place, live, token_weights, head_weights, over_horizon=over_horizon, target_weights=target_weights, dtype=dtype
    )
    upstream = (d_loss.to(dtype) * factor)[:, :, None]
    # Where the upstream gradient is 0 the row is dead too, also if its own loss is Inf.
    dead = (coefficient == 0) | (upstream == 0)
    g = torch.where(dead, 0.0, coefficient * upstream)
    buffer = _buffer(heads[0], dtype)
    for h, (head, d_head) in enumerate(zip(heads, d_heads, strict=True)):
        for b, t in _blocks(~dead[:, :, h], len(buffer)):
            z = _load(head, b, t, buffer, softcap)
            slope = None if softcap is None else 1 - (z / softcap).square_()
            y, scale = label[b, t, h][:, None], g[b, t, h][:, None]
            p = z.sub_(row_max[b, t, h][:, None]).sub_(log_sum[b, t, h][:, None]).exp_()
            if z_loss:
                p.mul_(1 + 2 * z_loss * (row_max[b, t, h] + log_sum[b, t, h])[:, None])
            if label_smoothing:
                p.sub_(label_smoothing / V)
            p.scatter_add_(1, y, p.new_full(y.shape, label_smoothing - 1.0))
            p.mul_(scale)
            if slope is not None:
                p.mul_(slope)
            d_head[b, t] = p.to(d_head.dtype)
        d_head[dead[:, :, h]] = 0
