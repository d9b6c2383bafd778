"""Weighted multi-token cross entropy on a CPU: a few rows at a time, in a buffer that stays in cache.

Math       as in kernels/forward.py, kernels/backward.py and kernels/forward_backward.py

Shapes     H tensors [B,S,V] of any strides, or a slab [R,V]; results like those of the Triton launchers

Algorithm  The rows that count are copied in blocks of 512 KiB a thread into one private buffer, where every pass
           (softcap, maximum, exp, sum, gradient) runs. The logits are read once and the gradient written once.

Traffic    Main memory sees what the kernels' `traffic` says. Memory beyond the gradient: a block, two with a softcap.

Numerics   fp32 (float64 for float64 logits). The maximum and the log of the sum are kept apart, as in the kernels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mtp_ce.rows import row_coefficients, row_targets

# For each of at most 32 threads. A core has 1 to 2 MiB of L2; past half of that, sums slow down threefold.
BLOCK_BYTES = 512 * 1024


class _Block(NamedTuple):
    """Rows of one head that are worked on together."""

    head: int
    runs: list[tuple[int, int, int]]  # b, first t, length


def _rows_at_once(V: int, dtype: torch.dtype) -> int:
    # A multiple of the threads: a reduction gives each of them whole rows.
    return max(1, BLOCK_BYTES // (V * dtype.itemsize)) * min(32, torch.get_num_threads())


def _cut(read: Tensor, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[_Block]]:
    """Position p = b * S + t and head of every row marked in read [B,S,H], head by head, and the blocks of rows."""
    S = read.shape[1]
    most = _rows_at_once(V, dtype)
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


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


class _Sums(NamedTuple):
    """What one visit learns of rows, as columns [rows, 1]; of a block of them, as views."""

    z_label: Tensor
    maximum: Tensor
    total: Tensor  # of z - maximum
    sums: Tensor  # of exp(z - maximum)
    best: Tensor  # [rows] int64

    @classmethod
    def zeros(cls, rows: int, like: Tensor) -> "_Sums":
        z_label, maximum, total, sums = (like.new_zeros(rows, 1) for _ in range(4))
        return cls(z_label, maximum, total, sums, like.new_zeros(rows, dtype=torch.int64))

    def split(self, sizes: list[int]) -> "list[_Sums]":
        return [_Sums(*parts) for parts in zip(*(column.split(sizes) for column in self), strict=True)]

    def log_sum(self) -> Tensor:
        """In place of the sums. A row of -inf everywhere has subtracted -inf from itself: -inf, not NaN."""
        return self.sums.masked_fill_(self.maximum == float("-inf"), 0.0).log_()

    def row_loss(self, ce: Tensor, log_sum: Tensor, V: int, z_loss: float, label_smoothing: float) -> Tensor:
        loss = ce
        if label_smoothing:
            loss = loss + label_smoothing * ((self.z_label - self.maximum) - self.total / V)
        if z_loss:
            loss = loss + z_loss * (self.maximum + log_sum) ** 2
        return loss


def _visit(z: Tensor, y: Tensor, into: _Sums, *, smooth: bool, with_top1: bool) -> Tensor:
    """Learn of z [rows, V] with labels y [rows, 1]; z becomes exp(z - maximum)."""
    torch.gather(z, 1, y, out=into.z_label)
    torch.amax(z, 1, keepdim=True, out=into.maximum)
    if with_top1:
        torch.argmax(z, 1, out=into.best)
    z.sub_(into.maximum)
    if smooth:
        torch.sum(z, 1, keepdim=True, out=into.total)
    torch.sum(z.exp_(), 1, keepdim=True, out=into.sums)
    return z


class _Terms(NamedTuple):
    """Columns [rows, 1] of dz = scale * exp(z - maximum) - uniform - on_label [v = label], for row coefficients g."""

    uniform: Tensor
    on_label: Tensor

    @classmethod
    def of(cls, g: Tensor, V: int, label_smoothing: float) -> "_Terms":
        return cls(g * (label_smoothing / V), g * (1 - label_smoothing))

    def split(self, sizes: list[int]) -> "list[_Terms]":
        return [_Terms(*parts) for parts in zip(*(column.split(sizes) for column in self), strict=True)]

    def gradient(self, e: Tensor, y: Tensor, scale: Tensor, slope: Tensor | None, *, smooth: bool) -> Tensor:
        """Of a block's logits, in place of e = exp(z - maximum)."""
        dz = e.mul_(scale)
        if smooth:
            dz.sub_(self.uniform)
        dz.scatter_add_(1, y, -self.on_label)
        return dz if slope is None else dz.mul_(slope)


