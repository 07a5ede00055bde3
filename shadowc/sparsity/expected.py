# SPDX-License-Identifier: Apache-2.0
"""Labels "expected", of style shadow+: how much a unit is expected to matter.

A score is the logarithm of the importance that the inputs let expect, as a share of the mean over the layer. Its loss
is the negative log likelihood of an exponential distribution, t exp(-s) + s, whose minimum is at the expectation
whatever the distribution is: keeping the units of the largest scores then keeps most importance in the mean. Tops
(graded.py) ask which units are ahead instead, and a unit just inside weighs as much as one far ahead.

Letters: M positions, Lp predicted layers, U units of a kind per layer, O units.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    Floats = npt.NDArray[np.float32]

LEAST = 1e-3
"""Share of the mean that a unit matters at least; without it a unit that never matters is pushed down without end."""

SURPRISE = 4.0
"""Logarithm of how often its expectation a share may be before its loss grows no faster than linearly. A few positions,
whose inputs lie far from all others, otherwise have gradients that end the training of a layer."""


def shares_of_mean(raw_MLU: Floats) -> Floats:
    """Return importances as shares of the mean over their layer at a position, LEAST at least; below zero is zero.

    NaN where a layer's importances are not finite, or all zero; a layer that never does anything becomes LEAST.
    """
    shares: Floats = np.maximum(raw_MLU, 0)  # the one copy: scores may be gigabytes
    mean_ML1 = shares.mean(axis=2, keepdims=True)
    said_ML1 = np.isfinite(mean_ML1) & (mean_ML1 > 0)
    mean_ML1[~said_ML1] = 1
    shares /= mean_ML1
    np.maximum(shares, np.float32(LEAST), out=shares)
    shares[(~said_ML1 & said_ML1.any(axis=0))[:, :, 0]] = np.nan
    return shares


class Expected:
    """Scores are logarithms of shares, see linear.py; targets are `shares_of_mean`."""

    def constant(self, targets_MO: Tensor) -> Tensor:
        """Return the logarithm of the mean."""
        return targets_MO.mean(0).log()

    def loss(self, scores_MO: Tensor, targets_MO: Tensor) -> Tensor:
        """Return the mean negative log likelihood in nats, a straight line beyond SURPRISE."""
        beyond_MO = targets_MO.log() - scores_MO
        within_MO = beyond_MO.clamp(max=SURPRISE)
        return (within_MO.exp() * (1 + beyond_MO - within_MO) + scores_MO).mean()

    def spreads(self, targets_MO: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means: of the logarithm of an expectation the slope is the expectation's over the mean."""
        mean_O = targets_MO.double().mean(0)
        return mean_O, mean_O.new_ones(mean_O.shape)
