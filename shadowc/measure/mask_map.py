# SPDX-License-Identifier: Apache-2.0
"""How often each unit was computed, as a map: layers down, heads and then units of neurons across.

Letters: B rows, L predicted layers, M model layers, N units of a kind, C cells across.
"""

from __future__ import annotations

import struct
import zlib
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shadowc.spec.density import UNIT_KINDS

if TYPE_CHECKING:
    from shadowc.runtime.mask_trace import TokenMasks

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

_NEVER, _ALWAYS = np.array((236, 239, 243.0)), np.array((20, 60, 130.0))
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BAND, _GAP = 12, 12
"""Pixels of a layer, and between heads and neurons."""
_LEAST_WIDTH = 320
"""Pixels of a kind; a unit is as wide as that takes."""


class MaskMap:
    """Adds up the masks of one row's tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self._last: dict[str, npt.NDArray[np.bool_]] = {}
        self._sums: dict[str, Floats] = {}

    def add(self, masks: TokenMasks) -> None:
        """Count the masks of one token of the first row."""
        self.tokens += 1
        self._last = {"heads": masks.heads[0], "neurons": masks.neurons[0]}
        for kind, mask_LN in self._last.items():
            self._sums[kind] = self._sums.get(kind, np.zeros(mask_LN.shape)) + mask_LN

    def last(self, kind: str) -> Floats:
        """The last token's mask [M,N], 1 for a unit that was computed; layer 0 is dense."""
        return _with_dense(self._last[kind].astype(np.float64))

    def mean(self, kind: str) -> Floats:
        """Share of the tokens that computed a unit, [M,N]."""
        return _with_dense(self._sums[kind] / self.tokens)

    def active(self, kind: str) -> npt.NDArray[np.int64]:
        """Units that the last token computed in every model layer, [M]."""
        counts_M: npt.NDArray[np.int64] = self.last(kind).sum(axis=1).astype(np.int64)
        return counts_M

    def picture(self) -> Pixels:
        """The means as an image [height,width,3]: light for never, dark for always, heads left of neurons."""
        parts = []
        for kind in UNIT_KINDS:
            mean_MN = self.mean(kind)
            width = -(-_LEAST_WIDTH // mean_MN.shape[1])
            parts.append(np.repeat(np.repeat(_colours(mean_MN), _BAND, axis=0), width, axis=1))
            parts.append(np.full((len(parts[-1]), _GAP, 3), 255, np.uint8))
        return np.concatenate(parts[:-1], axis=1)


def cells(share_MN: Floats, count: int) -> Floats:
    """The same map with at most `count` cells across [M,C]: neighbouring units share one, which has their mean."""
    units = share_MN.shape[1]
    if units <= count:
        return share_MN
    edges = np.linspace(0, units, count + 1).round().astype(np.int64)
    return np.stack([share_MN[:, start:stop].mean(axis=1) for start, stop in pairwise(edges)], axis=1)


def png(image: Pixels, text: str = "") -> bytes:
    """A PNG file of an image [height,width,3], with a description in it if there is one."""
    height, width, _ = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    if text:
        parts.append((b"tEXt", b"Description\0" + text.encode("latin-1", "replace")))
    parts += [(b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def _with_dense(share_LN: Floats) -> Floats:
    return np.concatenate([np.ones((1, share_LN.shape[1])), share_LN])


def _colours(share: Floats) -> Pixels:
    pixels: Pixels = np.rint(_NEVER + share[..., None] * (_ALWAYS - _NEVER)).astype(np.uint8)
    return pixels
