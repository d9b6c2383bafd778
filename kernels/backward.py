"""Gradient of the weighted multi-token cross entropy: one pass over each valid row of logits.

Math       g       = d_loss * factor * coefficient[r]          r = (b, t, h), row coefficient as in rows.py
           p[v]    = exp(z[v] - row_max - log_sum)
           dz[v]   = g * (p[v] (1 + 2 c lse) - (1-e) [v = label] - e / V)      smoothing e, z-loss c
           dx[v]   = dz[v] * (1 - (z[v] / softcap)^2)          where a softcap is given, else dz[v]

Shapes     heads, d_heads: logits and their gradient, of any strides, the same memory for the in-place form;
           d_loss [B,S] of any strides; row_max, log_sum [B,S,H], factor [] fp32

Algorithm  One program owns a position and passes over each head's row once: load a tile, store its gradient. A
           masked row is filled with zeros and not read. Tiles and splits are those of online_softmax.py, so a
           thread stores exactly what it has loaded.

Traffic    valid rows * V * itemsize read once; all rows * V * itemsize written once. See `traffic`.

Numerics   fp32 until the store. The label's 1 is subtracted before rounding. z - row_max is exact near the maximum,
           which keeps p right at logits of 1e4.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mtp_ce.kernels.online_softmax import (
    LOG2_E,
    Heads,
    all_entries,
    edge_offsets,
    is_plain,
    loss_terms,
    own_label,
    pack_heads,
    row_layout,
    row_of,
    soft_cap,
    split_bounds,
    term,
    tile_offsets,
    vector_bounds,
    vector_ptr,
    widened,
)
from mtp_ce.kernels.rows import Rule, pack_inputs, pick, row_coefficients, row_rule
from mtp_ce.kernels.tiles import VECTOR_BYTES, WARP_SIZE, backward_tile, processors, row_splits
from mtp_ce.options import LossInputs, LossOptions, VocabShard


class GradientSettings(NamedTuple):
    """Compile-time constants of `write_row_gradient`."""

    HAS_SOFTCAP: bool
    PLAIN: bool  # a row's loss is its cross entropy alone
    ALIGNED: bool  # every row starts and ends on a 16-byte boundary
    SAME_ALIGNMENT: bool  # a row and its gradient have the same boundaries
    VEC: int  # elements of one load
    STRIPS: int
    THREADS: int
    SPLIT: bool  # several programs share a row
    REVERSE: bool  # from the last tile to the first
    EVICTION: str  # cache policy of loads and stores


class BackwardSettings(NamedTuple):
    """Compile-time constants of `backward_kernel`."""

    rule: Rule
    gradient: GradientSettings


@triton.jit
def logit_gradient(x, offs_v, label, may_hold_label, factors, SETTINGS: tl.constexpr):
    """d loss / d x for logits x at entries offs_v, which count from where `label` counts; fp32."""
    row_max, log2_sum, scale, uniform, on_label, softcap = factors
    z = x
    if SETTINGS.HAS_SOFTCAP:
        z = soft_cap(x, softcap)
    dz = scale * tl.exp2((z - row_max) * LOG2_E - log2_sum)
    if not SETTINGS.PLAIN:
        dz -= uniform
    if may_hold_label:
        dz = tl.where(offs_v == label, dz - on_label, dz)
    if SETTINGS.HAS_SOFTCAP:
        slope = z * (1.0 / softcap)
        dz = dz * (1.0 - slope * slope)
    return dz


@triton.jit
def write_row_gradient(
    row, grad_row, V, label, row_max, log_sum, g, split, num_splits, terms, SETTINGS: tl.constexpr
):  # fmt: skip
    """Write the gradient of one split of a row for the upstream gradient g; zeros, without a load, where g is 0."""
    ALIGNED: tl.constexpr = SETTINGS.ALIGNED
    VEC: tl.constexpr = SETTINGS.VEC
    STRIPS: tl.constexpr = SETTINGS.STRIPS
    THREADS: tl.constexpr = SETTINGS.THREADS
    TILE: tl.constexpr = STRIPS * THREADS * VEC
    HAS_EDGES: tl.constexpr = not (ALIGNED or VEC == 1)
    row_ptr, stride_v = row
    grad_ptr, stride_gv = grad_row
    log2_sum = log_sum * LOG2_E
    softcap = term(terms.softcap, terms.changing, 1)
    # dz = scale * p - uniform - on_label [v = label]
    scale = g
    uniform = 0.0
    on_label = g
    if not SETTINGS.PLAIN:
        smoothing = term(terms.label_smoothing, terms.changing, 3)
        scale = g * (1.0 + 2.0 * term(terms.z_loss, terms.changing, 2) * (row_max + log_sum))
        uniform = g * smoothing / all_entries(V, terms)
        on_label = g * (1.0 - smoothing)
    lead, body = vector_bounds(row_ptr, V, VEC, ALIGNED)
    first, last, edges_end = split_bounds(body, V, split, num_splits, SETTINGS.SPLIT, TILE, VEC)
    body_ptr = row_ptr + lead
    grad_body_ptr = grad_ptr + lead
    if VEC > 1:
        body_ptr = vector_ptr(body_ptr)
        # With other boundaries the stores at the loads' offsets are not aligned, and stay narrow.
        if SETTINGS.SAME_ALIGNMENT:
            grad_body_ptr = vector_ptr(grad_body_ptr)
    label_offset = label - lead
    factors = row_max, log2_sum, scale, uniform, on_label, softcap

    if g != 0.0:
        for start_ in range(first, last, TILE):
            start = start_
            if SETTINGS.REVERSE:
                start = first + (last - first - 1) // TILE * TILE - (start_ - first)
            offs_v, offs = tile_offsets(start, stride_v, STRIPS, THREADS, VEC)
            _offs_v, grad_offs = tile_offsets(start, stride_gv, STRIPS, THREADS, VEC)
            mask_v = offs_v < last
            x = tl.load(body_ptr + offs, mask=mask_v, other=0.0, eviction_policy=SETTINGS.EVICTION)
            # One tile of the row holds the label: the only one that pays for the search.
            in_tile = (label_offset >= start) & (label_offset < start + TILE)
            dx = logit_gradient(widened(x), offs_v, label_offset, in_tile, factors, SETTINGS)
            dx = dx.to(grad_ptr.dtype.element_ty)
            tl.store(grad_body_ptr + grad_offs, dx, mask=mask_v, eviction_policy=SETTINGS.EVICTION)
        if HAS_EDGES:
            offs_e = edge_offsets(lead, body, V, VEC)
            x = tl.load(row_ptr + offs_e, mask=offs_e < edges_end, other=0.0).to(tl.float32)
            dx = logit_gradient(x, offs_e, label, True, factors, SETTINGS)
            tl.store(grad_ptr + offs_e, dx.to(grad_ptr.dtype.element_ty), mask=offs_e < edges_end)
    else:
        for start in range(first, last, TILE):
            offs_v, grad_offs = tile_offsets(start, stride_gv, STRIPS, THREADS, VEC)
            zeros = tl.zeros([STRIPS, THREADS, VEC], grad_ptr.dtype.element_ty)
            tl.store(grad_body_ptr + grad_offs, zeros, mask=offs_v < last, eviction_policy=SETTINGS.EVICTION)
        if HAS_EDGES:
            offs_e = edge_offsets(lead, body, V, VEC)
            zeros = tl.zeros([2 * VEC], grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + offs_e, zeros, mask=offs_e < edges_end)


@triton.jit
def backward_kernel(
    heads,
    d_heads,
    rows,
    d_loss_ptr,
    stride_ub,
    stride_us,
    factor_ptr,
    row_max_ptr,
    log_sum_ptr,
    num_splits,
    S,
    V,
    ignore_index,
    terms,
    SETTINGS: tl.constexpr,
):
    """Gradient rows of position p = program id, or one split of them."""
    RULE: tl.constexpr = SETTINGS.rule
    GRADIENT: tl.constexpr = SETTINGS.gradient
    H: tl.constexpr = SETTINGS.rule.H
    H_BLOCK: tl.constexpr = SETTINGS.rule.H_BLOCK
    p = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b = p // S
    t = p % S
    offs_h = tl.arange(0, H_BLOCK)
    label, _valid, _head_coefficient, coefficient = row_coefficients(
        rows, b, t, offs_h, all_entries(V, terms), ignore_index, RULE
    )
    label = own_label(label, V, terms)
    upstream = tl.load(d_loss_ptr + b * stride_ub + t * stride_us).to(tl.float32) * tl.load(factor_ptr)

    for h in tl.static_range(H):
        coefficient_h = pick(coefficient, offs_h, h)
        label_h = pick(label, offs_h, h)
        # Where the upstream gradient is 0 the row is masked too, also if its own loss is Inf.
        g = tl.where((coefficient_h == 0.0) | (upstream == 0.0), 0.0, coefficient_h * upstream)
        row = row_of(heads, b, t, h)
        grad_row = row_of(d_heads, b, t, h)
        row_max = tl.load(row_max_ptr + p * H + h)
        log_sum = tl.load(log_sum_ptr + p * H + h)
        write_row_gradient(row, grad_row, V, label_h, row_max, log_sum, g, split, num_splits, terms, GRADIENT)


def same_alignment(heads: Heads, d_heads: Heads, vec: int) -> bool:
    """Return whether every row and its gradient have the same offset from a 16-byte boundary."""
    pairs = zip(heads.pointers, d_heads.pointers, strict=True)
    strides = zip(heads.row_strides(), d_heads.row_strides(), strict=True)
    return all((x.data_ptr() - dx.data_ptr()) % VECTOR_BYTES == 0 for x, dx in pairs) and all(
        (stride - d_stride) % vec == 0 for stride, d_stride in strides
    )


def launch_backward(
    d_loss: torch.Tensor,  # [B, S] of any strides
    logits: list[torch.Tensor],  # one [B, S, H, V], or H x [B, S, V]
    d_logits: list[torch.Tensor],  # alike, every element written
    inputs: LossInputs,
    options: LossOptions,
    row_max: torch.Tensor,  # [B, S, H]
    log_sum: torch.Tensor,  # [B, S, H]
    factor: torch.Tensor,  # []
    shard: VocabShard | None = None,
) -> None:
    """Write the gradient of every logit into d_logits."""
    B, S, *_, V = logits[0].shape
    if V == 0:  # of a rank without entries
        return
    heads, d_heads = pack_heads(logits), pack_heads(d_logits)
    aligned, vec = row_layout(heads, d_heads)
    tile = backward_tile(V, logits[0].element_size(), WARP_SIZE)
    num_splits = row_splits(B * S, V, tile.strips * tile.threads * vec, processors(inputs.labels.device))
    gradient = GradientSettings(
        HAS_SOFTCAP=options.softcap is not None,
        PLAIN=is_plain(options),
        ALIGNED=aligned,
        SAME_ALIGNMENT=aligned or same_alignment(heads, d_heads, vec),
        VEC=vec,
        STRIPS=tile.strips,
        THREADS=tile.threads,
        SPLIT=num_splits > 1,
        REVERSE=False,
        EVICTION="",
    )
    backward_kernel[(B * S, num_splits)](
        heads,
        d_heads,
        pack_inputs(inputs),
        d_loss,
        *d_loss.stride(),
        factor,
        row_max,
        log_sum,
        num_splits,
        S,
        V,
        options.ignore_index,
        loss_terms(options, inputs.terms, shard),
        SETTINGS=BackwardSettings(row_rule(options, row_max.shape[-1]), gradient),
        num_warps=tile.num_warps,
        enable_fp_fusion=True,
    )


def traffic(rows_read: int, all_rows: int, V: int, itemsize: int) -> tuple[int, int]:
    """Return bytes of logits read, and bytes of gradient written."""
    return rows_read * V * itemsize, all_rows * V * itemsize
