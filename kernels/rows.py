"""The rule of a row, as index arithmetic: which token head h predicts from t, whether it counts, how much.

Math       target = t + shift + h
           live   = target < len(b), label(target) != ignore_index, document(target) == document(t)
           share  = live * a_h / D      D = K(b,t), H, or sum of a_h over live heads; a_h = 1 without head weights
           coefficient = w * share      w = w[b,t], w[b,t,h] or w[b,target]

Shapes     labels, document_ids [B,S]; token_weights [B,S] or [B,S,H]; head_weights [H]; seq_lens [B]; any strides
           -> label, live, share, coefficient as vectors over the H heads of one position

Algorithm  A position's H targets are read as one short vector straight from the caller's tensors.
           Nothing is rolled, padded or copied. `rows_kernel` writes them down, for the linear path's chunks of rows.

Traffic    Per position: H labels, H (or 1) weights, H + 1 document ids. Nothing of size V.

Numerics   Coefficients are fp32, or NaN where a live label lies outside [0, V), which reports a broken
           label without a host sync and without an illegal read.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Rows(NamedTuple):
    """What decides a row's coefficient: tensors (None where not given) and their strides in elements."""

    labels: Any  # [B, S]
    stride_lb: Any
    stride_ls: Any
    token_weights: Any  # [B, S] or [B, S, H]
    stride_wb: Any
    stride_ws: Any
    stride_wh: Any
    head_weights: Any  # [H]
    stride_a: Any
    seq_lens: Any  # [B]
    stride_n: Any
    document_ids: Any  # [B, S]
    stride_db: Any
    stride_ds: Any


NO_STRIDES = (0, 0, 0)


def pack_rows(
    labels: torch.Tensor,
    token_weights: torch.Tensor | None,
    head_weights: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    document_ids: torch.Tensor | None,
) -> Rows:
    """The tensors of the rule with their strides, as one kernel argument."""
    given = (
        labels, *labels.stride(),
        token_weights, *(NO_STRIDES if token_weights is None else (*token_weights.stride(), 0)[:3]),
        head_weights, 0 if head_weights is None else head_weights.stride(0),
        seq_lens, 0 if seq_lens is None else seq_lens.stride(0),
        document_ids, *(NO_STRIDES[:2] if document_ids is None else document_ids.stride()),
    )  # fmt: skip
    return Rows._make(given)


def power_of_2(n: int) -> int:
    """The least power of 2 that is not below n; Triton's own function takes as long as an allocation."""
    return 1 << (n - 1).bit_length()


@triton.jit
def row_coefficients(
    rows,
    b,
    t,
    offs_h,  # [H_BLOCK]
    S,
    V,
    ignore_index,
    SHIFT: tl.constexpr,
    H: tl.constexpr,
    OVER_HORIZON: tl.constexpr,
    TARGET_WEIGHTS: tl.constexpr,
):
    """label (-1 if outside [0, V)), live, share, coefficient of the heads of position (b, t), each [H_BLOCK]."""
    target = t + SHIFT + offs_h
    length = S
    if rows.seq_lens is not None:
        # A length above S is the caller's mistake (validate=True names it), never an illegal read.
        length = tl.minimum(tl.load(rows.seq_lens + b * rows.stride_n).to(tl.int64), S)
    live = (offs_h < H) & (target < length)
    label = tl.load(rows.labels + b * rows.stride_lb + target * rows.stride_ls, mask=live, other=0).to(tl.int64)
    live = live & (label != ignore_index)
    if rows.document_ids is not None:
        docs = rows.document_ids + b * rows.stride_db
        own = tl.load(docs + t * rows.stride_ds)
        live = live & (tl.load(docs + target * rows.stride_ds, mask=live, other=0) == own)

    share = live.to(tl.float32)
    if rows.head_weights is not None:
        share = tl.load(rows.head_weights + offs_h * rows.stride_a, mask=live, other=0.0).to(tl.float32)
    if OVER_HORIZON:
        share = share / H
    else:
        total = tl.sum(share, axis=0)
        share = share / tl.where(total == 0.0, 1.0, total)

    # A NaN or Inf weight on a row whose share is 0 must not come back as NaN * 0.
    counted = live & (share != 0.0)
    coefficient = share
    if rows.token_weights is not None:
        source = t
        if TARGET_WEIGHTS:
            source = target
        place = b * rows.stride_wb + source * rows.stride_ws + offs_h * rows.stride_wh
        w = tl.load(rows.token_weights + place, mask=counted, other=0.0).to(tl.float32)
        coefficient = tl.where(counted, w * share, 0.0)

    broken = live & ((label < 0) | (label >= V))
    share = tl.where(broken & (share != 0.0), float("nan"), share)
    coefficient = tl.where(broken & (coefficient != 0.0), float("nan"), coefficient)
    return tl.where(broken, -1, label).to(tl.int32), live, share, coefficient


