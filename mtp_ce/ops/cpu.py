"""Weighted multi-token cross entropy on a CPU: a few rows at a time, in a buffer that stays in cache.

Math       as in kernels/forward.py, kernels/backward.py and kernels/forward_backward.py

Shapes     H tensors [B,S,V] of any strides, or a chunk of logits [R,V]; results like those of the Triton launchers

Algorithm  The rows that count are copied in blocks of 512 KiB a thread into one private buffer, where every pass
           (softcap, maximum, exp, sum, gradient) runs. The logits are read once and the gradient written once; where
           the gradient has the dtype of the passes, they run in its memory from the first one on.

Traffic    Main memory sees what the kernels' `traffic` says. Memory beyond the gradient: a block, two with a softcap.

Numerics   fp32 (float64 for float64 logits). The maximum and the log of the sum are kept apart, as in the kernels.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_ce.kernels.results import ForwardResults, RowResults, Rows
from mtp_ce.ops.rows import count_terms, row_values
from mtp_ce.options import LossInputs, LossOptions

# For each of at most 32 threads. A core has 1 to 2 MiB of L2; past half of that, sums slow down threefold.
BLOCK_BYTES = 512 * 1024


class _Block(NamedTuple):
    """Rows of one head that are computed together."""

    head: int
    runs: list[tuple[int, int, int]]  # b, first t, length
    size: int


def _block_rows(V: int, dtype: torch.dtype) -> int:
    # A multiple of the threads: a reduction gives each of them whole rows.
    return max(1, BLOCK_BYTES // (V * dtype.itemsize)) * min(32, torch.get_num_threads())


def _blocks(row_mask: Tensor, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[_Block]]:
    """Position p = b * S + t and head of every row marked in row_mask [B,S,H], head by head, and the blocks of rows."""
    S = row_mask.shape[1]
    most = _block_rows(V, dtype)
    head, position = row_mask.flatten(0, 1).t().nonzero(as_tuple=True)
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
    """The B tensors [S, V] of each head."""
    return [head.unbind(0) for head in heads]


def _runs(sequences: tuple[Tensor, ...], block: _Block) -> list[Tensor]:
    """A block's rows as views: slices, which torch copies 4 times faster than an index tensor's rows."""
    return [sequences[b].narrow(0, t, length) for b, t, length in block.runs]


def _workspace(runs: list[Tensor], dtype: torch.dtype) -> Tensor | None:
    """The rows themselves, where passes over them cost what they cost in a buffer: one contiguous run of `dtype`."""
    return runs[0] if len(runs) == 1 and runs[0].dtype == dtype and runs[0].stride(1) == 1 else None


def _copy(destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy run by run, except a run onto itself."""
    for destination, source in zip(destinations, sources, strict=True):
        if destination.data_ptr() != source.data_ptr():
            destination.copy_(source)


def _split_runs(z: Tensor, block: _Block) -> Sequence[Tensor]:
    """The block's rows of z [rows, V], run by run."""
    return z.split([length for _, _, length in block.runs]) if len(block.runs) > 1 else [z]


def _load(runs: list[Tensor], block: _Block, z: Tensor, softcap: float | None) -> Tensor:
    """Copy the block's rows into z [rows, V] and cap them."""
    _copy(_split_runs(z, block), runs)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


class _Sums(NamedTuple):
    """Statistics of rows from one pass, as columns [rows, 1]; of a block of them, as views. None: not wanted."""

    z_label: Tensor
    maximum: Tensor
    sums: Tensor  # of exp(z - maximum)
    total: Tensor | None  # of z - maximum
    argmax: Tensor | None  # [rows] int64

    @classmethod
    def zeros(cls, rows: int, like: Tensor, *, smooth: bool, with_top1: bool) -> "_Sums":
        z_label, maximum, sums = (like.new_zeros(rows, 1) for _ in range(3))
        total = like.new_zeros(rows, 1) if smooth else None
        return cls(z_label, maximum, sums, total, like.new_zeros(rows, dtype=torch.int64) if with_top1 else None)

    def split(self, sizes: list[int]) -> "Iterator[_Sums]":
        return (_Sums(*columns) for columns in zip(*(_split(column, sizes) for column in self), strict=True))

    def log_sum(self) -> Tensor:
        """Replace the sums by their log. A row of -inf everywhere, whose sum is NaN, has log 0 = -inf."""
        return self.sums.masked_fill_(self.maximum == float("-inf"), 0.0).log_()

    def row_loss(self, ce: Tensor, log_sum: Tensor, V: int, options: LossOptions) -> Tensor:
        loss = ce
        if self.total is not None:
            loss = loss + options.label_smoothing * ((self.z_label - self.maximum) - self.total / V)
        if options.z_loss:
            loss = loss + options.z_loss * (self.maximum + log_sum) ** 2
        return loss


