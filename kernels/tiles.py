"""Launch shapes: how a row of V logits is divided into tiles.

Math       tile = STRIPS x THREADS x VEC elements, VEC = 16 bytes of logits

Shapes     (V, itemsize, warp size) -> Tile

Algorithm  A thread owns VEC neighbours in each of STRIPS strips of a tile: STRIPS independent 128-bit loads in
           flight, and a reduction over strips and vectors never leaves the thread. The number of threads grows with
           the row, so that a short row does not idle most of them. Where rows are too few to fill the device, or fill
           a little more than a wave of programs, several programs share the tiles of a row (split-V).

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
# Programs that a multiprocessor is taken to hold at once: backward's where they share rows; forward's are two or three.
PROGRAMS_HELD = 6
# Tiles of a split: with fewer a program spends longer on its labels than on its logits.
LEAST_TILES = 2
# Loads of a program before its first logits, each waiting for the last: labels, weights, what backward reads of a row.
FIRST_LOADS = 3


class Tile(NamedTuple):
    """The tile of one row, and the warps of the program that reads it."""

    strips: int
    threads: int
    num_warps: int


def forward_tile(V: int, itemsize: int, warp_size: int, softcap: bool) -> Tile:
    """Return the tile of a forward over rows of V logits of `itemsize` bytes: 64 bytes in flight a thread.

    The tanh of a softcap holds every element in two more registers: half the bytes, or the tile spills.
    """
    return _tile(V, itemsize, warp_size, strips=2 if softcap else 4, most_threads=128 if softcap else 256)


def backward_tile(V: int, itemsize: int, warp_size: int) -> Tile:
    """Return the tile of a gradient: 32 bytes a thread, since loads and stores are both in flight."""
    return _tile(V, itemsize, warp_size, strips=2)


def chunk_tile(V: int, itemsize: int, warp_size: int, softcap: bool) -> Tile:
    """Return the tile of rows that are read twice: wide programs, so that the L2 cache holds all rows in flight.

    Of an H100's 50 MB they take 25 MB at rows of 64 KB (three programs of 512 threads on each multiprocessor) and 40 MB
    at rows of 300 KB (one program of 1024).
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
    """Return the number of multiprocessors of a GPU; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def row_splits(programs: int, V: int, tile: int, multiprocessors: int) -> int:
    """Return how many programs share a row of V logits in tiles of `tile`, where `programs` would not share any.

    The number with the fewest steps one after the other: waves of programs times the tiles and first loads of one. A
    wave that is almost empty takes as long as a full one, and so it is left only where its programs are short.
    """
    tiles = -(-V // tile)
    held = max(1, PROGRAMS_HELD * multiprocessors)

    def steps(splits: int) -> int:
        return -(-programs * splits // held) * (-(-tiles // splits) + FIRST_LOADS)

    best = min(range(1, max(1, tiles // LEAST_TILES) + 1), key=steps)
    # Splits of whole tiles, none of them empty.
    return -(-tiles // -(-tiles // best))
