"""The linear path: rows of hidden states, chunk by chunk, through one private buffer of logits.

Math       z  = x W^T + bias                    x: a chunk of rows of hidden, W: unembed, z: its logits
           g  = coefficient * d row / d z       in the place of z (kernels/forward_backward.py)
           dx = g W,  dW += g^T x,  dbias += sum of g over the chunk

Algorithm  Three products a chunk, by torch's GEMM; nothing is computed twice. Where masked rows are dropped, the
           others (`index`) are gathered out of hidden first.

Traffic    Per chunk the logits are written, passed over and read by two products; the gradient of unembed is read and
           written once a chunk, so a chunk has thousands of rows on a GPU. Alive at a time: one chunk of logits.

Numerics   Logits are rounded to the dtype of hidden, as those of torch.nn.Linear are. The gradient of unembed is
           accumulated over chunks in `grad_dtype`, fp32 by default.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_ce.kernels.results import RowResults, Rows
from mtp_ce.ops import cpu
from mtp_ce.ops.rows import row_values
from mtp_ce.options import LossInputs, LossOptions

# Rows of a GPU's chunk begin at the boundaries of its vectors, and its products want rows by the tile.
GPU_ROW_BYTES, GPU_ROWS = 16, 128
# Rows whose distance is a multiple of a page fall on the same lines of a CPU's cache: the products that read them
# take a tenth more time.
CPU_ROW_BYTES = 64
# `drop` where it is not a number of rows.
KEEP_ALL, COUNT = -1, -2


class LinearCall(NamedTuple):
    """How one call of the linear path runs, and which results it wants."""

    with_top1: bool
    with_d_weights: bool
    with_d_hidden: bool
    with_d_unembed: bool
    with_d_bias: bool
    chunk_rows: int  # the most rows of a chunk
    drop: int  # KEEP_ALL rows; COUNT and drop the masked ones; or the number of rows to keep
    grad_dtype: torch.dtype  # of the sum of d_unembed over chunks
    impl: str  # "triton" or "cpu"

    @property
    def with_gradient(self) -> bool:
        """Whether any of the three products of a gradient is wanted."""
        return self.with_d_hidden or self.with_d_unembed or self.with_d_bias

    def without_gradient(self) -> "LinearCall":
        """Return the call of a forward alone."""
        return self._replace(with_d_hidden=False, with_d_unembed=False, with_d_bias=False)


class Gradients(NamedTuple):
    """Gradients for an upstream gradient of 1 and without 1/N; None where not wanted."""

    d_hidden: Tensor | None  # [N, D]
    d_unembed: Tensor | None  # [V, D] in the dtype of its sum, like the bias
    d_bias: Tensor | None  # [V]


class AllRows(NamedTuple):
    """The rows of a call: [N] in row order for the chunks, and as [B,S,H]."""

    rows: Rows
    valid: Tensor  # [B, S, H], like the two below
    head_coefficient: Tensor  # NaN where a valid label is outside [0, V), like the one below
    coefficient: Tensor


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
        for rows in index.split(size):
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


def scaled_down(coefficient: Tensor) -> tuple[Tensor, Tensor]:  # [N]
    """Return coefficients below 1, and the power of two [] that divides them: fp16 products stay in range."""
    maximum = largest(coefficient)
    power = maximum / torch.frexp(maximum).mantissa
    return coefficient / power, power


def rows_at_once(M: int, most: int, device: torch.device) -> int:
    """Return the rows of a chunk: at most `most`, in chunks of like sizes."""
    even = -(-M // max(1, -(-M // most)))
    return even if device.type == "cpu" else min(most, -(-even // GPU_ROWS) * GPU_ROWS)


def new_logits(unembed: Tensor, rows: int) -> Tensor:
    """Allocate logits [rows, V] of one chunk."""
    V = unembed.shape[0]
    if unembed.device.type == "cpu":
        unit = CPU_ROW_BYTES // unembed.element_size()
        width = (V // unit + 1) * unit
    else:
        unit = GPU_ROW_BYTES // unembed.element_size()
        width = -(-V // unit) * unit
    return unembed.new_empty(rows, width)[:, :V]


def run_chunks(
    hidden: list[Tensor],  # one [B, S, H, D], or H x [B, S, D]
    unembed: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    rows: Rows,
    terms: Tensor | None,  # [4], as in `LossInputs`
    options: LossOptions,
    call: LinearCall,
) -> tuple[RowResults, Gradients]:
    """Compute the results of the rows [N] and the gradients, chunk by chunk."""
    D, V = hidden[0].shape[-1], unembed.shape[0]
    index = select(rows.row_mask, call.drop)
    selected = rows if index is None else Rows(*(x[index] for x in rows))
    N, M = len(rows.label), len(selected.label)
    new = unembed.new_empty
    ce, row_loss, lse = (rows.coefficient.new_empty(M) for _ in range(3))
    results = RowResults(ce, row_loss, lse, new(M, dtype=torch.int32) if call.with_top1 else None)
    total_dtype = torch.promote_types(call.grad_dtype, unembed.dtype)
    d_hidden = (new(N, D) if index is None else unembed.new_zeros(N, D)) if call.with_d_hidden else None
    d_unembed = new(V, D, dtype=total_dtype) if call.with_d_unembed else None
    d_bias = unembed.new_zeros(V, dtype=total_dtype) if call.with_d_bias else None
    if d_unembed is not None and M == 0:
        d_unembed.zero_()

    forward_backward: Callable[..., None] = cpu.forward_backward
    if call.impl != "cpu":
        from mtp_ce.kernels.forward_backward import launch_forward_backward

        forward_backward = partial(launch_forward_backward, terms=terms)
    buffer = new_logits(unembed, rows_at_once(M, call.chunk_rows, unembed.device))
    start = 0
    for x in chunks([x.reshape(-1, D) for x in hidden], index, max(1, len(buffer))):
        span = slice(start, start + len(x))
        chunk_rows = Rows(*(column[span] for column in selected))
        z = buffer[: len(x)]
        if bias is None:
            torch.mm(x, unembed.t(), out=z)
        else:
            torch.addmm(bias, x, unembed.t(), out=z)
        chunk_results = RowResults(*(None if column is None else column[span] for column in results))
        forward_backward(z, chunk_rows, chunk_results, options, gradient=call.with_gradient)
        if d_hidden is not None:
            if index is None:
                torch.mm(z, unembed, out=d_hidden[span])
            else:
                d_hidden.index_copy_(0, index[span], torch.mm(z, unembed))
        if d_unembed is not None:
            moves = chunk_rows.coefficient != 0
            # A masked row of x, NaN or not, meets a gradient of zeros in this product, and 0 * NaN is not 0. A GPU is
            # not asked whether there is one: that would wait for it.
            if x.device.type != "cpu" or not bool(moves.all()):
                x = torch.where(moves[:, None], x, 0.0)
            add_product(d_unembed, z.t(), x, start == 0)
        if d_bias is not None:
            d_bias += z.sum(0, dtype=total_dtype)
        start += len(x)

    if index is not None:
        ce, row_loss, lse = (x.new_zeros(N).index_copy_(0, index, x) for x in results[:3])
        top1 = None if results.top1 is None else results.top1.new_full((N,), -1).index_copy_(0, index, results.top1)
        results = RowResults(ce, row_loss, lse, top1)
    return results, Gradients(d_hidden, d_unembed, d_bias)


def compute_rows(hidden: list[Tensor], V: int, inputs: LossInputs, options: LossOptions, call: LinearCall) -> AllRows:
    """Return everything that is known of the rows before any logit."""
    H = hidden[0].shape[2] if len(hidden) == 1 else len(hidden)
    if call.impl == "triton":
        from mtp_ce.kernels.rows import launch_rows

        outputs = launch_rows(inputs, options, H=H, V=V, by_head=len(hidden) > 1, with_d_weights=call.with_d_weights)
        B, S = inputs.labels.shape
        valid, head_coefficient, coefficient = (
            from_row_order(x, hidden, B, S) for x in (outputs.valid, outputs.head_coefficient, outputs.coefficient)
        )
        rows = Rows(outputs.label, outputs.coefficient, outputs.row_mask)
        return AllRows(rows, valid, head_coefficient, coefficient)
    dtype = torch.float64 if hidden[0].dtype == torch.float64 else torch.float32
    label, valid, head_coefficient, coefficient = row_values(inputs, options, H, dtype)
    broken = valid & ((label < 0) | (label >= V))
    head_coefficient, coefficient = (
        torch.where(broken & (x != 0), float("nan"), x) for x in (head_coefficient, coefficient)
    )
    label = torch.where(broken, -1, torch.where(valid, label, 0)).int()
    row_mask = (head_coefficient if call.with_d_weights else coefficient) != 0
    rows = Rows(*(in_row_order(x, hidden) for x in (label, coefficient, row_mask)))
    return AllRows(rows, valid, head_coefficient, coefficient)
