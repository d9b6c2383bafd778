"""Launch shapes: how a row of V logits is cut into tiles.

Math       tile = STRIPS x THREADS x VEC elements, VEC = 16 bytes of logits

Shapes     (V, itemsize, warp size) -> Tile

Algorithm  A thread owns VEC neighbours in each of STRIPS strips of a tile: STRIPS independent 128-bit loads in
           flight, and a reduction over strips and vectors never leaves the thread. Threads grow with the row, so
           that a short row does not idle most of them. Where rows are too few to fill the device, several programs
           share the tiles of a row.

Traffic    None.

Numerics   None. Compiled for sm_80, sm_90, sm_100 and gfx942 by tests/kernels/test_compiled.py: no spills, no
           stack, 128-bit loads. Not timed on a device so far: chosen by the predictions of benchmarks/LOG.md.
"""

from functools import cache
from typing import NamedTuple

import torch

# CDNA waves are 64 wide; torch.version is a build constant, not a device query.
WARP_SIZE = 64 if torch.version.hip else 32
VECTOR_BYTES = 16
# For each multiprocessor: about as many as it holds at once.
LEAST_PROGRAMS = 8
# Of a part of a row: below that a program reads its labels for longer than its logits.
LEAST_TILES = 2


class Tile(NamedTuple):
    """The cut of one row, and the warps that walk it."""

    strips: int
    threads: int
    num_warps: int


def forward_tile(V: int, itemsize: int, warp_size: int, softcap: bool) -> Tile:
    """Rows of V logits of `itemsize` bytes, `warp_size` threads a warp; 64 bytes in flight a thread.

    The tanh of a softcap holds every element in two more registers: half the bytes, or the tile spills.
    """
    return _tile(V, itemsize, warp_size, strips=2 if softcap else 4, most_threads=128 if softcap else 256)


def backward_tile(V: int, itemsize: int, warp_size: int) -> Tile:
    """The same for the gradient: 32 bytes a thread, since reads and writes are both in flight."""
    return _tile(V, itemsize, warp_size, strips=2)


def slab_tile(V: int, itemsize: int, warp_size: int, softcap: bool) -> Tile:
    """Rows that are visited twice: wide programs, so that few rows are in flight and the cache holds all of them.

    Of 50 MB, as an H100 has: 25 MB by three programs of 512 threads on each multiprocessor at rows of 64 KB, 40 MB by
    one of 1024 at rows of 300 KB.
    """
    row_bytes = V * itemsize
    if row_bytes < 2**15:
        return forward_tile(V, itemsize, warp_size, softcap)
    threads = 512 if row_bytes <= 2**16 else 1024
    # 64 registers a thread are all that there are for 1024 of them.
    return Tile(strips=1 if softcap else 2, threads=threads, num_warps=threads // warp_size)


def _tile(V: int, itemsize: int, warp_size: int, strips: int, most_threads: int = 256) -> Tile:
    vectors = V * itemsize // VECTOR_BYTES
    threads = most_threads if vectors >= 2048 else 128 if vectors >= 512 else 64
    return Tile(strips=strips, threads=threads, num_warps=threads // warp_size)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def row_splits(programs: int, V: int, tile: int, multiprocessors: int) -> int:
    """Programs that share a row of V logits in tiles of `tile`, where one to each of `programs` rows is too few."""
    tiles = -(-V // tile)
    wanted = max(1, min(tiles // LEAST_TILES, -(-LEAST_PROGRAMS * multiprocessors // programs)))
    # Parts of whole tiles: none of them empty.
    return -(-tiles // -(-tiles // wanted))
