# SPDX-License-Identifier: Apache-2.0
"""weights.bin: every initialiser that has a recipe, streamed group by group, hashed while it is written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from shadowc.emit.records import Array, groups, materialise
from shadowc.emit.rows import Overflow
from shadowc.spec.manifest import FileEntry
from shadowc.spec.program import TensorSource, WeightRecipe
from shadowc.spec.progress import NullProgress, Progress

RECORD_ALIGNMENT = 4096
"""One page: a record starts where a page starts, and the file can be mapped."""
SMALL_ALIGNMENT = 64
"""One cache line."""
DEVICE_ALIGNMENT = 256
"""What CUDA gives every allocation: a file laid out so can be copied to the device as it is."""
_RECORDS = ("attention_records", "ffn_records", "network_rows", "network_quads")
_WRITE_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one tensor lies in weights.bin."""

    offset: int
    length: int


def nbytes(recipe: WeightRecipe) -> int:
    """Size of the tensor that a recipe makes."""
    return int(np.prod(recipe.shape, dtype=np.int64)) * np.dtype(recipe.dtype).itemsize


def write_weights(
    path: Path,
    recipes: Mapping[str, WeightRecipe],
    source: TensorSource,
    progress: Progress | None = None,
    *,
    alignment: int = 0,
) -> tuple[dict[str, Placement], FileEntry]:
    """Write all tensors in layer order; holds one group in memory at a time.

    Args:
        path: the file.
        recipes: what it holds.
        source: every tensor that the recipes name.
        progress: told how many bytes are written.
        alignment: where every tensor starts, in bytes; 0: records at pages, the rest at cache lines.

    Returns:
        Where each tensor lies, and the size and hash of the file.

    Raises:
        InputError: weights are too large for float16; with their number and the tensors.
    """
    progress = progress or NullProgress()
    total = sum(map(nbytes, recipes.values()))
    places: dict[str, Placement] = {}
    digest, overflow = hashlib.sha256(), Overflow()
    position = done = 0
    with path.open("wb", buffering=0) as raw, _Aligned(raw) as file:
        for names in groups(recipes):
            for name, array in materialise(recipes, source, names, overflow).items():
                usual = RECORD_ALIGNMENT if recipes[name].kind in _RECORDS else SMALL_ALIGNMENT
                padding = bytes(-position % (alignment or usual))
                for piece in (memoryview(padding), *_pieces(array)):
                    file.write(piece)
                    digest.update(piece)
                position += len(padding) + array.nbytes
                places[name] = Placement(position - array.nbytes, array.nbytes)
                done += array.nbytes
            progress.advance(done, total, "bytes")
    overflow.require_none()
    return places, FileEntry(size=position, sha256=digest.hexdigest())


class _Aligned:
    """Writes whole chunks that start at multiples of their size.

    The page cache keeps what is written at once in one piece, and a mapping of the file has large pages where the
    pieces are large: see runtime/weights_memory.py.
    """

    def __init__(self, raw: FileIO) -> None:
        self._raw = raw
        self._chunk = bytearray(_WRITE_BYTES)
        self._filled = 0

    def __enter__(self) -> _Aligned:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._flush()

    def write(self, piece: memoryview) -> None:
        while len(piece):
            taken = piece[: _WRITE_BYTES - self._filled]
            self._chunk[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            piece = piece[len(taken) :]
            if self._filled == _WRITE_BYTES:
                self._flush()

    def _flush(self) -> None:
        rest = memoryview(self._chunk)[: self._filled]
        while len(rest):
            rest = rest[self._raw.write(rest) :]
        self._filled = 0


def _pieces(array: Array) -> list[memoryview]:
    """The bytes of an array in pieces that stay in the cache between writing and hashing."""
    flat = array.reshape(-1).view(np.uint8)
    return [flat[start : start + _WRITE_BYTES].data for start in range(0, len(flat), _WRITE_BYTES)]
