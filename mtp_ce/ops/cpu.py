"""Weighted multi-token cross entropy on a CPU: a few rows at a time, in a buffer that stays in cache.

Math       as in kernels/forward.py, kernels/backward.py and kernels/forward_backward.py

Shapes     H tensors [B,S,V] of any strides, or a chunk of logits [R,V]; results like those of the Triton launchers

Algorithm  The rows that count are copied in blocks of 512 KiB a thread into one private buffer, where every pass
           (softcap, maximum, exp, sum, gradient) runs. The logits are read once and the gradient written once; where
           the gradient has the dtype of the passes, they run in its memory from the first one on.

Traffic    Main memory sees what the kernels' `traffic` says. Memory beyond the gradient: a block, two with a softcap.

Numerics   fp32 (float64 for float64 logits). The maximum and the log of the sum are kept apart, as in the kernels. The
           maximum is subtracted before the factor log2 e of exp2: that difference is exact, whatever the logits' size.
"""

import ctypes
import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_ce.kernels.results import ForwardResults, Partials, RowResults, Rows
from mtp_ce.ops.rows import count_terms, row_values
from mtp_ce.ops.shards import gather_partials, merge
from mtp_ce.options import LossInputs, LossOptions, VocabShard

# For each of at most 32 threads. A core has 1 to 2 MiB of L2; past half of that, sums slow down threefold.
BLOCK_BYTES = 512 * 1024

# exp(x) = exp2(x log2 e). Tensor.exp_ is MKL's where torch has it: on Intel 0.15 ns an element, but 8 to 15 where the
# result underflows to 0 and 35 or more where it is denormal; on AMD 0.8 and 11 to 30. exp2_ is SLEEF's: on Intel 0.25,
# 0.25 and 3, and the pass for the factor takes 0.08. So on Intel exp_ takes the rows where nothing underflows, as every
# 512th entry and the largest tell before the first block: a wrong guess costs time alone.
LOG2_E = 1 / math.log(2)
SAMPLED, UNDERFLOW = 512, -87.0
# In the other rows exponentials below 2^-100 are 0, in a pass of 0.1 ns an element: beside a sum of at least 1 they are
# nothing, and as gradients they would be denormal, 10 times as slow.
LEAST_EXPONENT = -100.0


class _Block(NamedTuple):
    """Rows of one head that are computed together."""

    head: int
    runs: list[tuple[int, int, int]]  # b, first t, length
    size: int


