"""The linear path: rows of hidden states, chunk by chunk, through one private slab of logits.

Math       slab = x W^T + bias                    x: a chunk of rows of hidden, W: unembed
           g    = coefficient * d row / d slab    in the slab's place (kernels/forward_backward.py)
           dx = g W,  dW += g^T x,  dbias += sum of g over the chunk

Algorithm  Three products a chunk, by torch's GEMM; nothing is computed twice. Rows that are left out (`index`) are
           gathered out of hidden first, and cost nothing.

Traffic    Per chunk the slab is written, visited and read by two products; the gradient of unembed is read and
           written once a chunk, so a chunk has thousands of rows on a GPU. Alive at a time: one slab.

Numerics   Logits are rounded to the dtype of hidden, as those of torch.nn.Linear are. The gradient of unembed is
           summed over chunks in `grad_dtype`, fp32 unless told otherwise.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_ce.ops import cpu
from mtp_ce.ops.rows import row_coefficients, row_targets

# Rows of a GPU's slab begin at the boundaries of its vectors, and its products want rows by the tile.
GPU_ROW_BYTES, GPU_ROWS = 16, 128
# Rows whose distance is a multiple of a page fall on the same lines of a CPU's cache: the products that walk them
# take a tenth more time.
CPU_ROW_BYTES = 64
# `drop` where it is not a number of rows.
KEEP_ALL, COUNT = -1, -2


class Rows(NamedTuple):
    """What is known of the rows before any logit, [N] in the order of the rows of hidden."""

    label: Tensor  # int32, 0 where the row is not live, -1 outside [0, V)
    coefficient: Tensor
    read: Tensor  # bool


class Products(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    unembed: bool
    bias: bool


class Results(NamedTuple):
    """What the rows gave, [N], and the gradients for an upstream gradient of 1 and without 1/N; None if not wanted."""

    ce: Tensor
    row_loss: Tensor
    lse: Tensor
    top1: Tensor | None
    d_hidden: Tensor | None  # [N, D]
    d_unembed: Tensor | None  # [V, D] in the dtype of its sum, like the bias
    d_bias: Tensor | None  # [V]

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden, unembed and bias."""
        return self.d_hidden, self.d_unembed, self.d_bias


def in_row_order(x: Tensor, hidden: list[Tensor]) -> Tensor:
    """[B,S,H] as [N]: position by position where hidden is one tensor, head by head where it is several."""
    return x.reshape(-1) if len(hidden) == 1 else x.permute(2, 0, 1).reshape(-1)


def from_row_order(x: Tensor, hidden: list[Tensor], B: int, S: int) -> Tensor:
    """[N] as [B,S,H]."""
    if len(hidden) == 1:
        return x.view(B, S, hidden[0].shape[2])
    return x.view(len(hidden), B, S).permute(1, 2, 0).contiguous()


