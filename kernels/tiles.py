"""Launch shapes: how a row of V logits is cut into tiles.

Math       tile = ROWS x LANES elements, LANES = threads * VEC, VEC = 16 bytes of logits

Shapes     (V, itemsize, warp size) -> Tile

Algorithm  A thread owns VEC neighbouring lanes in each of ROWS strips of a tile: ROWS independent 128-bit loads
           in flight, and the maximum over strips never leaves the thread. Warps grow with the row, so that a
           short row does not idle most of its threads.

Traffic    None.

Numerics   None. Compiled for sm_80, sm_90, sm_100 and gfx942 by tests/kernels/test_compiled.py (no spills, no
           stack, 128-bit loads). Not yet timed on a device: the README says so until a results file is cited here.
"""

from typing import NamedTuple

import torch

# CDNA waves are 64 wide; torch.version is a build constant, not a device query.
WARP_SIZE = 64 if torch.version.hip else 32
VECTOR_BYTES = 16
# Two strips of fp32 occupy the registers of four of bf16; past that the loop spills below 4 blocks an SM.
STRIP_BYTES = {2: 4, 4: 4}


class Tile(NamedTuple):
    """The cut of one row, and the warps that walk it."""

    rows: int
    lanes: int
    num_warps: int


def tile(V: int, itemsize: int, warp_size: int) -> Tile:
    """The tile for rows of V logits of `itemsize` bytes on a device with `warp_size` threads a warp."""
    vec = VECTOR_BYTES // itemsize
    threads = 256 if V >= 16384 else 128 if V >= 4096 else 64
    return Tile(rows=STRIP_BYTES[itemsize], lanes=threads * vec, num_warps=threads // warp_size)