def _slope(z: Tensor, softcap: float | None) -> Tensor | None:
    """D z / d logit of capped logits."""
    return None if softcap is None else 1 - (z / softcap).square_()


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
    sizes = [sum(_lengths(block)) for block in blocks]
    buffer = share.new_empty(max(sizes, default=0), V)
    sums = _Sums.zeros(len(y), share)
    for block, y_, sums_ in zip(blocks, y.split(sizes), sums.split(sizes), strict=True):
        z = _load(heads[block.head], block, buffer, softcap)
        _visit(z, y_, sums_, smooth=label_smoothing != 0, with_top1=with_top1)
    log_s = sums.log_sum()
    row_ce = (sums.maximum - sums.z_label) + log_s
    loss = sums.row_loss(row_ce, log_s, V, z_loss, label_smoothing)

    def spread(values: Tensor, elsewhere: float = 0) -> Tensor:
        whole = values.new_full((B * S, H), elsewhere)
        whole[position, of_head] = values.flatten()
        return whole.view(B, S, H)

    ce, row_max, log_sum, row_loss = spread(row_ce), spread(sums.maximum), spread(log_s), spread(loss)
    top1 = spread(sums.best.int(), -1) if with_top1 else None
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
    position, of_head, blocks = _cut(~dead, V, dtype)
    y, maximum, log_s, g = (x.view(-1, H)[position, of_head, None] for x in (label, row_max, log_sum, g))
    sizes = [sum(_lengths(block)) for block in blocks]
    buffer = row_max.new_empty(max(sizes, default=0), V)
    scale = g * torch.exp(-log_s) * (1 + 2 * z_loss * (maximum + log_s) if z_loss else 1)
    columns = (x.split(sizes) for x in (y, maximum, scale, _Terms.of(g, V, label_smoothing)))
    for block, y_, maximum_, scale_, terms_ in zip(blocks, *columns, strict=True):
        z = _load(heads[block.head], block, buffer, softcap)
        slope = _slope(z, softcap)
        dz = terms_.gradient(z.sub_(maximum_).exp_(), y_, scale_, slope, smooth=label_smoothing != 0)
        for gradient, part in zip(_slices(d_heads[block.head], block.runs), dz.split(_lengths(block)), strict=True):
            gradient.copy_(part)
    for block in _cut(dead, V, dtype)[2]:
        for gradient in _slices(d_heads[block.head], block.runs):
            gradient.zero_()


def forward_backward(
    slab: Tensor,  # [R, V]
    label: Tensor,  # [R] int32
    coefficient: Tensor,  # [R]
    read: Tensor,  # [R] bool
    ce: Tensor,  # [R], written like the three below
    row_loss: Tensor,
    lse: Tensor,
    top1: Tensor | None,  # [R] int32
    *,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    gradient: bool,
) -> None:
    """What the rows of a slab give, and with `gradient` the gradient in the slab's place."""
    V = slab.shape[1]
    smooth, dtype = label_smoothing != 0, _accumulator(slab)
    y, c = label.long()[:, None], coefficient[:, None]
    sums, terms = _Sums.zeros(len(slab), ce), _Terms.of(c, V, label_smoothing)
    blocks = slab.split(_rows_at_once(V, dtype))
    sizes = [len(block) for block in blocks]
    columns = (x.split(sizes) for x in (y, c, sums, terms))
    for block, y_, c_, sums_, terms_ in zip(blocks, *columns, strict=True):
        z = block.to(dtype)
        if softcap is not None:
            z.div_(softcap).tanh_().mul_(softcap)
        slope = _slope(z, softcap) if gradient else None
        e = _visit(z, y_, sums_, smooth=smooth, with_top1=top1 is not None)
        if gradient:
            scale = c_ / sums_.sums
            if z_loss:
                scale *= 1 + 2 * z_loss * (sums_.maximum + sums_.sums.log())
            dz = terms_.gradient(e, y_, scale, slope, smooth=smooth)
            if z is not block:
                block.copy_(dz)
    log_s = sums.log_sum()
    row_ce = (sums.maximum - sums.z_label) + log_s
    loss = sums.row_loss(row_ce, log_s, V, z_loss, label_smoothing)
    for to, values in ((ce, row_ce), (row_loss, loss), (lse, sums.maximum + log_s)):
        to.copy_(values.squeeze(1).masked_fill_(~read, 0.0))
    if top1 is not None:
        top1.copy_(sums.best.masked_fill_(~read, -1))
    dead = coefficient == 0
    if gradient and bool(dead.any()):
        slab[dead] = 0.0
