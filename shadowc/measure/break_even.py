# SPDX-License-Identifier: Apache-2.0
"""The largest density at which an engine, its predictor and selection included, is faster than its dense twin."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Kind = Literal["interpolated", "at least", "below"]


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Where the times of an engine and its dense twin meet."""

    kind: Kind
    """"interpolated" between two measured densities; "at least": faster at the largest one that was measured;
    "below": not faster at any."""
    density: float
    """Share of heads and neurons kept; where nothing was interpolated, the largest or the smallest one measured."""

    def __str__(self) -> str:
        if self.kind == "at least":
            return f"at least {self.density:g}, the largest measured"
        if self.kind == "below":
            return f"below {self.density:g}, the smallest measured: faster at none"
        return f"{self.density:.2f}"


def break_even(points: Iterable[tuple[float, float]]) -> BreakEven:
    """The largest density with a ratio below 1, on straight lines between the points.

    Args:
        points: density and time over the dense twin's, at least one.
    """
    found = sorted(points, reverse=True)
    if found[0][1] < 1:
        return BreakEven("at least", found[0][0])
    for (above, slower), (below, faster) in pairwise(found):
        if faster < 1:
            return BreakEven("interpolated", below + (above - below) * (1 - faster) / (slower - faster))
    return BreakEven("below", found[-1][0])
