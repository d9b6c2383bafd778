"""The header of a GGUF file, walked without reading a tensor: every length in it fits the file.

The package gguf takes the lengths as they are, so that a flipped bit in the length of an array of numbers is a loop of
2^60 rounds. Needs neither torch nor the package.

Source: the GGUF specification of ggml-org/ggml, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Bytes of a value by its type; a text and an array have their own lengths.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9
_MAX_DIMENSIONS = 8


def check_header(file: Path) -> None:
    """Walk the header of a GGUF file.

    Raises:
        ValueError: it is no GGUF file, or is damaged.
        OSError: it can't be read.
    """
    with file.open("rb") as opened:
        if opened.read(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        header = _Header(opened, os.fstat(opened.fileno()).st_size)
        version = header.number(4)
        if version not in _VERSIONS:
            raise ValueError(f"it has version {version}; expected {' or '.join(map(str, _VERSIONS))}")
        tensors, entries = header.number(8), header.number(8)
        for _ in range(entries):
            header.text()
            header.value(header.number(4))
        for _ in range(tensors):
            header.text()
            dimensions = header.number(4)
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions:,} dimensions")
            header.skip(8 * dimensions + 4 + 8)


class _Header:
    """Reads forward, and never beyond the end: each step takes a byte at least, so that no count runs for ever."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size - file.tell()

    def skip(self, count: int) -> None:
        self._take(count)
        self._file.seek(count, os.SEEK_CUR)

    def number(self, count: int) -> int:
        self._take(count)
        return int.from_bytes(self._file.read(count), "little")

    def text(self) -> None:
        self.skip(self.number(8))

    def value(self, kind: int) -> None:
        if kind == _TEXT:
            self.text()
        elif kind == _ARRAY:
            inside, count = self.number(4), self.number(8)
            if inside in _SIZES:
                self.skip(count * _SIZES[inside])
            elif inside == _TEXT:
                for _ in range(count):
                    self.text()
            else:
                raise ValueError(f"an array has values of the unknown type {inside}")
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise ValueError(f"a value has the unknown type {kind}")

    def _take(self, count: int) -> None:
        if count > self._left:
            raise ValueError("it ends within its header")
        self._left -= count
