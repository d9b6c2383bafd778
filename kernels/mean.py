"""The loss of all positions, and the factor of their gradients.

Math       loss   = factor * sum_p out[p]
           factor = scale / N        N = positions with a valid head ("target": tokens that a head predicts), the
                                         caller's normalizer, or 1

Shapes     out [B,S] fp32, valid [B,S,H] bool, normalizer [] -> loss [], factor [] fp32

Algorithm  One program sums all positions: the sum has one order, and so the same bits every time.

Traffic    4 + H bytes a position.

Numerics   fp32. Both are exactly 0 where no row is valid.
"""

import torch
import triton
import triton.language as tl

from mtp_ce.kernels.online_softmax import term
from mtp_ce.kernels.rows import row_rule
from mtp_ce.options import LossOptions


@triton.jit
def mean_kernel(
    out_ptr,
    valid_ptr,
    normalizer_ptr,
    loss_ptr,
    factor_ptr,
    P,
    S,
    scale,
    changing_ptr,
    COUNT: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """loss = factor * sum of out, factor = scale / N; both exactly 0 where no row is valid. One program."""
    H: tl.constexpr = RULE.H
    lane_sum = tl.zeros([BLOCK_P], tl.float32)
    lane_count = tl.zeros([BLOCK_P], tl.int32)
    for start in range(0, P, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P).to(tl.int64)
        lane_sum += tl.load(out_ptr + offs_p, mask=offs_p < P, other=0.0)
        counts = tl.zeros([BLOCK_P], tl.int32)
        for h in tl.static_range(H):
            source = offs_p
            mask = offs_p < P
            if COUNT and RULE.OVER == "target":
                # Head h predicts token p from here. (The tokens of a slice are counted by the caller.)
                source = offs_p - (RULE.SHIFT + h)
                mask = mask & (offs_p % S >= RULE.SHIFT + h)
            counts |= tl.load(valid_ptr + source * H + h, mask=mask, other=0).to(tl.int32)
        lane_count += counts
    count = tl.sum(lane_count, axis=0).to(tl.float32)
    normalizer = 1.0
    if COUNT:
        normalizer = count
    elif normalizer_ptr is not None:
        normalizer = tl.load(normalizer_ptr).to(tl.float32)
    empty = count == 0.0
    factor = tl.where(empty, 0.0, term(scale, changing_ptr, 0) / tl.where(empty, 1.0, normalizer))
    tl.store(factor_ptr, factor)
    tl.store(loss_ptr, tl.where(empty, 0.0, tl.sum(lane_sum, axis=0) * factor))


def launch_mean(
    out: torch.Tensor,  # [B, S]
    valid: torch.Tensor,  # [B, S, H]
    normalizer: torch.Tensor | None,  # []
    options: LossOptions,
    terms: torch.Tensor | None = None,  # [4], as in `LossInputs`
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss and factor, 0-d fp32."""
    loss, factor = out.new_empty(()), out.new_empty(())
    S, H = valid.shape[1:]
    mean_kernel[(1,)](
        out,
        valid,
        normalizer,
        loss,
        factor,
        out.numel(),
        S,
        options.loss_scale,
        terms,
        COUNT=options.reduction == "mean" and normalizer is None,
        RULE=row_rule(options, H),
        BLOCK_P=1024,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return loss, factor
