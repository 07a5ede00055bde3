# SPDX-License-Identifier: Apache-2.0
"""weights.bin on the device: mapped, copied once, shared by both plans."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from shadowc.runtime.tensorrt.device import Address, Arena, Device
from shadowc.spec.manifest import WeightPart

PIECE_BYTES = 1 << 26
"""Copied at once, through a pinned buffer: a copy from mapped pages would be staged by the driver anyway."""


def load_weights(device: Device, arena: Arena, path: Path, table: tuple[WeightPart, ...]) -> Mapping[str, Address]:
    """Copy the file to the device; returns where each weight lies there.

    Raises:
        SetupError: the device has too little memory.
    """
    size = path.stat().st_size
    base = arena.allocate(size)
    staging = Arena(device)
    try:
        address, view = staging.pinned(min(PIECE_BYTES, size))
        mapped = np.memmap(path, np.uint8, mode="r")
        for start in range(0, size, PIECE_BYTES):
            length = min(PIECE_BYTES, size - start)
            view[:length] = mapped[start : start + length]
            device.upload(base + start, address, length)
            device.synchronize()
    finally:
        staging.close()
    return {weight.name: base + weight.offset for weight in table}
