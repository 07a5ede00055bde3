# SPDX-License-Identifier: Apache-2.0
"""Who is compared: both styles at equal width, and style dejavu once more at the bytes of style shadow."""

from __future__ import annotations

from dataclasses import dataclass

from shadowc.checkpoint.opt import OptFacts
from shadowc.sparsity.networks import WIDTH_STEP, cost_share
from shadowc.spec.options import Style

BLOCK = 16
"""Neurons per unit."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A style at a width."""

    style: Style
    width: int

    @property
    def name(self) -> str:
        """Of files, and in the ledger."""
        return f"{self.style}-{self.width}"


def contestants(facts: OptFacts, width: int) -> tuple[Contestant, ...]:
    """Shadow and dejavu at `width`, and dejavu at the bytes of shadow; one of them less if two are the same."""
    bytes_of_shadow = cost_share(facts, BLOCK, width)
    found = (
        Contestant("shadow", width),
        Contestant("dejavu", width),
        Contestant("dejavu", nearest_width(facts, "dejavu", bytes_of_shadow)),
    )
    return tuple(dict.fromkeys(found))


def nearest_width(facts: OptFacts, style: Style, share: float) -> int:
    """The multiple of 32 with which a style's predictor comes nearest to a share of the model's parameters.

    Products of 8 bits take blocks of 32 at least, so other widths would stay float.
    """
    widths = range(WIDTH_STEP, max(facts.hidden, WIDTH_STEP) + 1, WIDTH_STEP)
    return min(widths, key=lambda width: abs(cost_share(facts, BLOCK, width, style) - share))
