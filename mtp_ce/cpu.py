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
    runs: list[tuple[int, int, int]]  # b, first t, length


def _cut(read: Tensor, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[_Block]]:
    """Position p = b * S + t and head of every row marked in read [B,S,H], head by head, and the blocks of rows."""
    S = read.shape[1]
    # A multiple of the threads: a reduction gives each of them whole rows.
    most = max(1, BLOCK_BYTES // (V * dtype.itemsize)) * min(32, torch.get_num_threads())
    head, position = read.flatten(0, 1).t().nonzero(as_tuple=True)
    # A run ends before a row that does not follow the last one in the same sequence and head.
    follows = (position.diff() == 1) & (position[1:] % S != 0) & (head.diff() == 0)
    first = torch.cat([torch.zeros(min(1, len(head)), dtype=torch.int64), (~follows).nonzero().flatten() + 1])
    lengths = torch.cat([first[1:], torch.tensor([len(head)])])[: len(first)] - first
    blocks: list[_Block] = []
    room = 0  # in the last block
    for h, p, length in zip(head[first].tolist(), position[first].tolist(), lengths.tolist(), strict=True):
        b, t = divmod(p, S)
        if blocks and blocks[-1].head != h:
            room = 0
        while length:
            if room == 0:
                blocks.append(_Block(h, []))
                room = most
            fits = min(length, room)
            blocks[-1].runs.append((b, t, fits))
            t, length, room = t + fits, length - fits, room - fits
    return position, head, blocks


def _slices(x: Tensor, runs: list[tuple[int, int, int]]) -> list[Tensor]:
    """The runs' rows of one head [B,S,V]: slices, which torch copies 4 times faster than an index tensor's rows."""
    return [x[b, t : t + length] for b, t, length in runs]


def _load(head: Tensor, block: _Block, buffer: Tensor, softcap: float | None) -> Tensor:
    """The block's rows as z [rows, V] in the buffer."""
    lengths = _lengths(block)
    z = buffer[: sum(lengths)]
    for part, rows in zip(z.split(lengths), _slices(head, block.runs), strict=True):
        part.copy_(rows)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z


def _lengths(block: _Block) -> list[int]:
    return [length for _, _, length in block.runs]


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
    sizes = [sum(_lengths(block)) for block in blocks]
    buffer = share.new_empty(max(sizes, default=0), V)
    parts = [x.split(sizes) for x in (y, z_label, maximum, total, sums, best)]
    for block, y_, z_label_, maximum_, total_, sums_, best_ in zip(blocks, *parts, strict=True):
        z = _load(heads[block.head], block, buffer, softcap)
        torch.gather(z, 1, y_, out=z_label_)
        torch.amax(z, 1, keepdim=True, out=maximum_)
        if with_top1:
            torch.argmax(z, 1, out=best_)
        z.sub_(maximum_)
        if label_smoothing:
            torch.sum(z, 1, keepdim=True, out=total_)
        torch.sum(z.exp_(), 1, keepdim=True, out=sums_)
    # A row of -inf everywhere has subtracted -inf from itself: its lse is -inf and not NaN.
    log_s = torch.where(maximum == float("-inf"), 0.0, sums).log_()
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
    sizes = [sum(_lengths(block)) for block in blocks]
    buffer = row_max.new_empty(max(sizes, default=0), V)
    parts = [x.split(sizes) for x in (y, maximum, scale, uniform, on_label)]
    for block, y_, maximum_, scale_, uniform_, on_label_ in zip(blocks, *parts, strict=True):
        z = _load(heads[block.head], block, buffer, softcap)
        slope = None if softcap is None else 1 - (z / softcap).square_()
        dz = z.sub_(maximum_).exp_().mul_(scale_)
        if label_smoothing:
            dz.sub_(uniform_)
        dz.scatter_add_(1, y_, on_label_)
        if slope is not None:
            dz.mul_(slope)
        for gradient, part in zip(_slices(d_heads[block.head], block.runs), dz.split(_lengths(block)), strict=True):
            gradient.copy_(part)
    for block in _cut(dead, V, dtype)[2]:
        for gradient in _slices(d_heads[block.head], block.runs):
            gradient.zero_()
