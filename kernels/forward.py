"""Weighted multi-token cross entropy of one position: one visit to each live logit.

Math       lse[r]  = log sum_v exp z[r,v]            r = (b, t, h), z after the softcap; nats
           ce[r]   = lse[r] - z[r, label(r)]
           row[r]  = lse - (1-e) z[label] - e mean_v z + c lse^2        label smoothing e, z-loss c; = ce without
           out[p]  = sum_h coefficient[r] * row[r]                      p = (b, t), coefficient as in rows.py

Shapes     heads: logits of any strides, as in visit.py; rows as in rows.py
           -> out [B,S], ce, row_max, log_sum [B,S,H] fp32, live [B,S,H] bool, top1 [B,S,H] int32, shares [B,S,H] fp32

Algorithm  One program owns a position. It learns its coefficients from H labels, then walks the vocabulary of each
           head that counts, as visit.py does it. A head that is not live, or whose coefficient is 0, is not read at
           all (with shares wanted: whose share is 0). Where positions are too few to fill the device, `splits` programs
           share one, each with a part of every row's tiles; what they learn meets in `combine_kernel`.

Traffic    live rows * V * itemsize read once; 1 + 16 H bytes and more a position written. See `traffic`.

Numerics   Every sum in fp32. The maximum and the log of the sum are kept apart: their sum loses 1e-3 at logits of 1e4,
           and with it the gradient. A row of -inf everywhere gives lse = -inf. A label outside [0, V) gives NaN.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from mtp_ce.kernels.rows import pack_rows, pick, power_of_2, row_coefficients
from mtp_ce.kernels.tiles import WARP_SIZE, forward_tile, processors, row_splits
from mtp_ce.kernels.visit import INT32_MAX, pack_heads, row_layout, row_of, scaled_exp, visit_row

# What a part of a row tells `combine_kernel`, each a float: maximum, sum, the label's logit, entries, base, total,
# and argmax, bit for bit.
LEARNT = 7


class Results(NamedTuple):
    """What a forward writes of positions and of rows; None where not wanted."""

    out: Any  # [B, S]
    ce: Any  # [B, S, H], like all below
    row_max: Any
    log_sum: Any
    live: Any
    top1: Any
    shares: Any


@triton.jit
def row_counts(results, share, coefficient):
    """The row is read."""
    counts = coefficient != 0.0
    if results.shares is not None:
        # d loss / d w is the row's loss, so a weight of 0 that wants a gradient is read too.
        counts = share != 0.0
    return counts


@triton.jit
def write_row_results(
    results,
    r,
    share,
    coefficient,
    row_max,
    log_sum,
    label_logit,
    above_mean,
    best,
    z_loss,
    label_smoothing,
    PLAIN: tl.constexpr,
):
    """The results of row r, and its term of the position's sum; zeros give zeros."""
    ce = (row_max - label_logit) + log_sum
    row_loss = ce
    if not PLAIN:
        lse = row_max + log_sum
        row_loss += z_loss * lse * lse + label_smoothing * above_mean
    tl.store(results.ce + r, ce)
    tl.store(results.row_max + r, row_max)
    tl.store(results.log_sum + r, log_sum)
    if results.top1 is not None:
        tl.store(results.top1 + r, best)
    if results.shares is not None:
        tl.store(results.shares + r, tl.where(share != 0.0, share * row_loss, 0.0))
    return tl.where(coefficient != 0.0, coefficient * row_loss, 0.0)


