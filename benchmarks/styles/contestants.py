# SPDX-License-Identifier: Apache-2.0
"""Who is compared: both published styles at equal width, dejavu at the bytes of shadow too; in time also shadow+.

What shadow+ knows is compared in docs/results/predictors.md, with units and labels of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from shadowc.checkpoint.opt import OptFacts
from shadowc.sparsity.networks import WIDTH_STEP, cost_share, default_width
from shadowc.spec.options import Style

BLOCK = 16
"""Neurons per unit of the published styles."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """A style at a width, with units of `block` neurons."""

    style: Style
    width: int
    block: int = BLOCK

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


def timed(facts: OptFacts, width: int) -> tuple[Contestant, ...]:
    """As `contestants`, and shadow+ as `compile` makes it: single neurons, and the width that 3 % of the bytes buy."""
    return (*contestants(facts, width), Contestant("shadow+", default_width(facts, 1, "shadow+"), 1))


def nearest_width(facts: OptFacts, style: Style, share: float) -> int:
    """The multiple of 32 with which a style's predictor comes nearest to a share of the model's parameters.

    Products of 8 bits take blocks of 32 at least, so other widths would stay float.
    """
    widths = range(WIDTH_STEP, max(facts.hidden, WIDTH_STEP) + 1, WIDTH_STEP)
    return min(widths, key=lambda width: abs(cost_share(facts, BLOCK, width, style) - share))
