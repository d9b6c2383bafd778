"""Weighted cross entropy of a private slab of logits, and its gradient in their place: the linear path's kernel.

Math       ce, row and dx of a row as in forward.py and backward.py, with the coefficient c of the row given:
           dx[v] = c * d row / d x[v]

Shapes     slab [R,V] of unit column stride; label [R] int32, coefficient [R] fp32, read [R] bool
           -> ce, row_loss, lse [R] fp32, top1 [R] int32; the slab becomes the gradient where one is wanted

Algorithm  One program owns a row. The first visit is visit.py's and asks the cache to keep what it reads; the second
           is backward.py's, in reverse order, since the tiles that were read last are still there, and asks it to
           keep nothing. A row that is not read becomes zeros.

Traffic    live rows * V * itemsize read twice, the second time from L2 as far as it holds them; all rows written once.
           Forward alone: read once. See `traffic`.

Numerics   As in forward.py and backward.py. The coefficient leaves out 1/N: in fp16 the gradient would underflow.
"""

import torch
import triton
import triton.language as tl

from mtp_ce.kernels.backward import write_row
from mtp_ce.kernels.tiles import WARP_SIZE, backward_tile, slab_tile
from mtp_ce.kernels.visit import pack_heads, row_layout, visit_row


@triton.jit
def forward_backward_kernel(
    slab_ptr,
    stride_r,
    label_ptr,
    coefficient_ptr,
    read_ptr,
    ce_ptr,
    row_loss_ptr,
    lse_ptr,
    top1_ptr,  # None where not wanted
    V,
    softcap,
    z_loss,
    label_smoothing,
    GRADIENT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PLAIN: tl.constexpr,
    SMOOTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    VEC: tl.constexpr,
    STRIPS: tl.constexpr,
    GRADIENT_STRIPS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Row r = program id."""
    r = tl.program_id(0).to(tl.int64)
    row_ptr = slab_ptr + r * stride_r
    label = tl.load(label_ptr + r)
    row_max = 0.0
    log_sum = 0.0
    ce = 0.0
    row_loss = 0.0
    best = -1
    g = 0.0
    if tl.load(read_ptr + r):
        row_max, row_sum, label_logit, _entries, base, total, best = visit_row(
            row_ptr,
            1,
            V,
            label,
            0,
            1,
            softcap,
            HAS_SOFTCAP,
            SMOOTH,
            top1_ptr is not None,
            ALIGNED,
            VEC,
            STRIPS,
            THREADS,
            False,
            "evict_last" if GRADIENT else "",
        )
        log_sum = tl.log(row_sum)
        ce = (row_max - label_logit) + log_sum
        row_loss = ce
        if not PLAIN:
            lse = row_max + log_sum
            row_loss += z_loss * lse * lse
            if SMOOTH:
                row_loss += label_smoothing * ((label_logit - base) - total / V)
        g = tl.load(coefficient_ptr + r)
    tl.store(ce_ptr + r, ce)
    tl.store(row_loss_ptr + r, row_loss)
    tl.store(lse_ptr + r, row_max + log_sum)
    if top1_ptr is not None:
        tl.store(top1_ptr + r, best)
    if GRADIENT:
        write_row(
            row_ptr,
            1,
            row_ptr,
            1,
            V,
            label,
            row_max,
            log_sum,
            g,
            0,
            1,
            softcap,
            z_loss,
            label_smoothing,
            HAS_SOFTCAP,
            PLAIN,
            ALIGNED,
            True,
            True,
            VEC,
            GRADIENT_STRIPS,
            THREADS,
            False,
            "evict_first",
        )


def launch_forward_backward(
    slab: torch.Tensor,  # [R, V]
    label: torch.Tensor,  # [R] int32, -1 outside [0, V)
    coefficient: torch.Tensor,  # [R] fp32
    read: torch.Tensor,  # [R] bool
    ce: torch.Tensor,  # [R] fp32, written like the two below
    row_loss: torch.Tensor,
    lse: torch.Tensor,
    top1: torch.Tensor | None,  # [R] int32
    *,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    gradient: bool,
) -> None:
    """Write what the rows give, and with `gradient` the gradient over the slab."""
    R, V = slab.shape
    aligned, vec = row_layout(pack_heads([slab[None]]))
    shape = slab_tile(V, slab.element_size(), WARP_SIZE, softcap is not None)
    forward_backward_kernel[(R,)](
        slab,
        slab.stride(0),
        label,
        coefficient,
        read,
        ce,
        row_loss,
        lse,
        top1,
        V,
        1.0 if softcap is None else softcap,
        z_loss,
        label_smoothing,
        GRADIENT=gradient,
        HAS_SOFTCAP=softcap is not None,
        PLAIN=z_loss == 0 and label_smoothing == 0,
        SMOOTH=label_smoothing != 0,
        ALIGNED=aligned,
        VEC=vec,
        STRIPS=shape.strips,
        GRADIENT_STRIPS=backward_tile(V, slab.element_size(), WARP_SIZE).strips,
        THREADS=shape.threads,
        num_warps=shape.num_warps,
    )


def traffic(live_rows: int, all_rows: int, V: int, itemsize: int, gradient: bool) -> tuple[int, int]:
    """Bytes of the slab read, counted as often as the kernel asks for them, and bytes of gradient written."""
    visits = 2 if gradient else 1
    return visits * live_rows * V * itemsize, all_rows * V * itemsize if gradient else 0
