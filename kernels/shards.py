"""Weighted cross entropy of one chunk of logits that are one rank's entries of each row, and its gradient in place.

Math       as in forward_backward.py; a row's maximum, sum and label logit are those of all ranks

Shapes     logits [R,V] of unit column stride, rows and results as in forward_backward.py;
           partials [7,R], in the order of `Partials`, and [7,R,ranks] of all ranks

Algorithm  The two passes of forward_backward.py are two kernels, and between them the ranks gather their partial
           results. The first is the online softmax of the rank's entries; the second combines the partial results of a
           row, writes its results, and then the gradient of the rank's entries. A row outside row_mask is filled with
           zeros.

Traffic    valid rows * V * itemsize read twice, all rows written once, as in forward_backward.py; between the passes
           a chunk does not fit the cache. 7 numbers a row written, and 7 a row and rank read. See `traffic`.

Numerics   As in forward.py and backward.py. Every rank combines the same numbers in the same order.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mtp_ce.kernels.backward import GradientSettings, write_row_gradient
from mtp_ce.kernels.forward import NUM_PARTIALS, combine_partials, no_entries, store_partials
from mtp_ce.kernels.online_softmax import (
    SoftmaxSettings,
    is_plain,
    loss_terms,
    online_softmax,
    own_label,
    pack_heads,
    row_layout,
    smoothing_loss,
    term,
)
from mtp_ce.kernels.results import RowResults, Rows
from mtp_ce.kernels.rows import power_of_2
from mtp_ce.kernels.tiles import WARP_SIZE, Tile, backward_tile, forward_tile
from mtp_ce.options import LossOptions, VocabShard


class ShardPartialsSettings(NamedTuple):
    """Compile-time constants of `shard_partials_kernel`."""

    softmax: SoftmaxSettings


class ShardGradientSettings(NamedTuple):
    """Compile-time constants of `shard_gradient_kernel`."""

    gradient: GradientSettings
    WITH_GRADIENT: bool
    SMOOTH: bool
    SPLIT_BLOCK: int  # ranks rounded up to a power of 2


@triton.jit
def shard_partials_kernel(logits_ptr, stride_r, rows, partials_ptr, V, terms, SETTINGS: tl.constexpr):
    """Partial results of row r = program id."""
    SOFTMAX: tl.constexpr = SETTINGS.softmax
    r = tl.program_id(0).to(tl.int64)
    if tl.load(rows.row_mask + r):
        label = own_label(tl.load(rows.label + r), V, terms)
        partials = online_softmax(
            (logits_ptr + r * stride_r, 1), V, label, 0, 1, term(terms.softcap, terms.changing, 1), SOFTMAX
        )
        store_partials(partials_ptr + r, tl.num_programs(0).to(tl.int64), partials, terms, SOFTMAX)


@triton.jit
def shard_gradient_kernel(
    logits_ptr, stride_r, rows, results, partials_ptr, ranks, V, terms, SETTINGS: tl.constexpr
):  # fmt: skip
    """Results and gradient of row r = program id."""
    GRADIENT: tl.constexpr = SETTINGS.gradient
    r = tl.program_id(0).to(tl.int64)
    row = (logits_ptr + r * stride_r, 1)
    row_max = 0.0
    log_sum = 0.0
    ce = 0.0
    row_loss = 0.0
    argmax = -1
    g = 0.0
    if tl.load(rows.row_mask + r):
        row_max, log_sum, label_logit, above_mean, argmax = combine_partials(
            partials_ptr + r * ranks,
            tl.num_programs(0).to(tl.int64) * ranks,
            ranks,
            terms.vocab_size,
            SETTINGS.SMOOTH,
            results.top1 is not None,
            SETTINGS.SPLIT_BLOCK,
        )
        ce = (row_max - label_logit) + log_sum
        row_loss = ce
        if not GRADIENT.PLAIN:
            lse = row_max + log_sum
            row_loss += term(terms.z_loss, terms.changing, 2) * lse * lse
            if SETTINGS.SMOOTH:
                row_loss += smoothing_loss(above_mean, terms)
        g = tl.load(rows.coefficient + r)
    tl.store(results.ce + r, ce)
    tl.store(results.row_loss + r, row_loss)
    tl.store(results.lse + r, row_max + log_sum)
    if results.top1 is not None:
        tl.store(results.top1 + r, argmax)
    if SETTINGS.WITH_GRADIENT:
        label = own_label(tl.load(rows.label + r), V, terms)
        write_row_gradient(row, row, V, label, row_max, log_sum, g, 0, 1, terms, GRADIENT)


def launch_shard(
    logits: torch.Tensor,  # [R, V]
    rows: Rows,
    results: RowResults,
    options: LossOptions,
    *,
    gradient: bool,
    shard: VocabShard,
    gather: Callable[..., torch.Tensor],
    terms: torch.Tensor | None = None,  # [4], as in `LossInputs`
) -> None:
    """Write the results of the rows, and with `gradient` the gradient over the logits.

    Args:
        logits: this rank's entries.
        rows: whose labels are those of the whole vocabulary.
        results: of all ranks.
        options: of the call.
        gradient: whether it is wanted.
        shard: which entries the logits are.
        gather: returns the partial results [7, R, ranks] of all ranks from those of this one, [7, R].
        terms: numbers that change between calls.
    """
    R, V = logits.shape
    aligned, vec = row_layout(pack_heads([logits[None]]))
    capped, smooth, with_top1 = options.softcap is not None, options.label_smoothing != 0, results.top1 is not None
    first = forward_tile(V, logits.element_size(), WARP_SIZE, capped)
    second: Tile = backward_tile(V, logits.element_size(), WARP_SIZE)
    numbers = loss_terms(options, terms, shard)
    partials = logits.new_empty((NUM_PARTIALS, R), dtype=torch.float32)
    if V:
        softmax = SoftmaxSettings(
            HAS_SOFTCAP=capped,
            SMOOTH=smooth,
            TOP1=with_top1,
            ALIGNED=aligned,
            VEC=vec,
            STRIPS=first.strips,
            THREADS=first.threads,
            SPLIT=False,
            EVICTION="",
        )
        shard_partials_kernel[(R,)](
            logits,
            logits.stride(0),
            rows,
            partials,
            V,
            numbers,
            SETTINGS=ShardPartialsSettings(softmax),
            num_warps=first.num_warps,
            enable_fp_fusion=True,
        )
    else:
        no_entries(partials)
    second_pass = GradientSettings(
        HAS_SOFTCAP=capped,
        PLAIN=is_plain(options),
        ALIGNED=aligned,
        SAME_ALIGNMENT=True,
        VEC=vec,
        STRIPS=second.strips,
        THREADS=second.threads,
        SPLIT=False,
        REVERSE=False,
        EVICTION="",
    )
    shard_gradient_kernel[(R,)](
        logits,
        logits.stride(0),
        rows,
        results,
        gather(partials, smooth=smooth, with_top1=with_top1),
        shard.ranks,
        V,
        numbers,
        SETTINGS=ShardGradientSettings(second_pass, gradient and V > 0, smooth, power_of_2(shard.ranks)),
        num_warps=second.num_warps,
        enable_fp_fusion=True,
    )


def traffic(rows_read: int, all_rows: int, V: int, itemsize: int, gradient: bool) -> tuple[int, int]:
    """Return bytes of one rank's logits that the kernels ask for, and bytes of gradient written."""
    passes = 2 if gradient else 1
    return passes * rows_read * V * itemsize, all_rows * V * itemsize if gradient else 0
