"""Weighted multi-token cross entropy, forward: one online-softmax pass over each valid row of logits.

Math       lse[r]  = log sum_v exp z[r,v]            r = (b, t, h), z after the softcap; nats
           ce[r]   = lse[r] - z[r, label(r)]
           row[r]  = lse - (1-e) z[label] - e mean_v z + c lse^2        label smoothing e, z-loss c; = ce without
           out[p]  = sum_h coefficient[r] * row[r]                      p = (b, t), row coefficient as in rows.py

Shapes     heads: logits of any strides, as in online_softmax.py; rows as in rows.py
           -> out [B,S], ce, row_max, log_sum [B,S,H] fp32, valid [B,S,H] bool, top1 [B,S,H] int32,
           d_row_weights [B,S,H] fp32: d out / d w of each row

Algorithm  One program owns a position. It computes its coefficients from H labels, then runs the online softmax of
           each head that counts. A row that is masked, or whose coefficient is 0, is not read (where d_row_weights
           are wanted: whose head coefficient is 0). Where positions are too few to fill the device, `num_splits`
           programs share one, each with a range of every row's tiles; `combine_kernel` reduces their partial results,
           or those of all ranks where the vocabulary is sharded.

Traffic    valid rows * V * itemsize read once; 4 + 13 H bytes and more a position written. See `traffic`.

Numerics   Every sum in fp32. The maximum and the log of the sum are kept apart: their sum loses 1e-3 at logits of 1e4,
           and with it the gradient. A row of -inf everywhere has lse = -inf. A label outside [0, V) gives NaN.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mtp_ce.kernels.online_softmax import (
    INT32_MAX,
    SoftmaxSettings,
    all_entries,
    is_plain,
    loss_terms,
    online_softmax,
    own_label,
    pack_heads,
    row_layout,
    row_of,
    scaled_exp,
    smoothing_loss,
    term,
)
from mtp_ce.kernels.results import ForwardResults, Partials
from mtp_ce.kernels.rows import Rule, pack_inputs, pick, power_of_2, row_coefficients, row_rule
from mtp_ce.kernels.tiles import WARP_SIZE, forward_tile, processors, row_splits
from mtp_ce.options import LossInputs, LossOptions, VocabShard

# Partial results of one split, or one rank, for `combine_partials`.
NUM_PARTIALS = len(Partials._fields)


class ForwardSettings(NamedTuple):
    """Compile-time constants of `forward_kernel`."""

    rule: Rule
    softmax: SoftmaxSettings
    PLAIN: bool  # a row's loss is its cross entropy alone


class CombineSettings(NamedTuple):
    """Compile-time constants of `combine_kernel`."""

    rule: Rule
    PLAIN: bool
    SMOOTH: bool
    SPLIT_BLOCK: int  # num_splits rounded up to a power of 2


@triton.jit
def is_read(results, head_coefficient, coefficient):
    """Whether the row's logits are read."""
    counts = coefficient != 0.0
    if results.d_row_weights is not None:
        # d loss / d w is the row's loss, so a weight of 0 that wants a gradient is read too.
        counts = head_coefficient != 0.0
    return counts


@triton.jit
def write_row_results(
    results,
    r,
    head_coefficient,
    coefficient,
    row_max,
    log_sum,
    label_logit,
    above_mean,
    argmax,
    terms,
    PLAIN: tl.constexpr,
):
    """Write the results of row r and return its term of the position's sum; zeros give zeros."""
    ce = (row_max - label_logit) + log_sum
    row_loss = ce
    if not PLAIN:
        lse = row_max + log_sum
        z_term = term(terms.z_loss, terms.changing, 2) * lse * lse
        row_loss += z_term + smoothing_loss(above_mean, terms)
    tl.store(results.ce + r, ce)
    tl.store(results.row_max + r, row_max)
    tl.store(results.log_sum + r, log_sum)
    if results.top1 is not None:
        tl.store(results.top1 + r, argmax)
    # A loss of Inf or NaN on a row whose coefficient is 0 must not come back as NaN * 0.
    if results.d_row_weights is not None:
        tl.store(results.d_row_weights + r, tl.where(head_coefficient != 0.0, head_coefficient * row_loss, 0.0))
    return tl.where(coefficient != 0.0, coefficient * row_loss, 0.0)


