"""A tensor multiplied in its own memory by a number on the device; nothing moves where that is 1.

Math       x[i] = s x[i]

Shapes     x contiguous, of any shape and dtype; s [] fp32

Algorithm  A fixed grid of programs, each with every so many-th block of x. Where s is 1, as the upstream gradient of
           most losses is, they all end after one load: the host need not wait for s to know.

Traffic    x read and written once; nothing where s is 1. See `traffic`.

Numerics   The product in fp32, rounded once.
"""

import torch
import triton
import triton.language as tl

from mtp_ce.kernels.tiles import processors

BLOCK_N, PROGRAMS = 4096, 8  # programs for each multiprocessor


@triton.jit
def scale_kernel(x_ptr, scale_ptr, N, BLOCK_N: tl.constexpr):
    """Blocks program id, program id + programs, ... of x."""
    scale = tl.load(scale_ptr)
    if scale != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK_N
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK_N, N, step):
            offs_n = start + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N
            x = tl.load(x_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            tl.store(x_ptr + offs_n, (x * scale).to(x_ptr.dtype.element_ty), mask=mask_n)


def launch_scale(x: torch.Tensor, scale: torch.Tensor) -> None:
    """Multiply x in place by scale []."""
    N = x.numel()
    if N:
        programs = min(-(-N // BLOCK_N), PROGRAMS * processors(x.device))
        scale_kernel[(programs,)](x, scale, N, BLOCK_N=BLOCK_N, num_warps=8, enable_fp_fusion=True)


def traffic(N: int, itemsize: int, scale: float) -> tuple[int, int]:
    """Return bytes of x read and written."""
    moved = 0 if scale == 1 else N * itemsize
    return moved, moved
