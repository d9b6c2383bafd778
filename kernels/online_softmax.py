"""Tiling of one row of logits, and the single online-softmax pass over it.

Math       maximum = max_v z[v],  row_sum = sum_v exp(z[v] - maximum),  total = sum_v (z[v] - base), z after the softcap
           base is the maximum of the first tile: any number near the row would do

Shapes     heads: one [B,S,H,V] or H tensors [B,S,V] of any strides. A row: (pointer, stride) of V entries; its
           statistics are scalars, fp32 or int32

Algorithm  The row is divided at its 16-byte boundaries: a body of whole vectors, and up to 2 * VEC - 2 edge elements.
           The body is read in tiles [STRIPS, THREADS, VEC]. Every thread keeps its own running maximum and sum in
           base 2 (arXiv:1805.02867, algorithm 3), so the loop has no barrier; one reduction follows it. With split-V
           the body is divided into `num_splits` ranges of whole tiles, of which one is read; the edges belong to
           the first.

Traffic    The logits of one split, once.

Numerics   Every sum in fp32. Lanes past V are masked after the softcap, never before: -inf through tanh is a number.
           A row, or a split, of -inf everywhere has the maximum -inf and the sum 0. A label of -1 gives NaN.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from mtp_ce.kernels.tiles import VECTOR_BYTES
from mtp_ce.options import LossOptions, VocabShard

LOG2_E = tl.constexpr(1.4426950408889634)
INT32_MAX = tl.constexpr(2**31 - 1)


class Heads(NamedTuple):
    """Logits, or their gradient, as one kernel argument."""

    pointers: Any  # one, or H
    stride_b: Any  # as many, like the two below
    stride_s: Any
    stride_v: Any
    stride_h: Any  # of one [B, S, H, V]; None for H tensors [B, S, V]

    def row_strides(self) -> tuple[int, ...]:
        """Return every distance between rows."""
        return (*self.stride_b, *self.stride_s, self.stride_h or 0)


class Terms(NamedTuple):
    """The numbers of the loss, as one kernel argument."""

    softcap: Any  # 1.0 without one
    z_loss: Any
    label_smoothing: Any
    changing: Any  # [4], as `LossInputs.terms`: read instead of the numbers; None without
    vocab_size: Any  # V of all ranks, where a row is one rank's part of it; else None, like the one below
    vocab_start: Any  # the first entry of the part


class SoftmaxSettings(NamedTuple):
    """Compile-time constants of `online_softmax`."""

    HAS_SOFTCAP: bool
    SMOOTH: bool  # label smoothing: the mean of the row is needed
    TOP1: bool
    ALIGNED: bool  # every row starts and ends on a 16-byte boundary
    VEC: int  # elements of one load
    STRIPS: int
    THREADS: int
    SPLIT: bool  # several programs share a row
    EVICTION: str  # cache policy of the loads


@triton.jit
def term(number, changing, INDEX: tl.constexpr):
    """A number of the loss: the argument, or where it changes between calls element INDEX of `TERMS`."""
    if changing is not None:
        number = tl.load(changing + INDEX).to(tl.float32)
    return number


@triton.jit
def all_entries(V, terms):
    """The size of the vocabulary of which a row has V entries."""
    if terms.vocab_size is not None:
        V = terms.vocab_size
    return V


@triton.jit
def own_label(label, V, terms):
    """A label as an index of the row's V entries: V where another rank has it, -1 outside the vocabulary."""
    if terms.vocab_start is not None:
        own = label - terms.vocab_start
        label = tl.where(label < 0, -1, tl.where((own >= 0) & (own < V), own, V))
    return label


@triton.jit
def smoothing_loss(above_mean, terms):
    """What label smoothing adds to a row's loss: its factor times the label's logit above the mean."""
    smoothing = term(terms.label_smoothing, terms.changing, 3)
    loss = smoothing * above_mean
    if terms.changing is not None:
        # A label of probability 0 must not come back as 0 * -inf; a number that is 0 is known when this compiles.
        loss = tl.where(smoothing == 0.0, 0.0, loss)
    return loss