@triton.jit
def store_partials(partial_ptr, field, partials, terms, SETTINGS: tl.constexpr):
    """Write the partial results of `online_softmax`, `field` elements apart."""
    row_max, row_sum, label_logit, entries, base, total, argmax = partials
    tl.store(partial_ptr, row_max)
    tl.store(partial_ptr + field, row_sum)
    tl.store(partial_ptr + 2 * field, label_logit)
    if SETTINGS.SMOOTH:
        tl.store(partial_ptr + 3 * field, entries.to(tl.float32))
        tl.store(partial_ptr + 4 * field, base)
        tl.store(partial_ptr + 5 * field, total)
    if SETTINGS.TOP1:
        if terms.vocab_start is not None:
            argmax += terms.vocab_start
        tl.store(partial_ptr + 6 * field, argmax.to(tl.float32, bitcast=True))


@triton.jit
def combine_partials(
    partial_ptr, field, num_splits, V, SMOOTH: tl.constexpr, TOP1: tl.constexpr, SPLIT_BLOCK: tl.constexpr
):
    """Maximum, log of the sum, label logit, label logit above the mean, argmax of a row from its partial results."""
    split = tl.arange(0, SPLIT_BLOCK)
    partial_ptr += split
    mask = split < num_splits
    split_max = tl.load(partial_ptr, mask=mask, other=float("-inf"))
    split_sum = tl.load(partial_ptr + field, mask=mask, other=0.0)
    row_max = tl.max(split_max, axis=0)
    # Materialised before the sum over lanes, as in `online_softmax`; so is the total below.
    scaled_sum = tl.where(split_max == float("-inf"), 0.0, split_sum * scaled_exp(split_max, row_max))
    log_sum = tl.log(tl.sum(scaled_sum, axis=0))
    label_logit = tl.sum(tl.load(partial_ptr + 2 * field, mask=mask, other=0.0), axis=0)
    above_mean = 0.0
    argmax = -1
    if SMOOTH:
        entries = tl.load(partial_ptr + 3 * field, mask=mask, other=0.0)
        split_base = tl.load(partial_ptr + 4 * field, mask=mask, other=0.0)
        total = tl.sum(tl.load(partial_ptr + 5 * field, mask=mask, other=0.0), axis=0)
        # Every split has summed from a base of its own: move all totals to the base of the first.
        base = tl.sum(tl.where(split == 0, split_base, 0.0), axis=0)
        total += tl.sum(tl.where(mask, entries * (split_base - base), 0.0), axis=0)
        above_mean = (label_logit - base) - total / V
    if TOP1:
        split_argmax = tl.load(partial_ptr + 6 * field, mask=mask, other=0.0).to(tl.int32, bitcast=True)
        argmax = tl.min(tl.where(mask & (split_max == row_max), split_argmax, INT32_MAX), axis=0)
        argmax = tl.where(argmax == INT32_MAX, 0, argmax)
    return row_max, log_sum, label_logit, above_mean, argmax


