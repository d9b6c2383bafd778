"""The linear path: rows of hidden states, chunk by chunk, through one private buffer of logits.

Math       z  = x W^T + bias                    x: a chunk of rows of hidden, W: unembed, z: its logits
           g  = coefficient * d row / d z       in the place of z (kernels/forward_backward.py)
           dx = g W,  dW += g^T x,  dbias += sum of g over the chunk

Algorithm  Three products a chunk, by torch's GEMM; nothing is computed twice. Where masked rows are dropped, the
           others (`index`) are gathered out of hidden first.

Traffic    Per chunk the logits are written, passed over and read by two products; the sum of dW over chunks is read and
           written once a chunk. Alive at a time: one chunk of logits. `most_rows` weighs the two.

Numerics   Logits are rounded to the dtype of hidden, as those of torch.nn.Linear are, or kept in fp32 (`logits_dtype`);
           g is rounded to the dtype of hidden for the products. dW is summed over chunks in `grad_dtype`, fp32 by
           default, and rounded once; one chunk needs no sum. On a CPU the bf16 product of each chunk is rounded before
           it is added, which costs no more than the rounding of g does.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_ce.kernels.results import RowResults, Rows
from mtp_ce.ops import cpu
from mtp_ce.ops.rows import row_values
from mtp_ce.ops.shards import PendingSums, gather_partials
from mtp_ce.options import LossInputs, LossOptions, VocabShard

# Rows of a GPU's chunk begin at the boundaries of its vectors, and its products want rows by the tile.
GPU_ROW_BYTES, GPU_ROWS = 16, 128
# Rows that make the sum over chunks cheap, as far as their logits fit these bytes; and rows where nothing is summed.
# See `most_rows`.
GPU_SUM_ROWS, GPU_SUM_BYTES, GPU_ROWS_ALONE = 8192, 2**30, 2048
CPU_SUM_ROWS, CPU_SUM_BYTES, CPU_ROWS_ALONE = 512, 64 * 2**20, 256
# Bytes of the blocks of unembed, or of its gradient, that a CPU casts at a time.
CPU_BLOCK_BYTES = 4 * 2**20
# Rows whose distance is a multiple of a page fall on the same lines of a CPU's cache: the products that read them
# take a tenth more time.
CPU_ROW_BYTES = 64
# `drop` where it is not a number of rows.
KEEP_ALL, COUNT = -1, -2


class LinearCall(NamedTuple):
    """How one call of the linear path runs, and which results it wants."""

    with_top1: bool
    with_d_weights: bool
    with_d_hidden: list[bool]  # of each tensor of hidden
    with_d_unembed: bool
    with_d_bias: bool
    chunk_bytes: int | None  # the most bytes of a chunk of logits
    drop: int  # KEEP_ALL rows; COUNT and drop the masked ones; or the number of rows to keep
    grad_dtype: torch.dtype  # of the sum of d_unembed over chunks
    logits_dtype: torch.dtype  # of a chunk
    impl: str  # "triton" or "cpu"

    @property
    def with_gradient(self) -> bool:
        """Whether any gradient of hidden, unembed or bias is wanted."""
        return any(self.with_d_hidden) or self.with_d_unembed or self.with_d_bias

    def without_gradient(self) -> "LinearCall":
        """Return the call of a forward alone."""
        none = [False] * len(self.with_d_hidden)
        return self._replace(with_d_hidden=none, with_d_unembed=False, with_d_bias=False)


class Gradients(NamedTuple):
    """Gradients of the sum of coefficient * row over the rows; None where not wanted."""

    d_hidden: Tensor | None  # [N, D], 0 for a tensor that wants none
    d_unembed: Tensor | None  # [V, D] in `gradient_dtype`, like the bias
    d_bias: Tensor | None  # [V]


class AllRows(NamedTuple):
    """The rows of a call: [N] in row order for the chunks, and as [B,S,H]."""

    rows: Rows
    valid: Tensor  # [B, S, H], like the two below
    head_coefficient: Tensor  # NaN where a valid label is outside [0, V), like the one below
    coefficient: Tensor


def positions(hidden: list[Tensor]) -> tuple[int, int, int]:
    """Return (B, S, H) of one tensor [B,S,H,D], or of H tensors [B,S,D]."""
    B, S = hidden[0].shape[:2]
    return B, S, hidden[0].shape[2] if len(hidden) == 1 else len(hidden)


def in_row_order(x: Tensor, hidden: list[Tensor]) -> Tensor:
    """Return [B,S,H] as [N]: position by position where hidden is one tensor, head by head where it is several."""
    return x.reshape(-1) if len(hidden) == 1 else x.permute(2, 0, 1).reshape(-1)


def from_row_order(x: Tensor, hidden: list[Tensor], B: int, S: int) -> Tensor:
    """Return [N] as [B,S,H]."""
    if len(hidden) == 1:
        return x.view(B, S, hidden[0].shape[2])
    return x.view(len(hidden), B, S).permute(1, 2, 0).contiguous()


def chunks(matrices: list[Tensor], index: Tensor | None, size: int) -> Iterator[Tensor]:
    """Yield the rows of matrices [rows, D] one after the other, or those of index among them, `size` at a time."""
    if index is not None:
        whole = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        for rows in index.split(size) if len(index) else ():  # split of no rows is one part of none
            yield whole.index_select(0, rows)
        return
    pending: list[Tensor] = []
    missing = size
    for matrix in matrices:
        while len(matrix):
            pending.append(matrix[:missing])
            matrix = matrix[missing:]
            missing -= len(pending[-1])
            if missing == 0:
                yield pending[0] if len(pending) == 1 else torch.cat(pending)
                pending, missing = [], size
    if pending:
        yield pending[0] if len(pending) == 1 else torch.cat(pending)


def gradient_dtype(dtype: torch.dtype, grad_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of d_unembed and d_bias: unembed's, but for fp16 that of the sums, which are scaled first."""
    return torch.promote_types(grad_dtype, dtype) if dtype == torch.float16 else dtype


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield blocks of the rows of a matrix, of `CPU_BLOCK_BYTES` each in fp32."""
    size = max(1, CPU_BLOCK_BYTES // (4 * max(1, matrix.shape[1])))
    return (slice(start, start + size) for start in range(0, len(matrix), size))


def write_logits(z: Tensor, x: Tensor, unembed: Tensor, bias: Tensor | None) -> None:
    """Write x unembed^T + bias into z, which has the dtype of x, or fp32."""
    if z.dtype == x.dtype:
        if bias is None:
            torch.mm(x, unembed.t(), out=z)
        else:
            torch.addmm(bias, x, unembed.t(), out=z)
    elif x.is_cuda:
        if bias is not None:
            z.copy_(bias.expand_as(z))
        add_product(z, x, unembed.t(), bias is None)
    else:
        wide = x.to(z.dtype)
        for block in row_blocks(unembed):
            torch.mm(wide, unembed[block].to(z.dtype).t(), out=z[:, block])
        if bias is not None:
            z += bias


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Add a b to the total, or set the total to it where it is the first, in the dtype of the total."""
    if total.dtype == a.dtype:
        if first:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)
    elif a.is_cuda and total.dtype == torch.float32:
        # Half inputs, fp32 sums: the product of the tensor cores is never rounded to the inputs' dtype.
        if first:
            torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
        else:
            torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    elif a.dtype == torch.bfloat16 and total.dtype == torch.float32:
        # A CPU multiplies bf16 up to ten times as fast as fp32. Each product is added while it is in cache.
        for block in row_blocks(total):
            if first:
                total[block] = torch.mm(a[block], b)
            else:
                total[block] += torch.mm(a[block], b)
    else:
        add_product(total, a.to(total.dtype), b.to(total.dtype), first)


