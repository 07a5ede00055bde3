# SPDX-License-Identifier: Apache-2.0
"""Density: the share of heads and neurons that is kept in the predicted layers (1.0 = dense)."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

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
        wrong = [
            f"{kind} {value}"
            for kind, value in zip(UNIT_KINDS, (self.heads, self.neurons), strict=True)
            if not _is_share(value)
        ]
        if wrong:
            raise InputError(
                f"a density is the share kept, from 0 to 1; found {' and '.join(wrong)}",
                hint="for example --density 0.5",
            )

    @staticmethod
    def of(value: float | Density) -> Density:
        """One number means the same share for both kinds."""
        return value if isinstance(value, Density) else Density(value, value)


def _is_share(value: object) -> bool:
    return isinstance(value, Real) and 0.0 <= float(value) <= 1.0