@triton.jit
def forward_kernel(
    heads,
    rows,
    results,
    parts_ptr,  # [LEARNT, B * S * H, splits], None where nobody shares a row
    splits,
    S,
    V,
    ignore_index,
    softcap,
    z_loss,
    label_smoothing,
    SHIFT: tl.constexpr,
    H: tl.constexpr,
    H_BLOCK: tl.constexpr,
    OVER_HORIZON: tl.constexpr,
    TARGET_WEIGHTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PLAIN: tl.constexpr,
    SMOOTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    VEC: tl.constexpr,
    STRIPS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Losses and statistics of position p = program id, or what one part of its rows says."""
    SHARED: tl.constexpr = parts_ptr is not None
    p = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    b = p // S
    t = p % S
    offs_h = tl.arange(0, H_BLOCK)
    label, live, share, coefficient = row_coefficients(
        rows, b, t, offs_h, S, V, ignore_index, SHIFT, H, OVER_HORIZON, TARGET_WEIGHTS
    )
    if not SHARED:
        tl.store(results.live + p * H + offs_h, live, mask=offs_h < H)

    out = 0.0
    for h in tl.static_range(H):
        r = p * H + h
        share_h = pick(share, offs_h, h)
        coefficient_h = pick(coefficient, offs_h, h)
        label_h = pick(label, offs_h, h)
        row_max = 0.0
        log_sum = 0.0
        label_logit = 0.0
        above_mean = 0.0
        best = -1
        if row_counts(results, share_h, coefficient_h):
            row_ptr, stride_v = row_of(heads, b, t, h)
            row_max, row_sum, label_logit, entries, base, total, best = visit_row(
                row_ptr,
                stride_v,
                V,
                label_h,
                part,
                splits,
                softcap,
                HAS_SOFTCAP,
                SMOOTH,
                results.top1 is not None,
                ALIGNED,
                VEC,
                STRIPS,
                THREADS,
                SHARED,
                "",
            )
            if not SHARED:
                log_sum = tl.log(row_sum)
                above_mean = (label_logit - base) - total / V
            else:
                part_ptr = parts_ptr + r * splits + part
                field = tl.num_programs(0).to(tl.int64) * H * splits
                tl.store(part_ptr, row_max)
                tl.store(part_ptr + field, row_sum)
                tl.store(part_ptr + 2 * field, label_logit)
                if SMOOTH:
                    tl.store(part_ptr + 3 * field, entries.to(tl.float32))
                    tl.store(part_ptr + 4 * field, base)
                    tl.store(part_ptr + 5 * field, total)
                if results.top1 is not None:
                    tl.store(part_ptr + 6 * field, best.to(tl.float32, bitcast=True))
        if not SHARED:
            out += write_row_results(
                results,
                r,
                share_h,
                coefficient_h,
                row_max,
                log_sum,
                label_logit,
                above_mean,
                best,
                z_loss,
                label_smoothing,
                PLAIN,
            )
    if not SHARED:
        tl.store(results.out + p, out)


@triton.jit
def combine_kernel(
    rows,
    results,
    parts_ptr,
    splits,
    S,
    V,
    ignore_index,
    z_loss,
    label_smoothing,
    SHIFT: tl.constexpr,
    H: tl.constexpr,
    H_BLOCK: tl.constexpr,
    OVER_HORIZON: tl.constexpr,
    TARGET_WEIGHTS: tl.constexpr,
    PLAIN: tl.constexpr,
    SMOOTH: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
):
    """Losses and statistics of position p = program id from the parts of its rows."""
    p = tl.program_id(0).to(tl.int64)
    offs_h = tl.arange(0, H_BLOCK)
    _label, live, share, coefficient = row_coefficients(
        rows, p // S, p % S, offs_h, S, V, ignore_index, SHIFT, H, OVER_HORIZON, TARGET_WEIGHTS
    )
    tl.store(results.live + p * H + offs_h, live, mask=offs_h < H)
    part = tl.arange(0, SPLIT_BLOCK)
    field = tl.num_programs(0).to(tl.int64) * H * splits

    out = 0.0
    for h in tl.static_range(H):
        r = p * H + h
        share_h = pick(share, offs_h, h)
        coefficient_h = pick(coefficient, offs_h, h)
        row_max = 0.0
        log_sum = 0.0
        label_logit = 0.0
        above_mean = 0.0
        best = -1
        if row_counts(results, share_h, coefficient_h):
            part_ptr = parts_ptr + r * splits + part
            there = part < splits
            part_max = tl.load(part_ptr, mask=there, other=float("-inf"))
            part_sum = tl.load(part_ptr + field, mask=there, other=0.0)
            row_max = tl.max(part_max, axis=0)
            log_sum = tl.log(tl.sum(part_sum * scaled_exp(part_max, row_max), axis=0))
            label_logit = tl.sum(tl.load(part_ptr + 2 * field, mask=there, other=0.0), axis=0)
            if SMOOTH:
                entries = tl.load(part_ptr + 3 * field, mask=there, other=0.0)
                part_base = tl.load(part_ptr + 4 * field, mask=there, other=0.0)
                total = tl.sum(tl.load(part_ptr + 5 * field, mask=there, other=0.0), axis=0)
                # Every part has summed from a base of its own.
                base = tl.sum(tl.where(part == 0, part_base, 0.0), axis=0)
                total += tl.sum(entries * (part_base - base), axis=0)
                above_mean = (label_logit - base) - total / V
            if results.top1 is not None:
                part_best = tl.load(part_ptr + 6 * field, mask=there, other=0.0).to(tl.int32, bitcast=True)
                best = tl.min(tl.where(there & (part_max == row_max), part_best, INT32_MAX), axis=0)
                best = tl.where(best == INT32_MAX, 0, best)
        out += write_row_results(
            results,
            r,
            share_h,
            coefficient_h,
            row_max,
            log_sum,
            label_logit,
            above_mean,
            best,
            z_loss,
            label_smoothing,
            PLAIN,
        )
    tl.store(results.out + p, out)


def launch_forward(
    logits: list[torch.Tensor],  # one [B, S, H, V], or H x [B, S, V]
    labels: torch.Tensor,  # [B, S]
    token_weights: torch.Tensor | None,  # [B, S] or [B, S, H]
    head_weights: torch.Tensor | None,  # [H]
    seq_lens: torch.Tensor | None,  # [B]
    document_ids: torch.Tensor | None,  # [B, S]
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
) -> Results:
    """Out, statistics, and what backward and d loss / d token_weights need."""
    B, S, *_, V = logits[0].shape
    H = logits[0].shape[2] if logits[0].dim() == 4 else len(logits)
    new = logits[0].new_empty
    results = Results(
        out=new((B, S), dtype=torch.float32),
        ce=new((B, S, H), dtype=torch.float32),
        row_max=new((B, S, H), dtype=torch.float32),
        log_sum=new((B, S, H), dtype=torch.float32),
        live=new((B, S, H), dtype=torch.bool),
        top1=new((B, S, H), dtype=torch.int32) if with_top1 else None,
        shares=new((B, S, H), dtype=torch.float32) if with_shares else None,
    )
    heads = pack_heads(logits)
    aligned, vec = row_layout(heads)
    shape = forward_tile(V, logits[0].element_size(), WARP_SIZE, softcap is not None)
    splits = row_splits(B * S, V, shape.strips * shape.threads * vec, processors(labels.device))
    parts = new((LEARNT, B * S * H, splits), dtype=torch.float32) if splits > 1 else None
    rows = pack_rows(labels, token_weights, head_weights, seq_lens, document_ids)
    rule = {
        "SHIFT": shift,
        "H": H,
        "H_BLOCK": power_of_2(H),
        "OVER_HORIZON": over_horizon,
        "TARGET_WEIGHTS": target_weights,
        "PLAIN": z_loss == 0 and label_smoothing == 0,
        "SMOOTH": label_smoothing != 0,
    }
    forward_kernel[(B * S, splits)](
        heads,
        rows,
        results,
        parts,
        splits,
        S,
        V,
        ignore_index,
        1.0 if softcap is None else softcap,
        z_loss,
        label_smoothing,
        HAS_SOFTCAP=softcap is not None,
        ALIGNED=aligned,
        VEC=vec,
        STRIPS=shape.strips,
        THREADS=shape.threads,
        num_warps=shape.num_warps,
        **rule,
    )
    if splits > 1:
        combine_kernel[(B * S,)](
            rows,
            results,
            parts,
            splits,
            S,
            V,
            ignore_index,
            z_loss,
            label_smoothing,
            SPLIT_BLOCK=power_of_2(splits),
            num_warps=1,
            **rule,
        )
    return results


def traffic(live_rows: int, positions: int, horizon: int, V: int, itemsize: int) -> tuple[int, int]:
    """Bytes read from the logits, and bytes written, by one forward of whole rows without top1 and shares."""
    return live_rows * V * itemsize, positions * (4 + horizon * (3 * 4 + 1))
