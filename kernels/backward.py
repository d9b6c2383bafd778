"""Gradient of the weighted multi-token cross entropy: one visit to each live logit.

Math       g       = d_loss * factor * coefficient[r]          r = (b, t, h), coefficient as in rows.py
           p[v]    = exp(z[v] - row_max - log_sum)
           dz[v]   = g * (p[v] (1 + 2 c lse) - (1-e) [v = label] - e / V)      smoothing e, z-loss c
           dx[v]   = dz[v] * (1 - (z[v] / softcap)^2)          where a softcap is given, else dz[v]

Shapes     heads, d_heads: logits and their gradient, of any strides, the same memory for the in-place form;
           d_loss [B,S] of any strides; row_max, log_sum [B,S,H], factor [] fp32

Algorithm  One program owns a position. Each head is one walk: read a tile, write its gradient; a dead head is one
           walk of zeros. Tiles and parts are cut as in visit.py, so a thread writes just what it has read.

Traffic    live rows * V * itemsize read once; all rows * V * itemsize written once. See `traffic`.

Numerics   fp32 until the store. The label's 1 is subtracted before rounding. z - row_max is exact near the maximum,
           which keeps p right at logits of 1e4.
"""

import torch
import triton
import triton.language as tl

from mtp_ce.kernels.rows import pack_rows, pick, power_of_2, row_coefficients, soft_cap
from mtp_ce.kernels.tiles import VECTOR_BYTES, WARP_SIZE, backward_tile, processors, row_splits
from mtp_ce.kernels.visit import (
    LOG2_E,
    Heads,
    cut_part,
    edge_offsets,
    pack_heads,
    row_layout,
    row_of,
    split_row,
    tile_offsets,
    vector_ptr,
)


