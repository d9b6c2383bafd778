"""One row of logits, cut into tiles: where its vectors lie, and one walk over them that learns all a loss needs.

Math       maximum = max_v z[v],  sum = sum_v exp(z[v] - maximum),  total = sum_v (z[v] - base), z after the softcap
           base is the maximum of the first tile: any number near the row would do

Shapes     heads: one [B,S,H,V] or H tensors [B,S,V] of any strides. row_ptr: V entries at distance stride_v; everything
           learnt of them is a scalar, fp32 or int32

Algorithm  The row is cut at its own 16-byte boundaries: a body of whole vectors, and up to 2 * VEC - 2 edge elements.
           The body is walked in tiles [STRIPS, THREADS, VEC]. Every thread keeps its own running maximum and sum in
           base 2 (arXiv:1805.02867, algorithm 3), so no barrier stands in the loop; they meet at the end. A row
           that is shared is cut into `splits` parts of whole tiles, of which one is walked; the edges belong to the
           first.

Traffic    A part's logits, once.

Numerics   Every sum in fp32. Lanes past V are masked after the softcap, never before: -inf through tanh is a number.
           A row, or a part, of -inf everywhere has the maximum -inf and the sum 0. A label of -1 gives NaN.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from mtp_ce.kernels.rows import soft_cap
from mtp_ce.kernels.tiles import VECTOR_BYTES

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
def cut_part(body, V, part, splits, SHARED: tl.constexpr, TILE: tl.constexpr, VEC: tl.constexpr):
    """First offset of a part of the body, the one past its last, and V for the part that has the edges, else 0."""
    first = tl.zeros([], tl.int32)
    last = body
    edges_end = V
    if SHARED:
        step = tl.cdiv(tl.cdiv(body, TILE), splits) * TILE
        first = part * step
        # The product tells the compiler again that masks come in whole vectors.
        last = tl.minimum(first + step, body) // VEC * VEC
        edges_end = tl.where(part == 0, V, 0)
    return first, last, edges_end


@triton.jit
def visit_row(
    row_ptr,
    stride_v,
    V,
    label,
    part,
    splits,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    TOP1: tl.constexpr,
    ALIGNED: tl.constexpr,
    VEC: tl.constexpr,
    STRIPS: tl.constexpr,
    THREADS: tl.constexpr,
    SHARED: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Of a part of a row: maximum, sum above it, the label's logit, entries, base and total, argmax.

    The label's logit is 0 where another part has it.
    """
    TILE: tl.constexpr = STRIPS * THREADS * VEC
    head, body = split_row(row_ptr, V, VEC, ALIGNED)
    first, last, edges_end = cut_part(body, V, part, splits, SHARED, TILE, VEC)
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

    for start in range(first, last, TILE):
        offs, place = tile_offsets(start, stride_v, STRIPS, THREADS, VEC)
        inside = offs < last
        z = tl.load(body_ptr + place, mask=inside, other=float("-inf"), eviction_policy=EVICTION).to(tl.float32)
        if HAS_SOFTCAP:
            z = tl.where(inside, soft_cap(z, softcap), float("-inf"))
        tile_max = tl.max(tl.max(z, axis=2), axis=0)
        if SMOOTH:
            # Summed from where the row lies: at logits of 1e4 a sum of them loses the mean's last 1e-3.
            if start == first:
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
        if (wanted >= start) & (wanted < tl.minimum(start + TILE, last)):
            label_logit += tl.sum(tl.sum(tl.sum(tl.where(offs == wanted, z, 0.0), axis=2), axis=0), axis=0)

    maximum = tl.max(own_max, axis=0)
    total = 0.0
    if SMOOTH:
        total = tl.sum(own_total, axis=0)
    entries = tl.maximum(last - first, 0)
    HAS_EDGES: tl.constexpr = not (ALIGNED or VEC == 1)
    if HAS_EDGES:
        offs_e = edge_offsets(head, body, V, VEC)
        inside = offs_e < edges_end
        entries += tl.sum(inside.to(tl.int32), axis=0)
        edge = tl.load(row_ptr + offs_e, mask=inside, other=float("-inf")).to(tl.float32)
        if HAS_SOFTCAP:
            edge = tl.where(inside, soft_cap(edge, softcap), float("-inf"))
        if SMOOTH:
            if body == 0:
                base = finite_or_zero(tl.max(edge, axis=0))
            total += tl.sum(tl.where(inside, edge - base, 0.0), axis=0)
        maximum = tl.maximum(maximum, tl.max(edge, axis=0))
        label_logit += tl.sum(tl.where(inside & (offs_e == label), edge, 0.0), axis=0)
    row_sum = tl.sum(own_sum * scaled_exp(own_max, maximum), axis=0)
    if HAS_EDGES:
        row_sum += tl.sum(scaled_exp(edge, maximum), axis=0)

    best = 0
    if TOP1:
        best = head + tl.min(tl.where(own_max == maximum, own_best, INT32_MAX - head), axis=0)
        if HAS_EDGES:
            best = tl.minimum(best, tl.min(tl.where((edge == maximum) & inside, offs_e, INT32_MAX), axis=0))
        best = tl.where(best == INT32_MAX, 0, best)
    return maximum, row_sum, label_logit, entries, base, total, best


class Heads(NamedTuple):
    """Logits, or their gradient, as one kernel argument."""

    pointers: Any  # one, or H
    stride_b: Any  # as many, like the two below
    stride_s: Any
    stride_v: Any
    stride_h: Any  # of one [B, S, H, V]; None of H tensors [B, S, V]

    def row_strides(self) -> tuple[int, ...]:
        """Every distance between rows."""
        return (*self.stride_b, *self.stride_s, self.stride_h or 0)


@triton.jit
def row_of(heads, b, t, h: tl.constexpr):
    """Pointer to the row of head h at (b, t), and the distance of its entries."""
    i: tl.constexpr = h if heads.stride_h is None else 0
    row_ptr = heads.pointers[i] + b * heads.stride_b[i] + t * heads.stride_s[i]
    if heads.stride_h is not None:
        row_ptr += tl.full([], h, tl.int64) * heads.stride_h
    return row_ptr, heads.stride_v[i]


def pack_heads(given: list[torch.Tensor]) -> Heads:
    """One [B,S,H,V], or H tensors [B,S,V]."""
    if given[0].dim() == 4:
        stride_b, stride_s, stride_h, stride_v = given[0].stride()
        return Heads((given[0],), (stride_b,), (stride_s,), (stride_v,), stride_h)
    by_dimension = zip(*(tensor.stride() for tensor in given), strict=True)
    return Heads._make((tuple(given), *by_dimension, None))


def row_layout(*all_heads: Heads) -> tuple[bool, int]:
    """ALIGNED: every row starts and ends on a 16-byte boundary; VEC: elements of one load."""
    first = all_heads[0].pointers[0]
    V, vec = first.shape[-1], VECTOR_BYTES // first.element_size()
    aligned = V % vec == 0
    for heads in all_heads:
        if any(stride != 1 for stride in heads.stride_v):
            return True, 1
        aligned = aligned and all(stride % vec == 0 for stride in heads.row_strides())
        aligned = aligned and all(tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in heads.pointers)
    return aligned, vec