@triton.jit
def row_of(heads, b, t, h: tl.constexpr):
    """The row of head h at (b, t): its pointer, and the distance of its entries."""
    i: tl.constexpr = h if heads.stride_h is None else 0
    row_ptr = heads.pointers[i] + b * heads.stride_b[i] + t * heads.stride_s[i]
    if heads.stride_h is not None:
        row_ptr += tl.full([], h, tl.int64) * heads.stride_h
    return row_ptr, heads.stride_v[i]


@triton.jit
def vector_bounds(row_ptr, V, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements before the first 16-byte boundary of a row, and elements of the whole vectors after it."""
    if ALIGNED or VEC == 1:
        lead = tl.zeros([], tl.int32)
        # V itself where ALIGNED; the product tells the compiler that masks come in whole vectors.
        body = V // VEC * VEC
    else:
        past = ((row_ptr.to(tl.int64) % 16) * VEC // 16).to(tl.int32)
        lead = tl.minimum((VEC - past) % VEC, V)
        body = (V - lead) // VEC * VEC
    return lead, body


@triton.jit
def vector_ptr(ptr):
    """A pointer at a 16-byte boundary, so that every backend knows that it is one."""
    # AMD's backend drops the hint from a pointer that it can trace to an argument: the integer breaks the trace.
    return tl.multiple_of((ptr.to(tl.int64) // 16 * 16).to(ptr.dtype), 16)


@triton.jit
def split_bounds(body, V, split, num_splits, SPLIT: tl.constexpr, TILE: tl.constexpr, VEC: tl.constexpr):
    """First offset of a split of the body, the one past its last, and V for the split that has the edges, else 0."""
    first = tl.zeros([], tl.int32)
    last = body
    edges_end = V
    if SPLIT:
        step = tl.cdiv(tl.cdiv(body, TILE), num_splits) * TILE
        first = split * step
        # The product tells the compiler again that masks come in whole vectors.
        last = tl.minimum(first + step, body) // VEC * VEC
        edges_end = tl.where(split == 0, V, 0)
    return first, last, edges_end


@triton.jit
def tile_offsets(start, stride_v, STRIPS: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr):
    """Offsets of a tile [STRIPS, THREADS, VEC] in the body, as indices and as elements of memory."""
    strip = tl.arange(0, STRIPS)[:, None, None] * (THREADS * VEC)
    offs_v = start + strip + tl.arange(0, THREADS)[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
    offs = offs_v
    if VEC == 1:
        offs = offs_v.to(tl.int64) * stride_v
    return offs_v, offs


@triton.jit
def edge_offsets(lead, body, V, VEC: tl.constexpr):
    """Offsets [2 * VEC] of the elements outside the body: before it, after it. V where there is none."""
    lane = tl.arange(0, 2 * VEC)
    front = tl.where(lane < lead, lane, V)
    return tl.where(lane < VEC, front, tl.minimum(lead + body + lane - VEC, V))


@triton.jit
def soft_cap(z, cap):
    """cap * tanh(z / cap), good to 5 ulp everywhere."""
    y = z * (1.0 / cap)
    # 1 - 2 / (e^2y + 1) cancels near 0, where most logits lie; there an odd polynomial, minimax of the relative error
    # (1.2e-7), takes over. No libdevice: every target runs the same code.
    y2 = y * y
    near = -0.0477942218 * y2 + 0.132776291
    near = near * y2 - 0.333318823
    near = (z * y2) * near + z
    far = cap - (2.0 * cap) * (1.0 / (tl.exp2(y * 2.8853900817779268) + 1.0))
    return tl.where(tl.abs(y) < 0.4, near, far)


@triton.jit
def widened(x):
    """x in fp32."""
    if x.dtype == tl.bfloat16:
        # A shift or a mask of the word that holds two of them: the compiler's own conversion takes both for one.
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def scaled_exp(z, maximum):
    """exp(z - maximum), 0 for -inf also where the maximum is -inf."""
    return tl.exp2((z - tl.where(maximum == float("-inf"), 0.0, maximum)) * LOG2_E)


@triton.jit
def finite_or_zero(x):
    """x, or 0 for an infinity or NaN."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def online_softmax(row, V, label, split, num_splits, softcap, SETTINGS: tl.constexpr):
    """Of one split of a row: maximum, sum of exponentials, label logit, number of entries, base, total, argmax.

    The label logit is 0 where the label lies in another split.
    """
    ALIGNED: tl.constexpr = SETTINGS.ALIGNED
    VEC: tl.constexpr = SETTINGS.VEC
    STRIPS: tl.constexpr = SETTINGS.STRIPS
    THREADS: tl.constexpr = SETTINGS.THREADS
    TILE: tl.constexpr = STRIPS * THREADS * VEC
    row_ptr, stride_v = row
    lead, body = vector_bounds(row_ptr, V, VEC, ALIGNED)
    first, last, edges_end = split_bounds(body, V, split, num_splits, SETTINGS.SPLIT, TILE, VEC)
    body_ptr = row_ptr + lead
    if VEC > 1:
        body_ptr = vector_ptr(body_ptr)
    lane_max = tl.full([THREADS], float("-inf"), tl.float32)
    lane_sum = tl.zeros([THREADS], tl.float32)
    lane_total = tl.zeros([THREADS], tl.float32)
    lane_argmax = tl.full([THREADS], INT32_MAX, tl.int32) - lead
    label_logit = tl.where(label >= 0, 0.0, float("nan"))
    label_offset = label - lead
    base = 0.0
    lane = tl.arange(0, THREADS)
    offs_in_lane = tl.arange(0, STRIPS)[:, None, None] * (THREADS * VEC) + tl.arange(0, VEC)[None, None, :]

    for start in range(first, last, TILE):
        offs_v, offs = tile_offsets(start, stride_v, STRIPS, THREADS, VEC)
        mask_v = offs_v < last
        z = tl.load(body_ptr + offs, mask=mask_v, other=float("-inf"), eviction_policy=SETTINGS.EVICTION)
        z = widened(z)
        if SETTINGS.HAS_SOFTCAP:
            z = tl.where(mask_v, soft_cap(z, softcap), float("-inf"))
        tile_max = tl.max(tl.max(z, axis=2), axis=0)
        if SETTINGS.SMOOTH:
            # Summed relative to the row's own level: a sum of logits of 1e4 loses the mean's last 1e-3.
            if start == first:
                base = finite_or_zero(tl.max(tile_max, axis=0))
            lane_total += tl.sum(tl.sum(tl.where(mask_v, z - base, 0.0), axis=2), axis=0)
        if SETTINGS.TOP1:
            # Of equal maxima the first wins: a later tile replaces only what it exceeds.
            # Offsets within a lane are constants of the machine code; what they count from is added once a tile.
            at_max = tl.where(z == tile_max[None, :, None], offs_in_lane, INT32_MAX)
            tile_argmax = tl.min(tl.min(at_max, axis=2), axis=0) + (start + lane * VEC)
            lane_argmax = tl.where(tile_max > lane_max, tile_argmax, lane_argmax)
        new_max = tl.maximum(lane_max, tile_max)
        tile_sum = tl.sum(tl.sum(scaled_exp(z, new_max[None, :, None]), axis=2), axis=0)
        lane_sum = lane_sum * scaled_exp(lane_max, new_max) + tile_sum
        lane_max = new_max
        # One tile of the row holds the label: the only one that pays for the search.
        if (label_offset >= start) & (label_offset < tl.minimum(start + TILE, last)):
            label_logit += tl.sum(tl.sum(tl.sum(tl.where(offs_v == label_offset, z, 0.0), axis=2), axis=0), axis=0)

    maximum = tl.max(lane_max, axis=0)
    total = 0.0
    if SETTINGS.SMOOTH:
        total = tl.sum(lane_total, axis=0)
    entries = tl.maximum(last - first, 0)
    HAS_EDGES: tl.constexpr = not (ALIGNED or VEC == 1)
    if HAS_EDGES:
        offs_e = edge_offsets(lead, body, V, VEC)
        mask_e = offs_e < edges_end
        entries += tl.sum(mask_e.to(tl.int32), axis=0)
        edge = tl.load(row_ptr + offs_e, mask=mask_e, other=float("-inf")).to(tl.float32)
        if SETTINGS.HAS_SOFTCAP:
            edge = tl.where(mask_e, soft_cap(edge, softcap), float("-inf"))
        if SETTINGS.SMOOTH:
            # A row without a whole vector has no first tile to take the base from.
            if body == 0:
                base = finite_or_zero(tl.max(edge, axis=0))
            total += tl.sum(tl.where(mask_e, edge - base, 0.0), axis=0)
        maximum = tl.maximum(maximum, tl.max(edge, axis=0))
        label_logit += tl.sum(tl.where(mask_e & (offs_e == label), edge, 0.0), axis=0)
    # The sum over lanes adds materialised values: a product contracted into an add across a shuffle would leave lanes
    # with different last bits, and which of them is stored is undefined.
    scaled_sum = tl.where(lane_max == float("-inf"), 0.0, lane_sum * scaled_exp(lane_max, maximum))
    row_sum = tl.sum(scaled_sum, axis=0)
    if HAS_EDGES:
        row_sum += tl.sum(scaled_exp(edge, maximum), axis=0)

    argmax = 0
    if SETTINGS.TOP1:
        argmax = lead + tl.min(tl.where(lane_max == maximum, lane_argmax, INT32_MAX - lead), axis=0)
        if HAS_EDGES:
            argmax = tl.minimum(argmax, tl.min(tl.where((edge == maximum) & mask_e, offs_e, INT32_MAX), axis=0))
        argmax = tl.where(argmax == INT32_MAX, 0, argmax)
    return maximum, row_sum, label_logit, entries, base, total, argmax


def loss_terms(options: LossOptions, changing: torch.Tensor | None, shard: VocabShard | None = None) -> Terms:
    """Return the numbers that the kernels take, and where those that change are read."""
    softcap = 1.0 if options.softcap is None else options.softcap
    vocabulary = (None, None) if shard is None else (shard.vocab_size, shard.vocab_start)
    return Terms(softcap, options.z_loss, options.label_smoothing, changing, *vocabulary)


def is_plain(options: LossOptions) -> bool:
    """Return whether a row's loss is its cross entropy alone."""
    return options.z_loss == 0 and options.label_smoothing == 0


def pack_heads(tensors: list[torch.Tensor]) -> Heads:
    """Return one [B,S,H,V], or H tensors [B,S,V], with their strides."""
    if tensors[0].dim() == 4:
        stride_b, stride_s, stride_h, stride_v = tensors[0].stride()
        return Heads((tensors[0],), (stride_b,), (stride_s,), (stride_v,), stride_h)
    by_dimension = zip(*(tensor.stride() for tensor in tensors), strict=True)
    return Heads._make((tuple(tensors), *by_dimension, None))


def row_layout(*all_heads: Heads) -> tuple[bool, int]:
    """Return ALIGNED (every row starts and ends on a 16-byte boundary) and VEC (elements of one load)."""
    first = all_heads[0].pointers[0]
    V, vec = first.shape[-1], VECTOR_BYTES // first.element_size()
    aligned = V % vec == 0
    for heads in all_heads:
        if any(stride != 1 for stride in heads.stride_v):
            return True, 1
        aligned = aligned and all(stride % vec == 0 for stride in heads.row_strides())
        aligned = aligned and all(tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in heads.pointers)
    return aligned, vec
