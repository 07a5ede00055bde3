# SPDX-License-Identifier: Apache-2.0
"""How much memory a compile for TensorRT needs here, told before it is used.

Weights never reach the builder, so its own need hardly depends on the model. The check against torch maps them and
makes some of them float32: opt-1.3b, 2.7 GB of weights, took 6.4 GB at most.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shadowc.emit.weights import nbytes

if TYPE_CHECKING:
    from shadowc.spec.program import WeightRecipe

BUILDER_BYTES = 1_200_000_000
"""What the builder's process (0.3 GB) and this one with torch (0.8 GB) hold whatever the model, measured."""


def host_bytes(recipes: Mapping[str, WeightRecipe]) -> int:
    """Estimate of the most memory that a compile holds at once, in bytes."""
    return BUILDER_BYTES + 2 * sum(map(nbytes, recipes.values()))


MEMINFO = Path("/proc/meminfo")


def free_bytes() -> int:
    """Memory that this machine could give now, cached files that would make way included; 0 if it cannot be told."""
    try:
        for line in MEMINFO.read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def host_note(recipes: Mapping[str, WeightRecipe]) -> str:
    """The estimate as a sentence."""
    return (
        f"a compile of this model needs about {host_bytes(recipes) / 1e9:.1f} GB, {free_bytes() / 1e9:.1f} GB are free"
    )
