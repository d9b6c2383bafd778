"""Weighted multi-token cross entropy on a CPU: a few rows at a time, in a buffer that stays in cache.

Math       as in kernels/forward.py, kernels/backward.py and kernels/forward_backward.py

Shapes     H tensors [B,S,V] of any strides, or a slab [R,V]; results like those of the Triton launchers

Algorithm  The rows that count are copied in blocks of 512 KiB a thread into one private buffer, where every pass
           (softcap, maximum, exp, sum, gradient) runs. The logits are read once and the gradient written once, in
           its own place from the first pass on where that is of the dtype of the passes.

Traffic    Main memory sees what the kernels' `traffic` says. Memory beyond the gradient: a block, two with a softcap.

Numerics   fp32 (float64 for float64 logits). The maximum and the log of the sum are kept apart, as in the kernels.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_ce.ops.rows import row_coefficients, row_targets

# For each of at most 32 threads. A core has 1 to 2 MiB of L2; past half of that, sums slow down threefold.
BLOCK_BYTES = 512 * 1024


class _Block(NamedTuple):
    """Rows of one head that are worked on together."""

    head: int
    runs: list[tuple[int, int, int]]  # b, first t, length
    size: int


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
    blocks: list[tuple[int, list[tuple[int, int, int]]]] = []
    room = 0  # in the last block
    for h, p, length in zip(head[first].tolist(), position[first].tolist(), lengths.tolist(), strict=True):
        b, t = divmod(p, S)
        if blocks and blocks[-1][0] != h:
            room = 0
        while length:
            if room == 0:
                blocks.append((h, []))
                room = most
            fits = min(length, room)
            blocks[-1][1].append((b, t, fits))
            t, length, room = t + fits, length - fits, room - fits
    return position, head, [_Block(h, runs, sum(length for _, _, length in runs)) for h, runs in blocks]


def _sequences(heads: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """Of each head its B tensors [S, V]."""
    return [head.unbind(0) for head in heads]


def _runs(sequences: tuple[Tensor, ...], block: _Block) -> list[Tensor]:
    """A block's rows in their places: slices, which torch copies 4 times faster than an index tensor's rows."""
    return [sequences[b].narrow(0, t, length) for b, t, length in block.runs]


def _workplace(runs: list[Tensor], dtype: torch.dtype) -> Tensor | None:
    """The rows themselves, where passes over them are as good as over a buffer: one run of `dtype`, row by row."""
    return runs[0] if len(runs) == 1 and runs[0].dtype == dtype and runs[0].stride(1) == 1 else None


def _copy(to: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
    """Run by run, but for what is in its place already."""
    for there, here in zip(to, rows, strict=True):
        if there.data_ptr() != here.data_ptr():
            there.copy_(here)


def _split_runs(z: Tensor, block: _Block) -> Sequence[Tensor]:
    """The block's rows of z [rows, V], run by run."""
    return z.split([length for _, _, length in block.runs]) if len(block.runs) > 1 else [z]


def _load(runs: list[Tensor], block: _Block, z: Tensor, softcap: float | None) -> Tensor:
    """The block's rows as z [rows, V]."""
    _copy(_split_runs(z, block), runs)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


class _Sums(NamedTuple):
    """What one visit learns of rows, as columns [rows, 1]; of a block of them, as views. None: not wanted."""

    z_label: Tensor
    maximum: Tensor
    sums: Tensor  # of exp(z - maximum)
    total: Tensor | None  # of z - maximum
    best: Tensor | None  # [rows] int64

    @classmethod
    def zeros(cls, rows: int, like: Tensor, *, smooth: bool, with_top1: bool) -> "_Sums":
        z_label, maximum, sums = (like.new_zeros(rows, 1) for _ in range(3))
        total = like.new_zeros(rows, 1) if smooth else None
        return cls(z_label, maximum, sums, total, like.new_zeros(rows, dtype=torch.int64) if with_top1 else None)

    def split(self, sizes: list[int]) -> "Iterator[_Sums]":
        return (_Sums(*parts) for parts in zip(*(_split(column, sizes) for column in self), strict=True))

    def log_sum(self) -> Tensor:
        """In place of the sums. A row of -inf everywhere has subtracted -inf from itself: -inf, not NaN."""
        return self.sums.masked_fill_(self.maximum == float("-inf"), 0.0).log_()

    def row_loss(self, ce: Tensor, log_sum: Tensor, V: int, z_loss: float, label_smoothing: float) -> Tensor:
        loss = ce
        if self.total is not None:
            loss = loss + label_smoothing * ((self.z_label - self.maximum) - self.total / V)
        if z_loss:
            loss = loss + z_loss * (self.maximum + log_sum) ** 2
        return loss