def _block_rows(V: int, dtype: torch.dtype) -> int:
    # A multiple of the threads: a reduction gives each of them whole rows.
    return max(1, BLOCK_BYTES // (max(1, V) * dtype.itemsize)) * min(32, torch.get_num_threads())


def _rows_by_head(row_mask: Tensor) -> tuple[Tensor, bytes]:
    """Index (b * S + t) * H + h of the rows marked in row_mask [B,S,H], head by head; and the mask in that order."""
    B, S, H = row_mask.shape
    by_head = row_mask.permute(2, 0, 1).contiguous()
    head, position = by_head.view(H, B * S).nonzero(as_tuple=True)
    # A copy of the memory, which bytes.find scans: torch takes 20 operations to find the runs of rows.
    return torch.add(head, position, alpha=H), ctypes.string_at(by_head.data_ptr(), by_head.numel())


def _blocks(flags: bytes, marked: bytes, shape: tuple[int, int, int], most: int) -> list[_Block]:
    """Blocks of at most `most` rows: those whose flag, of `_rows_by_head`, is `marked`."""
    B, S, H = shape
    other = b"\0" if marked == b"\1" else b"\1"
    blocks: list[tuple[int, list[tuple[int, int, int]]]] = []
    for h in range(H):
        room = 0  # in the last block
        for b in range(B):
            start = (h * B + b) * S
            first = flags.find(marked, start, start + S)
            while first >= 0:
                end = flags.find(other, first, start + S)
                end = start + S if end < 0 else end
                t, length = first - start, end - first
                while length:
                    if room == 0:
                        blocks.append((h, []))
                        room = most
                    fits = min(length, room)
                    blocks[-1][1].append((b, t, fits))
                    t, length, room = t + fits, length - fits, room - fits
                first = flags.find(marked, end, start + S)
    return [_Block(h, runs, sum(length for _, _, length in runs)) for h, runs in blocks]


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
    return _cap(z, softcap)


def _cap(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _load_difference(runs: list[Tensor], block: _Block, z: Tensor, maximum: Tensor) -> Tensor:
    """Write the block's rows minus their maximum [rows, 1] to z [rows, V], in one pass where the dtype is the same."""
    if runs[0].dtype != z.dtype:
        return _load(runs, block, z, None).sub_(maximum)
    for run, column, into in zip(runs, _split_runs(maximum, block), _split_runs(z, block), strict=True):
        torch.sub(run, column, out=into)
    return z


@cache
def prefers_exp() -> bool:
    """Return whether exp_ is faster than exp2_ where nothing underflows: MKL's on a processor of Intel."""
    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return torch.backends.mkl.is_available() and "GenuineIntel" in processor


def _takes_exp2(dtype: torch.dtype) -> bool | None:
    """Return whether rows of logits of a dtype take exp2 in place of exp; None: as `_underflow` tells of each."""
    return None if prefers_exp() and dtype != torch.float64 else dtype != torch.float64


def _underflow(sample: Tensor, maximum: Tensor) -> list[bool]:
    """Whether exp would underflow in rows of these samples [rows, n] and this largest entry [rows, 1]."""
    return (sample < maximum + UNDERFLOW).any(1).tolist()


def _exp2_rows_of_heads(
    heads: list[Tensor],  # H x [B, S, V]
    index: Tensor,  # [rows] of `_rows_by_head`
    y: Tensor,  # [rows, 1]
    maximum: Tensor | None,  # [rows, 1] of the capped logits; None: the largest of the sample and the label's
    softcap: float | None,
) -> list[bool]:
    """Whether each row takes exp2 in place of exp."""
    fixed = _takes_exp2(heads[0].dtype)
    if fixed is not None:
        return [fixed] * len(index)
    H, S = len(heads), heads[0].shape[1]
    position, h = index // H, index % H
    counts = torch.bincount(h, minlength=H).tolist()
    rows = [*zip(heads, *(x.split(counts) for x in (position // S, position % S, y.squeeze(1))), strict=True)]
    sample = _cap(torch.cat([head[..., ::SAMPLED][b, t] for head, b, t, _ in rows]).float(), softcap)
    if maximum is None:
        label = _cap(torch.cat([head[b, t, y_] for head, b, t, y_ in rows]).float(), softcap)
        maximum = torch.maximum(sample.amax(1), label)[:, None]
    return _underflow(sample, maximum)


def _exp2_rows_of_chunk(
    logits: Tensor,  # [rows, V]
    y: Tensor,  # [rows, 1]
    maximum: Tensor | None,  # [rows, 1] of the capped logits; None: the largest of the sample and the label's
    softcap: float | None,
) -> list[bool]:
    """Whether each row takes exp2 in place of exp."""
    fixed = _takes_exp2(logits.dtype)
    if fixed is not None:
        return [fixed] * len(logits)
    sample, label = (_cap(x.to(torch.float32, copy=True), softcap) for x in (logits[:, ::SAMPLED], logits.gather(1, y)))
    return _underflow(sample, torch.maximum(sample.amax(1, keepdim=True), label) if maximum is None else maximum)


def _by_block(marks: list[bool], sizes: list[int]) -> Iterator[list[int]]:
    """Return the marked rows of each block."""
    rows = iter(marks)
    return ([i for i, marked in enumerate(islice(rows, size)) if marked] for size in sizes)


def _exp2_(z: Tensor) -> Tensor:
    return torch.threshold_(z.mul_(LOG2_E), LEAST_EXPONENT, -math.inf).exp2_()


def _exp_(z: Tensor, exp2_rows: list[int]) -> Tensor:
    """Replace z [rows, V], none above 0, by exp(z). How a row is computed follows from that row alone."""
    if not exp2_rows:
        return z.exp_()
    if len(exp2_rows) == len(z):
        return _exp2_(z)
    rows = torch.tensor(exp2_rows)
    underflowing = _exp2_(z.index_select(0, rows))
    return z.index_fill_(0, rows, 0.0).exp_().index_copy_(0, rows, underflowing)


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


class _Sums(NamedTuple):
    """Statistics of rows from one pass, as columns [rows, 1]; of a block of them, as views. None: not wanted."""

    z_label: Tensor
    maximum: Tensor
    sums: Tensor  # of exp(z - maximum)
    total: Tensor | None  # of z - maximum
    argmax: Tensor | None  # int64

    @classmethod
    def zeros(cls, rows: int, like: Tensor, *, smooth: bool, with_top1: bool) -> "_Sums":
        z_label, maximum, sums = (like.new_zeros(rows, 1) for _ in range(3))
        total = like.new_zeros(rows, 1) if smooth else None
        return cls(z_label, maximum, sums, total, like.new_zeros(rows, 1, dtype=torch.int64) if with_top1 else None)

    def split(self, sizes: list[int]) -> "Iterator[_Sums]":
        return (_Sums(*columns) for columns in zip(*(_split(column, sizes) for column in self), strict=True))

    def over_ranks(self, mine: Tensor, entries: int, shard: VocabShard) -> "_Sums":
        """Combine the statistics of this rank's entries with those of the others.

        Args:
            mine: [rows, 1], whether the label is one of the entries.
            entries: their number.
            shard: of this rank.
        """
        if not len(self.sums):
            return self
        nothing = torch.full_like(mine, entries == 0) | (self.maximum == float("-inf"))
        maximum = self.maximum.masked_fill(nothing, float("-inf"))
        columns = [maximum, self.sums.masked_fill(nothing, 0.0), torch.where(mine, self.z_label, 0.0)]
        smooth, with_top1 = self.total is not None, self.argmax is not None
        if self.total is not None:
            total = self.total.masked_fill(nothing, float("-inf") if entries else 0.0)
            columns += [torch.full_like(total, entries), maximum.masked_fill(nothing, 0.0), total]
        else:
            columns += [maximum] * 3
        index = columns[0]
        if self.argmax is not None:
            index = (self.argmax + shard.vocab_start).to(torch.int32 if maximum.itemsize == 4 else torch.int64)
        partials = torch.stack([*columns, index.view(maximum.dtype)]).squeeze(2)
        gathered = gather_partials(partials, shard, smooth=smooth, with_top1=with_top1)
        row = merge(Partials(*gathered), smooth=smooth, with_top1=with_top1)
        argmax = None if row.argmax is None else row.argmax.long()
        return _Sums(row.label_logit, row.maximum, row.row_sum, row.total, argmax)

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


def _softmax_pass(z: Tensor, y: Tensor, into: _Sums, exp2_rows: list[int]) -> Tensor:
    """Compute the statistics of z [rows, V] with labels y [rows, 1]; z becomes exp(z - maximum)."""
    torch.gather(z, 1, y, out=into.z_label)
    if into.argmax is None:
        torch.amax(z, 1, keepdim=True, out=into.maximum)
    else:
        torch.max(z, 1, keepdim=True, out=(into.maximum, into.argmax))  # a third of the time of torch.argmax
    z.sub_(into.maximum)
    if into.total is not None:
        torch.sum(z, 1, keepdim=True, out=into.total)
    torch.sum(_exp_(z, exp2_rows), 1, keepdim=True, out=into.sums)
    return z


class _Terms(NamedTuple):
    """Columns [rows, 1] of dz = scale * exp(z - maximum) + on_label [v = label] - uniform, for row coefficients g."""

    on_label: Tensor
    uniform: Tensor | None  # of label smoothing

    @classmethod
    def of(cls, g: Tensor, V: int, options: LossOptions, mine: Tensor | None = None) -> "_Terms":
        """Of a vocabulary of V; where the label is not `mine`, another rank subtracts it."""
        e = options.label_smoothing
        on_label = g * (e - 1)
        return cls(on_label if mine is None else torch.where(mine, on_label, 0.0), g * (e / V) if e else None)

    def split(self, sizes: list[int]) -> "Iterator[_Terms]":
        return (_Terms(*columns) for columns in zip(*(_split(column, sizes) for column in self), strict=True))

    def gradient(self, e: Tensor, y: Tensor, scale: Tensor, slope: Tensor | None) -> Tensor:
        """Replace a block's e = exp(z - maximum) by the gradient of its logits."""
        dz = e.mul_(scale)
        if self.uniform is not None:
            dz.sub_(self.uniform)
        dz.scatter_add_(1, y, self.on_label)
        return dz if slope is None else dz.mul_(slope)


def _own_labels(y: Tensor, V: int, shard: VocabShard | None) -> tuple[Tensor, Tensor | None]:
    """Return labels [rows, 1] as indices of V local entries, and whether they are there; None: all are."""
    if shard is None:
        return y, None
    own = y - shard.vocab_start
    mine = (own >= 0) & (own < V)
    return torch.where(mine, own, 0), mine


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
    shard: VocabShard | None = None,
) -> ForwardResults:
    """Return out, statistics, and what backward and d loss / d token_weights need."""
    B, S, V = heads[0].shape
    H = len(heads)
    dtype = _accumulator(heads[0])
    label, valid, head_coefficient, coefficient = row_values(inputs, options, S, H, dtype)
    index, flags = _rows_by_head((head_coefficient if with_d_weights else coefficient) != 0)
    blocks = _blocks(flags, b"\1", (B, S, H), _block_rows(V, dtype))
    y, mine = _own_labels(label.reshape(-1, 1).index_select(0, index), V, shard)  # [rows, 1]
    sizes = [block.size for block in blocks]
    exp2_rows = _by_block(_exp2_rows_of_heads(heads, index, y, None, options.softcap) if V else [], sizes)
    buffer = coefficient.new_empty(max(sizes, default=0), V)
    sums = _Sums.zeros(len(y), coefficient, smooth=options.label_smoothing != 0, with_top1=with_top1)
    sequences = _sequences(heads)
    columns = (x.split(sizes) for x in (y, sums))
    for block, y_, sums_, exp2_rows_ in zip(blocks, *columns, exp2_rows, strict=True) if V else ():
        runs = _runs(sequences[block.head], block)
        _softmax_pass(_load(runs, block, buffer.narrow(0, 0, block.size), options.softcap), y_, sums_, exp2_rows_)
    if shard is not None and mine is not None:
        sums, V = sums.over_ranks(mine, V, shard), shard.vocab_size
    log_s = sums.log_sum()
    row_ce = (sums.maximum - sums.z_label) + log_s
    loss = sums.row_loss(row_ce, log_s, V, options)

    def scatter(values: Tensor, elsewhere: float = 0) -> Tensor:
        return values.new_full((B * S * H,), elsewhere).index_copy_(0, index, values.view(-1)).view(B, S, H)

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
    live = valid.any()
    N = normalizer
    if N is None:
        N = count_terms(valid, options) if options.reduction == "mean" else out.new_ones(())
    factor = torch.where(live, options.loss_scale / torch.where(live, N, 1).to(out.dtype), 0.0)
    return torch.where(live, out.sum() * factor, 0.0), factor


def backward(
    d_loss: Tensor,  # [B, S] of any strides
    heads: list[Tensor],  # H x [B, S, V]
    d_heads: list[Tensor],  # H x [B, S, V], every element written; may be the heads themselves
    inputs: LossInputs,
    options: LossOptions,
    row_max: Tensor,  # [B, S, H]
    log_sum: Tensor,  # [B, S, H]
    factor: Tensor,  # []
    shard: VocabShard | None = None,
) -> None:
    """Write the gradient of every logit into d_heads."""
    (B, S, V), H = heads[0].shape, len(heads)
    if V == 0:  # of a rank without entries
        return
    dtype = _accumulator(heads[0])
    rows = row_values(inputs, options, S, H, dtype)
    upstream = (d_loss.to(dtype) * factor)[:, :, None]
    # Where the upstream gradient is 0 the row is masked too, also if its own loss is Inf.
    masked = (rows.coefficient == 0) | (upstream == 0)
    g = torch.where(masked, 0.0, rows.coefficient * upstream)
    index, flags = _rows_by_head(~masked)
    most = _block_rows(V, dtype)
    blocks = _blocks(flags, b"\1", (B, S, H), most)
    y, maximum, log_s, g = (x.reshape(-1, 1).index_select(0, index) for x in (rows.label, row_max, log_sum, g))
    sizes = [block.size for block in blocks]
    exp2_rows = _by_block(_exp2_rows_of_heads(heads, index, y, maximum, options.softcap), sizes)
    buffer = row_max.new_empty(max(sizes, default=0), V)
    y, mine = _own_labels(y, V, shard)
    terms = _Terms.of(g, V if shard is None else shard.vocab_size, options, mine)
    scale = g * torch.exp(-log_s) * (1 + 2 * options.z_loss * (maximum + log_s) if options.z_loss else 1)
    columns = (x.split(sizes) for x in (y, maximum, scale, terms))
    sequences, d_sequences = _sequences(heads), _sequences(d_heads)
    for block, exp2_rows_, y_, maximum_, scale_, terms_ in zip(blocks, exp2_rows, *columns, strict=True):
        runs, d_runs = (_runs(x[block.head], block) for x in (sequences, d_sequences))
        workspace = _workspace(d_runs, dtype)
        z = buffer.narrow(0, 0, block.size) if workspace is None else workspace
        if options.softcap is None:
            slope = None
            _load_difference(runs, block, z, maximum_)
        else:
            slope = _slope(_load(runs, block, z, options.softcap), options.softcap)
            z.sub_(maximum_)
        dz = terms_.gradient(_exp_(z, exp2_rows_), y_, scale_, slope)
        _copy(d_runs, _split_runs(dz, block))
    for block in _blocks(flags, b"\0", (B, S, H), most):
        for run in _runs(d_sequences[block.head], block):
            run.zero_()


def forward_backward(
    logits: Tensor,  # [R, V]
    rows: Rows,
    results: RowResults,
    options: LossOptions,
    *,
    gradient: bool,
    shard: VocabShard | None = None,
) -> None:
    """Write the results of the rows of a chunk, and with `gradient` the gradient over the logits."""
    V = logits.shape[1]
    dtype = _accumulator(logits)
    y, mine = _own_labels(rows.label.long()[:, None], V, shard)
    c = rows.coefficient[:, None]
    with_top1 = results.top1 is not None
    sums = _Sums.zeros(len(logits), results.ce, smooth=options.label_smoothing != 0, with_top1=with_top1)
    terms = _Terms.of(c, V if shard is None else shard.vocab_size, options, mine)
    blocks = logits.split(_block_rows(V, dtype)) if V else ()
    sizes = [len(block) for block in blocks]
    # Passes before those of the other ranks are known must leave the logits as they are.
    buffer = logits.new_empty(max(sizes, default=0), V, dtype=dtype) if shard or logits.dtype != dtype else None
    exp2_rows = _by_block(_exp2_rows_of_chunk(logits, y, None, options.softcap) if V else [], sizes)
    columns = (x.split(sizes) for x in (y, c, sums, terms)) if V else [()] * 4
    for block, exp2_rows_, y_, c_, sums_, terms_ in zip(blocks, exp2_rows, *columns, strict=True):
        z = _cap(block if buffer is None else buffer.narrow(0, 0, len(block)).copy_(block), options.softcap)
        slope = _slope(z, options.softcap) if gradient and shard is None else None
        e = _softmax_pass(z, y_, sums_, exp2_rows_)
        if gradient and shard is None:
            scale = c_ / sums_.sums
            if options.z_loss:
                scale *= 1 + 2 * options.z_loss * (sums_.maximum + sums_.sums.log())
            dz = terms_.gradient(e, y_, scale, slope)
            if buffer is not None:
                block.copy_(dz)
    if shard is not None and mine is not None:
        sums = sums.over_ranks(mine, V, shard)
        if gradient and V and buffer is not None:
            _second_pass(logits, buffer, (y, c, terms), sums, options)
        V = shard.vocab_size
    log_s = sums.log_sum()
    row_ce = (sums.maximum - sums.z_label) + log_s
    loss = sums.row_loss(row_ce, log_s, V, options)
    columns_out = ((results.ce, row_ce), (results.row_loss, loss), (results.lse, sums.maximum + log_s))
    for column, values in columns_out:
        column.copy_(values.squeeze(1).masked_fill_(~rows.row_mask, 0.0))
    if results.top1 is not None and sums.argmax is not None:
        results.top1.copy_(sums.argmax.squeeze(1).masked_fill_(~rows.row_mask, -1))
    masked = rows.coefficient == 0
    if gradient and bool(masked.any()):
        logits[masked] = 0.0


def _second_pass(
    logits: Tensor,  # [R, V]
    buffer: Tensor,
    rows: tuple[Tensor, Tensor, _Terms],  # labels and coefficients [rows, 1], terms
    sums: _Sums,
    options: LossOptions,
) -> None:
    """Write the gradient over logits whose rows have entries on other ranks too."""
    y, c, terms = rows
    scale = c / sums.sums
    if options.z_loss:
        scale *= 1 + 2 * options.z_loss * (sums.maximum + sums.sums.log())
    blocks = logits.split(len(buffer))
    sizes = [len(block) for block in blocks]
    exp2_rows = _by_block(_exp2_rows_of_chunk(logits, y, sums.maximum, options.softcap), sizes)
    columns = (x.split(sizes) for x in (y, sums.maximum, scale, terms))
    for block, exp2_rows_, y_, maximum_, scale_, terms_ in zip(blocks, exp2_rows, *columns, strict=True):
        z = _cap(buffer.narrow(0, 0, len(block)).copy_(block), options.softcap)
        slope = _slope(z, options.softcap)
        block.copy_(terms_.gradient(_exp_(z.sub_(maximum_), exp2_rows_), y_, scale_, slope))
