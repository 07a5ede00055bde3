# SPDX-License-Identifier: Apache-2.0
"""Density: the share of heads and neurons that is kept in the predicted layers (1.0 = dense)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shadowc.spec.errors import InputError

UNIT_KINDS = ("heads", "neurons")
"""What is kept or left out, in the order of everything that comes in pairs."""


@dataclass(frozen=True, slots=True)
class Density:
    """Shares kept, each in 0..1.

    Raises:
        InputError: a share is outside 0..1 or no number.
    """

    heads: float = 1.0
    neurons: float = 1.0

    def __post_init__(self) -> None:
        """Check the range; NaN fails the comparison and is refused too."""
        wrong = []
        for kind in UNIT_KINDS:
            given = getattr(self, kind)
            share = _number(given)
            object.__setattr__(self, kind, share)  # numpy's and torch's numbers become Python's
            if not 0.0 <= share <= 1.0:
                wrong.append(f"{kind} {given}" if isinstance(given, (int, float)) else f"{kind} {given!r}")
        if wrong:
            raise InputError(
                f"a density is the share kept, from 0 to 1; found {' and '.join(wrong)}",
                hint="for example --density 0.5",
            )

    @staticmethod
    def of(value: float | Density) -> Density:
        """One number means the same share for both kinds."""
        return value if isinstance(value, Density) else Density(value, value)

    @staticmethod
    def parse(text: str) -> Density:
        """`0.5`, the same share for both kinds, or `0.5/0.2`, of heads and of neurons.

        Raises:
            InputError: it is neither, or outside 0..1.
        """
        heads, _, neurons = text.strip().partition("/")
        try:
            shares = float(heads), float(neurons or heads)
        except ValueError:
            raise InputError(
                f"a density was expected, found {text.strip()!r}", hint="0.5, or 0.5/0.2: heads/neurons"
            ) from None
        return Density(*shares)


def _number(value: object) -> float:
    """NaN where it is none; text is none."""
    try:
        return math.nan if isinstance(value, str) else float(value)  # type: ignore[arg-type]  # that is the question
    except (TypeError, ValueError):
        return math.nan