def _split(column: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if column is None else column.split(sizes)


def _visit(z: Tensor, y: Tensor, into: _Sums) -> Tensor:
    """Learn of z [rows, V] with labels y [rows, 1]; z becomes exp(z - maximum)."""
    torch.gather(z, 1, y, out=into.z_label)
    torch.amax(z, 1, keepdim=True, out=into.maximum)
    if into.best is not None:
        torch.argmax(z, 1, out=into.best)
    z.sub_(into.maximum)
    if into.total is not None:
        torch.sum(z, 1, keepdim=True, out=into.total)
    torch.sum(z.exp_(), 1, keepdim=True, out=into.sums)
    return z


class _Terms(NamedTuple):
    """Columns [rows, 1] of dz = scale * exp(z - maximum) + on_label [v = label] - uniform, for row coefficients g."""

    on_label: Tensor
    uniform: Tensor | None  # of label smoothing

    @classmethod
    def of(cls, g: Tensor, V: int, label_smoothing: float) -> "_Terms":
        return cls(g * (label_smoothing - 1), g * (label_smoothing / V) if label_smoothing else None)

    def split(self, sizes: list[int]) -> "Iterator[_Terms]":
        return (_Terms(*parts) for parts in zip(*(_split(column, sizes) for column in self), strict=True))

    def gradient(self, e: Tensor, y: Tensor, scale: Tensor, slope: Tensor | None) -> Tensor:
        """Of a block's logits, in place of e = exp(z - maximum)."""
        dz = e.mul_(scale)
        if self.uniform is not None:
            dz.sub_(self.uniform)
        dz.scatter_add_(1, y, self.on_label)
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
    sizes = [block.size for block in blocks]
    buffer = share.new_empty(max(sizes, default=0), V)
    sums = _Sums.zeros(len(y), share, smooth=label_smoothing != 0, with_top1=with_top1)
    sequences = _sequences(heads)
    for block, y_, sums_ in zip(blocks, y.split(sizes), sums.split(sizes), strict=True):
        runs = _runs(sequences[block.head], block)
        _visit(_load(runs, block, buffer.narrow(0, 0, block.size), softcap), y_, sums_)
    log_s = sums.log_sum()
    row_ce = (sums.maximum - sums.z_label) + log_s
    loss = sums.row_loss(row_ce, log_s, V, z_loss, label_smoothing)

    def spread(values: Tensor, elsewhere: float = 0) -> Tensor:
        whole = values.new_full((B * S, H), elsewhere)
        whole[position, of_head] = values.flatten()
        return whole.view(B, S, H)

    ce, row_max, log_sum, row_loss = spread(row_ce), spread(sums.maximum), spread(log_s), spread(loss)
    top1 = None if sums.best is None else spread(sums.best.int(), -1)
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
    sizes = [block.size for block in blocks]
    buffer = row_max.new_empty(max(sizes, default=0), V)
    scale = g * torch.exp(-log_s) * (1 + 2 * z_loss * (maximum + log_s) if z_loss else 1)
    columns = (x.split(sizes) for x in (y, maximum, scale, _Terms.of(g, V, label_smoothing)))
    sequences, d_sequences = _sequences(heads), _sequences(d_heads)
    for block, y_, maximum_, scale_, terms_ in zip(blocks, *columns, strict=True):
        runs, d_runs = (_runs(x[block.head], block) for x in (sequences, d_sequences))
        workplace = _workplace(d_runs, dtype)
        z = _load(runs, block, buffer.narrow(0, 0, block.size) if workplace is None else workplace, softcap)
        slope = _slope(z, softcap)
        dz = terms_.gradient(z.sub_(maximum_).exp_(), y_, scale_, slope)
        _copy(d_runs, _split_runs(dz, block))
    for block in _cut(dead, V, dtype)[2]:
        for rows in _runs(d_sequences[block.head], block):
            rows.zero_()


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
    dtype = _accumulator(slab)
    y, c = label.long()[:, None], coefficient[:, None]
    sums = _Sums.zeros(len(slab), ce, smooth=label_smoothing != 0, with_top1=top1 is not None)
    terms = _Terms.of(c, V, label_smoothing)
    blocks = slab.split(_rows_at_once(V, dtype))
    sizes = [len(block) for block in blocks]
    columns = (x.split(sizes) for x in (y, c, sums, terms))
    for block, y_, c_, sums_, terms_ in zip(blocks, *columns, strict=True):
        z = block.to(dtype)
        if softcap is not None:
            z.div_(softcap).tanh_().mul_(softcap)
        slope = _slope(z, softcap) if gradient else None
        e = _visit(z, y_, sums_)
        if gradient:
            scale = c_ / sums_.sums
            if z_loss:
                scale *= 1 + 2 * z_loss * (sums_.maximum + sums_.sums.log())
            dz = terms_.gradient(e, y_, scale, slope)
            if z is not block:
                block.copy_(dz)
    log_s = sums.log_sum()
    row_ce = (sums.maximum - sums.z_label) + log_s
    loss = sums.row_loss(row_ce, log_s, V, z_loss, label_smoothing)
    for to, values in ((ce, row_ce), (row_loss, loss), (lse, sums.maximum + log_s)):
        to.copy_(values.squeeze(1).masked_fill_(~read, 0.0))
    if top1 is not None and sums.best is not None:
        top1.copy_(sums.best.masked_fill_(~read, -1))
    dead = coefficient == 0
    if gradient and bool(dead.any()):
        slab[dead] = 0.0
