"""Weighted multi-token cross entropy of one position: one visit to each live logit.

Math       lse[r]  = log sum_v exp z[r,v]            r = (b, t, h), z after the softcap; nats
           ce[r]   = lse[r] - z[r, label(r)]
           row[r]  = lse - (1-e) z[label] - e mean_v z + c lse^2        label smoothing e, z-loss c; = ce without
           out[p]  = sum_h coefficient[r] * row[r]                      p = (b, t), coefficient as in rows.py
           loss    = scale / N * sum_p out[p]        N = positions with a live head, a given normalizer, or 1

Shapes     logits: H tensors [B,S,V] of any strides (the heads of one [B,S,H,V], or separate); rows as in rows.py
           -> out [B,S], ce, row_max, log_sum [B,S,H] fp32, live [B,S,H] bool, top1 [B,S,H] int32, shares [B,S,H] fp32

Algorithm  One program owns a position. It learns its coefficients from H labels, then walks the vocabulary of each
           head that counts in tiles [STRIPS, THREADS, VEC]. Every thread keeps its own running maximum and sum in
           base 2 (arXiv:1805.02867, algorithm 3), so no barrier stands in the loop; they meet once a row. The row is
           cut at its own 16-byte boundaries: a body of whole vectors, and up to 2 * VEC - 2 edge elements. A head that
           is not live, or whose coefficient is 0, is not read at all (with shares wanted: whose share is 0).

Traffic    live rows * V * itemsize read once; 1 + 16 H bytes and more a position written. See `traffic`.

Numerics   Every sum in fp32. Lanes past V are masked after the softcap, never before: -inf through tanh is a number.
           The maximum and the log of the sum are kept apart: their sum loses 1e-3 at logits of 1e4, and with it the
           gradient. A row of -inf everywhere gives lse = -inf. A label outside [0, V) gives NaN.
"""

import torch
import triton
import triton.language as tl

from mtp_ce.kernels.rows import pack_rows, pick, row_coefficients, soft_cap
from mtp_ce.kernels.tiles import VECTOR_BYTES, WARP_SIZE, forward_tile

LOG2_E = tl.constexpr(1.4426950408889634)
INT32_MAX = tl.constexpr(2**31 - 1)


