"""Weighted cross entropy of one chunk of logits, and its gradient in their place: the linear path's kernel.

Math       ce, row and dx of a row as in forward.py and backward.py, for a given row coefficient k:
           dx[v] = k * d row / d x[v]

Shapes     logits [R,V] of unit column stride; label [R] int32, coefficient [R] fp32, row_mask [R] bool
           -> ce, row_loss, lse [R] fp32, top1 [R] int32; the gradient [R,V] replaces the logits where it is wanted

Algorithm  One program owns a row. The first pass is the online softmax and asks the cache to keep what it reads; the
           second writes the gradient as backward.py does, in reverse order, since the last tiles are still cached,
           and asks it to keep nothing. A row outside row_mask is filled with zeros.

Traffic    valid rows * V * itemsize read twice, the second time from L2 as far as it holds them; all rows written
           once. Forward alone: read once. See `traffic`.

Numerics   As in forward.py and backward.py. The coefficient leaves out 1/N: in fp16 the gradient would underflow.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mtp_ce.kernels.backward import GradientSettings, write_row_gradient
from mtp_ce.kernels.online_softmax import (
    SoftmaxSettings,
    is_plain,
    loss_terms,
    online_softmax,
    pack_heads,
    row_layout,
    smoothing_loss,
    term,
)
from mtp_ce.kernels.results import RowResults, Rows
from mtp_ce.kernels.tiles import WARP_SIZE, backward_tile, chunk_tile
from mtp_ce.options import LossOptions


class ForwardBackwardSettings(NamedTuple):
    """Compile-time constants of `forward_backward_kernel`."""

    softmax: SoftmaxSettings
    gradient: GradientSettings | None  # None for a forward alone
    PLAIN: bool  # a row's loss is its cross entropy alone


@triton.jit
def forward_backward_kernel(logits_ptr, stride_r, rows, results, V, terms, SETTINGS: tl.constexpr):
    """Row r = program id."""
    SOFTMAX: tl.constexpr = SETTINGS.softmax
    GRADIENT: tl.constexpr = SETTINGS.gradient
    r = tl.program_id(0).to(tl.int64)
    row = (logits_ptr + r * stride_r, 1)
    label = tl.load(rows.label + r)
    row_max = 0.0
    log_sum = 0.0
    ce = 0.0
    row_loss = 0.0
    argmax = -1
    g = 0.0
    if tl.load(rows.row_mask + r):
        row_max, row_sum, label_logit, _entries, base, total, argmax = online_softmax(
            row, V, label, 0, 1, term(terms.softcap, terms.changing, 1), SOFTMAX
        )
        log_sum = tl.log(row_sum)
        ce = (row_max - label_logit) + log_sum
        row_loss = ce
        if not SETTINGS.PLAIN:
            lse = row_max + log_sum
            row_loss += term(terms.z_loss, terms.changing, 2) * lse * lse
            if SETTINGS.softmax.SMOOTH:
                row_loss += smoothing_loss((label_logit - base) - total / V, terms)
        g = tl.load(rows.coefficient + r)
    tl.store(results.ce + r, ce)
    tl.store(results.row_loss + r, row_loss)
    tl.store(results.lse + r, row_max + log_sum)
    if results.top1 is not None:
        tl.store(results.top1 + r, argmax)
    if SETTINGS.gradient is not None:
        write_row_gradient(row, row, V, label, row_max, log_sum, g, 0, 1, terms, GRADIENT)


def launch_forward_backward(
    logits: torch.Tensor,  # [R, V]
    rows: Rows,
    results: RowResults,
    options: LossOptions,
    *,
    gradient: bool,
    terms: torch.Tensor | None = None,  # [4], as in `LossInputs`
) -> None:
    """Write the results of the rows, and with `gradient` the gradient over the logits."""
    R, V = logits.shape
    aligned, vec = row_layout(pack_heads([logits[None]]))
    capped = options.softcap is not None
    tile = chunk_tile(V, logits.element_size(), WARP_SIZE, capped)
    softmax = SoftmaxSettings(
        HAS_SOFTCAP=capped,
        SMOOTH=options.label_smoothing != 0,
        TOP1=results.top1 is not None,
        ALIGNED=aligned,
        VEC=vec,
        STRIPS=tile.strips,
        THREADS=tile.threads,
        SPLIT=False,
        EVICTION="evict_last" if gradient else "",
    )
    second_pass = GradientSettings(
        HAS_SOFTCAP=capped,
        PLAIN=is_plain(options),
        ALIGNED=aligned,
        SAME_ALIGNMENT=True,
        VEC=vec,
        STRIPS=backward_tile(V, logits.element_size(), WARP_SIZE).strips,
        THREADS=tile.threads,
        SPLIT=False,
        REVERSE=True,
        EVICTION="evict_first",
    )
    forward_backward_kernel[(R,)](
        logits,
        logits.stride(0),
        rows,
        results,
        V,
        loss_terms(options, terms),
        SETTINGS=ForwardBackwardSettings(softmax, second_pass if gradient else None, is_plain(options)),
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
    )


def traffic(rows_read: int, all_rows: int, V: int, itemsize: int, gradient: bool) -> tuple[int, int]:
    """Return bytes of logits that the kernel asks for, both passes counted, and bytes of gradient written."""
    passes = 2 if gradient else 1
    return passes * rows_read * V * itemsize, all_rows * V * itemsize if gradient else 0
