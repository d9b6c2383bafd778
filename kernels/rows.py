"""The rule of a row, as index arithmetic: the token that head h predicts from t, whether it counts, and how much.

Math       own, target      = left_halo + t, own + shift + h        indices of labels
           valid            = target < len(b), label(target) != ignore_index, document(target) == document(own)
           head coefficient = valid * a_h / D         a_h = 1 by default
           D                = "live": sum of a_h over the position's valid heads; "horizon": H
                              "target": sum of a_i over the heads i that predict the same token, from own + h - i
           row coefficient  = w * head coefficient        w = w[b,t], w[b,t,h] or w[b,target]

Shapes     labels, document_ids [B,T], T >= left_halo + S; token_weights [B,S], [B,S,H], or [B,T] of the targets;
           head_weights [H]; seq_lens [B]; any strides
           -> label, valid, head and row coefficient as vectors over the H heads of one position

Algorithm  A position's H targets are read as one short vector straight from the caller's tensors. Nothing is
           rolled, padded or copied. `rows_kernel` writes the vectors to memory, for the linear path's chunks of rows.
           "target" allocates nothing either: label and length are the token's own, so head i predicts it unless
           own + h - i lies before the labels or in another document. Positions of the halos count there, too: other
           calls compute their rows.

Traffic    Per position: H labels, H (or 1) weights, H + 1 document ids ("target": 2 H - 1 and more). Nothing of size V.

Numerics   Coefficients are fp32, or NaN where a valid label lies outside [0, V), which reports a broken label
           without a host sync and without an illegal read.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from mtp_ce.options import LossInputs, LossOptions

NO_STRIDES = (0, 0, 0)


class RowInputs(NamedTuple):
    """The tensors of the rule (None where not given) and their strides in elements, as one kernel argument."""

    labels: Any  # [B, T]
    stride_lb: Any
    stride_ls: Any
    num_tokens: Any  # T
    token_weights: Any  # [B, S], [B, S, H] or [B, T]
    stride_wb: Any
    stride_ws: Any
    stride_wh: Any
    head_weights: Any  # [H]
    stride_a: Any
    seq_lens: Any  # [B]
    stride_n: Any
    document_ids: Any  # [B, T]
    stride_db: Any
    stride_ds: Any


class Rule(NamedTuple):
    """Compile-time constants of the rule."""

    SHIFT: int
    LEFT_HALO: int
    H: int
    H_BLOCK: int  # H rounded up to a power of 2
    OVER: str  # head_reduction: what a head's weight is divided by
    TARGET_WEIGHTS: bool  # weights are those of the targets, [B, T]


class RowOutputs(NamedTuple):
    """What `rows_kernel` writes, [N] each: position by position, or head by head."""

    label: Any  # int32, 0 where the row is not valid, -1 outside [0, V)
    coefficient: Any  # fp32
    head_coefficient: Any  # fp32
    valid: Any  # bool
    row_mask: Any  # bool: the row is computed


class RowsSettings(NamedTuple):
    """Compile-time constants of `rows_kernel`."""

    rule: Rule
    WITH_D_WEIGHTS: bool  # rows of weight 0 are computed too


@triton.jit
def token_totals(rows, b, own, offs_h, valid, target, RULE: tl.constexpr):
    """Sum of the weights of all heads that predict the same token as head h from own, [H_BLOCK]; 0 where not valid."""
    total = tl.zeros([RULE.H_BLOCK], tl.float32)
    for i in tl.static_range(RULE.H):
        # Head i predicts the token from here. Rows of one token sum in one order, and so divide by the same bits.
        source = own + offs_h - i
        predicts = valid & (source >= 0)
        if rows.document_ids is not None:
            docs = rows.document_ids + b * rows.stride_db
            document = tl.load(docs + target * rows.stride_ds, mask=predicts, other=0)
            predicts = predicts & (tl.load(docs + source * rows.stride_ds, mask=predicts, other=0) == document)
        weight = 1.0
        if rows.head_weights is not None:
            weight = tl.load(rows.head_weights + i * rows.stride_a).to(tl.float32)
        total += tl.where(predicts, weight, 0.0)
    return total


@triton.jit
def row_coefficients(
    rows,
    b,
    t,
    offs_h,  # [H_BLOCK]
    V,
    ignore_index,
    RULE: tl.constexpr,
):
    """label (-1 if outside [0, V)), valid, head coefficient, row coefficient of position (b, t), each [H_BLOCK]."""
    SHIFT: tl.constexpr = RULE.SHIFT
    H: tl.constexpr = RULE.H
    own = t + RULE.LEFT_HALO
    target = own + SHIFT + offs_h
    length = rows.num_tokens
    if rows.seq_lens is not None:
        # A length above T is the caller's mistake (validate=True names it), never an illegal read.
        length = tl.minimum(tl.load(rows.seq_lens + b * rows.stride_n).to(tl.int64), length)
    valid = (offs_h < H) & (target < length)
    label = tl.load(rows.labels + b * rows.stride_lb + target * rows.stride_ls, mask=valid, other=0).to(tl.int64)
    valid = valid & (label != ignore_index)
    if rows.document_ids is not None:
        docs = rows.document_ids + b * rows.stride_db
        document = tl.load(docs + own * rows.stride_ds)
        valid = valid & (tl.load(docs + target * rows.stride_ds, mask=valid, other=0) == document)

    head_coefficient = valid.to(tl.float32)
    if rows.head_weights is not None:
        head_coefficient = tl.load(rows.head_weights + offs_h * rows.stride_a, mask=valid, other=0.0).to(tl.float32)
    if RULE.OVER == "horizon":
        head_coefficient = head_coefficient / H
    else:
        if RULE.OVER == "target":
            total = token_totals(rows, b, own, offs_h, valid, target, RULE)
        else:
            total = tl.sum(head_coefficient, axis=0)
        head_coefficient = head_coefficient / tl.where(total == 0.0, 1.0, total)

    # A NaN or Inf weight on a row whose head coefficient is 0 must not come back as NaN * 0.
    counts = valid & (head_coefficient != 0.0)
    coefficient = head_coefficient
    if rows.token_weights is not None:
        source = t
        if RULE.TARGET_WEIGHTS:
            source = target
        offs_w = b * rows.stride_wb + source * rows.stride_ws + offs_h * rows.stride_wh
        w = tl.load(rows.token_weights + offs_w, mask=counts, other=0.0).to(tl.float32)
        coefficient = tl.where(counts, w * head_coefficient, 0.0)

    broken = valid & ((label < 0) | (label >= V))
    head_coefficient = tl.where(broken & (head_coefficient != 0.0), float("nan"), head_coefficient)
    coefficient = tl.where(broken & (coefficient != 0.0), float("nan"), coefficient)
    return tl.where(broken, -1, label).to(tl.int32), valid, head_coefficient, coefficient


@triton.jit
def pick(values, offs_h, h):
    """Entry h of a vector over heads, as a scalar."""
    return tl.sum(tl.where(offs_h == h, values, tl.zeros_like(values)), axis=0)


@triton.jit
def rows_kernel(
    rows,
    values,  # [B * S, H] each, with the strides below
    stride_p,
    stride_h,
    S,
    V,
    ignore_index,
    SETTINGS: tl.constexpr,
):
    """The rows of position p = program id."""
    H_BLOCK: tl.constexpr = SETTINGS.rule.H_BLOCK
    H: tl.constexpr = SETTINGS.rule.H
    RULE: tl.constexpr = SETTINGS.rule
    p = tl.program_id(0).to(tl.int64)
    offs_h = tl.arange(0, H_BLOCK)
    label, valid, head_coefficient, coefficient = row_coefficients(rows, p // S, p % S, offs_h, V, ignore_index, RULE)
    offs = p * stride_p + offs_h.to(tl.int64) * stride_h
    mask = offs_h < H
    tl.store(values.label + offs, tl.where(valid, label, 0), mask=mask)
    tl.store(values.coefficient + offs, coefficient, mask=mask)
    tl.store(values.head_coefficient + offs, head_coefficient, mask=mask)
    tl.store(values.valid + offs, valid, mask=mask)
    deciding = coefficient
    if SETTINGS.WITH_D_WEIGHTS:
        deciding = head_coefficient
    tl.store(values.row_mask + offs, deciding != 0.0, mask=mask)


def pack_inputs(inputs: LossInputs) -> RowInputs:
    """Return the tensors of the rule with their strides."""
    labels, token_weights, head_weights, seq_lens, document_ids, *_ = inputs
    packed = (
        labels, *labels.stride(), labels.shape[1],
        token_weights, *(NO_STRIDES if token_weights is None else (*token_weights.stride(), 0)[:3]),
        head_weights, 0 if head_weights is None else head_weights.stride(0),
        seq_lens, 0 if seq_lens is None else seq_lens.stride(0),
        document_ids, *(NO_STRIDES[:2] if document_ids is None else document_ids.stride()),
    )  # fmt: skip
    return RowInputs._make(packed)


def power_of_2(n: int) -> int:
    """Return the least power of 2 that is not below n; Triton's own function takes as long as an allocation."""
    return 1 << (n - 1).bit_length()