@triton.jit
def split_row(row_ptr, V, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements before the first 16-byte boundary of a row, and elements of the whole vectors after it."""
    if ALIGNED or VEC == 1:
        head = tl.zeros([], tl.int32)
        # V itself where ALIGNED; the product tells the compiler that masks come in whole vectors.
        body = V // VEC * VEC
    else:
        past = ((row_ptr.to(tl.int64) % 16) * VEC // 16).to(tl.int32)
        head = tl.minimum((VEC - past) % VEC, V)
        body = (V - head) // VEC * VEC
    return head, body


@triton.jit
def vector_ptr(ptr):
    """A pointer at a 16-byte boundary, so that every backend knows that it is one."""
    # AMD's backend drops the hint from a pointer that it can trace to an argument: the integer breaks the trace.
    return tl.multiple_of((ptr.to(tl.int64) // 16 * 16).to(ptr.dtype), 16)


@triton.jit
def tile_offsets(start, stride_v, STRIPS: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr):
    """Offsets of a tile [STRIPS, THREADS, VEC] in the body, as indices and as elements of memory."""
    strip = tl.arange(0, STRIPS)[:, None, None] * (THREADS * VEC)
    offs = start + strip + tl.arange(0, THREADS)[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    place = offs
    if VEC == 1:
        place = offs.to(tl.int64) * stride_v
    return offs, place


@triton.jit
def edge_offsets(head, body, V, VEC: tl.constexpr):
    """Offsets [2 * VEC] of the elements outside the body: before it, after it. V where there is none."""
    lane = tl.arange(0, 2 * VEC)
    front = tl.where(lane < head, lane, V)
    return tl.where(lane < VEC, front, tl.minimum(head + body + lane - VEC, V))


@triton.jit
def scaled_exp(z, maximum):
    """exp(z - maximum), 0 for -inf also where the maximum is -inf."""
    return tl.exp2((z - tl.where(maximum == float("-inf"), 0.0, maximum)) * LOG2_E)


@triton.jit
def finite_or_zero(x):
    """x, or 0 for an infinity or NaN."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def visit_row(
    row_ptr,
    stride_v,
    V,
    label,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    TOP1: tl.constexpr,
    ALIGNED: tl.constexpr,
    VEC: tl.constexpr,
    STRIPS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Maximum, log of the sum above it, the label's logit, how far it lies above the mean logit, argmax: of one row."""
    head, body = split_row(row_ptr, V, VEC, ALIGNED)
    body_ptr = row_ptr + head
    if VEC > 1:
        body_ptr = vector_ptr(body_ptr)
    own_max = tl.full([THREADS], float("-inf"), tl.float32)
    own_sum = tl.zeros([THREADS], tl.float32)
    own_total = tl.zeros([THREADS], tl.float32)
    own_best = tl.full([THREADS], INT32_MAX, tl.int32) - head
    label_logit = tl.where(label >= 0, 0.0, float("nan"))
    wanted = label - head
    base = 0.0

    for start in range(0, body, STRIPS * THREADS * VEC):
        offs, place = tile_offsets(start, stride_v, STRIPS, THREADS, VEC)
        inside = offs < body
        z = tl.load(body_ptr + place, mask=inside, other=float("-inf")).to(tl.float32)
        if HAS_SOFTCAP:
            z = tl.where(inside, soft_cap(z, softcap), float("-inf"))
        tile_max = tl.max(tl.max(z, axis=2), axis=0)
        if SMOOTH:
            # Summed from where the row lies: at logits of 1e4 a sum of them loses the mean's last 1e-3.
            if start == 0:
                base = finite_or_zero(tl.max(tile_max, axis=0))
            own_total += tl.sum(tl.sum(tl.where(inside, z - base, 0.0), axis=2), axis=0)
        if TOP1:
            found = tl.where(z == tile_max[None, :, None], offs, INT32_MAX)
            own_best = tl.where(tile_max > own_max, tl.min(tl.min(found, axis=2), axis=0), own_best)
        new_max = tl.maximum(own_max, tile_max)
        tile_sum = tl.sum(tl.sum(scaled_exp(z, new_max[None, :, None]), axis=2), axis=0)
        own_sum = own_sum * scaled_exp(own_max, new_max) + tile_sum
        own_max = new_max
        # One tile of the row holds the label: the only one that pays for the search.
        if (wanted >= start) & (wanted < tl.minimum(start + STRIPS * THREADS * VEC, body)):
            label_logit += tl.sum(tl.sum(tl.sum(tl.where(offs == wanted, z, 0.0), axis=2), axis=0), axis=0)

    row_max = tl.max(own_max, axis=0)
    total = 0.0
    if SMOOTH:
        total = tl.sum(own_total, axis=0)
    if ALIGNED or VEC == 1:
        row_sum = tl.sum(own_sum * scaled_exp(own_max, row_max), axis=0)
    else:
        offs_e = edge_offsets(head, body, V, VEC)
        edge = tl.load(row_ptr + offs_e, mask=offs_e < V, other=float("-inf")).to(tl.float32)
        if HAS_SOFTCAP:
            edge = tl.where(offs_e < V, soft_cap(edge, softcap), float("-inf"))
        if SMOOTH:
            if body == 0:
                base = finite_or_zero(tl.max(edge, axis=0))
            total += tl.sum(tl.where(offs_e < V, edge - base, 0.0), axis=0)
        row_max = tl.maximum(row_max, tl.max(edge, axis=0))
        row_sum = tl.sum(own_sum * scaled_exp(own_max, row_max), axis=0) + tl.sum(scaled_exp(edge, row_max), axis=0)
        label_logit += tl.sum(tl.where(offs_e == label, edge, 0.0), axis=0)

    best = 0
    if TOP1:
        best = head + tl.min(tl.where(own_max == row_max, own_best, INT32_MAX - head), axis=0)
        if not (ALIGNED or VEC == 1):
            best = tl.minimum(best, tl.min(tl.where((edge == row_max) & (offs_e < V), offs_e, INT32_MAX), axis=0))
        best = tl.where(best == INT32_MAX, 0, best)
    return row_max, tl.log(row_sum), label_logit, (label_logit - base) - total / V, best


@triton.jit
def forward_kernel(
    logits,  # H pointers
    stride_b,  # H strides, like the two below
    stride_s,
    stride_v,
    rows,
    out_ptr,
    ce_ptr,
    row_max_ptr,
    log_sum_ptr,
    live_ptr,
    top1_ptr,  # None where not wanted, like the shares
    shares_ptr,
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
    """Losses and statistics of position p = program id."""
    p = tl.program_id(0).to(tl.int64)
    b = p // S
    t = p % S
    offs_h = tl.arange(0, H_BLOCK)
    label, live, share, coefficient = row_coefficients(
        rows, b, t, offs_h, S, V, ignore_index, SHIFT, H, OVER_HORIZON, TARGET_WEIGHTS
    )
    tl.store(live_ptr + p * H + offs_h, live, mask=offs_h < H)

    out = 0.0
    for h in tl.static_range(H):
        share_h = pick(share, offs_h, h)
        coefficient_h = pick(coefficient, offs_h, h)
        label_h = pick(label, offs_h, h)
        row_max = 0.0
        log_sum = 0.0
        ce = 0.0
        row_loss = 0.0
        best = -1
        counts = coefficient_h != 0.0
        if shares_ptr is not None:
            # d loss / d w is the row's loss, so a weight of 0 that wants a gradient is read too.
            counts = share_h != 0.0
        if counts:
            row_max, log_sum, label_logit, above_mean, best = visit_row(
                logits[h] + b * stride_b[h] + t * stride_s[h],
                stride_v[h],
                V,
                label_h,
                softcap,
                HAS_SOFTCAP,
                SMOOTH,
                top1_ptr is not None,
                ALIGNED,
                VEC,
                STRIPS,
                THREADS,
            )
            ce = (row_max - label_logit) + log_sum
            row_loss = ce
            if not PLAIN:
                lse = row_max + log_sum
                row_loss += z_loss * lse * lse
                if SMOOTH:
                    row_loss += label_smoothing * above_mean
        tl.store(ce_ptr + p * H + h, ce)
        tl.store(row_max_ptr + p * H + h, row_max)
        tl.store(log_sum_ptr + p * H + h, log_sum)
        if top1_ptr is not None:
            tl.store(top1_ptr + p * H + h, best)
        if shares_ptr is not None:
            tl.store(shares_ptr + p * H + h, tl.where(counts, share_h * row_loss, 0.0))
        out += tl.where(coefficient_h != 0.0, coefficient_h * row_loss, 0.0)
    tl.store(out_ptr + p, out)


@triton.jit
def mean_kernel(
    out_ptr,
    live_ptr,
    normalizer_ptr,
    loss_ptr,
    factor_ptr,
    P,
    scale,
    COUNT: tl.constexpr,
    H: tl.constexpr,
    H_BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Loss = factor * sum of out, factor = scale / N; both exactly 0 where no row is live. One program."""
    offs_h = tl.arange(0, H_BLOCK)
    lane_sum = tl.zeros([BLOCK_P], tl.float32)
    lane_count = tl.zeros([BLOCK_P], tl.int32)
    for start in range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P).to(tl.int64)
        lane_sum += tl.load(out_ptr + offs_p, mask=offs_p < P, other=0.0)
        mask = (offs_p < P)[:, None] & (offs_h < H)[None, :]
        live = tl.load(live_ptr + offs_p[:, None] * H + offs_h[None, :], mask=mask, other=0).to(tl.int32)
        lane_count += tl.max(live, axis=1)
    count = tl.sum(lane_count, axis=0).to(tl.float32)
    normalizer = 1.0
    if COUNT:
        normalizer = count
    elif normalizer_ptr is not None:
        normalizer = tl.load(normalizer_ptr).to(tl.float32)
    none = count == 0.0
    factor = tl.where(none, 0.0, scale / tl.where(none, 1.0, normalizer))
    tl.store(factor_ptr, factor)
    tl.store(loss_ptr, tl.where(none, 0.0, tl.sum(lane_sum, axis=0) * factor))


def row_layout(heads: list[torch.Tensor], *others: torch.Tensor) -> tuple[bool, int]:
    """ALIGNED: every row of every tensor starts and ends on a 16-byte boundary; VEC: elements of one load."""
    V, itemsize = heads[0].shape[-1], heads[0].element_size()
    tensors = [*heads, *others]
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        return True, 1
    vec = VECTOR_BYTES // itemsize
    aligned = V % vec == 0 and all(
        tensor.data_ptr() % VECTOR_BYTES == 0 and tensor.stride(0) % vec == 0 and tensor.stride(1) % vec == 0
        for tensor in tensors
    )
    return aligned, vec


def launch_forward(
    heads: list[torch.Tensor],  # H x [B, S, V]
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
):
    """Out [B,S]; ce, row_max, log_sum, live [B,S,H]; top1 and shares [B,S,H], None where not wanted."""
    B, S, V = heads[0].shape
    H = len(heads)
    new = heads[0].new_empty
    out = new((B, S), dtype=torch.float32)
    ce, row_max, log_sum = (new((B, S, H), dtype=torch.float32) for _ in range(3))
    live = new((B, S, H), dtype=torch.bool)
    top1 = new((B, S, H), dtype=torch.int32) if with_top1 else None
    shares = new((B, S, H), dtype=torch.float32) if with_shares else None
    aligned, vec = row_layout(heads)
    shape = forward_tile(V, heads[0].element_size(), WARP_SIZE, softcap is not None)
    forward_kernel[(B * S,)](
        tuple(heads),
        tuple(head.stride(0) for head in heads),
        tuple(head.stride(1) for head in heads),
        tuple(head.stride(2) for head in heads),
        pack_rows(labels, token_weights, head_weights, seq_lens, document_ids),
        out,
        ce,
        row_max,
        log_sum,
        live,
        top1,
        shares,
        S,
        V,
        ignore_index,
        1.0 if softcap is None else softcap,
        z_loss,
        label_smoothing,
        SHIFT=shift,
        H=H,
        H_BLOCK=triton.next_power_of_2(H),
        OVER_HORIZON=over_horizon,
        TARGET_WEIGHTS=target_weights,
        HAS_SOFTCAP=softcap is not None,
        PLAIN=z_loss == 0 and label_smoothing == 0,
        SMOOTH=label_smoothing != 0,
        ALIGNED=aligned,
        VEC=vec,
        STRIPS=shape.strips,
        THREADS=shape.threads,
        num_warps=shape.num_warps,
    )
    return out, ce, row_max, log_sum, live, top1, shares


def launch_mean(
    out: torch.Tensor,  # [B, S]
    live: torch.Tensor,  # [B, S, H]
    normalizer: torch.Tensor | None,  # []
    *,
    scale: float,
    count: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and factor, 0-d fp32."""
    loss, factor = out.new_empty(()), out.new_empty(())
    H = live.shape[-1]
    mean_kernel[(1,)](
        out,
        live,
        normalizer,
        loss,
        factor,
        out.numel(),
        scale,
        COUNT=count,
        H=H,
        H_BLOCK=triton.next_power_of_2(H),
        BLOCK_P=1024,
        num_warps=8,
    )
    return loss, factor


def traffic(live_rows: int, positions: int, horizon: int, V: int, itemsize: int) -> tuple[int, int]:
    """Bytes read from the logits, and bytes written, by one forward without top1 and shares."""
    return live_rows * V * itemsize, positions * (4 + horizon * (3 * 4 + 1))
