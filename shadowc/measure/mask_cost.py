# SPDX-License-Identifier: Apache-2.0
"""What predictor and selection cost: an engine that keeps everything beside its dense twin.

At density 1 both read the same weights with the same kernels; what the engine takes longer is what it predicts and
selects, nodes and gaps included. A profiler adds tens of microseconds to every node, which is as long as a small
predictor's node takes itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class MaskCost:
    """Shares of the dense twin's time of the same round; the lowest may be negative where a machine is not quiet."""

    share: float
    """Median over the rounds."""
    lowest: float
    highest: float


def mask_cost(whole: Sequence[float], twin: Sequence[float]) -> MaskCost:
    """What masks add to a dense token.

    Args:
        whole: time per token of each round at density 1.
        twin: of the dense twin in the same rounds, in the same unit.
    """
    added = [own / base - 1 for own, base in zip(whole, twin, strict=True)]
    return MaskCost(median(added), min(added), max(added))