def select(row_mask: Tensor, drop: int) -> Tensor | None:
    """Return the rows [M] to compute: all (None), those of row_mask (one sync), or `drop` rows, those of it first."""
    if drop == KEEP_ALL:
        return None
    if drop == COUNT:
        return row_mask.nonzero().flatten()
    if row_mask.device.type == "cpu" and int(row_mask.sum()) > drop:
        raise ValueError(
            f"drop_dead_rows is {drop}, and {int(row_mask.sum())} rows are live; expected at least that many, or True, "
            "which counts them."
        )
    return torch.argsort(~row_mask, stable=True)[:drop]


def largest(x: Tensor) -> Tensor:  # [N]
    """Return the largest finite magnitude [], 1 where all are 0."""
    finite = torch.where(x.isfinite(), x.abs(), 0.0)
    maximum = torch.cat([finite, finite.new_zeros(1)]).amax()
    return torch.where(maximum == 0, 1.0, maximum)


def fold_factor(coefficient: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return row coefficients [N] for the products, and the scale [] that their gradients lack.

    A factor such as 1/N goes into the coefficients. Not in fp16: products stay in range with coefficients below 1,
    divided by a power of two.
    """
    if dtype != torch.float16:
        return torch.where(coefficient == 0, 0.0, coefficient * factor), torch.ones_like(factor)
    maximum = largest(coefficient)
    power = maximum / torch.frexp(maximum).mantissa
    return coefficient / power, factor * power


class ChunkDtypes(NamedTuple):
    """The dtypes that decide what a row of a chunk costs."""

    logits: torch.dtype
    layer: torch.dtype  # of hidden, unembed and their gradients
    total: torch.dtype | None  # of the sum of d_unembed over chunks; None where no d_unembed is wanted


def skips_the_sum(dtypes: ChunkDtypes) -> bool:
    """Whether d_unembed of one chunk is written in its own dtype straight away: bf16 has the range of the sum."""
    return dtypes.layer == torch.bfloat16 and dtypes.total == torch.float32


def most_rows(M: int, V: int, D: int, dtypes: ChunkDtypes, device: torch.device) -> int:
    """Return the rows of a chunk of M rows in all; M where one chunk takes no more memory than several.

    A model, with l, s and w bytes of an element of the logits (with the copy of g in the dtype of the layer, where
    they are wider), of the sum of d_unembed, and of d_unembed:

        memory of several chunks    max(rows V l + V D s,  V D (s + w))     the chunk is freed before the sum is cast
        memory of one chunk         M V l + V D w                           where it skips the sum
        time of a sum               2 s V D bytes a chunk, beside 6 rows V D operations of its products

    So where the sum is cast, chunks of D w / l rows cost no memory; and one chunk costs none for
    M <= rows + D (s - w) / l. For bf16 these are D, and rows + D. Beside its products the sum takes s F / (3 rows B) of
    the time, for F operations and B bytes a second: 311 / rows on an H100 in bf16 (700e12, 3e12), a third of that in
    fp32, so 8192 rows where they fit 1 GiB. Without a sum fewer rows fill the device: 2048 rows are 16 tiles
    by D / 256.

    Args:
        M: all rows that are computed.
        V: vocabulary size.
        D: hidden size.
        dtypes: of the call.
        device: GPU or CPU.
    """
    cpu = device.type == "cpu"
    element = dtypes.logits.itemsize + (dtypes.layer.itemsize if dtypes.logits != dtypes.layer else 0)
    if dtypes.total is None:
        return CPU_ROWS_ALONE if cpu else GPU_ROWS_ALONE
    rows, room, unit = (CPU_SUM_ROWS, CPU_SUM_BYTES, 1) if cpu else (GPU_SUM_ROWS, GPU_SUM_BYTES, GPU_ROWS)
    rows = max(1, min(rows, room // (V * element)) // unit) * unit
    cast = dtypes.layer.itemsize if dtypes.total != dtypes.layer else 0
    rows = max(rows, -(-D * cast // (element * unit)) * unit)
    saved = dtypes.total.itemsize - dtypes.layer.itemsize if skips_the_sum(dtypes) else 0
    return max(1, M) if rows + D * saved // element >= M else rows


def rows_at_once(M: int, most: int, device: torch.device) -> int:
    """Return the rows of a chunk: at most `most`, in chunks of like sizes."""
    even = -(-M // max(1, -(-M // most)))
    return even if device.type == "cpu" else min(most, -(-even // GPU_ROWS) * GPU_ROWS)


def new_logits(unembed: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Allocate logits [rows, V] of one chunk."""
    V = unembed.shape[0]
    if unembed.device.type == "cpu":
        unit = CPU_ROW_BYTES // dtype.itemsize
        width = (V // unit + 1) * unit
    else:
        unit = GPU_ROW_BYTES // dtype.itemsize
        width = -(-V // unit) * unit
    return unembed.new_empty(rows, width, dtype=dtype)[:, :V]


def wanted_rows(row_mask: Tensor, M: int, call: LinearCall) -> list[tuple[int, int]]:
    """Return the runs (start, end) of the M computed rows whose tensor of hidden wants a gradient."""
    wants = call.with_d_hidden
    if not any(wants):
        return []
    # How many of a head's rows are among a given number of rows, only the GPU knows.
    if all(wants) or (call.drop >= 0 and row_mask.is_cuda):
        return [(0, M)]
    # Computed rows are head by head, as the rows are.
    whole = call.drop == KEEP_ALL
    counts = [M // len(wants)] * len(wants) if whole else row_mask.view(len(wants), -1).sum(1).tolist()
    runs: list[tuple[int, int]] = []
    end = 0
    for count, wanted in zip(counts, wants, strict=True):
        start, end = end, end + count
        if wanted and runs and runs[-1][1] == start:
            runs[-1] = runs[-1][0], end
        elif wanted:
            runs.append((start, end))
    return runs


def run_chunks(
    hidden: list[Tensor],  # one [B, S, H, D], or H x [B, S, D]
    unembed: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    rows: Rows,
    terms: Tensor | None,  # [4], as in `LossInputs`
    options: LossOptions,
    call: LinearCall,
    shard: VocabShard,
) -> tuple[RowResults, Gradients]:
    """Compute the results of the rows [N] and the gradients, chunk by chunk."""
    (V, D), device = unembed.shape, unembed.device
    # The ranks exchange results chunk by chunk, so that their chunks have the same rows.
    V_most = shard.largest
    index = select(rows.row_mask, call.drop)
    selected = rows if index is None else Rows(*(x[index] for x in rows))
    N, M = len(rows.label), len(selected.label)
    new = unembed.new_empty
    ce, row_loss, lse = (rows.coefficient.new_empty(M) for _ in range(3))
    results = RowResults(ce, row_loss, lse, new(M, dtype=torch.int32) if call.with_top1 else None)

    total_dtype = torch.promote_types(call.grad_dtype, unembed.dtype)
    dtypes = ChunkDtypes(call.logits_dtype, unembed.dtype, total_dtype if call.with_d_unembed else None)
    most = most_rows(M, V_most, D, dtypes, device)
    if call.chunk_bytes is not None:
        most = call.chunk_bytes // (V_most * call.logits_dtype.itemsize)
    buffer = new_logits(unembed, rows_at_once(M, most, device), call.logits_dtype)
    wanted = wanted_rows(rows.row_mask, M, call)
    d_hidden = None
    if any(call.with_d_hidden):
        whole = index is None and all(call.with_d_hidden)
        d_hidden = new(N, D) if whole else unembed.new_zeros(N, D)
    d_unembed = None
    if call.with_d_unembed:
        alone = len(buffer) >= M and skips_the_sum(dtypes)
        d_unembed = new(V, D, dtype=unembed.dtype if alone else total_dtype)
        if M == 0:
            d_unembed.zero_()
    d_bias = unembed.new_zeros(V, dtype=total_dtype) if call.with_d_bias else None

    forward_backward = _chunk_function(terms, call, shard)
    sums = PendingSums(shard)
    start = 0
    for x in chunks([x.reshape(-1, D) for x in hidden], index, max(1, len(buffer))):
        span = slice(start, start + len(x))
        chunk_rows = Rows(*(column[span] for column in selected))
        z = buffer[: len(x)]
        write_logits(z, x, unembed, bias)
        chunk_results = RowResults(*(None if column is None else column[span] for column in results))
        runs = [(max(a, start), min(b, span.stop)) for a, b in wanted if a < span.stop and b > start]
        gradient = bool(runs) or call.with_d_unembed or call.with_d_bias
        forward_backward(z, chunk_rows, chunk_results, options, gradient=gradient)
        if d_bias is not None:
            d_bias += z.sum(0, dtype=total_dtype)
        g = z.to(unembed.dtype) if runs or call.with_d_unembed else z
        for a, b in runs:
            if d_hidden is None:
                continue
            to = None if index is None else index[a:b]
            product = d_hidden[a:b] if to is None else new(b - a, D)
            torch.mm(g[a - start : b - start], unembed, out=product)
            if shard.ranks > 1:
                sums.add(product, d_hidden, to)
            elif to is not None:
                d_hidden.index_copy_(0, to, product)
        if d_unembed is not None:
            moves = chunk_rows.coefficient != 0
            # A masked row of x, NaN or not, meets a gradient of zeros in this product, and 0 * NaN is not 0. A GPU is
            # not asked whether there is one: that would wait for it.
            if x.device.type != "cpu" or not bool(moves.all()):
                x = torch.where(moves[:, None], x, 0.0)
            add_product(d_unembed, g.t(), x, start == 0)
        start += len(x)

    sums.finish()
    # The chunk is freed before the sums are cast: the copy takes its room.
    buffer = z = g = unembed.new_empty(0)
    last_dtype = gradient_dtype(unembed.dtype, call.grad_dtype)
    d_unembed, d_bias = (None if x is None else x.to(last_dtype) for x in (d_unembed, d_bias))
    if index is not None:
        ce, row_loss, lse = (x.new_zeros(N).index_copy_(0, index, x) for x in results[:3])
        top1 = None if results.top1 is None else results.top1.new_full((N,), -1).index_copy_(0, index, results.top1)
        results = RowResults(ce, row_loss, lse, top1)
    return results, Gradients(d_hidden, d_unembed, d_bias)


def _chunk_function(terms: Tensor | None, call: LinearCall, shard: VocabShard) -> Callable[..., None]:
    """Return what writes the results of a chunk's rows, and the gradient over its logits."""
    of_ranks = shard if shard.ranks > 1 else None
    if call.impl == "cpu":
        return partial(cpu.forward_backward, shard=of_ranks)
    from mtp_ce.kernels.forward_backward import launch_forward_backward

    if of_ranks is None:
        return partial(launch_forward_backward, terms=terms)
    from mtp_ce.kernels.shards import launch_shard

    return partial(launch_shard, terms=terms, shard=shard, gather=partial(gather_partials, shard=shard))


def compute_rows(hidden: list[Tensor], V: int, inputs: LossInputs, options: LossOptions, call: LinearCall) -> AllRows:
    """Return everything that is known of the rows before any logit."""
    B, S, H = positions(hidden)
    if call.impl == "triton":
        from mtp_ce.kernels.rows import launch_rows

        outputs = launch_rows(
            inputs, options, (B, S, H), V=V, by_head=len(hidden) > 1, with_d_weights=call.with_d_weights
        )
        valid, head_coefficient, coefficient = (
            from_row_order(x, hidden, B, S) for x in (outputs.valid, outputs.head_coefficient, outputs.coefficient)
        )
        rows = Rows(outputs.label, outputs.coefficient, outputs.row_mask)
        return AllRows(rows, valid, head_coefficient, coefficient)
    dtype = torch.float64 if hidden[0].dtype == torch.float64 else torch.float32
    label, valid, head_coefficient, coefficient = row_values(inputs, options, S, H, dtype)
    broken = valid & ((label < 0) | (label >= V))
    head_coefficient, coefficient = (
        torch.where(broken & (x != 0), float("nan"), x) for x in (head_coefficient, coefficient)
    )
    label = torch.where(broken, -1, torch.where(valid, label, 0)).int()
    row_mask = (head_coefficient if call.with_d_weights else coefficient) != 0
    rows = Rows(*(in_row_order(x, hidden) for x in (label, coefficient, row_mask)))
    return AllRows(rows, valid, head_coefficient, coefficient)