@triton.jit
def rows_kernel(
    rows,
    label_ptr,  # [B * S, H] with the strides below, like all that is written
    coefficient_ptr,
    share_ptr,
    live_ptr,
    read_ptr,
    stride_p,
    stride_h,
    S,
    V,
    ignore_index,
    SHIFT: tl.constexpr,
    H: tl.constexpr,
    H_BLOCK: tl.constexpr,
    OVER_HORIZON: tl.constexpr,
    TARGET_WEIGHTS: tl.constexpr,
    WITH_SHARES: tl.constexpr,
):
    """The rows of position p = program id."""
    p = tl.program_id(0).to(tl.int64)
    offs_h = tl.arange(0, H_BLOCK)
    label, live, share, coefficient = row_coefficients(
        rows, p // S, p % S, offs_h, S, V, ignore_index, SHIFT, H, OVER_HORIZON, TARGET_WEIGHTS
    )
    place = p * stride_p + offs_h.to(tl.int64) * stride_h
    mask = offs_h < H
    tl.store(label_ptr + place, tl.where(live, label, 0), mask=mask)
    tl.store(coefficient_ptr + place, coefficient, mask=mask)
    tl.store(share_ptr + place, share, mask=mask)
    tl.store(live_ptr + place, live, mask=mask)
    tl.store(read_ptr + place, (share if WITH_SHARES else coefficient) != 0.0, mask=mask)


def launch_rows(
    labels: torch.Tensor,
    token_weights: torch.Tensor | None,
    head_weights: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    *,
    H: int,
    V: int,
    by_head: bool,
    shift: int,
    over_horizon: bool,
    target_weights: bool,
    ignore_index: int,
    with_shares: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """label int32, coefficient and share fp32, live and read bool: [N], position by position or head by head."""
    P = labels.numel()
    S = labels.shape[1]
    label = labels.new_empty(P * H, dtype=torch.int32)
    coefficient, share = (labels.new_empty(P * H, dtype=torch.float32) for _ in range(2))
    live, read = (labels.new_empty(P * H, dtype=torch.bool) for _ in range(2))
    if P:
        rows_kernel[(P,)](
            pack_rows(labels, token_weights, head_weights, seq_lens, document_ids),
            label,
            coefficient,
            share,
            live,
            read,
            1 if by_head else H,
            P if by_head else 1,
            S,
            V,
            ignore_index,
            SHIFT=shift,
            H=H,
            H_BLOCK=power_of_2(H),
            OVER_HORIZON=over_horizon,
            TARGET_WEIGHTS=target_weights,
            WITH_SHARES=with_shares,
            num_warps=1,
        )
    return label, coefficient, share, live, read


@triton.jit
def pick(values, offs_h, h):
    """Entry h of a vector over heads, as a scalar."""
    return tl.sum(tl.where(offs_h == h, values, tl.zeros_like(values)), axis=0)


@triton.jit
def soft_cap(z, cap):
    """Cap * tanh(z / cap), good to 2 ulp everywhere."""
    y = z / cap
    # 1 - 2 / (e^2y + 1) cancels near 0, where most logits lie; there an odd polynomial (least squares at
    # Chebyshev points) takes over: 7e-8 relative in fp32. No libdevice: every target runs the same code.
    y2 = y * y
    near = -0.00661574655 * y2 + 0.021312739
    near = near * y2 - 0.0539100653
    near = near * y2 + 0.133331176
    near = near * y2 - 0.33333332
    near = y + y * y2 * near
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(y) * 2.8853900817779268) + 1.0)
    return cap * tl.where(tl.abs(y) < 0.55, near, tl.where(y < 0, -far, far))