def _split(column: Tensor | None, sizes: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if column is None else column.split(sizes)


def _softmax_pass(z: Tensor, y: Tensor, into: _Sums) -> Tensor:
    """Compute the statistics of z [rows, V] with labels y [rows, 1]; z becomes exp(z - maximum)."""
    torch.gather(z, 1, y, out=into.z_label)
    torch.amax(z, 1, keepdim=True, out=into.maximum)
    if into.argmax is not None:
        torch.argmax(z, 1, out=into.argmax)
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
    def of(cls, g: Tensor, V: int, options: LossOptions) -> "_Terms":
        e = options.label_smoothing
        return cls(g * (e - 1), g * (e / V) if e else None)

    def split(self, sizes: list[int]) -> "Iterator[_Terms]":
        return (_Terms(*columns) for columns in zip(*(_split(column, sizes) for column in self), strict=True))

    def gradient(self, e: Tensor, y: Tensor, scale: Tensor, slope: Tensor | None) -> Tensor:
        """Replace a block's e = exp(z - maximum) by the gradient of its logits."""
        dz = e.mul_(scale)
        if self.uniform is not None:
            dz.sub_(self.uniform)
        dz.scatter_add_(1, y, self.on_label)
        return dz if slope is None else dz.mul_(slope)


def _slope(z: Tensor, softcap: float | None) -> Tensor | None:
    """Return d z / d logit of capped logits z."""
    return None if softcap is None else 1 - (z / softcap).square_()


def forward(
    heads: list[Tensor],  # H x [B, S, V]
    inputs: LossInputs,
    options: LossOptions,
    *,
    with_top1: bool,
    with_d_weights: bool,
) -> ForwardResults:
    """Return out, statistics, and what backward and d loss / d token_weights need."""
    B, S, V = heads[0].shape
    H = len(heads)
    dtype = _accumulator(heads[0])
    label, valid, head_coefficient, coefficient = row_values(inputs, options, H, dtype)
    position, of_head, blocks = _blocks((head_coefficient if with_d_weights else coefficient) != 0, V, dtype)
    y = label.view(-1, H)[position, of_head, None]  # [rows, 1]
    sizes = [block.size for block in blocks]
    buffer = coefficient.new_empty(max(sizes, default=0), V)
    sums = _Sums.zeros(len(y), coefficient, smooth=options.label_smoothing != 0, with_top1=with_top1)
    sequences = _sequences(heads)
    for block, y_, sums_ in zip(blocks, y.split(sizes), sums.split(sizes), strict=True):
        runs = _runs(sequences[block.head], block)
        _softmax_pass(_load(runs, block, buffer.narrow(0, 0, block.size), options.softcap), y_, sums_)
    log_s = sums.log_sum()
    row_ce = (sums.maximum - sums.z_label) + log_s
    loss = sums.row_loss(row_ce, log_s, V, options)

    def scatter(values: Tensor, elsewhere: float = 0) -> Tensor:
        whole = values.new_full((B * S, H), elsewhere)
        whole[position, of_head] = values.flatten()
        return whole.view(B, S, H)

    row_loss = scatter(loss)
    return ForwardResults(
        out=torch.where(coefficient != 0, coefficient * row_loss, 0.0).sum(-1),
        ce=scatter(row_ce),
        row_max=scatter(sums.maximum),
        log_sum=scatter(log_s),
        valid=valid,
        top1=None if sums.argmax is None else scatter(sums.argmax.int(), -1),
        d_row_weights=torch.where(head_coefficient != 0, head_coefficient * row_loss, 0.0) if with_d_weights else None,
    )


def mean(
    out: Tensor,  # [B, S]
    valid: Tensor,  # [B, S, H]
    normalizer: Tensor | None,  # []
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """Return loss and factor, 0-d; both exactly 0 where no row is valid."""
    count = count_terms(valid, options)
    empty = count == 0
    N = normalizer
    if N is None:
        N = count if options.reduction == "mean" else out.new_ones(())
    factor = torch.where(empty, 0.0, options.loss_scale / torch.where(empty, 1, N).to(out.dtype))
    return torch.where(empty, 0.0, out.sum() * factor), factor


def backward(
    d_loss: Tensor,  # [B, S] of any strides
    heads: list[Tensor],  # H x [B, S, V]
    d_heads: list[Tensor],  # H x [B, S, V], every element written; may be the heads themselves
    inputs: LossInputs,
    options: LossOptions,
    row_max: Tensor,  # [B, S, H]
    log_sum: Tensor,  # [B, S, H]
    factor: Tensor,  # []
) -> None:
    """Write the gradient of every logit into d_heads."""
    H, V = len(heads), heads[0].shape[-1]
    dtype = _accumulator(heads[0])
    rows = row_values(inputs, options, H, dtype)
    upstream = (d_loss.to(dtype) * factor)[:, :, None]
    # Where the upstream gradient is 0 the row is masked too, also if its own loss is Inf.
    masked = (rows.coefficient == 0) | (upstream == 0)
    g = torch.where(masked, 0.0, rows.coefficient * upstream)
    position, of_head, blocks = _blocks(~masked, V, dtype)
    y, maximum, log_s, g = (x.view(-1, H)[position, of_head, None] for x in (rows.label, row_max, log_sum, g))
    sizes = [block.size for block in blocks]
    buffer = row_max.new_empty(max(sizes, default=0), V)
    scale = g * torch.exp(-log_s) * (1 + 2 * options.z_loss * (maximum + log_s) if options.z_loss else 1)
    columns = (x.split(sizes) for x in (y, maximum, scale, _Terms.of(g, V, options)))
    sequences, d_sequences = _sequences(heads), _sequences(d_heads)
    for block, y_, maximum_, scale_, terms_ in zip(blocks, *columns, strict=True):
        runs, d_runs = (_runs(x[block.head], block) for x in (sequences, d_sequences))
        workspace = _workspace(d_runs, dtype)
        z = _load(runs, block, buffer.narrow(0, 0, block.size) if workspace is None else workspace, options.softcap)
        slope = _slope(z, options.softcap)
        dz = terms_.gradient(z.sub_(maximum_).exp_(), y_, scale_, slope)
        _copy(d_runs, _split_runs(dz, block))
    for block in _blocks(masked, V, dtype)[2]:
        for run in _runs(d_sequences[block.head], block):
            run.zero_()


def forward_backward(
    logits: Tensor,  # [R, V]
    rows: Rows,
    results: RowResults,
    options: LossOptions,
    *,
    gradient: bool,
) -> None:
    """Write the results of the rows of a chunk, and with `gradient` the gradient over the logits."""
    V = logits.shape[1]
    dtype = _accumulator(logits)
    y, c = rows.label.long()[:, None], rows.coefficient[:, None]
    with_top1 = results.top1 is not None
    sums = _Sums.zeros(len(logits), results.ce, smooth=options.label_smoothing != 0, with_top1=with_top1)
    terms = _Terms.of(c, V, options)
    blocks = logits.split(_block_rows(V, dtype))
    sizes = [len(block) for block in blocks]
    columns = (x.split(sizes) for x in (y, c, sums, terms))
    for block, y_, c_, sums_, terms_ in zip(blocks, *columns, strict=True):
        z = block.to(dtype)
        if options.softcap is not None:
            z.div_(options.softcap).tanh_().mul_(options.softcap)
        slope = _slope(z, options.softcap) if gradient else None
        e = _softmax_pass(z, y_, sums_)
        if gradient:
            scale = c_ / sums_.sums
            if options.z_loss:
                scale *= 1 + 2 * options.z_loss * (sums_.maximum + sums_.sums.log())
            dz = terms_.gradient(e, y_, scale, slope)
            if z is not block:
                block.copy_(dz)
    log_s = sums.log_sum()
    row_ce = (sums.maximum - sums.z_label) + log_s
    loss = sums.row_loss(row_ce, log_s, V, options)
    columns_out = ((results.ce, row_ce), (results.row_loss, loss), (results.lse, sums.maximum + log_s))
    for column, values in columns_out:
        column.copy_(values.squeeze(1).masked_fill_(~rows.row_mask, 0.0))
    if results.top1 is not None and sums.argmax is not None:
        results.top1.copy_(sums.argmax.masked_fill_(~rows.row_mask, -1))
    masked = rows.coefficient == 0
    if gradient and bool(masked.any()):
        logits[masked] = 0.0