@triton.jit
def logit_gradient(
    x,
    offs,
    label,
    row_max,
    log2_sum,
    scale,
    uniform,
    on_label,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """D loss / d x for logits x at entries offs, which count from where `label` counts; fp32."""
    z = x
    if HAS_SOFTCAP:
        z = soft_cap(x, softcap)
    dz = scale * tl.exp2((z - row_max) * LOG2_E - log2_sum)
    if not PLAIN:
        dz -= uniform
    dz = tl.where(offs == label, dz - on_label, dz)
    if HAS_SOFTCAP:
        slope = z * (1.0 / softcap)
        dz = dz * (1.0 - slope * slope)
    return dz


@triton.jit
def write_row(
    row_ptr,
    stride_v,
    grad_ptr,
    stride_gv,
    V,
    label,
    row_max,
    log_sum,
    g,
    part,
    splits,
    softcap,
    z_loss,
    label_smoothing,
    HAS_SOFTCAP: tl.constexpr,
    PLAIN: tl.constexpr,
    ALIGNED: tl.constexpr,
    SAME_CUT: tl.constexpr,
    REVERSE: tl.constexpr,
    VEC: tl.constexpr,
    STRIPS: tl.constexpr,
    THREADS: tl.constexpr,
    SHARED: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Gradient of a part of a row's logits for the row's coefficient g; zeros, without a read, where g is 0."""
    TILE: tl.constexpr = STRIPS * THREADS * VEC
    log2_sum = log_sum * LOG2_E
    # dz = scale * p - uniform - on_label [v = label]
    scale = g
    uniform = 0.0
    on_label = g
    if not PLAIN:
        scale = g * (1.0 + 2.0 * z_loss * (row_max + log_sum))
        uniform = g * label_smoothing / V
        on_label = g * (1.0 - label_smoothing)
    head, body = split_row(row_ptr, V, VEC, ALIGNED)
    first, last, edges_end = cut_part(body, V, part, splits, SHARED, TILE, VEC)
    body_ptr = row_ptr + head
    grad_body_ptr = grad_ptr + head
    if VEC > 1:
        body_ptr = vector_ptr(body_ptr)
        if SAME_CUT:
            grad_body_ptr = vector_ptr(grad_body_ptr)

    if g != 0.0:
        for start_ in range(first, last, TILE):
            start = start_
            if REVERSE:
                start = first + (last - first - 1) // TILE * TILE - (start_ - first)
            offs, place = tile_offsets(start, stride_v, STRIPS, THREADS, VEC)
            _offs, grad_place = tile_offsets(start, stride_gv, STRIPS, THREADS, VEC)
            x = tl.load(body_ptr + place, mask=offs < last, other=0.0, eviction_policy=EVICTION).to(tl.float32)
            dx = logit_gradient(
                x,
                offs,
                label - head,
                row_max,
                log2_sum,
                scale,
                uniform,
                on_label,
                softcap,
                HAS_SOFTCAP,
                PLAIN,
            )
            dx = dx.to(grad_ptr.dtype.element_ty)
            tl.store(grad_body_ptr + grad_place, dx, mask=offs < last, eviction_policy=EVICTION)
        if not (ALIGNED or VEC == 1):
            offs_e = edge_offsets(head, body, V, VEC)
            x = tl.load(row_ptr + offs_e, mask=offs_e < edges_end, other=0.0).to(tl.float32)
            dx = logit_gradient(
                x,
                offs_e,
                label,
                row_max,
                log2_sum,
                scale,
                uniform,
                on_label,
                softcap,
                HAS_SOFTCAP,
                PLAIN,
            )
            tl.store(grad_ptr + offs_e, dx.to(grad_ptr.dtype.element_ty), mask=offs_e < edges_end)
    else:
        for start in range(first, last, TILE):
            offs, grad_place = tile_offsets(start, stride_gv, STRIPS, THREADS, VEC)
            nothing = tl.zeros([STRIPS, THREADS, VEC], grad_ptr.dtype.element_ty)
            tl.store(grad_body_ptr + grad_place, nothing, mask=offs < last, eviction_policy=EVICTION)
        if not (ALIGNED or VEC == 1):
            offs_e = edge_offsets(head, body, V, VEC)
            nothing = tl.zeros([2 * VEC], grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + offs_e, nothing, mask=offs_e < edges_end)


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
    ALIGNED: tl.constexpr,
    SAME_CUT: tl.constexpr,
    VEC: tl.constexpr,
    STRIPS: tl.constexpr,
    THREADS: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Gradient rows of position p = program id, or one part of them."""
    p = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    b = p // S
    t = p % S
    offs_h = tl.arange(0, H_BLOCK)
    label, _live, _share, coefficient = row_coefficients(
        rows, b, t, offs_h, S, V, ignore_index, SHIFT, H, OVER_HORIZON, TARGET_WEIGHTS
    )
    upstream = tl.load(d_loss_ptr + b * stride_ub + t * stride_us).to(tl.float32) * tl.load(factor_ptr)

    for h in tl.static_range(H):
        coefficient_h = pick(coefficient, offs_h, h)
        label_h = pick(label, offs_h, h)
        # Where the upstream gradient is 0 the row is dead too, also if its own loss is Inf.
        g = tl.where((coefficient_h == 0.0) | (upstream == 0.0), 0.0, coefficient_h * upstream)
        row_ptr, stride_v = row_of(heads, b, t, h)
        grad_ptr, stride_gv = row_of(d_heads, b, t, h)
        write_row(
            row_ptr,
            stride_v,
            grad_ptr,
            stride_gv,
            V,
            label_h,
            tl.load(row_max_ptr + p * H + h),
            tl.load(log_sum_ptr + p * H + h),
            g,
            part,
            splits,
            softcap,
            z_loss,
            label_smoothing,
            HAS_SOFTCAP,
            PLAIN,
            ALIGNED,
            SAME_CUT,
            False,
            VEC,
            STRIPS,
            THREADS,
            SHARED,
            "",
        )


def same_cut(heads: Heads, d_heads: Heads, vec: int) -> bool:
    """Loads and stores share one cut: every row and its gradient stand alike against 16 bytes."""
    pairs = zip(heads.pointers, d_heads.pointers, strict=True)
    strides = zip(heads.row_strides(), d_heads.row_strides(), strict=True)
    return all((x.data_ptr() - dx.data_ptr()) % VECTOR_BYTES == 0 for x, dx in pairs) and all(
        (stride - d_stride) % vec == 0 for stride, d_stride in strides
    )


def launch_backward(
    d_loss: torch.Tensor,  # [B, S] of any strides
    logits: list[torch.Tensor],  # one [B, S, H, V], or H x [B, S, V]
    d_logits: list[torch.Tensor],  # alike, written wholly
    labels: torch.Tensor,
    token_weights: torch.Tensor | None,
    head_weights: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    row_max: torch.Tensor,  # [B, S, H]
    log_sum: torch.Tensor,  # [B, S, H]
    factor: torch.Tensor,  # []
    *,
    shift: int,
    over_horizon: bool,
    target_weights: bool,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
) -> None:
    """Write the gradient of every logit into d_logits."""
    B, S, *_, V = logits[0].shape
    H = row_max.shape[-1]
    heads, d_heads = pack_heads(logits), pack_heads(d_logits)
    aligned, vec = row_layout(heads, d_heads)
    shape = backward_tile(V, logits[0].element_size(), WARP_SIZE)
    splits = row_splits(B * S, V, shape.strips * shape.threads * vec, processors(labels.device))
    backward_kernel[(B * S, splits)](
        heads,
        d_heads,
        pack_rows(labels, token_weights, head_weights, seq_lens, document_ids),
        d_loss,
        *d_loss.stride(),
        factor,
        row_max,
        log_sum,
        splits,
        S,
        V,
        ignore_index,
        1.0 if softcap is None else softcap,
        z_loss,
        label_smoothing,
        SHIFT=shift,
        H=H,
        H_BLOCK=power_of_2(H),
        OVER_HORIZON=over_horizon,
        TARGET_WEIGHTS=target_weights,
        HAS_SOFTCAP=softcap is not None,
        PLAIN=z_loss == 0 and label_smoothing == 0,
        ALIGNED=aligned,
        SAME_CUT=aligned or same_cut(heads, d_heads, vec),
        VEC=vec,
        STRIPS=shape.strips,
        THREADS=shape.threads,
        SHARED=splits > 1,
        num_warps=shape.num_warps,
    )


def traffic(live_rows: int, all_rows: int, V: int, itemsize: int) -> tuple[int, int]:
    """Bytes of logits read, and bytes of gradient written."""
    return live_rows * V * itemsize, all_rows * V * itemsize
