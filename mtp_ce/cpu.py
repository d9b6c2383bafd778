"""Weighted multi-token cross entropy on a CPU: a few rows at a time, in a buffer that stays in cache.

Math       as in kernels/forward.py and kernels/backward.py

Shapes     H tensors [B,S,V] of any strides; results like those of the Triton launchers

Algorithm  The rows that count are copied in blocks of 512 KiB a thread into one private buffer, where every pass
           (softcap, maximum, exp, sum, gradient) runs. The logits are read once and the gradient written once.

Traffic    Main memory sees what the kernels' `traffic` says. Memory beyond the gradient: a block, two with a softcap.

Numerics   fp32 (float64 for float64 logits). The maximum and the log of the sum are kept apart, as in the kernels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# For each of at most 32 threads. A core has 1 to 2 MiB of L2; past half of that, sums slow down threefold.
BLOCK_BYTES = 512 * 1024


def row_targets(
    labels: Tensor,  # [B, S]
    seq_lens: Tensor | None,  # [B]
    document_ids: Tensor | None,  # [B, S]
    *,
    H: int,
    shift: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Place [S,H] (the target's index, inside the sequence), label and live [B,S,H] of every row."""
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
    """Share and coefficient [B,S,H] of every row, as in kernels/rows.py."""
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


class _Block(NamedTuple):
    """Rows of one head that are worked on together."""

    head: int
    rows: slice  # their places among all rows read
    runs: list[tuple[int, int, int]]  # b, first t, length


def _cut(read: Tensor, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[_Block]]:
    """Position p = b * S + t and head of every row marked in read [B,S,H], head by head, and the blocks of rows."""
    S = read.shape[1]
    most = max(1, BLOCK_BYTES * min(32, torch.get_num_threads()) // (V * dtype.itemsize))
    head, position = read.flatten(0, 1).t().nonzero(as_tuple=True)
    blocks: list[_Block] = []
    for i, (h, p) in enumerate(zip(head.tolist(), position.tolist(), strict=True)):
        b, t = divmod(p, S)
        if not blocks or blocks[-1].head != h or i - blocks[-1].rows.start == most:
            blocks.append(_Block(h, slice(i, i), []))
        _, rows, runs = blocks[-1]
        if runs and runs[-1][0] == b and runs[-1][1] + runs[-1][2] == t:
            runs[-1] = (b, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((b, t, 1))
        blocks[-1] = _Block(h, slice(rows.start, i + 1), runs)
    return position, head, blocks


def _slices(x: Tensor, runs: list[tuple[int, int, int]]) -> list[Tensor]:
    """The runs' rows of one head [B,S,V]: slices, which torch copies 4 times faster than an index tensor's rows."""
    return [x[b, t : t + length] for b, t, length in runs]


def _load(head: Tensor, block: _Block, buffer: Tensor, softcap: float | None) -> Tensor:
    """The block's rows as z [rows, V] in the buffer."""
    z = buffer[: block.rows.stop - block.rows.start]
    for part, rows in zip(z.split([run[2] for run in block.runs]), _slices(head, block.runs), strict=True):
        part.copy_(rows)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z


def _buffer(blocks: list[_Block], V: int, like: Tensor) -> Tensor:
    rows = max((block.rows.stop - block.rows.start for block in blocks), default=0)
    return like.new_empty(rows, V)


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
    """Out [B,S]; ce, row_max, log_sum, live [B,S,H]; top1 and shares [B,S,H], None where not wanted."""
    B, S, V = heads[0].shape
    H = len(heads)
    dtype = _accumulator(heads[0])
    place, label, live = row_targets(labels, seq_lens, document_ids, H=H, shift=shift, ignore_index=ignore_index)
    share, coefficient = row_coefficients(
        place,
        live,
        token_weights,
        head_weights,
        over_horizon=over_horizon,
        target_weights=target_weights,
        dtype=dtype,
    )
    position, of_head, blocks = _cut((share if with_shares else coefficient) != 0, V, dtype)
    y = label.view(-1, H)[position, of_head, None]  # [rows, 1]
    z_label, maximum, total, sums = (share.new_zeros(len(y), 1) for _ in range(4))
    best = torch.zeros(len(y), dtype=torch.int64, device=labels.device)
    buffer = _buffer(blocks, V, share)
    for block in blocks:
        rows = block.rows
        z = _load(heads[block.head], block, buffer, softcap)
        torch.gather(z, 1, y[rows], out=z_label[rows])
        torch.amax(z, 1, keepdim=True, out=maximum[rows])
        if with_top1:
            torch.argmax(z, 1, out=best[rows])
        # Above -inf, so that a row of -inf everywhere gives lse = -inf and not NaN.
        z.sub_(maximum[rows].clamp(min=torch.finfo(dtype).min))
        if label_smoothing:
            torch.sum(z, 1, keepdim=True, out=total[rows])
        torch.sum(z.exp_(), 1, keepdim=True, out=sums[rows])
    log_s = sums.log_()
    row_ce = (maximum - z_label) + log_s
    loss = row_ce + label_smoothing * ((z_label - maximum) - total / V) if label_smoothing else row_ce
    if z_loss:
        loss = loss + z_loss * (maximum + log_s) ** 2

    def spread(values: Tensor, elsewhere: float = 0) -> Tensor:
        whole = values.new_full((B * S, H), elsewhere)
        whole[position, of_head] = values.flatten()
        return whole.view(B, S, H)

    ce, row_max, log_sum, row_loss = spread(row_ce), spread(maximum), spread(log_s), spread(loss)
    top1 = spread(best.int(), -1) if with_top1 else None
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
    """Loss and factor, 0-d; both exactly 0 where no row is live."""
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
    H, V = len(heads), heads[0].shape[-1]
    dtype = _accumulator(heads[0])
    place, label, live = row_targets(labels, seq_lens, document_ids, H=H, shift=shift, ignore_index=ignore_index)
    _, coefficient = row_coefficients(
        place,
        live,
        token_weights,
        head_weights,
        over_horizon=over_horizon,
        target_weights=target_weights,
        dtype=dtype,
    )
    upstream = (d_loss.to(dtype) * factor)[:, :, None]
    # Where the upstream gradient is 0 the row is dead too, also if its own loss is Inf.
    dead = (coefficient == 0) | (upstream == 0)
    g = torch.where(dead, 0.0, coefficient * upstream)
    # dz = scale * exp(z - row_max) - uniform - on_label [v = label]
    scale = g * torch.exp(-log_sum) * (1 + 2 * z_loss * (row_max + log_sum) if z_loss else 1)
    position, of_head, blocks = _cut(~dead, V, dtype)
    y, maximum, scale, g = (x.view(-1, H)[position, of_head, None] for x in (label, row_max, scale, g))
    uniform, on_label = g * (label_smoothing / V), g * (label_smoothing - 1)
    buffer = _buffer(blocks, V, row_max)
    for block in blocks:
        rows = block.rows
        z = _load(heads[block.head], block, buffer, softcap)
        slope = None if softcap is None else 1 - (z / softcap).square_()
        dz = z.sub_(maximum[rows]).exp_().mul_(scale[rows])
        if label_smoothing:
            dz.sub_(uniform[rows])
        dz.scatter_add_(1, y[rows], on_label[rows])
        if slope is not None:
            dz.mul_(slope)
        slices = _slices(d_heads[block.head], block.runs)
        for gradient, part in zip(slices, dz.split([len(x) for x in slices]), strict=True):
            gradient.copy_(part)
    for block in _cut(dead, V, dtype)[2]:
        for gradient in _slices(d_heads[block.head], block.runs):
            gradient.zero_()
