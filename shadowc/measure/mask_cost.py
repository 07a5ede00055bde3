# SPDX-License-Identifier: Apache-2.0
"""What predictor and selection cost: an engine that keeps everything beside its dense twin.

At density 1 both read the same weights with the same kernels; what the engine takes longer is what it predicts and
selects, nodes and gaps included. A profiler adds tens of microseconds to every node, which is as long as a small
predictor's node takes itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import median


@dataclass(frozen=True, slots=True)
class MaskCost:
    """Shares of the dense twin's time of the same round; some may be negative where a machine is not quiet."""

    share: float
    """Median over the rounds."""
    least: float
    most: float
    """The median of many more rounds lies between them with 95 % confidence (in five rounds, all of which they span,
    94 %; in fewer less)."""


def mask_cost(whole: Sequence[float], twin: Sequence[float]) -> MaskCost:
    """What masks add to a dense token.

    Args:
        whole: time per token of each round at density 1.
        twin: of the dense twin in the same rounds, in the same unit.
    """
    added = [own / base - 1 for own, base in zip(whole, twin, strict=True)]
    least, most = _median_interval(added)
    return MaskCost(median(added), least, most)


def _median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Order statistics between which the median lies at 95 %; the extremes where there are too few values.

    Each value is below the median with probability 1/2, so as many of n are as of n coins show heads.
    """
    ordered, n, left, outside = sorted(values), len(values), 0, 0.0
    while left < n // 2:
        outside += 2 * comb(n, left) / 2**n
        if outside > 0.05:
            break
        left += 1
    left = max(left - 1, 0)
    return ordered[left], ordered[n - 1 - left]