def chunks(parts: list[Tensor], index: Tensor | None, size: int) -> Iterator[Tensor]:
    """The rows of several matrices [rows, D] one after the other, or those of index among them, `size` at a time."""
    if index is not None:
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        for some in index.split(size):
            yield whole.index_select(0, some)
        return
    waiting: list[Tensor] = []
    missing = size
    for part in parts:
        while len(part):
            waiting.append(part[:missing])
            part = part[missing:]
            missing -= len(waiting[-1])
            if missing == 0:
                yield waiting[0] if len(waiting) == 1 else torch.cat(waiting)
                waiting, missing = [], size
    if waiting:
        yield waiting[0] if len(waiting) == 1 else torch.cat(waiting)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Total += a b, or = where it is the first, in the dtype of total."""
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


def select(read: Tensor, drop: int) -> Tensor | None:
    """The rows [M] that are worked on: all (None), those that are read (one sync), or `drop` rows, read ones first."""
    if drop == KEEP_ALL:
        return None
    if drop == COUNT:
        return read.nonzero().flatten()
    if read.device.type == "cpu" and int(read.sum()) > drop:
        raise ValueError(
            f"drop_dead_rows is {drop}, and {int(read.sum())} rows are live; expected at least that many, or True, "
            "which counts them."
        )
    return torch.argsort(~read, stable=True)[:drop]


def largest(x: Tensor) -> Tensor:  # [N]
    """The largest finite magnitude [], 1 where all are 0."""
    finite = torch.where(x.isfinite(), x.abs(), 0.0)
    found = torch.cat([finite, finite.new_zeros(1)]).amax()
    return torch.where(found == 0, 1.0, found)


def scaled_down(coefficient: Tensor) -> tuple[Tensor, Tensor]:  # [N]
    """Coefficients below 1, and the power of two [] that they were divided by: fp16 products stay in their range."""
    most = largest(coefficient)
    power = most / torch.frexp(most).mantissa
    return coefficient / power, power


def rows_at_once(M: int, most: int, device: torch.device) -> int:
    """At most `most` rows a chunk, in chunks of like sizes."""
    even = -(-M // max(1, -(-M // most)))
    return even if device.type == "cpu" else min(most, -(-even // GPU_ROWS) * GPU_ROWS)


def make_slab(unembed: Tensor, rows: int) -> Tensor:
    """Room for logits [rows, V]."""
    V = unembed.shape[0]
    if unembed.device.type == "cpu":
        unit = CPU_ROW_BYTES // unembed.element_size()
        width = (V // unit + 1) * unit
    else:
        unit = GPU_ROW_BYTES // unembed.element_size()
        width = -(-V // unit) * unit
    return unembed.new_empty(rows, width)[:, :V]


def run(
    hidden: list[Tensor],  # one [B, S, H, D], or H x [B, S, D]
    unembed: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    rows: Rows,
    products: Products,
    *,
    drop: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    with_top1: bool,
    chunk_rows: int,
    grad_dtype: torch.dtype,
    impl: str,
) -> Results:
    """Walk the rows in chunks."""
    D, V = hidden[0].shape[-1], unembed.shape[0]
    parts = [x.reshape(-1, D) for x in hidden]
    index = select(rows.read, drop)
    selected = rows if index is None else Rows(*(x[index] for x in rows))
    N, M = len(rows.label), len(selected.label)
    gradient = any(products)
    new = unembed.new_empty
    ce, row_loss, lse = (rows.coefficient.new_empty(M) for _ in range(3))
    top1 = new(M, dtype=torch.int32) if with_top1 else None
    total_dtype = torch.promote_types(grad_dtype, unembed.dtype)
    d_hidden = (new(N, D) if index is None else unembed.new_zeros(N, D)) if products.hidden else None
    d_unembed = new(V, D, dtype=total_dtype) if products.unembed else None
    d_bias = unembed.new_zeros(V, dtype=total_dtype) if products.bias else None
    if d_unembed is not None and M == 0:
        d_unembed.zero_()

    if impl == "cpu":
        visit = cpu.forward_backward
    else:
        from mtp_ce.kernels.forward_backward import launch_forward_backward as visit
    slab = make_slab(unembed, rows_at_once(M, chunk_rows, unembed.device))
    start = 0
    for x in chunks(parts, index, max(1, len(slab))):
        here = slice(start, start + len(x))
        label, coefficient, read = (column[here] for column in selected)
        z = slab[: len(x)]
        if bias is None:
            torch.mm(x, unembed.t(), out=z)
        else:
            torch.addmm(bias, x, unembed.t(), out=z)
        visit(
            z, label, coefficient, read, ce[here], row_loss[here], lse[here], None if top1 is None else top1[here],
            softcap=softcap, z_loss=z_loss, label_smoothing=label_smoothing, gradient=gradient,
        )  # fmt: skip
        if d_hidden is not None:
            if index is None:
                torch.mm(z, unembed, out=d_hidden[here])
            else:
                d_hidden.index_copy_(0, index[here], torch.mm(z, unembed))
        if d_unembed is not None:
            alive = coefficient != 0
            # A dead row, read or not, meets zeros in this product, and 0 * NaN is not 0. A GPU is not asked whether
            # there is one.
            if x.device.type != "cpu" or not bool(alive.all()):
                x = torch.where(alive[:, None], x, 0.0)
            add_product(d_unembed, z.t(), x, start == 0)
        if d_bias is not None:
            d_bias += z.sum(0, dtype=total_dtype)
        start += len(x)

    if index is not None:
        ce, row_loss, lse = (x.new_zeros(N).index_copy_(0, index, x) for x in (ce, row_loss, lse))
        top1 = None if top1 is None else top1.new_full((N,), -1).index_copy_(0, index, top1)
    return Results(ce, row_loss, lse, top1, d_hidden, d_unembed, d_bias)


def find_rows(
    hidden: list[Tensor],
    V: int,
    labels: Tensor,
    token_weights: Tensor | None,
    head_weights: Tensor | None,
    seq_lens: Tensor | None,
    document_ids: Tensor | None,
    shift: int,
    over_horizon: bool,
    target_weights: bool,
    ignore_index: int,
    with_shares: bool,
    impl: str,
) -> tuple[Rows, Tensor, Tensor, Tensor]:
    """The rows in row order; live, share and coefficient [B,S,H], NaN where a live label is outside [0, V)."""
    H = hidden[0].shape[2] if len(hidden) == 1 else len(hidden)
    if impl == "triton":
        from mtp_ce.kernels.rows import launch_rows

        label, coefficient, share, live, read = launch_rows(
            labels, token_weights, head_weights, seq_lens, document_ids,
            H=H, V=V, by_head=len(hidden) > 1, shift=shift, over_horizon=over_horizon, target_weights=target_weights,
            ignore_index=ignore_index, with_shares=with_shares,
        )  # fmt: skip
        B, S = labels.shape
        live, share, by_position = (from_row_order(x, hidden, B, S) for x in (live, share, coefficient))
        return Rows(label, coefficient, read), live, share, by_position
    dtype = torch.float64 if hidden[0].dtype == torch.float64 else torch.float32
    place, label, live = row_targets(labels, seq_lens, document_ids, H=H, shift=shift, ignore_index=ignore_index)
    share, coefficient = row_coefficients(
        place, live, token_weights, head_weights, over_horizon=over_horizon, target_weights=target_weights, dtype=dtype
    )
    broken = live & ((label < 0) | (label >= V))
    share, coefficient = (torch.where(broken & (x != 0), float("nan"), x) for x in (share, coefficient))
    label = torch.where(broken, -1, torch.where(live, label, 0)).int()
    read = (share if with_shares else coefficient) != 0
    return Rows(*(in_row_order(x, hidden) for x in (label, coefficient, read))), live, share, coefficient