@triton.jit
def forward_kernel(
    heads,
    rows,
    results,
    partials_ptr,  # [NUM_PARTIALS, B * S * H, num_splits]; None where one program owns a position
    num_splits,
    S,
    V,
    ignore_index,
    terms,
    SETTINGS: tl.constexpr,
):
    """Losses and statistics of position p = program id, or the partial results of one split of its rows."""
    RULE: tl.constexpr = SETTINGS.rule
    SOFTMAX: tl.constexpr = SETTINGS.softmax
    H: tl.constexpr = SETTINGS.rule.H
    H_BLOCK: tl.constexpr = SETTINGS.rule.H_BLOCK
    SPLIT: tl.constexpr = SETTINGS.softmax.SPLIT
    p = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b = p // S
    t = p % S
    offs_h = tl.arange(0, H_BLOCK)
    label, valid, head_coefficient, coefficient = row_coefficients(
        rows, b, t, offs_h, all_entries(V, terms), ignore_index, RULE
    )
    label = own_label(label, V, terms)
    if not SPLIT:
        tl.store(results.valid + p * H + offs_h, valid, mask=offs_h < H)

    out = 0.0
    for h in tl.static_range(H):
        r = p * H + h
        head_coefficient_h = pick(head_coefficient, offs_h, h)
        coefficient_h = pick(coefficient, offs_h, h)
        label_h = pick(label, offs_h, h)
        row_max = 0.0
        log_sum = 0.0
        label_logit = 0.0
        above_mean = 0.0
        argmax = -1
        if is_read(results, head_coefficient_h, coefficient_h):
            row_max, row_sum, label_logit, entries, base, total, argmax = online_softmax(
                row_of(heads, b, t, h), V, label_h, split, num_splits, term(terms.softcap, terms.changing, 1), SOFTMAX
            )
            if not SPLIT:
                log_sum = tl.log(row_sum)
                # Without smoothing a label of probability 0 must not come back as 0 * -inf.
                if SOFTMAX.SMOOTH:
                    above_mean = (label_logit - base) - total / V
            else:
                store_partials(
                    partials_ptr + r * num_splits + split,
                    tl.num_programs(0).to(tl.int64) * H * num_splits,
                    (row_max, row_sum, label_logit, entries, base, total, argmax),
                    terms,
                    SOFTMAX,
                )
        if not SPLIT:
            out += write_row_results(
                results,
                r,
                head_coefficient_h,
                coefficient_h,
                row_max,
                log_sum,
                label_logit,
                above_mean,
                argmax,
                terms,
                SETTINGS.PLAIN,
            )
    if not SPLIT:
        tl.store(results.out + p, out)