def row_rule(options: LossOptions, H: int) -> Rule:
    """Return the constants that these options compile to."""
    return Rule(
        SHIFT=options.shift,
        LEFT_HALO=options.left_halo,
        H=H,
        H_BLOCK=power_of_2(H),
        OVER=options.head_reduction,
        TARGET_WEIGHTS=options.weight_alignment == "target",
    )


def launch_rows(
    inputs: LossInputs,
    options: LossOptions,
    shape: tuple[int, int, int],  # B, S, H
    *,
    V: int,
    by_head: bool,
    with_d_weights: bool,
) -> RowOutputs:
    """Return the rows of all positions, position by position or `by_head`."""
    B, S, H = shape
    P = B * S
    new = inputs.labels.new_empty
    values = RowOutputs(
        label=new(P * H, dtype=torch.int32),
        coefficient=new(P * H, dtype=torch.float32),
        head_coefficient=new(P * H, dtype=torch.float32),
        valid=new(P * H, dtype=torch.bool),
        row_mask=new(P * H, dtype=torch.bool),
    )
    if P:
        rows_kernel[(P,)](
            pack_inputs(inputs),
            values,
            1 if by_head else H,
            P if by_head else 1,
            S,
            V,
            options.ignore_index,
            SETTINGS=RowsSettings(row_rule(options, H), with_d_weights),
            num_warps=1,
            enable_fp_fusion=True,
        )
    return values