@triton.jit
def combine_kernel(
    rows,
    results,
    partials_ptr,
    num_splits,
    S,
    V,
    ignore_index,
    terms,
    SETTINGS: tl.constexpr,
):
    """Losses and statistics of position p = program id from the partial results of its rows."""
    RULE: tl.constexpr = SETTINGS.rule
    H: tl.constexpr = SETTINGS.rule.H
    H_BLOCK: tl.constexpr = SETTINGS.rule.H_BLOCK
    SPLIT_BLOCK: tl.constexpr = SETTINGS.SPLIT_BLOCK
    p = tl.program_id(0).to(tl.int64)
    offs_h = tl.arange(0, H_BLOCK)
    _label, valid, head_coefficient, coefficient = row_coefficients(rows, p // S, p % S, offs_h, V, ignore_index, RULE)
    tl.store(results.valid + p * H + offs_h, valid, mask=offs_h < H)
    field = tl.num_programs(0).to(tl.int64) * H * num_splits

    out = 0.0
    for h in tl.static_range(H):
        r = p * H + h
        head_coefficient_h = pick(head_coefficient, offs_h, h)
        coefficient_h = pick(coefficient, offs_h, h)
        row_max = 0.0
        log_sum = 0.0
        label_logit = 0.0
        above_mean = 0.0
        argmax = -1
        if is_read(results, head_coefficient_h, coefficient_h):
            row_max, log_sum, label_logit, above_mean, argmax = combine_partials(
                partials_ptr + r * num_splits,
                field,
                num_splits,
                V,
                SETTINGS.SMOOTH,
                results.top1 is not None,
                SPLIT_BLOCK,
            )
        out += write_row_results(
            results,
            r,
            head_coefficient_h,
            coefficient_h,
            row_max,
            log_sum,
            label_logit,
            above_mean,
            argmax,
            terms,
            SETTINGS.PLAIN,
        )
    tl.store(results.out + p, out)


def no_entries(partials: torch.Tensor) -> None:
    """Set the partial results [7, ...] of a rank that holds no entry of the vocabulary."""
    partials.zero_()
    partials[0].fill_(float("-inf"))


def launch_forward(
    logits: list[torch.Tensor],  # one [B, S, H, V], or H x [B, S, V]
    inputs: LossInputs,
    options: LossOptions,
    *,
    with_top1: bool,
    with_d_weights: bool,
    shard: VocabShard | None = None,
    gather: Callable[..., torch.Tensor] | None = None,
) -> ForwardResults:
    """Return out, statistics, and what backward and d loss / d token_weights need.

    Where the logits are a `shard`, `gather` returns the partial results [7, N, ranks] of all ranks from [7, N].
    """
    B, S, *_, V = logits[0].shape
    H = logits[0].shape[2] if logits[0].dim() == 4 else len(logits)
    new = logits[0].new_empty
    results = ForwardResults(
        out=new((B, S), dtype=torch.float32),
        ce=new((B, S, H), dtype=torch.float32),
        row_max=new((B, S, H), dtype=torch.float32),
        log_sum=new((B, S, H), dtype=torch.float32),
        valid=new((B, S, H), dtype=torch.bool),
        top1=new((B, S, H), dtype=torch.int32) if with_top1 else None,
        d_row_weights=new((B, S, H), dtype=torch.float32) if with_d_weights else None,
    )
    heads = pack_heads(logits)
    aligned, vec = row_layout(heads)
    tile = forward_tile(V, logits[0].element_size(), WARP_SIZE, options.softcap is not None)
    num_splits = 1
    if shard is None:
        num_splits = row_splits(B * S, V, tile.strips * tile.threads * vec, processors(inputs.labels.device))
    split = num_splits > 1 or shard is not None
    partials = new((NUM_PARTIALS, B * S * H, num_splits), dtype=torch.float32) if split else None
    rows, rule, terms = pack_inputs(inputs), row_rule(options, H), loss_terms(options, inputs.terms, shard)
    smooth = options.label_smoothing != 0
    softmax = SoftmaxSettings(
        HAS_SOFTCAP=options.softcap is not None,
        SMOOTH=smooth,
        TOP1=with_top1,
        ALIGNED=aligned,
        VEC=vec,
        STRIPS=tile.strips,
        THREADS=tile.threads,
        SPLIT=split,
        EVICTION="",
    )
    if V:
        forward_kernel[(B * S, num_splits)](
            heads,
            rows,
            results,
            partials,
            num_splits,
            S,
            V,
            options.ignore_index,
            terms,
            SETTINGS=ForwardSettings(rule, softmax, is_plain(options)),
            num_warps=tile.num_warps,
            enable_fp_fusion=True,
        )
    elif partials is not None:
        no_entries(partials)
    if shard is not None and gather is not None and partials is not None:
        partials = gather(partials.squeeze(2), smooth=smooth, with_top1=with_top1)
        V, num_splits, terms = shard.vocab_size, shard.ranks, loss_terms(options, inputs.terms)
    if partials is not None:
        combine_kernel[(B * S,)](
            rows,
            results,
            partials,
            num_splits,
            S,
            V,
            options.ignore_index,
            terms,
            SETTINGS=CombineSettings(rule, is_plain(options), smooth, power_of_2(num_splits)),
            num_warps=1,
            enable_fp_fusion=True,
        )
    return results


def traffic(rows_read: int, positions: int, H: int, V: int, itemsize: int) -> tuple[int, int]:
    """Return bytes of logits read, and bytes written, by one forward without split-V, top1 and d_row_weights."""
    return rows_read * V * itemsize, positions * (4 + H * (3 * 4 + 1))
